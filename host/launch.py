"""Everything about a launch that depends on the device: the one place to tune."""

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
    MOST_BLOCK_TOKENS,
    AttentionTuning,
    BlockTuning,
    DenseTuning,
    ExpertTuning,
    RingTuning,
    Tile,
    Tuning,
)
from system.errors import InputError

LEAST_STAGES = 2  # of a ring: one is read while another is filled


# 240 of 256 CUs: barriers get cheaper with fewer programs, and one launch must stay resident. The blocks follow what
# is known to suit the chip; nothing here was run on one. Without layers_alone they spill 58 vector registers (43 with
# --quant), with it none. Scales load 1 or 2 bytes at a time: a tile of 16 rows has 512 of them in a block over K, one
# for each of 512 threads, and rows of 90 are aligned to 2.
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
        head_block_t=64,
        head_slots=32,
        block_t=16,
        parts=1,
        bf16_parts=False,
        stages=1,
        split_t=256,
        max_splits=32,
    ),
)
# One program of eight warps an SM, whose weights come through a ring of seven stages of 25 KB. For 120b and 20b: other
# sizes get other tiles, see fit_ring. Five tiles ahead rather than all that fit, as what has been asked for holds up
# what comes after it: docs/performance.md has the measurements.
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
        head_block_t=64,
        head_slots=32,
        block_t=128,
        parts=8,  # 4 parts of a step of 64 took 4.06 ms for 3.34 at 130,816
        bf16_parts=True,
        stages=2,
        split_t=128,
        max_splits=16,  # times 8 KV heads: one for nearly each of 132 programs; 32 took 2.104 ms for 2.070 at 8,192
    ),
    ring=RingTuning(stages=7, stage_bytes=25600, prefetch_distance=5, prefetch_qkv=2),
    is_cooperative=True,
)


