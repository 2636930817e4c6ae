"""What the timestamps of one launch say: a Chrome trace, a table of its phases, and the file that holds the trace.

The timestamps (common/trace.py) are int64 nanoseconds [events, programs]: phase i of a program lasts from event 2 i to
event 2 i + 1, barrier b from event 2 b - 1 to event 2 b.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from host.cli import positive_int
from host.generation import Generation
from host.phases import PHASE_NAMES, Phase, phases_of_token
from measure.traffic import bytes_by_phase
from system.errors import InputError
from system.output_file import check_output, output_path, replacing

USUAL_TOKEN = 16  # by then the caches are warm
SLICES = 20  # of the token's time, for bytes over time
HEADER = ("phase", "calls", "span us", "work us", "longest", "wait us", "total us", "share", "MB", "GB/s")
LEGEND = (
    "span: from the first program's entry to the last one's leaving, median of the calls;",
    "work: a program's time in the phase, mean and longest; wait: at the barrier behind it, mean;",
    "barriers: from the last arrival to the first leaving.",
    "Bytes count for the phase that uses them, also where they are loaded ahead of it.",
)


@dataclass(frozen=True)
class Launch:
    """One launch that gave a token."""

    phases: list[Phase]
    ns: np.ndarray  # int64 [phases, 2, programs] from the first event on: when a program enters a phase and leaves it
    n_bytes: list[int]  # that each phase reads, see measure.traffic.bytes_by_phase

    @classmethod
    def from_events(cls, events: np.ndarray, n_layers: int, n_bytes: list[int]) -> "Launch":
        """Of int64 nanoseconds [events, programs]; ValueError unless they are all those of a launch."""
        phases = phases_of_token(n_layers)
        if len(events) != 2 * len(phases) or len(n_bytes) != len(phases):
            raise ValueError(f"{len(events)} events and {len(n_bytes)} byte counts for {len(phases)} phases")
        if not events.all():
            raise ValueError("some events have no time: the position was not decoded")
        # A device's clock may be set back; a trace must not go backwards.
        ns = np.maximum.accumulate(events - events.min(), axis=0)
        return cls(phases, ns.reshape(len(phases), 2, -1), n_bytes)

    @property
    def spans(self) -> np.ndarray:
        """int64 nanoseconds [phases, 2]: when the first program enters a phase and the last one leaves it."""
        return np.stack((self.ns[:, 0].min(-1), self.ns[:, 1].max(-1)), axis=-1)


@dataclass(frozen=True)
class Row:
    """A row of the table. Times are microseconds; None is what a row has not."""

    name: str
    calls: int | None
    span_us: float | None  # from the first program's entry to the last one's leaving, median of the calls
    work_us: float | None  # between a program's entry and its leaving: mean, and the longest
    longest_us: float | None
    wait_us: float | None  # of a program at the barrier that follows, mean
    total_us: float  # all spans together
    share: float  # of the token's time
    n_bytes: int | None  # read in all calls together

    @property
    def gb_per_s(self) -> float | None:
        return self.n_bytes / self.total_us / 1e3 if self.n_bytes is not None and self.total_us else None


def table_rows(launch: Launch) -> list[Row]:
    """A row for each name of a phase, one for the barriers, and their sum, which is the token."""
    work_us = (launch.ns[:, 1] - launch.ns[:, 0]) / 1e3
    waits_us = (launch.ns[1:, 0] - launch.ns[:-1, 1]) / 1e3
    spans = launch.spans
    spans_us = (spans[:, 1] - spans[:, 0]) / 1e3
    gaps_us = (spans[1:, 0] - spans[:-1, 1]) / 1e3
    token_us = float(spans[-1, 1]) / 1e3

    def share(total_us: float) -> float:
        return total_us / token_us if token_us else 0.0

    rows = []
    for name in PHASE_NAMES:
        calls = [i for i, phase in enumerate(launch.phases) if phase.name == name]
        total_us = float(spans_us[calls].sum())
        waited = [i for i in calls if i < len(waits_us)]
        row = Row(
            name=name,
            calls=len(calls),
            span_us=statistics.median(spans_us[calls].tolist()),
            work_us=float(work_us[calls].mean()),
            longest_us=float(work_us[calls].max()),
            wait_us=float(waits_us[waited].mean()) if waited else None,
            total_us=total_us,
            share=share(total_us),
            n_bytes=sum(launch.n_bytes[i] for i in calls),
        )
        rows.append(row)
    gap_us = statistics.median(gaps_us.tolist())
    gaps_total_us = float(gaps_us.sum())
    rows.append(Row("barriers", len(gaps_us), gap_us, None, None, None, gaps_total_us, share(gaps_total_us), None))
    rows.append(Row("total", None, None, None, None, None, token_us, share(token_us), sum(launch.n_bytes)))
    return rows


def table_text(rows: list[Row]) -> str:
    """The rows in columns, and what the columns mean."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = [HEADER]
    for row in rows:
        times = (row.span_us, row.work_us, row.longest_us, row.wait_us, row.total_us)
        megabytes = None if row.n_bytes is None else row.n_bytes / 1e6
        read = (number(megabytes, ".3f"), number(row.gb_per_s, ".1f"))
        cells.append((row.name, number(row.calls, "d"), *(number(t, ".2f") for t in times), f"{row.share:.1%}", *read))
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join([name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))])
        for name, *rest in cells
    ]
    return "\n".join([*lines, *LEGEND])


