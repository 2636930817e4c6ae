"""run_reference.py's command line, which shares host/cli.py and host/generation.py with the kernel's."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_model import REPORT_KEYS, assert_rejected, run_script

import run_reference
from checkpoints.harmony import chat_ids
from command_line.options import DEMO_CHAT
from host import limits
from reference import Reference
from tokenizer_util import Tokenizer

ROOT = Path(__file__).parents[2]
PROMPT = "Café"


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command line in this process; return (exit code, stdout, stderr)."""

    def run(*words) -> tuple[int, str, str]:
        return run_script(run_reference.main, ["--model", folder, "--device", "cpu", *words], monkeypatch, capsys)

    return run


def greedy(checkpoint, ids: list[int], n: int, **options) -> list[int]:
    return list(Reference(checkpoint, **options).generate(ids, n))


def test_json_is_all_of_stdout(run, checkpoint, folder):
    code, out, _ = run("--prompt", PROMPT, "--max-new-tokens", 9, "--json")
    result = json.loads(out)
    expected = greedy(checkpoint, list(PROMPT.encode()), 9)
    assert code == 0
    assert list(result) == REPORT_KEYS
    assert result["prompt_ids"] == list(PROMPT.encode())
    assert result["token_ids"] == expected
    assert result["text"] == Tokenizer.from_folder(folder).decode(expected)
    assert (result["device"], result["path"]) == ("cpu", "reference")
    assert result["ttft_ms"] > 0
    assert result["tpot_ms"] > 0


def test_text_is_all_of_stdout_and_stderr_sums_up(run):
    text = json.loads(run("--prompt", PROMPT, "--max-new-tokens", 9, "--json")[1])["text"]
    code, out, err = run("--prompt", PROMPT, "--max-new-tokens", 9)
    assert (code, out) == (0, text + "\n")
    summary, cut = err.splitlines()
    assert re.fullmatch(r"\[5 prompt \+ 9 new tokens, TTFT [\d.]+ ms, [\d.]+ ms per token, cpu, reference\]", summary)
    assert cut == "the answer was cut after 9 tokens: --max-new-tokens 9"


def test_the_stop_token_is_an_id_but_not_text(run, checkpoint, folder, monkeypatch):
    ids = greedy(checkpoint, [65], 9)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[4]}))
    try:
        result = json.loads(run("--prompt-ids", 65, "--max-new-tokens", 9, "--json")[1])
    finally:
        (folder / "generation_config.json").unlink()
    stop = ids.index(ids[4])
    assert result["token_ids"] == ids[: stop + 1]
    assert result["text"] == Tokenizer.from_folder(folder).decode(ids[:stop])


@pytest.mark.parametrize(("words", "message"), [(["--chat", "Hi"], "Hi"), ([], DEMO_CHAT)])
def test_chat_wraps_the_message_and_the_demo_is_the_default(run, folder, words, message):
    result = json.loads(run(*words, "--max-new-tokens", 1, "--json")[1])
    assert result["prompt_ids"] == chat_ids(Tokenizer.from_folder(folder), message)


def test_quant_and_layers(run, checkpoint):
    arguments = ("--prompt-ids", "65,66 67", "--max-new-tokens", 6, "--json")
    quantized, cut = json.loads(run(*arguments, "--quant")[1]), json.loads(run(*arguments, "--layers", 1)[1])
    assert quantized["path"] == "reference-quant"
    assert quantized["token_ids"] == greedy(checkpoint, [65, 66, 67], 6, quant=True)
    assert cut["token_ids"] == greedy(checkpoint, [65, 66, 67], 6, n_layers=1)


def test_logits_out_has_a_row_for_each_position_fed(run, checkpoint, tmp_path):
    path = tmp_path / "logits.npy"
    result = json.loads(run("--prompt-ids", "65,66", "--max-new-tokens", 5, "--json", "--logits-out", path)[1])
    logits = np.load(path)
    fed = [65, 66, *result["token_ids"][:-1]]
    model = Reference(checkpoint)
    expected = torch.cat([model.forward([token_id], position) for position, token_id in enumerate(fed)])
    assert (logits.shape, logits.dtype) == ((6, 264), np.float32)
    assert logits[1:].argmax(-1).tolist() == result["token_ids"]
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=1e-3)
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npy"]


