"""The interface between the phases and the devices that they run on.

A phase names no vendor. It calls the functions of a Machine, which it reaches through its constexpr BUILD, and each
machine has a folder that defines them: common/sm90 (NVIDIA H100, H200), common/gfx950 (AMD MI350X, MI355X) and
common/cpu (Triton's interpreter). host/launch.py says which device has which machine, and how it is tuned.

`ctx` is a common.context.Context, `layer` an int64 scalar, `feed` the state that the machine carries from tile to tile
to bring weights in ahead of their use, `choice` a common.experts.Choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Synchronization(NamedTuple):
    """How programs see each other's stores, see common/barrier.py."""

    publish: Callable  # () -> None: make this program's stores visible to those who see its next atomic
    release: str  # the memory order of the atomic that follows `publish`
    acquire_release: str  # the memory order of such an atomic that must see the others' stores as well
    poll: Callable  # (counter_ptr, target) -> the int32 counter; threads that do not poll return `target`
    acquire: Callable  # (counter_ptr, seen) -> the counter; the others' stores are visible afterwards
    clock_ns: Callable  # () -> int64 nanoseconds of a clock that all programs share


class Feed(NamedTuple):
    """How weights are asked for before they are needed. All functions return the feed unless they take none."""

    open: Callable  # (ctx, BUILD): open at the first tile of a token, with as many requests in flight as allowed
    open_phase: Callable  # (ctx, layer, MATRIX, choice, BUILD): open at the first tile of a matrix, for it alone
    extend: Callable  # (ctx, layer, feed): allow all tiles before the experts of `layer`; n_layers: the LM head's
    ask_small: Callable  # (ctx, layer, window, BUILD) -> None: the cache, and a layer's norms and biases
    ask_qkv: Callable  # (ctx, layer, feed, BUILD)
    ask_part_of_qkv: Callable  # (ctx, layer, PART, BUILD) -> None: one of three parts of a program's rows
    ask_o: Callable  # (ctx, layer, feed, BUILD)
    ask_experts: Callable  # (ctx, choice, feed, BUILD)
    ask_head: Callable  # (ctx, feed, BUILD)


class Dense(NamedTuple):
    """Products of dense matrices and one vector. MATRIX is a common.build.Matrix."""

    load_vector: Callable  # (x_ptr, MATRIX, BUILD) -> x float32 [k] as `multiply` takes it
    load_normed: Callable  # (ctx, norm_ptr, feed, MATRIX, BUILD) -> x, factor: their product is the residual's RMSNorm
    multiply: Callable  # (ctx, feed, x, matrix, row0, end_row, MATRIX, BUILD) -> float32 [rows of a step], the feed
    e4m3_to_float32: Callable  # (int32 words) -> the four E4M3 elements of each, lowest byte first


class Experts(NamedTuple):
    """Products of experts' MXFP4 matrices and one vector each."""

    is_packed: bool  # matrices are tiles of tensor core operands, see common/sm90/tiles.py; else rows as published
    store_input: Callable  # (s, block, normed, x, factor, BUILD): store a block of rmsnorm(x), for load_input
    load_input: (
        Callable  # (ctx, BUILD) -> the experts' input as `multiply` takes it, the factor that products with it lack
    )
    store_act: Callable  # (ctx, rank, i, act, BUILD): store elements i of the activations of the experts of that rank
    load_act: Callable  # (ctx, rank, BUILD) -> an expert's activations as `multiply` takes them
    multiply: Callable  # (ctx, layer, feed, choice, vector, tiles, MATRIX, BUILD) -> even rows, odd rows, the feed
    e2m1_words_to_float32: Callable = None  # (int32 words) -> their eight elements, which lack e2m1_half_bias twice
    e2m1_half_bias: float = 1.0


@dataclass(frozen=True)
class Machine:
    """The functions that phases call on one kind of device."""

    name: str
    opaque_zero: Callable = field(
        repr=False
    )  # () -> a 0 unknown to the compiler, which keeps index vectors out of registers
    load_now: Callable = field(repr=False)  # (ptr) -> int32 or int64 at ptr, which another GPU may have changed
    sync: Synchronization = field(repr=False)
    rank_sync: Synchronization = field(repr=False)  # among the programs of several GPUs
    feed: Feed = field(repr=False)
    dense: Dense = field(repr=False)
    experts: Experts = field(repr=False)
    prompts: Any = field(repr=False)  # common.gemm_fp4.PromptLayout
