"""Run a benchmark over the paths that a command line selects, and write its reports."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from host import cli
from host.decoder import Decoder
from measure.report import write_file

Point = TypeVar("Point")
Result = TypeVar("Result")


def measure_paths(
    args: argparse.Namespace,
    model: Decoder,
    points: Sequence[Point],
    measure_point: Callable[[Decoder, Point], Result],
) -> tuple[Result, ...]:
    """Measure all points on each path of `cli.paths_to_measure`, in order; the weights stay loaded."""
    results = []
    for quant in cli.paths_to_measure(args):
        if quant != model.quant:
            model.switch_path(quant)
        results += [measure_point(model, point) for point in points]
    return tuple(results)


def write_reports(
    args: argparse.Namespace,
    report: Any,
    markdown: Callable[[Any], str],
    json_text: Callable[[Any], str],
    write_plot: Callable[[Path, Any, Sequence[Path]], None],
    inputs: Sequence[Path],
) -> None:
    """Print a report as Markdown, and write it to --json and --plot where they are given, never over `inputs`."""
    print(markdown(report))
    if args.json:
        write_file("--json", args.json, json_text(report).encode(), inputs)
    if args.plot:
        write_plot(args.plot, report, inputs)
