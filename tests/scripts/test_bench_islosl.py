"""bench_islosl.py: its arithmetic on a made-up clock; what it feeds and reports on the CPU interpreter."""

import dataclasses
import itertools
import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from types import SimpleNamespace

import fake_matplotlib
import pytest
import torch
from small_model import assert_rejected, run_script, write_model

import bench_islosl
import convert_to_iris
from bench_islosl import Measurement, Plan, Report, Run, Shape, make_prompts, markdown, plan_for, run_from, ttft_lines
from checkpoints.config import GENERATION_NAME, DenseFormats
from gpt_oss_megakernel import MegaModel
from host import decoder, limits
from measure import timing
from measure.timing import checksum, spread
from reference import Reference

STOP_ID = 262  # of the small model
SPREAD_KEYS = {"median", "mean", "min", "p10", "p90", "n"}
FIGURES = ("ttft_ms", "tpot_ms", "end_to_end_s", "input_tokens_per_s", "output_tokens_per_s")


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command line in this process on the small model; return (exit code, stdout, stderr)."""
    return lambda *words: run_script(bench_islosl.main, ["--model", folder, *words], monkeypatch, capsys)


class FakeModel:
    """A clock and a model in one.

    A prompt token takes 2 s, then a token 0.5 s; every other request takes twice as long.
    """

    config = SimpleNamespace(dense=DenseFormats())
    quant = False
    device = torch.device("cpu")

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def reset(self) -> None:
        self.log.append("reset")
        self.now += 1000.0  # which nobody may see

    def generate(self, prompt_ids: list[int], max_new_tokens: int) -> Iterator[int]:
        slow = 2 - self.log.count("reset") % 2
        self.log.append(prompt_ids)
        self.now += 2.0 * slow * len(prompt_ids)
        for n in range(max_new_tokens):
            self.now += 0.5 * slow * (n > 0)
            yield prompt_ids[0] + n


def test_figures_of_one_run():
    """Of 5 tokens the first comes after 400 ms, the last 200 ms later."""
    assert run_from([400.0, 20.0, 80.0, 40.0, 60.0], 100) == Run(400.0, 50.0, 0.6, 250.0, pytest.approx(5 / 0.6))


def test_one_token_has_no_time_per_further_token():
    assert run_from([400.0], 100) == Run(400.0, None, 0.4, 250.0, 2.5)


def test_each_run_is_timed_from_the_call_on_after_a_reset(monkeypatch):
    """The warm-up is a quick request, like the second and the fourth request that count."""
    model, prompts = FakeModel(monkeypatch), [[10, 11], [20, 21], [30, 31], [40, 41]]
    row = bench_islosl.measure(model, Shape(2, 5), prompts)
    assert model.log == list(itertools.chain.from_iterable(("reset", ids) for ids in [prompts[0], *prompts]))
    slow, quick = Run(8000.0, 1000.0, 12.0, 0.25, 5 / 12), Run(4000.0, 500.0, 6.0, 0.5, 5 / 6)
    assert row.runs == (slow, quick, slow, quick)
    assert (row.path, row.input_tokens, row.output_tokens) == ("default", 2, 5)
    assert (row.ttft_ms.median, row.ttft_ms.n, row.tpot_ms.median, row.end_to_end_s.median) == (6000.0, 4, 750.0, 9.0)
    assert row.checksum == checksum(range(10, 15))


def test_progress_tells_path_shape_and_run(monkeypatch, capsys):
    bench_islosl.measure(FakeModel(monkeypatch), Shape(1, 1), [[3], [4]])
    told = ["measuring default at 1:1: " + step for step in ("warming up", "run 1 of 2", "run 2 of 2")]
    assert capsys.readouterr() == ("", "".join(line + "\n" for line in told))


def test_a_run_that_ends_early_is_not_timed(monkeypatch):
    model = FakeModel(monkeypatch)
    monkeypatch.setattr(model, "generate", lambda prompt_ids, max_new_tokens: iter([1, 2]))
    with pytest.raises(RuntimeError, match="2 tokens instead of the 3 of 1:3"):
        bench_islosl.timed_run(model, Shape(1, 3), [0])


def test_a_gpu_is_waited_for_before_the_clock_starts(monkeypatch):
    model = FakeModel(monkeypatch)
    model.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: model.log.append(device))
    bench_islosl.timed_run(model, Shape(1, 1), [7])
    assert model.log == ["reset", model.device, [7]]


def test_prompts_are_the_same_ones_for_a_shape_and_have_nothing_in_common():
    shape = Shape(100, 3)
    prompts = make_prompts(shape, 5, 264, (STOP_ID, 7))
    assert prompts == make_prompts(shape, 5, 264, (STOP_ID, 7))
    assert [len(ids) for ids in prompts] == [100] * 5
    assert len({ids[0] for ids in prompts}) == 5
    used = {token_id for ids in prompts for token_id in ids}
    assert used <= set(range(264)) - {STOP_ID, 7}
    assert len(used) > 200
    assert prompts[0] != make_prompts(Shape(100, 4), 5, 264, (STOP_ID, 7))[0]


def test_neighbouring_prompts_differ_however_small_the_vocabulary():
    prompts = make_prompts(Shape(1, 1), 7, 4, (2,))
    assert {token_id for (token_id,) in prompts} == {0, 1, 3}
    assert all(first != second for first, second in itertools.pairwise(prompts))


def test_both_paths_of_the_command_line(run, checkpoint, tmp_path, monkeypatch):
    loads, load_weights = [], decoder.load_weights
    monkeypatch.setattr("host.decoder.load_weights", lambda *args: loads.append(1) or load_weights(*args))
    words = ["--both", "--configs", "9:4, 5:1,9:4", "--repeats", 3, "--json", tmp_path / "report.json"]
    code, out, err = run(*words)
    assert (code, len(loads)) == (0, 1)
    assert err.splitlines()[-1] == "measuring quant at 5:1: run 3 of 3"
    assert "No claim." in out

    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == ["model", "conditions", "num_programs", "max_context", "plan", "results"]
    assert report["model"].endswith(", 2 layers")
    assert report["conditions"]["device"] == "cpu"
    shapes = [{"input_tokens": 9, "output_tokens": 4}, {"input_tokens": 5, "output_tokens": 1}]
    assert (report["max_context"], report["plan"]) == (13, {"shapes": shapes, "repeats": 3})
    assert [(row["path"], row["input_tokens"], row["output_tokens"]) for row in report["results"]] == [
        ("default", 9, 4),
        ("default", 5, 1),
        ("quant", 9, 4),
        ("quant", 5, 1),
    ]
    for row in report["results"]:
        assert len(row["runs"]) == 3
        for name in FIGURES:
            samples = [figures[name] for figures in row["runs"]]
            if name == "tpot_ms" and row["output_tokens"] == 1:
                assert row[name] is None
                assert samples == [None] * 3
            else:
                assert row[name].keys() == SPREAD_KEYS
                assert row[name] == dataclasses.asdict(spread(samples))
                assert row[name]["min"] > 0
        shape = Shape(row["input_tokens"], row["output_tokens"])
        assert row["checksum"] == checksum(reference_ids(checkpoint, row["path"] == "quant", shape))

    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1
    for row, line in zip(report["results"], table[2:]):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:3] == [row["path"], str(row["input_tokens"]), str(row["output_tokens"])]
        assert cells[-1] == row["checksum"]
        assert (cells[5] == "-") == (row["output_tokens"] == 1)


def reference_ids(checkpoint, quant: bool, shape: Shape) -> list[int]:
    """Return what reference.py generates after the first prompt of a shape."""
    (ids, *_) = make_prompts(shape, 3, checkpoint.config.vocab_size, checkpoint.config.stop_ids)
    reference = Reference(checkpoint, quant, max_context=shape.positions)
    logits = reference.forward(ids, 0)[-1]
    answer = [int(logits.argmax())]
    for position in range(len(ids), shape.positions - 1):
        answer.append(int(reference.forward([answer[-1]], position)[-1].argmax()))
    return answer


@pytest.mark.parametrize("kind", ["folder", "archive"])
def test_stop_ids_end_nothing(checkpoint, tmp_path, monkeypatch, capsys, kind):
    """An answer goes on even after a stop id; a prompt has none."""
    shape = Shape(6, 4)
    (prompt, *_) = make_prompts(shape, 1, 264, (STOP_ID,))
    endless = MegaModel(checkpoint.with_config(stop_ids=()), max_context=shape.positions)
    answer = list(endless.generate(prompt, shape.output_tokens))
    stop_id = next(token_id for token_id in answer if token_id not in prompt)

    folder = write_model(tmp_path / "model")
    (folder / GENERATION_NAME).write_text(json.dumps({"eos_token_id": [stop_id, STOP_ID]}))
    model = folder
    if kind == "archive":
        model = tmp_path / "m.iris"
        words = ["--model", folder, "--out", model]
        assert run_script(convert_to_iris.main, words, monkeypatch, capsys)[0] == 0

    def same_prompt(shape: Shape, n: int, vocab_size: int, stop_ids: tuple[int, ...]) -> list[list[int]]:
        assert {*stop_ids} == {stop_id, STOP_ID}
        return [prompt]

    monkeypatch.setattr(bench_islosl, "make_prompts", same_prompt)
    words = ["--model", model, "--configs", shape, "--repeats", 1, "--json", tmp_path / "report.json"]
    assert run_script(bench_islosl.main, words, monkeypatch, capsys)[0] == 0
    (row,) = json.loads((tmp_path / "report.json").read_text())["results"]
    assert row["checksum"] == checksum(answer)


def test_quantized_path_and_layers(run):
    code, out, _ = run("--quant", "--layers", 1, "--fp8-head", "--configs", "3:2", "--repeats", 1)
    assert code == 0
    assert ", 1 layers" in out
    assert "| quant, head fp8-row | 3 | 2 |" in out


def test_runs_that_differ_are_one_line_and_a_failure(run, monkeypatch, tmp_path):
    answers = itertools.count()
    monkeypatch.setattr(MegaModel, "generate", lambda self, prompt_ids, n: iter([next(answers) for _ in range(n)]))
    code, out, err = run("--configs", "3:2", "--json", tmp_path / "report.json")
    assert (code, out) == (1, "")
    error = "error: two runs of default at 3:2 wrote different tokens after the same prompt"
    assert err.splitlines()[-1] == error
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_written_leaves_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Namespace(free=1))
    code, out, err = run("--configs", "1:1", "--repeats", 1, "--json", tmp_path / "report.json")
    assert (code, "| default | 1 | 1 |" in out) == (2, True)
    assert err.splitlines()[-1].startswith(f"error: --json {tmp_path / 'report.json'}: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "on_gpu, configs, repeats",
    [(True, ["100:100", "1024:100", "1024:1024", "2048:2048", "8192:128"], 5), (False, ["16:8", "64:8"], 2)],
)
def test_what_suits_the_device(on_gpu, configs, repeats):
    plan = plan_for(Namespace(configs=None, repeats=None), on_gpu)
    assert ([str(shape) for shape in plan.shapes], plan.repeats) == (configs, repeats)
    asked = Namespace(configs=(Shape(1, 2),), repeats=9)
    assert plan_for(asked, on_gpu) == Plan((Shape(1, 2),), 9)


def test_the_context_is_that_of_the_longest_request():
    plan = Plan((Shape(100, 100), Shape(90, 120), Shape(150, 10)), 1)
    assert (plan.longest, plan.longest.positions) == (Shape(90, 120), 210)


@pytest.fixture(scope="module")
def gpu_report() -> Report:
    """Make a report as of a GPU, with two requests of one prompt length."""
    found = {
        "device": "GPU 9",
        "multiprocessors": 132,
        "clocks": {"clocks.sm": "1980 MHz"},
        "torch": "2",
        "triton": "3",
    }
    shapes = (Shape(2048, 1), Shape(100, 9), Shape(2048, 9))
    rows = tuple(measurement(path, shape) for path in ("default", "quant") for shape in shapes)
    return Report("random 120b, 36 layers", found, 264, 4096, Plan(shapes, 3), rows)


def measurement(path: str, shape: Shape) -> Measurement:
    """Make runs with TTFT of 1, 2 and 3 ms for each token of input and output together, and TPOT of 1.5 ms."""
    ttft_ms = [float(n * shape.positions) for n in (1, 2, 3)]
    tpot_ms = 1.5 if shape.output_tokens > 1 else None
    runs = tuple(Run(ms, tpot_ms, 4.25, 5678.96, 12.34) for ms in ttft_ms)
    figures = [spread(ttft_ms), tpot_ms and spread([tpot_ms] * 3), *(spread([n] * 3) for n in (4.25, 5678.96, 12.34))]
    return Measurement(path, shape.input_tokens, shape.output_tokens, *figures, runs, "0badf00d")


def test_gpu_report_in_markdown(gpu_report):
    lines = markdown(gpu_report).splitlines()
    assert lines[0] == "Requests of input:output tokens: random 120b, 36 layers"
    assert any(line.startswith("- GPU 9, 132 multiprocessors; programs: 264;") for line in lines)
    assert "- right after the runs: clocks.sm 1980 MHz" in lines
    assert "no claim" not in markdown(gpu_report).lower()
    cells = "218.00 | 130.80 to 305.20 | 1.500 | 1.500 to 1.500 | 4.250 | 5679.0 | 12.3 | 0badf00d"
    assert f"| quant | 100 | 9 | {cells} |" in lines
    cells = "4098.00 | 2458.80 to 5737.20 | - | - | 4.250 | 5679.0 | 12.3 | 0badf00d"
    assert f"| default | 2048 | 1 | {cells} |" in lines


def test_lines_of_the_plot_pool_the_runs_with_one_prompt_length(gpu_report):
    """2049 and 2057 ms are the times of 2048 input tokens."""
    pooled = spread([2049.0, 2 * 2049.0, 3 * 2049.0, 2057.0, 2 * 2057.0, 3 * 2057.0])
    line = [(2048, pooled), (100, spread([109.0, 218.0, 327.0]))]
    assert ttft_lines(gpu_report.results) == {"default": line, "quant": line}


def test_plot_of_the_command_line(run, tmp_path, monkeypatch):
    axes = fake_matplotlib.install(monkeypatch)
    code, _, _ = run("--both", "--configs", "8:2,4:1", "--repeats", 1, "--plot", tmp_path / "plot.png")
    assert code == 0
    assert (tmp_path / "plot.png").read_bytes() == fake_matplotlib.PNG
    drawn = axes.errorbar.call_args_list
    assert [(call.kwargs["label"], call.args[0]) for call in drawn] == [("default", (4, 8)), ("quant", (4, 8))]
    assert axes.set_ylabel.call_args.args == ("time to first token, ms (CPU interpreter, no claim)",)
    assert [file.name for file in tmp_path.iterdir()] == ["plot.png"]


def test_plot_by_matplotlib(gpu_report, tmp_path):
    pytest.importorskip("matplotlib")
    bench_islosl.write_plot(tmp_path / "plot.png", gpu_report)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_too_little_memory_names_the_longest_request(run, monkeypatch):
    monkeypatch.setattr(limits, "available_bytes", lambda device: 1000)
    assert_rejected(run("--configs", "3:4,5:6"), "--configs 5:6: not enough memory on cpu", "a context of 11 tokens")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--configs", ""], "--configs: '' is not INPUT:OUTPUT"),
        (["--configs", "100:100,"], "--configs: '' is not INPUT:OUTPUT"),
        (["--configs", "100"], "--configs: '100' is not INPUT:OUTPUT"),
        (["--configs", "1:2:3"], "--configs: '1:2:3' is not INPUT:OUTPUT"),
        (["--configs", "0:5"], "--configs: '0' is not a positive integer"),
        (["--configs", "5:0"], "--configs: '0' is not a positive integer"),
        (["--configs", "5:-1"], "--configs: '-1' is not a positive integer"),
        (["--configs=-5:1"], "--configs: '-5' is not a positive integer"),
        (["--configs", "8:8,5:x"], "--configs: 'x' is not a positive integer"),
        (["--configs", "5:"], "--configs: '' is not a positive integer"),
        (["--configs", "1.5:2"], "--configs: '1.5' is not a positive integer"),
        (["--configs", "8:8,131000:73"], "--configs 131000:73: 131073 positions, the model takes 1 to 131072"),
        (["--repeats", "0"], "--repeats: '0' is not a positive integer"),
        (["--quant", "--both"], "not allowed with"),
        (["--random-weights", "120b"], "not allowed with"),
        (["--layers", "3"], "--layers 3: the model has layers 1 to 2"),
        (["--fp8-scale", "row"], "--fp8-scale: which matrices?"),
        (["--json", "nowhere/at/all.json"], "--json nowhere/at/all.json: there is no such folder"),
        (["--plot", "."], "--plot .: is there already, and not a regular file"),
    ],
)
def test_bad_input_is_one_line(run, words, message):
    assert_rejected(run(*words), message)


def test_a_plot_without_matplotlib_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_rejected(run("--plot", tmp_path / "plot.png"), "--plot", "plot.png: matplotlib is not installed")


def test_unknown_model(monkeypatch, capsys):
    assert_rejected(run_script(bench_islosl.main, ["--model", "nowhere/at/all"], monkeypatch, capsys), "nowhere/at/all")
