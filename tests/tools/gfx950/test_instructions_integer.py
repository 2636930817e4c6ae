"""Integer vector instructions, and forms that choose parts of words or lanes, against Python's integers.

What they compute: AMD's "CDNA4 Instruction Set Architecture", VOP1, VOP2 and VOP3; the chapter "SDWA and DPP" for those
forms. Upper halves of 16-bit results are zeros: LLVM's GCNSubtarget::zeroesHigh16BitsOfDest.
"""

import inspect
import itertools
import random

import numpy as np
import pytest
from assembly import LANES, evaluate

FULL = 2**32 - 1
CORNERS = [
    *(
        0,
        1,
        2,
        3,
        7,
        15,
        16,
        31,
        32,
        33,
        63,
        64,
        127,
        128,
        255,
        256,
        0x7FFF,
        0x8000,
        0xFFFF,
        0x10000,
        0x7FFFFF,
        0x800000,
    ),
    *(0xFFFFFF, 0x1000000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFF8000, 0xFFFFFFFE, FULL, 0xAAAAAAAA, 0xDEADBEEF),
]


def signed(value: int, bits: int = 32) -> int:
    """Return the low bits as a number in two's complement."""
    value %= 2**bits
    return value - 2**bits if value >= 2 ** (bits - 1) else value


def bits_of(value: int, bits: int = 32) -> str:
    """Return binary digits, the lowest first."""
    return f"{value:0{bits}b}"[::-1]


def clamped(value: int) -> int:
    return min(max(value, 0), FULL)


def leading_zeros(value: int) -> int:
    return FULL if value == 0 else 32 - value.bit_length()


def bytes_of(value: int, n: int) -> list[int]:
    return list(value.to_bytes(n, "little"))


def permuted(a: int, b: int, selectors: int) -> int:
    """Return the bytes of a and b that the selectors name: 8 to 11 are signs of halves, 12 zeros, above it ones."""
    table = bytes_of(b | a << 32, 8)
    table += [255 * (table[1 + 2 * half] >= 128) for half in range(4)] + [0] + [255] * 243
    return int.from_bytes(bytes(table[s] for s in bytes_of(selectors, 4)), "little")


def field(value: int, first: int, n: int) -> int:
    return value // 2**first % 2**n


