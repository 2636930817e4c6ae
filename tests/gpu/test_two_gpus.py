"""Two GPUs of one machine, 120b's sizes and random weights: 1,000 tokens twice the same, over roles those of one GPU.

Over tp partial sums are added in another order, and 36 layers of random weights make any such difference as large as
the answer: on one GPU, too, a prompt in blocks and the same prompt token by token lead to different answers. What tp
computes is compared where weights are trained, or layers few, in test_ranks_on_gpu.py.
"""

import importlib.util

import pytest
import torch
from rank_worker import Case, answer_of
from test_ranks_on_gpu import run_ranks

from checkpoints.config import FP8_ROWS
from gpt_oss_megakernel import MegaModel

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(importlib.util.find_spec("iris") is None, reason="Iris is not installed"),
]
CHANGES = {"default": {}, "quant": {"quant": True}, "FP8": {"fp8": FP8_ROWS}}


@pytest.mark.parametrize("layout", ["tp", "roles"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_thousand_tokens(layout, name, tmp_path):
    prompt = tuple(range(5, 60))
    case = Case(layout, "120b", prompt, 1000, n_layers=36, twice=True, context=1200, **CHANGES[name])
    done = run_ranks(2, [case], tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = torch.load(tmp_path / "answers")
    assert len(found["tokens"]) == 1000
    assert found["logits"].isfinite().all()
    if layout == "roles":
        one = answer_of(MegaModel(case.checkpoint(), device="cuda", **case.options()), case)
        assert found["tokens"] == one["tokens"]
        assert torch.equal(found["logits"], one["logits"])
