"""Compare two configurations of the model on the same tokens: agreement, divergence and perplexity.

Both sides are fed the same text, teacher-forced, and their logits are compared at each position. The metrics are
defined in measure/accuracy.py. With --fail-under the script is a gate: exit code 1 if a metric misses its threshold. A
logit that is not finite is always a failure.
"""

import host.start

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from checkpoints.checkpoint import Checkpoint
from checkpoints.config import ModelConfig, check_token, held_formats
from checkpoints.harmony import chat_ids
from command_line.comparison import (
    CPU_WINDOWS,
    DEFAULT_WINDOW,
    DEFAULT_WINDOWS,
    METRICS,
    MIN_WINDOWS,
    SHIPPED_TEXTS,
    Side,
)
from command_line.options import DEFAULT_MODEL, FP8_COMPONENTS
from command_line.run import EXIT_FAILURE, run_main
from command_line.scripts import arguments
from gpt_oss_megakernel import MegaModel
from host import cli
from host.backend import usable_device
from host.generation import prompt_ids_from
from host.limits import check_memory
from host.weights import Weights
from load_model import files_of, open_checkpoint, open_model, open_tokenizer
from measure.accuracy import (
    CONFIDENCE,
    Bin,
    Interval,
    Positions,
    compare,
    confidence_bins,
    failures,
    finite_rows,
    join,
    mean_interval,
    nll_differences,
    summarize,
)
from measure.benchmark import write_reports
from measure.conditions import conditions
from measure.plot import png
from measure.report import check_report_files, display_name, markdown_table, write_file
from reference import Reference
from system.errors import InputError
from system.files import read_small
from tokenizer_util import Tokenizer

LONGEST_ANSWER = 400  # tokens of the shipped model
CPU_CHUNK, GPU_CHUNK = 32, 256  # positions at a time; a large reference reads its experts once per chunk
MAX_TEXT_BYTES = 64 << 20
SEED = 0  # for random tokens
LEAST_KL = 1e-12  # the plot clamps smaller values to this


@dataclass(frozen=True)
class OpenSide:
    """A loaded side: a model with its KV cache."""

    reset: Callable[[], None]  # forgets the sequence
    logits: Callable[[Sequence[int], int], Tensor]  # (token ids, first position) -> float32 [tokens, vocab]
    weights: Weights | None = None  # the kernel's, to share with another kernel side of the same checkpoint


def open_side(
    side: Side, checkpoint: Checkpoint, max_context: int, device: torch.device, weights: Weights | None = None
) -> OpenSide:
    """Load a side, which shares `weights` if they are given. Raises InputError if it does not fit the device."""
    if side.kernel:
        show_progress = sys.stderr.isatty()
        model = MegaModel(
            checkpoint, side.quant, max_context, show_progress=show_progress, weights=weights, dense=side.dense
        )
        return OpenSide(model.reset, functools.partial(kernel_logits, model), model.weights)
    config, dtype = checkpoint.config, torch.float32
    # The LM head in float32 is the largest of the converted tensors.
    check_memory(config, max_context, dtype, device, weights=4 * config.vocab_size * config.hidden_size)
    reference = Reference(checkpoint, side.quant, dtype, max_context, device, dense=side.dense)
    return OpenSide(reference.reset, reference.forward)


def kernel_logits(model: MegaModel, token_ids: Sequence[int], position: int) -> Tensor:
    """Return the kernel's logits, float32 [tokens, vocab], by one launch for each token."""
    return torch.stack([model.logits(token_id, position + i) for i, token_id in enumerate(token_ids)])


@dataclass(frozen=True)
class Stream:
    """A text as token ids. Its first n_context tokens are fed, but their predictions are not compared."""

    token_ids: list[int]
    n_context: int = 1