def test_a_full_context_is_told_and_ends_cleanly(run):
    code, out, err = run("--prompt-ids", "65,66", "--max-context", 6, "--json")
    assert (code, err) == (0, "")
    assert (len(json.loads(out)["token_ids"]), json.loads(out)["finish"]) == (5, "length")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompt", ""], "--prompt: the prompt is empty"),
        (["--chat", " "], "--chat: the prompt is empty"),
        (["--prompt-ids", ","], "--prompt-ids: the prompt is empty"),
        (["--prompt-ids", "65,264"], "token id 264 lies outside the vocabulary of 264"),
        (["--prompt-ids", "65,-1"], "'65,-1' is not a list of token ids"),
        (["--prompt-ids", "65", "--chat", "Hi"], "argument --chat: not allowed with argument --prompt-ids"),
        (["--prompt", "a", "--chat", "Hi"], "argument --chat: not allowed with argument --prompt"),
        (["--chat"], "argument --chat: expected one argument"),
        (["--prompt", "a", "--prompt-ids", "65"], "not allowed with"),
        (["--prompt", "abc", "--max-context", "2"], "--prompt: 3 tokens do not fit in a context of 2"),
        (["--prompt", "a", "--max-new-tokens", "0"], "'0' is not a positive integer"),
        (["--prompt", "a", "--layers", "3"], "--layers 3: the model has layers 1 to 2"),
        (["--prompt", "a\udcff"], "not valid UTF-8"),
        (["--prompt", "a", "--device", "gpu7"], "device gpu7: "),
        (["--prompt", "a", "--device", "meta"], "device meta: "),
        (["--prompt", "a", "--model", "nowhere/at/all"], "nowhere/at/all"),
        (["--prompt", "a", "--logits-out", "nowhere/logits.npy"], "--logits-out nowhere/logits.npy: No such file"),
        (["--prompt", "a", "--logits-out", "."], "--logits-out .: is there already, and not a regular file"),
        (["--prompt", "a", "--max-context", "131073"], "--max-context 131073: the model takes 1 to 131072"),
        (["--prompt", "a", "--frobnicate"], "unrecognized arguments: --frobnicate"),
        (["--prompt", "a", "two\nlines"], "unrecognized arguments: two lines"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message):
    assert_rejected(run(*arguments), message)


def test_too_little_memory_for_the_context(run, monkeypatch):
    cache = 2 * 2 * 131072 * 2 * 128  # keys and values of two layers, two bytes each
    monkeypatch.setattr(limits, "available_bytes", lambda device: cache + limits.WORKSPACE_BYTES)
    assert_rejected(run("--prompt", "a", "--max-context", 131072), "not enough memory on cpu", "131072 tokens")
    assert run("--prompt", "a", "--max-new-tokens", 1, "--max-context", 1024)[0] == 0


def start(folder: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run_reference.py"), "--model", str(folder), "--device", "cpu", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("ending, code", [("interrupt", 130), ("closed pipe", 141)])
def test_an_early_end_leaves_no_traceback(folder, ending, code):
    process = start(folder, "--prompt-ids", "65", "--max-new-tokens", "4000")
    process.stdout.read(1)
    if ending == "interrupt":
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (code, "")


@pytest.mark.parametrize(
    "script",
    [
        "run_reference.py",
        "gpt_oss_megakernel.py",
        "run_triton_phased.py",
        "bench_tpot.py",
        "bench_islosl.py",
        "acc_eval.py",
    ],
)
def test_an_interrupt_during_the_imports_leaves_no_traceback(tmp_path, script):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = subprocess.run(
        [sys.executable, ROOT / script],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
