"""gpt_oss_megakernel.py from its user's side: the command line and MegaModel, on the CPU interpreter."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import REPORT_KEYS, assert_rejected, run_script, small_checkpoint, write_model

import gpt_oss_megakernel
from checkpoints.checkpoint import INDEX_NAME, WEIGHTS_NAME
from checkpoints.config import PRESETS
from checkpoints.harmony import chat_ids
from command_line.options import DEMO_CHAT
from common.barrier import ABORT
from gpt_oss_megakernel import MegaModel
from host import limits
from host.state import State
from load_hf import open_checkpoint
from reference import Reference
from system.errors import InputError, MegakernelAborted
from tokenizer_util import Tokenizer

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "models" / "sonnets"
PROMPT = "Café"
PROMPT_IDS = list(PROMPT.encode())
VOCAB = 264


@pytest.fixture
def own_folder(tmp_path) -> Path:
    """A small model in two shards, which a test may change."""
    return write_model(tmp_path / "own", shards=2)


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command line in this process, on `folder` by default; return (exit code, stdout, stderr)."""

    def run(*words, model: Path | str | None = folder) -> tuple[int, str, str]:
        source = [] if model is None else ["--model", model]
        return run_script(gpt_oss_megakernel.main, [*source, *words], monkeypatch, capsys)

    return run


@pytest.fixture
def run_json(run):
    """Return the JSON object of a run without errors."""

    def run_json(*words, **options) -> dict:
        code, out, err = run(*words, "--json", **options)
        assert (code, err) == (0, "")
        assert out.count("\n") == 1
        return json.loads(out)

    return run_json


def test_equal_seeds_draw_equal_answers(run, run_json):
    words = ("--prompt", PROMPT, "--max-new-tokens", 9, "--temperature", 1.5)
    drawn = run_json(*words)
    assert drawn["temperature"] == 1.5
    assert run_json(*words, "--seed", drawn["seed"]) == drawn | {name: ANY for name in ("ttft_ms", "tpot_ms")}
    assert run_json(*words)["seed"] != drawn["seed"]
    code, out, err = run(*words, "--seed", drawn["seed"])
    assert (code, out) == (0, drawn["text"] + "\n")
    assert err.splitlines()[0].endswith(f"temperature 1.5, seed {drawn['seed']}]")


CUTS = {"top_k": 1, "top_p": 1e-6, "min_p": 1.0}


def test_unlikely_tokens_are_left_out(run_json):
    words = ("--prompt", PROMPT, "--max-new-tokens", 9)
    likeliest = run_json(*words)
    assert {name: likeliest[name] for name in CUTS} == dict.fromkeys(CUTS)
    for name, value in CUTS.items():
        found = run_json(*words, "--temperature", 2, f"--{name.replace('_', '-')}", value)
        assert found["token_ids"] == likeliest["token_ids"]
        assert {name: found[name] for name in CUTS} == dict.fromkeys(CUTS) | {name: value}


def greedy(checkpoint, prompt_ids: list[int], n: int, **options) -> list[int]:
    return list(Reference(checkpoint, **options).generate(prompt_ids, n))


@pytest.mark.parametrize(("words", "path", "quant"), [([], "default", False), (["--quant"], "quant", True)])
def test_json_is_all_of_stdout(run_json, checkpoint, folder, words, path, quant):
    result = run_json("--prompt", PROMPT, "--max-new-tokens", 9, *words)
    expected = greedy(checkpoint, PROMPT_IDS, 9, quant=quant)
    assert list(result) == REPORT_KEYS
    assert result["prompt_ids"] == PROMPT_IDS
    assert result["token_ids"] == expected
    assert result["text"] == Tokenizer.from_folder(folder).decode(expected)
    assert (result["device"], result["path"]) == ("cpu", path)
    assert result["ttft_ms"] > result["tpot_ms"] > 0


def test_text_is_all_of_stdout_and_stderr_sums_up(run, run_json):
    text = run_json("--prompt", PROMPT, "--max-new-tokens", 9)["text"]
    code, out, err = run("--prompt", PROMPT, "--max-new-tokens", 9)
    assert (code, out) == (0, text + "\n")
    summary, cut = err.splitlines()
    assert re.fullmatch(r"\[5 prompt \+ 9 new tokens, TTFT [\d.]+ ms, [\d.]+ ms per token, cpu, default\]", summary)
    assert cut == "the answer was cut after 9 tokens: --max-new-tokens 9"


