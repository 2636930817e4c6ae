"""Which tiles of each matrix a program multiplies.

A program's tiles of a dense matrix are consecutive; programs have equal numbers of them, or one more. Tiles of gate-up,
numbered through all chosen experts, are dealt out one by one, or in runs. For the down projection programs are dealt
out over the chosen experts first, as each expert needs another vector, and then share its tiles:

    4 experts, 6 programs:   rank 0: programs 0, 4    rank 1: programs 1, 5    rank 2: program 2    rank 3: program 3
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Tiles(NamedTuple):
    """Consecutive tiles of a dense matrix."""

    first: Any
    count: Any


class DownTiles(NamedTuple):
    """A program's tiles of the down projection: member, member + members, ... of every `ranks`-th expert rank."""

    ranks: Any  # that programs are dealt out over: all, or with fewer programs one each, of which each takes several
    member: Any  # number of the program among those that share its experts
    members: Any  # programs that share its experts
    per_expert: Any  # tiles of each of its experts
    count: Any  # tiles of all its experts


class Work(NamedTuple):
    """A program's tiles of every matrix."""

    qkv: Tiles
    o: Tiles
    gate_up_count: Any
    down: DownTiles
    lm_head: Tiles


@triton.jit
def share(n_items, program, n_programs):
    """Return (first, end) of a program's consecutive items; programs get equal numbers, or one more."""
    return program * n_items // n_programs, (program + 1) * n_items // n_programs


@triton.jit
def share_rows(program, n_programs, MATRIX: tl.constexpr):
    """Return (first, end) of a program's rows of a dense matrix: whole tiles, except where the matrix ends."""
    first, end = share(tl.cdiv(MATRIX.rows, MATRIX.tile_rows), program, n_programs)
    return first * MATRIX.tile_rows, tl.minimum(end * MATRIX.tile_rows, MATRIX.rows)


@triton.jit
def share_tiles(program, n_programs, MATRIX: tl.constexpr):
    """Return a program's Tiles of a dense matrix."""
    first, end = share(tl.cdiv(MATRIX.rows, MATRIX.tile_rows), program, n_programs)
    return Tiles(first, end - first)


@triton.jit
def gate_up_tile(n, program, n_programs, BUILD: tl.constexpr):
    """Return a program's n-th tile of gate-up, numbered through all chosen experts; runs of tiles are dealt out."""
    RUN: tl.constexpr = BUILD.gate_up_run
    return (n // RUN * n_programs + program) * RUN + n % RUN


@triton.jit
def share_work(program, n_programs, BUILD: tl.constexpr):
    """Return a program's Work."""
    TOP_K: tl.constexpr = BUILD.config.experts_per_token
    RUN: tl.constexpr = BUILD.gate_up_run
    QKV: tl.constexpr = BUILD.qkv
    O: tl.constexpr = BUILD.o  # noqa: E741
    LM_HEAD: tl.constexpr = BUILD.lm_head
    qkv = share_tiles(program, n_programs, QKV)
    o = share_tiles(program, n_programs, O)
    lm_head = share_tiles(program, n_programs, LM_HEAD)
    # Runs are whole, as intermediate sizes are multiples of 32.
    gate_up_count = RUN * tl.maximum(tl.cdiv(BUILD.gate_up.n_tiles * TOP_K // RUN - program, n_programs), 0)
    ranks = tl.minimum(n_programs, TOP_K)
    member = program // ranks
    members = (n_programs - program % ranks + ranks - 1) // ranks
    per_expert = tl.maximum(tl.cdiv(BUILD.down.n_tiles - member, members), 0)
    count = per_expert * tl.cdiv(TOP_K - program % ranks, ranks)
    down = DownTiles(ranks, member, members, per_expert, count)
    # A GPU without some matrices has none of their tiles.
    if not BUILD.has_attention:
        qkv, o, lm_head = Tiles(0, 0), Tiles(0, 0), Tiles(0, 0)
    if not BUILD.has_experts:
        gate_up_count, down = 0, DownTiles(ranks, member, members, 0, 0)
    return Work(qkv, o, gate_up_count, down, lm_head)
