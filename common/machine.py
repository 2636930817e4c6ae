"""The wall between the machines: all that a phase asks of the device that it runs on.

A phase names no vendor. It calls the functions of a Machine, which it reaches through its constexpr BUILD, and each
machine has a folder that defines them: common/sm90 (NVIDIA H100, H200), common/gfx950 (AMD MI350X, MI355X) and
common/cpu (Triton's interpreter). host/launch.py says which device has which machine, and how it is tuned.

`ctx` is a common.context.Context, `layer` an int64 scalar, `feed` whatever the machine carries from tile to tile to
bring weights in ahead of their use, `choice` a common.experts.Choice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Synchronization(NamedTuple):
    """How programs see each other's stores, see common/barrier.py."""

    publish: Callable  # () -> None: bring this program's stores to where an atomic in the order `release` shows them
    release: str  # the order of the atomic that follows `publish`
    acquire_release: str  # the order of one that must see the others' stores as well
    poll: Callable  # (counter_ptr, target) -> what int32 counter_ptr holds; threads that do not look answer `target`
    acquire: Callable  # (counter_ptr, seen) -> the counter, behind which the others' stores are visible
    clock_ns: Callable  # () -> int64 nanoseconds of a clock that all programs share


class Feed(NamedTuple):
    """How weights are asked for before they are needed. Each `ask_*` returns the feed, but for the two without one."""

    open: Callable  # (ctx, BUILD): at the first tile of a token, as much under way as can be
    open_phase: Callable  # (ctx, layer, MATRIX, choice, BUILD): at the first tile of a matrix, with that matrix alone
    extend: Callable  # (ctx, layer, feed): tiles before the experts of `layer` are known; n_layers: the LM head's
    ask_small: Callable  # (ctx, layer, window, BUILD): the cache, and a layer's norms and biases
    ask_qkv: Callable  # (ctx, layer, feed, BUILD)
    ask_part_of_qkv: Callable  # (ctx, layer, PART, BUILD): one of three parts of a program's rows
    ask_o: Callable  # (ctx, layer, feed, BUILD)
    ask_experts: Callable  # (ctx, choice, feed, BUILD)
    ask_head: Callable  # (ctx, feed, BUILD)


class Dense(NamedTuple):
    """Products of dense matrices and one vector. MATRIX is a common.build.Matrix."""

    load_vector: Callable  # (x_ptr, MATRIX, BUILD) -> x float32 [k] as `multiply` takes it
    load_normed: Callable  # (ctx, norm_ptr, feed, MATRIX, BUILD) -> the same of residual * norm, and rms_rstd
    multiply: Callable  # (ctx, feed, x, stack, row0, end_row, MATRIX, BUILD) -> float32 [rows of a step], the feed
    e4m3_to_float32: Callable  # (int32 words) -> the four E4M3 elements of each, lowest byte first


class Experts(NamedTuple):
    """Products of experts' MXFP4 matrices and one vector each."""

    is_packed: bool  # matrices as tiles of tensor core operands, see common/sm90/tiles.py; else rows as published
    store_input: Callable  # (ctx, block, normed, x, rstd, BUILD): a block of rmsnorm(x), for load_input
    load_input: Callable  # (ctx, BUILD) -> the experts' input as `multiply` takes it
    store_act: Callable  # (ctx, rank, i, act, BUILD): elements i of activations of the experts of that rank
    load_act: Callable  # (ctx, rank, BUILD) -> an expert's activations as `multiply` takes them
    multiply: Callable  # (ctx, layer, feed, choice, vector, tiles, MATRIX, BUILD) -> even rows, odd rows, the feed


@dataclass(frozen=True)
class Machine:
    """All that phases ask of one kind of device."""

    name: str
    opaque_zero: Callable = field(repr=False)  # () -> a 0 that keeps index vectors out of registers
    sync: Synchronization = field(repr=False)
    feed: Feed = field(repr=False)
    dense: Dense = field(repr=False)
    experts: Experts = field(repr=False)
    prompts: Any = field(repr=False)  # how prompts' products decode experts' matrices, see common/gemm_fp4.py
