"""Dense matrices in FP8 on a GPU, through the ring, against reference.py with the same matrices rounded."""

import dataclasses

import pytest
import torch
from made_up_models import ODD_SIZES, loud_checkpoint, random_token_ids, small_config
from test_megakernel_on_gpu import (
    CUDA,
    F32,
    QUANT_TOLERANCE,
    TOLERANCE,
    copy_cache,
    endless,
    relative_rms,
)

from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import FP8_GROUPS, FP8_ROWS, GPT_OSS_120B, DenseFormats
from checkpoints.fp8 import quantize_fp8
from command_line.options import DEFAULT_MODEL
from gpt_oss_megakernel import MegaModel
from load_hf import open_checkpoint
from reference import Reference

EVERYTHING = {f"all {name}": DenseFormats(name, name, name, name) for name in (FP8_ROWS, FP8_GROUPS)}
MIXED = {"mixed": DenseFormats(qkv=FP8_ROWS, o=FP8_GROUPS, head=FP8_ROWS)}
# Rows that fill the threads which share them in other ways, last tiles that are short in others: 2880 as published.
WIDTHS = {
    "hidden 1536": dict(hidden_size=1536, vocab_size=1003),
    "hidden 3584": dict(hidden_size=3584, vocab_size=517, n_heads=20),
    **{name: ODD_SIZES[name] for name in ("three heads a group", "hidden 416, intermediate 224", "vocabulary 1003")},
}


@pytest.fixture(scope="module")
def two_layers():
    return RandomCheckpoint(endless(GPT_OSS_120B.cut(2)), device=CUDA)


@pytest.mark.parametrize("dense_format", [FP8_ROWS, FP8_GROUPS])
def test_a_gpu_rounds_as_a_cpu_does(dense_format):
    matrix = torch.randn(3, 500, 2880, generator=torch.Generator().manual_seed(3)).bfloat16()
    matrix[:, :, ::32] = 3.5  # 448 / 128: many groups' largest element
    for ours, theirs in zip(quantize_fp8(matrix.to(CUDA), dense_format), quantize_fp8(matrix, dense_format)):
        assert torch.equal(ours.cpu().view(torch.uint8), theirs.view(torch.uint8))


def errors_of(model: MegaModel, reference: Reference, token_ids: list[int]) -> list[float]:
    """Return the errors of each token's logits; each token starts from the reference's cache."""
    expected = reference.forward(token_ids)
    errors = []
    for position, token in enumerate(token_ids):
        copy_cache(reference, model)
        found = model.logits(token, position).to(expected.device)
        assert torch.isfinite(found).all()
        errors.append(relative_rms(found, expected[position]))
    return errors


@pytest.mark.parametrize("quant", [False, True], ids=["default", "quant"])
@pytest.mark.parametrize("dense", (EVERYTHING | MIXED).values(), ids=(EVERYTHING | MIXED).keys())
def test_full_width(two_layers, dense, quant):
    reference = Reference(two_layers, quant, F32, max_context=64, device=CUDA, dense=dense)
    token_ids = [11, 2222, 33333, 200000, 5, 70000]
    model = MegaModel(two_layers, quant, max_context=64, kv_dtype=F32, dense=dense)
    errors = errors_of(model, reference, token_ids)
    print(f"relative rms: worst {max(errors):.1e}")
    assert max(errors) < (QUANT_TOLERANCE if quant else TOLERANCE)
    shared = dict(weights=model.weights, tuning=model.tuning)
    other = MegaModel(two_layers, quant, max_context=64, kv_dtype=F32, dense=dense, num_programs=131, **shared)
    copy_cache(reference, other)
    copy_cache(reference, model)
    assert torch.equal(other.logits(token_ids[-1], 5), model.logits(token_ids[-1], 5))


@pytest.mark.parametrize("dense", EVERYTHING.values(), ids=EVERYTHING.keys())
@pytest.mark.parametrize("changes", WIDTHS.values(), ids=WIDTHS.keys())
def test_odd_sizes(changes, dense):
    config = small_config(**{"n_layers": 2, "layer_is_sliding": (True, False), **changes})
    checkpoint = loud_checkpoint(config)
    reference = Reference(checkpoint, False, F32, max_context=33, dense=dense)
    model = MegaModel(checkpoint, max_context=33, kv_dtype=F32, dense=dense)
    assert max(errors_of(model, reference, random_token_ids(33, config))) < TOLERANCE


@pytest.mark.parametrize("quant", [False, True], ids=["default", "quant"])
def test_the_shipped_model_continues_as_the_reference_does(quant):
    dense = dataclasses.replace(EVERYTHING[f"all {FP8_ROWS}"], router="bf16")
    checkpoint = open_checkpoint(DEFAULT_MODEL)
    expected = list(Reference(checkpoint, quant, max_context=128, device=CUDA, dense=dense).generate([1, 2, 3], 60))
    model = MegaModel(checkpoint, quant, max_context=128, dense=dense)
    assert list(model.generate([1, 2, 3], 60)) == expected
