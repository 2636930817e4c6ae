"""float32 vector instructions, against numpy and exact fractions.

What they compute: AMD's "CDNA4 Instruction Set Architecture", VOP1, VOP2, VOP3 and VOP3P, with the modes that Triton
sets: denormals are kept, IEEE_MODE and DX10_CLAMP are on. Transcendental instructions flush denormals and are right to
an ulp. Division is LLVM's sequence for a correctly rounded quotient (SITargetLowering::LowerFDIV32).
"""

import inspect
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from assembly import evaluate
from exact import LARGEST, SMALLEST_NORMAL, TINY, assert_floats, fused, near_floats, random_floats, rounded

MAGNITUDES = [
    *(
        0.0,
        TINY,
        3 * TINY,
        SMALLEST_NORMAL - TINY,
        SMALLEST_NORMAL,
        2.0**-125,
        2.0**-64,
        1e-10,
        0.1,
        0.5,
        1.0 - 2.0**-24,
    ),
    *(
        1.0,
        1.0 + 2.0**-23,
        1.5,
        2.0,
        2.5,
        3.0,
        16777215.0,
        2.0**31,
        2.0**32,
        2.0**64,
        1.7e38,
        2.0**127,
        LARGEST,
        math.inf,
    ),
]
CORNERS = np.array([*MAGNITUDES, *(-x for x in MAGNITUDES), math.nan], np.float32)


@pytest.fixture(autouse=True)
def without_warnings():
    with np.errstate(all="ignore"):
        yield


def rows_of(n: int) -> np.ndarray:
    """Return rows of n operands: corners in all pairs, some triples, and random ones."""
    if n == 1:
        return np.concatenate([CORNERS, random_floats(500), near_floats(500)])[:, None]
    pairs = np.array(list(itertools.product(CORNERS, CORNERS)), np.float32)
    if n == 3:
        rng = np.random.default_rng(0)
        pairs = np.concatenate([np.concatenate([pairs, rng.permutation(pairs)[:, :1]], 1)] * 2)
        pairs = np.concatenate([pairs, rng.choice(CORNERS, (1000, 3))])
    more = [np.stack([make(400, seed) for seed in range(n)], 1) for make in (random_floats, near_floats)]
    return np.concatenate([pairs, *more])


def fmas(a, b, c) -> np.ndarray:
    return np.array([fused(*map(float, row)) for row in zip(a, b, c, strict=True)], np.float32)


def by_order(*values: np.ndarray) -> np.ndarray:
    """Return rows in order, -0 before 0, NaN last."""
    stacked = np.stack(values, 1)
    keys = np.where(np.signbit(stacked) & (stacked == 0), -TINY / 2, stacked.astype(np.float64))
    return np.take_along_axis(stacked, np.argsort(keys, 1, kind="stable"), 1)


def smallest(*values):
    return by_order(*values)[:, 0]


def largest(*values):
    """Return the largest that is not NaN."""
    return -by_order(*(-value for value in values))[:, 0]


def middle(a, b, c):
    """Return the median; the smallest if one is NaN."""
    has_nan = np.isnan(a) | np.isnan(b) | np.isnan(c)
    return np.where(has_nan, smallest(a, b, c), by_order(a, b, c)[:, 1])


def or_nan(function):
    return lambda a, b, c: np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), np.float32(math.nan), function(a, b, c))


def legacy_product(a, b):
    return np.where((a == 0) | (b == 0), np.float32(0), a * b)


def fraction_of(a):
    return np.minimum(a - np.floor(a), np.float32(1 - 2.0**-24))