@dataclass(frozen=True)
class Window:
    """A piece of a stream. All tokens but the last are fed from position 0 on; the first n_skipped are not compared."""

    token_ids: list[int]
    n_skipped: int = 0

    @property
    def n_positions(self) -> int:
        """The number of positions that are fed."""
        return len(self.token_ids) - 1


@dataclass(frozen=True)
class Plan:
    """Which text to feed, and in which pieces."""

    source: str  # where the streams come from, as the report and errors name it
    window: int | None  # positions; None: each stream is one window
    max_windows: int | None
    n_tokens: int  # length of greedy or random streams
    chunk: int  # positions at a time


@dataclass(frozen=True)
class WindowResult:
    """The comparison of both sides in one window."""

    positions: Positions  # the compared ones
    n_fed: int
    ref_not_finite: int  # fed positions at which a logit of the reference side is not finite
    test_not_finite: int


@dataclass(frozen=True)
class Report:
    """All results of a comparison, and its conditions."""

    model: str
    test_model: str
    ref: str
    test: str
    source: str  # Plan.source
    conditions: dict  # measure.conditions.conditions
    windows: tuple[WindowResult, ...]
    thresholds: dict[str, float]

    @property
    def title(self) -> str:
        """The report's first line, which names sides and models."""
        other = "" if self.test_model == self.model else f" of {self.test_model}"
        return f"{self.test}{other} against {self.ref}: {self.model}"

    @property
    def positions_fed(self) -> int:
        return sum(window.n_fed for window in self.windows)

    @property
    def positions(self) -> Positions:
        return join(window.positions for window in self.windows)

    @property
    def values(self) -> dict[str, float]:
        return summarize([window.positions for window in self.windows])

    @property
    def nll_difference(self) -> Interval:
        return mean_interval(nll_differences(window.positions for window in self.windows))

    @property
    def bins(self) -> tuple[Bin, ...]:
        return confidence_bins(self.positions)

    @property
    def failures(self) -> list[str]:
        """One line for each failure; an empty list means that the verdict is green."""
        counts = [
            (f"ref {self.ref}", sum(window.ref_not_finite for window in self.windows)),
            (f"test {self.test}", sum(window.test_not_finite for window in self.windows)),
        ]
        of_all = f"of {self.positions_fed} positions"
        lines = [f"{name}: logits that are not finite at {n} {of_all}" for name, n in counts if n]
        return lines + failures(self.values, self.thresholds)


def parse_arguments() -> argparse.Namespace:
    """Parse the command line and set args.streams. Raises InputError if options are wrong or do not go together."""
    args = arguments("acc_eval.py")
    args.streams = args.streams or ("text" if args.text else "random" if args.random_weights else "shipped")
    if args.streams != "greedy" and (args.prompt is not None or args.prompt_ids is not None):
        raise InputError("--prompt and --prompt-ids go with --streams greedy")
    if args.tokens and args.streams not in ("greedy", "random"):
        raise InputError("--tokens goes with --streams greedy or random")
    return args


def plan_for(args: argparse.Namespace, on_cpu: bool) -> Plan:
    """Return what the command line asks for, with defaults that suit the device.

    Raises InputError if that makes fewer than MIN_WINDOWS windows.
    """
    window = args.window or (None if args.streams == "shipped" else DEFAULT_WINDOW)
    least = MIN_WINDOWS * (window or 0)
    if args.tokens and args.tokens < least:
        raise InputError(f"--tokens {args.tokens}: {MIN_WINDOWS} windows of {window} positions take {least}")
    if args.max_windows and args.max_windows < MIN_WINDOWS:
        raise InputError(f"--max-windows {args.max_windows}: {MIN_WINDOWS} or more are needed")
    return Plan(
        source=f"--text {args.text}" if args.text else f"--streams {args.streams}",
        window=window,
        max_windows=args.max_windows or (CPU_WINDOWS if on_cpu else None),
        n_tokens=args.tokens or DEFAULT_WINDOWS * (window or 0),
        chunk=CPU_CHUNK if on_cpu else GPU_CHUNK,
    )


