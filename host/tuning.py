"""What is tuned of a launch, by subject; host/launch.py has the values of each machine."""

from dataclasses import dataclass

from common.machine import Machine


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
    programs_per_unit: int  # resident programs on each SM or CU that is used
    num_warps: int
    max_registers: int | None  # a thread, where the compiler takes such a limit
    layers_alone: bool  # nothing is computed once for all layers: hundreds of index vectors would occupy registers
    spin_limit: int  # polls before a barrier gives up: seconds on a GPU
    dense: DenseTuning
    experts: ExpertTuning
    attention: AttentionTuning
    ring: RingTuning | None = None
    used_units: int = 16  # of 16 SMs or CUs
    is_cooperative: bool = False  # the driver refuses a grid that cannot be resident

    def options(self) -> dict:
        """What to compile and launch with."""
        options = {"num_warps": self.num_warps}
        if self.is_cooperative:
            options |= {"launch_cooperative_grid": True, "maxnreg": self.max_registers}
        return options


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
