"""run_triton_phased.py from its user's side, on the CPU interpreter. Times mean nothing here."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_model import REPORT_KEYS, assert_rejected, run_script, small_checkpoint

import run_triton_phased
from checkpoints.config import PRESETS
from gpt_oss_megakernel import MegaModel
from host import decoder
from host.phases import PHASE_NAMES, phases_of_token
from kernels import PhasedModel
from run_triton_phased import Times, table_rows, table_text, time_phases

ROOT = Path(__file__).parents[2]
PROMPT = "Café"
PROMPT_IDS = list(PROMPT.encode())
LAUNCHES = [1, 2, 2, 2, 2, 2, 2, 1, 1]  # of each phase, with two layers


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command line in this process on the small model; return (exit code, stdout, stderr)."""

    def run(*words, model: Path | None = folder) -> tuple[int, str, str]:
        source = [] if model is None else ["--model", model]
        return run_script(run_triton_phased.main, [*source, *words], monkeypatch, capsys)

    return run


@pytest.fixture
def run_json(run):
    """Return the JSON objects of a run without errors."""

    def run_json(*words, **options) -> list[dict]:
        code, out, err = run(*words, "--json", **options)
        assert (code, err) == (0, "")
        return [json.loads(line) for line in out.splitlines()]

    return run_json


@pytest.mark.parametrize(("words", "path"), [([], "phased"), (["--quant"], "phased-quant")])
@pytest.mark.parametrize("num_programs", [1, 3])
def test_the_megakernels_tokens(run_json, checkpoint, words, path, num_programs):
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 9, "--num-programs", num_programs)
    (result,) = run_json(*arguments, *words)
    assert list(result) == REPORT_KEYS
    assert result["prompt_ids"] == PROMPT_IDS
    assert result["token_ids"] == list(MegaModel(checkpoint, bool(words), 64).generate(PROMPT_IDS, 9))
    assert (result["device"], result["path"]) == ("cpu", path)


def test_text_is_all_of_stdout_and_stderr_sums_up(run, run_json):
    arguments = ("--prompt", PROMPT, "--max-new-tokens", 9)
    text = run_json(*arguments)[0]["text"]
    code, out, err = run(*arguments)
    assert (code, out) == (0, text + "\n")
    assert re.match(r"\[5 prompt \+ 9 new tokens, TTFT [\d.]+ ms, [\d.]+ ms per token, cpu, phased\]\n", err)


def test_layers_and_logits_out(run_json, checkpoint, tmp_path):
    path = tmp_path / "logits.npy"
    (result,) = run_json("--prompt-ids", "65,66", "--max-new-tokens", 3, "--layers", 1, "--logits-out", path)
    logits = np.load(path)
    assert (logits.shape, logits.dtype) == ((4, 264), np.float32)
    assert logits[1:].argmax(-1).tolist() == result["token_ids"]
    whole = MegaModel(checkpoint, max_context=8)
    assert result["token_ids"] != list(whole.generate([65, 66], 3))


def test_times_with_json_are_a_second_object(run_json):
    generation, times = run_json("--prompt", PROMPT, "--max-new-tokens", 3, "--times", "--num-programs", 2)
    assert len(generation["token_ids"]) == 3
    assert [row["phase"] for row in times["rows"]] == list(PHASE_NAMES)
    assert [row["launches"] for row in times["rows"]] == LAUNCHES
    assert all(row["us_per_token"] >= row["us_per_launch"] > 0 for row in times["rows"])
    assert sum(row["share"] for row in times["rows"]) == pytest.approx(1)
    assert sum(row["us_per_token"] for row in times["rows"]) == pytest.approx(times["sum_us"])
    # The phases are all of the time: what lies between two launches counts with the second one.
    assert times["sum_us"] == pytest.approx(times["separate_us"], rel=0.5)
    assert times["megakernel_us"] > 0
    assert (times["first_position"], times["n_tokens"], times["on_device"]) == (5, 4, False)


def test_times_as_text(run):
    code, out, err = run("--prompt", PROMPT, "--max-new-tokens", 3, "--times")
    assert code == 0
    assert [line[:6] for line in err.splitlines()] == ["[5 pro", "the an"]
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("phase "))
    assert "no claim" in lines[start - 1]
    names = [*PHASE_NAMES, "sum", "as the host launches them", "megakernel, the same tokens"]
    assert all(line.startswith(f"{name} ") for line, name in zip(lines[start + 1 :], names, strict=True))


@pytest.mark.parametrize(("max_context", "n_timed", "first"), [(5, 1, 4), (6, 1, 5), (7, 2, 5)])
def test_times_near_the_end_of_the_context(run, max_context, n_timed, first):
    words = ("--prompt", PROMPT, "--max-context", max_context, "--times", "--json")
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    times = json.loads(out.splitlines()[1])
    assert (times["n_tokens"], times["first_position"]) == (n_timed, first)


def test_times_go_on_after_a_stop_id(run_json, monkeypatch, checkpoint):
    """A short answer is timed for as many tokens as any other."""
    stop_id = next(MegaModel(checkpoint, max_context=8).generate(PROMPT_IDS, 1))
    stopping = checkpoint.with_config(stop_ids=(stop_id,))
    monkeypatch.setattr(run_triton_phased, "open_model", lambda args: (stopping, None))
    generation, times = run_json("--prompt-ids", ",".join(map(str, PROMPT_IDS)), "--times")
    assert generation["token_ids"] == [stop_id]
    assert times["n_tokens"] == 4


def test_weights_are_loaded_once(run, monkeypatch):
    loads, load = [], decoder.load_weights
    monkeypatch.setattr("host.decoder.load_weights", lambda *args: (loads.append(args), load(*args))[1])
    assert run("--prompt-ids", 65, "--max-new-tokens", 1, "--times")[0] == 0
    assert len(loads) == 1