def fixed_streams(
    args: argparse.Namespace, tokenizer: Tokenizer | None, config: ModelConfig, n_tokens: int, device: torch.device
) -> Iterable[Stream]:
    """Return the streams of --text, --streams random or --streams shipped, which need no side to generate them."""
    if args.streams == "random":
        return [random_stream(n_tokens, config)]
    if tokenizer is None:
        flag = "--text" if args.text else "--streams shipped"
        raise InputError(f"{flag}: this model has no tokenizer; use --streams greedy or random")
    if args.text:
        return [text_stream(args.text, tokenizer)]
    return shipped_streams(tokenizer, device, sys.stderr.isatty())


def text_stream(path: Path, tokenizer: Tokenizer) -> Stream:
    """Encode a whole file. Raises InputError if it cannot be read or is not UTF-8."""
    try:
        text = read_small(path, MAX_TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start})") from None
    return Stream(tokenizer.encode(text))


def shipped_streams(tokenizer: Tokenizer, device: torch.device, show_progress: bool = False) -> Iterator[Stream]:
    """Yield the shipped texts, encoded by `tokenizer`: each is the answer in a harmony chat, its question is context.

    The shipped model knows the texts by heart and recites them, by reference.py on a CPU and by the faster kernel on a
    GPU. The texts are equal on all machines, because a right token's logit leads by at least 4.
    """
    shipped = open_checkpoint(DEFAULT_MODEL)
    shipped_tokenizer = open_tokenizer(shipped)
    model = (Reference if device.type == "cpu" else MegaModel)(shipped, max_context=1024)
    numbers = range(1, SHIPPED_TEXTS + 1)
    for number in tqdm(numbers, unit=" texts", desc="reciting", leave=False, disable=not show_progress):
        question = f"Recite sonnet {number}."
        with one_thread():
            answer_ids = model.generate(chat_ids(shipped_tokenizer, question), LONGEST_ANSWER)
            answer = shipped_tokenizer.decode(answer_ids)
        prompt_ids = chat_ids(tokenizer, question)
        yield Stream(prompt_ids + tokenizer.encode(answer), len(prompt_ids))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: the shipped model's matrices are too small for several, 4 against 40 ms a token."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_stream(n_tokens: int, config: ModelConfig) -> Stream:
    """Return a first token and n_tokens more, drawn uniformly from the vocabulary."""
    generator = torch.Generator().manual_seed(SEED)
    return Stream(torch.randint(config.vocab_size, (1 + n_tokens,), generator=generator).tolist())


def greedy_stream(
    ref: OpenSide, prompt_ids: list[int], n_tokens: int, chunk: int, show_progress: bool = False
) -> Stream:
    """Return a prompt, which is context, and n_tokens that `ref` decodes greedily after it; stop ids do not end it."""
    token_ids, fed = list(prompt_ids), 0
    ref.reset()
    for _ in tqdm(range(n_tokens), unit=" tokens", desc="decoding", leave=False, disable=not show_progress):
        for start in range(fed, len(token_ids), chunk):
            last = ref.logits(token_ids[start : start + chunk], start)[-1]
        fed = len(token_ids)
        token_ids.append(int(last.argmax()))  # the lowest id on a tie
    return Stream(token_ids, len(prompt_ids))


def cut(stream: Stream, length: int | None) -> Iterator[Window]:
    """Yield consecutive windows of `length` positions, each with the token that follows it; None: one whole window.

    The remainder is dropped. So are windows of which less than half is compared, because their means over few positions
    would weigh as much as those of other windows.
    """
    last = len(stream.token_ids) - 1
    length = length or max(1, last)
    for start in range(0, last - length + 1, length):
        n_skipped = max(0, stream.n_context - 1 - start)
        if 2 * n_skipped <= length:
            yield Window(stream.token_ids[start : start + length + 1], n_skipped)


