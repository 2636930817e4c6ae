"""Scalar instructions with their condition code, and jumps, against Python's integers.

What they compute: AMD's "CDNA4 Instruction Set Architecture", SOP1, SOP2, SOPK, SOPC and SOPP.
"""

import itertools

import numpy as np
import pytest
import torch
from assembly import LANES, evaluate, evaluate_scalar, pointer, run

WORDS = [
    0,
    1,
    2,
    5,
    31,
    32,
    63,
    0x7F,
    0x80,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x10000,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    2**32 - 1,
]
WORDS += [0x00050003, 0x001F0010, 0x00200000, 0x00400004, 0x007F001F, 0xDEADBEEF]  # fields, too
LONG = [
    *WORDS[:4],
    31,
    32,
    63,
    2**32 - 1,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 1,
    0xDEADBEEF12345678,
    0x0013002C,
    0x00400000,
]


def signed(x: int, bits: int = 32) -> int:
    x %= 2**bits
    return x - 2**bits if x >= 2 ** (bits - 1) else x


def ones(x: int) -> int:
    return bin(x).count("1")


def first_one(x: int, _bits: int = 32) -> int:
    return (x & -x).bit_length() - 1


def leading(bits: int):
    return lambda x, y, d, c: bits - x.bit_length() if x else -1


def field(x: int, y: int, bits: int) -> int:
    """Return y[22:16] bits from bit y on; of a signed x, those past the last are its sign."""
    first, n = y % bits, (y >> 16) % 128
    return (x >> first) % 2**n


def signed_field(bits: int):
    def extract(x, y, d, c):
        n = (y >> 16) % 128
        return signed(field(signed(x, bits), y, bits), min(n, bits)) if n else 0

    return extract


def overflows(exact: int) -> bool:
    return not -(2**31) <= exact < 2**31


