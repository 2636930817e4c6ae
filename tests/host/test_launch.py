"""host.launch.fit_ring: tiles and stages of the ring for the sizes of a model."""

from dataclasses import replace

import pytest
import torch
from made_up_models import ODD_SIZES, small_config
from tunings import changed

from checkpoints.config import GPT_OSS_20B, GPT_OSS_120B, ModelConfig
from common.sm90.ring import BARRIER_BYTES
from host.launch import LAUNCH_TABLE, MIN_STAGES, SM_90, fit_ring, tuning_for
from host.tuning import Tuning
from multi_gpu.protocol import shares_of
from system.errors import InputError

RING_BYTES = 8 * 25600


def sized(**changes) -> ModelConfig:
    return replace(GPT_OSS_120B, **changes)


CONFIGS = {
    "120b": GPT_OSS_120B,
    "20b": GPT_OSS_20B,
    **{f"hidden {n}": sized(hidden_size=n) for n in [3200, 3232, 6400, 12032]},
    **{f"intermediate {n}": sized(intermediate_size=n) for n in [32, 2912, 3072, 12032]},
    **{f"{n} heads": sized(n_heads=n) for n in [8, 48, 56, 128, 400]},
    **{name: small_config(**changes) for name, changes in ODD_SIZES.items()},
}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def bytes_of_tiles(config: ModelConfig, tuning: Tuning) -> dict[str, int]:
    """Return the bytes that a stage needs for each kind of tile: those it holds or those its threads read, if more."""

    def expert(k: int) -> int:
        quads, steps = -(-k // 128), -(-k // (128 * tuning.num_warps))
        scales = (
            (steps + steps % 2) * tuning.num_warps * 4 * 16
        )  # a byte for each row and group of whole pairs of steps
        return max(16 * 128 // 2 * quads + scales, 16 * 128 // 2 * steps * tuning.num_warps)

    return {
        "QKV": tuning.dense.qkv_rows * config.hidden_size * 2,
        "O": tuning.dense.o_rows * config.q_size * 2,
        "gate-up": expert(config.hidden_size),
        "down": expert(config.intermediate_size),
        "LM head": tuning.dense.head_rows * config.hidden_size * 2,
    }


@pytest.mark.parametrize("config", [GPT_OSS_120B, GPT_OSS_20B], ids=["120b", "20b"])
def test_the_published_models_have_the_tuned_ring(config):
    tuning = fit_ring(SM_90, config)
    assert tuning == SM_90
    assert (tuning.dense.qkv_rows, tuning.dense.o_rows, tuning.dense.head_rows) == (4, 2, 4)
    assert (tuning.ring.stages, tuning.ring.stage_bytes, tuning.ring.prefetch_distance) == (7, 25600, 5)


@each_config
def test_a_stage_holds_every_tile(config):
    """A stage has no byte more than the largest tile needs, and there are as many stages as fit."""
    tuning = fit_ring(SM_90, config)
    most = max(bytes_of_tiles(config, tuning).values())
    assert most <= tuning.ring.stage_bytes < most + 128
    assert tuning.ring.stage_bytes % 128 == 0
    assert MIN_STAGES <= tuning.ring.stages == min(7, RING_BYTES // tuning.ring.stage_bytes)
    n_tiles = config.experts_per_token * config.intermediate_size // 8  # of gate-up
    asked = tuning.ring.stages if n_tiles <= 132 * tuning.ring.stages else 5
    assert tuning.ring.prefetch_distance == min(asked, tuning.ring.stages)
    assert tuning.ring.stages * 8 <= BARRIER_BYTES.value


@pytest.mark.parametrize("n_ranks, prefetch_distance, max_splits", [(1, 5, 16), (2, 7, 32), (4, 7, 64), (8, 7, 128)])
def test_a_share_of_120b_is_asked_for_and_attended_by_all_programs(n_ranks, prefetch_distance, max_splits):
    """A program has 11 tiles of gate-up, 6, 3 or 2; a long cache is cut into 128 splits over all KV heads."""
    share = shares_of(GPT_OSS_120B, "tp", n_ranks)[0]
    tuning = LAUNCH_TABLE["sm_90"].tuning(share.config_of(GPT_OSS_120B))
    assert (tuning.ring.prefetch_distance, tuning.attention.max_splits) == (prefetch_distance, max_splits)


@each_config
def test_all_threads_have_rows_of_a_dense_tile(config):
    """Two sets of threads share a tile's rows evenly; only the ring and these rows depend on the model."""
    tuning = fit_ring(SM_90, config)
    assert {tuning.dense.qkv_rows, tuning.dense.o_rows, tuning.dense.head_rows} <= {2, 4}
    wide = tuning.ring.stage_bytes > SM_90.ring.stage_bytes  # then attention's steps are half as long
    assert (tuning.attention.step_keys, tuning.attention.partial_softmaxes) == ((64, 4) if wide else (128, 8))
    usual = dict(
        dense=dict(qkv_rows=4, o_rows=2, head_rows=4),
        ring=dict(stages=7, stage_bytes=25600, prefetch_distance=5),
        attention=dict(step_keys=128, partial_softmaxes=8),
    )
    assert changed(tuning, **usual) == SM_90


@pytest.mark.parametrize(
    "changes, rows, stages",
    [
        (dict(hidden_size=3200, intermediate_size=2880), (4, 2, 4), 6),  # experts of 25 quads, 32 of which are read
        (dict(hidden_size=3232, intermediate_size=32), (2, 2, 2), 6),
        (dict(hidden_size=1600, n_heads=50), (4, 4, 4), 7),
        (dict(n_heads=51), (4, 2, 4), 7),
        (dict(hidden_size=6400, intermediate_size=5120), (2, 2, 2), 3),
        (dict(n_heads=128), (4, 2, 4), 6),
        (dict(hidden_size=12032), (2, 2, 2), 2),
    ],
)
def test_wide_models_get_fewer_rows_and_fewer_stages(changes, rows, stages):
    tuning = fit_ring(SM_90, sized(**changes))
    assert (tuning.dense.qkv_rows, tuning.dense.o_rows, tuning.dense.head_rows) == rows
    assert tuning.ring.stages == stages


@pytest.mark.parametrize(
    "changes, needed",
    [
        (dict(hidden_size=12064), 95 * 1024 + 6 * 1024),
        (dict(intermediate_size=12064), 95 * 1024 + 6 * 1024),
        (dict(n_heads=408), 408 * 64 * 2 * 2),
        (dict(hidden_size=1 << 20), (1 << 20) // 2 * 16 + (1 << 20) // 32 * 16),
    ],
)
def test_two_stages_that_do_not_fit_are_one_clear_line(changes, needed):
    with pytest.raises(InputError) as error:
        fit_ring(SM_90, sized(**changes))
    message = str(error.value)
    assert f" {needed} bytes of shared memory" in message
    assert "\n" not in message


def test_a_cpu_has_no_ring():
    assert tuning_for(torch.device("cpu"), GPT_OSS_120B).ring is None
