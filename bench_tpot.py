"""Measure the steady-state time per output token at several contexts, against the limit of the memory's bandwidth.

A context of N is reached without feeding N tokens: the cache is filled with random keys and values up to half the
steps before N, and the kernel decodes from there. Device time is measured between events recorded behind the launches,
wall time between tokens as the caller receives them.
"""

import host.start

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from checkpoints.config import ModelConfig
from command_line.benchmarks import CPU_CONTEXTS, CPU_REPEATS, CPU_STEPS, GPU_CONTEXTS, GPU_REPEATS, GPU_STEPS
from command_line.run import run_main
from command_line.scripts import arguments
from gpt_oss_megakernel import MegaModel
from host import cli
from host.backend import usable_device
from host.limits import available_bytes, required_bytes
from load_model import files_of, open_model
from measure.bandwidth import Bandwidth, measure_read_bandwidth
from measure.benchmark import measure_paths, write_reports
from measure.conditions import axis_label, conditions, device_line, state_line
from measure.plot import plot_times
from measure.random_cache import fill_cache
from measure.report import check_report_files, display_name, markdown_table, progress, write_file
from measure.timing import DeviceMarks, Spread, WallMarks, checksum, spread
from measure.traffic import bytes_per_token
from multi_gpu.benchmark import described, load_model, open_group
from multi_gpu.ranks import RankModel
from system.errors import InputError, RunsDiffer

FIRST_TOKEN = 0
SEED = 0  # for the random keys and values
HEADER = (
    "path",
    "context",
    "device ms/token (median)",
    "min",
    "p10 to p90",
    "wall ms/token (median)",
    "p10 to p90",
    "GB/token",
    "floor ms",
    "floor / device",
    "ids CRC-32",
)