def chrome_trace(launch: Launch, title: str) -> dict:
    """The launch in Chrome's trace format: a thread for each program, and GB/s over time as a counter.

    Times are microseconds from the launch's first event. Begin and end events of a program are in their order.
    """
    events = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": title}}]
    for program in range(launch.ns.shape[-1]):
        thread = {"pid": 0, "tid": program}
        events.append({"ph": "M", "name": "thread_name", **thread, "args": {"name": f"program {program}"}})
        for name, kind, args, start, end in _intervals(launch, program):
            events.append({"ph": "B", "name": name, "cat": kind, "ts": start / 1e3, **thread, "args": args})
            events.append({"ph": "E", "name": name, "cat": kind, "ts": end / 1e3, **thread})
    rates = gb_per_s_over_time(launch)
    width_us = launch.spans[-1, 1] / 1e3 / SLICES
    for i, rate in enumerate([*rates, 0.0] if rates else []):
        time_us = round(i * width_us, 3)
        events.append({"ph": "C", "name": "bytes read", "pid": 0, "ts": time_us, "args": {"GB/s": rate}})
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _intervals(launch: Launch, program: int) -> Iterator[tuple[str, str, dict, int, int]]:
    """(name, kind, arguments, start, end in nanoseconds) of what a program went through, in order."""
    times = launch.ns[:, :, program].tolist()
    for i, ((name, layer), (start, end)) in enumerate(zip(launch.phases, times)):
        args = {} if layer is None else {"layer": layer}
        yield name, "phase", args, start, end
        if i + 1 < len(times):
            yield f"barrier after {name}", "barrier", {**args, "barrier": i + 1}, end, times[i + 1][0]


def gb_per_s_over_time(launch: Launch, slices: int = SLICES) -> list[float]:
    """GB/s in equal slices of the token's time, as if each phase read evenly over its span; [] if it took no time."""
    spans = launch.spans.astype(float)
    edges = np.linspace(0.0, spans[-1, 1], slices + 1)
    width = edges[1]
    if width == 0:
        return []
    n_bytes = np.zeros(slices)
    for (start, end), phase_bytes in zip(spans, launch.n_bytes):
        if end > start:
            inside = np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)
            n_bytes += phase_bytes * np.maximum(inside, 0.0) / (end - start)
        else:
            n_bytes[min(int(start / width), slices - 1)] += phase_bytes
    return (n_bytes / width).tolist()  # bytes per nanosecond


def launch_of(model) -> Launch:
    """What a Decoder's launch at its trace_position noted, once it has ended. ValueError if there was none."""
    n_bytes = bytes_by_phase(model.config, model.trace_position or 0)
    return Launch.from_events(model.state.trace.cpu().numpy(), model.config.n_layers, n_bytes)


def add_trace_arguments(parser: argparse.ArgumentParser) -> None:
    """--trace and --trace-token; see token_to_trace."""
    parser.add_argument(
        "--trace",
        metavar="FILE.json",
        type=output_path,
        help="time the phases of one token, as a Chrome trace and a table",
    )
    parser.add_argument(
        "--trace-token",
        metavar="N",
        type=positive_int,
        help=f"time the Nth generated token; default: {USUAL_TOKEN}, or the last one",
    )


def token_to_trace(args: argparse.Namespace, n_prompt: int, max_context: int) -> int | None:
    """Which generated token, from 1, --trace and --trace-token ask for; None without --trace.

    InputError if there cannot be that many after a prompt of n_prompt tokens, or --logits-out is the same file.
    """
    asked = args.trace_token
    if args.trace is None:
        if asked is not None:
            raise InputError(f"--trace-token {asked}: without --trace FILE there is no trace")
        return None
    if args.logits_out is not None and os.path.realpath(args.logits_out) == os.path.realpath(args.trace):
        raise InputError(f"--trace {args.trace}: is --logits-out's file")
    room = max_context - n_prompt + 1
    if asked is None:
        return min(USUAL_TOKEN, args.max_new_tokens, room)
    if asked > args.max_new_tokens:
        raise InputError(f"--trace-token {asked}: --max-new-tokens is {args.max_new_tokens}")
    if asked > room:
        raise InputError(f"--trace-token {asked}: a context of {max_context} ends {room} tokens after the prompt")
    return asked


@contextlib.contextmanager
def trace_writer(path: Path | None, inputs: Sequence[Path] = ()) -> Iterator[Callable | None]:
    """A function that writes the trace of a Generation, see write_trace, to be called once; without a path it is None.

    InputError if the file cannot be written, at once, is one of `inputs`, or the disk is full.
    """
    if path is None:
        yield None
        return
    check_output(path, True, inputs, "--trace")

    def write(model, traced: int, generation: Generation) -> None:
        """Writes what token `traced` of a generation by `model` noted, and prints a table of it on stderr."""
        if len(generation.token_ids) < traced:
            raise InputError(f"--trace-token {traced}: the answer ended after {len(generation.token_ids)} tokens")
        launch = launch_of(model)
        title = f"token {traced} at position {model.trace_position}: {generation.device}, {generation.path}"
        data = json.dumps(chrome_trace(launch, title), separators=(",", ":")).encode() + b"\n"
        with replacing(path, len(data), True, inputs=inputs, flag="--trace", alone=False) as file:
            file.write(data, 0)
        print(f"{title}\n{table_text(table_rows(launch))}", file=sys.stderr)

    yield write
