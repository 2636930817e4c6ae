"""host.rope against transformers' own YaRN and against exact angles."""

import dataclasses
import math

import pytest
import torch
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from checkpoints.checkpoint import config_to_dict
from checkpoints.config import GPT_OSS_120B, ModelConfig, YarnConfig
from host.rope import inverse_frequencies, rope_tables

YARNS = {
    "published": YarnConfig(),
    "truncate": YarnConfig(truncate=True),
    "attention_factor": YarnConfig(attention_factor=0.75),
    "factor 1": YarnConfig(factor=1.0),
    "other numbers": YarnConfig(10000.0, 8.0, 512, 16.0, 2.0),
    "ramp that starts below 0": YarnConfig(theta=500.0, original_context=64),
}


def with_yarn(yarn: YarnConfig, head_dim: int = 64) -> ModelConfig:
    return dataclasses.replace(GPT_OSS_120B, yarn=yarn, head_dim=head_dim)


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("yarn", YARNS.values(), ids=YARNS)
def test_inverse_frequencies_are_those_of_transformers(yarn, head_dim):
    config = with_yarn(yarn, head_dim)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](GptOssConfig(**config_to_dict(config)), "cpu")
    # Same formula in float32, rounded in another order: a few units in the last place.
    torch.testing.assert_close(inverse_frequencies(config), expected, rtol=5e-7, atol=0)
    assert config.yarn.concentration == pytest.approx(factor, rel=1e-12)


def test_truncate_matters():
    assert not torch.equal(
        inverse_frequencies(with_yarn(YarnConfig())), inverse_frequencies(with_yarn(YARNS["truncate"]))
    )


@pytest.mark.parametrize("yarn", [YARNS["published"], YARNS["truncate"], YARNS["attention_factor"]])
def test_tables_are_those_of_transformers_up_to_the_last_position(yarn):
    config = with_yarn(yarn)
    positions = torch.tensor([0, 1, 2, 127, 128, 4095, 4096, 65537, 131071])
    rotary = GptOssRotaryEmbedding(GptOssConfig(**config_to_dict(config)))
    expected_cos, expected_sin = rotary(torch.zeros(1, 1, dtype=torch.float32), positions[None])
    cos, sin = rope_tables(config, 131072)
    assert cos.shape == sin.shape == (131072, 32)
    assert cos.dtype == sin.dtype == torch.float32
    # A frequency that differs in its last bit turns position 131071 by up to 131071 * 2^-24 = 0.008 rad, times 1.35.
    torch.testing.assert_close(cos[positions], expected_cos[0], rtol=0, atol=0.011)
    torch.testing.assert_close(sin[positions], expected_sin[0], rtol=0, atol=0.011)
    near = positions <= 128
    torch.testing.assert_close(cos[positions[near]], expected_cos[0, near], rtol=0, atol=2e-5)
    torch.testing.assert_close(sin[positions[near]], expected_sin[0, near], rtol=0, atol=2e-5)


def test_published_values_in_closed_form():
    """Dimension 0 keeps its frequency, dimension 31 is slowed 32 times, and dimension 12 lies on the ramp between."""
    frequencies = inverse_frequencies(GPT_OSS_120B).double()

    def end(turns: float) -> float:
        return 64 * math.log(4096 / (turns * 2 * math.pi)) / (2 * math.log(150000))

    low, high = end(32), end(1)
    assert (low, high) == (pytest.approx(8.0928, abs=1e-4), pytest.approx(17.3980, abs=1e-4))
    ramp = (12 - low) / (high - low)
    plain = 150000 ** (-24 / 64)
    assert frequencies[0] == 1.0
    assert frequencies[31].item() == pytest.approx(150000 ** (-62 / 64) / 32, rel=1e-6)
    assert frequencies[12].item() == pytest.approx(plain * (1 - ramp) + plain / 32 * ramp, rel=1e-6)


def test_a_short_table_is_the_start_of_a_long_one():
    for short, long in zip(rope_tables(GPT_OSS_120B, 5), rope_tables(GPT_OSS_120B, 500), strict=True):
        assert torch.equal(short, long[:5])