@dataclass(frozen=True)
class Plan:
    """What to measure: `repeats` runs of `steps` tokens around each context."""

    contexts: tuple[int, ...]
    steps: int
    repeats: int
    limit: int  # max_position_embeddings of the model

    def first_position(self, context: int) -> int:
        """Return where a run starts so that `context` is its middle, or as near as the model's positions allow."""
        return max(0, min(context - self.steps // 2, self.limit - self.steps))

    @property
    def max_context(self) -> int:
        """The number of positions that the KV cache needs."""
        return max(self.first_position(context) + self.steps for context in self.contexts)


@dataclass(frozen=True)
class Measurement:
    """One path at one context. Times are milliseconds per token, over all tokens but the first of each run."""

    path: str
    context: int
    first_position: int
    device_ms: Spread | None  # None on a CPU
    wall_ms: Spread
    bytes_per_token: int
    floor_ms: float | None  # bytes_per_token at the measured bandwidth; None on a CPU
    fraction_of_floor: float | None  # floor_ms / median device_ms, at most 1
    checksum: str


@dataclass(frozen=True)
class Report:
    """All results of one benchmark, and the conditions under which they were measured."""

    model: str
    conditions: dict  # measure.conditions.conditions
    num_programs: int
    plan: Plan
    bandwidth: Bandwidth | None  # None on a CPU
    results: tuple[Measurement, ...]


def plan_for(args: argparse.Namespace, config: ModelConfig, on_gpu: bool, free_bytes: int) -> Plan:
    """Return what the command line asks for, with defaults that suit the device and fit `free_bytes`.

    Raises InputError if the model has too few positions.
    """
    limit = config.max_position_embeddings
    steps = args.steps or (GPU_STEPS if on_gpu else CPU_STEPS)
    if not 2 <= steps <= limit:
        raise InputError(f"--steps {steps}: a run takes 2 to {limit} tokens of this model")
    for context in args.contexts or ():
        if context > limit:
            raise InputError(f"--contexts {context}: the model takes 1 to {limit} positions")
    plan = Plan(args.contexts or (), steps, args.repeats or (GPU_REPEATS if on_gpu else CPU_REPEATS), limit)
    if args.contexts:
        return plan
    defaults = GPU_CONTEXTS if on_gpu else CPU_CONTEXTS
    plans = [dataclasses.replace(plan, contexts=(context,)) for context in defaults if context <= limit]
    fitting = [p.contexts[0] for p in plans if required_bytes(config, p.max_context) <= free_bytes]
    return dataclasses.replace(plan, contexts=tuple(fitting) or (min(defaults[0], limit),))


def measure(model: MegaModel, plan: Plan, context: int, bandwidth: Bandwidth | None) -> Measurement:
    """Time runs around one context, after one that warms up. Raises RunsDiffer if their tokens differ."""
    start = plan.first_position(context)
    model.reset()
    for state in model.states():
        if state.k_cache.shape[2] > start:  # a GPU that has experts alone keeps no keys
            fill_cache(state.k_cache, state.v_cache, start, SEED)
    expected, _, _ = timed_run(model, start, plan.steps)
    device_ms, wall_ms = [], []
    for _ in range(plan.repeats):
        token_ids, device_intervals, wall_intervals = timed_run(model, start, plan.steps)
        if token_ids != expected:
            raise RunsDiffer(f"two runs at context {context} wrote different tokens")
        device_ms += device_intervals
        wall_ms += wall_intervals
    n_bytes = bytes_per_token(model.config, context)
    device = spread(device_ms) if device_ms else None
    readers = model.n_readers if isinstance(model, RankModel) else 1
    floor_ms = n_bytes / readers / bandwidth.bytes_per_second * 1e3 if bandwidth else None
    return Measurement(
        path=cli.path_name(model.quant, model.config.dense),
        context=context,
        first_position=start,
        device_ms=device,
        wall_ms=spread(wall_ms),
        bytes_per_token=n_bytes,
        floor_ms=floor_ms,
        fraction_of_floor=floor_ms / device.median if device and floor_ms else None,
        checksum=checksum(expected),
    )


def timed_run(model: MegaModel, start: int, steps: int) -> tuple[list[int], list[float], list[float]]:
    """Return the ids of `steps` tokens, and the device and wall milliseconds of each token but the first.

    On a CPU there are no device times.
    """
    device, wall = DeviceMarks(), WallMarks()
    on_launch = None if model.device.type == "cpu" else device.mark
    token_ids = []
    for token_id in model.decode(FIRST_TOKEN, start, steps, on_launch):
        wall.mark()
        token_ids.append(token_id)
    return token_ids, device.intervals_ms(), wall.intervals_ms()


def markdown(report: Report) -> str:
    """Format a report as Markdown, for a README."""
    plan, bandwidth = report.plan, report.bandwidth
    start = f"random keys and values in the cache up to N - {plan.steps // 2}, decoding from there on"
    lines = [
        f"Time per output token: {report.model}",
        "",
        device_line(report.conditions, report.num_programs),
        f"- {plan.repeats} runs of {plan.steps} tokens after one to warm up; context N: {start}",
    ]
    if bandwidth is not None:
        streamed = f"median of {bandwidth.ms.n} times {bandwidth.n_bytes / 1e9:.1f} GB"
        lines.append(f"- read bandwidth: {bandwidth.bytes_per_second / 1e12:.2f} TB/s, {streamed}")
    lines.append(state_line(report.conditions))
    return "\n".join([*lines, "", *markdown_table(HEADER, [table_row(row) for row in report.results])])


def table_row(row: Measurement) -> tuple[str, ...]:
    """Format a measurement as the cells below HEADER."""
    device = row.device_ms
    return (
        row.path,
        str(row.context),
        f"{device.median:.3f}" if device else "-",
        f"{device.min:.3f}" if device else "-",
        f"{device.p10:.3f} to {device.p90:.3f}" if device else "-",
        f"{row.wall_ms.median:.3f}",
        f"{row.wall_ms.p10:.3f} to {row.wall_ms.p90:.3f}",
        f"{row.bytes_per_token / 1e9:.3f}",
        "-" if row.floor_ms is None else f"{row.floor_ms:.3f}",
        "-" if row.fraction_of_floor is None else f"{row.fraction_of_floor:.1%}",
        row.checksum,
    )


def json_text(report: Report) -> str:
    """Format a report as JSON."""
    record = dataclasses.asdict(report)
    if report.bandwidth:
        record["bandwidth"]["bytes_per_second"] = report.bandwidth.bytes_per_second
    return json.dumps(record, indent=2) + "\n"


def write_plot(path: Path, report: Report, inputs: Sequence[Path] = ()) -> None:
    """Draw the median time per token over context, a line for each path, and the floor dashed."""
    lines = {
        name: [(row.context, row.device_ms or row.wall_ms) for row in group]
        for name, group in itertools.groupby(report.results, key=lambda row: row.path)
    }
    floor = {(row.context, row.floor_ms) for row in report.results if row.floor_ms is not None}
    y_label = axis_label("ms per token", report.conditions)
    write_file("--plot", path, plot_times(report.model, "context, tokens", y_label, lines, sorted(floor)), inputs)


def main() -> None:
    """Run the benchmark that the command line describes."""
    args = arguments("bench_tpot.py")
    check_report_files(args)
    group = open_group(args)
    device = usable_device(None)
    checkpoint, _ = open_model(args)
    inputs = files_of(checkpoint)
    check_report_files(args, inputs)
    dense = cli.dense_formats(args, checkpoint)
    config = dataclasses.replace(checkpoint.config, dense=dense)
    plan = plan_for(args, config, device.type != "cpu", available_bytes(device))
    name = display_name(checkpoint)

    progress("no bandwidth measured on a CPU" if device.type == "cpu" else "measuring the read bandwidth")
    bandwidth = measure_read_bandwidth(device)
    progress(f"loading {name}")
    quant = cli.paths_to_measure(args)[0]
    options = {"num_programs": args.num_programs, "show_progress": sys.stderr.isatty(), "dense": dense}
    model = load_model(group, args.layout, checkpoint, quant, max_context=plan.max_context, **options)

    def measure_context(model: MegaModel, context: int) -> Measurement:
        progress(f"measuring {cli.path_name(model.quant, dense)} at context {context}")
        return measure(model, plan, context, bandwidth)

    results = measure_paths(args, model, plan.contexts, measure_context)
    report = Report(
        described(name, group, args.layout), conditions(device), model.num_programs, plan, bandwidth, results
    )
    write_reports(args, report, markdown, json_text, write_plot, inputs)
    if group:
        group.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
