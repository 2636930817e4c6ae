"""Finite weights as large or as small as their formats allow: where reference.py is finite, the kernel agrees.

Each case changes one kind of a random checkpoint's weights. Its tokens are fed one by one, by 1 and 3 programs, and in
blocks, on the tunings whose arithmetic differs: products of float32, tiles of tensor cores as on sm_90, MXFP8.
"""

from collections.abc import Callable

import pytest
import torch
from made_up_models import MemoryCheckpoint, loud_checkpoint, random_token_ids, small_config
from test_prefill import SMALL_BLOCKS
from torch import Tensor
from tunings import changed, ring_tiles

from checkpoints.config import BF16, FP8_GROUPS, FP8_ROWS, DenseFormats, ModelConfig
from checkpoints.fp8 import dequantize_fp8, quantize_fp8
from gpt_oss_megakernel import MegaModel
from host.launch import tuning_for
from host.tuning import Tuning
from reference import Reference

F32 = torch.float32
BF16_MAX = torch.finfo(torch.bfloat16).max
pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = small_config(
    n_layers=2,
    layer_is_sliding=(True, False),
    sliding_window=3,
    hidden_size=64,
    n_experts=4,
    experts_per_token=2,
    n_heads=4,
    vocab_size=64,
)
TOKENS = random_token_ids(4, CONFIG)
# From the third cached position on a KV head's are cut into splits of two.
SPLITS = dict(head_keys=2, head_step_keys=2, rows_per_load=2, step_keys=2, min_split_keys=2, max_splits=4)
TUNINGS: dict[str, Callable[[ModelConfig], Tuning]] = {
    "rows": lambda config: changed(tuning_for(torch.device("cpu"), config), attention=SPLITS),
    "no scaled products": lambda config: changed(
        tuning_for(torch.device("cpu"), config), experts=dict(dot_scaled=False), attention=SPLITS
    ),
    "packed": lambda config: ring_tiles(
        config,
        dense=dict(qkv_rows=64, o_rows=32, head_rows=64),
        experts=dict(step_tiles=16),
        attention=SPLITS | dict(bf16x3=True, partial_softmaxes=2),
    ),
}
# Beside float32 caches: the order of additions one by one, float16 vectors of the experts in blocks. Beside bfloat16
# ones, as packed tiles have them here, and with MXFP8: numbers that are rounded to their other neighbour.
ONE_BY_ONE, IN_BLOCKS, ROUNDED = 1e-4, 3e-3, 0.1


def checkpoint_with(*changes: tuple[str, Callable[[Tensor], Tensor]]) -> MemoryCheckpoint:
    """Return a checkpoint in which each pair (text, change) changes the tensors whose names contain the text."""

    def change(name: str, tensor: Tensor) -> Tensor:
        for part, change_tensor in changes:
            if part in name:
                tensor = change_tensor(tensor.clone())
        return tensor

    return loud_checkpoint(CONFIG).with_tensors(change)


def filled(part: str, value: float) -> tuple[str, Callable[[Tensor], Tensor]]:
    return part, lambda t: t.fill_(value)


def times(part: str, factor: float) -> tuple[str, Callable[[Tensor], Tensor]]:
    return part, lambda t: (t.float() * factor).to(t.dtype)


