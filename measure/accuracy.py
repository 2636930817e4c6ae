"""Compare two models' logits on the same tokens: metrics, their means, confidence intervals and thresholds.

Logits are r (reference) and t (test), [vocab]; p = softmax(r), q = softmax(t), in float64 throughout. Equal logits are
ordered by index, lowest first, as in the kernel's argmax. Cosine and rms use the logits as they are, including the
additive constant that a softmax ignores.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from command_line.comparison import CONFIDENT, METRIC_OF, METRICS

BIN_EDGES = (0.0, 0.25, 0.5, 0.75, CONFIDENT, 0.99, 1.0)
CONFIDENCE = 0.95  # of the intervals
BLOCK_ROWS = 16  # compared at a time; with a large vocabulary their float64 values take 26 MB


def top_ids(logits: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest logits, largest first: [n, vocab] -> int64 [n, min(k, vocab)]."""
    return logits.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Return the share of indices that two sets of k indices, [n, k], have in common in each row: float64 [n]."""
    return (a[:, :, None] == b[:, None, :]).any(-1).double().mean(-1)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p || q) = sum p (log p - log q) in nats, float64 [n], for log-probabilities [n, vocab].

    It cannot be negative; values that rounding makes negative become 0.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def cosine(r: Tensor, t: Tensor) -> Tensor:
    """Return r.t / (|r| |t|), float64 [n], for float64 [n, vocab]. It is 1 for two zero vectors, and 0 for only one.

    It is computed as 1 - |r/|r| - t/|t||^2 / 2, which is exactly 1 for equal vectors, and accurate near 1.
    """
    r_norm, t_norm = (x.norm(dim=-1, keepdim=True) for x in (r, t))
    r_unit, t_unit = r / r_norm.where(r_norm > 0, 1), t / t_norm.where(t_norm > 0, 1)
    value = 1 - (r_unit - t_unit).square().sum(-1) / 2
    return value.where(((r_norm > 0) == (t_norm > 0))[:, 0], 0)


def rank(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the rank, starting at 1, of one index in each row: logits [n, vocab] and ids int64 [n] -> int64 [n]."""
    logit = logits.gather(-1, ids[:, None])
    has_lower_index = torch.arange(logits.shape[-1], device=logits.device) < ids[:, None]
    return 1 + ((logits > logit) | ((logits == logit) & has_lower_index)).sum(-1)


def finite_rows(logits: Tensor) -> Tensor:
    """Return whether all logits of each row are finite: [n, vocab] -> bool [n]."""
    return logits.isfinite().all(-1)


class Positions(NamedTuple):
    """Metrics of each position: float64 [n] on the CPU, NaN at positions where a logit of either side is not finite."""

    top1: Tensor  # 1 if both sides' first choice is the same, else 0
    top5: Tensor  # share of the reference's first 5 among the test's first 5; of the whole vocabulary if it is smaller
    top10: Tensor  # share of the reference's first 10 among the test's first 10
    kl: Tensor  # KL(p || q), nats
    cosine: Tensor  # of the logits
    mean_square: Tensor  # mean over the vocabulary of (t - r)^2
    rank: Tensor  # of the reference's first choice among the test's logits; 1 is the first
    ref_probability: Tensor  # max p: of the reference's first choice
    ref_nll: Tensor  # -log p[next token], nats
    test_nll: Tensor  # -log q[next token]


def compare(ref: Tensor, test: Tensor, next_ids: Tensor) -> Positions:
    """Return the metrics for both sides' logits, float [n, vocab], and the text's next tokens, int64 [n]."""
    blocks = (x.split(BLOCK_ROWS) for x in (ref, test, next_ids))
    return join(_compare_block(*block) for block in zip(*blocks))


def _compare_block(ref: Tensor, test: Tensor, next_ids: Tensor) -> Positions:
    finite = finite_rows(ref) & finite_rows(test)
    ref_top, test_top = top_ids(ref, 10), top_ids(test, 10)
    choice = ref_top[:, 0]
    r, t = ref.double(), test.double()
    log_p, log_q = r.log_softmax(-1), t.log_softmax(-1)
    values = Positions(
        top1=choice == test_top[:, 0],
        top5=overlap(ref_top[:, :5], test_top[:, :5]),
        top10=overlap(ref_top, test_top),
        kl=kl_divergence(log_p, log_q),
        cosine=cosine(r, t),
        mean_square=(t - r).square().mean(-1),
        rank=rank(t, choice),
        ref_probability=log_p.amax(-1).exp(),
        ref_nll=-log_p.gather(-1, next_ids[:, None])[:, 0],
        test_nll=-log_q.gather(-1, next_ids[:, None])[:, 0],
    )
    return Positions(*(value.double().where(finite, math.nan).cpu() for value in values))


