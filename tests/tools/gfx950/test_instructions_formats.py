"""Conversions between number formats, and float16 pairs, against torch's casts and a search for the nearest code.

The formats: OCP's "8-bit Floating Point Specification" (E4M3, E5M2), IEEE 754 (float16), torch (bfloat16). To nearest,
even on ties. MODE.FP16_OVFL: the chapter "Mode register" of AMD's "CDNA4 Instruction Set Architecture".
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from assembly import evaluate
from exact import near_floats, random_floats, rounded

SATURATE = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), 1\n"
CODES = torch.arange(256, dtype=torch.uint8)
E4M3 = CODES.view(torch.float8_e4m3fn).double().numpy()
E5M2 = CODES.view(torch.float8_e5m2).double().numpy()
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
LARGEST_E4M3, LARGEST_HALF, LARGEST_BF16 = 448.0, 65504.0, float(torch.finfo(torch.bfloat16).max)
OVERFLOWS = [463.9, 464.0, 464.1, 479.9, 480.0, 512.0, 1e9, 65519.0, 65520.0, 65536.0, 3.39e38, 3.4e38, math.inf]


def around(codes: np.ndarray) -> np.ndarray:
    """Return the values of codes, the midpoints between them, and the next float32 on both sides of each."""
    values = np.unique(codes[np.isfinite(codes)])
    points = np.concatenate([values, (values[1:] + values[:-1]) / 2]).astype(np.float32)
    return np.concatenate(
        [points, np.nextafter(points, np.float32(math.inf)), np.nextafter(points, np.float32(-math.inf))]
    )


def some_floats(codes: np.ndarray) -> np.ndarray:
    extremes = np.array([*OVERFLOWS, *(-x for x in OVERFLOWS), math.nan, 1e-40, -1e-40, 0.0, -0.0], np.float32)
    return np.concatenate([around(codes), extremes, random_floats(1000), near_floats(1000)])


def nearest_code(x: float) -> int:
    """Return the E4M3 code, without its sign, that is nearest to |x|: of two, the even one."""
    distances = np.abs(E4M3[:127] - abs(x))
    nearest = np.flatnonzero(distances == distances.min()).tolist()
    return min(nearest, key=lambda code: code % 2)


def to_e4m3(x: np.ndarray, saturates: bool) -> np.ndarray:
    """Return codes. Above the last midpoint, between 448 and 480, is NaN; or 448, of infinity too."""
    codes = []
    for value in x.tolist():
        sign = 128 * (math.copysign(1, value) < 0)
        if math.isnan(value) or (abs(value) > 464 and not saturates):
            codes.append(sign + 127)
        else:
            codes.append(sign + nearest_code(min(abs(value), LARGEST_E4M3)))
    return np.array(codes)


def test_the_search_for_the_nearest_code_is_torchs_cast():
    x = some_floats(E4M3)
    expected = torch.from_numpy(x).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    fits = np.abs(x) <= 464  # versions of torch differ above
    assert fits.sum() > 2000
    np.testing.assert_array_equal(to_e4m3(x, False)[fits], expected[fits])


@pytest.mark.parametrize("saturates", [False, True])
@pytest.mark.parametrize("name", ["v_cvt_pk_fp8_f32", "v_cvt_scalef32_pk_fp8_f32"])
def test_to_e4m3(name, saturates):
    """Two codes go into a half of the destination, of which the other half stays."""
    x = some_floats(E4M3)
    y, old = np.roll(x, 1), np.full(len(x), 0x12345678, np.uint32)
    is_scaled = "scale" in name
    expected = to_e4m3(x, saturates) + 256 * to_e4m3(y, saturates)
    for modifier, half in (("", 0), (f" op_sel:[0,0,{'0,' * is_scaled}1]", 1)):
        code = f"{SATURATE * saturates}{name} {{d}}, {{a}}, {{b}}{', 1.0' * is_scaled}{modifier}"
        found = evaluate(code, x, y, old=old).word
        kept = 0x5678 if half else 0x12340000
        wrong = np.flatnonzero(found != (expected << 16 * half) + kept)
        assert not len(wrong), [(x[n], y[n], hex(found[n]), hex(expected[n])) for n in wrong[:5]]


@pytest.mark.parametrize("exponent", [-127, -126, -20, -1, 1, 7, 100, 127])
def test_scaled_conversion_divides_by_a_power_of_two(exponent):
    """Only the scale's exponent counts; 0 stands for 2^-127."""
    x = np.concatenate([around(E4M3), near_floats(500)])
    scaled = np.clip(np.ldexp(x.astype(np.float64), exponent), -3e38, 3e38).astype(np.float32)
    scale = np.full(len(x), (exponent + 127) << 23, np.uint32) | np.arange(len(x), dtype=np.uint32)
    found = evaluate(
        "v_cvt_scalef32_pk_fp8_f32 {d}, {a}, {a}, {b}", scaled, scale, old=np.zeros(len(x), np.uint32)
    ).word
    expected = to_e4m3(np.ldexp(scaled.astype(np.float64), -exponent), False)
    np.testing.assert_array_equal(found, expected * 257)


