"""Which tiles of each matrix a program multiplies.

Tiles of dense matrices are consecutive ones, as many as any other program's or one more. Tiles of gate-up, counted
through all chosen experts, are dealt out one after another, or in runs. For the down projection programs are dealt out
over the chosen experts first, as each expert has another vector to prepare, and then share its tiles:

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
    """Tiles `member`, member + members, ... of the experts of every `ranks`-th rank."""

    ranks: Any  # that programs are dealt out over, at most the number of programs: then each takes several
    member: Any  # number of the program among those of its experts
    members: Any  # and how many those are
    each: Any  # tiles of each of its experts
    count: Any


class Work(NamedTuple):
    """A program's tiles of every matrix."""

    qkv: Tiles
    o: Tiles
    gate_up_count: Any
    down: DownTiles
    lm_head: Tiles


@triton.jit
def share(n_items, program, n_programs):
    """(first, end) of the items that a program takes: consecutive ones, as many as any other or one more."""
    return program * n_items // n_programs, (program + 1) * n_items // n_programs


@triton.jit
def share_rows(program, n_programs, MATRIX: tl.constexpr):
    """(first, end) of the rows of a dense matrix that a program takes, whole tiles but for the last of all."""
    first, end = share(tl.cdiv(MATRIX.rows, MATRIX.tile_rows), program, n_programs)
    return first * MATRIX.tile_rows, tl.minimum(end * MATRIX.tile_rows, MATRIX.rows)


@triton.jit
def share_tiles(program, n_programs, MATRIX: tl.constexpr):
    """A program's Tiles of a dense matrix."""
    first, end = share(tl.cdiv(MATRIX.rows, MATRIX.tile_rows), program, n_programs)
    return Tiles(first, end - first)


@triton.jit
def gate_up_tile(n, program, n_programs, BUILD: tl.constexpr):
    """A program's tile number n of gate-up, counted through those of all chosen experts. Runs are dealt out."""
    RUN: tl.constexpr = BUILD.gate_up_run
    return (n // RUN * n_programs + program) * RUN + n % RUN


@triton.jit
def share_work(program, n_programs, BUILD: tl.constexpr):
    """A program's Work."""
    TOP_K: tl.constexpr = BUILD.config.experts_per_token
    RUN: tl.constexpr = BUILD.gate_up_run
    QKV: tl.constexpr = BUILD.qkv
    O: tl.constexpr = BUILD.o  # noqa: E741
    LM_HEAD: tl.constexpr = BUILD.lm_head
    qkv = share_tiles(program, n_programs, QKV)
    o = share_tiles(program, n_programs, O)
    lm_head = share_tiles(program, n_programs, LM_HEAD)
    # Whole runs, as intermediate sizes are multiples of 32.
    gate_up_count = RUN * tl.maximum(tl.cdiv(BUILD.gate_up.n_tiles * TOP_K // RUN - program, n_programs), 0)
    ranks = tl.minimum(n_programs, TOP_K)
    member = program // ranks
    members = (n_programs - program % ranks + ranks - 1) // ranks
    each = tl.maximum(tl.cdiv(BUILD.down.n_tiles - member, members), 0)
    count = each * tl.cdiv(TOP_K - program % ranks, ranks)
    return Work(qkv, o, gate_up_count, DownTiles(ranks, member, members, each, count), lm_head)
