"""Everything about a launch that depends on the device: the one place to tune."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

from common import cpu, gfx950, sm90
from common.gemv_dense import item_bytes, row_scale_bytes
from common.machine import Machine
from common.sm90.gemv import row_threads
from common.sm90.tiles import stage_bytes as expert_stage_bytes
from host.config import MXFP4_GROUP, ModelConfig
from host.errors import InputError

COMPILERS = ("PassManager", "LLD")  # in what Triton's raise as RuntimeError, of MLIR and of AMD's linker
LEAST_STAGES = 2  # of a ring: one is read while another is filled


@dataclass(frozen=True)
class DenseTuning:
    """Products of dense matrices and one vector. A tile is whole rows; numbers of rows are powers of two."""

    qkv_rows: int  # of a tile
    o_rows: int
    router_rows: int
    head_rows: int
    k_block: int  # rows are loaded in blocks of this width, a power of two that need not divide them
    step_tiles: int  # tiles whose sums the threads exchange together
    threads_per_row: int  # each 16 bytes at a time, where tiles come through a ring


@dataclass(frozen=True)
class ExpertTuning:
    """Products of experts' matrices and one vector."""

    norm_block: int  # elements of the experts' input that a program writes at a time, a multiple of 32
    gate_up_rows: int  # of a tile, gate and up alternating, two of which give one output; 16 where tiles are packed
    gate_up_k: int  # block over K, where rows are read from memory
    down_rows: int
    down_k: int
    step_tiles: int  # tiles whose sums the threads exchange together
    dot_scaled: bool  # FP4 x FP8 on matrix cores instead of float32 products of the same numbers


@dataclass(frozen=True)
class AttentionTuning:
    """Attention of one query position."""

    head_keys: int  # up to so many cached positions a program attends them for one query head; -1: never
    head_block_t: int  # positions per step of that
    head_slots: int  # rows of a cache that the threads load at a time, 16 bytes each, or a multiple
    block_t: int  # cached positions per step
    parts: int  # of a step, each with a softmax of its own: one per warp, or one for all
    bf16_parts: bool  # bfloat16 parts of float32 operands are multiplied; else float32
    stages: int  # steps whose loads are under way together
    split_t: int  # positions that a split has at least, a multiple of block_t
    max_splits: int  # splits grow beyond split_t so that there are never more

    @property
    def least_group(self) -> int:
        """Query heads of a KV head as rows of a matrix product's least tile; bf16_parts makes four times as many."""
        return 4 if self.bf16_parts else 16


@dataclass(frozen=True)
class RingTuning:
    """The ring in shared memory through which weights come, see common/sm90/ring.py."""

    stages: int  # tiles that it holds
    stage_bytes: int  # a multiple of 128
    prefetch_distance: int  # tiles that are asked for ahead of the one that is read
    prefetch_qkv: int  # sixteenths of a program's QKV weights that the L2 cache is asked for, at each of three places


@dataclass(frozen=True)
class Tuning:
    """Compile-time constants of the decoding kernel for one kind of device."""

    machine: Machine
    programs_per_unit: int  # resident programs on each SM or CU
    num_warps: int
    max_registers: int | None  # a thread, where the compiler takes such a limit
    layers_alone: bool  # nothing is computed once for all layers: hundreds of index vectors would occupy registers
    spin_limit: int  # polls before a barrier gives up: seconds on a GPU
    dense: DenseTuning
    experts: ExpertTuning
    attention: AttentionTuning
    ring: RingTuning | None = None
    is_cooperative: bool = False  # the driver refuses a grid that cannot be resident

    def options(self) -> dict:
        """What to compile and launch with."""
        options = {"num_warps": self.num_warps}
        if self.is_cooperative:
            options |= {"launch_cooperative_grid": True, "maxnreg": self.max_registers}
        return options


