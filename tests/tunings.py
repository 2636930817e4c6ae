"""Tunings under which a small model has several tiles in each phase, one tuning in the manner of each machine."""

import dataclasses

import torch

from checkpoints.config import ModelConfig
from common.gfx950 import GFX950
from common.sm90 import SM_90
from host.launch import tuning_for, with_small_tiles
from host.tuning import RingTuning, Tuning


def changed(tuning: Tuning, **subjects) -> Tuning:
    """Return a tuning with other values: changed(tuning, num_warps=2, attention=dict(min_split_keys=16))."""
    values = {
        name: dataclasses.replace(getattr(tuning, name), **value) if isinstance(value, dict) else value
        for name, value in subjects.items()
    }
    return dataclasses.replace(tuning, **values)


def small_tiles(config: ModelConfig, **changes) -> Tuning:
    """Return the CPU's tuning with several tiles in every phase of a small model. Changes: see `changed`."""
    return changed(with_small_tiles(tuning_for(torch.device("cpu"), config)), **changes)


def ahead_tiles(config: ModelConfig, **changes) -> Tuning:
    """Return small tiles of dense matrices that are loaded one ahead, as on gfx950."""
    return small_tiles(config, **({"machine": GFX950} | changes))


def ring_tiles(config: ModelConfig, **changes) -> Tuning:
    """Return small tiles through a ring, experts packed for the tensor cores of two warps, as on sm_90."""
    streamed = small_tiles(
        config,
        machine=SM_90,
        num_warps=2,
        dense=dict(qkv_rows=16, o_rows=4, head_rows=16, threads_per_row=32, step_tiles=4),
        experts=dict(gate_up_rows=16, down_rows=16, step_tiles=4, dot_scaled=False),
        ring=RingTuning(stages=3, stage_bytes=1 << 15, column_bytes=8, prefetch_distance=2, prefetch_qkv=0),
    )
    return changed(streamed, **changes)