# 168 and 96 registers let three and five programs share an SM: gate-up of 1,023 tokens takes 500 us for 566, down of
# 127 tokens 167 for 182.
_EXPERTS_SM_90 = (
    Tile(128, 16, 128, 4, 3, max_registers=96),
    Tile(128, 16, 128, 4, 3, more=16),
    Tile(128, 32, 128, 4, 3, max_registers=168, more=16),
    Tile(128, 64, 128, 4, 3, more=32),
)
BLOCKS_SM_90 = BlockTuning(
    tokens=MOST_BLOCK_TOKENS,
    least_tokens=4,
    dense=(
        Tile(64, 32, 64, 4, 4),
        Tile(64, 64, 64, 4, 4, least_programs=132),
        Tile(128, 64, 64, 8, 4, least_programs=132),
        Tile(128, 128, 64, 8, 3, least_programs=192),
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
    tokens=MOST_BLOCK_TOKENS,
    least_tokens=4,
    dense=(
        Tile(64, 32, 64, 4, 2),
        Tile(64, 64, 64, 4, 2, least_programs=256),
        Tile(128, 128, 64, 8, 2, least_programs=256),
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
# Large, as an operation of the interpreter takes 20 us whatever its size.
BLOCKS_CPU = BlockTuning(
    tokens=512,
    least_tokens=3,
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


# The interpreter pays about 20 us an operation whatever its size, so its blocks are as large as memory allows.
_CPU_BLOCK = 1 << 20
MOST_INTERPRETED_PROGRAMS = 1024  # each is a thread


def fit_ring(tuning: Tuning, config: ModelConfig) -> Tuning:
    """The tuning with tiles and stages that suit a model's sizes. InputError if two stages take more than there is."""
    formats, hidden, usual = config.dense, config.hidden_size, tuning.ring

    def rows(k: int, dense_format: str) -> int:
        least = 32 * tuning.num_warps // row_threads(k, dense_format, tuning.dense)  # each thread has some
        m = 8 // item_bytes(dense_format)
        while m > least and m * _row_bytes(k, dense_format) > usual.stage_bytes:
            m //= 2
        return m

    tiles = {
        "qkv_rows": (hidden, formats.qkv),
        "o_rows": (config.q_size, formats.o),
        "head_rows": (hidden, formats.head),
    }
    heights = {name: rows(*matrix) for name, matrix in tiles.items()}
    needed = [heights[name] * _row_bytes(*matrix) for name, matrix in tiles.items()]
    needed += [expert_stage_bytes(k, tuning.num_warps) for k in (hidden, config.intermediate_size)]
    stage_bytes = -(-max(needed) // 128) * 128
    stages, attention = usual.stages, tuning.attention
    if stage_bytes > usual.stage_bytes:
        # Attention in steps half as long leaves room for one more of the usual stages.
        stages = min(stages, (stages + 1) * usual.stage_bytes // stage_bytes)
        attention = replace(attention, block_t=attention.block_t // 2, parts=attention.parts // 2)
    if stages < LEAST_STAGES:
        raise InputError(f"a tile of this model's weights takes {stage_bytes} bytes of shared memory: too much")
    distance = min(usual.prefetch_distance, stages)
    ring = replace(usual, stages=stages, stage_bytes=stage_bytes, prefetch_distance=distance)
    return replace(tuning, dense=replace(tuning.dense, **heights), attention=attention, ring=ring)


def _row_bytes(k: int, dense_format: str) -> int:
    """Bytes of a row in the ring, with its scales."""
    return k * item_bytes(dense_format) + row_scale_bytes(k, dense_format)


def program_count(device: torch.device, tuning: Tuning) -> int:
    """Programs that are resident together: the barrier needs all of them running."""
    if device.type == "cpu":
        return 1
    return programs_on(torch.cuda.get_device_properties(device).multi_processor_count, tuning)


def programs_on(units: int, tuning: Tuning) -> int:
    """Programs that are resident together on a GPU of so many SMs or CUs."""
    return -(-units * tuning.used_units // 16) * tuning.programs_per_unit


def check_program_count(num_programs: int, device: torch.device, tuning: Tuning) -> None:
    """InputError unless so many programs can run together."""
    most = MOST_INTERPRETED_PROGRAMS if device.type == "cpu" else program_count(device, tuning)
    if not 1 <= num_programs <= most:
        raise InputError(f"--num-programs {num_programs}: {device} runs 1 to {most} together")


def _cpu_tuning(config: ModelConfig) -> Tuning:
    def rows(n_rows: int, block_k: int, least: int = 1) -> int:
        return max(least, min(triton.next_power_of_2(n_rows), _CPU_BLOCK // block_k))

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
            qkv_rows=rows(config.qkv_size, dense_k),
            o_rows=rows(config.hidden_size, dense_k),
            router_rows=rows(config.n_experts, dense_k),
            head_rows=rows(config.vocab_size, dense_k),
            k_block=dense_k,
            step_tiles=1,
            threads_per_row=128,
        ),
        experts=ExpertTuning(
            norm_block=max(MXFP4_GROUP, triton.next_power_of_2(config.hidden_size)),
            gate_up_rows=rows(2 * config.intermediate_size, expert_k),
            gate_up_k=expert_k,
            down_rows=rows(config.hidden_size, expert_k, least=16),
            down_k=expert_k,
            step_tiles=1,
            dot_scaled=True,
        ),
        attention=AttentionTuning(
            head_keys=-1,
            head_block_t=256,
            head_slots=1,
            block_t=256,
            parts=1,
            bf16_parts=False,
            stages=1,
            split_t=4096,
            max_splits=64,
        ),
    )


@dataclass(frozen=True)
class Row:
    """What a kind of device is launched with."""

    tuning: Callable[[ModelConfig], Tuning]  # of the decoding kernel, for a model's sizes
    blocks: BlockTuning  # of a prompt's kernels


LAUNCH_TABLE = {
    "sm_90": Row(lambda config: fit_ring(SM_90, config), BLOCKS_SM_90),
    "gfx950": Row(lambda config: GFX950, BLOCKS_GFX950),
    "cpu": Row(_cpu_tuning, BLOCKS_CPU),
}


def tuning_for(device: torch.device, config: ModelConfig) -> Tuning:
    """What the decoding kernel is launched with on a device. InputError if the launch table has no row for it."""
    return LAUNCH_TABLE[launch_row(device)].tuning(config)


def blocks_for(device: torch.device) -> BlockTuning:
    """What a prompt's kernels are launched with on a device. InputError if the launch table has no row for it."""
    return LAUNCH_TABLE[launch_row(device)].blocks


def with_small_tiles(tuning: Tuning) -> Tuning:
    """The same device with tiles so small that every phase of a small model has several: for tests of the striping."""
    return replace(
        tuning,
        dense=replace(tuning.dense, qkv_rows=16, o_rows=16, router_rows=2, head_rows=16, k_block=128),
        experts=replace(tuning.experts, norm_block=32, gate_up_rows=64, gate_up_k=128, down_rows=16, down_k=128),
        attention=replace(
            tuning.attention, head_keys=20, head_block_t=16, head_slots=8, block_t=16, split_t=32, max_splits=4
        ),
    )
