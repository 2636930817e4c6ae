"""measure/accuracy.py against plain implementations: lists, loops and 60 decimal digits."""

import math
from decimal import Decimal, localcontext

import pytest
import torch

from command_line.comparison import METRICS
from measure import accuracy
from measure.accuracy import (
    BLOCK_ROWS,
    Positions,
    compare,
    confidence_bins,
    failures,
    join,
    mean_interval,
    summarize,
    t_quantile,
)

HUGE = 3e38

# Name -> (reference, test): logits that go wrong easily.
PAIRS = {
    "vocabulary of one": ([2.5], [-1.0]),
    "equal": ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]),
    "shifted": ([1.0, 2.0, 3.0], [101.0, 102.0, 103.0]),
    "all alike": ([0.0] * 8, [7.0] * 8),
    "zeros against something": ([0.0] * 4, [0.0, 1.0, 0.0, 0.0]),
    "something against zeros": ([0.0, 1.0, 0.0, 0.0], [0.0] * 4),
    "zeros of both signs": ([0.0, -0.0, 0.0], [-0.0, 0.0, -0.0]),
    "ties for the first place": ([3.0, 5.0, 5.0, 1.0], [5.0, 3.0, 5.0, 5.0]),
    "the reference's choice is tied at the test side": ([0.0, 0.0, 9.0, 0.0], [4.0, 1.0, 4.0, 4.0]),
    "ties at the fifth place": ([2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0]),
    "turned round": ([float(i) for i in range(10)], [float(-i) for i in range(10)]),
    "opposite": ([1.0, -2.0, 3.0], [-1.0, 2.0, -3.0]),
    "one-hot, the same": ([0.0, 1e4, 0.0], [0.0, 2e4, 0.0]),
    "one-hot, another": ([0.0, 1e4, 0.0], [1e4, 0.0, 0.0]),
    "negative": ([-900.0, -901.0, -905.0], [-1e3, -999.0, -998.0]),
    "huge": ([HUGE, -HUGE, 0.0], [-HUGE, HUGE, 1.0]),
    "huge, nearly alike": ([HUGE, HUGE, -HUGE], [HUGE, HUGE * (1 - 2**-20), -HUGE]),
    "tiny": ([1e-38, 2e-38, 0.0], [2e-38, 1e-38, 1e-45]),
    "alike but for one float32 step": ([1.0, 0.5, 0.25], [1.0 + 2**-23, 0.5, 0.25]),
}


def plain(ref: list[float], test: list[float], next_id: int) -> dict[str, float]:
    """Compute all fields of `Positions` at one position."""
    with localcontext() as context:
        context.prec = 60
        r, t = [Decimal(x) for x in ref], [Decimal(x) for x in test]
        log_p, log_q = plain_log_softmax(r), plain_log_softmax(t)
        p = [x.exp() for x in log_p]
        kl = sum((a * (x - y) for a, x, y in zip(p, log_p, log_q)), Decimal(0))
        norms = [sum(x * x for x in side).sqrt() for side in (r, t)]
        dot = sum(x * y for x, y in zip(r, t))
        cosine = dot / (norms[0] * norms[1]) if all(norms) else Decimal(not any(norms))
        mean_square = sum((y - x) ** 2 for x, y in zip(r, t)) / len(r)
    ref_order, test_order = (sorted(range(len(side)), key=lambda i: (-side[i], i)) for side in (ref, test))
    shares = {}
    for k in (5, 10):
        shares[k] = len(set(ref_order[:k]) & set(test_order[:k])) / min(k, len(ref))
    return {
        "top1": float(ref_order[0] == test_order[0]),
        "top5": shares[5],
        "top10": shares[10],
        "kl": float(kl),
        "cosine": float(cosine),
        "mean_square": float(mean_square),
        "rank": 1 + test_order.index(ref_order[0]),
        "ref_probability": float(max(p)),
        "ref_nll": float(-log_p[next_id]),
        "test_nll": float(-log_q[next_id]),
    }


def plain_log_softmax(logits: list[Decimal]) -> list[Decimal]:
    largest = max(logits)
    total = sum((x - largest).exp() for x in logits).ln()
    return [x - largest - total for x in logits]


