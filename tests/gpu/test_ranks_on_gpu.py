"""Several processes that share one GPU over Iris's heap: they answer as a single one does."""

import dataclasses
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rank_worker import Case, answer_of
from shipped import FOLDER
from test_megakernel_on_gpu import QUANT_TOLERANCE, TOLERANCE

from checkpoints.config import FP8_GROUPS, FP8_ROWS
from checkpoints.harmony import chat_ids
from command_line.options import DEMO_CHAT
from gpt_oss_megakernel import MegaModel
from tokenizer_util import Tokenizer

pytestmark = pytest.mark.skipif(importlib.util.find_spec("iris") is None, reason="Iris is not installed")

ROOT = Path(__file__).parents[2]
N_TOKENS = 200
SIZES = {"tp": (2, 4), "roles": (2, 3, 5)}
WIDE_PROMPT = tuple(range(5, 60))  # fed in blocks


def shipped(layout: str, n_tokens: int = N_TOKENS, **changes) -> Case:
    prompt = chat_ids(Tokenizer.from_folder(FOLDER), DEMO_CHAT)
    return Case(layout, str(FOLDER), tuple(prompt), n_tokens, **changes)


def wide(layout: str, **changes) -> Case:
    """120b's width with few layers. Random weights have near ties, so that later tokens hang on the order of sums."""
    return Case(layout, "120b", WIDE_PROMPT, 1, n_layers=2, twice=True, **changes)


def cases_of(layout: str) -> dict[str, Case]:
    return {
        "shipped, default": shipped(layout),
        "shipped, quant": shipped(layout, quant=True),
        "shipped, quant, FP8 rows": shipped(layout, 30, quant=True, fp8=FP8_ROWS),
        "shipped, FP8 groups": shipped(layout, 30, fp8=FP8_GROUPS),
        "120b, default": wide(layout),
        "120b, quant": wide(layout, quant=True),
    }


NAMES = tuple(cases_of("tp"))


def run_ranks(n_ranks: int, cases: list[Case], folder: Path, timeout: int = 600) -> subprocess.CompletedProcess:
    """Run the cases on ranks that share this machine's GPUs."""
    (folder / "cases").write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
    command += ["tests/gpu/rank_worker.py", str(folder / "cases"), str(folder / "answers")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Return name -> answer of all cases of a layout, run once for each number of ranks."""
    known: dict[tuple[str, int], dict[str, dict]] = {}

    def answers(layout: str, n_ranks: int) -> dict[str, dict]:
        if (layout, n_ranks) not in known:
            folder = tmp_path_factory.mktemp("ranks")
            done = run_ranks(n_ranks, list(cases_of(layout).values()), folder)
            assert done.returncode == 0, done.stderr
            known[layout, n_ranks] = dict(zip(NAMES, torch.load(folder / "answers"), strict=True))
        return known[layout, n_ranks]

    return answers


@pytest.fixture(scope="module")
def expected():
    """Return the answer of one process to a case."""
    known: dict[str, dict] = {}

    def expected(name: str) -> dict:
        if name not in known:
            case = cases_of("tp")[name]
            known[name] = answer_of(MegaModel(case.checkpoint(), device="cuda", **case.options()), case)
        return known[name]

    return expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout, n_ranks", [(layout, n) for layout, sizes in SIZES.items() for n in sizes])
def test_ranks_answer_as_one_does(layout, n_ranks, name, answers, expected):
    """With whole matrices the logits are the same bits; partial sums of split ones are added in another order."""
    found, one = answers(layout, n_ranks)[name], expected(name)
    assert found["tokens"] == one["tokens"]
    if layout == "roles":
        assert torch.equal(found["logits"], one["logits"])
    else:
        error = (found["logits"] - one["logits"]).norm() / one["logits"].norm()
        assert error < (QUANT_TOLERANCE if "quant" in name else TOLERANCE)


@pytest.mark.parametrize("layout", SIZES)
def test_a_killed_rank_is_named_by_the_others(layout, tmp_path):
    done = run_ranks(2, [dataclasses.replace(shipped(layout), dies_at=5)], tmp_path, timeout=120)
    assert done.returncode != 0
    line = r"error: rank 1 did not arrive behind the .* \(rank 0 waited for it\)"
    assert re.search(line, done.stderr), done.stderr