FLOATS = {
    "v_add_f32": lambda a, b: a + b,
    "v_sub_f32": lambda a, b: a - b,
    "v_subrev_f32": lambda a, b: b - a,
    "v_mul_f32": lambda a, b: a * b,
    "v_mul_legacy_f32": legacy_product,
    "v_fma_f32": fmas,
    "v_max_f32": largest,
    "v_min_f32": smallest,
    "v_max3_f32": largest,
    "v_min3_f32": smallest,
    "v_med3_f32": middle,
    "v_maximum3_f32": or_nan(largest),
    "v_minimum3_f32": or_nan(smallest),
    "v_floor_f32": np.floor,
    "v_ceil_f32": np.ceil,
    "v_trunc_f32": np.trunc,
    "v_rndne_f32": np.rint,
    "v_fract_f32": fraction_of,
    "v_frexp_mant_f32": lambda a: np.frexp(a)[0],
}
N_SOURCES = {"v_max3_f32": 3, "v_min3_f32": 3, "v_maximum3_f32": 3, "v_minimum3_f32": 3, "v_max_f32": 2, "v_min_f32": 2}
N_SOURCES |= dict.fromkeys(("v_floor_f32", "v_ceil_f32", "v_trunc_f32", "v_rndne_f32"), 1)


@pytest.mark.parametrize("name", FLOATS)
def test_floats(name):
    function = FLOATS[name]
    n = N_SOURCES.get(name) or len(inspect.signature(function).parameters)
    rows = list(np.ascontiguousarray(rows_of(n).T))
    places = ", ".join(("{a}", "{b}", "{c}")[:n])
    expected = function(*rows)
    assert_floats(evaluate(f"{name} {{d}}, {places}", *rows).float32, expected, *rows)


@pytest.mark.parametrize(
    "code",
    ["v_fmac_f32 {d}, {a}, {b}", "v_fmamk_f32 {d}, {a}, 0x40490fdb, {b}", "v_fmaak_f32 {d}, {a}, {b}, 0x40490fdb"],
)
def test_fma_with_a_literal_or_the_destination(code):
    a, b, c = np.ascontiguousarray(rows_of(3).T)
    pi = np.full_like(a, np.float32(math.pi))
    factors = {"v_fmac": (a, b, c), "v_fmam": (a, pi, b), "v_fmaa": (a, b, pi)}[code[:6]]
    assert_floats(evaluate(code, a, b, old=c).float32, fmas(*factors), *factors)


@pytest.mark.parametrize("name", ["v_max_f32", "v_min_f32"])
def test_a_signalling_nan_wins_and_becomes_quiet(name):
    """In IEEE mode; a quiet one loses against a number."""
    signalling, quiet, number = (np.array([bits], np.uint32) for bits in (0x7F800001, 0x7FC00001, 0x3F800000))
    for pair in ((signalling, number), (number, signalling)):
        assert evaluate(f"{name} {{d}}, {{a}}, {{b}}", *pair).word == 0x7FC00001
    assert evaluate(f"{name} {{d}}, {{a}}, {{b}}", quiet, number).word == number


def flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(0.0, x), x)


TRANSCENDENTAL = {
    "v_exp_f32": np.exp2,
    "v_log_f32": np.log2,
    "v_rcp_f32": lambda x: 1 / x,
    "v_rcp_iflag_f32": lambda x: 1 / x,
    "v_rsq_f32": lambda x: 1 / np.sqrt(x),
    "v_sqrt_f32": np.sqrt,
}


@pytest.mark.parametrize("name", TRANSCENDENTAL)
def test_transcendental_are_right_to_an_ulp(name):
    (x,) = np.ascontiguousarray(rows_of(1).T)
    expected = TRANSCENDENTAL[name](flushed(x.astype(np.float64)))
    expected = np.where(name in ("v_exp_f32", "v_rcp_f32", "v_rcp_iflag_f32"), flushed(expected), expected)
    nearest = expected.astype(np.float32)
    found = evaluate(f"{name} {{d}}, {{a}}", x).float32
    special = ~np.isfinite(nearest) | (nearest == 0)
    assert_floats(found[special], nearest[special], x[special])
    error = np.abs(found[~special].astype(np.float64) - expected[~special])
    assert (error <= np.spacing(np.abs(nearest[~special]))).all()