def join(blocks: Iterable[Positions]) -> Positions:
    """Concatenate the metrics of one or more blocks of positions."""
    return Positions(*map(torch.cat, zip(*blocks)))


def nll_differences(windows: Iterable[Positions]) -> list[float]:
    """Return, for each window, the mean over its positions of test_nll - ref_nll, in nats per token."""
    return [(window.test_nll - window.ref_nll).mean().item() for window in windows]


def summarize(windows: Sequence[Positions]) -> dict[str, float]:
    """Return the METRICS of one or more windows by key; NaN if a logit was not finite or no position contributes.

    Means weigh all positions equally; rms = sqrt(mean mean_square), ppl = exp(mean nll). The last two metrics weigh all
    windows equally, however many positions each has: nll_difference = mean of nll_differences, ppl_ratio = its exp.
    """
    p = join(windows)
    confident = p.top1[~(p.ref_probability <= CONFIDENT)]  # negated so that NaN is included
    difference = math.fsum(nll_differences(windows)) / len(windows)
    means = {key: getattr(p, key).mean().item() for key in ("top1", "top5", "top10", "kl", "cosine", "rank")}
    values = means | {
        "top1_confident": confident.mean().item(),
        "rms": p.mean_square.mean().sqrt().item(),
        "ppl_ref": p.ref_nll.mean().exp().item(),
        "ppl_test": p.test_nll.mean().exp().item(),
        "nll_difference": difference,
        "ppl_ratio": _exp(difference),
    }
    return {metric.key: values[metric.key] for metric in METRICS}


def _exp(x: float) -> float:
    """Return e^x, or infinity where math.exp would raise OverflowError."""
    return torch.tensor(x, dtype=torch.float64).exp().item()


@dataclass(frozen=True)
class Bin:
    """Means over the n positions with low < max p <= high; NaN if n is 0."""

    low: float
    high: float
    n: int
    top1: float
    kl: float


def confidence_bins(p: Positions) -> tuple[Bin, ...]:
    """Group positions by the reference's probability between BIN_EDGES. Positions that are NaN are in no bin."""

    def bin_of(low: float, high: float) -> Bin:
        inside = (p.ref_probability > low) & (p.ref_probability <= high)
        return Bin(low, high, int(inside.sum()), p.top1[inside].mean().item(), p.kl[inside].mean().item())

    return tuple(bin_of(low, high) for low, high in itertools.pairwise(BIN_EDGES))


@dataclass(frozen=True)
class Interval:
    """A mean and its confidence interval at level CONFIDENCE, for independent, normally distributed samples."""

    mean: float
    low: float
    high: float
    n: int

    def exp(self) -> "Interval":
        """Return the interval of a ratio, given that of the mean of its logarithm."""
        return Interval(_exp(self.mean), _exp(self.low), _exp(self.high), self.n)


def mean_interval(samples: Sequence[float]) -> Interval:
    """Return Student's interval of n >= 2 samples: mean +- t s / sqrt(n), where s^2 = sum (x - mean)^2 / (n - 1).

    t is the quantile of n - 1 degrees of freedom.
    """
    n = len(samples)
    mean = math.fsum(samples) / n
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n - 1))
    half = t_quantile(CONFIDENCE, n - 1) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def t_quantile(probability: float, df: int) -> float:
    """Return the t for which Student's distribution with df degrees of freedom has a probability between -t and t.

    It is found by bisection on the angle atan(t / sqrt(df)): from 0 to pi / 2 the probability rises from 0 to 1.
    """
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, df) < probability else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _t_probability(theta: float, df: int) -> float:
    """Return A(t | df) for t = sqrt(df) tan(theta).

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 (odd df) and 26.7.4 (even df).
    """
    cos = math.cos(theta)
    odd = df % 2
    term = cos if odd else 1.0
    total = 0.0
    for i in range(1 + odd, df, 2):
        total += term
        term *= cos * cos * i / (i + 1)
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def failures(values: Mapping[str, float], thresholds: Mapping[str, float]) -> list[str]:
    """Return a line for each threshold, by metric key, that a value misses; NaN misses every threshold."""
    lines = []
    for key, threshold in thresholds.items():
        value, is_minimum = values[key], METRIC_OF[key].higher_is_better
        if math.isnan(value):
            lines.append(f"{key} is undefined, and {threshold:.9g} was asked for")
        elif value < threshold if is_minimum else value > threshold:
            lines.append(f"{key} {value:.9g} is {'below' if is_minimum else 'above'} {threshold:.9g}")
    return lines
