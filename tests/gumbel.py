"""The noise of common/sampling.py in plain Python."""

import math


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> int:
    """Return the first word of Philox4x32-10. Source: Salmon et al., "Parallel Random Numbers", 2011."""
    (a, b, c, d), (k, m), word = counter, key, 0xFFFFFFFF
    for _ in range(10):
        low, high = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (high >> 32) ^ b ^ k, high & word, (low >> 32) ^ d ^ m, low & word
        k, m = (k + 0x9E3779B9) & word, (m + 0xBB67AE85) & word
    return a


def expected_noise(seed: int, position: int, row: int) -> float:
    v = (philox((row, position, 0, 0), (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF)) + 0.5) / 2**32
    return -math.log(-math.log1p(-v))