DIVISION = """
    v_div_scale_f32 {x0}, s[24:25], {b}, {b}, {a}
    v_div_scale_f32 {x1}, vcc, {a}, {b}, {a}
    v_rcp_f32 {x2}, {x0}
    v_fma_f32 {x3}, -{x0}, {x2}, 1.0
    v_fmac_f32 {x2}, {x3}, {x2}
    v_mul_f32 {x4}, {x1}, {x2}
    v_fma_f32 {x5}, -{x0}, {x4}, {x1}
    v_fmac_f32 {x4}, {x5}, {x2}
    v_fma_f32 {x0}, -{x0}, {x4}, {x1}
    v_div_fmas_f32 {x0}, {x0}, {x2}, {x4}
    v_div_fixup_f32 {d}, {x0}, {b}, {a}"""


def quotients() -> tuple[np.ndarray, np.ndarray]:
    """Return numerators and denominators; half of the random ones have denormal or nearly infinite quotients."""
    rows = rows_of(2)
    x, y = random_floats(4000, 5), random_floats(4000, 6)
    near_ends = np.random.default_rng(7).choice([-151, -149, -140, -127, -126, 126, 127, 128], 4000)
    third = (x * (y / x)).astype(np.float32), (y / np.float32(2.0) ** near_ends).astype(np.float32)
    return np.concatenate([rows[:, 0], x, third[0]]), np.concatenate([rows[:, 1], y, third[1]])


def test_division_is_rounded_once():
    x, y = quotients()
    expected = x / y
    is_denormal = (np.abs(expected) < SMALLEST_NORMAL) & (expected != 0)
    assert is_denormal.sum() > 500 and np.isinf(expected).sum() > 500
    assert_floats(evaluate(DIVISION, x, y).float32, expected, x, y)


def test_division_by_parts():
    """What v_div_scale_f32 does in the cases that the ISA document lists."""
    big, small = 2.0**100, 2.0**-100
    cases = [  # denominator, numerator, the scaled denominator and numerator, whether the quotient is scaled back
        (1.0, 3.0, 1.0, 3.0, False),
        (1.0, 2.0**95, 1.0, 2.0**95, False),
        (1.0, 2.0**96, 2.0**64, 2.0**96, True),
        (small, big, small * 2.0**64, big, True),  # a quotient near the largest
        (2.0**-130, 2.0**-60, 2.0**-66, 16.0, False),  # a denormal denominator
        (2.0**127, 2.0**20, 2.0**63, 2.0**-44, False),  # a denormal reciprocal
        (2.0**127, 1.0, 2.0**63, 1.0, True),  # a denormal reciprocal and quotient
        (big, small, big, small * 2.0**64, True),  # a denormal quotient
        (1.0, 2.0**-110, 2.0**64, 2.0**-46, False),  # a tiny numerator
        (0.0, 1.0, math.nan, math.nan, False),
        (1.0, 0.0, math.nan, math.nan, False),
    ]
    denominator, numerator, *scaled, back = (np.array(column) for column in zip(*cases, strict=True))
    y, x = denominator.astype(np.float32), numerator.astype(np.float32)
    for first, expected in zip("ba", scaled, strict=True):
        found = evaluate(f"v_div_scale_f32 {{d}}, {{out}}, {{{first}}}, {{b}}, {{a}}", x, y)
        assert_floats(found.float32, expected, y, x)
        np.testing.assert_array_equal(found.mask, back)


def test_frexp_and_ldexp():
    (x,) = np.ascontiguousarray(rows_of(1).T)
    exponents = np.where(np.isfinite(x), np.frexp(x)[1], 0)
    np.testing.assert_array_equal(evaluate("v_frexp_exp_i32_f32 {d}, {a}", x).word.view(np.int32), exponents)
    for shift in (0, 1, -1, 23, -24, 126, -126, 200, -200, 2**31 - 1, -(2**31)):
        expected = np.ldexp(x.astype(np.float64), np.clip(shift, -1000, 1000)).astype(np.float32)
        found = evaluate("v_ldexp_f32 {d}, {a}, {b}", x, np.full(len(x), shift, np.int32))
        assert_floats(found.float32, expected, x)


