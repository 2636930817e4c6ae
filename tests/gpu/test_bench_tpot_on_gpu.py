"""bench_tpot.py on a GPU, where its figures mean something. The bounds are those that no device could leave."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> tuple[dict, str]:
    """Report 2 layers of random 120b weights on both paths; return the report and its Markdown."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    sizes = ["--layers", "2", "--contexts", "128,2048", "--steps", "32", "--repeats", "3"]
    command = [sys.executable, "bench_tpot.py", "--random-weights", "120b", "--both", *sizes, "--json", str(path)]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout
    return json.loads(path.read_text()), out


def test_bandwidth_is_that_of_hbm(record):
    assert 1e12 < record[0]["bandwidth"]["bytes_per_second"] < 1e13


def test_each_row_has_its_times_and_stays_above_the_floor(record):
    report, _ = record
    assert [(row["path"], row["context"]) for row in report["results"]] == [
        ("default", 128),
        ("default", 2048),
        ("quant", 128),
        ("quant", 2048),
    ]
    for row in report["results"]:
        device, wall = row["device_ms"], row["wall_ms"]
        assert device["n"] == wall["n"] == 3 * 31
        assert 0 < device["min"] <= device["p10"] <= device["median"] <= device["p90"]
        assert wall["mean"] == pytest.approx(device["mean"], rel=0.2)
        assert row["floor_ms"] == pytest.approx(row["bytes_per_token"] / report["bandwidth"]["bytes_per_second"] * 1e3)
        assert 0.05 < row["fraction_of_floor"] < 1


def test_table_holds_the_checksums_and_makes_a_claim(record):
    report, out = record
    table = [line for line in out.splitlines() if line.startswith("|")][2:]
    assert all(row["checksum"] in line for row, line in zip(report["results"], table, strict=True))
    assert "no claim" not in out.lower()
