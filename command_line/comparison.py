"""Options of acc_eval.py: what it compares, on which text, and the metrics that it reports or takes thresholds for."""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from checkpoints.config import FP8_GROUPS, FP8_ROWS, DenseFormats
from command_line.options import FP8_COMPONENTS, add_report_arguments
from command_line.parser import positive_int, token_id_list

SIDE_NAMES = ("reference", "reference-quant", "default", "quant")
FP8_NAMES = {"fp8-attn": ("qkv", "o"), "fp8-head": ("head",)} | {f"fp8-{name}": (name,) for name in FP8_COMPONENTS}
GROUPS_NAME = "scale-32"  # rather than a scale for each row
SIDE_HELP = (
    f"one of the sides {', '.join(SIDE_NAMES)}, each with any of {', '.join(FP8_NAMES)}, {GROUPS_NAME} after a +"
)
SHIPPED_TEXTS = 154  # sonnets
SOURCES = ("shipped", "greedy", "random")
MIN_WINDOWS = 4  # fewer give no meaningful confidence interval
DEFAULT_WINDOW, DEFAULT_WINDOWS = 256, 5
CPU_WINDOWS = 8
CONFIDENT = 0.9  # the reference's probability of its first choice, above which top1_confident counts


@dataclass(frozen=True)
class Side:
    """An implementation with its number formats, as the command line names it."""

    name: str
    kernel: bool  # False: reference.py, in float32 with a float32 KV cache
    quant: bool  # experts' inputs rounded to MXFP8
    dense: DenseFormats

    @classmethod
    def parse(cls, text: str) -> "Side":
        """Parse a side's name, for argparse. The error of a bad one lists the valid ones."""
        name, *formats = text.split("+")
        matrices = {matrix for word in formats for matrix in FP8_NAMES.get(word, ())}
        if name not in SIDE_NAMES or not {*formats} <= {*FP8_NAMES, GROUPS_NAME} or bool(formats) != bool(matrices):
            raise argparse.ArgumentTypeError(f"{text!r} is not {SIDE_HELP}")
        dense = DenseFormats(**dict.fromkeys(matrices, FP8_GROUPS if GROUPS_NAME in formats else FP8_ROWS))
        return cls(text, kernel=not name.startswith("reference"), quant=name.endswith("quant"), dense=dense)


@dataclass(frozen=True)
class Metric:
    """A row of the table of metrics, and the direction of its threshold."""

    key: str
    meaning: str  # without "|", as it is printed in a Markdown table
    higher_is_better: bool  # a threshold is a minimum; else a maximum


METRICS = (
    Metric("top1", "share of positions where both sides' first choice is the same", True),
    Metric("top1_confident", f"top1 where the reference's probability is above {CONFIDENT}", True),
    Metric("top5", "share of the reference's first 5 among the test's first 5", True),
    Metric("top10", "share of the reference's first 10 among the test's first 10", True),
    Metric("kl", "mean KL divergence of the test side from the reference, nats", False),
    Metric("cosine", "mean cosine of the logits", True),
    Metric("rms", "root mean square difference of the logits", False),
    Metric("rank", "mean rank of the reference's first choice at the test side; 1 is best", False),
    Metric("ppl_ref", "perplexity of the reference", False),
    Metric("ppl_test", "perplexity of the test side", False),
    Metric("nll_difference", "test - ref, nats per token: mean of the windows", False),
    Metric("ppl_ratio", "test / ref: exp of nll_difference", False),
)
METRIC_OF = {metric.key: metric for metric in METRICS}


def add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the sides and the text that they are compared on."""
    parser.add_argument("--test-model", metavar="MODEL", help="of the test side; default: the same as the reference's")
    for flag, default in (("--ref", "reference"), ("--test", "default")):
        parser.add_argument(
            flag, metavar="SIDE", type=Side.parse, default=default, help=f"{SIDE_HELP}; default: %(default)s"
        )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", type=Path, help="a text in UTF-8; special tokens in it are tokens")
    source.add_argument(
        "--streams",
        choices=SOURCES,
        help=f"shipped: the {SHIPPED_TEXTS} sonnets that the shipped model recites, as answers in a chat, which alone "
        "count; greedy: what the reference side says to a prompt; random: token ids; default: shipped, or random for "
        "random weights",
    )
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="of --streams greedy, to continue; default: the demo's chat")
    prompt.add_argument("--prompt-ids", metavar="IDS", type=token_id_list, help="the prompt as token ids: 12,34,56")
    parser.set_defaults(chat=None, max_context=None)  # prompt_ids_from reads them
    parser.add_argument(
        "--tokens",
        metavar="N",
        type=positive_int,
        help=f"of --streams greedy (stop ids end nothing) or random; default: {DEFAULT_WINDOWS} windows",
    )
    parser.add_argument(
        "--window",
        metavar="N",
        type=positive_int,
        help="positions a window; a stream is cut into windows, each fed to an empty cache, and what is left over is "
        f"dropped; default: {DEFAULT_WINDOW}, of the shipped texts each a whole one",
    )
    parser.add_argument(
        "--max-windows",
        metavar="N",
        type=positive_int,
        help=f"the first N windows only, {MIN_WINDOWS} or more; default: all, CPU {CPU_WINDOWS}",
    )


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --fail-under, --json and --plot."""
    parser.add_argument(
        "--fail-under",
        metavar="KEY=VALUE,...",
        type=threshold_list,
        default={},
        help="exit with 1 unless each metric is at least its value ("
        f"{', '.join(metric.key for metric in METRICS if metric.higher_is_better)}), or at most ("
        f"{', '.join(metric.key for metric in METRICS if not metric.higher_is_better)})",
    )
    add_report_arguments(parser, "divergence and agreement")


def threshold_list(text: str) -> dict[str, float]:
    """Parse KEY=VALUE pairs separated by commas, for argparse. Each key is a metric's and stands once."""
    thresholds = {}
    for word in text.split(","):
        key, _, number = (part.strip() for part in word.partition("="))
        if key not in METRIC_OF:
            raise argparse.ArgumentTypeError(f"{key!r} is not one of {', '.join(METRIC_OF)}")
        if key in thresholds:
            raise argparse.ArgumentTypeError(f"{key} is there twice")
        thresholds[key] = _number(number)
        if not math.isfinite(thresholds[key]):
            raise argparse.ArgumentTypeError(f"{word.strip()!r} is not of the form KEY=VALUE, such as {key}=0.5")
    return thresholds


def _number(text: str) -> float:
    """Parse a number; NaN if the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
