"""Everything about a launch that depends on the device: the one place to tune."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from triton.backends.nvidia import compiler as nvidia_compiler
from triton.errors import TritonError
from triton.runtime.errors import InterpreterError

from common.gemv_dense import item_bytes, row_lanes, row_scale_bytes
from host.config import MXFP4_GROUP, ModelConfig
from host.errors import InputError
from host.fragments import expert_slot_bytes

COMPILERS = ("PassManager", "LLD")  # in what Triton's raise as RuntimeError, of MLIR and of AMD's linker
LEAST_SLOTS = 2  # of a ring: one is read while another is filled


@dataclass(frozen=True)
class Tuning:
    """Compile-time constants of the kernel for one kind of device. Blocks are powers of two; M counts matrix rows.

    A block over K need not divide K: what lies beyond is masked.
    """

    arch: str  # "cuda", "hip", or "cpu" for Triton's interpreter
    programs_per_unit: int  # resident programs on each SM or CU
    num_warps: int
    max_registers: int | None  # a thread, where the compiler takes such a limit
    layers_alone: bool  # nothing is computed once for all layers: hundreds of index vectors would occupy registers
    qkv_m: int  # QKV rows per tile
    o_m: int  # O rows per tile
    router_m: int
    head_m: int
    dense_k: int  # a tile holds whole rows, in blocks of this width
    norm_block: int  # elements of the experts' input that a program writes at a time, a multiple of 32
    fragments: bool  # experts as fragments of tensor core operands, whose tiles are 16 rows; else plain rows
    gate_up_m: int  # interleaved gate and up rows, two of which give one output; at least 64 with --quant
    gate_up_k: int  # block over K, unused for fragments
    down_m: int
    down_k: int
    head_keys: int  # up to so many cached positions a program attends them for one query head, 0: never
    head_block_t: int  # positions per step of that
    head_slots: int  # rows of a cache that the threads load at a time, 16 bytes each, or a multiple
    block_t: int  # cached positions per attention step
    attention_parts: int  # parts of a step with a softmax of their own, one per warp or one for all
    bf16_parts: bool  # attention multiplies bfloat16 parts of its float32 operands; else float32
    attention_stages: int  # steps whose loads are under way together
    split_t: int  # positions that a split has at least, a multiple of block_t
    max_splits: int  # splits grow beyond split_t so that there are never more
    dot_scaled: bool  # FP4 x FP8 on matrix cores instead of float32 products of the same numbers
    prefetch: bool  # a dense tile is loaded while the one before it is multiplied, the first one during the barrier
    prefetch_small: bool  # ask ahead for norms, biases, router rows and the cache
    prefetch_qkv: int  # sixteenths of a program's QKV weights that are asked for ahead, at each of three places
    dense_lanes: int  # threads that share a row of a dense matrix, each 16 bytes at a time
    dense_batch: int  # tiles of dense matrices whose sums the threads exchange together
    expert_batch: int  # the same for tiles of experts
    ring_slots: int  # tiles that shared memory holds ahead of who reads them, see common/ring.py; 0: weights are loaded
    slot_bytes: int  # of one of them, a multiple of 128
    window: int  # of the ring: tiles that are asked for ahead of the one that is read
    spin_limit: int  # polls before a barrier gives up: seconds on a GPU

    @property
    def least_group(self) -> int:
        """Query heads of a KV head as rows of a matrix product's least tile; bf16_parts makes four times as many."""
        return 4 if self.bf16_parts else 16

    def options(self) -> dict:
        """What to compile and launch with."""
        options = {"num_warps": self.num_warps}
        if self.arch == "cuda":
            options |= {"launch_cooperative_grid": True, "maxnreg": self.max_registers}
        return options


