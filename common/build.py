"""What a kernel is compiled for, as one constexpr."""

import functools
from dataclasses import dataclass, fields
from typing import Any

from common.machine import Machine

SCALE_GROUP = 32  # elements along a row that share an E8M0 scale


@dataclass(frozen=True)
class Matrix:
    """A matrix [rows, k] that programs share tile by tile; a tile is tile_rows whole rows."""

    name: str  # field of the weights
    rows: int
    k: int
    format: str  # "bf16", "fp8-row", "fp8-32" or "mxfp4"
    tile_rows: int
    k_block: int  # elements of a row at a time, where a machine takes rows in blocks

    @property
    def n_tiles(self) -> int:
        return -(-self.rows // self.tile_rows)


@dataclass(frozen=True, eq=False)
class Build:
    """A model's configuration, a device's tuning, and the path: FP4 x FP8 experts (`quant`), timestamps (`trace`)."""

    config: Any  # checkpoints.config.ModelConfig
    tuning: Any  # host.launch.Tuning
    quant: bool = False
    trace: bool = False

    @property
    def machine(self) -> Machine:
        return self.tuning.machine

    @functools.cached_property
    def qkv(self) -> Matrix:
        c, t = self.config, self.tuning.dense
        return Matrix("qkv", c.qkv_size, c.hidden_size, c.dense.qkv, t.qkv_rows, t.k_block)

    @functools.cached_property
    def o(self) -> Matrix:
        c, t = self.config, self.tuning.dense
        return Matrix("o", c.hidden_size, c.q_size, c.dense.o, t.o_rows, t.k_block)

    @functools.cached_property
    def router(self) -> Matrix:
        c, t = self.config, self.tuning.dense
        return Matrix("router", c.n_experts, c.hidden_size, c.dense.router, t.router_rows, t.k_block)

    @functools.cached_property
    def lm_head(self) -> Matrix:
        c, t = self.config, self.tuning.dense
        return Matrix("lm_head", c.vocab_size, c.hidden_size, c.dense.head, t.head_rows, t.k_block)

    @functools.cached_property
    def gate_up(self) -> Matrix:
        """Gate and up rows alternate: whoever quantizes outputs needs the 64 rows of all that share a scale."""
        c, t = self.config, self.tuning.experts
        tile_rows = t.gate_up_rows
        if self.quant and not self.machine.experts.is_packed:
            tile_rows = max(tile_rows, 2 * SCALE_GROUP)
        return Matrix("gate_up", 2 * c.intermediate_size, c.hidden_size, "mxfp4", tile_rows, t.gate_up_k)

    @property
    def is_scaled(self) -> bool:
        """Whether experts' products are FP4 x FP8 on scaled matrix cores."""
        return self.quant and self.tuning.experts.dot_scaled

    @property
    def gate_up_run(self) -> int:
        """Consecutive tiles of gate-up that a program has: those of the 32 outputs that share a scale, if it rounds."""
        is_rounded = self.quant and self.machine.experts.is_packed
        return 2 * SCALE_GROUP // self.gate_up.tile_rows if is_rounded else 1

    @functools.cached_property
    def down(self) -> Matrix:
        c, t = self.config, self.tuning.experts
        return Matrix("down", c.hidden_size, c.intermediate_size, "mxfp4", t.down_rows, t.down_k)

    @functools.cached_property
    def layer_matrices(self) -> tuple[Matrix, ...]:
        """Those that a feed brings in, in the order of the phases that multiply them."""
        return self.qkv, self.o, self.gate_up, self.down

    @functools.cached_property
    def cache_key(self) -> str:
        """What Triton's cache tells builds apart by: the sources of the machine's functions too."""
        parts = (self.machine.sync, self.machine.feed, self.machine.dense, self.machine.experts, self.machine.prompts)
        functions = [self.machine.opaque_zero, *(function for part in parts for function in part)]
        keys = [getattr(function, "cache_key", str(function)) for function in functions]
        return repr([[getattr(self, f.name) for f in fields(self)], keys])