def test_text_from_stdin(run_json, folder, monkeypatch):
    def pipe(data: bytes) -> None:
        reader, writer = os.pipe()
        os.write(writer, data)
        os.close(writer)
        monkeypatch.setattr(sys, "stdin", os.fdopen(reader))

    expected = {flag: run_json(flag, "h\u00e9", "--max-new-tokens", 2)["prompt_ids"] for flag in ("--chat", "--prompt")}
    for flag, words in (("--chat", ["--chat", "-"]), ("--prompt", ["--prompt", "-"]), ("--chat", [])):
        pipe("h\u00e9\n".encode())
        assert run_json(*words, "--max-new-tokens", 2)["prompt_ids"] == expected[flag]


def test_stdin_that_cannot_be_read(run, monkeypatch):
    for data, text in ((b"\xff", "stdin is not valid UTF-8"), (b"", "--chat: the prompt is empty")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        assert_rejected(run("--chat", "-"), text)


def test_an_open_pipe_without_text_is_not_waited_for(run_json, monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setattr(sys, "stdin", os.fdopen(reader))
    demo = run_json("--max-new-tokens", 1)["prompt_ids"]
    os.close(writer)
    assert run_json("--chat", DEMO_CHAT, "--max-new-tokens", 1)["prompt_ids"] == demo


def test_text_streams_token_by_token(run, monkeypatch):
    n_seen = []

    class Recorder(io.StringIO):
        def flush(self):
            n_seen.append(len(self.getvalue()))

    seen = Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", seen)
        run("--prompt-ids", "65,66", "--max-new-tokens", 6)
    assert len(set(n_seen)) > 4, "the text came in few pieces"


@pytest.mark.parametrize(("words", "message"), [(["--chat", "Hi"], "Hi"), ([], DEMO_CHAT)])
def test_chat_wraps_the_message_and_the_demo_is_the_default(run_json, folder, monkeypatch, words, message):
    monkeypatch.setattr(MegaModel, "generate", lambda *args: iter([65]))  # hundreds of bytes make a slow prompt
    result = run_json(*words, "--max-new-tokens", 1)
    assert result["prompt_ids"] == chat_ids(Tokenizer.from_folder(folder), message)
    assert result["tpot_ms"] is None


def test_prompt_ids_are_taken_as_they_are(run_json, checkpoint):
    result = run_json("--prompt-ids", "65, 263 0", "--max-new-tokens", 4)
    assert result["prompt_ids"] == [65, 263, 0]
    assert result["token_ids"] == greedy(checkpoint, [65, 263, 0], 4)


def test_logits_out_has_a_row_for_each_position_fed(run_json, checkpoint, tmp_path):
    path = tmp_path / "logits.npy"
    arguments = ("--prompt-ids", "65,66,67", "--max-new-tokens", 5)
    without, result = run_json(*arguments), run_json(*arguments, "--logits-out", path)
    logits, model = np.load(path), MegaModel(checkpoint, max_context=8)
    fed = [65, 66, 67, *result["token_ids"][:-1]]
    expected = torch.stack([model.logits(token_id, position) for position, token_id in enumerate(fed)])
    assert (logits.shape, logits.dtype) == ((7, VOCAB), np.float32)
    assert np.array_equal(logits, expected.numpy())
    assert result["token_ids"] == without["token_ids"] == logits[2:].argmax(-1).tolist()
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npy"]


@pytest.mark.parametrize("words", [[], ["--quant"]], ids=["default", "quant"])
def test_the_number_of_programs_changes_no_bit(run_json, tmp_path, words):
    def run_with(n: int) -> tuple[list[int], bytes]:
        path = tmp_path / f"{n}.npy"
        arguments = ("--prompt", PROMPT, "--max-new-tokens", 3, "--num-programs", n, "--logits-out", path)
        return run_json(*arguments, *words)["token_ids"], path.read_bytes()

    assert run_with(1) == run_with(3)


def test_layers_cuts_the_model(run_json, checkpoint):
    whole, cut = (run_json("--prompt", PROMPT, "--max-new-tokens", 4, "--layers", n)["token_ids"] for n in (2, 1))
    assert whole == greedy(checkpoint, PROMPT_IDS, 4)
    assert cut == greedy(checkpoint, PROMPT_IDS, 4, n_layers=1) != whole


def test_a_stop_token_ends_the_run_and_is_an_id_but_not_text(run_json, checkpoint, own_folder):
    ids = greedy(checkpoint, [65], 9)
    (own_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[4]}))
    result = run_json("--prompt-ids", 65, "--max-new-tokens", 9, model=own_folder)
    stop = ids.index(ids[4])
    assert result["token_ids"] == ids[: stop + 1]
    assert result["text"] == Tokenizer.from_folder(own_folder).decode(ids[:stop])


