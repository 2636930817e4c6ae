"""common.attention against a softmax in float64. NaN stands in all of the cache that must not be read.

Queries and keys are small multiples of 1/8 and the scale is a power of two: scores are exact in float32, so that what
is left are the roundings of exponentials and sums of positive terms, about 1e-6 for 300 keys.
"""

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from made_up_models import loud_checkpoint, small_config
from tunings import changed, small_tiles

from gpt_oss_megakernel import MegaModel

# isort: split
import triton
import triton.language as tl

from common import decode_attention
from common.attention import (
    Keys,
    KeyStep,
    Softmax,
    attend_cache,
    attend_cache_by_head,
    keep_softmax_if,
    load_cache_block,
    merge_splits,
    start_softmax,
)
from common.barrier import ABORT, ARRIVALS
from common.build import Build
from common.decode_attention import key_step
from host.launch import GFX950, SM_90
from host.phases import barrier_name
from host.state import new_state
from interpreter import simulate
from kernels import attention_kernel
from measure.random_cache import fill_cache
from system.errors import MegakernelAborted

G, STEP_KEYS = 8, 32
MAX_SPLITS = 8
TOLERANCE = 1e-5
LENGTHS = [0, 1, STEP_KEYS - 1, STEP_KEYS, STEP_KEYS + 1, 300]


class State(NamedTuple):
    m: torch.Tensor  # [G]
    l: torch.Tensor  # noqa: E741
    acc: torch.Tensor  # [G, D]


@triton.jit
def load_state(m_ptr, l_ptr, acc_ptr, G: tl.constexpr, D: tl.constexpr):
    g = tl.arange(0, G)
    return tl.load(m_ptr + g), tl.load(l_ptr + g), tl.load(acc_ptr + g[:, None] * D + tl.arange(0, D)[None, :])


@triton.jit
def store_state(m_ptr, l_ptr, acc_ptr, state, G: tl.constexpr, D: tl.constexpr):
    g = tl.arange(0, G)
    tl.store(m_ptr + g, state.largest)
    tl.store(l_ptr + g, state.total)
    tl.store(acc_ptr + g[:, None] * D + tl.arange(0, D)[None, :], state.acc)


@triton.jit
def cache_kernel(
    out,
    before,
    has_before,
    q_ptr,
    k_ptr,
    v_ptr,
    start,
    end,
    SCALE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    STEP: tl.constexpr,
):
    q = tl.load(q_ptr + tl.arange(0, G)[:, None] * D + tl.arange(0, D)[None, :])
    state = keep_softmax_if(has_before, load_state(before[0], before[1], before[2], G, D))
    state = attend_cache(state, q, Keys(k_ptr, v_ptr, start, end), STEP, SCALE)
    store_state(out[0], out[1], out[2], state, G, D)