def cut_all(streams: Iterable[Stream], plan: Plan, config: ModelConfig) -> list[Window]:
    """Return the first plan.max_windows windows of all streams.

    Raises InputError if there are fewer than MIN_WINDOWS, or a token id lies outside the vocabulary.
    """
    windows, n_tokens = [], 0
    for stream in streams:
        for token_id in stream.token_ids:
            check_token(token_id, config)
        windows += cut(stream, plan.window)
        n_tokens += len(stream.token_ids)
        if plan.max_windows and len(windows) >= plan.max_windows:
            return windows[: plan.max_windows]
    if len(windows) < MIN_WINDOWS:
        size = "" if plan.window is None else f" of {plan.window} positions"
        count = f"{plan.source}: {n_tokens} tokens make {len(windows)} windows{size}, {MIN_WINDOWS} are needed"
        raise InputError(f"{count}; give a smaller --window or more tokens")
    return windows


@torch.no_grad()
def evaluate(
    ref: OpenSide, test: OpenSide, windows: Sequence[Window], chunk: int, show_progress: bool = False
) -> tuple[WindowResult, ...]:
    """Feed both sides each window, and compare their logits, `chunk` positions at a time."""
    total = sum(window.n_positions for window in windows)
    results = []
    with tqdm(total=total, unit=" positions", desc="comparing", disable=not show_progress) as bar:
        for window in windows:
            ref.reset()
            test.reset()
            chunks, not_finite = [], torch.zeros(2, dtype=torch.int64)
            for start in range(0, window.n_positions, chunk):
                token_ids = window.token_ids[start : min(start + chunk, window.n_positions)]
                ref_logits, test_logits = ref.logits(token_ids, start), test.logits(token_ids, start)
                next_ids = torch.tensor(window.token_ids[start + 1 :][: len(token_ids)], device=ref_logits.device)
                not_finite += torch.stack([(~finite_rows(rows)).sum() for rows in (ref_logits, test_logits)]).cpu()
                compared = slice(max(0, window.n_skipped - start), None)
                chunks.append(compare(ref_logits[compared], test_logits[compared], next_ids[compared]))
                bar.update(len(token_ids))
            results.append(WindowResult(join(chunks), window.n_positions, *not_finite.tolist()))
    return tuple(results)


def markdown(report: Report) -> str:
    """Format a report as Markdown, for a README."""
    n_positions = [len(window.positions.kl) for window in report.windows]
    values, interval = report.values, report.nll_difference
    intervals = {"nll_difference": interval, "ppl_ratio": interval.exp()}
    rows = [
        (metric.key, value_text(metric.key, values[metric.key], intervals.get(metric.key)), metric.meaning)
        for metric in METRICS
    ]
    compared = f"{report.positions_fed} tokens fed, {sum(n_positions)} positions compared"
    compared += f", {min(n_positions)} to {max(n_positions)} a window"
    return "\n".join(
        [
            report.title,
            "",
            "- {device}; torch {torch}, triton {triton}".format_map(report.conditions),
            f"- {report.source}: {len(n_positions)} windows, each from an empty cache; {compared}",
            f"- in parentheses {CONFIDENCE:.0%} intervals, paired by window, Student's t",
            *verdict_lines(report),
            "",
            *markdown_table(("metric", "value", "meaning"), rows),
        ]
    )


def value_text(key: str, value: float, interval: Interval | None) -> str:
    """Format a metric's value, with its confidence interval if there is one."""
    digits = 8 if key.startswith("ppl") else 6  # ratios of perplexities are near 1
    if interval is None:
        return f"{value:.{digits}g}"
    return f"{value:.{digits}g} ({interval.low:.{digits}g} to {interval.high:.{digits}g})"


