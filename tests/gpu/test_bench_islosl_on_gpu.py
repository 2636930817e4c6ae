"""bench_islosl.py on a GPU, where its figures mean something. The bounds are those that no device could leave."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.config import GPT_OSS_120B
from measure.traffic import bytes_per_token

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def record(tmp_path_factory) -> tuple[dict, str]:
    """Report 2 layers of random 120b weights on both paths; return the report and its Markdown."""
    path = tmp_path_factory.mktemp("report") / "report.json"
    sizes = ["--layers", "2", "--configs", "8:1,16:64,512:64", "--repeats", "3"]
    command = [sys.executable, "bench_islosl.py", "--random-weights", "120b", "--both", *sizes, "--json", str(path)]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=300).stdout
    return json.loads(path.read_text()), out


def test_each_row_has_its_times(record):
    report, _ = record
    assert [(row["path"], row["input_tokens"], row["output_tokens"]) for row in report["results"]] == [
        (path, *shape) for path in ("default", "quant") for shape in ((8, 1), (16, 64), (512, 64))
    ]
    for row in report["results"]:
        for run in row["runs"]:
            assert run["ttft_ms"] > 0
            further_s = (row["output_tokens"] - 1) * (run["tpot_ms"] or 0) / 1e3
            assert run["end_to_end_s"] == pytest.approx(run["ttft_ms"] / 1e3 + further_s)
        assert (row["tpot_ms"] is None) == (row["output_tokens"] == 1)


def test_a_longer_prompt_takes_longer_and_a_token_as_long_as_before(record):
    """A token takes its bytes at 1 to 10 TB/s, at most 20 times that."""
    for _, short, long in (record[0]["results"][:3], record[0]["results"][3:]):
        assert long["ttft_ms"]["median"] > short["ttft_ms"]["median"]
        terabytes = bytes_per_token(GPT_OSS_120B.cut(2), 16) / 1e12
        assert terabytes / 10 < short["tpot_ms"]["median"] / 1e3 < terabytes * 20
        assert long["tpot_ms"]["median"] == pytest.approx(short["tpot_ms"]["median"], rel=0.5)


def test_table_holds_the_checksums_and_makes_a_claim(record):
    report, out = record
    table = [line for line in out.splitlines() if line.startswith("|")][2:]
    assert all(row["checksum"] in line for row, line in zip(report["results"], table, strict=True))
    assert "no claim" not in out.lower()