def float_bits(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return the bits of numbers rounded to a type of 16 bits, with one NaN for all."""
    bits = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().astype(np.int64) % 2**16
    return np.where(np.isnan(x), 0x7FFF, bits)


def assert_same_bits(found: np.ndarray, expected: np.ndarray, first_nan: int) -> None:
    """Compare 16-bit floats; what lies above `first_nan`, without its sign, is NaN."""
    same = (found == expected) | ((found % 2**15 > first_nan) & (expected % 2**15 > first_nan))
    wrong = np.flatnonzero(~same)
    assert not len(wrong), [(n, hex(found[n]), hex(expected[n])) for n in wrong[:5]]


HALVES = np.arange(0x7C00, dtype=np.uint16)[::3].view(np.float16).astype(np.float64)
BF16S = (np.arange(0x7F80, dtype=np.uint32)[::3] << 16).view(np.float32).astype(np.float64)
INFINITE_HALF, INFINITE_BF16 = 0x7C00, 0x7F80


def next_codes(codes: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Return codes and those behind them."""
    following = torch.from_numpy(codes).to(dtype).view(torch.int16) + 1
    return np.concatenate([codes, following.view(dtype).double().numpy()])


@pytest.mark.parametrize("saturates", [False, True])
def test_to_half(saturates):
    x = some_floats(next_codes(HALVES, torch.float16))
    clipped = np.where(np.isinf(x), x, np.clip(x, -LARGEST_HALF, LARGEST_HALF)) if saturates else x
    expected = float_bits(clipped, torch.float16)
    for code in ("v_cvt_f16_f32 {d}, {a}", "v_cvt_pk_f16_f32 {d}, {a}, {b}"):
        found = evaluate(SATURATE * saturates + code, x, -x).word
        assert_same_bits(found & 0xFFFF, expected, INFINITE_HALF)
        if "_pk_" in code:
            assert_same_bits(found >> 16 ^ 0x8000, expected, INFINITE_HALF)
        else:
            assert (found >> 16 == 0).all()


def test_to_bfloat16():
    x = some_floats(next_codes(BF16S, torch.bfloat16))
    found = evaluate("v_cvt_pk_bf16_f32 {d}, {a}, {b}", x, -x).word
    expected = float_bits(x, torch.bfloat16)
    assert_same_bits(found & 0xFFFF, expected, INFINITE_BF16)
    assert_same_bits(found >> 16 ^ 0x8000, expected, INFINITE_BF16)


def test_all_codes_are_decoded():
    for name, codes in (("v_cvt_f32_fp8", E4M3), ("v_cvt_f32_bf8", E5M2)):
        found = evaluate(f"{name} {{d}}, {{a}}", CODES.numpy().astype(np.uint32) | 0xABCDEF00).float32
        np.testing.assert_array_equal(found, codes.astype(np.float32))
        for k in range(4):
            part = np.roll(np.arange(256), k).astype(np.uint8)
            words = np.stack([np.roll(part, j - k) for j in range(4)], 1).copy().view(np.uint32)[:, 0]
            found = evaluate(f"{name}_sdwa {{d}}, {{a}} src0_sel:BYTE_{k}", words).float32
            np.testing.assert_array_equal(found, codes[part].astype(np.float32))
    halves = np.arange(2**16, dtype=np.uint16)
    expected = halves.view(np.float16).astype(np.float32)
    padded = halves.astype(np.uint32) | 0x3C000000
    np.testing.assert_array_equal(evaluate("v_cvt_f32_f16 {d}, {a}", padded).float32, expected)
    with_sign = evaluate("v_cvt_f32_f16 {x0}, -|{a}|\nv_mov_b32 {d}, {x0}", padded[:0x7C00]).float32
    np.testing.assert_array_equal(with_sign.view(np.uint32), (-np.abs(expected[:0x7C00])).view(np.uint32))
    found = evaluate("v_cvt_f32_f16_sdwa {d}, -{a} src0_sel:WORD_1", halves[:0x7C00].astype(np.uint32) << 16).float32
    np.testing.assert_array_equal(found, -expected[:0x7C00])


@pytest.mark.parametrize("exponent", [-127, -100, -6, 0, 3, 100, 126])
@pytest.mark.parametrize("half", [0, 1])
def test_scaled_e4m3_becomes_16_bits(exponent, half):
    """Two codes of a half, times the power of two that a float32 scale has."""
    low, high = np.arange(256), np.roll(np.arange(256), 100)
    words = ((low | high << 8) << 16 * half | 0x5A5A << 16 * (1 - half)).astype(np.uint32)
    scale = np.full(256, (exponent + 127) << 23 | 0x12345, np.uint32)
    for name, dtype, infinite in (("bf16", torch.bfloat16, INFINITE_BF16), ("f16", torch.float16, INFINITE_HALF)):
        found = evaluate(f"v_cvt_scalef32_pk_{name}_fp8 {{d}}, {{a}}, {{b}} op_sel:[{half},0]", words, scale).word
        for part, codes in ((found & 0xFFFF, low), (found >> 16, high)):
            assert_same_bits(part, float_bits(np.ldexp(E4M3[codes], exponent), dtype), infinite)


@pytest.mark.parametrize("exponent", [0, 5, -7])
@pytest.mark.parametrize("byte", range(4))
def test_pairs_from_e2m1(byte, exponent):
    """op_sel chooses a byte, whose low four bits come first; of the scale only its exponent counts."""
    codes = np.arange(256, dtype=np.uint32)
    words = codes << 8 * byte | (0xA5A5A5A5 & ~(0xFF << 8 * byte) & 0xFFFFFFFF)
    scale = np.full(256, (exponent + 127) << 23 | 0x12345, np.uint32)
    code = f"v_cvt_scalef32_pk_f32_fp4 {{d}}, {{a}}, {{b}} op_sel:[{byte & 1},{byte >> 1},0]"
    found = evaluate(code, words.astype(np.uint32), scale, words=2).words[:, :2].copy().view(np.float32)
    np.testing.assert_array_equal(found, np.ldexp(np.stack([E2M1[codes & 15], E2M1[codes >> 4]], 1), exponent))


# ---- pairs of float16 ----
def as_half(x: float) -> float:
    if not math.isfinite(x):
        return x
    return rounded(Fraction(x), 11, -24, LARGEST_HALF) or math.copysign(0.0, x)


def half_fma(a: float, b: float, c: float) -> float:
    plain = float(np.float64(a) * np.float64(b) + np.float64(c))
    if not math.isfinite(plain) or plain == 0:
        return plain
    return rounded(Fraction(a) * Fraction(b) + Fraction(c), 11, -24, LARGEST_HALF) or math.copysign(0.0, plain)


def pick(choose, a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    if a == b == 0:
        return choose(math.copysign(1, a), math.copysign(1, b)) * 0.0
    return choose(a, b)


PACKED_HALF = {
    "v_pk_add_f16": (2, lambda a, b: as_half(a + b)),
    "v_pk_mul_f16": (2, lambda a, b: half_fma(a, b, -0.0) if a * b == 0 else half_fma(a, b, 0.0)),
    "v_pk_fma_f16": (3, half_fma),
    "v_pk_max_f16": (2, lambda a, b: pick(max, a, b)),
    "v_pk_min_f16": (2, lambda a, b: pick(min, a, b)),
}
HALF_CORNERS = [0.0, 2.0**-24, 2.0**-14, 2.0**-11, 1.0, 1 + 2.0**-10, 1 - 2.0**-11, 3.0, 2048.0, 65504.0, math.inf]
# A product that float32 rounds to a tie: rounded twice, the sum is wrong.
DOUBLE_ROUNDING = [(1 + 2.0**-10, 2.0**-11 - 2.0**-21, 1 + 2.0**-10)]


def half_rows() -> np.ndarray:
    rng = np.random.default_rng(3)
    corners = np.array([*HALF_CORNERS, *(-x for x in HALF_CORNERS), math.nan], np.float16)
    random = rng.integers(0, 2**16, (700, 3)).astype(np.uint16).view(np.float16)
    quiet = np.where(np.isnan(random), np.float16(math.nan), random)
    return np.concatenate([np.array(DOUBLE_ROUNDING, np.float16), rng.choice(corners, (900, 3)), quiet])


@pytest.mark.parametrize("name", PACKED_HALF)
@pytest.mark.parametrize(
    "chosen",
    [((0, 0, 0), (1, 1, 1)), ((1, 0, 1), (0, 1, 0)), ((1, 1, 0), (1, 0, 0))],
    ids=["plain", "crossed", "mixed"],
)
def test_packed_half(name, chosen):
    """op_sel and op_sel_hi choose the halves that the low and the high result are made of; neg_lo and neg_hi signs."""
    n, function = PACKED_HALF[name]
    rows = half_rows()[:, :n]
    pairs = np.stack([rows, np.roll(rows, 3, 0)])
    negated = ((0, 1, 0), (1, 0, 1)) if chosen[0] != (0, 0, 0) else ((0, 0, 0), (0, 0, 0))
    lists = zip(("op_sel", "op_sel_hi", "neg_lo", "neg_hi"), (*chosen, *negated), strict=True)
    modifiers = " ".join(f"{key}:[{','.join(map(str, bits[:n]))}]" for key, bits in lists)
    bits = pairs.view(np.uint16).astype(np.uint32)
    sources = [bits[0, :, k] | bits[1, :, k] << 16 for k in range(n)]
    found = evaluate(f"{name} {{d}}, {', '.join(('{a}', '{b}', '{c}')[:n])} {modifiers}", *sources).word
    for half in (0, 1):
        values = [pairs[chosen[half][k], :, k].astype(np.float64) * (-1) ** negated[half][k] for k in range(n)]
        with np.errstate(all="ignore"):
            exact = np.array([function(*row) for row in zip(*(v.tolist() for v in values), strict=True)])
            expected = exact.astype(np.float16).view(np.uint16).astype(np.int64)
        assert_same_bits(found >> 16 * half & 0xFFFF, expected, INFINITE_HALF)


def test_packed_half_saturates():
    """Where MODE.FP16_OVFL is set, finite halves have finite sums."""
    pairs = (LARGEST_HALF, LARGEST_HALF), (LARGEST_HALF, math.inf)
    x, y = (np.array([pair], np.float16).view(np.uint32) for pair in pairs)
    assert evaluate(SATURATE + "v_pk_add_f16 {d}, {a}, {b}", x, y).word == y[0]
