"""The launch table: everything about a launch that depends on the device, in one place to tune."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton

from checkpoints.config import MXFP4_GROUP, ModelConfig
from common import cpu, gfx950, sm90
from common.gemv_dense import item_bytes, row_scale_bytes
from common.sm90.gemv import row_threads
from common.sm90.tiles import stage_bytes as expert_stage_bytes
from host.devices import launch_row
from host.tuning import (
    MAX_BLOCK_TOKENS,
    AttentionTuning,
    BlockTuning,
    DenseTuning,
    ExpertTuning,
    RingTuning,
    Tile,
    Tuning,
)
from system.errors import InputError

MIN_STAGES = 2  # of a ring: one is read while another is filled
H200_UNITS = 132


# 240 of 256 CUs: barriers get cheaper with fewer programs, and one launch must stay resident. The block sizes follow
# what is known to suit the chip; nothing here was run on one. Without layers_alone the kernel spills 58 vector
# registers (43 with --quant), with it none. Scales load 1 or 2 bytes at a time: a tile of 16 rows has 512 of them in a
# block over K, one for each of 512 threads, and rows of 90 are aligned to 2.
GFX950 = Tuning(
    machine=gfx950.GFX950,
    programs_per_unit=1,
    used_units=15,
    num_warps=8,
    max_registers=None,
    layers_alone=True,
    spin_limit=1 << 24,
    dense=DenseTuning(
        qkv_rows=8, o_rows=8, router_rows=1, head_rows=16, k_block=1024, step_tiles=1, threads_per_row=128
    ),
    experts=ExpertTuning(
        norm_block=512,
        gate_up_rows=32,
        gate_up_k=1024,
        down_rows=16,
        down_k=1024,
        step_tiles=1,
        dot_scaled=True,
    ),
    attention=AttentionTuning(
        head_keys=512,
        head_step_keys=64,
        rows_per_load=32,
        step_keys=16,
        partial_softmaxes=1,
        bf16x3=False,
        stages=1,
        min_split_keys=256,
        max_splits=32,
    ),
)
# One program of eight warps per SM, whose weights come through a ring of seven stages of 25 KB. The tiles suit 120b and
# 20b; fit_ring chooses them for other sizes. Only five tiles are prefetched although more would fit, as outstanding
# requests delay the later ones: docs/performance.md has the measurements.
SM_90 = Tuning(
    machine=sm90.SM_90,
    programs_per_unit=1,
    num_warps=8,
    max_registers=None,
    layers_alone=True,
    spin_limit=1 << 24,
    dense=DenseTuning(
        qkv_rows=4, o_rows=2, router_rows=1, head_rows=4, k_block=4096, step_tiles=16, threads_per_row=128
    ),
    experts=ExpertTuning(
        norm_block=128,
        gate_up_rows=16,
        gate_up_k=0,
        down_rows=16,
        down_k=0,
        step_tiles=16,
        dot_scaled=False,
    ),
    attention=AttentionTuning(
        head_keys=512,
        head_step_keys=64,
        rows_per_load=32,
        step_keys=128,
        partial_softmaxes=8,  # 4 and steps of 64 took 4.06 ms instead of 3.34 at 130,816
        bf16x3=True,
        stages=2,
        min_split_keys=128,
        max_splits=16,  # of 8 KV heads, see fit_splits
    ),
    ring=RingTuning(stages=7, stage_bytes=25600, column_bytes=8, prefetch_distance=5, prefetch_qkv=2),
    is_cooperative=True,
)


# 168 and 96 registers let three and five programs share an SM: gate-up of 1,023 tokens takes 500 us for 566, down of
# 127 tokens 167 for 182.
_EXPERTS_SM_90 = (
    Tile(128, 16, 128, 4, 3, max_registers=96),
    Tile(128, 16, 128, 4, 3, extra_tokens=16),
    Tile(128, 32, 128, 4, 3, max_registers=168, extra_tokens=16),
    Tile(128, 64, 128, 4, 3, extra_tokens=32),
)
BLOCKS_SM_90 = BlockTuning(
    tokens=MAX_BLOCK_TOKENS,
    min_tokens=4,
    dense=(
        Tile(64, 32, 64, 4, 4),
        Tile(64, 64, 64, 4, 4, min_programs=132),
        Tile(128, 64, 64, 8, 4, min_programs=132),
        Tile(128, 128, 64, 8, 3, min_programs=192),
    ),
    gate_up=_EXPERTS_SM_90,
    down=_EXPERTS_SM_90,
    norm_warps=4,
    attention_m=64,
    attention_t=64,
    attention_warps=4,
    attention_stages=2,
    router_n=16,
    router_k=128,
    router_warps=4,
    router_stages=3,
    grouping=1024,
)
BLOCKS_GFX950 = BlockTuning(
    tokens=MAX_BLOCK_TOKENS,
    min_tokens=4,
    dense=(
        Tile(64, 32, 64, 4, 2),
        Tile(64, 64, 64, 4, 2, min_programs=256),
        Tile(128, 128, 64, 8, 2, min_programs=256),
    ),
    gate_up=(Tile(128, 16, 128, 4, 2), Tile(128, 32, 128, 4, 2), Tile(128, 64, 128, 8, 2)),
    down=(Tile(128, 16, 128, 4, 2), Tile(128, 32, 128, 4, 2), Tile(128, 64, 128, 8, 2)),
    norm_warps=4,
    attention_m=128,
    attention_t=64,
    attention_warps=4,
    attention_stages=1,
    router_n=16,
    router_k=128,
    router_warps=4,
    router_stages=2,
    grouping=1024,
)
# The interpreter pays about 20 us per operation whatever its size, so tiles are as large as memory allows.
BLOCKS_CPU = BlockTuning(
    tokens=512,
    min_tokens=3,
    dense=(Tile(512, 64, 512),),
    gate_up=(Tile(512, 32, 512),),
    down=(Tile(512, 32, 512),),
    norm_warps=4,
    attention_m=128,
    attention_t=128,
    attention_warps=4,
    attention_stages=1,
    router_n=64,
    router_k=512,
    router_warps=4,
    router_stages=1,
    grouping=4096,
)


_MAX_CPU_BLOCK = 1 << 20  # elements that the interpreter loads in one operation; see BLOCKS_CPU
MAX_INTERPRETED_PROGRAMS = 1024  # each is a thread


def fit_ring(tuning: Tuning, config: ModelConfig) -> Tuning:
    """Return the tuning with the tiles and stages of its ring fitted to a model's sizes.

    Raise InputError if shared memory cannot hold MIN_STAGES stages.
    """
    formats, hidden, ring = config.dense, config.hidden_size, tuning.ring

    def tile_rows(k: int, dense_format: str) -> int:
        min_rows = 32 * tuning.num_warps // row_threads(k, dense_format, tuning.dense)  # leaves no thread idle
        rows = ring.column_bytes // item_bytes(dense_format)
        while rows > min_rows and rows * _row_bytes(k, dense_format) > ring.stage_bytes:
            rows //= 2
        return rows

    matrices = {
        "qkv_rows": (hidden, formats.qkv),
        "o_rows": (config.q_size, formats.o),
        "head_rows": (hidden, formats.head),
    }
    rows = {name: tile_rows(*matrix) for name, matrix in matrices.items()}
    tile_bytes = [rows[name] * _row_bytes(*matrix) for name, matrix in matrices.items()]
    tile_bytes += [expert_stage_bytes(k, tuning.num_warps) for k in (hidden, config.intermediate_size)]
    stage_bytes = -(-max(tile_bytes) // 128) * 128
    stages, attention = ring.stages, tuning.attention
    if stage_bytes > ring.stage_bytes:
        # Attention in steps half as long leaves room for one more stage of the tuning's size.
        stages = min(stages, (stages + 1) * ring.stage_bytes // stage_bytes)
        partials = attention.partial_softmaxes // 2
        attention = replace(attention, step_keys=attention.step_keys // 2, partial_softmaxes=partials)
    if stages < MIN_STAGES:
        raise InputError(f"a tile of this model's weights takes {stage_bytes} bytes of shared memory: too much")
    ring = replace(ring.with_stages(stages), stage_bytes=stage_bytes)
    if (
        -(-2 * config.intermediate_size // tuning.experts.gate_up_rows) * config.experts_per_token
        <= stages * H200_UNITS
    ):
        # No tile waits for another of its phase: two GPUs that share 120b took 1.386 ms for 1.402.
        ring = replace(ring, prefetch_distance=stages)
    return replace(tuning, dense=replace(tuning.dense, **rows), attention=attention, ring=ring)


def fit_splits(tuning: Tuning, config: ModelConfig) -> Tuning:
    """Return the tuning with so many splits that those of all KV heads are about one per program of an H200.

    With 8 KV heads, twice as many took 2.104 ms for 2.070 at a context of 8,192.
    """
    splits = 8 * tuning.attention.max_splits // min(8, config.n_kv_heads)
    return replace(tuning, attention=replace(tuning.attention, max_splits=splits))


def with_shorter_ring(tuning: Tuning, missing_bytes: int, device: torch.device) -> Tuning:
    """Return the tuning with a ring that takes at least missing_bytes less of shared memory.

    Raise InputError if fewer than MIN_STAGES stages, or no ring at all, would be left.
    """
    ring = tuning.ring
    stages = ring.stages - -(-missing_bytes // ring.stage_bytes) if ring else 0
    if stages < MIN_STAGES:
        raise InputError(f"{device} has too little shared memory for this model")
    return replace(tuning, ring=ring.with_stages(stages))


def _row_bytes(k: int, dense_format: str) -> int:
    """Return the bytes that a row and its scales take in the ring."""
    return k * item_bytes(dense_format) + row_scale_bytes(k, dense_format)


def program_count(device: torch.device, tuning: Tuning) -> int:
    """Return how many programs a device keeps resident together; the barrier needs all of them running."""
    if device.type == "cpu":
        return 1
    return programs_on(torch.cuda.get_device_properties(device).multi_processor_count, tuning)


def programs_on(units: int, tuning: Tuning) -> int:
    """Return how many programs a GPU with `units` SMs or CUs keeps resident together."""
    return -(-units * tuning.used_units // 16) * tuning.programs_per_unit


def check_program_count(num_programs: int, device: torch.device, tuning: Tuning) -> None:
    """Raise InputError unless `num_programs` programs can run together on the device."""
    limit = MAX_INTERPRETED_PROGRAMS if device.type == "cpu" else program_count(device, tuning)
    if not 1 <= num_programs <= limit:
        raise InputError(f"--num-programs {num_programs}: {device} runs 1 to {limit} together")


def _cpu_tuning(config: ModelConfig) -> Tuning:
    def tile_rows(n_rows: int, block_k: int, minimum: int = 1) -> int:
        return max(minimum, min(triton.next_power_of_2(n_rows), _MAX_CPU_BLOCK // block_k))

    dense_k = triton.next_power_of_2(max(config.hidden_size, config.q_size))
    expert_k = max(128, triton.next_power_of_2(max(config.hidden_size, config.intermediate_size)))
    return Tuning(
        machine=cpu.CPU,
        programs_per_unit=1,
        num_warps=1,
        max_registers=None,
        layers_alone=False,
        spin_limit=1 << 14,
        dense=DenseTuning(
            qkv_rows=tile_rows(config.qkv_size, dense_k),
            o_rows=tile_rows(config.hidden_size, dense_k),
            router_rows=tile_rows(config.n_experts, dense_k),
            head_rows=tile_rows(config.vocab_size, dense_k),
            k_block=dense_k,
            step_tiles=1,
            threads_per_row=128,
        ),
        experts=ExpertTuning(
            norm_block=max(MXFP4_GROUP, triton.next_power_of_2(config.hidden_size)),
            gate_up_rows=tile_rows(2 * config.intermediate_size, expert_k),
            gate_up_k=expert_k,
            down_rows=tile_rows(config.hidden_size, expert_k, minimum=16),
            down_k=expert_k,
            step_tiles=1,
            dot_scaled=True,
        ),
        attention=AttentionTuning(
            head_keys=-1,
            head_step_keys=256,
            rows_per_load=1,
            step_keys=256,
            partial_softmaxes=1,
            bf16x3=False,
            stages=1,
            min_split_keys=4096,
            max_splits=64,
        ),
    )


@dataclass(frozen=True)
class LaunchRow:
    """A row of the launch table: the launch parameters of one kind of device."""

    tuning: Callable[[ModelConfig], Tuning]  # gives those of the decoding kernel for a model's sizes
    blocks: BlockTuning  # those of a prompt's kernels


LAUNCH_TABLE = {
    "sm_90": LaunchRow(lambda config: fit_splits(fit_ring(SM_90, config), config), BLOCKS_SM_90),
    "gfx950": LaunchRow(lambda config: GFX950, BLOCKS_GFX950),
    "cpu": LaunchRow(_cpu_tuning, BLOCKS_CPU),
}


def tuning_for(device: torch.device, config: ModelConfig) -> Tuning:
    """Return the decoding kernel's launch parameters for a device and a model's sizes.

    Raise InputError if the launch table has no row for the device, or a tile of the model does not fit its ring.
    """
    return LAUNCH_TABLE[launch_row(device)].tuning(config)


def blocks_for(device: torch.device) -> BlockTuning:
    """Return the launch parameters of a prompt's kernels for a device. Raise InputError if the table has no row."""
    return LAUNCH_TABLE[launch_row(device)].blocks


def with_small_tiles(tuning: Tuning) -> Tuning:
    """Return the tuning with tiles so small that each phase of a small model has several; used by tests."""
    return replace(
        tuning,
        dense=replace(tuning.dense, qkv_rows=16, o_rows=16, router_rows=2, head_rows=16, k_block=128),
        experts=replace(tuning.experts, norm_block=32, gate_up_rows=64, gate_up_k=128, down_rows=16, down_k=128),
        attention=replace(
            tuning.attention,
            head_keys=20,
            head_step_keys=16,
            rows_per_load=8,
            step_keys=16,
            min_split_keys=32,
            max_splits=4,
        ),
    )