def verdict_lines(report: Report) -> list[str]:
    """Return the report's verdict; no line without thresholds if all logits are finite."""
    thresholds = ", ".join(f"{key}={value:.9g}" for key, value in report.thresholds.items())
    if report.failures:
        return [f"- verdict: red: {'; '.join(report.failures)}"]
    return [f"- verdict: green: {thresholds}"] if thresholds else []


def json_text(report: Report) -> str:
    """Format a report as JSON, without single positions. Numbers that are not finite become null."""
    per_window = [
        {
            "positions": len(window.positions.kl),
            "ref_not_finite": window.ref_not_finite,
            "test_not_finite": window.test_not_finite,
        }
        | summarize([window.positions])
        for window in report.windows
    ]
    record = {
        "model": report.model,
        "test_model": report.test_model,
        "ref": report.ref,
        "test": report.test,
        "source": report.source,
        "conditions": report.conditions,
        "positions_fed": report.positions_fed,
        "positions": sum(row["positions"] for row in per_window),
        "metrics": report.values,
        "confidence": CONFIDENCE,
        "nll_difference": dataclasses.asdict(report.nll_difference),
        "ppl_ratio": dataclasses.asdict(report.nll_difference.exp()),
        "bins": [dataclasses.asdict(row) for row in report.bins],
        "windows": per_window,
        "thresholds": report.thresholds,
        "failures": report.failures,
    }
    return json.dumps(_finite(record), indent=2, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """Return a copy of dictionaries and lists with None for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_plot(path: Path, report: Report, inputs: Sequence[Path] = ()) -> None:
    """Draw KL divergence over position, with bands for its spread over windows, and agreement over confidence."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    ranks = kl_by_position([window.positions.kl for window in report.windows])
    x = range(ranks.shape[1])
    left.fill_between(x, ranks[0], ranks[-1], alpha=0.15, color="C0", linewidth=0, label="all windows")
    left.fill_between(x, ranks[1], ranks[-2], alpha=0.3, color="C0", linewidth=0, label="half of the windows")
    left.plot(x, ranks[2], color="C0", linewidth=1, label="median")
    left.axhline(max(report.values["kl"], LEAST_KL), color="C3", linestyle="--", linewidth=1, label="mean of all")
    left.set_yscale("log")
    left.set_xlabel("compared position in the window")
    left.set_ylabel(f"KL(ref || test), nats; {LEAST_KL:g} if less")
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, fontsize=8)

    bins = report.bins
    names = [f"{row.low:g} to\n{row.high:g}" for row in bins]
    bars = right.bar(names, [row.top1 if row.n else 0 for row in bins], color="C0")
    right.bar_label(bars, [f"{row.top1:.4g}\nn = {row.n}" if row.n else "none" for row in bins], fontsize=8)
    right.set_ylim(0, 1.15)
    right.set_xlabel("the reference's probability of its first choice")
    right.set_ylabel("top-1 agreement")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    figure.suptitle(report.title)
    write_file("--plot", path, png(figure), inputs)


def kl_by_position(windows: Sequence[Tensor]) -> Tensor:
    """Return minimum, quartiles and maximum over windows, float64 [5, longest window], clamped to LEAST_KL."""
    rows = torch.full((len(windows), max(map(len, windows))), math.nan, dtype=torch.float64)
    for row, kl in zip(rows, windows):
        row[: len(kl)] = kl.clamp(min=LEAST_KL)
    return rows.nanquantile(torch.linspace(0, 1, 5, dtype=torch.float64), dim=0)


def open_test_model(args: argparse.Namespace, checkpoint: Checkpoint) -> Checkpoint:
    """Return the test side's checkpoint: that of --test-model, else the reference's.

    Raises InputError if the sizes of the two vocabularies differ.
    """
    if args.test_model is None:
        return checkpoint
    other = open_checkpoint(args.test_model, args.layers, args.verify, show_progress=sys.stderr.isatty())
    if other.config.vocab_size != checkpoint.config.vocab_size:
        sizes = f"{other.config.vocab_size} tokens, that of the reference {checkpoint.config.vocab_size}"
        raise InputError(f"--test-model {args.test_model}: the vocabulary has {sizes}")
    return other