@pytest.mark.parametrize("n_prompt", [2, 6])
def test_a_full_context_is_told_and_ends_cleanly(run, tmp_path, n_prompt):
    ids = ",".join(["65"] * n_prompt)
    code, out, err = run("--prompt-ids", ids, "--max-context", 6, "--json", "--logits-out", tmp_path / "l.npy")
    assert (code, err) == (0, "")
    assert (len(json.loads(out)["token_ids"]), json.loads(out)["finish"]) == (7 - n_prompt, "length")
    assert np.load(tmp_path / "l.npy").shape == (6, VOCAB)


def test_the_default_context_is_no_longer_than_the_model_takes(run, own_folder):
    edit_config(own_folder, max_position_embeddings=6)
    code, out, err = run("--prompt-ids", "65,65", "--json", model=own_folder)
    assert (code, err) == (0, "")
    assert (len(json.loads(out)["token_ids"]), json.loads(out)["finish"]) == (5, "length")
    assert_rejected(run("--prompt-ids", ",".join(["65"] * 7), model=own_folder), "do not fit in a context of 6")


@pytest.mark.parametrize(
    "words, cut", [(["--max-new-tokens", 5], "--max-new-tokens 5"), (["--max-new-tokens", 6], "the context is full")]
)
def test_what_cut_an_answer_is_told(run, words, cut):
    err = run("--prompt-ids", "65,65", "--max-context", 6, *words)[2]
    assert err.splitlines()[1] == f"the answer was cut after 5 tokens: {cut}"


def test_a_whole_answer_is_not_said_to_be_cut(run_json, run, checkpoint, own_folder):
    (own_folder / "generation_config.json").write_text(json.dumps({"eos_token_id": greedy(checkpoint, [65], 5)[4]}))
    words = ("--prompt-ids", 65, "--max-new-tokens", 9)
    assert run_json(*words, model=own_folder)["finish"] == "stop"
    assert "cut" not in run(*words, model=own_folder)[2]


@pytest.fixture
def small_preset(monkeypatch):
    config = small_checkpoint().with_config(stop_ids=tuple(range(VOCAB))).config
    monkeypatch.setitem(PRESETS, "20b", config)
    return config


def test_random_weights_need_no_file_and_never_stop(run, run_json, small_preset, monkeypatch):
    monkeypatch.setattr("load_model.open_checkpoint", None)
    arguments = ("--random-weights", "20b", "--layers", 1, "--max-new-tokens", 40)
    result = run_json(*arguments, model=None)
    assert (result["prompt_ids"], result["text"]) == ([0], None)
    assert len(result["token_ids"]) == 40
    assert run_json(*arguments, "--prompt-ids", "0", model=None)["token_ids"] == result["token_ids"]
    out = run(*arguments, model=None)[1]
    assert out.splitlines()[0].split() == [str(token_id) for token_id in result["token_ids"]]


@pytest.mark.parametrize("flag", ["--prompt", "--chat"])
def test_random_weights_have_no_tokenizer(run, small_preset, flag):
    assert_rejected(run("--random-weights", "20b", flag, "a", model=None), f"{flag}: this model has no tokenizer")


