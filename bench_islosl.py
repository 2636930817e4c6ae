"""Measure time to first token, time per output token and throughput of whole requests.

A request has n input and m output tokens. It is one call of MegaModel.generate on a model that was reset, with random
ids that differ from repeat to repeat. All times are wall clock on the host, from the call on:

    TTFT              until the first token is there, processing of the prompt included
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
from command_line.benchmarks import CPU_CONFIGS, CPU_REPEATS, GPU_CONFIGS, GPU_REPEATS, Shape, shape_list
from command_line.run import run_main
from command_line.scripts import arguments
from gpt_oss_megakernel import MegaModel
from host import cli
from host.backend import usable_device
from host.launch import tuning_for
from host.limits import check_memory
from host.weights import bytes_to_load
from load_model import files_of, open_model
from measure.benchmark import measure_paths, write_reports
from measure.conditions import axis_label, conditions, device_line, state_line
from measure.plot import Line, plot_times
from measure.report import check_report_files, display_name, markdown_table, progress, write_file
from measure.timing import Spread, WallMarks, checksum, spread
from multi_gpu.benchmark import described, load_model, open_group
from system.errors import InputError, RunsDiffer

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
class Plan:
    """What to measure: `repeats` requests of each shape."""

    shapes: tuple[Shape, ...]
    repeats: int

    @property
    def longest(self) -> Shape:
        """The shape that needs the most positions."""
        return max(self.shapes, key=lambda shape: shape.positions)


@dataclass(frozen=True)
class Run:
    """The figures of one request, as the module's docstring defines them."""

    ttft_ms: float
    tpot_ms: float | None  # None for an answer of one token
    end_to_end_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float


@dataclass(frozen=True)
class Measurement:
    """One path at one shape: all runs, and the spread of each of their figures."""

    path: str
    input_tokens: int
    output_tokens: int
    ttft_ms: Spread
    tpot_ms: Spread | None
    end_to_end_s: Spread
    input_tokens_per_s: Spread
    output_tokens_per_s: Spread
    runs: tuple[Run, ...]
    checksum: str  # of the ids that the first run gave


@dataclass(frozen=True)
class Report:
    """All results of one benchmark, and the conditions under which they were measured."""

    model: str
    conditions: dict  # measure.conditions.conditions
    num_programs: int
    max_context: int
    plan: Plan
    results: tuple[Measurement, ...]


def plan_for(args: argparse.Namespace, on_gpu: bool) -> Plan:
    """Return what the command line asks for, with defaults that suit the device."""
    shapes = args.configs or shape_list(GPU_CONFIGS if on_gpu else CPU_CONFIGS)
    return Plan(shapes, args.repeats or (GPU_REPEATS if on_gpu else CPU_REPEATS))


def check_positions(longest: Shape, config: ModelConfig) -> None:
    """Raise InputError if the model has too few positions for a shape."""
    limit = config.max_position_embeddings
    if longest.positions > limit:
        raise InputError(f"--configs {longest}: {longest.positions} positions, the model takes 1 to {limit}")


def check_fits(longest: Shape, checkpoint: Checkpoint, config: ModelConfig, device: torch.device) -> None:
    """Raise InputError if a device has too little memory for a model and a shape."""
    weights = bytes_to_load(checkpoint, config, device, tuning_for(device, config))
    try:
        check_memory(config, longest.positions, torch.bfloat16, device, weights)
    except InputError as error:
        raise InputError(f"--configs {longest}: {error}") from None


def make_prompts(shape: Shape, n: int, vocab_size: int, stop_ids: Collection[int]) -> list[list[int]]:
    """Return n prompts of random ids without stop ids, always equal ones for a shape.

    No two begin with the same id while there are enough ids, so that no prompt can reuse another's cache.
    """
    generator = random.Random(str(shape))
    ids = [token_id for token_id in range(vocab_size) if token_id not in stop_ids]
    first_ids = itertools.cycle(generator.sample(ids, min(n, len(ids))))
    return [[next(first_ids), *generator.choices(ids, k=shape.input_tokens - 1)] for _ in range(n)]


def measure(model: MegaModel, shape: Shape, prompts: list[list[int]]) -> Measurement:
    """Time a request for each prompt, after one that warms up with the first prompt.

    Raises RunsDiffer if the first prompt's two answers differ.
    """
    path = cli.path_name(model.quant, model.config.dense)
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
    """Return the ids and the figures of one request to a model that was reset."""
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
    """Compute a run's figures from the milliseconds until the first token and from each token to the next."""
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
    """Return the spread of the samples that are not None; None if there are none."""
    known = [sample for sample in samples if sample is not None]
    return spread(known) if known else None


def markdown(report: Report) -> str:
    """Format a report as Markdown, for a README."""
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
    """Format a measurement as the cells below HEADER."""
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
    """Format a report as JSON."""
    return json.dumps(dataclasses.asdict(report), indent=2) + "\n"


def ttft_lines(results: Iterable[Measurement]) -> dict[str, Line]:
    """Return, for each path, the spread of TTFT at each prompt length over all runs with prompts of that length."""
    samples: dict[str, dict[int, list[float]]] = {}
    for row in results:
        lengths = samples.setdefault(row.path, {})
        lengths.setdefault(row.input_tokens, []).extend(run.ttft_ms for run in row.runs)
    return {path: [(n, spread(ttft_ms)) for n, ttft_ms in lengths.items()] for path, lengths in samples.items()}


def write_plot(path: Path, report: Report, inputs: Sequence[Path] = ()) -> None:
    """Draw the median TTFT over prompt length, a line for each path."""
    y_label = axis_label("time to first token, ms", report.conditions)
    lines = ttft_lines(report.results)
    write_file("--plot", path, plot_times(report.model, "prompt, tokens", y_label, lines, log_y=True), inputs)


def main() -> None:
    """Run the benchmark that the command line describes."""
    args = arguments("bench_islosl.py")
    check_report_files(args)
    group = open_group(args)
    device = usable_device(None)
    checkpoint, _ = open_model(args)
    inputs = files_of(checkpoint)
    check_report_files(args, inputs)
    dense = cli.dense_formats(args, checkpoint)
    config = dataclasses.replace(checkpoint.config, dense=dense)
    plan = plan_for(args, device.type != "cpu")
    check_positions(plan.longest, config)
    if group is None:  # else each rank checks its share
        check_fits(plan.longest, checkpoint, config, device)

    name = display_name(checkpoint)
    progress(f"loading {name}")
    quant = cli.paths_to_measure(args)[0]
    options = {"max_context": plan.longest.positions, "show_progress": sys.stderr.isatty(), "dense": dense}
    model = load_model(group, args.layout, WithoutStopIds(checkpoint), quant, **options)

    def measure_shape(model: MegaModel, shape: Shape) -> Measurement:
        return measure(model, shape, make_prompts(shape, plan.repeats, config.vocab_size, config.stop_ids))

    results = measure_paths(args, model, plan.shapes, measure_shape)
    name = described(name, group, args.layout)
    report = Report(name, conditions(device), model.num_programs, model.max_context, plan, results)
    write_reports(args, report, markdown, json_text, write_plot, inputs)
    if group:
        group.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
