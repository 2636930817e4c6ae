"""common.attention against a softmax in float64. NaN stands in all of the cache that must not be read.

Queries and keys are small multiples of 1/8 and the scale is a power of two: scores are exact in float32, so that what
is left are the roundings of exponentials and sums of positive terms, about 1e-6 for 300 keys.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from common import attend_cache, attend_one, finish_with_sink, merge_splits

G, BLOCK_T = 8, 32
MAX_SPLITS = 8
TOLERANCE = 1e-5
LENGTHS = [0, 1, BLOCK_T - 1, BLOCK_T, BLOCK_T + 1, 300]


class State(NamedTuple):
    m: torch.Tensor  # [G]
    l: torch.Tensor  # noqa: E741
    acc: torch.Tensor  # [G, D]


@triton.jit
def load_state(m_ptr, l_ptr, acc_ptr, G: tl.constexpr, D: tl.constexpr):
    g = tl.arange(0, G)
    return tl.load(m_ptr + g), tl.load(l_ptr + g), tl.load(acc_ptr + g[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def store_state(m_ptr, l_ptr, acc_ptr, m, l, acc, G: tl.constexpr, D: tl.constexpr):  # noqa: E741
    g = tl.arange(0, G)
    tl.store(m_ptr + g, m)
    tl.store(l_ptr + g, l)
    tl.store(acc_ptr + g[:, None] * D + tl.arange(0, D)[None, :], acc)


@triton.jit
def cache_kernel(
    out,
    q_ptr,
    k_ptr,
    v_ptr,
    start,
    end,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    PARTS: tl.constexpr,
    BF16_PARTS: tl.constexpr,
):
    q = tl.load(q_ptr + tl.arange(0, G)[:, None] * D + tl.arange(0, D)[None, :])
    m, l, acc = attend_cache(q, k_ptr, v_ptr, start, end, SCALE, D, BLOCK_T, PARTS, BF16_PARTS)  # noqa: E741
    store_state(out[0], out[1], out[2], m, l, acc, G, D)


@triton.jit
def one_kernel(out, state, q_ptr, k_ptr, v_ptr, SCALE: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    dim = tl.arange(0, D)
    m, l, acc = load_state(state[0], state[1], state[2], G, D)  # noqa: E741
    q = tl.load(q_ptr + tl.arange(0, G)[:, None] * D + dim[None, :])
    m, l, acc = attend_one(m, l, acc, q, tl.load(k_ptr + dim), tl.load(v_ptr + dim), SCALE)  # noqa: E741
    store_state(out[0], out[1], out[2], m, l, acc, G, D)


@triton.jit
def merge_kernel(out, states, n_splits, G: tl.constexpr, D: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr):
    m, l, acc = merge_splits(states[0], states[1], states[2], n_splits, G, D, SPLITS, BLOCK_S)  # noqa: E741
    store_state(out[0], out[1], out[2], m, l, acc, G, D)


@triton.jit
def finish_kernel(out_ptr, state, sink_ptr, G: tl.constexpr, D: tl.constexpr):
    m, l, acc = load_state(state[0], state[1], state[2], G, D)  # noqa: E741
    g = tl.arange(0, G)
    out = finish_with_sink(m, l, acc, tl.load(sink_ptr + g))
    tl.store(out_ptr + g[:, None] * D + tl.arange(0, D)[None, :], out)


class Case:
    """One KV head's queries [G, D], and n keys and values [n, D]."""

    def __init__(self, n: int, head_dim: int = 64, scale: float = 0.125, seed: int = 0, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(1000 * seed + n)
        self.q = torch.randint(-12, 13, (G, head_dim), generator=generator) / 8
        self.k = (torch.randint(-12, 13, (n, head_dim), generator=generator) / 8).to(dtype)
        self.v = torch.randn(n, head_dim, generator=generator).to(dtype)
        self.scale = scale

    def new_state(self) -> State:
        return State(*(torch.full(shape, torch.nan) for shape in ((G,), (G,), tuple(self.q.shape))))

    def attend(self, start: int, end: int, block_t: int = BLOCK_T, parts: int = 2, bf16: bool = True) -> State:
        """attend_cache, with NaN around start .. end, more of it than a block."""
        room = (block_t + 3, self.q.shape[1])
        k, v = torch.full_like(self.k, torch.nan), torch.full_like(self.v, torch.nan)
        k[start:end], v[start:end] = self.k[start:end], self.v[start:end]
        k, v = (torch.cat((x, x.new_full(room, torch.nan))) for x in (k, v))
        state, head_dim = self.new_state(), self.q.shape[1]
        cache_kernel[(1,)](
            state,
            self.q,
            k,
            v,
            start,
            end,
            SCALE=self.scale,
            G=G,
            D=head_dim,
            BLOCK_T=block_t,
            PARTS=parts,
            BF16_PARTS=bf16,
        )
        return state

    def add(self, state: State, t: int) -> State:
        out, k, v = self.new_state(), self.k[t].float(), self.v[t].float()
        one_kernel[(1,)](out, state, self.q, k, v, SCALE=self.scale, G=G, D=self.q.shape[1])
        return out

    def expected(self, start: int, end: int) -> State:
        scores = self.scale * self.q.double() @ self.k[start:end].double().T
        m = scores.amax(-1)
        p = (scores - m[:, None]).exp()
        return State(m, p.sum(-1), p @ self.v[start:end].double())

    def expected_output(self, start: int, end: int, sinks: torch.Tensor) -> torch.Tensor:
        scores = self.scale * self.q.double() @ self.k[start:end].double().T
        weights = torch.cat((scores, sinks.double()[:, None]), -1).softmax(-1)[:, :-1]
        return weights @ self.v[start:end].double()


def merge(*states: State, splits: int = MAX_SPLITS, block_s: int = 2) -> State:
    """merge_splits, with NaN in the room for more states."""
    out = State(*(torch.full_like(x, torch.nan) for x in states[0]))
    stacked = State(*(torch.full((splits, *x.shape), torch.nan) for x in out))
    for i, state in enumerate(states):
        for place, x in zip(stacked, state):
            place[i] = x
    merge_kernel[(1,)](out, stacked, len(states), G=G, D=out.acc.shape[1], SPLITS=splits, BLOCK_S=block_s)
    return out


def finish(state: State, sinks: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(state.acc, torch.nan)
    finish_kernel[(1,)](out, state, sinks, G=G, D=state.acc.shape[1])
    return out


def assert_same_state(actual: State, expected: State) -> None:
    assert torch.equal(actual.m.double(), expected.m.double())
    torch.testing.assert_close(actual.l.double(), expected.l.double(), rtol=TOLERANCE, atol=0)
    # Of a sum of values of both signs, the error is relative to the weights.
    error = (actual.acc.double() - expected.acc.double()) / expected.l.double()[:, None]
    assert error.abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("start", [0, 1, 37])
@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16 parts", "float32"])
@pytest.mark.parametrize("parts", [1, 2, 8])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_attend_cache(length, parts, start, dtype, bf16):
    case = Case(start + length, dtype=dtype)
    assert_same_state(case.attend(start, start + length, parts=parts, bf16=bf16), case.expected(start, start + length))


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_attending_nothing(start, parts):
    m, l, acc = Case(5).attend(start, start, parts=parts)  # noqa: E741
    assert (m == -torch.inf).all()
    assert (l == 0).all()
    assert (acc == 0).all()


@pytest.mark.parametrize("head_dim", [16, 32, 128])
@pytest.mark.parametrize("block_t, parts", [(16, 1), (16, 16), (128, 1), (128, 4)])
def test_other_blocks_and_head_dims(head_dim, block_t, parts):
    case = Case(151, head_dim)
    assert_same_state(case.attend(20, 151, block_t, parts), case.expected(20, 151))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_and_weights_are_not_rounded_to_the_caches_type(dtype):
    """The last bits of a query, and of a softmax weight, show in the output: 1e-7 of it, where bfloat16 leaves 4e-3."""
    case = Case(64, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    case.q = torch.randn(G, 64, generator=generator)
    case.k[:] = torch.randn(64, 64, generator=generator)
    case.v[:] = torch.rand(64, 64, generator=generator) + 1  # of one sign: no cancellation
    actual, expected = case.attend(0, 64), case.expected(0, 64)
    torch.testing.assert_close(actual.m.double(), expected.m, rtol=2e-6, atol=0)
    output, right = actual.acc / actual.l[:, None], expected.acc / expected.l[:, None]
    torch.testing.assert_close(output.double(), right, rtol=2e-6, atol=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_attend_one_after_the_cache(length):
    case = Case(length + 1)
    assert_same_state(case.add(case.attend(0, length), length), case.expected(0, length + 1))


# Each range but the last has at least one key; the states differ much in their largest score.
SPLITS = [(0, 1), (0, 7, 300), (0, 64, 128, 192, 256, 300), (0, 1, 2, 3, 100)]


@pytest.mark.parametrize("splits, block_s", [(8, 1), (8, 2), (8, 4), (8, 8), (64, 16)])
@pytest.mark.parametrize("scale", [0.125, 4.0])
@pytest.mark.parametrize("bounds", SPLITS)
def test_merged_splits_are_one_pass(bounds, scale, splits, block_s):
    case = Case(bounds[-1], scale=scale)
    states = [case.attend(start, end) for start, end in itertools.pairwise(bounds)]
    assert_same_state(merge(*states, splits=splits, block_s=block_s), case.expected(0, bounds[-1]))


@pytest.mark.parametrize("scale", [0.125, 4.0])
def test_merge_order(scale):
    bounds = (0, 5, 50, 200, 201, 300)
    case = Case(300, scale=scale)
    states = [case.attend(start, end) for start, end in itertools.pairwise(bounds)]
    expected = case.expected(0, 300)
    for order in itertools.islice(itertools.permutations(states), 0, None, 17):
        assert_same_state(merge(*order), expected)
    a, b, c, d, e = states
    assert_same_state(merge(merge(a, b), merge(c, merge(d, e))), expected)
    for left, right in zip(merge(a, b), merge(b, a)):
        assert torch.equal(left, right)


@pytest.mark.parametrize("sink", [-torch.inf, -1e30, -100.0, 0.0, 3.0, 100.0, 1e30])
@pytest.mark.parametrize("length", [1, 45])
def test_output_with_sinks(length, sink):
    case = Case(length)
    sinks = torch.full((G,), sink)
    torch.testing.assert_close(
        finish(case.attend(0, length), sinks).double(),
        case.expected_output(0, length, sinks),
        rtol=0,
        atol=TOLERANCE,
    )


def test_each_head_has_its_own_sink():
    case = Case(45)
    sinks = torch.tensor([-torch.inf, -3.0, -1.0, 0.0, 1.0, 2.5, 7.0, 1e4])
    actual = finish(case.attend(0, 45), sinks).double()
    torch.testing.assert_close(actual, case.expected_output(0, 45, sinks), rtol=0, atol=TOLERANCE)


def test_without_keys_the_sink_takes_all():
    assert (finish(Case(5).attend(5, 5), torch.zeros(G)) == 0).all()


def test_a_sink_that_equals_the_only_score_takes_half():
    case = Case(1)
    state = case.attend(0, 1)
    torch.testing.assert_close(finish(state, state.m), (case.v.float() / 2).expand(G, -1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**100])
@pytest.mark.parametrize("sink", [-1e30, 0.0, 1e30])
def test_large_scores_do_not_overflow(scale, sink):
    case = Case(100, scale=scale)
    assert case.expected(0, 100).m.min() > scale
    state = merge(case.attend(0, 40), case.add(case.attend(40, 99), 99))
    assert_same_state(state, case.expected(0, 100))
    sinks = torch.full((G,), sink)
    torch.testing.assert_close(
        finish(state, sinks).double(), case.expected_output(0, 100, sinks), rtol=0, atol=TOLERANCE
    )


def test_very_negative_scores_do_not_vanish():
    case = Case(70)
    case.q[:], case.k[:], case.scale = 1.0, -1.0, 2.0**20
    output = finish(case.attend(0, 70), torch.full((G,), -torch.inf)).double()
    expected = case.v.double().mean(0).expand(G, -1)
    torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)


def test_real_queries_and_the_models_scale():
    case = Case(300, scale=1 / math.sqrt(64))
    generator = torch.Generator().manual_seed(9)
    case.q = torch.randn(G, 64, generator=generator) * 3
    case.k = (torch.randn(300, 64, generator=generator) * 3).bfloat16()
    sinks = torch.randn(G, generator=generator) * 3
    output = finish(case.add(case.attend(0, 299), 299), sinks).double()
    # Scores of about 30 are rounded to 2e-6 each, more where products cancel.
    torch.testing.assert_close(output, case.expected_output(0, 300, sinks), rtol=0, atol=3e-5)


@pytest.mark.parametrize("tensor", ["k", "v"])
@pytest.mark.parametrize("t", [0, 40, 69])
def test_nan_in_the_cache_shows(tensor, t):
    case = Case(70)
    getattr(case, tensor)[t, 3] = torch.nan
    output = finish(case.attend(0, 70), torch.zeros(G))
    assert output[:, 3].isnan().all()