def assert_equal_to_plain(ref: torch.Tensor, test: torch.Tensor, next_ids: torch.Tensor) -> None:
    positions = compare(ref, test, next_ids)
    assert (positions.kl >= 0).all()
    for row, (r, t, next_id) in enumerate(zip(ref.tolist(), test.tolist(), next_ids.tolist())):
        for name, expected in plain(r, t, next_id).items():
            value = getattr(positions, name)[row].item()
            assert value == pytest.approx(expected, rel=1e-9, abs=1e-15), (name, row)


@pytest.mark.parametrize(("ref", "test"), PAIRS.values(), ids=PAIRS)
def test_hard_cases(ref, test):
    ref, test = torch.tensor([ref]), torch.tensor([test])
    for next_id in range(ref.shape[1]):
        assert_equal_to_plain(ref, test, torch.tensor([next_id]))


@pytest.mark.parametrize("vocab_size", range(1, 11))
@pytest.mark.parametrize("spread", [0.1, 3.0, 300.0])
def test_metrics_of_random_logits_agree(vocab_size, spread):
    """The test side is sometimes near, sometimes far; every fourth row consists of ties."""
    rng = torch.Generator().manual_seed(vocab_size)
    ref = torch.randn(24, vocab_size, generator=rng) * spread
    distance = torch.tensor([1e-3, 0.1, 1.0, 10.0]).repeat(6)[:, None]
    test = ref + torch.randn(24, vocab_size, generator=rng) * distance
    ref[::4], test[::4] = ref[::4].round(), test[::4].round()
    assert_equal_to_plain(ref, test, torch.randint(vocab_size, (24,), generator=rng))


def test_a_small_divergence_is_not_lost_in_rounding():
    """KL of small differences d is about variance(d) / 2, here 1e-9 as a sum of terms of 1e-5."""
    rng = torch.Generator().manual_seed(1)
    ref = torch.randn(4, 10, generator=rng)
    test = ref + torch.randn(4, 10, generator=rng) * 1e-5
    for row, (r, t) in enumerate(zip(ref.tolist(), test.tolist())):
        assert compare(ref, test, torch.zeros(4, dtype=torch.int64)).kl[row] == pytest.approx(
            plain(r, t, 0)["kl"], 1e-4
        )


@pytest.mark.parametrize("logits", [pair[i] for pair in PAIRS.values() for i in (0, 1)])
def test_identical_logits(logits):
    logits = torch.tensor([logits])
    positions = compare(logits, logits.clone(), torch.tensor([0]))
    exact = (positions.top1, positions.top5, positions.top10, positions.cosine, positions.rank)
    assert [value.item() for value in exact] == [1] * 5
    assert (positions.kl.item(), positions.mean_square.item()) == (0, 0)
    assert torch.equal(positions.ref_nll, positions.test_nll)


def test_values_are_float64_on_the_cpu():
    positions = compare(torch.randn(3, 7).bfloat16(), torch.randn(3, 7).bfloat16(), torch.tensor([0, 1, 2]))
    assert {(value.dtype, value.device.type, value.shape) for value in positions} == {(torch.float64, "cpu", (3,))}


@pytest.mark.parametrize("n", [0, 1, BLOCK_ROWS, 2 * BLOCK_ROWS + 3])
def test_blocks_of_rows_are_rows(n):
    ref, test, ids = torch.randn(n, 9), torch.randn(n, 9), torch.randint(9, (n,))
    together = compare(ref, test, ids)
    assert len(together.kl) == n
    for row in range(n):
        alone = compare(ref[row : row + 1], test[row : row + 1], ids[row : row + 1])
        assert all(torch.equal(a[row : row + 1], b) for a, b in zip(together, alone))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_row_that_is_not_finite_has_no_value(bad, side):
    """Such a row must not look like agreement, whichever logit it is; other rows keep their values."""
    for column in range(6):
        pair = [torch.randn(3, 6), torch.randn(3, 6)]
        clean = compare(*pair, torch.tensor([0, 1, 2]))
        pair[side] = pair[side].clone()
        pair[side][1, column] = bad
        positions = compare(*pair, torch.tensor([0, 1, 2]))
        assert all(value[1].isnan() for value in positions)
        assert all(torch.equal(a[[0, 2]], b[[0, 2]]) for a, b in zip(positions, clean))
        assert accuracy.finite_rows(pair[side]).tolist() == [True, False, True]


