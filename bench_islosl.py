"""Time to first token, time per output token and throughput of whole requests: n input and m output tokens each.

A request is one call of MegaModel.generate on a model that was reset: random ids, another prompt for each repeat. All
times are wall clock on the host, from the call on:

    TTFT              until the first token is there, the prompt's work included
    TPOT              mean time of each further token: (end - first token) / (output tokens - 1)
    end to end        until the last token is there
    input tokens/s    input tokens / TTFT
    output tokens/s   output tokens / end to end
"""

import host.start

import argparse
import dataclasses
import itertools
import json
import random
import sys
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.checkpoint import Checkpoint, WithoutStopIds
from checkpoints.config import ModelConfig
from gpt_oss_megakernel import MegaModel
from host.backend import usable_device
from host.cli import (
    ArgumentParser,
    add_fp8_arguments,
    add_model_arguments,
    add_path_arguments,
    add_report_arguments,
    dense_formats,
    path_name,
    paths_to_measure,
    positive_int,
    run_main,
)
from host.launch import tuning_for
from host.limits import check_memory
from host.weights import bytes_to_load
from load_model import files_of, open_model
from measure.conditions import axis_label, conditions, device_line, state_line
from measure.plot import Line, plot_times
from measure.report import check_report_files, display_name, markdown_table, progress, write_file
from measure.timing import Spread, WallMarks, checksum, spread
from system.errors import InputError, RunsDiffer

GPU_CONFIGS, GPU_REPEATS = "100:100,1024:100,1024:1024,2048:2048,8192:128", 5
CPU_CONFIGS, CPU_REPEATS = "16:8,64:8", 2
HEADER = (
    "path",
    "input",
    "output",
    "TTFT ms (median)",
    "p10 to p90",
    "TPOT ms (median)",
    "p10 to p90",
    "end to end s (median)",
    "input tokens/s (median)",
    "output tokens/s (median)",
    "ids CRC-32",
)