@triton.jit
def start_kernel(out, q_ptr, k_ptr, v_ptr, sink_ptr, SCALE: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    dim = tl.arange(0, D)
    q = tl.load(q_ptr + tl.arange(0, G)[:, None] * D + dim[None, :])
    k, v = tl.load(k_ptr + dim)[None, :], tl.load(v_ptr + dim)[None, :]
    state = start_softmax(q, k, v, tl.load(sink_ptr + tl.arange(0, G)), SCALE)
    store_state(out[0], out[1], out[2], state, G, D)


@triton.jit
def head_kernel(
    out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    start,
    end,
    new_k_ptr,
    new_v_ptr,
    sink_ptr,
    SCALE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS_PER_LOAD: tl.constexpr,
):
    """Write the output of one query head per program."""
    head = tl.program_id(0)
    row, dim = tl.arange(0, ROWS_PER_LOAD), tl.arange(0, D)
    offset = 0 * row[:, None] + dim[None, :]
    keys = Keys(k_ptr, v_ptr, start, end)
    block = load_cache_block(keys, start, D, BLOCK, ROWS_PER_LOAD)
    q, k, v = tl.load(q_ptr + head * D + offset), tl.load(new_k_ptr + offset), tl.load(new_v_ptr + offset)
    state = start_softmax(q, k, v, tl.load(sink_ptr + head + 0 * row), SCALE)
    total, acc = attend_cache_by_head(state, q, block, keys, SCALE)
    tl.store(out_ptr + head * D + dim, acc / total)


@triton.jit
def merge_kernel(l_ptr, acc_ptr, states, n_splits, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr):
    """Merge the splits of one head per program."""
    head = tl.program_id(0)
    own_states = Softmax(states[0] + head, states[1] + head, states[2] + head * HEAD_DIM)
    total, acc = merge_splits(own_states, n_splits, STRIDE, HEAD_DIM, SPLITS)
    tl.store(l_ptr + head, total)
    tl.store(acc_ptr + head * HEAD_DIM + tl.arange(0, HEAD_DIM), acc)


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

    def room(self, start: int, end: int, step_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (k, v) with NaN around start .. end, more of it than a block."""
        room = (step_keys + 3, self.q.shape[1])
        k, v = torch.full_like(self.k, torch.nan), torch.full_like(self.v, torch.nan)
        k[start:end], v[start:end] = self.k[start:end], self.v[start:end]
        return tuple(torch.cat((x, x.new_full(room, torch.nan))) for x in (k, v))

    def attend(
        self,
        start: int,
        end: int,
        step_keys: int = STEP_KEYS,
        partials: int = 2,
        bf16: bool = True,
        before: State | None = None,
    ) -> State:
        """Run attend_cache, which adds to `before`."""
        state = self.new_state()
        cache_kernel[(1,)](
            state,
            before or self.new_state(),
            before is not None,
            self.q,
            *self.room(start, end, step_keys),
            start,
            end,
            SCALE=self.scale,
            G=G,
            D=self.q.shape[1],
            STEP=KeyStep(step_keys, partials, bf16),
        )
        return state

    def start(self, t: int, sink: torch.Tensor | float = -torch.inf) -> State:
        """Run start_softmax with the key and value at t."""
        out, k, v = self.new_state(), self.k[t].float(), self.v[t].float()
        sinks = torch.zeros(G) + sink
        start_kernel[(1,)](out, self.q, k, v, sinks, SCALE=self.scale, G=G, D=self.q.shape[1])
        return out

    def by_head(
        self,
        start: int,
        end: int,
        sink: torch.Tensor | float = -torch.inf,
        block: int = STEP_KEYS,
        rows_per_load: int = 8,
    ) -> torch.Tensor:
        """Run attend_cache_by_head for each head, after the key at `end`; return the outputs [G, D]."""
        out, sinks = torch.full_like(self.q, torch.nan), torch.zeros(G) + sink
        head_kernel[(G,)](
            out,
            self.q,
            *self.room(start, end, block),
            start,
            end,
            self.k[end].float(),
            self.v[end].float(),
            sinks,
            SCALE=self.scale,
            D=self.q.shape[1],
            BLOCK=block,
            ROWS_PER_LOAD=rows_per_load,
        )
        return out

    def expected(self, start: int, end: int) -> State:
        scores = self.scale * self.q.double() @ self.k[start:end].double().T
        m = scores.amax(-1)
        p = (scores - m[:, None]).exp()
        return State(m, p.sum(-1), p @ self.v[start:end].double())

    def expected_output(self, start: int, end: int, sink: torch.Tensor | float = -torch.inf) -> torch.Tensor:
        sinks = torch.zeros(G) + sink
        scores = self.scale * self.q.double() @ self.k[start:end].double().T
        weights = torch.cat((scores, sinks.double()[:, None]), -1).softmax(-1)[:, :-1]
        return weights @ self.v[start:end].double()


def merge(*states: State, splits: int = MAX_SPLITS, stride: int = G) -> State:
    """Merge the splits of each head by merge_splits, with NaN in the room for more states and for more heads."""
    out = State(
        torch.stack([state.m for state in states]).amax(0), *(torch.full_like(x, torch.nan) for x in states[0][1:])
    )
    stacked = State(*(torch.full((splits, stride, *x.shape[1:]), torch.nan) for x in out))
    for i, state in enumerate(states):
        for place, x in zip(stacked, state):
            place[i, :G] = x
    merge_kernel[(G,)](out.l, out.acc, stacked, len(states), STRIDE=stride, HEAD_DIM=out.acc.shape[1], SPLITS=splits)
    return out


def output(state: State) -> torch.Tensor:
    return (state.acc / state.l[:, None]).double()


def assert_same_state(actual: State, expected: State) -> None:
    assert torch.equal(actual.m.double(), expected.m.double())
    torch.testing.assert_close(actual.l.double(), expected.l.double(), rtol=TOLERANCE, atol=0)
    # Of a sum of values of both signs, the error is relative to the weights.
    error = (actual.acc.double() - expected.acc.double()) / expected.l.double()[:, None]
    assert error.abs().max() < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("start", [0, 1, 37])
@pytest.mark.parametrize("bf16", [True, False], ids=["bfloat16 terms", "float32"])
@pytest.mark.parametrize("partials", [1, 2, 8])
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_attend_cache(length, partials, start, dtype, bf16):
    case = Case(start + length, dtype=dtype)
    assert_same_state(
        case.attend(start, start + length, partials=partials, bf16=bf16), case.expected(start, start + length)
    )


@pytest.mark.parametrize("partials", [1, 4])
@pytest.mark.parametrize("start", [0, 5])
def test_attending_nothing(start, partials):
    m, l, acc = Case(5).attend(start, start, partials=partials)  # noqa: E741
    assert (m < -1e29).all()
    assert (l == 0).all()
    assert (acc == 0).all()


@pytest.mark.parametrize("partials", [1, 4])
def test_attending_nothing_keeps_the_state(partials):
    case = Case(5)
    before = case.start(3, sink=1.0)
    for after, expected in zip(case.attend(2, 2, partials=partials, before=before), before):
        assert torch.equal(after, expected)


@pytest.mark.parametrize("head_dim", [16, 32, 128])
@pytest.mark.parametrize("step_keys, partials", [(16, 1), (16, 16), (128, 1), (128, 4), (128, 8)])
def test_other_blocks_and_head_dims(head_dim, step_keys, partials):
    case = Case(151, head_dim)
    assert_same_state(case.attend(20, 151, step_keys, partials), case.expected(20, 151))


HALF_STEPS = changed(
    SM_90,
    attention=dict(step_keys=SM_90.attention.step_keys // 2, partial_softmaxes=SM_90.attention.partial_softmaxes // 2),
)


@pytest.mark.parametrize(
    "tuning, wide", [(SM_90, 4), (HALF_STEPS, 4), (GFX950, 1)], ids=["sm_90", "sm_90, wide model", "gfx950"]
)
def test_wide_rows_get_fewer_partial_softmaxes(tuning, wide):
    """Steps over a float32 cache or wide heads then take no more memory; short steps keep their number."""
    attention = tuning.attention
    usual = attention.partial_softmaxes
    for row_bytes, partials in {32: usual, 128: usual, 256: wide, 512: wide}.items():
        step = key_step(attention, row_bytes)
        assert step.partial_softmaxes == partials
        assert step.size // partials == attention.step_keys // attention.partial_softmaxes


def real_case(length: int, dtype: torch.dtype) -> Case:
    """Make a case whose scores are not exact and whose values have one sign, so that nothing cancels."""
    case = Case(length, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    case.q = torch.randn(G, 64, generator=generator)
    case.k[:] = torch.randn(length, 64, generator=generator)
    case.v[:] = torch.rand(length, 64, generator=generator) + 1
    return case


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_queries_and_weights_are_not_rounded_to_the_caches_type(dtype):
    """The last bits of a query and of a softmax weight show in the output: 1e-7 of it, where bfloat16 leaves 4e-3."""
    case = real_case(64, dtype)
    actual, expected = case.attend(0, 64), case.expected(0, 64)
    torch.testing.assert_close(actual.m.double(), expected.m, rtol=2e-6, atol=0)
    torch.testing.assert_close(output(actual), case.expected_output(0, 64), rtol=2e-6, atol=0)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_cache_adds_to_a_state(length):
    case = Case(length + 1)
    assert_same_state(case.attend(0, length, before=case.start(length)), case.expected(0, length + 1))


# Each range has at least one key; the states differ much in their largest score.
SPLITS = [(0, 1), (0, 7, 300), (0, 3, 9, 200), (0, 64, 128, 192, 256, 300), (0, 1, 2, 3, 5, 8, 13, 100)]
SPLITS += [(0, 1, 2, 3, 5, 8, 13, 99, 100)]  # as many as there is room for


@pytest.mark.parametrize("splits, stride", [(8, G), (8, 16), (16, G + 3), (64, 16)])
@pytest.mark.parametrize("scale", [0.125, 4.0])
@pytest.mark.parametrize("bounds", SPLITS)
def test_merged_splits_are_one_pass(bounds, scale, splits, stride):
    case = Case(bounds[-1], scale=scale)
    states = [case.attend(start, end) for start, end in itertools.pairwise(bounds)]
    assert_same_state(merge(*states, splits=splits, stride=stride), case.expected(0, bounds[-1]))


@pytest.mark.parametrize("head_dim", [16, 128])
def test_merged_splits_of_other_head_dims(head_dim):
    case = Case(151, head_dim)
    states = [case.attend(start, end) for start, end in itertools.pairwise((0, 20, 21, 151))]
    assert_same_state(merge(*states), case.expected(0, 151))


@pytest.mark.parametrize("field", State._fields)
@pytest.mark.parametrize("split", range(3))
def test_nan_in_a_split_shows(field, split):
    """NaN in a split makes its head's output NaN."""
    case = Case(60)
    states = [case.attend(start, end) for start, end in itertools.pairwise((0, 20, 40, 60))]
    getattr(states[split], field)[3] = torch.nan
    merged = output(merge(*states))
    assert merged[3].isnan().all()
    assert not merged[[g for g in range(G) if g != 3]].isnan().any()


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


SINKS = [-torch.inf, -1e30, -100.0, 0.0, 3.0, 100.0, 1e30]


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("length", [1, 45])
def test_output_with_sinks(length, sink):
    case = Case(length)
    expected = case.expected_output(0, length, sink)
    actual = output(case.attend(0, length - 1, before=case.start(length - 1, sink)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(case.by_head(0, length - 1, sink).double(), expected, rtol=0, atol=TOLERANCE)


def test_each_head_has_its_own_sink():
    case = Case(45)
    sinks = torch.tensor([-torch.inf, -3.0, -1.0, 0.0, 1.0, 2.5, 7.0, 1e4])
    expected = case.expected_output(0, 45, sinks)
    actual = output(case.attend(0, 44, before=case.start(44, sinks)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(case.by_head(0, 44, sinks).double(), expected, rtol=0, atol=TOLERANCE)


def test_a_sink_that_equals_the_only_score_takes_half():
    case = Case(1)
    state = case.start(0, case.start(0).m)
    torch.testing.assert_close(output(state), (case.v.double() / 2).expand(G, -1), rtol=1e-6, atol=0)


PASTS = [0, 1, 15, 128, 129, 500]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("start", [0, 37])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("past", PASTS)
def test_by_head(past, head_dim, start, dtype):
    case = Case(start + past + 1, head_dim, dtype=dtype)
    actual = case.by_head(start, start + past, 0.5, block=64, rows_per_load=16)
    expected = case.expected_output(start, start + past + 1, 0.5)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [16, 32])
@pytest.mark.parametrize("block, rows_per_load", [(16, 16), (16, 1), (32, 8), (128, 16)])
def test_by_head_with_other_blocks_and_head_dims(block, rows_per_load, head_dim, dtype):
    case = Case(152, head_dim, dtype=dtype)
    actual = case.by_head(20, 151, block=block, rows_per_load=rows_per_load).double()
    torch.testing.assert_close(actual, case.expected_output(20, 152), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_by_head_rounds_neither_queries_nor_weights(dtype):
    case = real_case(65, dtype)
    torch.testing.assert_close(case.by_head(0, 64).double(), case.expected_output(0, 65), rtol=2e-6, atol=0)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**100])
@pytest.mark.parametrize("sink", [-1e30, 0.0, 1e30])
def test_large_scores_do_not_overflow(scale, sink):
    case = Case(100, scale=scale)
    assert case.expected(0, 100).m.min() > scale
    state = merge(case.attend(0, 40), case.attend(40, 99, before=case.start(99)))
    assert_same_state(state, case.expected(0, 100))
    expected = case.expected_output(0, 100, sink)
    state = merge(case.attend(0, 40), case.attend(40, 99, before=case.start(99, sink)))
    torch.testing.assert_close(output(state), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(case.by_head(0, 99, sink).double(), expected, rtol=0, atol=TOLERANCE)


def test_very_negative_scores_do_not_vanish():
    case = Case(70)
    case.q[:], case.k[:], case.scale = 1.0, -1.0, 2.0**20
    expected = case.v.double().mean(0).expand(G, -1)
    torch.testing.assert_close(output(case.attend(0, 70)), expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(case.by_head(0, 69).double(), expected, rtol=0, atol=TOLERANCE)


def test_real_queries_and_the_models_scale():
    case = Case(300, scale=1 / math.sqrt(64))
    generator = torch.Generator().manual_seed(9)
    case.q = torch.randn(G, 64, generator=generator) * 3
    case.k = (torch.randn(300, 64, generator=generator) * 3).bfloat16()
    sinks = torch.randn(G, generator=generator) * 3
    expected = case.expected_output(0, 300, sinks)
    # Scores of about 30 are rounded to 2e-6 each, more where products cancel.
    actual = output(case.attend(0, 299, before=case.start(299, sinks)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=3e-5)
    torch.testing.assert_close(case.by_head(0, 299, sinks).double(), expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("tensor", ["k", "v"])
@pytest.mark.parametrize("t", [0, 40, 69])
def test_nan_in_the_cache_shows(tensor, t):
    case = Case(70)
    getattr(case, tensor)[t, 3] = torch.nan
    assert output(case.attend(0, 70))[:, 3].isnan().all()
    assert case.by_head(0, 69)[:, 3].isnan().all()


class Sinks(NamedTuple):
    sinks: torch.Tensor


@pytest.mark.parametrize("head_keys", [0, 40])
@pytest.mark.parametrize("num_programs", [1, 3, 11])
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(4, 4, 16), (6, 2, 64), (16, 2, 64), (3, 1, 128)], ids=str)
def test_the_phase_is_right_both_ways(n_heads, n_kv_heads, head_dim, num_programs, head_keys):
    """Both ways agree with float64, with fewer units than programs and with more. Each appends key and value once."""
    config = small_config(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, n_layers=2)
    tuning = small_tiles(config, attention=dict(head_keys=head_keys))
    generator = torch.Generator().manual_seed(4)
    w = Sinks(torch.randn(2, n_heads, generator=generator))
    context, group = 41, n_heads // n_kv_heads
    for position, window in [(0, 0), (5, 20), (33, 20), (40, 0)]:
        s = new_state(config, tuning, False, context, num_programs, "cpu")
        s.windows[1] = window
        s.qkv[:] = torch.randn(len(s.qkv), generator=generator)
        first = max(position - window + 1, 0) if window else 0
        for cache in (s.k_cache, s.v_cache):
            cache[:] = torch.nan
            cache[1, :, first:position] = torch.randn(n_kv_heads, position - first, head_dim, generator=generator)
        past = [cache[1, :, first:position].double() for cache in (s.k_cache, s.v_cache)]
        attention_kernel[(num_programs,)](w, s, 1, position, context, num_programs, BUILD=Build(config, tuning))

        turn = torch.complex(s.cos[position].double(), s.sin[position].double())
        heads = s.qkv.double().view(-1, head_dim)
        turned = torch.complex(*heads.chunk(2, -1)) * turn
        turned = torch.cat((turned.real, turned.imag), -1)
        new = turned[n_heads : n_heads + n_kv_heads].bfloat16(), heads[n_heads + n_kv_heads :].bfloat16()
        for cache, x in zip((s.k_cache, s.v_cache), new):
            assert torch.equal(cache[1, :, position], x)
            assert cache[1, :, position + 1 :].isnan().all()
            assert cache[0].isnan().all()
        k, v = (torch.cat((a, b.double()[:, None]), 1).repeat_interleave(group, 0) for a, b in zip(past, new))
        scores = config.sm_scale * torch.einsum("hd,htd->ht", turned[:n_heads], k)
        weights = torch.cat((scores, w.sinks[1].double()[:, None]), -1).softmax(-1)[:, :-1]
        expected = torch.einsum("ht,htd->hd", weights, v)
        torch.testing.assert_close(s.attention.view(n_heads, -1).double(), expected, rtol=0, atol=TOLERANCE)


CONTEXT = 70
# The past of 69 positions in steps of 16: splits of 32, or of 16 for at most 5.
SPLIT_KINDS = {
    "3 splits": dict(min_split_keys=32, max_splits=4),
    "5 splits": dict(min_split_keys=16, max_splits=5),
    "2 splits": dict(min_split_keys=48, max_splits=2),
}


class SplitCase:
    """The attention phase of one layer at the last position, in which no query head attends alone."""

    def __init__(
        self, n_layers: int = 1, n_heads: int = 6, n_kv_heads: int = 2, spin_limit: int = 1 << 14, **attention: int
    ):
        sizes = dict(n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=16, n_layers=n_layers)
        self.config = small_config(**sizes, layer_is_sliding=(False,) * n_layers)
        attention = {"head_keys": 0} | attention
        self.tuning = small_tiles(self.config, attention=attention, spin_limit=spin_limit)
        generator = torch.Generator().manual_seed(6)
        self.w = Sinks(torch.randn(n_layers, n_heads, generator=generator))
        self.qkv = torch.randn(self.config.qkv_size, generator=generator)
        shape = (n_layers, n_kv_heads, CONTEXT, 16)
        self.cache = [torch.randn(shape, generator=generator).bfloat16() for _ in range(2)]

    def state(self, num_programs: int):
        s = new_state(self.config, self.tuning, False, CONTEXT, num_programs, "cpu")
        s.qkv.copy_(self.qkv)
        s.k_cache.copy_(self.cache[0])
        s.v_cache.copy_(self.cache[1])
        for x in (s.split_m, s.split_l, s.split_acc, s.attention):
            x.fill_(torch.nan)
        return s

    def run(self, s, num_programs: int, layer: int = 0, position: int = CONTEXT - 1) -> None:
        build = Build(self.config, self.tuning)
        attention_kernel[(num_programs,)](self.w, s, layer, position, CONTEXT, num_programs, BUILD=build)


@pytest.mark.parametrize("changes", SPLIT_KINDS.values(), ids=SPLIT_KINDS.keys())
@pytest.mark.parametrize("n_heads, n_kv_heads", [(6, 2), (4, 4), (5, 1)], ids=str)
def test_who_merges_and_when_changes_no_bit(n_heads, n_kv_heads, changes):
    """Programs are fewer than heads or splits, or more, in any order; merging always waits for what it merges."""
    case = SplitCase(n_heads=n_heads, n_kv_heads=n_kv_heads, **changes)
    n_splits = -(-(CONTEXT - 1) // changes["min_split_keys"])
    runs = []
    for num_programs in (1, 2, 3, 5, n_kv_heads * n_splits, 23):
        for seed in range(3):
            s = case.state(num_programs)
            with simulate(seed=seed, detect_races=True) as simulation:
                case.run(s, num_programs)
            assert simulation.races == []
            assert s.split_arrivals.tolist() == [n_splits] * n_kv_heads
            assert not s.sync.any()
            runs.append(s.attention)
    assert runs[0].isfinite().all()
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_one_split_counts_nothing_and_waits_for_none():
    """A single split neither counts nor waits, whatever the counters hold."""
    case = SplitCase(min_split_keys=128)
    s = case.state(3)
    s.split_arrivals.fill_(-7)
    case.run(s, 3)
    assert s.attention.isfinite().all()
    assert (s.split_arrivals == -7).all()
    assert not s.sync.any()


@pytest.mark.parametrize("name", ["count_arrival", "wait_for"])
def test_merging_needs_its_order(name, monkeypatch):
    case = SplitCase(min_split_keys=16, max_splits=5, spin_limit=100)
    monkeypatch.setattr(decode_attention, name, lambda *args: None)
    races = []
    for seed in range(3):
        with simulate(seed=seed, detect_races=True, deadlock_limit=None) as simulation:
            case.run(case.state(5), 5)
        races += simulation.races
    assert any("split_acc" in race for race in races)


@pytest.mark.parametrize("num_programs", [1, 3, 23])
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("kv_head", [0, 1])
def test_a_missing_split_makes_the_wait_give_up(kv_head, layer, num_programs):
    """The record names the barrier behind attention. Outputs whose splits were complete are right."""
    case = SplitCase(n_layers=3, min_split_keys=16, max_splits=5, spin_limit=100)
    expected, s = case.state(num_programs), case.state(num_programs)
    case.run(expected, num_programs, layer)
    s.split_arrivals[kv_head] = -1
    with simulate(deadlock_limit=None):
        case.run(s, num_programs, layer)
    assert s.sync[ABORT.value] == 3 + 6 * layer
    assert barrier_name(int(s.sync[ABORT.value]), 3) == f"the attention phase of layer {layer}"
    assert s.sync[ARRIVALS.value] == 1 << 30
    other, rows = 1 - kv_head, case.config.q_size // 2
    found, right = (x.attention[other * rows : (other + 1) * rows] for x in (s, expected))
    assert torch.equal(found, right)


@pytest.fixture(scope="module")
def split_model():
    """Make a model both of whose layers see all of the past, in three splits, run by five programs."""
    config = small_config(n_layers=2, layer_is_sliding=(False, False))
    tuning = small_tiles(config, attention=dict(head_keys=0, min_split_keys=16, max_splits=3), spin_limit=1000)
    return MegaModel(loud_checkpoint(config), max_context=41, num_programs=5, tuning=tuning)


UNITS_OF = {0: 2, 4: 1}  # of six units, those of the first and of the last program


def fill(model: MegaModel) -> None:
    model.reset()
    fill_cache(model.state.k_cache, model.state.v_cache, 40, seed=1)


@pytest.mark.parametrize("seed", range(4))
def test_after_a_token_the_counters_are_zero_again(split_model, seed):
    """In both layers three arrivals are waited for, one for each split, and none is left over."""
    model = split_model
    fill(model)
    with simulate(seed=seed, detect_races=True) as simulation:
        first = model.step(5, 40)
    assert simulation.races == []
    assert (model.state.split_l[:, :, :4] > 0).all(), "three splits, of four heads each"
    assert not model.state.split_arrivals.any()
    assert not model.state.sync.any()
    with simulate(seed=seed + 4):
        assert model.step(5, 40) == first
    assert not model.state.split_arrivals.any()


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("deserter", [0, 4])
def test_a_program_that_leaves_its_splits_out_is_reported(split_model, deserter, layer, monkeypatch):
    """One program's arrivals of a layer are missing: the launch ends, and after reset() the next one is right."""
    model = split_model
    fill(model)
    expected = model.step(5, 40)
    fill(model)
    arrive = decode_attention.count_arrival
    counted = []

    def arrive_unless_it_deserts(*args):
        program = int(tl.program_id(0).handle.data.item())
        counted.append(program)
        if program != deserter or counted.count(program) <= layer * UNITS_OF[deserter]:
            arrive(*args)

    monkeypatch.setattr(decode_attention, "count_arrival", arrive_unless_it_deserts)
    with simulate(deadlock_limit=None), pytest.raises(MegakernelAborted, match=f"the attention phase of layer {layer}"):
        model.step(5, 40)
    monkeypatch.undo()
    fill(model)
    assert model.step(5, 40) == expected
    assert not model.state.split_arrivals.any()