WORDS = {
    "v_mov_b32": lambda a: a,
    "v_not_b32": lambda a: FULL - a,
    "v_bfrev_b32": lambda a: int(bits_of(a), 2),
    "v_add_u32": lambda a, b: a + b,
    "v_sub_u32": lambda a, b: a - b,
    "v_subrev_u32": lambda a, b: b - a,
    "v_and_b32": lambda a, b: a + b - (a | b),
    "v_or_b32": lambda a, b: a + b - (a & b),
    "v_xor_b32": lambda a, b: (a | b) - (a & b),
    "v_xnor_b32": lambda a, b: FULL - (a | b) + (a & b),
    "v_lshlrev_b32": lambda a, b: b * 2 ** (a % 32),
    "v_lshrrev_b32": lambda a, b: b // 2 ** (a % 32),
    "v_ashrrev_i32": lambda a, b: signed(b) // 2 ** (a % 32),
    "v_min_i32": lambda a, b: min(signed(a), signed(b)),
    "v_max_i32": lambda a, b: max(signed(a), signed(b)),
    "v_min_u32": lambda a, b: min(a, b),
    "v_max_u32": lambda a, b: max(a, b),
    "v_min3_i32": lambda a, b, c: min(map(signed, (a, b, c))),
    "v_max3_i32": lambda a, b, c: max(map(signed, (a, b, c))),
    "v_med3_i32": lambda a, b, c: sorted(map(signed, (a, b, c)))[1],
    "v_min3_u32": lambda a, b, c: min(a, b, c),
    "v_max3_u32": lambda a, b, c: max(a, b, c),
    "v_mul_lo_u32": lambda a, b: a * b,
    "v_mul_hi_u32": lambda a, b: a * b // 2**32,
    "v_mul_hi_i32": lambda a, b: signed(a) * signed(b) // 2**32,
    "v_mul_u32_u24": lambda a, b: a % 2**24 * (b % 2**24),
    "v_mul_i32_i24": lambda a, b: signed(a, 24) * signed(b, 24),
    "v_mad_u32_u24": lambda a, b, c: a % 2**24 * (b % 2**24) + c,
    "v_mad_i32_i24": lambda a, b, c: signed(a, 24) * signed(b, 24) + signed(c),
    "v_add3_u32": lambda a, b, c: a + b + c,
    "v_xad_u32": lambda a, b, c: (a ^ b) + c,
    "v_lshl_add_u32": lambda a, b, c: a * 2 ** (b % 32) + c,
    "v_add_lshl_u32": lambda a, b, c: (a + b) * 2 ** (c % 32),
    "v_lshl_or_b32": lambda a, b, c: a * 2 ** (b % 32) % 2**32 | c,
    "v_and_or_b32": lambda a, b, c: a & b | c,
    "v_or3_b32": lambda a, b, c: a | b | c,
    "v_bfe_u32": lambda a, b, c: field(a, b % 32, c % 32),
    "v_bfe_i32": lambda a, b, c: signed(signed(a) >> b % 32, c % 32) if c % 32 else 0,
    "v_bfi_b32": lambda a, b, c: sum(2**k * ((b if a >> k & 1 else c) >> k & 1) for k in range(32)),
    "v_bfm_b32": lambda a, b: (2 ** (a % 32) - 1) * 2 ** (b % 32),
    "v_alignbit_b32": lambda a, b, c: (a * 2**32 + b) // 2 ** (c % 32),
    "v_alignbyte_b32": lambda a, b, c: (a * 2**32 + b) // 256 ** (c % 4),
    "v_perm_b32": permuted,
    "v_bcnt_u32_b32": lambda a, b: bits_of(a).count("1") + b,
    "v_ffbh_u32": leading_zeros,
    "v_ffbl_b32": lambda a: bits_of(a).find("1"),
    "v_add_u16": lambda a, b: (a + b) % 2**16,
    "v_sub_u16": lambda a, b: (a - b) % 2**16,
    "v_mul_lo_u16": lambda a, b: a * b % 2**16,
    "v_mad_u16": lambda a, b, c: (a * b + c) % 2**16,
    "v_lshlrev_b16": lambda a, b: b * 2 ** (a % 16) % 2**16,
    "v_lshrrev_b16": lambda a, b: b % 2**16 // 2 ** (a % 16),
    "v_ashrrev_i16": lambda a, b: signed(b, 16) // 2 ** (a % 16) % 2**16,
    "v_max_i16": lambda a, b: max(signed(a, 16), signed(b, 16)) % 2**16,
    "v_min_i16": lambda a, b: min(signed(a, 16), signed(b, 16)) % 2**16,
    "v_max_u16": lambda a, b: max(a % 2**16, b % 2**16),
    "v_min_u16": lambda a, b: min(a % 2**16, b % 2**16),
    "v_pack_b32_f16": lambda a, b: a % 2**16 + b % 2**16 * 2**16,
}
PAIRS = {
    "v_mov_b64": ("{a}", lambda a: a, 2),
    "v_lshl_add_u64": ("{a}, {b}, {c}", lambda a, b, c: a * 2 ** (b % 8) + c, 212),
    "v_lshlrev_b64": ("{a}, {b}", lambda a, b: b * 2 ** (a % 64), 12),
    "v_lshrrev_b64": ("{a}, {b}", lambda a, b: b // 2 ** (a % 64), 12),
    "v_ashrrev_i64": ("{a}, {b}", lambda a, b: signed(b, 64) // 2 ** (a % 64), 12),
    "v_mad_u64_u32": ("{a}, {b}, {c}", lambda a, b, c: a * b + c, 112),
    "v_mad_i64_i32": ("{a}, {b}, {c}", lambda a, b, c: signed(a) * signed(b) + signed(c, 64), 112),
}
CARRIES = {
    "v_add_co_u32": lambda a, b, carry: a + b,
    "v_addc_co_u32": lambda a, b, carry: a + b + carry,
    "v_sub_co_u32": lambda a, b, carry: a - b,
    "v_subb_co_u32": lambda a, b, carry: a - b - carry,
    "v_subrev_co_u32": lambda a, b, carry: b - a,
    "v_subbrev_co_u32": lambda a, b, carry: b - a - carry,
}


def tuples(n: int, size: int = 1024) -> np.ndarray:
    """Return corner values in all pairs, or many triples of them and of random numbers, uint32 [values, n]."""
    random.seed(n)
    if n == 1:
        return np.array([[x] for x in CORNERS + random.choices(range(2**32), k=96)], np.uint32)
    if n == 2:
        return np.array(list(itertools.product(CORNERS, CORNERS)), np.uint32)
    some = [random.choices(CORNERS, k=n) for _ in range(size)]
    return np.array([[random.choice((x, x, random.getrandbits(32))) for x in row] for row in some], np.uint32)


def expected(function, rows: np.ndarray, bits: int = 32) -> np.ndarray:
    return np.array([function(*row) % 2**bits for row in rows.tolist()], np.uint64)


def sources_of(function, letters: str = "abc") -> tuple[int, str]:
    """Return the number of a function's arguments and their places in code."""
    n = len(inspect.signature(function).parameters)
    return n, ", ".join(f"{{{letter}}}" for letter in letters[:n])


@pytest.mark.parametrize("name", WORDS)
def test_words(name):
    n, places = sources_of(WORDS[name])
    rows = tuples(n)
    found = evaluate(f"{name} {{d}}, {places}", *rows.T)
    np.testing.assert_array_equal(found.word, expected(WORDS[name], rows))


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name):
    """A digit for each source says how many words it has."""
    places, function, digits = PAIRS[name]
    sizes = [int(digit) for digit in str(digits)]
    rows = [x[:700] for x in tuples(6).T]
    sources, used = [], 0
    for size in sizes:
        sources.append(np.stack(rows[used : used + size], 1))
        used += size
    numbers = [[sum(int(word) << 32 * k for k, word in enumerate(row)) for row in source] for source in sources]
    exact = [function(*row) for row in zip(*numbers, strict=True)]
    has_carry = name.startswith("v_mad")
    found = evaluate(f"{name} {{d}}, {'{out}, ' * has_carry}{places}", *sources, words=2)
    np.testing.assert_array_equal(found.pair, np.array([x % 2**64 for x in exact], np.uint64))
    if has_carry:
        np.testing.assert_array_equal(found.mask, [bool(x >> 64 & 1) for x in exact])


@pytest.mark.parametrize("name", CARRIES)
def test_carries(name):
    """The carry is bit 32 of an exact sum, and whether an exact difference is negative; inactive lanes have none."""
    rows = tuples(2)
    carry = np.arange(len(rows)) % 3 == 0
    takes_carry = name.startswith(("v_addc", "v_subb_", "v_subbrev"))
    active = np.arange(len(rows)) % 5 != 0
    code = f"{name} {{d}}, {{out}}, {{a}}, {{b}}{', {mask}' * takes_carry}"
    found = evaluate(code, *rows.T, mask=carry)
    exact = [CARRIES[name](*row, int(c)) for row, c in zip(rows.tolist(), carry, strict=True)]
    np.testing.assert_array_equal(found.word, np.array([x % 2**32 for x in exact]))
    np.testing.assert_array_equal(found.mask, [not 0 <= x < 2**32 for x in exact])
    if not takes_carry:
        found = evaluate(f"s_mov_b64 exec, {{mask}}\n{code}", *rows.T, mask=active)
        np.testing.assert_array_equal(found.mask, active & [not 0 <= x < 2**32 for x in exact])


@pytest.mark.parametrize("name", ["v_add_u32", "v_sub_u32"])
def test_integer_clamp(name):
    rows = tuples(2)
    found = evaluate(f"{name}_e64 {{d}}, {{a}}, {{b}} clamp", *rows.T)
    sign = 1 if name == "v_add_u32" else -1
    np.testing.assert_array_equal(found.word, [clamped(a + sign * b) for a, b in rows.tolist()])


@pytest.mark.parametrize("table", [*range(0, 256, 15), 0x6A, 0xC8])
def test_bitop3(table):
    """Bit 4a + 2b + c of the table is the result where the sources' bits are a, b and c."""
    rows = tuples(3, 200)
    bits = [[int(bit) for bit in bits_of(table, 8)]] * len(rows)
    whole = [
        sum(choice[4 * (a >> k & 1) + 2 * (b >> k & 1) + (c >> k & 1)] << k for k in range(32))
        for choice, (a, b, c) in zip(bits, rows.tolist(), strict=True)
    ]
    for name, modulus in (("v_bitop3_b32", 2**32), ("v_bitop3_b16", 2**16)):
        found = evaluate(f"{name} {{d}}, {{a}}, {{b}}, {{c}} bitop3:{table:#x}", *rows.T)
        np.testing.assert_array_equal(found.word, np.array(whole) % modulus)


def test_mbcnt_counts_a_masks_bits_below_the_lane():
    mask = 0xDEADBEEF12345678
    low, high = (np.full(LANES, mask >> shift & FULL, np.uint32) for shift in (0, 32))
    start = np.arange(LANES, dtype=np.uint32) * 7
    found = evaluate("v_mbcnt_lo_u32_b32 {x0}, {a}, {c}\nv_mbcnt_hi_u32_b32 {d}, {b}, {x0}", low, high, start)
    count = [bits_of(mask, 64)[:lane].count("1") for lane in range(LANES)]
    np.testing.assert_array_equal(found.word, start + np.array(count))


def test_literals_and_scalars_are_the_same_in_all_lanes():
    x = tuples(1)[:, 0]
    for text, value in (
        ("0x12345678", 0x12345678),
        ("-16", -16),
        ("64", 64),
        ("1.0", 0x3F800000),
        ("-4.0", 0xC0800000),
    ):
        found = evaluate(f"s_mov_b32 s40, {text}\nv_add_u32 {{d}}, s40, {{a}}\nv_xor_b32 {{d}}, {text}, {{d}}", x)
        np.testing.assert_array_equal(found.word, [(int(a) + value) % 2**32 ^ value % 2**32 for a in x])


# ---- which lanes, which parts ----
def test_inactive_lanes_keep_their_value():
    x, y = tuples(2)[:256].T
    old, active = np.arange(256, dtype=np.uint32), np.arange(256) % 7 < 3
    exec_is = "s_mov_b64 exec, {mask}\n"
    found = evaluate(exec_is + "v_add_u32 {d}, {a}, {b}", x, y, old=old, mask=active)
    np.testing.assert_array_equal(found.word, np.where(active, x + y, old))
    wide = np.stack([old, old + 1], 1)
    found = evaluate(exec_is + "v_lshlrev_b64 {d}, 0, {a}", np.stack([x, y], 1), words=2, old=wide, mask=active)
    np.testing.assert_array_equal(found.words[:, :2], np.where(active[:, None], np.stack([x, y], 1), wide))


def test_cndmask_takes_the_second_source_where_the_mask_is_set():
    x, y = tuples(2)[:256].T
    mask = np.arange(256) % 3 == 1
    for code in ("v_cndmask_b32_e64 {d}, {a}, {b}, {mask}", "s_mov_b64 vcc, {mask}\nv_cndmask_b32 {d}, {a}, {b}, vcc"):
        np.testing.assert_array_equal(evaluate(code, x, y, mask=mask).word, np.where(mask, y, x))


PARTS = {"DWORD": (0, 32), "WORD_0": (0, 16), "WORD_1": (16, 16), **{f"BYTE_{k}": (8 * k, 8) for k in range(4)}}


@pytest.mark.parametrize("part", PARTS)
def test_sdwa_selects_a_part_of_each_source(part):
    x, y = tuples(2).T
    first, n = PARTS[part]
    code = "v_add_u32_sdwa {{d}}, {left}, {{b}} dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:{part} src1_sel:{other}"
    for other, (other_first, other_n) in PARTS.items():
        right = [field(b, other_first, other_n) for b in y.tolist()]
        for left, value in (("{a}", lambda v: v), ("sext({a})", lambda v: signed(v, n))):
            found = evaluate(code.format(left=left, part=part, other=other), x, y)
            exact = [value(field(a, first, n)) + b for a, b in zip(x.tolist(), right, strict=True)]
            np.testing.assert_array_equal(found.word, np.array(exact) % 2**32)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("unused", ["UNUSED_PAD", "UNUSED_SEXT", "UNUSED_PRESERVE"])
def test_sdwa_places_the_result_in_a_part(part, unused):
    """Bits below the part are zeros, those above it zeros or the part's sign, or all others are kept."""
    x, y = tuples(2).T
    first, n = PARTS[part]
    code = f"v_xor_b32_sdwa {{d}}, {{a}}, {{b}} dst_sel:{part} dst_unused:{unused} src0_sel:DWORD src1_sel:DWORD"
    found = evaluate(code, x, y, old=y)
    results = []
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        value = (a ^ b) % 2**n
        if unused == "UNUSED_SEXT":
            results.append(signed(value, n) * 2**first % 2**32)
        else:
            kept = b - field(b, first, n) * 2**first if unused == "UNUSED_PRESERVE" else 0
            results.append(kept + value * 2**first)
    np.testing.assert_array_equal(found.word, results)


def test_sdwa_compare():
    x, y = tuples(2).T
    found = evaluate("v_cmp_lt_u32_sdwa {out}, {a}, {b} src0_sel:BYTE_1 src1_sel:WORD_1", x, y)
    np.testing.assert_array_equal(found.mask, [field(a, 8, 8) < field(b, 16, 16) for a, b in zip(x, y, strict=True)])


NONE = -1
DPP = {
    "quad_perm:[1,3,0,2]": lambda lane: lane // 4 * 4 + (1, 3, 0, 2)[lane % 4],
    **{f"row_shl:{n}": lambda lane, n=n: lane + n if lane % 16 + n < 16 else NONE for n in (1, 5, 15)},
    **{f"row_shr:{n}": lambda lane, n=n: lane - n if lane % 16 >= n else NONE for n in (1, 5, 15)},
    **{f"row_ror:{n}": lambda lane, n=n: lane // 16 * 16 + (lane - n) % 16 for n in (1, 5, 15)},
    "row_mirror": lambda lane: lane // 16 * 16 + 15 - lane % 16,
    "row_half_mirror": lambda lane: lane // 8 * 8 + 7 - lane % 8,
    "row_bcast:15": lambda lane: lane // 16 * 16 - 1 if lane >= 16 else NONE,
    "row_bcast:31": lambda lane: 31 if lane >= 32 else NONE,
    "row_newbcast:6": lambda lane: lane // 16 * 16 + 6,
    "wave_shl:1": lambda lane: lane + 1 if lane < 63 else NONE,
    "wave_shr:1": lambda lane: lane - 1,
    "wave_rol:1": lambda lane: (lane + 1) % 64,
    "wave_ror:1": lambda lane: (lane - 1) % 64,
}


@pytest.mark.parametrize("control", DPP)
@pytest.mark.parametrize("rest", ["row_mask:0xf bank_mask:0xf", "row_mask:0xa bank_mask:0x7 bound_ctrl:0"])
@pytest.mark.parametrize("active", [2**64 - 1, 0xFFFF0F0FFEDCBA98], ids=["whole", "holes"])
def test_dpp(control, rest, active):
    """A lane without a source, or with an inactive one, keeps its value; with bound_ctrl it takes a zero."""
    x, y, old = np.arange(LANES) + 100, np.arange(LANES) * 1000, np.arange(LANES) + 7
    is_active = np.array([active >> lane & 1 for lane in range(LANES)], bool)
    row_mask, bank_mask = (0xA, 0x7) if "bound" in rest else (0xF, 0xF)
    results = []
    for lane in range(LANES):
        source = DPP[control](lane)
        has_source = source != NONE and is_active[source]
        is_written = row_mask >> lane // 16 & 1 and bank_mask >> lane % 16 // 4 & 1 and is_active[lane]
        if is_written and (has_source or "bound" in rest):
            results.append((x[source] if has_source else 0) + y[lane])
        else:
            results.append(old[lane])
    code = f"s_mov_b64 exec, {{mask}}\nv_add_u32_dpp {{d}}, {{a}}, {{b}} {control} {rest}"
    found = evaluate(code, *(v.astype(np.uint32) for v in (x, y)), old=old.astype(np.uint32), mask=is_active)
    np.testing.assert_array_equal(found.word, results)
