"""Comparisons of lanes, and what moves values between lanes and registers.

What they do: AMD's "CDNA4 Instruction Set Architecture", VOPC, VOP1, VOP3 and DS; for LDS's transposed reads and
v_permlane*_swap LLVM's AMDGPU usage guide (llvm.amdgcn.ds.read.tr*, llvm.amdgcn.permlane*.swap) too.
"""

import itertools
import math
import operator

import numpy as np
import pytest
from assembly import LANES, evaluate

CORNERS = [0, 1, 2, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 2**31 - 1, 2**31, 2**32 - 1]
LONG = [*CORNERS, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**63 + 2**31]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, 65504.0, math.inf, -math.inf, math.nan]
ORDERS = {"lt": operator.lt, "eq": operator.eq, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
INTEGER_CONDITIONS = {**ORDERS, "ne": operator.ne, "f": lambda x, y: False, "t": lambda x, y: True}
FLOAT_CONDITIONS = {
    **ORDERS,
    "lg": lambda x, y: x < y or x > y,
    "o": lambda x, y: not (math.isnan(x) or math.isnan(y)),
    "u": lambda x, y: math.isnan(x) or math.isnan(y),
    "nge": lambda x, y: not x >= y,
    "nlg": lambda x, y: not (x < y or x > y),
    "ngt": lambda x, y: not x > y,
    "nle": lambda x, y: not x <= y,
    "neq": lambda x, y: not x == y,
    "nlt": lambda x, y: not x < y,
    "f": lambda x, y: False,
    "tru": lambda x, y: True,
}
# The corners of a type, how they lie in registers, and what they are as numbers.
TYPES = {
    "i16": (CORNERS, np.uint32, lambda x: x.astype(np.int16)),
    "u16": (CORNERS, np.uint32, lambda x: x.astype(np.uint16)),
    "i32": (CORNERS, np.uint32, lambda x: x.view(np.int32)),
    "u32": (CORNERS, np.uint32, lambda x: x),
    "i64": (LONG, np.uint64, lambda x: x.view(np.int64)),
    "u64": (LONG, np.uint64, lambda x: x),
    "f16": (FLOATS, np.float16, lambda x: x.astype(np.uint16).view(np.float16)),
    "f32": (FLOATS, np.float32, lambda x: x),
}
COMPARISONS = [
    (kind, name) for kind in TYPES for name in (FLOAT_CONDITIONS if kind.startswith("f") else INTEGER_CONDITIONS)
]


def sources_of(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs of a type's corners, as registers hold them; what lies above float16 does not count."""
    corners, dtype, _ = TYPES[kind]
    x, y = (np.array(column, dtype) for column in zip(*itertools.product(corners, corners), strict=True))
    if kind == "f16":
        return tuple(v.view(np.uint16).astype(np.uint32) | 0x12340000 for v in (x, y))
    return x, y


@pytest.mark.parametrize(("kind", "name"), COMPARISONS)
def test_comparison(kind, name):
    """Bits of inactive lanes are zeros; v_cmpx writes EXEC too."""
    x, y = sources_of(kind)
    numbers = [TYPES[kind][2](v).tolist() for v in (x, y)]
    compare = (FLOAT_CONDITIONS if kind.startswith("f") else INTEGER_CONDITIONS)[name]
    expected = np.array([compare(*row) for row in zip(*numbers, strict=True)])
    assert (evaluate(f"v_cmp_{name}_{kind}_e64 {{out}}, {{a}}, {{b}}", x, y).mask == expected).all()
    active = np.arange(len(x)) % 3 != 0
    code = f"s_mov_b64 exec, {{mask}}\nv_cmpx_{name}_{kind}_e32 vcc, {{a}}, {{b}}\n"
    code += "s_mov_b64 {out}, vcc\nv_mov_b32 {d}, 1"
    found = evaluate(code, x, y, mask=active, old=np.zeros(len(x), np.uint32))
    np.testing.assert_array_equal(found.mask, expected & active)
    np.testing.assert_array_equal(found.word, expected & active)


@pytest.mark.parametrize("kind", ["f16", "f32"])
def test_comparison_takes_modifiers_and_constants(kind):
    x, y = sources_of(kind)
    left, right = (TYPES[kind][2](v).astype(np.float64) for v in (x, y))
    found = evaluate(f"v_cmp_lt_{kind}_e64 {{out}}, -|{{a}}|, {{b}}", x, y)
    np.testing.assert_array_equal(found.mask, -np.abs(left) < right)
    np.testing.assert_array_equal(
        evaluate(f"v_cmp_ge_{kind} vcc, 1.0, {{a}}\ns_mov_b64 {{out}}, vcc", x).mask, 1 >= left
    )


def test_readlane_and_readfirstlane():
    """Of no active lane, lane 0 is the first; readlane does not ask whether a lane is active."""
    x = (np.arange(LANES) * 3 + 5).astype(np.uint32)
    for lane in (0, 1, 31, 63):
        for selector in (f"{lane}", "s40"):
            code = f"s_mov_b32 s40, {lane + 64}\ns_mov_b64 exec, 1\nv_readlane_b32 s41, {{a}}, {selector}"
            found = evaluate(f"{code}\ns_mov_b64 exec, -1\nv_mov_b32 {{d}}, s41", x)
            assert (found.word == x[lane]).all()
        mask = np.arange(LANES) >= lane
        code = "s_mov_b64 exec, {mask}\nv_readfirstlane_b32 s41, {a}\ns_mov_b64 exec, -1\nv_mov_b32 {d}, s41"
        assert (evaluate(code, x, mask=mask).word == x[lane]).all()
    assert (evaluate(code, x, mask=np.zeros(LANES, bool)).word == x[0]).all()


def test_writelane():
    x = np.arange(LANES, dtype=np.uint32)
    code = "s_mov_b32 s40, 77\ns_mov_b32 s41, 9\ns_mov_b64 exec, 1\n"
    code += "v_writelane_b32 {d}, s40, 5\nv_writelane_b32 {d}, -3, s41"
    expected = x.copy()
    expected[5], expected[9] = 77, 2**32 - 3
    np.testing.assert_array_equal(evaluate(code, x, old=x).word, expected)


def test_moves_between_registers():
    x, y = np.arange(LANES, dtype=np.uint32), np.arange(LANES, dtype=np.uint32) + 1000
    mask = x % 3 == 0
    exec_is = "s_mov_b64 exec, {mask}\n"
    code = exec_is + "v_accvgpr_write_b32 a7, {a}\ns_mov_b64 exec, -1\nv_accvgpr_read_b32 {d}, a7"
    np.testing.assert_array_equal(evaluate(code, x, mask=mask).word, np.where(mask, x, 0x7FC0DEAD))
    code = "v_accvgpr_write_b32 a7, {a}\nv_accvgpr_mov_b32 a9, a7\nv_accvgpr_read_b32 {d}, a9"
    np.testing.assert_array_equal(evaluate(code, y).word, y)
    found = evaluate(exec_is + "v_swap_b32 {d}, {a}\ns_mov_b64 exec, -1\nv_mov_b32 v5, {a}", x, old=y, mask=mask)
    np.testing.assert_array_equal(found.words[:, :2], np.where(mask[:, None], np.stack([x, y], 1), np.stack([y, x], 1)))
    low, high = np.stack([x, x + 100], 1), np.stack([y, y + 100], 1)
    for first, second in itertools.product((0, 1), (0, 1)):
        found = evaluate(f"v_pk_mov_b32 {{d}}, {{a}}, {{b}} op_sel:[{first},{second}]", low, high, words=2)
        np.testing.assert_array_equal(found.words[:, :2], np.stack([low[:, first], high[:, second]], 1))


@pytest.mark.parametrize("rows", [16, 32])
def test_permlane_swap(rows):
    """Odd rows of the first register change places with the even rows of the second."""
    x, y = np.arange(LANES, dtype=np.uint32), np.arange(LANES, dtype=np.uint32) + 1000
    found = evaluate(f"v_permlane{rows}_swap_b32 {{d}}, {{a}}\nv_mov_b32 v5, {{a}}", y, old=x).words
    left, right = x.reshape(-1, 2, rows).copy(), y.reshape(-1, 2, rows).copy()
    left[:, 1], right[:, 0] = y.reshape(-1, 2, rows)[:, 0], x.reshape(-1, 2, rows)[:, 1]
    np.testing.assert_array_equal(found[:, 0], left.reshape(-1))
    np.testing.assert_array_equal(found[:, 1], right.reshape(-1))


def test_bpermute_pulls_and_permute_pushes():
    """Addresses are bytes, modulo the wave. What an inactive lane would send is 0; of several the last one counts."""
    rng = np.random.default_rng(2)
    x, lanes = np.arange(LANES, dtype=np.uint32) + 500, rng.integers(0, LANES, LANES)
    address = (4 * lanes + rng.integers(0, 4, LANES) + 256 * rng.integers(0, 3, LANES)).astype(np.uint32)
    active = rng.integers(0, 4, LANES) > 0
    old = np.arange(LANES, dtype=np.uint32)
    exec_is = "s_mov_b64 exec, {mask}\n"
    for offset in (0, 8):
        source = (lanes + offset // 4) % LANES
        pulled = np.where(active, np.where(active[source], x[source], 0), old)
        code = exec_is + f"ds_bpermute_b32 {{d}}, {{a}}, {{b}} offset:{offset}"
        np.testing.assert_array_equal(evaluate(code, address, x, old=old, mask=active).word, pulled)
        pushed = np.zeros(LANES, np.uint32)
        for lane in np.flatnonzero(active):
            pushed[source[lane]] = x[lane]
        code = exec_is + f"ds_permute_b32 {{d}}, {{a}}, {{b}} offset:{offset}"
        found = evaluate(code, address, x, old=old, mask=active).word
        np.testing.assert_array_equal(found, np.where(active, pushed, old))


SWIZZLES = {
    "swizzle(SWAP,4)": lambda lane: lane ^ 4,
    "swizzle(SWAP,16)": lambda lane: lane ^ 16,
    "swizzle(REVERSE,8)": lambda lane: lane // 8 * 8 + 7 - lane % 8,
    "swizzle(BROADCAST,4,2)": lambda lane: lane // 4 * 4 + 2,
    "swizzle(BROADCAST,32,17)": lambda lane: lane // 32 * 32 + 17,
    "swizzle(QUAD_PERM,3,0,0,2)": lambda lane: lane // 4 * 4 + (3, 0, 0, 2)[lane % 4],
    f"{0b00111_00100_11010:#x}": lambda lane: lane // 32 * 32 + (((lane & 0b11010) | 0b00100) ^ 0b00111),
}


@pytest.mark.parametrize("swizzle", SWIZZLES)
def test_swizzle(swizzle):
    """Within 32 lanes, or within 4."""
    x = np.arange(LANES, dtype=np.uint32) + 100
    found = evaluate(f"ds_swizzle_b32 {{d}}, {{a}} offset:{swizzle}", x).word
    np.testing.assert_array_equal(found, [x[SWIZZLES[swizzle](lane)] for lane in range(LANES)])
    active = x % 3 != 0
    code = f"s_mov_b64 exec, {{mask}}\nds_swizzle_b32 {{d}}, {{a}} offset:{swizzle}"
    expected = [x[SWIZZLES[swizzle](lane)] * active[SWIZZLES[swizzle](lane)] for lane in range(LANES)]
    np.testing.assert_array_equal(evaluate(code, x, old=x, mask=active).word, np.where(active, expected, x))