@dataclass(frozen=True)
class Shape:
    """Of a request: 1024:100 is 1024 input and 100 output tokens."""

    input_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        return f"{self.input_tokens}:{self.output_tokens}"

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """An argparse type."""
        words = text.split(":")
        if len(words) != 2:
            raise argparse.ArgumentTypeError(f"{text!r} is not INPUT:OUTPUT, such as 1024:100")
        return cls(*map(positive_int, words))

    @property
    def positions(self) -> int:
        """That the KV cache needs."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class Plan:
    """What to measure: `repeats` requests of each shape."""

    shapes: tuple[Shape, ...]
    repeats: int

    @property
    def longest(self) -> Shape:
        return max(self.shapes, key=lambda shape: shape.positions)


@dataclass(frozen=True)
class Run:
    """One request, as the module defines it."""

    ttft_ms: float
    tpot_ms: float | None  # None if there was but one token
    end_to_end_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True)
class Measurement:
    """One path and shape: all runs, and each of their figures summed up."""

    path: str
    input_tokens: int
    output_tokens: int
    ttft_ms: Spread
    tpot_ms: Spread | None
    end_to_end_s: Spread
    input_tokens_per_s: Spread
    output_tokens_per_s: Spread
    runs: tuple[Run, ...]
    checksum: str  # of the first run's ids


@dataclass(frozen=True)
class Report:
    """Everything that a run of this script found."""

    model: str
    conditions: dict  # measure.conditions.conditions
    num_programs: int
    max_context: int
    plan: Plan
    results: tuple[Measurement, ...]


def parse_arguments() -> argparse.Namespace:
    """The command line; InputError where it is wrong."""
    parser = ArgumentParser(description="Time to first token, time per token and throughput of whole requests.")
    add_model_arguments(parser)
    add_fp8_arguments(parser)
    add_path_arguments(parser)
    parser.add_argument(
        "--configs",
        metavar="INPUT:OUTPUT,...",
        type=shape_list,
        help=f"tokens of a prompt and of its answer; default: {GPU_CONFIGS}, CPU {CPU_CONFIGS}",
    )
    parser.add_argument(
        "--repeats",
        metavar="N",
        type=positive_int,
        help=f"requests that count, after one that warms up; default: {GPU_REPEATS}, CPU {CPU_REPEATS}",
    )
    add_report_arguments(parser, "TTFT over prompt length")
    return parser.parse_args()


def shape_list(text: str) -> tuple[Shape, ...]:
    """An argparse type: shapes separated by commas, each once."""
    return tuple(dict.fromkeys(Shape.parse(word.strip()) for word in text.split(",")))


def plan_for(args: argparse.Namespace, on_gpu: bool) -> Plan:
    """What the command line asks for, or what suits the device."""
    shapes = args.configs or shape_list(GPU_CONFIGS if on_gpu else CPU_CONFIGS)
    return Plan(shapes, args.repeats or (GPU_REPEATS if on_gpu else CPU_REPEATS))


def check_fits(longest: Shape, checkpoint: Checkpoint, config: ModelConfig, device: torch.device) -> None:
    """InputError if the model has too few positions for a shape, or the device too little memory."""
    limit = config.max_position_embeddings
    if longest.positions > limit:
        raise InputError(f"--configs {longest}: {longest.positions} positions, the model takes 1 to {limit}")
    weights = bytes_to_load(checkpoint, config, device, tuning_for(device, config))
    try:
        check_memory(config, longest.positions, torch.bfloat16, device, weights)
    except InputError as error:
        raise InputError(f"--configs {longest}: {error}") from None


def make_prompts(shape: Shape, n: int, vocab_size: int, stop_ids: Collection[int]) -> list[list[int]]:
    """Prompts of random ids but the stop ids, always the same ones for a shape.

    No two begin with the same id, as long as there are enough of them: nothing of one could be reused for the next.
    """
    generator = random.Random(str(shape))
    ids = [token_id for token_id in range(vocab_size) if token_id not in stop_ids]
    first_ids = itertools.cycle(generator.sample(ids, min(n, len(ids))))
    return [[next(first_ids), *generator.choices(ids, k=shape.input_tokens - 1)] for _ in range(n)]


def measure(model: MegaModel, shape: Shape, prompts: list[list[int]]) -> Measurement:
    """A request for each prompt, after one for the first of them that warms up and must get the same answer."""
    path = path_name(model.quant, model.config.dense)
    progress(f"measuring {path} at {shape}: warming up")
    expected, _ = timed_run(model, shape, prompts[0])
    runs = []
    for n, prompt in enumerate(prompts):
        progress(f"measuring {path} at {shape}: run {n + 1} of {len(prompts)}")
        token_ids, run = timed_run(model, shape, prompt)
        if n == 0 and token_ids != expected:
            raise RunsDiffer(f"two runs of {path} at {shape} wrote different tokens after the same prompt")
        runs.append(run)
    return Measurement(
        path=path,
        input_tokens=shape.input_tokens,
        output_tokens=shape.output_tokens,
        **{field.name: spread_of(getattr(run, field.name) for run in runs) for field in dataclasses.fields(Run)},
        runs=tuple(runs),
        checksum=checksum(expected),
    )


def timed_run(model: MegaModel, shape: Shape, prompt_ids: list[int]) -> tuple[list[int], Run]:
    """The ids of one request to a model that holds nothing, and its times."""
    model.reset()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    marks, token_ids = WallMarks(), []
    marks.mark()
    for token_id in model.generate(prompt_ids, shape.output_tokens):
        marks.mark()
        token_ids.append(token_id)
    if len(token_ids) != shape.output_tokens:
        raise RuntimeError(f"{len(token_ids)} tokens instead of the {shape.output_tokens} of {shape}")
    return token_ids, run_from(marks.intervals_ms(), shape.input_tokens)


def run_from(intervals_ms: list[float], input_tokens: int) -> Run:
    """A run's figures: until the first token, and from each token to the next."""
    ttft_ms, *further_ms = intervals_ms
    end_to_end_s = sum(intervals_ms) / 1e3
    return Run(
        ttft_ms=ttft_ms,
        tpot_ms=sum(further_ms) / len(further_ms) if further_ms else None,
        end_to_end_s=end_to_end_s,
        input_tokens_per_s=input_tokens / ttft_ms * 1e3,
        output_tokens_per_s=len(intervals_ms) / end_to_end_s,
    )