def either_sign(part: str, value: float) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Return the value with alternating signs."""
    return part, lambda t: t.fill_(value) * (1 - 2 * (torch.arange(t.numel()).view(t.shape) % 2)).to(t.dtype)


def scaled(matrix: str, scale: int, code: int, rows: slice = slice(None)) -> tuple:
    """Return changes of rows of an MXFP4 stack.

    The second group gets this scale and, in E2M1, this first element; its other elements become 0.
    """

    def change_scales(t: Tensor) -> Tensor:
        t[:, rows, 1] = scale
        return t

    def change_blocks(t: Tensor) -> Tensor:
        t[:, rows, 1] = 0
        t[:, rows, 1, 0] = code
        return t

    return (f"{matrix}_proj_scales", change_scales), (f"{matrix}_proj_blocks", change_blocks)


FAR_BELOW = (filled("q_proj.bias", 1e18), filled("k_proj.bias", -1e18))  # scores
GATE_AND_UP, UP = slice(4, 6), slice(5, 6)  # rows
HALF, SIX = 1, 7  # in E2M1
KINDS = {
    "sinks": (either_sign("sinks", BF16_MAX),),
    "scores far below zero": (*FAR_BELOW, filled("sinks", -BF16_MAX)),
    "values": (filled("v_proj.bias", BF16_MAX), times("o_proj.weight", 2.0**-124)),
    "residual": (filled("layers.1.self_attn.o_proj.bias", BF16_MAX),),
    "last norm and LM head": (times("embed_tokens", 1e5), times("model.norm", 1e18), times("lm_head", 1e18)),
    "experts' norm": (times("post_attention_layernorm", 1e36),),
    "router and experts' biases": (
        times("router.weight", 1e36),
        either_sign("router.bias", 2e38),
        either_sign("gate_up_proj_bias", BF16_MAX),
        times("down_proj_bias", 1e15),
    ),
    "scales 0 and 1": (filled("gate_up_proj_scales", 0), filled("down_proj_scales", 1)),
    "scale 254 in a row": scaled("gate_up", 254, HALF, GATE_AND_UP),
    "scales 254 of zeros": (*scaled("gate_up", 254, 0), *scaled("down", 254, 0)),
    "scales 254 of zeros, experts' norm": (
        *scaled("gate_up", 254, 0),
        *scaled("down", 254, 0),
        times("post_attention_layernorm", 1e36),
    ),
    "scale 253 beyond float32": scaled("gate_up", 253, SIX, UP),
}
# (kind, tuning, quant, format of dense matrices)
CASES = [(kind, "rows", False, BF16) for kind in list(KINDS)[:-2]] + [
    ("experts' norm", "no scaled products", True, BF16),
    ("scale 253 beyond float32", "rows", True, BF16),
    ("values", "rows", False, FP8_ROWS),
    ("values", "rows", False, FP8_GROUPS),
    ("scores far below zero", "packed", False, BF16),
    ("scales 254 of zeros, experts' norm", "packed", False, BF16),
    ("scale 253 beyond float32", "packed", False, BF16),
    ("values", "packed", True, FP8_ROWS),
]


def assert_close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that logits agree relatively, and are zeros where expected, as of a residual whose square overflows."""
    largest = expected.abs().amax(-1, keepdim=True)
    unit = torch.where(largest > 0, largest, 1.0)  # beside which no square leaves float32
    error = (found / unit - expected / unit).norm(dim=-1) / (expected / unit).norm(dim=-1)
    assert torch.where(largest[..., 0] > 0, error, found.abs().amax(-1)).max() <= tolerance


@pytest.mark.parametrize("kind, tuning, quant, dense_format", CASES)
def test_extremes(kind, tuning, quant, dense_format):
    checkpoint, n = checkpoint_with(*KINDS[kind]), len(TOKENS)
    kv_dtype = torch.bfloat16 if tuning == "packed" else F32
    rounded = quant or kv_dtype != F32
    dense = DenseFormats(qkv=dense_format, o=dense_format, router=dense_format, head=dense_format)
    expected = Reference(checkpoint, quant, kv_dtype, max_context=n, dense=dense).forward(TOKENS)
    assert expected.isfinite().all(), "nothing to compare with"
    options = dict(
        max_context=n + 1, kv_dtype=kv_dtype, dense=dense, tuning=TUNINGS[tuning](CONFIG), blocks=SMALL_BLOCKS
    )
    model = MegaModel(checkpoint, quant, **options)
    logits = torch.stack([model.logits(token_id, position) for position, token_id in enumerate(TOKENS)])
    assert_close(logits, expected, ROUNDED if rounded else ONE_BY_ONE)
    model.reset()
    (answer,) = model.generate(TOKENS, 1)  # its prompt in blocks
    last = model.logits(TOKENS[-1], n - 1)
    assert_close(last, expected[-1], ROUNDED if rounded else IN_BLOCKS)
    assert answer == int(last.argmax())
    if kind == "sinks":
        others = MegaModel(checkpoint, quant, num_programs=3, weights=model.weights, **options)
        again = torch.stack([others.logits(token_id, position) for position, token_id in enumerate(TOKENS)])
        assert torch.equal(again, logits)


@pytest.mark.parametrize("dense_format", [FP8_ROWS, FP8_GROUPS])
@pytest.mark.parametrize("largest", [1.9 * 2.0**127, 1.0, 2.0**-126, 2.0**-133, 0.0])
def test_rows_of_any_size_in_fp8(largest, dense_format):
    """Errors are at most half of E4M3's last place, or of the smallest subnormal scale's; finite rows stay finite."""
    row = torch.linspace(-1, 1, 64).to(torch.bfloat16)
    matrix = torch.stack((row, row.flip(0))) * torch.tensor(largest, dtype=torch.bfloat16)
    found = dequantize_fp8(*quantize_fp8(matrix, dense_format)).double()
    error = (found - matrix.double()).abs()
    assert (error <= torch.maximum(matrix.double().abs() / 16, torch.tensor(largest * 2.0**-7 + 2.0**-140))).all()
