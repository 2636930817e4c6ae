"""gpt_oss_megakernel.py --trace on the CPU interpreter: what it writes and prints, and what it refuses."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_model import assert_rejected, run_script, write_model
from test_trace import assert_complete, slices_of

import gpt_oss_megakernel
from gpt_oss_megakernel import MegaModel
from host.phases import PHASE_NAMES
from load_hf import open_checkpoint
from measure.traffic import bytes_per_token

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "models" / "sonnets"
PROMPT = ("--prompt-ids", "65,66,67")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model of two layers. Tests must not change it."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "trace.json"


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command line in this process, on `folder` by default; return (exit code, stdout, stderr)."""

    def run(*words, model: Path = folder) -> tuple[int, str, str]:
        return run_script(gpt_oss_megakernel.main, ["--model", model, *words], monkeypatch, capsys)

    return run


@pytest.fixture
def timed(monkeypatch) -> list[tuple[int, bool]]:
    """Return (position, whether it gave a token) of each launch that noted times, except those that only compile."""
    launches = []
    launch = MegaModel._launch

    def noting(self, position, token=False, logits=False, n_layers=None):
        before = self.state.trace.clone()
        launch(self, position, token=token, logits=logits, n_layers=n_layers)
        if n_layers is None and not before.equal(self.state.trace):
            launches.append((position, token))

    monkeypatch.setattr(MegaModel, "_launch", noting)
    return launches


def test_shipped_model(run, path):
    words = ("--prompt-ids", "1020,5", "--num-programs", 3, "--max-new-tokens", 20, "--json")
    code, out, err = run(*words, model=SHIPPED)
    assert (code, err) == (0, "")
    token_ids = json.loads(out)["token_ids"]
    code, out, err = run(*words, "--trace", path, model=SHIPPED)
    assert code == 0
    assert json.loads(out)["token_ids"] == token_ids

    trace = json.loads(path.read_text())
    assert_complete(trace, n_layers=4, n_programs=3)
    title, header, *rows = err.splitlines()
    assert title == "token 16 at position 16: cpu, default"
    assert trace["traceEvents"][0]["args"]["name"] == title
    assert header.split()[:2] == ["phase", "calls"]
    assert [row[:12].strip() for row in rows[:11]] == [*PHASE_NAMES, "barriers", "total"]
    *_, total_us, share, megabytes, _ = rows[10].split()
    last = max(event["ts"] for events in slices_of(trace).values() for event in events)
    assert (float(total_us), share) == (pytest.approx(last, abs=0.01), "100.0%")
    assert float(megabytes) == pytest.approx(bytes_per_token(open_checkpoint(SHIPPED).config, 16) / 1e6, abs=1e-3)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "token"),
    [
        (["--max-new-tokens", 18], 16),
        (["--max-new-tokens", 3], 3),
        (["--max-context", 9], 7),
        (["--max-new-tokens", 6, "--trace-token", 1], 1),
        (["--max-new-tokens", 6, "--trace-token", 4], 4),
        (["--max-new-tokens", 6, "--trace-token", 6, "--quant"], 6),
        (["--max-context", 9, "--trace-token", 7], 7),
    ],
)
def test_the_token_asked_for_and_no_other_is_timed(run, timed, path, words, token):
    code, out, err = run(*PROMPT, *words, "--json", "--trace", path)
    assert (code, timed) == (0, [(2 + token - 1, True)])
    assert f"token {token} at position {token + 1}: cpu, {json.loads(out)['path']}" in err.splitlines()


def test_without_trace_nothing_is_timed(run, timed, monkeypatch):
    def mark(_ctx, _event, build) -> None:
        assert not build.trace, "a time"

    monkeypatch.setattr(gpt_oss_megakernel, "mark", mark)
    code, _, err = run(*PROMPT, "--max-new-tokens", 3)
    assert (code, timed) == (0, [])
    assert [line[:6] for line in err.splitlines()] == ["[3 pro", "the an"]


def test_text_and_logits_are_the_same_with_a_trace(run, path, tmp_path):
    words = (*PROMPT, "--max-new-tokens", 6, "--num-programs", 2)
    plain = run(*words, "--logits-out", tmp_path / "plain.npy")
    traced = run(*words, "--logits-out", tmp_path / "traced.npy", "--trace", path)
    assert plain[1] == traced[1] != ""
    assert np.array_equal(np.load(tmp_path / "plain.npy"), np.load(tmp_path / "traced.npy"))
    assert_complete(json.loads(path.read_text()), n_layers=2, n_programs=2)


