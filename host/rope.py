"""Compute the YaRN rotary tables once on the host; every step reads them."""

import math

import torch

from checkpoints.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> torch.Tensor:
    """Return float32 [head_dim / 2], in radians per position (YaRN, arXiv:2309.00071, section 3.2).

    Dimensions that turn more than beta_fast times over the original context keep their frequency, those that turn
    less than beta_slow times are slowed by `factor`, and a linear ramp connects the two. `truncate` floors and ceils
    the ramp's ends; GPT-OSS does not set it. If the original context is so short or so long that the ends swap places,
    the ramp falls instead of rising, as in transformers.
    """
    yarn, dim = config.yarn, config.head_dim
    base = yarn.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)

    def dimension_that_turns(times: float) -> float:
        return dim * math.log(yarn.original_context / (times * 2 * math.pi)) / (2 * math.log(yarn.theta))

    low, high = dimension_that_turns(yarn.beta_fast), dimension_that_turns(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 1e-3
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return (1.0 / base) * (1 - ramp) + (1.0 / (yarn.factor * base)) * ramp


def rope_tables(
    config: ModelConfig, n_positions: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin, each float32 [n_positions, head_dim / 2] and multiplied by YaRN's concentration.

    The angle is a float32 product, as in the published code. At position 131071 it differs from the exact one by up to
    0.004 rad, but a model must run with the angles that it was trained with.
    """
    positions = torch.arange(n_positions, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies(config)).to(device)
    return angles.cos() * config.yarn.concentration, angles.sin() * config.yarn.concentration
