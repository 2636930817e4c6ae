"""common.attention_rows against a softmax in float64. NaN stands in all of the cache that must not be read.

Queries and keys are small multiples of 1/8. A product keeps UNITS of its operands. Beside a bfloat16 cache, queries and
weights are two bfloat16 parts, 2^-17 (see tests/common/test_gemm_dense.py); otherwise they are float32, 2^-24, of which
sums of 64 terms make a few more.
"""

import math
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from common.attention import Keys
from common.attention_rows import attend_rows

D, BLOCK_KEYS = 32, 16
UNITS = {torch.bfloat16: 2.0**-17, torch.float32: 2.0**-22}
# Query heads of a KV head, and queries times heads in a product: of three or seventeen heads some of its rows are idle.
GROUPS = [(1, 16), (3, 16), (8, 64), (17, 64)]
with_dtype = pytest.mark.parametrize("dtype", UNITS, ids=["bfloat16", "float32"])
with_group = pytest.mark.parametrize("group, block_m", GROUPS)


@triton.jit
def rows_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    sink_ptr,
    position,
    n_tokens,
    first_key,
    window,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Write out [tokens, G, D], some tokens per program.

    first_key is the first key for all tokens, or -1 for the border of their window.
    """
    TOKENS: tl.constexpr = BLOCK_M // G
    first = tl.program_id(0) * TOKENS
    m = tl.arange(0, BLOCK_M)
    token = tl.minimum(first + m // G, n_tokens - 1)
    at = ((token * G + m % G) * D)[:, None] + tl.arange(0, D)[None, :]
    border = tl.where(window > 0, tl.maximum(position + first - window + 1, 0), 0)
    start = tl.where(first_key < 0, border, first_key)
    end = position + tl.minimum(first + TOKENS, n_tokens)
    y = attend_rows(
        tl.load(q_ptr + at),
        position + token,
        tl.load(sink_ptr + m % G),
        Keys(k_ptr, v_ptr, start, end),
        window,
        SCALE,
        BLOCK_KEYS,
        1,
    )
    mine = (m < TOKENS * G) & (first + m // G < n_tokens)
    tl.store(out_ptr + at, y, mask=mine[:, None])


class Case(NamedTuple):
    """`tokens` queries at position and after it, over a cache of keys and values up to the last of them."""

    q: torch.Tensor  # float32 [tokens, G, D]
    k: torch.Tensor  # [position + tokens, D]
    v: torch.Tensor
    sink: torch.Tensor  # float32 [G]
    position: int
    window: int
    scale: float = 0.125

    def logits(self) -> torch.Tensor:
        """Return float64 [G, tokens, keys], -inf where a query does not see a key."""
        logits = torch.einsum("tgd,kd->gtk", self.q.double(), self.k.double()) * self.scale
        behind = self.position + torch.arange(len(self.q))[:, None] - torch.arange(len(self.k))[None, :]
        seen = (behind >= 0) & (behind < (self.window or math.inf))
        return logits.masked_fill(~seen, -math.inf)

    def expected(self) -> torch.Tensor:
        """Return the right output, float64 [tokens, G, D]."""
        logits = self.logits()
        sink = self.sink.double()[:, None, None].expand(-1, logits.shape[1], 1)
        weights = torch.cat((logits, sink), -1).softmax(-1)[..., :-1]
        return torch.einsum("gtk,kd->tgd", weights, self.v.double())

    def tolerance(self) -> float:
        """Return the error that UNITS of queries and weights may cause.

        A unit of a query moves a logit by that unit of its products' magnitudes, up or down, and a weight by as much.
        The rounding of the weights adds one unit; exponentials and sums of positive terms in float32 add another.
        """
        unit = UNITS[self.k.dtype]
        magnitude = torch.einsum("tgd,kd->gtk", self.q.abs(), self.k.float().abs()).max().item() * self.scale
        return ((2 * magnitude + 1) * unit + 2.0**-20) * self.v.float().abs().max().item()


def random_case(
    group: int, position: int, tokens: int, window: int = 0, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Case:
    generator = torch.Generator().manual_seed(10000 * seed + 100 * position + tokens)
    q = torch.randint(-12, 13, (tokens, group, D), generator=generator) / 8
    k = (torch.randint(-12, 13, (position + tokens, D), generator=generator) / 8).to(dtype)
    v = torch.randn(position + tokens, D, generator=generator).to(dtype)
    return Case(q, k, v, torch.randn(group, generator=generator) * 2, position, window)


def attend(case: Case, block_m: int, block_keys: int = BLOCK_KEYS, first_key: int = -1) -> torch.Tensor:
    """Return float64 [tokens, G, D]. NaN stands after the last key, and before the first one that any query sees."""
    tokens, group, _ = case.q.shape
    oldest = max(0, case.position - case.window + 1) if case.window else 0
    nan = torch.full((2 * block_keys, D), torch.nan, dtype=case.k.dtype)
    k, v = (torch.cat((x, nan)) for x in (case.k, case.v))
    k[: oldest if first_key < 0 else first_key] = torch.nan
    v[: oldest if first_key < 0 else first_key] = torch.nan
    out = torch.full((tokens, group, D), torch.nan)
    rows_kernel[(triton.cdiv(tokens, block_m // group),)](
        out,
        case.q,
        k,
        v,
        case.sink,
        case.position,
        tokens,
        first_key,
        case.window,
        SCALE=case.scale,
        G=group,
        D=D,
        BLOCK_M=block_m,
        BLOCK_KEYS=block_keys,
    )
    return out.double()


def assert_right(case: Case, found: torch.Tensor) -> None:
    assert (found - case.expected()).abs().max() < case.tolerance()


@with_dtype
@with_group
@pytest.mark.parametrize("position", [0, 1, BLOCK_KEYS - 1, BLOCK_KEYS, BLOCK_KEYS + 1, 150])
def test_no_query_sees_a_later_key(position, group, block_m, dtype):
    """Several programs have tokens, the last of them few."""
    case = random_case(group, position, 2 * (block_m // group) + 1, dtype=dtype)
    assert_right(case, attend(case, block_m))


@with_dtype
@with_group
@pytest.mark.parametrize("window", [1, 2, BLOCK_KEYS - 1, BLOCK_KEYS, BLOCK_KEYS + 1, 40, 500])
@pytest.mark.parametrize("position", [0, 39, 150])
def test_no_query_sees_keys_before_its_window(position, window, group, block_m, dtype):
    """Keys before a query's own window stay in the cache for the queries before it."""
    case = random_case(group, position, 2 * (block_m // group) + 3, window, dtype)
    assert_right(case, attend(case, block_m))


@with_dtype
@pytest.mark.parametrize("first_key", [0, 3, 17, 60])
def test_keys_before_the_window_do_not_count(first_key, dtype):
    """The window hides keys before it, even whole blocks of them, wherever reading begins."""
    case = random_case(8, 100, 9, window=25, dtype=dtype)
    assert_right(case, attend(case, 64, first_key=first_key))


@with_dtype
@with_group
def test_one_token_is_right(group, block_m, dtype):
    """The other rows of the product repeat the token's row."""
    for position, window in ((0, 0), (0, 5), (33, 0), (33, 5)):
        case = random_case(group, position, 1, window, dtype)
        assert_right(case, attend(case, block_m))


@with_dtype
@pytest.mark.parametrize("block_keys", [16, 32, 128])
def test_blocks_of_keys(block_keys, dtype):
    for window in (0, 31, 32, 33):
        case = random_case(8, 70, 20, window, dtype)
        assert_right(case, attend(case, 32, block_keys))


@with_dtype
def test_a_window_one_off_would_show(dtype):
    """One key more or less changes the result by far more than the tolerance."""
    case = random_case(8, 60, 9, window=20, dtype=dtype)
    for window in (19, 21):
        difference = (case._replace(window=window).expected() - case.expected()).abs().amax((1, 2))
        assert difference.min() > 10 * case.tolerance()


@with_dtype
def test_sinks_of_any_size_are_right(dtype):
    """Sinks take anything from all weight to none. The last queries see nothing of the first block of keys."""
    case = random_case(8, 50, 32, window=12, dtype=dtype)
    case = case._replace(sink=torch.tensor([100.0, 20.0, 3.0, 0.0, -3.0, -100.0, -1e30, -torch.inf]))
    found = attend(case, 256)
    assert_right(case, found)
    assert found[:, 0].abs().max() < 1e-30
    without = case._replace(sink=torch.full((8,), -torch.inf)).expected()
    assert (found[:, 5:] - without[:, 5:]).abs().max() < case.tolerance()


@with_dtype
def test_large_scores_do_not_overflow(dtype):
    """The largest score wins; the exponentials of others may be zero."""
    case = random_case(3, 40, 11, dtype=dtype)
    case = case._replace(q=case.q * 256)
    assert case.logits().max() > 100
    picked = case._replace(q=case.q.sign() * 1024.0, k=(case.k.sign() * 4).to(dtype))  # exact logits: one key, or ties
    for one in (case, picked):
        found = attend(one, 16)
        assert found.isfinite().all()
        assert_right(one, found)


@with_dtype
def test_equal_keys_give_the_mean_of_values(dtype):
    """The mean is over the values that a query sees, and zero for the sink."""
    case = random_case(1, 30, 9, window=20, dtype=dtype)
    case = case._replace(q=torch.zeros_like(case.q), sink=torch.zeros(1))
    found = attend(case, 16)[:, 0]
    for token, y in enumerate(found):
        seen = case.v[max(0, 30 + token - 19) : 30 + token + 1].double()
        torch.testing.assert_close(y, seen.sum(0) / (len(seen) + 1), rtol=0, atol=case.tolerance())


def test_queries_and_weights_have_two_parts():
    """With one part each, 2^-8 of them, the results would be far off."""
    case = random_case(8, 100, 9)
    case = case._replace(q=case.q + 2.0**-10)  # no bfloat16, for most
    error = (attend(case, 64) - case.expected()).abs().max()
    assert error < case.tolerance()
    one_part = case._replace(q=case.q.bfloat16().float()).expected()
    assert (one_part - case.expected()).abs().max() > 10 * error
    weights = torch.cat((case.logits(), case.sink.double()[:, None, None].expand(-1, 9, 1)), -1).softmax(-1)[..., :-1]
    one_part = torch.einsum("gtk,kd->tgd", weights.bfloat16().double(), case.v.double())
    assert (one_part - case.expected()).abs().max() > 10 * error


@with_dtype
def test_a_far_position_is_right(dtype):
    """Offsets into the cache have 64 bits: more than 2^31 elements would precede it in a whole cache."""
    case = random_case(8, 0, 9, window=4, dtype=dtype)
    far = 2**31 // D + 5
    out = torch.full(case.q.shape, torch.nan)
    address = case.k.element_size() * far * D
    far_kernel[(1,)](
        out, case.q, case.k, case.v, case.sink, far, 9, far, 4, address, SCALE=0.125, G=8, D=D, BLOCK_M=128
    )
    assert_right(case, out.double())


@triton.jit
def far_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    sink_ptr,
    position,
    n_tokens,
    start,
    window,
    address,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Attend to keys and values that begin `address` bytes before those given."""
    m = tl.arange(0, BLOCK_M)
    token = tl.minimum(m // G, n_tokens - 1)
    at = ((token * G + m % G) * D)[:, None] + tl.arange(0, D)[None, :]
    k_ptr = (k_ptr.to(tl.int64) - address).to(k_ptr.dtype)
    v_ptr = (v_ptr.to(tl.int64) - address).to(v_ptr.dtype)
    sink = tl.load(sink_ptr + m % G)
    q = tl.load(q_ptr + at)
    keys = Keys(k_ptr, v_ptr, start, position + n_tokens)
    y = attend_rows(q, position + token, sink, keys, window, SCALE, 16, 1)
    tl.store(out_ptr + at, y, mask=(m // G < n_tokens)[:, None])