def test_conversions_to_integers_truncate_and_saturate():
    half = np.array(
        [0.5, 0.999, 1.999, 2147483520.0, 4294967040.0, -0.5, -1.999, -2147483648.0, -(2.0**40)], np.float32
    )
    x = np.concatenate([half, rows_of(1)[:, 0]])
    for name, low, high in (("v_cvt_i32_f32", -(2**31), 2**31 - 1), ("v_cvt_u32_f32", 0, 2**32 - 1)):
        expected = [0 if math.isnan(v) else int(min(max(v, low), high)) % 2**32 for v in x.tolist()]
        np.testing.assert_array_equal(evaluate(f"{name} {{d}}, {{a}}", x).word, expected)


def test_conversions_from_integers_round_to_nearest():
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [rng.integers(0, 2**32, 500), 2**24 + np.arange(9), 2**31 - np.arange(200), 2**32 - 1 - np.arange(200)]
    )
    x = x.astype(np.uint32)
    for name, values in (("v_cvt_f32_u32", x.tolist()), ("v_cvt_f32_i32", x.view(np.int32).tolist())):
        expected = np.array([rounded(Fraction(v)) for v in values])
        assert_floats(evaluate(f"{name} {{d}}, {{a}}", x).float32, expected, x)
    for k in range(4):
        found = evaluate(f"v_cvt_f32_ubyte{k} {{d}}, {{a}}", x).float32
        assert_floats(found, x.view(np.uint8).reshape(-1, 4)[:, k], x)


def test_source_modifiers_and_clamp():
    a, b = np.ascontiguousarray(rows_of(2).T)
    cases = {"-{a}, |{b}|": -a + abs(b), "-|{a}|, {b}": -abs(a) + b, "{a}, -{b}": a - b}
    for sources, expected in cases.items():
        assert_floats(evaluate(f"v_add_f32_e64 {{d}}, {sources}", a, b).float32, expected, a, b)
    product = a * b
    clamped = np.where(np.isnan(product), 0, np.clip(product, 0, 1)) + np.float32(0)
    assert_floats(evaluate("v_mul_f32_e64 {d}, {a}, {b} clamp", a, b).float32, clamped, a, b)


def test_sdwa_and_dpp_take_modifiers():
    a, b = (np.ascontiguousarray(column[:1024]) for column in rows_of(2).T)
    code = "v_mul_f32_sdwa {d}, -{a}, |{b}| dst_sel:DWORD dst_unused:UNUSED_PAD src0_sel:DWORD src1_sel:DWORD"
    assert_floats(evaluate(code, a, b).float32, -a * abs(b), a, b)
    code = "v_add_f32_dpp {d}, -|{a}|, {b} quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf"
    swapped = a.reshape(-1, 2)[:, ::-1].reshape(-1)
    assert_floats(evaluate(code, a, b).float32, -abs(swapped) + b, a, b)


PACKED = {
    "v_pk_add_f32": lambda a, b: a + b,
    "v_pk_mul_f32": lambda a, b: a * b,
    "v_pk_fma_f32": fmas,
}


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("low", [(0, 0, 0), (1, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("high", [(1, 1, 1), (0, 1, 0)], ids=str)
def test_packed_float32(name, low, high):
    """op_sel and op_sel_hi choose the words that the low and the high result are made of; neg_lo and neg_hi signs."""
    n = len(inspect.signature(PACKED[name]).parameters)
    rows = rows_of(3)[-1200:]
    pairs = [np.stack([rows[:, k], np.roll(rows[:, k], 7)], 1) for k in range(n)]
    negated = ((1, 0, 0), (0, 1, 1))
    modifiers = f"op_sel:{[*low[:n]]} op_sel_hi:{[*high[:n]]} neg_lo:{[*negated[0][:n]]} neg_hi:{[*negated[1][:n]]}"
    code = f"{name} {{d}}, {', '.join(('{a}', '{b}', '{c}')[:n])} {modifiers.replace(', ', ',')}"
    found = evaluate(code, *pairs, words=2)
    for half, choice in enumerate((low, high)):
        chosen = [pair[:, choice[k]] * (-1) ** negated[half][k] for k, pair in enumerate(pairs)]
        expected = PACKED[name](*(value.astype(np.float32) for value in chosen))
        assert_floats(np.ascontiguousarray(found.words[:, half]).view(np.float32), expected, *chosen)
