"""What a kernel is compiled for, as one constexpr."""

import functools
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from common.machine import Machine

SCALE_GROUP = 32  # elements along a row that share an E8M0 scale


class Operand(NamedTuple):
    """Pointers to an operand of a product in device memory: to its elements and, where its format has any, scales."""

    ptr: Any
    scales_ptr: Any


@dataclass(frozen=True)
class Matrix:
    """The shape and format of a matrix [rows, k] that programs share tile by tile; a tile is tile_rows whole rows."""

    name: str  # field of the weights
    rows: int
    k: int
    format: str  # "bf16", "fp8-row", "fp8-32" or "mxfp4"
    tile_rows: int
    k_block: int  # elements of a row that are loaded at a time, if a machine loads rows in blocks

    @property
    def n_tiles(self) -> int:
        return -(-self.rows // self.tile_rows)


@dataclass(frozen=True, eq=False)
class Build:
    """A model's configuration, a device's tuning, and whether to use FP4 x FP8 experts and to store timestamps."""

    config: Any  # checkpoints.config.ModelConfig
    tuning: Any  # host.tuning.Tuning
    quant: bool = False
    trace: bool = False
    n_ranks: int = 1  # GPUs that share each matrix, see common/exchange.py
    rank: int = 0  # of this one
    first_row: int = 0  # token id of this rank's first row of embedding and LM head
    has_attention: bool = True  # and router, embedding and LM head
    has_experts: bool = True
    n_expert_ranks: int = 1  # GPUs that the chosen experts are distributed over
    top_k: int | None = None  # chosen experts, if this GPU has config.experts_per_token of them
    first_expert: int = 0  # rank of the first chosen expert that it has

    @property
    def machine(self) -> Machine:
        return self.tuning.machine

    @property
    def is_alone(self) -> bool:
        """Whether this GPU has the whole model."""
        return self.n_ranks == 1 and self.has_attention and self.has_experts

    @property
    def everyone(self) -> tuple[int, ...]:
        """All ranks."""
        return tuple(range(self.n_ranks))

    @property
    def others(self) -> tuple[int, ...]:
        """All ranks but this one."""
        return self.everyone[: self.rank] + self.everyone[self.rank + 1 :]

    @property
    def attention_ranks(self) -> tuple[int, ...]:
        """The GPUs with attention and router, where GPUs have whole matrices."""
        return (0,)

    @property
    def expert_ranks(self) -> tuple[int, ...]:
        """The GPUs with experts, where GPUs have whole matrices."""
        return tuple(range(1, 1 + self.n_expert_ranks))

    @property
    def n_chosen(self) -> int:
        """Experts that the router chooses for a token."""
        return self.top_k or self.config.experts_per_token

    @functools.cached_property
    def qkv(self) -> Matrix:
        config, tuning = self.config, self.tuning.dense
        return Matrix("qkv", config.qkv_size, config.hidden_size, config.dense.qkv, tuning.qkv_rows, tuning.k_block)

    @functools.cached_property
    def o(self) -> Matrix:
        config, tuning = self.config, self.tuning.dense
        return Matrix("o", config.hidden_size, config.q_size, config.dense.o, tuning.o_rows, tuning.k_block)

    @functools.cached_property
    def router(self) -> Matrix:
        config, tuning = self.config, self.tuning.dense
        return Matrix(
            "router", config.n_experts, config.hidden_size, config.dense.router, tuning.router_rows, tuning.k_block
        )

    @functools.cached_property
    def lm_head(self) -> Matrix:
        config, tuning = self.config, self.tuning.dense
        return Matrix(
            "lm_head", config.vocab_size, config.hidden_size, config.dense.head, tuning.head_rows, tuning.k_block
        )

    @functools.cached_property
    def gate_up(self) -> Matrix:
        """Gate and up rows alternate; a program that quantizes its outputs needs the 64 rows of a scale group."""
        config, tuning = self.config, self.tuning.experts
        tile_rows = tuning.gate_up_rows
        if self.quant and not self.machine.experts.is_packed:
            tile_rows = max(tile_rows, 2 * SCALE_GROUP)
        return Matrix("gate_up", 2 * config.intermediate_size, config.hidden_size, "mxfp4", tile_rows, tuning.gate_up_k)

    @property
    def is_scaled(self) -> bool:
        """Whether experts' products run as FP4 x FP8 on scaled matrix cores."""
        return self.quant and self.tuning.experts.dot_scaled

    @property
    def gate_up_run(self) -> int:
        """Consecutive tiles of gate-up that a program takes: one, or those of a scale group if it quantizes."""
        is_rounded = self.quant and self.machine.experts.is_packed
        return 2 * SCALE_GROUP // self.gate_up.tile_rows if is_rounded else 1

    @functools.cached_property
    def down(self) -> Matrix:
        config, tuning = self.config, self.tuning.experts
        return Matrix("down", config.hidden_size, config.intermediate_size, "mxfp4", tuning.down_rows, tuning.down_k)

    @functools.cached_property
    def layer_matrices(self) -> tuple[Matrix, ...]:
        """The matrices of a layer that a feed brings in, in the order of the phases that multiply them."""
        return self.qkv, self.o, self.gate_up, self.down

    @functools.cached_property
    def cache_key(self) -> str:
        """The key by which Triton's cache tells builds apart; it includes the sources of the machine's functions."""
        m = self.machine
        groups = (m.sync, m.rank_sync, m.feed, m.dense, m.experts, m.prompts)
        functions = [m.opaque_zero, m.load_now, *(function for group in groups for function in group)]
        keys = [getattr(function, "cache_key", str(function)) for function in functions]
        return repr([[getattr(self, f.name) for f in fields(self)], keys])
