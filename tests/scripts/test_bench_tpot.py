"""bench_tpot.py on the CPU interpreter: what it decodes, what it reports, what it refuses. Times mean nothing here."""

import dataclasses
import json
import sys
from argparse import Namespace

import pytest
import torch
from small_model import assert_rejected, run_script

import bench_tpot
from bench_tpot import Measurement, Plan, Report, json_text, markdown, plan_for, write_plot
from checkpoints.config import GPT_OSS_120B
from command_line.options import DEFAULT_MODEL
from gpt_oss_megakernel import MegaModel
from host.limits import required_bytes
from load_hf import open_checkpoint
from measure.bandwidth import Bandwidth
from measure.random_cache import fill_cache
from measure.timing import Spread, checksum
from measure.traffic import bytes_per_token
from reference import Reference
from system.errors import InputError

SPREAD_KEYS = {"median", "mean", "min", "p10", "p90", "n"}


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Run the command line in this process on the small model; return (exit code, stdout, stderr)."""
    return lambda *words: run_script(bench_tpot.main, ["--model", folder, *words], monkeypatch, capsys)


@pytest.fixture
def run_json(run, tmp_path):
    def run_json(*words) -> dict:
        code, _, _ = run(*words, "--json", tmp_path / "report.json")
        assert code == 0
        return json.loads((tmp_path / "report.json").read_text())

    return run_json


@pytest.fixture(scope="module")
def gpu_report() -> Report:
    """Make a report as of a GPU, with numbers that are easy to follow: 5 GB at 5 TB/s is 1 ms."""
    time = Spread(median=2.0, mean=2.1, min=1.9, p10=1.95, p90=2.25, n=310)
    rows = tuple(
        Measurement(path, context, context - 32, time, time, 5_000_000_000, 1.0, 0.5, "0badf00d")
        for path in ("default", "quant")
        for context in (128, 2048)
    )
    found = {
        "device": "GPU 9",
        "multiprocessors": 132,
        "clocks": {"clocks.sm": "1980 MHz"},
        "torch": "2",
        "triton": "3",
    }
    bandwidth = Bandwidth(10_000_000_000, dataclasses.replace(time, n=20))
    return Report("random 120b, 36 layers", found, 264, Plan((128, 2048), 64, 5, 131072), bandwidth, rows)


def test_shipped_model(monkeypatch, capsys, tmp_path):
    """From position 0 on nothing is random, so that the ids are those of an ordinary generation."""
    words = ["--both", "--contexts", "4,20", "--steps", 8, "--repeats", 1, "--json", tmp_path / "report.json"]
    code, out, err = run_script(bench_tpot.main, words, monkeypatch, capsys)
    assert code == 0
    assert err.splitlines()[-1] == "measuring quant at context 20"
    assert "No claim." in out

    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report) == ["model", "conditions", "num_programs", "plan", "bandwidth", "results"]
    assert (report["model"], report["bandwidth"]) == ("sonnets, 4 layers", None)
    assert [(r["path"], r["context"], r["first_position"]) for r in report["results"]] == [
        ("default", 4, 0),
        ("default", 20, 16),
        ("quant", 4, 0),
        ("quant", 20, 16),
    ]
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    endless = dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, stop_ids=()))
    for row in report["results"]:
        assert row["device_ms"] is row["floor_ms"] is row["fraction_of_floor"] is None
        assert row["wall_ms"].keys() == SPREAD_KEYS
        assert row["wall_ms"]["n"] == 7
        assert row["wall_ms"]["min"] > 0
        assert row["bytes_per_token"] == bytes_per_token(checkpoint.config, row["context"])
        if row["first_position"] == 0:
            model = MegaModel(endless, row["path"] == "quant", max_context=8)
            assert row["checksum"] == checksum(model.generate([0], 8))

    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 4
    assert len({line.count("|") for line in table}) == 1
    assert all(row["checksum"] in line for row, line in zip(report["results"], table[2:]))


@pytest.mark.parametrize("quant", [False, True], ids=["default", "quant"])
def test_ids_after_a_random_cache_are_the_reference_s(run_json, checkpoint, quant):
    report = run_json(*["--quant"] * quant, "--contexts", 40, "--steps", 10, "--repeats", 2)
    (row,) = report["results"]
    assert (row["path"], row["first_position"], row["wall_ms"]["n"]) == ("quant" if quant else "default", 35, 18)
    reference = Reference(checkpoint, quant, max_context=45)
    fill_cache(reference.keys.transpose(1, 2), reference.values.transpose(1, 2), 35, bench_tpot.SEED)
    token_ids = [0]
    for position in range(35, 45):
        token_ids.append(int(reference.forward([token_ids[-1]], position)[-1].argmax()))
    assert row["checksum"] == checksum(token_ids[1:])


def test_a_context_s_ids_do_not_depend_on_the_others(run_json):
    alone = run_json("--contexts", 30, "--steps", 6, "--repeats", 1)["results"]
    among = run_json("--contexts", "50, 30,50", "--steps", 6, "--repeats", 1)["results"]
    assert [row["context"] for row in among] == [50, 30]
    assert among[1]["checksum"] == alone[0]["checksum"]


def test_layers_and_programs(run_json):
    report = run_json("--layers", 1, "--num-programs", 3, "--contexts", 5, "--steps", 4, "--repeats", 1)
    assert report["num_programs"] == 3
    assert report["model"].endswith(", 1 layers")


def test_runs_that_differ_are_not_timed(checkpoint, monkeypatch):
    runs = iter([([1, 2], [], [1.0]), ([1, 3], [], [1.0])])
    monkeypatch.setattr(bench_tpot, "timed_run", lambda *_: next(runs))
    model = MegaModel(checkpoint, max_context=8)
    with pytest.raises(RuntimeError, match="context 4 wrote different tokens"):
        bench_tpot.measure(model, Plan((4,), 2, 1, 64), 4, None)


def test_the_floor_is_the_bytes_at_the_measured_bandwidth(checkpoint, monkeypatch):
    """The first run warms up and does not count."""
    runs = iter([([1, 2, 3], [9.0, 9.0], [9.0, 9.0]), ([1, 2, 3], [4.0, 6.0], [5.0, 7.0])])
    monkeypatch.setattr(bench_tpot, "timed_run", lambda *_: next(runs))
    n_bytes = bytes_per_token(checkpoint.config, 4)
    two_ms = Bandwidth(n_bytes, Spread(2.0, 2.0, 2.0, 2.0, 2.0, 1))
    row = bench_tpot.measure(MegaModel(checkpoint, max_context=8), Plan((4,), 3, 1, 64), 4, two_ms)
    assert (row.bytes_per_token, row.checksum) == (n_bytes, checksum([1, 2, 3]))
    assert (row.device_ms.median, row.device_ms.n, row.wall_ms.median) == (5.0, 2, 6.0)
    assert (row.floor_ms, row.fraction_of_floor) == pytest.approx((2.0, 0.4))


def test_switched_path_is_the_path_itself(checkpoint):
    model = MegaModel(checkpoint, max_context=8, kv_dtype=torch.float32)
    quantized = MegaModel(checkpoint, True, max_context=8, kv_dtype=torch.float32)
    default = model.logits(65, 0)
    model.step(66, 1)
    model.switch_path(True)
    assert torch.equal(model.logits(65, 0), quantized.logits(65, 0))
    assert not torch.equal(model.state.logits, default)
    model.switch_path(False)
    assert torch.equal(model.logits(65, 0), default)


def test_decode_goes_on_after_a_stop_id_until_the_context_is_full(checkpoint):
    launches = []
    endless = MegaModel(checkpoint.with_config(stop_ids=()), max_context=9)
    expected = list(endless.generate([65, 66], 20))
    model = MegaModel(checkpoint.with_config(stop_ids=tuple(expected)), max_context=9)
    model.step(65, 0)
    assert list(model.decode(66, 1, 20, lambda: launches.append(1))) == expected
    assert len(launches) == len(expected) == 8


@pytest.mark.parametrize(
    "context, first", [(1, 0), (32, 0), (33, 1), (128, 96), (131040, 131008), (131041, 131008), (131072, 131008)]
)
def test_runs_are_centred_where_the_model_allows(context, first):
    plan = Plan((context,), 64, 5, 131072)
    assert plan.first_position(context) == first
    assert plan.max_context == first + 64


def plan_of(free_bytes: float, on_gpu: bool = True, config=GPT_OSS_120B, **arguments) -> Plan:
    args = Namespace(**{"contexts": None, "steps": None, "repeats": None, **arguments})
    return plan_for(args, config, on_gpu, free_bytes)


def test_default_contexts_are_those_that_fit():
    assert plan_of(1e15).contexts == (128, 2048, 8192, 32768, 131072)
    assert plan_of(required_bytes(GPT_OSS_120B, 8192 + 32)).contexts == (128, 2048, 8192)
    assert plan_of(required_bytes(GPT_OSS_120B, 8192 + 31)).contexts == (128, 2048)
    assert plan_of(0).contexts == (128,)  # MegaModel says what is missing
    assert plan_of(1e15, config=dataclasses.replace(GPT_OSS_120B, max_position_embeddings=5000)).contexts == (128, 2048)
    assert plan_of(1e15, on_gpu=False).contexts == (64,)
    assert plan_of(1e15, contexts=(7, 70000)).contexts == (7, 70000)


def test_a_model_too_short_for_the_steps_is_refused():
    short = dataclasses.replace(GPT_OSS_120B, max_position_embeddings=50)
    assert plan_of(1e15, config=short, steps=50).max_context == 50
    with pytest.raises(InputError, match="--steps 51: a run takes 2 to 50 tokens"):
        plan_of(1e15, config=short, steps=51)


def test_gpu_report_in_markdown(gpu_report):
    lines = markdown(gpu_report).splitlines()
    assert "- read bandwidth: 5.00 TB/s, median of 20 times 10.0 GB" in lines
    assert "- right after the runs: clocks.sm 1980 MHz" in lines
    assert any(line.startswith("- GPU 9, 132 multiprocessors; programs: 264;") for line in lines)
    assert "no claim" not in markdown(gpu_report).lower()
    row = (
        "| default | 128 | 2.000 | 1.900 | 1.950 to 2.250 | 2.000 | 1.950 to 2.250 | 5.000 | 1.000 | 50.0% | 0badf00d |"
    )
    assert row in lines


def test_gpu_report_in_json(gpu_report):
    record = json.loads(json_text(gpu_report))
    assert record["bandwidth"]["bytes_per_second"] == 5e12
    assert record["results"][0]["device_ms"]["median"] == 2.0
    assert record["results"][0]["fraction_of_floor"] == 0.5


def test_plot(gpu_report, tmp_path):
    pytest.importorskip("matplotlib")
    write_plot(tmp_path / "plot.png", gpu_report)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_the_command_line(run, tmp_path):
    pytest.importorskip("matplotlib")
    code, _, _ = run("--contexts", "4,8", "--steps", 2, "--repeats", 1, "--plot", tmp_path / "plot")
    assert code == 0
    assert (tmp_path / "plot").read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_rejected(run("--plot", tmp_path / "plot.png"), "--plot", "plot.png: matplotlib is not installed")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--contexts", "0"], "'0' is not a positive integer"),
        (["--contexts", "128,,2"], "'' is not a positive integer"),
        (["--contexts", "200000"], "--contexts 200000: the model takes 1 to 131072 positions"),
        (["--steps", "1"], "--steps 1: a run takes 2 to 131072 tokens"),
        (["--quant", "--both"], "not allowed with"),
        (["--random-weights", "120b"], "not allowed with"),
        (["--layers", "3"], "--layers 3: the model has layers 1 to 2"),
        (["--json", "nowhere/at/all.json"], "--json nowhere/at/all.json: there is no such folder"),
        (["--plot", "."], "--plot .: is there already, and not a regular file"),
    ],
)
def test_bad_input_is_one_line(run, words, message):
    assert_rejected(run(*words), message)


def test_unknown_model(monkeypatch, capsys):
    assert_rejected(run_script(bench_tpot.main, ["--model", "nowhere/at/all"], monkeypatch, capsys), "nowhere/at/all")