def positions_of(**columns) -> Positions:
    """Make Positions of the given fields; the others are zeros."""
    n = len(next(iter(columns.values())))
    values = {name: torch.tensor(column, dtype=torch.float64) for name, column in columns.items()}
    return Positions(**{name: values.get(name, torch.zeros(n).double()) for name in Positions._fields})


def random_positions(n: int, seed: int) -> Positions:
    rng = torch.Generator().manual_seed(seed)
    ref = torch.randn(n, 8, generator=rng) * 5
    test = ref + torch.randn(n, 8, generator=rng)
    return compare(ref, test, torch.randint(8, (n,), generator=rng))


def test_summary_of_windows_of_several_lengths():
    windows = [random_positions(n, seed) for seed, n in enumerate((3, 11, 6, 20))]
    values = summarize(windows)
    assert list(values) == [metric.key for metric in METRICS]

    columns = {name: [x for window in windows for x in getattr(window, name).tolist()] for name in Positions._fields}
    assert len(columns["kl"]) == 40
    for key in ("top1", "top5", "top10", "kl", "cosine", "rank"):
        assert values[key] == pytest.approx(sum(columns[key]) / 40, rel=1e-12)
    confident = [top1 for top1, p in zip(columns["top1"], columns["ref_probability"]) if p > 0.9]
    assert 0 < len(confident) < 40
    assert values["top1_confident"] == pytest.approx(sum(confident) / len(confident), rel=1e-12)
    assert values["rms"] == pytest.approx(math.sqrt(sum(columns["mean_square"]) / 40), rel=1e-12)
    for side in ("ref", "test"):
        assert values[f"ppl_{side}"] == pytest.approx(math.exp(sum(columns[f"{side}_nll"]) / 40), rel=1e-12)

    differences = [
        sum(window.test_nll.tolist()) / n - sum(window.ref_nll.tolist()) / n
        for window, n in zip(windows, (3, 11, 6, 20))
    ]
    assert values["nll_difference"] == pytest.approx(sum(differences) / 4, rel=1e-12)
    assert values["ppl_ratio"] == pytest.approx(math.exp(sum(differences) / 4), rel=1e-12)
    assert accuracy.nll_differences(windows) == pytest.approx(differences, rel=1e-12)


def test_perplexities_of_equal_windows_have_the_ratio():
    windows = [random_positions(7, seed) for seed in range(4)]
    values = summarize(windows)
    assert values["ppl_ratio"] == pytest.approx(values["ppl_test"] / values["ppl_ref"], rel=1e-12)


def test_a_perplexity_too_large_for_a_float_is_infinite():
    values = summarize([positions_of(ref_nll=[0.0], test_nll=[1e38])])
    assert (values["ppl_test"], values["ppl_ratio"], values["ppl_ref"]) == (math.inf, math.inf, 1)
    assert mean_interval([1e38, 1e38]).exp().mean == math.inf


def test_confident_means_above_and_may_be_nowhere():
    values = summarize([positions_of(top1=[1, 0, 1, 0], ref_probability=[0.9, 0.9, 0.91, 0.95])])
    assert values["top1_confident"] == 0.5
    assert math.isnan(summarize([positions_of(top1=[1.0], ref_probability=[0.9])])["top1_confident"])


def test_one_nan_is_in_every_mean():
    windows = [random_positions(5, 1), compare(torch.full((1, 3), math.nan), torch.zeros(1, 3), torch.tensor([0]))]
    values = summarize(windows)
    assert all(math.isnan(value) for value in values.values())
    assert len(failures(values, dict.fromkeys(values, 1e9))) == len(METRICS)
    assert math.isnan(mean_interval(accuracy.nll_differences(windows)).low)


