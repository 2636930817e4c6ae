"""Bytes per token against sums done by hand."""

from dataclasses import replace

import pytest
from made_up_models import small_config

from checkpoints.config import FP8_GROUPS, FP8_ROWS, GPT_OSS_20B, GPT_OSS_120B, DenseFormats
from host.phases import Phase, phases_of_token
from measure.traffic import bytes_by_phase, bytes_per_token, kv_bytes_per_token, weight_bytes_per_token

# One layer of either: QKV and O with their biases, sinks, two norms, then four experts.
ATTENTION = 2 * (5120 * 2880 + 5120 + 2880 * 4096 + 2880 + 64 + 2 * 2880)
EXPERT = 5760 * (1440 + 90 + 2) + 2880 * (1440 + 90 + 2)
ENDS = 2 * (201088 * 2880 + 2880 + 2880)  # LM head, final norm, one row of the embedding

CONFIGS = {
    "20b": GPT_OSS_20B,
    "120b": GPT_OSS_120B,
    "small": small_config(),
    "120b, FP8": replace(GPT_OSS_120B, dense=DenseFormats(FP8_ROWS, FP8_GROUPS, FP8_ROWS, FP8_GROUPS)),
}


def test_weights_of_120b_are_five_gigabytes():
    assert weight_bytes_per_token(GPT_OSS_120B) == 36 * (ATTENTION + 2 * (128 * 2880 + 128) + 4 * EXPERT) + ENDS
    assert weight_bytes_per_token(GPT_OSS_120B) == 5_002_907_904


def test_weights_of_20b():
    assert weight_bytes_per_token(GPT_OSS_20B) == 24 * (ATTENTION + 2 * (32 * 2880 + 32) + 4 * EXPERT) + ENDS
    assert weight_bytes_per_token(GPT_OSS_20B) == 3_708_089_088


@pytest.mark.parametrize(
    "context, positions",
    [
        (0, 0),
        (1, 36),
        (127, 36 * 127),
        (128, 18 * 127 + 18 * 128),
        (8192, 18 * 127 + 18 * 8192),
        (131072, 18 * 127 + 18 * 131072),
    ],
)
def test_kv_cache_of_120b(context, positions):
    """Keys and values take 1,024 bytes each at a position. A sliding layer sees 127 positions besides the token."""
    assert kv_bytes_per_token(GPT_OSS_120B, context) == positions * 2048


def test_a_token_reads_weights_and_cache():
    config = small_config()  # two sliding layers with window 20 and a full one; 2 KV heads of 64
    assert bytes_per_token(config, 30) - weight_bytes_per_token(config) == (19 + 30 + 19) * 2 * 128 * 2


DENSE_120B = {"qkv": 36 * 5120 * 2880, "o": 36 * 2880 * 4096, "router": 36 * 128 * 2880, "head": 201088 * 2880}
ROWS_120B = {"qkv": 36 * 5120, "o": 36 * 2880, "router": 36 * 128, "head": 201088}


@pytest.mark.parametrize("fields", [["qkv", "o", "head"], ["qkv"], ["o"], ["router"], ["head"], [*DENSE_120B]])
def test_weights_of_120b_in_fp8(fields):
    """An element takes one byte instead of two, plus a float32 for each row or a byte for each 32 elements."""
    saved = 5_002_907_904 - sum(DENSE_120B[field] for field in fields)
    rows = replace(GPT_OSS_120B, dense=DenseFormats(**dict.fromkeys(fields, FP8_ROWS)))
    assert weight_bytes_per_token(rows) == saved + 4 * sum(ROWS_120B[field] for field in fields)
    groups = replace(GPT_OSS_120B, dense=DenseFormats(**dict.fromkeys(fields, FP8_GROUPS)))
    assert weight_bytes_per_token(groups) == saved + sum(DENSE_120B[field] for field in fields) // 32


def test_120b_with_attention_and_head_in_fp8():
    """A token reads 3.5 GB instead of 5.0."""
    dense = DenseFormats(qkv=FP8_ROWS, o=FP8_ROWS, head=FP8_ROWS)
    assert weight_bytes_per_token(replace(GPT_OSS_120B, dense=dense)) == 3_470_215_936


def test_phases_of_120b():
    parts = dict(zip(phases_of_token(36), bytes_by_phase(GPT_OSS_120B, 8192)))
    assert parts[Phase("embedding", None)] == 2 * 2880
    assert parts[Phase("QKV", 7)] == 2 * (5120 * 2880 + 5120 + 2880)
    assert parts[Phase("attention", 0)] == 2 * 64 + 127 * 2048
    assert parts[Phase("attention", 35)] == 2 * 64 + 8192 * 2048
    assert parts[Phase("O projection", 35)] == 2 * (2880 * 4096 + 2880)
    assert parts[Phase("router", 0)] == 2 * (128 * 2880 + 128 + 2880)
    assert parts[Phase("gate-up", 20)] == 4 * 5760 * (1440 + 90 + 2)
    assert parts[Phase("down", 20)] == 4 * 2880 * (1440 + 90 + 2)
    assert parts[Phase("LM head", None)] == 2 * (201088 * 2880 + 2880)
    assert parts[Phase("argmax", None)] == 0


@pytest.mark.parametrize("context", [0, 1, 127, 128, 8192])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_phases_read_what_a_token_reads(config, context):
    assert sum(bytes_by_phase(config, context)) == bytes_per_token(config, context)
