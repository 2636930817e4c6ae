"""Draw a token from softmax(logits / temperature), as the largest of logits / temperature + Gumbel noise.

The noise of a row depends on the seed, the position and the row alone, so that any number of programs or GPUs draws the
same token. Source: the Gumbel-max trick, Maddison, Tarlow and Minka, "A* Sampling", 2014, section 2.
"""

import triton
import triton.language as tl

SERIES_BELOW = tl.constexpr(2.0**-6)


@triton.jit
def gumbel_noise(seed, position, row):
    """Return Gumbel noise of int32 rows, float32: -log(-log(1 - v)) with v = (bits + 1/2) / 2^32 from Philox 4x32.

    The noise that wins has a small v, which float32 holds exactly enough, and 1 - v does not; hence the series of
    -log(1 - v).
    """
    bits, _, _, _ = tl.philox(seed, row, row * 0 + position, row * 0, row * 0)
    v = bits.to(tl.float32) * 2.0**-32 + 2.0**-33
    series = v * (1.0 + v * (1 / 2 + v * (1 / 3 + v * (1 / 4))))
    return -tl.log(tl.where(v < SERIES_BELOW, series, -tl.log(1.0 - v)))


@triton.jit
def scores_of(logits, sampling, position, row):
    """Return what the chosen token has the largest of: the logits, or with noise if the temperature is not 0.

    sampling: (1 / temperature or 0, int64 seed).
    """
    inverse_temperature, seed = sampling
    scores = logits
    if inverse_temperature > 0:
        scores = logits * inverse_temperature + gumbel_noise(seed, position, row)
    return scores
