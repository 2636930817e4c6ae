"""Small Triton kernels, and their gfx950 assembly.

TRITON_INTERPRET=0 python tests/tools/gfx950/small_kernels.py

prints a JSON object: name of a case -> {"asm": ..., "shared": bytes of LDS}.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import triton
import triton.language as tl

from common.gfx950.asm import publish

N_WARPS = 4
N_PROGRAMS = 6  # of the grid barrier


@triton.jit
def add(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    tl.store(out_ptr + i, tl.load(x_ptr + i, mask) + tl.load(y_ptr + i, mask), mask)


@triton.jit
def softmax(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + i, i < n, -float("inf"))
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + i, e / tl.sum(e, 0), i < n)


@triton.jit
def divide(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.div_rn(tl.load(x_ptr + i), tl.load(y_ptr + i)))


@triton.jit
def convert(x_ptr, half_ptr, bf16_ptr, fp8_ptr, int_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(half_ptr + i, x.to(tl.float16))
    tl.store(bf16_ptr + i, x.to(tl.bfloat16))
    tl.store(fp8_ptr + i, x.to(tl.float8e4nv))
    tl.store(int_ptr + i, x.to(tl.int32))


@triton.jit
def integers(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + i), tl.load(y_ptr + i)
    tl.store(out_ptr + i, x * y)
    tl.store(out_ptr + BLOCK + i, x // y)
    tl.store(out_ptr + 2 * BLOCK + i, x % y)
    tl.store(out_ptr + 3 * BLOCK + i, (x << (y & 7)) ^ (x >> (y & 15)))
    tl.store(out_ptr + 4 * BLOCK + i, tl.maximum(x, y) - tl.minimum(x, -y))
    tl.store(out_ptr + 5 * BLOCK + i, tl.cumsum(x, 0))
    tl.store(out_ptr + 6 * BLOCK + i, (x.to(tl.int64) * y >> 16).to(tl.int32))


@triton.jit
def dot(a_ptr, b_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    i, j, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + i[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + j[None, :])
    tl.store(out_ptr + i[:, None] * N + j[None, :], tl.dot(a, b))


@triton.jit
def dot_scaled(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """Multiply E2M1, two in a byte [M, K / 2], by E4M3 [N, K], both with an E8M0 scale for each 32 along K."""
    i, j, k, group = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // 32)
    a = tl.load(a_ptr + i[:, None] * (K // 2) + tl.arange(0, K // 2)[None, :])
    a_scale = tl.load(a_scale_ptr + i[:, None] * (K // 32) + group[None, :])
    b = tl.load(b_ptr + j[None, :] * K + k[:, None])
    b_scale = tl.load(b_scale_ptr + j[:, None] * (K // 32) + group[None, :])
    tl.store(out_ptr + i[:, None] * N + j[None, :], tl.dot_scaled(a, a_scale, "e2m1", b, b_scale, "e4m3"))


@triton.jit
def atomics(x_ptr, sum_ptr, max_ptr, last_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.atomic_add(sum_ptr + x % 8, x)
    tl.atomic_max(max_ptr + x % 8, x)
    tl.atomic_xchg(last_ptr + tl.program_id(0), tl.sum(x, 0))


@triton.jit
def sum_of_all(
    x_ptr, part_ptr, out_ptr, sync_ptr, n_programs, BLOCK: tl.constexpr, PROGRAMS: tl.constexpr, DRAINS: tl.constexpr
):
    """Each program sums a part, passes a grid barrier, and sums the parts."""
    program, i = tl.program_id(0), tl.arange(0, BLOCK)
    tl.store(part_ptr + program, tl.sum(tl.load(x_ptr + program * BLOCK + i), 0))
    if DRAINS:
        publish()
    else:
        tl.debug_barrier()
    tl.atomic_add(sync_ptr, 1, sem="release", scope="gpu")
    arrived = 0
    while arrived < n_programs:
        arrived = tl.atomic_add(sync_ptr, 0, sem="acquire", scope="gpu")
    tl.debug_barrier()
    part = tl.arange(0, PROGRAMS)
    tl.store(out_ptr + program, tl.sum(tl.load(part_ptr + part, part < n_programs, 0.0), 0))


@dataclass(frozen=True)
class Case:
    """A kernel, the types of its arguments, and its constants."""

    kernel: Any
    types: str
    constants: dict[str, int]


DOT_SIZES = ((16, 16, 32), (32, 64, 64), (64, 32, 128))
SCALED_SIZES = ((16, 16, 128), (64, 16, 256), (128, 32, 512))
DOT_TYPES = ("fp16", "bf16", "fp32")


def sizes(m: int, n: int, k: int) -> dict[str, int]:
    return {"M": m, "N": n, "K": k}


CASES = {
    "add": Case(add, "*fp32 *fp32 *fp32 i32", {"BLOCK": 256}),
    "softmax": Case(softmax, "*fp32 *fp32 i32", {"BLOCK": 512}),
    "divide": Case(divide, "*fp32 *fp32 *fp32", {"BLOCK": 1024}),
    "convert": Case(convert, "*fp32 *fp16 *bf16 *fp8e4nv *i32", {"BLOCK": 1024}),
    "integers": Case(integers, "*i32 *i32 *i32", {"BLOCK": 256}),
    "atomics": Case(atomics, "*i32 *i32 *i32 *i32", {"BLOCK": 256}),
    **{
        name: Case(sum_of_all, "*fp32 *fp32 *fp32 *i32 i32", {"BLOCK": 256, "PROGRAMS": 8, "DRAINS": drains})
        for name, drains in (("sum_of_all", 1), ("sum_of_all, undrained", 0))
    },
    **{
        f"dot {dtype} {m} {n} {k}": Case(dot, f"*{dtype} *{dtype} *fp32", sizes(m, n, k))
        for dtype in DOT_TYPES
        for m, n, k in DOT_SIZES
    },
    **{
        f"dot_scaled {m} {n} {k}": Case(dot_scaled, "*u8 *u8 *fp8e4nv *u8 *fp32", sizes(m, n, k))
        for m, n, k in SCALED_SIZES
    },
}


def compiled(case: Case) -> dict[str, str | int]:
    """Return a case's assembly and bytes of LDS."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    types = case.types.split()
    signature = dict(zip(names, [*types, *["constexpr"] * len(case.constants)], strict=True))
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    attributes = {
        (n,): [["tt.divisibility", 16], ["tt.pointer_range", 32]]
        for n, kind in enumerate(types)
        if kind.startswith("*")
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=constants, attrs=attributes)
    kernel = triton.compile(source, target=GPUTarget("hip", "gfx950", 64), options={"num_warps": N_WARPS})
    return {"asm": kernel.asm["amdgcn"], "shared": kernel.metadata.shared}


if __name__ == "__main__":
    print(json.dumps({name: compiled(case) for name, case in CASES.items()}))
