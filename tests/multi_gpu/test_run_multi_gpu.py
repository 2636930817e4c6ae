"""The command lines of several GPUs, with their ranks in the interpreter."""

import json

import pytest
from small_model import assert_rejected, run_script, write_model

import bench_tpot
import gpt_oss_megakernel
from multi_gpu import bench_exchange, run_multi_gpu

PROMPT = ["--prompt", "Café", "--max-new-tokens", 3, "--num-programs", 2, "--max-context", 32]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The small model in a folder."""
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run run_multi_gpu's command line on the small model; return (exit code, stdout, stderr)."""
    monkeypatch.delenv("RANK", raising=False)
    return lambda *words: run_script(run_multi_gpu.main, ["--model", folder, *words], monkeypatch, capsys)


@pytest.fixture
def single(folder, monkeypatch, capsys):
    """Run gpt_oss_megakernel's command line on the small model, and return its report."""

    def single(*words) -> dict:
        words = ["--model", folder, *PROMPT, "--json", *words]
        code, out, _ = run_script(gpt_oss_megakernel.main, words, monkeypatch, capsys)
        assert code == 0
        return json.loads(out)

    return single


@pytest.mark.parametrize("layout, quant", [("tp", ()), ("roles", ("--quant",))])
def test_the_answer_is_that_of_one_gpu(layout, quant, run, single):
    code, out, _ = run("--layout", layout, "--ranks", 2, *PROMPT, "--json", *quant)
    assert code == 0
    report, expected = json.loads(out), single(*quant)
    for key in ("prompt_ids", "token_ids", "text"):
        assert report[key] == expected[key]
    assert report["path"].startswith(f"{layout} 2, ")


def test_logits_are_written_once(run, tmp_path):
    path = tmp_path / "logits"
    code, _, _ = run("--ranks", 2, *PROMPT, "--logits-out", path)
    assert code == 0
    assert path.stat().st_size > 0


@pytest.mark.parametrize(
    "words, text",
    [
        (["--layout", "tp", "--ranks", 3], "--layout tp: 3 ranks; it takes 1, 2, 4, 8"),
        (["--layout", "roles", "--ranks", 4], "--layout roles: 4 ranks; it takes 2, 3, 5"),
        ([], "no GPU is available: --ranks N runs N ranks in the CPU interpreter"),
        (["--layout", "tp", "--ranks", 8], "--layout tp: 2 scale groups of the experts cannot be split over 8 ranks"),
        (
            ["--ranks", 0],
            "argument --ranks: '0' is not a positive integer (see python multi_gpu/run_multi_gpu.py --help)",
        ),
    ],
)
def test_what_cannot_run_is_refused(words, text, run):
    result = run(*words, *PROMPT)
    assert_rejected(result)
    assert result[2] == f"error: {text}\n"


def test_bench_tpot_without_the_gpus_is_refused(folder, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    result = run_script(bench_tpot.main, ["--model", folder, "--gpus", 2], monkeypatch, capsys)
    assert_rejected(result, "--gpus 2: 0 found")


def test_bench_exchange_counts_no_wrong_value(monkeypatch, capsys):
    code, out, err = run_script(bench_exchange.main, ["--ranks", 2, "--bytes", 4, 1500], monkeypatch, capsys)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "An exchange of 2 ranks, 2 programs each; CPU interpreter, no timing"
    assert [line.split("|")[1:3] for line in out.splitlines()[3:]] == [[" 4 ", " - "], [" 1500 ", " - "]]


def test_bench_exchange_refuses_parts_of_values(monkeypatch, capsys):
    words = ["--ranks", 2, "--bytes", 6]
    assert_rejected(run_script(bench_exchange.main, words, monkeypatch, capsys), "multiples of 4")
