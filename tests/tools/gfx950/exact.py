"""Numbers for tests of instructions: random ones, results rounded once, and a comparison of bits."""

import math
from fractions import Fraction

import numpy as np

TINY, SMALLEST_NORMAL, LARGEST = 2.0**-149, 2.0**-126, float(np.finfo(np.float32).max)


def random_floats(n: int, seed: int = 0) -> np.ndarray:
    """Return random bit patterns without NaN, of all exponents."""
    bits = np.random.default_rng(seed).integers(0, 2**32, 2 * n, np.uint64).astype(np.uint32)
    values = bits.view(np.float32)
    return values[~np.isnan(values)][:n]


def near_floats(n: int, seed: int = 0) -> np.ndarray:
    """Return random numbers of moderate exponents."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(n) * 2.0 ** rng.integers(-6, 7, n)).astype(np.float32)


def rounded(x: Fraction, digits: int = 24, lowest: int = -149, largest: float = LARGEST) -> float:
    """Return the number with so many binary digits, none below 2**lowest, that is nearest to x, even on ties."""
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x.numerator)) - math.log2(x.denominator)) + 1
    unit = Fraction(2) ** max(exponent - digits, lowest)
    if abs(x) / unit >= 2**digits:  # the logarithm was rounded up to a whole number
        unit *= 2
    value = round(x / unit) * unit  # Python rounds ties to even
    return math.copysign(math.inf, x) if abs(value) > largest else float(value)


def fused(a: float, b: float, c: float) -> float:
    """Return a * b + c, rounded once."""
    plain = float(np.float64(a) * np.float64(b) + np.float64(c))
    if not all(map(math.isfinite, (a, b, c))) or a * b == 0:
        return plain
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return rounded(exact) or math.copysign(0.0, plain if exact == 0 else exact)


def assert_floats(found: np.ndarray, expected: np.ndarray, *rows: np.ndarray) -> None:
    """Check that bits are the same, but for those of NaN."""
    expected = expected.astype(np.float32)
    same = (found.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(found) & np.isnan(expected))
    wrong = [(*(row[n] for row in rows), found[n], expected[n]) for n in np.flatnonzero(~same)[:5]]
    assert same.all(), f"{(~same).sum()} of {len(same)}: {wrong}"