@pytest.mark.parametrize(
    ("words", "culprits"),
    [
        (["--prompt", ""], ["--prompt: the prompt is empty"]),
        (["--chat", ""], ["--chat: the prompt is empty"]),
        (["--prompt-ids", ""], ["--prompt-ids: the prompt is empty"]),
        (["--prompt-ids", "65,264"], ["token id 264", "vocabulary of 264"]),
        (["--prompt-ids", str(10**20)], [f"token id {10**20}", "vocabulary of 264"]),
        (["--prompt-ids", "-1"], ["--prompt-ids", "'-1'"]),
        (["--prompt-ids=65,-1"], ["--prompt-ids", "'65,-1'"]),
        (["--prompt-ids", "65,a"], ["--prompt-ids", "'65,a'"]),
        (["--prompt", "a\udcff"], ["not valid UTF-8"]),
        (["--prompt", "abc", "--max-context", "2"], ["--prompt: 3 tokens do not fit in a context of 2"]),
        (["--max-context", "3"], ["--chat: ", "do not fit in a context of 3"]),
        (["--max-context", "131073"], ["--max-context 131073", "131072"]),
        (["--max-context", "0"], ["--max-context", "'0'"]),
        (["--layers", "0"], ["--layers", "'0'"]),
        (["--layers", "3"], ["--layers 3", "layers 1 to 2"]),
        (["--num-programs", "0"], ["--num-programs", "'0'"]),
        (["--num-programs", "2000000000"], ["--num-programs 2000000000"]),
        (["--max-new-tokens", "junk"], ["--max-new-tokens", "'junk'"]),
        (["--max-new-tokens", "1.5"], ["--max-new-tokens", "'1.5'"]),
        (["--max-new-tokens", "-3"], ["--max-new-tokens"]),
        (["--max-new-tokens", "9" * 5000], ["--max-new-tokens"]),
        (["--random-weights", "20b"], ["--random-weights", "not allowed with", "--model"]),
        (["--random-weights", "7b"], ["--random-weights", "'7b'"]),
        (["--prompt", "a", "--chat", "b"], ["--chat", "not allowed with", "--prompt"]),
        (["--prompt-ids", "1", "--prompt", "b"], ["--prompt", "not allowed with", "--prompt-ids"]),
        (["--logits-out", "nowhere/l.npy"], ["--logits-out nowhere/l.npy: No such file or directory"]),
        (["--logits-out", "."], ["--logits-out .: is there already, and not a regular file"]),
        (["--logits-out", os.devnull], [f"--logits-out {os.devnull}: is there already, and not a regular file"]),
        (["--logits-out", "x" * 300], ["--logits-out xxx", "name too long"]),
        (["--temperature", "-1"], ["--temperature -1.0: it must be 0, or 0.001 to 100"]),
        (["--temperature", "nan"], ["--temperature nan"]),
        (["--temperature", "hot"], ["--temperature", "'hot'"]),
        (["--seed", "1"], ["--seed: nothing is drawn without --temperature"]),
        (["--top-p", "0.9"], ["--top-p: nothing is drawn without --temperature"]),
        (["--temperature", "1", "--top-p", "2"], ["--top-p 2.0: it must be above 0, and at most 1"]),
        (["--temperature", "1", "--top-k", "-1"], ["--top-k -1: it must be 0 or more"]),
        (["--temperature", "1", "--seed", str(2**63)], [f"--seed {2**63}: it must be an integer of 64 bits"]),
        (["--frobnicate"], ["--frobnicate"]),
        (["two\nlines"], ["two lines"]),
        (["--model", "no/such/path"], ["'no/such/path': no such folder"]),
        (["--model", ROOT / "reference.py" / "x"], ["reference.py/x"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, monkeypatch, words, culprits):
    monkeypatch.setattr("host.decoder.load_weights", None)  # all is found before that
    assert_rejected(run(*words), *culprits)


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][name]


SINKS = "model.layers.1.self_attn.sinks"


def without_shard(folder: Path) -> str:
    shard_of(folder, SINKS).unlink()
    return shard_of(folder, SINKS).name


def with_truncated_shard(folder: Path) -> str:
    path = shard_of(folder, SINKS)
    os.truncate(path, path.stat().st_size - 1)
    return path.name


def with_sinks(folder: Path, sinks: torch.Tensor) -> str:
    path = shard_of(folder, SINKS)
    save_file(load_file(path) | {SINKS: sinks}, path)
    return SINKS


def of_another_shape(folder: Path) -> str:
    return with_sinks(folder, torch.zeros(9, dtype=torch.bfloat16))


def of_another_dtype(folder: Path) -> str:
    return with_sinks(folder, torch.zeros(8, dtype=torch.float16))


def without_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json"


def of_another_kind(folder: Path) -> str:
    edit_config(folder, model_type="llama")
    return "'llama'"


def of_an_odd_size(folder: Path) -> str:
    edit_config(folder, hidden_size=100)
    return "hidden_size is 100"


def without_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def without_weights(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    return WEIGHTS_NAME


@pytest.mark.parametrize(
    "damage",
    [
        without_shard,
        with_truncated_shard,
        of_another_shape,
        of_another_dtype,
        without_tokenizer,
        of_another_kind,
        of_an_odd_size,
        without_config,
        without_weights,
    ],
)
def test_damaged_checkpoint_is_one_line_and_exit_code_2(run, own_folder, damage):
    assert run("--prompt-ids", 65, "--max-new-tokens", 1, model=own_folder)[0] == 0
    culprit = damage(own_folder)
    assert_rejected(run("--prompt-ids", 65, model=own_folder), str(own_folder), culprit)


def test_a_file_is_no_model(run, folder):
    assert_rejected(run(model=folder / "config.json"), str(folder / "config.json"))


def test_hub_id_without_network(run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_rejected(run(model="nobody/such-model"), "nobody/such-model: no such folder", "offline")


def test_too_little_memory_is_told_before_loading(run, monkeypatch):
    monkeypatch.setattr("host.decoder.load_weights", None)
    needed = limits.required_bytes(small_checkpoint().config, 131072, torch.bfloat16)
    monkeypatch.setattr(limits, "available_bytes", lambda device: needed - 1)
    message = f"{needed / 1e9:.1f} GB needed for the weights and a context of 131072"
    assert_rejected(run("--max-context", 131072), "not enough memory on cpu", message)
    assert needed > 2 * 131072 * 2 * 2 * 128, "less than the keys and values of two layers"


@pytest.mark.parametrize("room", [0, 200, 200 + 4 * VOCAB * 3])
def test_full_disk_leaves_the_old_file_and_no_half_one(run, tmp_path, monkeypatch, room):
    path, pwrite = tmp_path / "logits.npy", os.pwrite

    def limited(descriptor: int, data, offset: int) -> int:
        if offset + len(data) > room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    path.write_bytes(b"old")
    monkeypatch.setattr(os, "pwrite", limited)
    result = run("--prompt", PROMPT, "--max-new-tokens", 2, "--json", "--logits-out", path)
    assert_rejected(result, f"--logits-out {path}: No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npy"]
    assert path.read_bytes() == b"old"


def test_a_kernel_that_gives_up_is_one_line_and_exit_code_1(run, tmp_path, monkeypatch):
    def give_up(*args, **kwargs):
        raise MegakernelAborted("a program did not arrive")

    monkeypatch.setattr(MegaModel, "_launch", give_up)
    result = run("--prompt", "a", "--logits-out", tmp_path / "logits.npy")
    assert result == (1, "", "error: a program did not arrive\n")
    assert list(tmp_path.iterdir()) == []


def start(*words, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "gpt_oss_megakernel.py"), *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **(pipes | options))


def test_as_a_program_from_another_folder(tmp_path):
    """The default model and prompt are found, and TRITON_INTERPRET need not be set."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = start("--json", "--max-new-tokens", 5, "--quant", cwd=tmp_path, env=environment)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    result = json.loads(out)
    assert list(result) == REPORT_KEYS
    assert result["prompt_ids"] == chat_ids(Tokenizer.from_folder(SHIPPED), "Recite sonnet 18.")
    assert result["token_ids"] == greedy(open_checkpoint(SHIPPED), result["prompt_ids"], 5, quant=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("ending", "code", "num_programs"),
    [
        (signal.SIGINT, 130, 1),
        (signal.SIGINT, 130, 3),
        (signal.SIGTERM, 143, 3),
        (signal.SIGHUP, 129, 1),
        (None, 141, 1),
    ],
)
def test_an_early_end_leaves_no_traceback_and_no_file(folder, tmp_path, ending, code, num_programs):
    process = start(
        "--model", folder, "--prompt-ids", 65, "--max-new-tokens", 4000,
        "--num-programs", num_programs, "--logits-out", tmp_path / "logits.npy",
    )  # fmt: skip
    process.stdout.read(1)
    if ending:
        process.send_signal(ending)
        process.stdout.read()
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (code, "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_stdout_on_a_full_disk(folder):
    with open("/dev/full", "w") as full:
        process = start("--model", folder, "--prompt-ids", 65, "--max-new-tokens", 2, stdout=full)
        err = process.communicate(timeout=60)[1]
    assert (process.returncode, err) == (2, "error: stdout: No space left on device\n")


def test_stdout_that_cannot_show_the_text(folder):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    process = start("--model", folder, "--prompt-ids", 65, "--max-new-tokens", 12, env=environment)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "\\x" in out or "\\u" in out
    assert [line[:6] for line in err.splitlines()] == ["[1 pro", "the an"]


# From Python


@pytest.fixture(scope="module")
def model(checkpoint) -> MegaModel:
    return MegaModel(checkpoint, max_context=16)


def feed(model: MegaModel, token_ids: list[int]) -> torch.Tensor:
    return torch.stack([model.logits(token_id, position) for position, token_id in enumerate(token_ids)])


@pytest.mark.parametrize("path", [SHIPPED, str(SHIPPED), Path("models/sonnets"), "models/sonnets"])
def test_from_pretrained_takes_any_spelling_of_a_path(monkeypatch, path):
    monkeypatch.chdir(ROOT)
    model = MegaModel.from_pretrained(path, max_context=8)
    assert (model.device.type, model.quant, model.max_context) == ("cpu", False, 8)
    logits = Reference(open_checkpoint(SHIPPED), max_context=8).forward([1020])[0]
    assert model.step(1020, 0) == int(logits.argmax())


def test_from_pretrained_defaults_and_options(folder, own_folder):
    model = MegaModel.from_pretrained(folder, True, 12, "cpu", num_programs=2)
    assert (model.quant, model.max_context, model.num_programs) == (True, 12, 2)
    assert MegaModel.from_pretrained(folder).max_context == 4096
    edit_config(own_folder, max_position_embeddings=64)
    assert MegaModel.from_pretrained(own_folder).max_context == 64


def test_step_is_the_argmax_of_the_logits(checkpoint, model):
    token_ids = [7, 200, 31, 4]
    logits = feed(model, token_ids)
    assert (logits.shape, logits.dtype) == ((4, VOCAB), torch.float32)
    model.reset()
    assert [model.step(token_id, i) for i, token_id in enumerate(token_ids)] == logits.argmax(-1).tolist()
    torch.testing.assert_close(logits, Reference(checkpoint).forward(token_ids), rtol=0, atol=1e-3)


def test_results_are_copies(model):
    first, hidden = model.logits(7, 0), model.hidden(7, 0, 1)
    kept = first.clone(), hidden.clone()
    model.logits(200, 0)
    assert torch.equal(first, kept[0])
    assert torch.equal(hidden, kept[1])


def test_hidden_is_the_residual_stream_after_some_layers(checkpoint, model):
    trace = {}
    Reference(checkpoint).forward([7, 200], trace=trace)
    for n_layers in (1, 2):
        rows = torch.stack([model.hidden(token_id, i, n_layers) for i, token_id in enumerate([7, 200])])
        torch.testing.assert_close(rows, trace[f"layers.{n_layers - 1}.output"], rtol=0, atol=1e-3)


def test_generate_is_repeated_steps(model):
    generated = list(model.generate([7, 200], 6))
    model.step(7, 0)
    token_id, stepped = 200, []
    for position in range(1, 7):
        token_id = model.step(token_id, position)
        stepped.append(token_id)
    assert generated == stepped


def test_on_logits_sees_each_position_fed(model):
    rows = []
    generated = list(model.generate([7, 200, 31], 4, on_logits=lambda row: rows.append(row.clone())))
    assert torch.equal(torch.stack(rows), feed(model, [7, 200, 31, *generated[:-1]]))


def test_reset_gives_the_same_bits_as_a_new_model(checkpoint, model):
    fresh = MegaModel(checkpoint, max_context=16)
    feed(model, [1, 2, 3, 4, 5, 6])
    model.reset()
    for position, token_id in ((9, 50), (12, 60)):  # positions before them were not fed: zeros again
        assert torch.equal(model.logits(token_id, position), fresh.logits(token_id, position))
    for name, tensor, other in zip(State._fields, model.state, fresh.state, strict=True):
        if name in ("k_cache", "v_cache", "sync", "split_arrivals"):
            assert torch.equal(tensor, other), name


def test_generate_starts_anew_without_reset(model):
    first = list(model.generate([7, 200], 6))
    list(model.generate([31, 5, 9], 9))
    assert list(model.generate([7, 200], 6)) == first


def test_an_abandoned_generation_does_no_harm(model):
    expected = list(model.generate([7, 200], 6))
    abandoned = model.generate([31, 5, 9], 9)
    next(abandoned)
    next(abandoned)
    abandoned.close()
    assert list(model.generate([7, 200], 6)) == expected


def test_generate_is_lazy(model, monkeypatch):
    model.reset()  # nothing of the prompt is held
    launches = []
    launch = model._launch
    monkeypatch.setattr(model, "_launch", lambda *args, **kwargs: (launches.append(args), launch(*args, **kwargs)))
    tokens = model.generate([7, 200, 31], 5)
    assert launches == []
    next(tokens)
    assert len(launches) == 3
    next(tokens)
    assert len(launches) == 4


def test_a_launch_that_gives_no_token_is_told(model, monkeypatch):
    list(model.generate([7, 200], 6))  # leaves tokens behind that must not be taken for new ones
    monkeypatch.setattr(model, "_launch", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="without a token"):
        model.step(7, 0)
    model.state.sync[ABORT.value] = 2 + 6 + 3
    with pytest.raises(MegakernelAborted, match="the router phase of layer 1"):
        next(model.generate([7], 1))
    with pytest.raises(MegakernelAborted, match="the router phase of layer 1"):
        model.logits(7, 0)
    model.reset()
    monkeypatch.undo()
    assert len(list(model.generate([7, 200], 6))) == 6


def test_a_stop_token_is_the_last(checkpoint):
    unstopped = greedy(checkpoint, [65], 9)
    stop = unstopped[5]
    model = MegaModel(checkpoint.with_config(stop_ids=(1, stop)), max_context=16)
    assert list(model.generate([65], 9)) == unstopped[: unstopped.index(stop) + 1]
    assert len(list(model.generate([stop], 2))) >= 1, "a stop token in the prompt ended the answer"


def test_the_context_bounds_a_generation(model):
    prompt = [7, 200, 31]
    assert len(list(model.generate(prompt, 99))) == 16 - len(prompt) + 1
    assert len(list(model.generate([7] * 16, 99))) == 1
    assert list(model.generate(prompt, 0)) == []


@pytest.mark.parametrize("call", ["step", "logits"])
@pytest.mark.parametrize(
    ("token_id", "position", "culprit"), [(7, 16, "16"), (7, -1, "-1"), (VOCAB, 0, str(VOCAB)), (-1, 0, "-1")]
)
def test_steps_outside_context_or_vocabulary(model, call, token_id, position, culprit):
    with pytest.raises(InputError, match=culprit):
        getattr(model, call)(token_id, position)


@pytest.mark.parametrize(
    ("prompt", "culprit"), [([], "empty"), ([7] * 17, "context of 16"), ([7, VOCAB], str(VOCAB)), ([-1], "-1")]
)
def test_prompts_that_cannot_be(model, prompt, culprit):
    with pytest.raises(InputError, match=culprit):
        next(model.generate(prompt, 3))


@pytest.mark.parametrize("kind", [tuple, iter, np.array, torch.tensor])
def test_a_prompt_may_be_any_iterable_of_integers(model, kind):
    assert list(model.generate(kind([7, 200]), 3)) == list(model.generate([7, 200], 3))


@pytest.mark.parametrize("token_id", [7.0, "7", None])
def test_a_token_id_is_an_integer(model, token_id):
    with pytest.raises(TypeError):
        model.step(token_id, 0)


@pytest.mark.parametrize("n_layers", [-1, 3])
def test_hidden_after_layers_that_are_not_there(model, n_layers):
    with pytest.raises(InputError, match=f"n_layers {n_layers}: the model has 2"):
        model.hidden(7, 0, n_layers)


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"max_context": 0}, "--max-context 0"),
        ({"max_context": 131073}, "--max-context 131073"),
        ({"num_programs": 0}, "--num-programs 0"),
        ({"device": "cuda"}, "device cuda: "),
        ({"device": "gpu7"}, "device gpu7: "),
        ({"device": "meta"}, "device meta: "),
    ],
)
def test_models_that_cannot_be(checkpoint, options, culprit):
    with pytest.raises(InputError, match=culprit):
        MegaModel(checkpoint, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_asked_for_where_there_is_none():
    process = start("--max-new-tokens", 1, env=os.environ | {"TRITON_INTERPRET": "0"})
    out, err = process.communicate(timeout=60)
    assert_rejected((process.returncode, out, err), "device cuda: ")
