"""Two GPUs of one machine, 120b's sizes and random weights: the answers of one GPU, and 1,000 tokens twice the same."""

import importlib.util

import pytest
import torch
from rank_worker import Case, answer_of
from test_megakernel_on_gpu import QUANT_TOLERANCE, TOLERANCE
from test_ranks_on_gpu import run_ranks

from checkpoints.config import FP8_ROWS
from gpt_oss_megakernel import MegaModel

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("iris") is None, reason="Iris is not installed"),
]
CHANGES = {"default": {}, "quant": {"quant": True}, "FP8": {"fp8": FP8_ROWS}}
FORCED = tuple(range(1000, 1064))


def case_of(layout: str, name: str) -> Case:
    prompt = tuple(range(5, 60))
    return Case(layout, "120b", prompt, 1000, n_layers=36, twice=True, context=1200, forced=FORCED, **CHANGES[name])


@pytest.mark.parametrize("layout", ["tp", "roles"])
@pytest.mark.parametrize("name", CHANGES)
def test_two_gpus_answer_as_one_does(layout, name, tmp_path):
    """With whole matrices answers are the same bits. Partial sums of split ones are added in another order.

    Of random weights' logits the two largest may then change places where they are nearly equal.
    """
    case = case_of(layout, name)
    done = run_ranks(2, [case], tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = torch.load(tmp_path / "answers")
    one = answer_of(MegaModel(case.checkpoint(), device="cuda", **case.options()), case)
    if layout == "roles":
        assert found["tokens"] == one["tokens"]
        assert torch.equal(found["logits"], one["logits"])
        return
    error = (found["logits"] - one["logits"]).norm() / one["logits"].norm()
    assert error < (QUANT_TOLERANCE if name == "quant" else TOLERANCE)
    lost = one["logits"].max(-1).values - one["logits"].gather(-1, found["logits"].argmax(-1)[:, None])[:, 0]
    assert lost.max() <= 2 * (found["logits"] - one["logits"]).abs().max()
