"""Launch parameters, grouped by subject; host/launch.py has their values for each machine."""

from dataclasses import dataclass, replace

from common.machine import Machine


@dataclass(frozen=True)
class DenseTuning:
    """Products of dense matrices and one vector. A tile is whole rows; numbers of rows are powers of two."""

    qkv_rows: int  # rows of a QKV tile
    o_rows: int
    router_rows: int
    head_rows: int
    k_block: int  # columns that are loaded at a time, a power of two that need not divide a row
    step_tiles: int  # tiles whose sums the threads exchange together
    threads_per_row: int  # where tiles come through a ring; each thread reads 16 bytes at a time


@dataclass(frozen=True)
class ExpertTuning:
    """Products of experts' matrices and one vector."""

    norm_block: int  # elements of the experts' input that a program writes at a time, a multiple of 32
    gate_up_rows: int  # rows of a tile, alternately gate and up, a pair per output; 16 where tiles are packed
    gate_up_k: int  # columns that are loaded at a time; unused where tiles are packed
    down_rows: int
    down_k: int
    step_tiles: int  # tiles whose sums the threads exchange together
    dot_scaled: bool  # FP4 x FP8 on matrix cores instead of float32 products of the same numbers


@dataclass(frozen=True)
class AttentionTuning:
    """Attention of one query position."""

    head_keys: int  # up to so many cached positions a program attends them for one query head; -1: never
    head_step_keys: int  # positions of a step of that
    rows_per_load: int  # rows of a cache that the threads load at a time, 16 bytes each, or a multiple
    step_keys: int  # cached positions of a step, else
    partial_softmaxes: int  # equal shares of a step that each keep a softmax state: one per warp, or one for all
    bf16x3: bool  # float32 operands are multiplied as three bfloat16 terms; else as float32
    stages: int  # steps whose loads are in flight together
    min_split_keys: int  # positions that a split has at least, a multiple of step_keys
    max_splits: int  # splits grow beyond min_split_keys so that there are never more

    @property
    def min_query_rows(self) -> int:
        """Least query heads of a KV head that fill a matrix product's smallest tile; bf16x3 multiplies rows by four."""
        return 4 if self.bf16x3 else 16


@dataclass(frozen=True)
class RingTuning:
    """The ring in shared memory that weights are streamed through, see common/sm90/ring.py."""

    stages: int  # tiles that it holds
    stage_bytes: int  # a multiple of 128
    column_bytes: int  # of a column of a dense tile, all its rows; fit_ring makes it less where rows are long
    prefetch_distance: int  # tiles requested ahead of the one that is read
    prefetch_qkv: int  # sixteenths of a program's QKV weights that are prefetched into L2 at each of three places

    def with_stages(self, stages: int) -> "RingTuning":
        """Return the ring with another number of stages and a prefetch distance of at most that many tiles."""
        return replace(self, stages=stages, prefetch_distance=min(self.prefetch_distance, stages))


@dataclass(frozen=True)
class Tuning:
    """Compile-time constants of the decoding kernel for one kind of device."""

    machine: Machine
    programs_per_unit: int  # resident programs on each SM or CU that is used
    num_warps: int
    max_registers: int | None  # per thread, if the compiler accepts such a limit
    layers_alone: bool  # keeps index vectors from being computed once for all layers, where they would fill registers
    spin_limit: int  # polls before a barrier gives up; on a GPU they take seconds
    dense: DenseTuning
    experts: ExpertTuning
    attention: AttentionTuning
    ring: RingTuning | None = None
    used_units: int = 16  # out of every 16 SMs or CUs
    is_cooperative: bool = False  # the driver refuses a grid that cannot be resident

    def options(self) -> dict:
        """Return Triton's options for compiling and launching the kernel."""
        options = {"num_warps": self.num_warps}
        if self.is_cooperative:
            options |= {"launch_cooperative_grid": True, "maxnreg": self.max_registers}
        return options


MAX_BLOCK_TOKENS = 4096  # of a prompt at a time, see prefill.py


@dataclass(frozen=True)
class Tile:
    """A tile of a matrix product in prefill.py: m matrix rows by n tokens, k elements at a time."""

    m: int
    n: int
    k: int
    num_warps: int = 4
    stages: int = 2
    max_registers: int | None = None  # per thread, so that more programs share an SM; only on NVIDIA
    extra_tokens: int = 0  # beyond n, that an expert's tile also takes if the expert has more than n tokens
    min_programs: int = 0  # of a dense product: with fewer, a smaller tile keeps more of the device busy

    @property
    def width(self) -> int:
        """The largest number of tokens that the tile takes."""
        return self.n + self.extra_tokens

    def options(self) -> dict:
        """Return the kernel's tile argument and Triton's options for compiling and launching it."""
        options = dict(TILE=self, num_warps=self.num_warps)
        return options | ({"maxnreg": self.max_registers} if self.max_registers else {})


@dataclass(frozen=True)
class BlockTuning:
    """Launch parameters of prefill.py."""

    tokens: int  # the most in a block
    min_tokens: int  # a shorter rest of a prompt is decoded token by token
    dense: tuple[Tile, ...]  # smallest first
    gate_up: tuple[Tile, ...]  # fewest tokens per expert first; m is a multiple of 16 warps, k of 128
    down: tuple[Tile, ...]  # ordered and sized like gate_up
    norm_warps: int
    attention_m: int  # query heads times positions of a tile
    attention_t: int  # keys of a step
    attention_warps: int
    attention_stages: int
    router_n: int  # tokens of a tile
    router_k: int
    router_warps: int
    router_stages: int
    grouping: int  # (token, expert) pairs that are sorted at a time

    def dense_tile(self, rows: int, n_tokens: int) -> Tile:
        """Return the largest tile of `dense` with which a product has enough programs."""

        def programs(tile: Tile) -> int:
            return -(-rows // tile.m) * -(-n_tokens // tile.n)

        return [tile for tile in self.dense if programs(tile) >= tile.min_programs][-1]

    @staticmethod
    def expert_tile(tiles: tuple[Tile, ...], mean_tokens: float) -> Tile:
        """Return the first tile that holds 1.5 times an expert's mean number of tokens, or the last if none does.

        The margin is for experts with more tokens than the mean.
        """
        return next((tile for tile in tiles if 1.5 * mean_tokens <= tile.width), tiles[-1])