# 240 of 256 CUs: barriers get cheaper with fewer programs, and one launch must stay resident. The blocks follow what
# is known to suit the chip; nothing here was run on one. Without layers_alone they spill 58 vector registers (43 with
# --quant), with it none. Scales load 1 or 2 bytes at a time: a tile of 16 rows has 512 of them in a block over K, one
# for each of 512 threads, and rows of 90 are aligned to 2.
GFX950 = Tuning(
    machine=gfx950.GFX950,
    programs_per_unit=1,
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


MOST_BLOCK_TOKENS = 4096  # of a prompt at a time, see prefill.py


@dataclass(frozen=True)
class Tile:
    """Of a matrix product in prefill.py: m matrix rows, n tokens, k elements at a time."""

    m: int
    n: int
    k: int
    num_warps: int = 4
    stages: int = 2
    max_registers: int | None = None  # a thread, so that more programs share an SM; on NVIDIA alone
    more: int = 0  # tokens beyond n that a tile of an expert takes too, if the expert has more than n
    least_programs: int = 0  # of a dense product: with fewer a smaller tile keeps more of the device busy

    @property
    def width(self) -> int:
        """Tokens at most."""
        return self.n + self.more

    def options(self) -> dict:
        """What to compile and launch with."""
        options = dict(TILE=self, num_warps=self.num_warps)
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


@dataclass(frozen=True)
class BlockTuning:
    """Launch parameters of prefill.py."""

    tokens: int  # at most in a block
    least_tokens: int  # fewer are decoded one by one
    dense: tuple[Tile, ...]  # the smallest first
    gate_up: tuple[Tile, ...]  # for few tokens an expert first; m is a multiple of 16 warps, k of 128
    down: tuple[Tile, ...]  # likewise
    norm_warps: int
    attention_m: int  # query heads times positions
    attention_t: int  # keys at a time
    attention_warps: int
    attention_stages: int
    router_n: int  # tokens
    router_k: int
    router_warps: int
    router_stages: int
    grouping: int  # pairs at a time

    def dense_tile(self, rows: int, n_tokens: int) -> Tile:
        """The largest with enough programs."""

        def programs(tile: Tile) -> int:
            return -(-rows // tile.m) * -(-n_tokens // tile.n)

        return [tile for tile in self.dense if programs(tile) >= tile.least_programs][-1]

    @staticmethod
    def expert_tile(tiles: tuple[Tile, ...], mean_tokens: float) -> Tile:
        """The first that holds half more than an expert has on average, as some have more than others; or the last."""
        return next((tile for tile in tiles if 1.5 * mean_tokens <= tile.width), tiles[-1])


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


def blocks_for(device: torch.device) -> BlockTuning:
    """The launch parameters of prefill.py on a device."""
    if device.type == "cpu":
        return BLOCKS_CPU
    return BLOCKS_GFX950 if torch.version.hip else BLOCKS_SM_90


# The interpreter pays about 20 us an operation whatever its size, so its blocks are as large as memory allows.
_CPU_BLOCK = 1 << 20
MOST_INTERPRETED_PROGRAMS = 1024  # each is a thread


def tuning_for(device: torch.device, config: ModelConfig) -> Tuning:
    """The tuning of a device: the architecture's, or for a CPU one that swallows a matrix in few tiles.

    NVIDIA GPUs of any compute capability that host/devices.py lets through have the one measured at 9.0.
    """
    if device.type == "cpu":
        return _cpu_tuning(config)
    return GFX950 if torch.version.hip else fit_ring(SM_90, config)


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
    """The same for a GPU of so many SMs or CUs."""
    if tuning.machine.name == "gfx950":
        units -= units // 16
    return units * tuning.programs_per_unit


def check_program_count(num_programs: int, device: torch.device, tuning: Tuning) -> None:
    """InputError unless so many programs can run together."""
    most = MOST_INTERPRETED_PROGRAMS if device.type == "cpu" else program_count(device, tuning)
    if not 1 <= num_programs <= most:
        raise InputError(f"--num-programs {num_programs}: {device} runs 1 to {most} together")


@contextlib.contextmanager
def compile_errors(device: torch.device) -> Iterator[None]:
    """What a GPU's compilers say becomes an InputError of one line."""
    try:
        yield
    except InterpreterError:
        raise
    except (TritonError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in COMPILERS):
            raise
        lines = str(error).splitlines() or [type(error).__name__]
        line = next((line for line in lines if "; error" in line), lines[-1])
        raise InputError(f"device {device}: Triton cannot compile the kernels: {line.strip()}") from None


def quiet_compilers() -> None:
    """Keep Triton from printing all of a kernel's PTX, 18,000 lines, when NVIDIA's assembler refuses it."""

    def print_unless_reproducer(*values, **options) -> None:
        if not any("please share the reproducer" in str(value) for value in values):
            print(*values, **options)

    nvidia_compiler.print = print_unless_reproducer


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _cpu_tuning(config: ModelConfig) -> Tuning:
    def rows(n_rows: int, block_k: int, least: int = 1) -> int:
        return max(least, min(next_power_of_2(n_rows), _CPU_BLOCK // block_k))

    dense_k = next_power_of_2(max(config.hidden_size, config.q_size))
    expert_k = max(128, next_power_of_2(max(config.hidden_size, config.intermediate_size)))
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
            norm_block=max(MXFP4_GROUP, next_power_of_2(config.hidden_size)),
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