def test_bins_hold_each_position_once():
    probabilities = [0.01, 0.25, 0.26, 0.5, 0.75, 0.9, 0.91, 0.99, 0.995, 1.0]
    p = positions_of(ref_probability=probabilities, top1=[1, 0, 1, 1, 0, 1, 0, 1, 1, 0], kl=list(range(10)))
    bins = confidence_bins(p)
    assert [(b.low, b.high, b.n) for b in bins] == [
        (0, 0.25, 2),
        (0.25, 0.5, 2),
        (0.5, 0.75, 1),
        (0.75, 0.9, 1),
        (0.9, 0.99, 2),
        (0.99, 1, 2),
    ]
    assert [b.top1 for b in bins] == [0.5, 1, 0, 1, 0.5, 0.5]
    assert [b.kl for b in bins] == [0.5, 2.5, 4, 5, 6.5, 8.5]
    empty = confidence_bins(positions_of(ref_probability=[math.nan, 0.3]))
    assert [b.n for b in empty] == [0, 1, 0, 0, 0, 0]
    assert math.isnan(empty[0].top1)


def test_a_sure_reference_is_in_the_last_bin():
    """This holds whatever exp(log softmax) rounds to."""
    ref = torch.tensor([[100.0, 0.0], [0.0, 1e30]])
    assert confidence_bins(compare(ref, ref, torch.tensor([0, 1])))[-1].n == 2


# As tables of Student's distribution give them, three decimals.
@pytest.mark.parametrize(
    ("probability", "df", "expected"),
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 5, 2.571),
        (0.95, 6, 2.447),
        (0.95, 7, 2.365),
        (0.95, 9, 2.262),
        (0.95, 10, 2.228),
        (0.95, 15, 2.131),
        (0.95, 29, 2.045),
        (0.95, 30, 2.042),
        (0.95, 60, 2.000),
        (0.95, 120, 1.980),
        (0.95, 100_000, 1.960),
        (0.90, 10, 1.812),
        (0.99, 1, 63.657),
        (0.99, 2, 9.925),
        (0.99, 5, 4.032),
        (0.99, 30, 2.750),
        (0.50, 1, 1.000),
        (0.50, 4, 0.741),
    ],
)
def test_quantiles_of_student(probability, df, expected):
    assert round(t_quantile(probability, df), 3) == expected


def test_an_interval_worked_out_by_hand():
    """For 1 .. 5 the mean is 3 and s^2 = 10 / 4, so the interval is 2.776 * sqrt(2.5 / 5) on either side."""
    interval = mean_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (interval.mean, interval.n) == (3, 5)
    assert (interval.low, interval.high) == pytest.approx((3 - 1.9633, 3 + 1.9633), abs=1e-4)
    ratio = interval.exp()
    assert (ratio.mean, ratio.low, ratio.n) == pytest.approx((math.e**3, math.exp(interval.low), 5))


def test_samples_all_alike_have_an_interval_of_no_width():
    interval = mean_interval([0.1] * 7)
    assert interval.low == interval.mean == interval.high == pytest.approx(0.1)


def test_thresholds():
    values = {"top1": 0.913, "kl": 0.02, "ppl_ratio": 1.5, "cosine": 1.0, "rank": math.nan}
    assert failures(values, {}) == []
    assert failures(values, {"top1": 0.913, "kl": 0.02, "ppl_ratio": 1.5, "cosine": 1.0}) == []
    assert failures(values, {"top1": 0.99, "cosine": 0.9, "kl": 0.01, "ppl_ratio": 1.4, "rank": 5.0}) == [
        "top1 0.913 is below 0.99",
        "kl 0.02 is above 0.01",
        "ppl_ratio 1.5 is above 1.4",
        "rank is undefined, and 5 was asked for",
    ]


def test_which_way_each_threshold_goes():
    better_if_more = [metric.key for metric in METRICS if metric.higher_is_better]
    assert better_if_more == ["top1", "top1_confident", "top5", "top10", "cosine"]


def test_joined_positions_keep_their_order():
    joined = join([positions_of(kl=[1.0, 2.0]), positions_of(kl=[]), positions_of(kl=[3.0])])
    assert joined.kl.tolist() == [1, 2, 3]