def input_files(args: argparse.Namespace, *checkpoints: Checkpoint) -> list[Path]:
    """Return the paths of all files that are read, which no report may replace."""
    opened = [*checkpoints, open_checkpoint(DEFAULT_MODEL)] if args.streams == "shipped" else checkpoints
    return [path for checkpoint in opened for path in files_of(checkpoint)] + [args.text] * bool(args.text)


def check_formats(flag: str, side: Side, checkpoint: Checkpoint) -> None:
    """Raise InputError if an archive's FP8 matrices are not those that the side's name says."""
    source = f"{flag} {side.name}"
    held = held_formats(checkpoint, side.dense, dict.fromkeys(FP8_COMPONENTS, source))
    if held != side.dense:
        has = f"{checkpoint.name} holds {cli.formats_text(checkpoint.config.dense)}"
        raise InputError(f"{source}: {has}, of which no bfloat16 can be had: name it, as in default+fp8-attn")


def check_context(windows: Sequence[Window], generated: int, *configs: ModelConfig) -> int:
    """Return the number of positions that both sides need. Raises InputError if a model has fewer."""
    longest = max(window.n_positions for window in windows)
    limit = min(config.max_position_embeddings for config in configs)
    if max(generated, longest) > limit:
        flag = f"--tokens: {generated}" if generated > limit else f"--window: {longest}"
        raise InputError(f"{flag} positions are needed, the model takes 1 to {limit}")
    return max(generated, longest)


def main() -> None:
    """Run the comparison that the command line describes; SystemExit with EXIT_FAILURE after a failure."""
    args = parse_arguments()
    check_report_files(args)
    device, on_terminal = usable_device(None), sys.stderr.isatty()
    plan = plan_for(args, device.type == "cpu")
    checkpoint, tokenizer = open_model(args)
    test_checkpoint = open_test_model(args, checkpoint)
    inputs = input_files(args, checkpoint, test_checkpoint)
    check_report_files(args, inputs)
    check_formats("--ref", args.ref, checkpoint)
    check_formats("--test", args.test, test_checkpoint)

    config = checkpoint.config
    prompt_ids = prompt_ids_from(args, tokenizer, config) if args.streams == "greedy" else []
    if prompt_ids:  # a stand-in of the final length, so that wrong sizes are found before the work
        streams = [Stream(prompt_ids + prompt_ids[-1:] * plan.n_tokens, len(prompt_ids))]
    else:
        streams = fixed_streams(args, tokenizer, config, plan.n_tokens, device)
    windows = cut_all(streams, plan, config)
    generated = len(prompt_ids) + plan.n_tokens if prompt_ids else 0
    max_context = check_context(windows, generated, config, test_checkpoint.config)

    ref = open_side(args.ref, checkpoint, max_context, device)
    shared = ref.weights if test_checkpoint is checkpoint and args.ref.dense == args.test.dense else None
    test = open_side(args.test, test_checkpoint, max_context, device, shared)
    if prompt_ids:
        windows = cut_all([greedy_stream(ref, prompt_ids, plan.n_tokens, plan.chunk, on_terminal)], plan, config)
    results = evaluate(ref, test, windows, plan.chunk, on_terminal)

    names = display_name(checkpoint), display_name(test_checkpoint)
    report = Report(*names, args.ref.name, args.test.name, plan.source, conditions(device), results, args.fail_under)
    write_reports(args, report, markdown, json_text, write_plot, inputs)
    for line in report.failures:
        print(f"acc_eval: {line}", file=sys.stderr)
    if report.failures:
        sys.stdout.flush()
        sys.exit(EXIT_FAILURE)


if __name__ == "__main__":
    sys.exit(run_main(main))