@pytest.mark.parametrize("wrong", [MegaModel, PhasedModel])
def test_other_tokens_are_one_line_and_exit_code_1(folder, monkeypatch, capsys, wrong):
    decode = MegaModel.decode
    monkeypatch.setattr(wrong, "decode", lambda self, *args, **kwargs: (i ^ 1 for i in decode(self, *args, **kwargs)))
    monkeypatch.setattr(PhasedModel if wrong is MegaModel else MegaModel, "decode", decode)
    with pytest.raises(SystemExit) as end:
        run_script(
            run_triton_phased.main,
            ["--model", folder, "--prompt-ids", 65, "--max-new-tokens", 2, "--times"],
            monkeypatch,
            capsys,
        )
    assert end.value.code.startswith("error: separate launches gave [")
    assert "\n" not in end.value.code


def test_random_weights_need_no_tokenizer(run_json, monkeypatch):
    monkeypatch.setitem(PRESETS, "20b", small_checkpoint().config)
    (result,) = run_json("--random-weights", "20b", "--layers", 1, "--max-new-tokens", 4, model=None)
    assert (result["prompt_ids"], result["text"], len(result["token_ids"])) == ([0], None, 4)


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--prompt", ""], "--prompt: the prompt is empty"),
        (["--prompt-ids", "65,264"], "token id 264 lies outside the vocabulary of 264"),
        (["--prompt", "abc", "--max-context", "2"], "--prompt: 3 tokens do not fit in a context of 2"),
        (["--layers", "3"], "--layers 3: the model has layers 1 to 2"),
        (["--num-programs", "0"], "'0' is not a positive integer"),
        (["--num-programs", "5000"], "--num-programs 5000"),
        (["--random-weights", "20b"], "not allowed with"),
        (["--model", "no/such/path"], "no/such/path"),
        (["--logits-out", "nowhere/l.npy"], "--logits-out nowhere/l.npy: No such file"),
        (["--times", "yes"], "yes"),
        (["--frobnicate"], "--frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, monkeypatch, words, culprit):
    monkeypatch.setattr("host.decoder.load_weights", None)  # all is found before that
    assert_rejected(run(*words), culprit)


# What is measured


def test_rows_are_medians():
    """The tokens take 1, 2 and 9 times as long, and the second of two layers twice as long as the first."""
    layer = np.array([1.0, 2, 3, 4, 5, 6])
    token = np.concatenate([[10], layer, 2 * layer, [20, 30]])
    rows = table_rows(np.outer([1, 2, 9], token), n_layers=2)
    assert [row.phase for row in rows] == list(PHASE_NAMES)
    assert [row.launches for row in rows] == LAUNCHES
    assert [row.us_per_token for row in rows] == [20, 6, 12, 18, 24, 30, 36, 40, 60]
    assert [row.us_per_launch for row in rows] == [20, 3, 6, 9, 12, 15, 18, 40, 60]
    assert [row.share for row in rows] == pytest.approx([t / 246 for t in (20, 6, 12, 18, 24, 30, 36, 40, 60)])


def test_the_table_in_full():
    rows = table_rows(np.full((3, 15), 2.0), n_layers=2)
    text = table_text(Times(rows, 30.0, 90.0, 20.5, first_position=8, n_tokens=3, on_device=True))
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("3 tokens at positions 8 to 10, medians; device time between events\n")
    assert lines[2] == ["embedding", "1", "2.00", "2.00", "6.7%"]
    assert lines[3] == ["QKV", "2", "2.00", "4.00", "13.3%"]
    assert lines[-3] == ["sum", "15", "30.00", "100.0%"]
    assert lines[-2][-2:] == ["15", "90.00"]
    assert lines[-1][-2:] == ["1", "20.50"]
    assert len({len(line) for line in text.splitlines()[1:-2]}) == 1


class Clock:
    """A stand-in for DeviceMarks, on a clock that the test moves."""

    now_ms = 0.0

    def __init__(self):
        self.times = []

    def mark(self) -> None:
        self.times.append(Clock.now_ms)

    def intervals_ms(self) -> list[float]:
        return np.diff(self.times).tolist()


def test_holding_up_a_gpu_is_not_counted(monkeypatch):
    """Each launch takes as many ms as its number in the token; the hold takes 1000."""
    n_launches = len(phases_of_token(1))
    holds = []

    def sleep(cycles: int) -> None:
        holds.append(cycles)
        Clock.now_ms += 1000

    def decode(token_id, position, n_tokens, on_launch):
        for token in range(n_tokens):
            for number in range(n_launches):
                Clock.now_ms += number
                model.on_phase()
            on_launch()
            yield token

    config = SimpleNamespace(n_layers=1)
    model = SimpleNamespace(device=torch.device("cuda"), config=config, decode=decode, on_phase=None)
    monkeypatch.setattr(run_triton_phased, "DeviceMarks", Clock)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    token_ids, us = time_phases(model, 0, 0, 3)
    assert token_ids == [0, 1, 2]
    assert us == pytest.approx(np.tile(1e3 * np.arange(n_launches), (3, 1)))
    assert holds == [run_triton_phased.HOLD_CYCLES * n_launches] * 3
    assert model.on_phase is None


# As a program


def start(*words) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run_triton_phased.py"), *map(str, words)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize(("ending", "code"), [("interrupt", 130), ("closed pipe", 141)])
def test_an_early_end_leaves_no_traceback(folder, ending, code):
    """TRITON_INTERPRET need not be set."""
    process = start("--model", folder, "--prompt-ids", 65, "--max-new-tokens", 4000)
    process.stdout.read(1)
    if ending == "interrupt":
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (code, "")