def spread_of(samples: Iterable[float | None]) -> Spread | None:
    """None of figures that the runs do not have."""
    known = [sample for sample in samples if sample is not None]
    return spread(known) if known else None


def markdown(report: Report) -> str:
    """All that is known, as text for a README."""
    prompts = "random ids, another prompt each, nothing in the cache before it"
    lines = [
        f"Requests of input:output tokens: {report.model}",
        "",
        device_line(report.conditions, report.num_programs),
        f"- {report.plan.repeats} requests after one to warm up; {prompts}; wall clock",
        "- input tokens/s: input tokens / TTFT; output tokens/s: output tokens / end to end",
        state_line(report.conditions),
    ]
    return "\n".join([*lines, "", *markdown_table(HEADER, [table_row(row) for row in report.results])])


def table_row(row: Measurement) -> tuple[str, ...]:
    tpot = row.tpot_ms
    return (
        row.path,
        str(row.input_tokens),
        str(row.output_tokens),
        f"{row.ttft_ms.median:.2f}",
        f"{row.ttft_ms.p10:.2f} to {row.ttft_ms.p90:.2f}",
        f"{tpot.median:.3f}" if tpot else "-",
        f"{tpot.p10:.3f} to {tpot.p90:.3f}" if tpot else "-",
        f"{row.end_to_end_s.median:.3f}",
        f"{row.input_tokens_per_s.median:.1f}",
        f"{row.output_tokens_per_s.median:.1f}",
        row.checksum,
    )


def json_text(report: Report) -> str:
    return json.dumps(dataclasses.asdict(report), indent=2) + "\n"


def ttft_lines(results: Iterable[Measurement]) -> dict[str, Line]:
    """For each path the TTFT at each prompt length, of all runs with such a prompt."""
    samples: dict[str, dict[int, list[float]]] = {}
    for row in results:
        lengths = samples.setdefault(row.path, {})
        lengths.setdefault(row.input_tokens, []).extend(run.ttft_ms for run in row.runs)
    return {path: [(n, spread(ttft_ms)) for n, ttft_ms in lengths.items()] for path, lengths in samples.items()}


def write_plot(path: Path, report: Report, inputs: Sequence[Path] = ()) -> None:
    """Median TTFT over prompt length, a line per path."""
    y_label = axis_label("time to first token, ms", report.conditions)
    lines = ttft_lines(report.results)
    write_file("--plot", path, plot_times(report.model, "prompt, tokens", y_label, lines, log_y=True), inputs)


def main() -> None:
    args = parse_arguments()
    check_report_files(args)
    device = usable_device(None)
    checkpoint, _ = open_model(args)
    inputs = files_of(checkpoint)
    check_report_files(args, inputs)
    dense = dense_formats(args, checkpoint)
    config = dataclasses.replace(checkpoint.config, dense=dense)
    plan = plan_for(args, device.type != "cpu")
    check_fits(plan.longest, checkpoint, config, device)

    name = display_name(checkpoint)
    progress(f"loading {name}")
    paths = paths_to_measure(args)
    model = MegaModel(
        WithoutStopIds(checkpoint),
        paths[0],
        plan.longest.positions,
        show_progress=sys.stderr.isatty(),
        dense=dense,
    )
    results = []
    for quant in paths:
        if quant != model.quant:
            model.switch_path(quant)
        for shape in plan.shapes:
            prompts = make_prompts(shape, plan.repeats, config.vocab_size, config.stop_ids)
            results.append(measure(model, shape, prompts))

    report = Report(name, conditions(device), model.num_programs, model.max_context, plan, tuple(results))
    print(markdown(report))
    if args.json:
        write_file("--json", args.json, json_text(report).encode(), inputs)
    if args.plot:
        write_plot(args.plot, report, inputs)


if __name__ == "__main__":
    sys.exit(run_main(main))