# 240 of 256 CUs: barriers get cheaper with fewer programs, and one launch must stay resident. The blocks follow what
# is known to suit the chip; nothing here was run on one. Without layers_alone they spill 58 vector registers (43 with
# --quant), with it none. Scales load 1 or 2 bytes at a time: a tile of 16 rows has 512 of them in a block over K, one
# for each of 512 threads, and rows of 90 are aligned to 2.
GFX950 = Tuning(
    arch="hip",
    programs_per_unit=1,
    num_warps=8,
    max_registers=None,
    layers_alone=True,
    qkv_m=8,
    o_m=8,
    router_m=1,
    head_m=16,
    dense_k=1024,
    norm_block=512,
    fragments=False,
    gate_up_m=32,
    gate_up_k=1024,
    down_m=16,
    down_k=1024,
    head_keys=512,
    head_block_t=64,
    head_slots=32,
    block_t=16,
    attention_parts=1,
    bf16_parts=False,
    attention_stages=1,
    split_t=256,
    max_splits=32,
    dot_scaled=True,
    prefetch=True,
    prefetch_small=False,
    prefetch_qkv=0,
    dense_lanes=128,
    dense_batch=1,
    expert_batch=1,
    ring_slots=0,
    slot_bytes=0,
    window=0,
    spin_limit=1 << 24,
)
# One program of eight warps an SM, whose weights come through a ring of seven slots of 25 KB. For 120b and 20b: other
# sizes get other tiles, see fit_ring. Five tiles ahead rather than all that fit, as what has been asked for holds up
# what comes after it: docs/performance.md has the measurements.
SM_90 = Tuning(
    arch="cuda",
    programs_per_unit=1,
    num_warps=8,
    max_registers=None,
    layers_alone=True,
    qkv_m=4,
    o_m=2,
    router_m=1,
    head_m=4,
    dense_k=4096,
    norm_block=128,
    fragments=True,
    gate_up_m=16,
    gate_up_k=0,
    down_m=16,
    down_k=0,
    head_keys=512,
    head_block_t=64,
    head_slots=32,
    block_t=128,
    attention_parts=8,  # 4 parts of a step of 64 took 4.06 ms for 3.34 at 130,816
    bf16_parts=True,
    attention_stages=2,
    split_t=128,
    max_splits=16,  # times 8 KV heads: one for nearly each of 132 programs; 32 took 2.104 ms for 2.070 at 8,192
    dot_scaled=False,
    prefetch=False,
    prefetch_small=True,
    prefetch_qkv=2,
    dense_lanes=128,
    dense_batch=16,
    expert_batch=16,
    ring_slots=7,
    slot_bytes=25600,
    window=5,
    spin_limit=1 << 24,
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
    """The tuning with tiles and slots that suit a model's sizes. InputError if two slots take more than there is."""
    dense, hidden = config.dense, config.hidden_size

    def rows(k: int, dense_format: str) -> int:
        least = 32 * tuning.num_warps // row_lanes(k, dense_format, tuning)  # each thread has some
        m = 8 // item_bytes(dense_format)
        while m > least and m * _row_bytes(k, dense_format) > tuning.slot_bytes:
            m //= 2
        return m

    tiles = {"qkv_m": (hidden, dense.qkv), "o_m": (config.q_size, dense.o), "head_m": (hidden, dense.head)}
    heights = {name: rows(*matrix) for name, matrix in tiles.items()}
    needed = [heights[name] * _row_bytes(*matrix) for name, matrix in tiles.items()]
    needed += [expert_slot_bytes(k, tuning.num_warps) for k in (hidden, config.intermediate_size)]
    slot_bytes = -(-max(needed) // 128) * 128
    slots = tuning.ring_slots
    if slot_bytes > tuning.slot_bytes:
        # Attention in steps half as long leaves room for one more of the usual slots.
        slots = min(slots, (slots + 1) * tuning.slot_bytes // slot_bytes)
        tuning = replace(tuning, block_t=tuning.block_t // 2, attention_parts=tuning.attention_parts // 2)
    if slots < LEAST_SLOTS:
        raise InputError(f"a tile of this model's weights takes {slot_bytes} bytes of shared memory: too much")
    window = min(tuning.window, slots)
    return replace(tuning, ring_slots=slots, slot_bytes=slot_bytes, window=window, **heights)


def _row_bytes(k: int, dense_format: str) -> int:
    """Of a row in the ring, with its scales."""
    return k * item_bytes(dense_format) + row_scale_bytes(k, dense_format)


def program_count(device: torch.device, tuning: Tuning) -> int:
    """Programs that are resident together: the barrier needs all of them running."""
    if device.type == "cpu":
        return 1
    return programs_on(torch.cuda.get_device_properties(device).multi_processor_count, tuning)


def programs_on(units: int, tuning: Tuning) -> int:
    """The same for a GPU of so many SMs or CUs."""
    if tuning.arch == "hip":
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
        arch="cpu",
        programs_per_unit=1,
        num_warps=1,
        max_registers=None,
        layers_alone=False,
        qkv_m=rows(config.qkv_size, dense_k),
        o_m=rows(config.hidden_size, dense_k),
        router_m=rows(config.n_experts, dense_k),
        head_m=rows(config.vocab_size, dense_k),
        dense_k=dense_k,
        norm_block=max(MXFP4_GROUP, next_power_of_2(config.hidden_size)),
        fragments=False,
        gate_up_m=rows(2 * config.intermediate_size, expert_k),
        gate_up_k=expert_k,
        down_m=rows(config.hidden_size, expert_k, least=16),
        down_k=expert_k,
        head_keys=0,
        head_block_t=256,
        head_slots=1,
        block_t=256,
        attention_parts=1,
        bf16_parts=False,
        attention_stages=1,
        split_t=4096,
        max_splits=64,
        dot_scaled=True,
        prefetch=False,
        prefetch_small=False,
        prefetch_qkv=0,
        dense_lanes=128,
        dense_batch=1,
        expert_batch=1,
        ring_slots=0,
        slot_bytes=0,
        window=0,
        spin_limit=1 << 14,
    )


def with_small_tiles(tuning: Tuning) -> Tuning:
    """The same device with tiles so small that every phase of a small model has several: for tests of the striping."""
    return replace(
        tuning,
        qkv_m=16,
        o_m=16,
        router_m=2,
        head_m=16,
        dense_k=128,
        norm_block=32,
        gate_up_m=64,
        gate_up_k=128,
        down_m=16,
        down_k=128,
        head_keys=20,
        head_block_t=16,
        head_slots=8,
        block_t=16,
        split_t=32,
        max_splits=4,
    )
