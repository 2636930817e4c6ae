"""Everything about a launch that depends on the device: the one place to tune."""

from dataclasses import dataclass, replace

import torch

from host.config import ModelConfig
from host.errors import InputError


@dataclass(frozen=True)
class Tuning:
    """Compile-time constants of the kernel for one kind of device. Blocks are powers of two; M counts matrix rows.

    A block over K need not divide K: what lies beyond is masked.
    """

    arch: str  # "cuda", "hip", or "cpu" for Triton's interpreter
    programs_per_unit: int  # resident programs on each SM or CU
    num_warps: int
    qkv_m: int  # QKV rows per tile
    o_m: int  # O rows per tile
    dense_k: int
    router_m: int
    gate_up_m: int  # interleaved gate and up rows, two of which give one output; at least 64 with --quant
    down_m: int
    expert_k: int
    head_m: int
    head_k: int
    block_t: int  # cached positions per attention step
    split_t: int  # positions that a split has at least, a multiple of block_t
    max_splits: int  # splits grow beyond split_t so that there are never more
    dot_scaled: bool  # FP4 x FP8 on matrix cores instead of float32 products of the same numbers
    spin_limit: int  # polls before a barrier gives up: seconds on a GPU


# 240 of 256 CUs: barriers get cheaper with fewer programs, and one launch must stay resident. The blocks follow what
# is known to suit the chip; nothing here was run on one.
GFX950 = Tuning(
    arch="hip",
    programs_per_unit=1,
    num_warps=8,
    qkv_m=8,
    o_m=8,
    dense_k=1024,
    router_m=1,
    gate_up_m=64,
    down_m=16,
    expert_k=256,  # the widest without spills, and at least the 128 of a scaled MFMA
    head_m=16,
    head_k=1024,
    block_t=32,
    split_t=256,
    max_splits=64,
    dot_scaled=True,
    spin_limit=1 << 24,
)
SM_90 = Tuning(
    arch="cuda",
    programs_per_unit=2,
    num_warps=4,  # two programs of four: gate-up 38 us, down 28; one of eight: 56 and 124
    qkv_m=4,
    o_m=8,
    dense_k=4096,  # whole rows: QKV 10.4 us against 15.8 at 1024, O 8.5 against 10.3
    router_m=1,
    gate_up_m=32,  # 4.22 ms a token against 5.57 at 64: 360 tiles on 264 programs take two rounds, 720 take 3 halves
    down_m=16,
    expert_k=1024,
    head_m=8,
    head_k=4096,
    block_t=32,  # at 64 the attention phase spills
    split_t=32,  # a window of 128 on 32 programs instead of 8: 4.06 ms a token against 4.24
    max_splits=64,
    dot_scaled=False,
    spin_limit=1 << 24,
)

# The interpreter pays about 20 us an operation whatever its size, so its blocks are as large as memory allows.
_CPU_BLOCK = 1 << 20
MOST_INTERPRETED_PROGRAMS = 1024  # each is a thread


def tuning_for(device: torch.device, config: ModelConfig) -> Tuning:
    """The tuning of a device: the architecture's, or for a CPU one that swallows a matrix in few tiles."""
    if device.type == "cpu":
        return _cpu_tuning(config)
    return GFX950 if torch.version.hip else SM_90


def program_count(device: torch.device, tuning: Tuning) -> int:
    """Programs that are resident together: the barrier needs all of them running."""
    if device.type == "cpu":
        return 1
    units = torch.cuda.get_device_properties(device).multi_processor_count
    if tuning.arch == "hip":
        units -= units // 16
    return units * tuning.programs_per_unit


def check_program_count(num_programs: int, device: torch.device, tuning: Tuning) -> None:
    """InputError unless so many programs can run together."""
    most = MOST_INTERPRETED_PROGRAMS if device.type == "cpu" else program_count(device, tuning)
    if not 1 <= num_programs <= most:
        raise InputError(f"--num-programs {num_programs}: {device} runs 1 to {most} together")


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _cpu_tuning(config: ModelConfig) -> Tuning:
    def rows(n_rows: int, block_k: int, least: int = 1) -> int:
        return max(least, min(next_power_of_2(n_rows), _CPU_BLOCK // block_k))

    dense_k = next_power_of_2(max(config.hidden_size, config.q_size))
    head_k = next_power_of_2(config.hidden_size)
    expert_k = max(128, next_power_of_2(max(config.hidden_size, config.intermediate_size)))
    return Tuning(
        arch="cpu",
        programs_per_unit=1,
        num_warps=1,
        qkv_m=rows(config.qkv_size, dense_k),
        o_m=rows(config.hidden_size, dense_k),
        dense_k=dense_k,
        router_m=rows(config.n_experts, head_k),
        gate_up_m=rows(2 * config.intermediate_size, expert_k),
        down_m=rows(config.hidden_size, expert_k, least=16),
        expert_k=expert_k,
        head_m=rows(config.vocab_size, head_k),
        head_k=head_k,
        block_t=256,
        split_t=4096,
        max_splits=64,
        dot_scaled=True,
        spin_limit=1 << 14,
    )


def with_small_tiles(tuning: Tuning) -> Tuning:
    """The same device with tiles so small that every phase of a small model has several: for tests of the striping."""
    return replace(
        tuning,
        qkv_m=16,
        o_m=16,
        dense_k=128,
        router_m=2,
        gate_up_m=64,
        down_m=16,
        expert_k=128,
        head_m=16,
        head_k=128,
        block_t=16,
        split_t=32,
        max_splits=4,
    )