def test_layers_cuts_the_trace(run, path):
    assert run(*PROMPT, "--max-new-tokens", 2, "--layers", 1, "--trace", path)[0] == 0
    assert_complete(json.loads(path.read_text()), n_layers=1, n_programs=1)


@pytest.mark.parametrize("words", [[], ["--trace-token", 6], ["--trace-token", 16, "--json"]])
def test_an_answer_that_ends_too_early(tmp_path, run, path, monkeypatch, words):
    """The fifth token is a stop id. The logits and the answer are written whole."""
    own = write_model(tmp_path / "own")
    out = run(*PROMPT, "--max-new-tokens", 5, "--json", model=own)[1]
    ids = json.loads(out)["token_ids"]
    assert ids[4] not in ids[:4]
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": ids[4]}))
    path.write_text("old")
    code, out, err = run(*PROMPT, "--trace", path, "--logits-out", tmp_path / "l.npy", *words, model=own)
    asked = words[1] if words else 16
    *summary, error = err.splitlines()
    assert [line[:24] for line in summary] == ([] if "--json" in words else ["[3 prompt + 5 new tokens"])
    assert (code, error) == (2, f"error: --trace-token {asked}: the answer ended after 5 tokens")
    assert out
    assert len(np.load(tmp_path / "l.npy")) == 3 + 4
    assert path.read_text() == "old"
    assert {file.name for file in tmp_path.iterdir()} == {"own", "trace.json", "l.npy"}
    assert run(*PROMPT, "--trace", path, "--trace-token", 5, model=own)[0] == 0, "the stop id is a token too"


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--trace", "nowhere/t.json"], "--trace nowhere/t.json: No such file or directory"),
        (["--trace", "."], "--trace .: is there already, and not a regular file"),
        (["--trace", ""], "--trace: '' names no file"),
        (["--trace", os.devnull], f"--trace {os.devnull}: is there already, and not a regular file"),
        (["--trace", "x" * 300], "name too long"),
        (["--trace", "t", "--logits-out", "./t"], "--trace t: is --logits-out's file"),
        (["--trace-token", "1"], "--trace-token 1: without --trace"),
        (["--trace", "t", "--trace-token", "0"], "--trace-token"),
        (["--trace", "t", "--trace-token", "x"], "--trace-token"),
        (["--trace", "t", "--trace-token", "9", "--max-new-tokens", "8"], "--trace-token 9: --max-new-tokens is 8"),
        (["--trace", "t", "--trace-token", "5", "--max-context", "6"], "--trace-token 5: a context of 6"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(run, tmp_path, monkeypatch, words, culprit):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("host.decoder.load_weights", None)
    assert_rejected(run(*PROMPT, *words), culprit)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_may_not_be_written(run, tmp_path, monkeypatch):
    monkeypatch.setattr("host.decoder.load_weights", None)
    tmp_path.chmod(0o500)
    assert_rejected(run(*PROMPT, "--trace", tmp_path / "t.json"), "Permission denied")


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_full_disk_leaves_the_old_file_and_no_half_one(run, path, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path.write_text("old")
    monkeypatch.setattr(os, call, fail)
    code, _, err = run(*PROMPT, "--max-new-tokens", 2, "--trace", path)
    assert (code, err.splitlines()[-1]) == (2, f"error: --trace {path}: No space left on device")
    assert "[3 prompt + 2 new tokens" in err, "the answer was there before"
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_a_trace_takes_the_place_of_an_old_file_at_once(run, path, tmp_path):
    """The old file is not written to: a process that has it open still reads it."""
    path.write_text("old")
    os.link(path, tmp_path / "link")
    assert run(*PROMPT, "--max-new-tokens", 1, "--trace", path)[0] == 0
    assert_complete(json.loads(path.read_text()), n_layers=2, n_programs=1)
    assert (tmp_path / "link").read_text() == "old"


def test_ctrl_c_leaves_no_file(folder, path):
    command = [gpt_oss_megakernel.__file__, "--model", folder, *PROMPT, "--max-new-tokens", 4000, "--trace", path]
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert (process.wait(timeout=60), process.stderr.read()) == (130, "")
    assert list(path.parent.iterdir()) == []