KEPT, NONZERO = "kept", "nonzero"  # what becomes of SCC; else a function of x, y, d, SCC
TWO = {
    "s_add_u32": (lambda x, y, d, c: x + y, lambda x, y, d, c: x + y >= 2**32),
    "s_addc_u32": (lambda x, y, d, c: x + y + c, lambda x, y, d, c: x + y + c >= 2**32),
    "s_sub_u32": (lambda x, y, d, c: x - y, lambda x, y, d, c: x < y),
    "s_subb_u32": (lambda x, y, d, c: x - y - c, lambda x, y, d, c: x < y + c),
    "s_add_i32": (lambda x, y, d, c: x + y, lambda x, y, d, c: overflows(signed(x) + signed(y))),
    "s_sub_i32": (lambda x, y, d, c: x - y, lambda x, y, d, c: overflows(signed(x) - signed(y))),
    "s_mul_i32": (lambda x, y, d, c: x * y, KEPT),
    "s_mul_hi_u32": (lambda x, y, d, c: x * y // 2**32, KEPT),
    "s_mul_hi_i32": (lambda x, y, d, c: signed(x) * signed(y) // 2**32, KEPT),
    "s_and_b32": (lambda x, y, d, c: x & y, NONZERO),
    "s_or_b32": (lambda x, y, d, c: x | y, NONZERO),
    "s_xor_b32": (lambda x, y, d, c: x ^ y, NONZERO),
    "s_andn2_b32": (lambda x, y, d, c: x - (x & y), NONZERO),
    "s_orn2_b32": (lambda x, y, d, c: x | (2**32 - 1 - y), NONZERO),
    "s_lshl_b32": (lambda x, y, d, c: x * 2 ** (y % 32), NONZERO),
    "s_lshr_b32": (lambda x, y, d, c: x // 2 ** (y % 32), NONZERO),
    "s_ashr_i32": (lambda x, y, d, c: signed(x) // 2 ** (y % 32), NONZERO),
    "s_lshl1_add_u32": (lambda x, y, d, c: 2 * x + y, lambda x, y, d, c: 2 * x + y >= 2**32),
    "s_lshl2_add_u32": (lambda x, y, d, c: 4 * x + y, lambda x, y, d, c: 4 * x + y >= 2**32),
    "s_lshl3_add_u32": (lambda x, y, d, c: 8 * x + y, lambda x, y, d, c: 8 * x + y >= 2**32),
    "s_lshl4_add_u32": (lambda x, y, d, c: 16 * x + y, lambda x, y, d, c: 16 * x + y >= 2**32),
    "s_bfm_b32": (lambda x, y, d, c: (2 ** (x % 32) - 1) * 2 ** (y % 32), KEPT),
    "s_bfe_u32": (lambda x, y, d, c: field(x, y, 32), NONZERO),
    "s_bfe_i32": (signed_field(32), NONZERO),
    "s_min_i32": (lambda x, y, d, c: min(signed(x), signed(y)), lambda x, y, d, c: signed(x) < signed(y)),
    "s_max_i32": (lambda x, y, d, c: max(signed(x), signed(y)), lambda x, y, d, c: signed(x) > signed(y)),
    "s_min_u32": (lambda x, y, d, c: min(x, y), lambda x, y, d, c: x < y),
    "s_max_u32": (lambda x, y, d, c: max(x, y), lambda x, y, d, c: x > y),
    "s_pack_ll_b32_b16": (lambda x, y, d, c: x % 2**16 + y % 2**16 * 2**16, KEPT),
    "s_pack_lh_b32_b16": (lambda x, y, d, c: x % 2**16 + y // 2**16 * 2**16, KEPT),
    "s_pack_hh_b32_b16": (lambda x, y, d, c: x // 2**16 + y // 2**16 * 2**16, KEPT),
    "s_cselect_b32": (lambda x, y, d, c: x if c else y, KEPT),
}
ONE = {
    "s_mov_b32": (lambda x, y, d, c: x, KEPT),
    "s_cmov_b32": (lambda x, y, d, c: x if c else d, KEPT),
    "s_not_b32": (lambda x, y, d, c: 2**32 - 1 - x, NONZERO),
    "s_abs_i32": (lambda x, y, d, c: abs(signed(x)), NONZERO),
    "s_brev_b32": (lambda x, y, d, c: int(f"{x:032b}"[::-1], 2), KEPT),
    "s_bcnt1_i32_b32": (lambda x, y, d, c: ones(x), NONZERO),
    "s_ff1_i32_b32": (lambda x, y, d, c: first_one(x), KEPT),
    "s_flbit_i32_b32": (leading(32), KEPT),
    "s_sext_i32_i8": (lambda x, y, d, c: signed(x, 8), KEPT),
    "s_sext_i32_i16": (lambda x, y, d, c: signed(x, 16), KEPT),
    "s_bitset0_b32": (lambda x, y, d, c: d - (d & 2 ** (x % 32)), KEPT),
    "s_bitset1_b32": (lambda x, y, d, c: d | 2 ** (x % 32), KEPT),
}
ALL_ONES = 2**64 - 1
TWO_LONG = {
    "s_and_b64": (lambda x, y, d, c: x & y, NONZERO),
    "s_or_b64": (lambda x, y, d, c: x | y, NONZERO),
    "s_xor_b64": (lambda x, y, d, c: x ^ y, NONZERO),
    "s_andn2_b64": (lambda x, y, d, c: x - (x & y), NONZERO),
    "s_orn2_b64": (lambda x, y, d, c: x | (ALL_ONES - y), NONZERO),
    "s_nand_b64": (lambda x, y, d, c: ALL_ONES - (x & y), NONZERO),
    "s_nor_b64": (lambda x, y, d, c: ALL_ONES - (x | y), NONZERO),
    "s_xnor_b64": (lambda x, y, d, c: ALL_ONES - (x ^ y), NONZERO),
    "s_cselect_b64": (lambda x, y, d, c: x if c else y, KEPT),
}
LONG_BY_WORD = {
    "s_lshl_b64": (lambda x, y, d, c: x * 2 ** (y % 64), NONZERO),
    "s_lshr_b64": (lambda x, y, d, c: x // 2 ** (y % 64), NONZERO),
    "s_ashr_i64": (lambda x, y, d, c: signed(x, 64) // 2 ** (y % 64), NONZERO),
    "s_bfe_u64": (lambda x, y, d, c: field(x, y, 64), NONZERO),
    "s_bfe_i64": (signed_field(64), NONZERO),
}
ONE_LONG = {
    "s_mov_b64": (lambda x, y, d, c: x, KEPT),
    "s_not_b64": (lambda x, y, d, c: ALL_ONES - x, NONZERO),
}
WORD_OF_LONG = {
    "s_bcnt1_i32_b64": (lambda x, y, d, c: ones(x), NONZERO),
    "s_ff1_i32_b64": (lambda x, y, d, c: first_one(x), KEPT),
    "s_flbit_i32_b64": (leading(64), KEPT),
}
# The places in code, the values of x and y, and the bits of the result.
SHAPES = [
    (TWO, "{d}, {x}, {y}", WORDS, WORDS, 32),
    (ONE, "{d}, {x}", WORDS, [0], 32),
    (TWO_LONG, "{d2}, {x2}, {y2}", LONG, LONG, 64),
    (LONG_BY_WORD, "{d2}, {x2}, {y}", LONG, WORDS, 64),
    (ONE_LONG, "{d2}, {x2}", LONG, [0], 64),
    (WORD_OF_LONG, "{d}, {x2}", LONG, [0], 32),
]
CASES = {name: (*meaning, *shape) for meanings, *shape in SHAPES for name, meaning in meanings.items()}


def all_rows(xs, ys) -> list[tuple[int, int, int, int]]:
    """Return x, y, what the destination holds, and SCC."""
    return [(x, y, (x * 7 + y + 3) % 2**64, c) for x, y, c in itertools.product(xs, ys, (0, 1))]


@pytest.mark.parametrize("name", CASES)
def test_scalar(name):
    function, condition, places, xs, ys, bits = CASES[name]
    rows = [(x, y, d % 2**bits, c) for x, y, d, c in all_rows(xs, ys)]
    found = evaluate_scalar(f"{name} {places}", *zip(*rows, strict=True))
    results = np.array([function(*row) % 2**bits for row in rows], np.uint64)
    conditions = {
        KEPT: lambda: [row[3] for row in rows],
        NONZERO: lambda: (results != 0).tolist(),
    }.get(condition, lambda: [condition(*row) for row in rows])()
    np.testing.assert_array_equal(found[:, 0] & (2**bits - 1), results)
    np.testing.assert_array_equal(found[:, 1], conditions)


@pytest.mark.parametrize("constant", [0, 1, 7, 0x7FFF, -1, -0x8000])
def test_scalar_with_a_constant_of_16_bits(constant):
    """The constant is signed, but for comparisons of unsigned numbers."""
    rows = [(x, 0, x, c) for x, c in itertools.product(WORDS, (0, 1))]
    columns = list(zip(*rows, strict=True))
    d = np.array(columns[2], np.int64)
    numbers = np.array([signed(x) for x in columns[2]])
    found = evaluate_scalar(f"s_movk_i32 {{d}}, {constant:#x}", *columns)
    assert (found[:, 0] & (2**32 - 1) == constant % 2**32).all() and (found[:, 1] == columns[3]).all()
    found = evaluate_scalar(f"s_addk_i32 {{d}}, {constant:#x}", *columns)
    np.testing.assert_array_equal(found[:, 0] & (2**32 - 1), (d + constant) % 2**32)
    np.testing.assert_array_equal(found[:, 1], [overflows(n + constant) for n in numbers.tolist()])
    found = evaluate_scalar(f"s_mulk_i32 {{d}}, {constant:#x}", *columns)
    np.testing.assert_array_equal(found[:, 0] & (2**32 - 1), d * constant % 2**32)
    np.testing.assert_array_equal(found[:, 1], columns[3])


COMPARISONS = {
    "eq": lambda x, y: x == y,
    "lg": lambda x, y: x != y,
    "lt": lambda x, y: x < y,
    "le": lambda x, y: x <= y,
    "gt": lambda x, y: x > y,
    "ge": lambda x, y: x >= y,
}
NUMBERS = {"i32": signed, "u32": lambda x: x % 2**32, "u64": lambda x: x}


@pytest.mark.parametrize(
    ("name", "kind"), [*itertools.product(COMPARISONS, ("i32", "u32")), ("eq", "u64"), ("lg", "u64")]
)
def test_scalar_comparison(name, kind):
    number, compare = NUMBERS[kind], COMPARISONS[name]
    values, places = (LONG, "{x2}, {y2}") if kind == "u64" else (WORDS, "{x}, {y}")
    rows = all_rows(values, values)
    found = evaluate_scalar(f"s_cmp_{name}_{kind} {places}", *zip(*rows, strict=True))
    np.testing.assert_array_equal(found[:, 1], [compare(number(x), number(y)) for x, y, _, _ in rows])
    for constant in (0, 5, 0x7FFF, 0x8000, 0xFFFF):
        if kind != "u64":
            found = evaluate_scalar(f"s_cmpk_{name}_{kind} {{x}}, {constant:#x}", *zip(*rows, strict=True))
            other = signed(constant, 16) if kind == "i32" else constant
            np.testing.assert_array_equal(found[:, 1], [compare(number(x), other) for x, *_ in rows])


def test_bits_are_tested():
    for bits, values, place in ((32, WORDS, "{x}"), (64, LONG, "{x2}")):
        rows = all_rows(values, WORDS)
        for wanted in (0, 1):
            found = evaluate_scalar(f"s_bitcmp{wanted}_b{bits} {place}, {{y}}", *zip(*rows, strict=True))
            np.testing.assert_array_equal(found[:, 1], [(x >> y % bits & 1) == wanted for x, y, _, _ in rows])


SAVE_EXEC = {
    "s_and_saveexec_b64": lambda x, exec_: x & exec_,
    "s_or_saveexec_b64": lambda x, exec_: x | exec_,
    "s_xor_saveexec_b64": lambda x, exec_: x ^ exec_,
    "s_andn2_saveexec_b64": lambda x, exec_: x - (x & exec_),
    "s_orn2_saveexec_b64": lambda x, exec_: x | (ALL_ONES - exec_),
}


@pytest.mark.parametrize("name", SAVE_EXEC)
def test_saveexec(name):
    """The destination gets what EXEC was; SCC says whether the new one is not zero."""
    rows = all_rows(LONG, LONG)
    for after, function in (("s_mov_b64 s[80:81], exec", SAVE_EXEC[name]), ("", lambda x, exec_: exec_)):
        code = f"s_mov_b64 exec, {{y2}}\n{name} {{d2}}, {{x2}}\n{after}\ns_mov_b64 exec, -1"
        code += "\ns_mov_b64 {d2}, s[80:81]" if after else ""
        found = evaluate_scalar(code, *zip(*rows, strict=True))
        np.testing.assert_array_equal(found[:, 0], np.array([function(x, y) for x, y, _, _ in rows], np.uint64))
        np.testing.assert_array_equal(found[:, 1], [SAVE_EXEC[name](x, y) != 0 for x, y, _, _ in rows])


# A jump, what sets its condition to {y}, and whether it then jumps.
JUMPS = {
    "s_branch": ("s_nop 0", lambda y: True),
    "s_cbranch_scc0": ("s_cmp_lg_u64 {y2}, 0", lambda y: y == 0),
    "s_cbranch_scc1": ("s_cmp_lg_u64 {y2}, 0", lambda y: y != 0),
    "s_cbranch_vccz": ("s_mov_b64 vcc, {y2}", lambda y: y == 0),
    "s_cbranch_vccnz": ("s_mov_b64 vcc, {y2}", lambda y: y != 0),
    "s_cbranch_execz": ("s_mov_b64 exec, {y2}", lambda y: y == 0),
    "s_cbranch_execnz": ("s_mov_b64 exec, {y2}", lambda y: y != 0),
}


@pytest.mark.parametrize("name", JUMPS)
def test_jumps(name):
    prepare, jumps = JUMPS[name]
    code = f"{prepare}\n s_mov_b32 {{d}}, 1\n{name} over\ns_mov_b32 {{d}}, 2\nover:\ns_mov_b64 exec, -1"
    rows = all_rows([0], LONG)
    found = evaluate_scalar(code, *zip(*rows, strict=True))
    np.testing.assert_array_equal(found[:, 0] & (2**32 - 1), [1 if jumps(y) else 2 for _, y, _, _ in rows])


def test_what_has_no_effect_on_values():
    x = np.arange(LANES, dtype=np.uint32)
    idle = "s_nop 3\ns_sleep 1\ns_setprio 2\ns_icache_inv\ns_dcache_wb\nv_nop\ns_barrier\n"
    idle += "buffer_wbl2 sc1\nbuffer_inv sc1\n"
    np.testing.assert_array_equal(evaluate(idle + "v_mov_b32 {d}, {a}", x).word, x)


def test_clocks_do_not_go_back():
    for name in ("s_memtime", "s_memrealtime"):
        code = f"{name} s[72:73]\ns_nop 9\n{name} s[74:75]\ns_waitcnt lgkmcnt(0)\ns_sub_u32 {{d}}, s74, s72"
        found = evaluate_scalar(code, [0], [0], [0], [0])
        assert 0 < found[0, 0] & (2**32 - 1) < 1000


@pytest.mark.parametrize("words", [1, 2, 4, 8, 16])
def test_scalar_loads(words):
    """Offsets are constants or a register and a constant; the last two bits of an address do not count."""
    x, out = torch.arange(64, dtype=torch.int32), torch.zeros(2, words, dtype=torch.int32)
    size = f"x{words}" if words > 1 else ""
    copies = "".join(
        f"v_mov_b32 v{2 + k}, s{64 + k}\nglobal_store_dword v1, v{2 + k}, {pointer(1)} offset:{4 * k}\n"
        for k in range(words)
    )
    targets = f"s[64:{63 + words}]" if words > 1 else "s64"
    run(
        f"""
        s_load_dword{size} {targets}, {pointer(0)}, 0xc
        v_mov_b32 v1, 0
        s_mov_b32 s20, 0x22
        s_waitcnt lgkmcnt(0)
        {copies}
        s_load_dword{size} {targets}, {pointer(0)}, s20 offset:0x14
        s_waitcnt lgkmcnt(0)
        v_mov_b32 v1, {4 * words}
        {copies}""",
        x,
        out,
    )
    assert torch.equal(out, torch.stack([x[3 : 3 + words], x[13 : 13 + words]]))
