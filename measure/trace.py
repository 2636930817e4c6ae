"""Turn the timestamps of one launch into a Chrome trace and a table of its phases.

The timestamps (common/trace.py) are int64 nanoseconds [events, programs]. Phase i of a program lasts from event 2 i to
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

from command_line.options import DEFAULT_TRACE_TOKEN
from host.generation import Generation
from host.phases import PHASE_NAMES, Phase, phases_of_token
from measure.traffic import bytes_by_phase
from system.errors import InputError
from system.output_file import check_output, replacing

SLICES = 20  # equal parts of the token's time in which bytes are counted
HEADER = ("phase", "calls", "span us", "work us", "longest", "wait us", "total us", "share", "MB", "GB/s")
LEGEND = (
    "span: from the first program's entry to the last one's exit, median of the calls;",
    "work: a program's time in the phase, mean and longest; wait: at the barrier after it, mean;",
    "barriers: from the last arrival to the first exit.",
    "Bytes count for the phase that uses them, even if they are loaded before it.",
)


@dataclass(frozen=True)
class Launch:
    """The timestamps of one launch that gave a token."""

    phases: list[Phase]
    ns: np.ndarray  # int64 [phases, 2, programs], since the first event: when each program enters and leaves a phase
    n_bytes: list[int]  # that each phase reads, see measure.traffic.bytes_by_phase

    @classmethod
    def from_events(cls, events: np.ndarray, n_layers: int, n_bytes: list[int]) -> "Launch":
        """Return the launch with these events, int64 nanoseconds [events, programs].

        Raise ValueError if the number of events or byte counts is wrong, or an event has no time.
        """
        phases = phases_of_token(n_layers)
        if len(events) != 2 * len(phases) or len(n_bytes) != len(phases):
            raise ValueError(f"{len(events)} events and {len(n_bytes)} byte counts for {len(phases)} phases")
        if not events.all():
            raise ValueError("some events have no time: the position was not decoded")
        # A device's clock may be set back, but the times of a trace must not decrease.
        ns = np.maximum.accumulate(events - events.min(), axis=0)
        return cls(phases, ns.reshape(len(phases), 2, -1), n_bytes)

    @property
    def spans(self) -> np.ndarray:
        """int64 nanoseconds [phases, 2]: when the first program enters a phase and the last one leaves it."""
        return np.stack((self.ns[:, 0].min(-1), self.ns[:, 1].max(-1)), axis=-1)


@dataclass(frozen=True)
class Row:
    """A row of the table. Times are microseconds; None marks a cell that does not apply."""

    name: str
    calls: int | None
    span_us: float | None  # from the first program's entry to the last one's exit, median of the calls
    work_us: float | None  # from a program's entry to its exit, mean
    longest_us: float | None  # from a program's entry to its exit, maximum
    wait_us: float | None  # of a program at the barrier that follows, mean
    total_us: float  # sum of all spans
    share: float  # of the token's time
    n_bytes: int | None  # read in all calls together

    @property
    def gb_per_s(self) -> float | None:
        return self.n_bytes / self.total_us / 1e3 if self.n_bytes is not None and self.total_us else None


def table_rows(launch: Launch) -> list[Row]:
    """Return a row for each name of a phase, one for the barriers, and their total, which is the token's time."""
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
        calls_with_barrier = [i for i in calls if i < len(waits_us)]
        row = Row(
            name=name,
            calls=len(calls),
            span_us=statistics.median(spans_us[calls].tolist()),
            work_us=float(work_us[calls].mean()),
            longest_us=float(work_us[calls].max()),
            wait_us=float(waits_us[calls_with_barrier].mean()) if calls_with_barrier else None,
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
    """Return the table as aligned text, followed by the legend of its columns."""

    def number(value: float | None, format_spec: str) -> str:
        return "-" if value is None else format(value, format_spec)

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
    """Return the launch in Chrome's trace format: a thread for each program, and GB/s over time as a counter.

    Times are microseconds since the launch's first event. A program's begin and end events are in chronological order.
    """
    events = [{"ph": "M", "name": "process_name", "pid": 0, "args": {"name": title}}]
    for program in range(launch.ns.shape[-1]):
        thread = {"pid": 0, "tid": program}
        events.append({"ph": "M", "name": "thread_name", **thread, "args": {"name": f"program {program}"}})
        for name, category, args, start, end in _intervals(launch, program):
            events.append({"ph": "B", "name": name, "cat": category, "ts": start / 1e3, **thread, "args": args})
            events.append({"ph": "E", "name": name, "cat": category, "ts": end / 1e3, **thread})
    rates = gb_per_s_over_time(launch)
    width_us = launch.spans[-1, 1] / 1e3 / SLICES
    for i, rate in enumerate([*rates, 0.0] if rates else []):
        time_us = round(i * width_us, 3)
        events.append({"ph": "C", "name": "bytes read", "pid": 0, "ts": time_us, "args": {"GB/s": rate}})
    return {"traceEvents": events, "displayTimeUnit": "ns"}


def _intervals(launch: Launch, program: int) -> Iterator[tuple[str, str, dict, int, int]]:
    """Yield (name, category, arguments, start, end) of a program's phases and barriers, in order and in nanoseconds."""
    times = launch.ns[:, :, program].tolist()
    for i, ((name, layer), (start, end)) in enumerate(zip(launch.phases, times)):
        args = {} if layer is None else {"layer": layer}
        yield name, "phase", args, start, end
        if i + 1 < len(times):
            yield f"barrier after {name}", "barrier", {**args, "barrier": i + 1}, end, times[i + 1][0]


def gb_per_s_over_time(launch: Launch, slices: int = SLICES) -> list[float]:
    """Return GB/s in equal slices of the token's time, or [] if it took no time.

    Each phase is assumed to read at a constant rate over its span.
    """
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
    """Return a Decoder's finished launch at its trace_position. Raise ValueError if there was none."""
    n_bytes = bytes_by_phase(model.config, model.trace_position or 0)
    return Launch.from_events(model.state.trace.cpu().numpy(), model.config.n_layers, n_bytes)


def token_to_trace(args: argparse.Namespace, n_prompt: int, max_context: int) -> int | None:
    """Return the number, from 1, of the generated token to trace, or None without --trace.

    Raise InputError if a prompt of n_prompt tokens leaves no room for that many, --max-new-tokens is smaller, or
    --logits-out is the same file.
    """
    requested = args.trace_token
    if args.trace is None:
        if requested is not None:
            raise InputError(f"--trace-token {requested}: without --trace FILE there is no trace")
        return None
    if args.logits_out is not None and os.path.realpath(args.logits_out) == os.path.realpath(args.trace):
        raise InputError(f"--trace {args.trace}: is --logits-out's file")
    room = max_context - n_prompt + 1
    if requested is None:
        return min(DEFAULT_TRACE_TOKEN, args.max_new_tokens or room, room)
    if args.max_new_tokens and requested > args.max_new_tokens:
        raise InputError(f"--trace-token {requested}: --max-new-tokens is {args.max_new_tokens}")
    if requested > room:
        raise InputError(f"--trace-token {requested}: a context of {max_context} ends {room} tokens after the prompt")
    return requested


@contextlib.contextmanager
def trace_writer(path: Path | None, inputs: Sequence[Path] = ()) -> Iterator[Callable | None]:
    """Give a function that writes the trace of a Generation and is called once, or None without a path.

    Raise InputError at once if the file cannot be written or is one of `inputs`, and later if the disk is full.
    """
    if path is None:
        yield None
        return
    check_output(path, True, inputs, "--trace")

    def write(model, traced: int, generation: Generation) -> None:
        """Write the trace of token number `traced` that `model` generated, and print its table on stderr."""
        if len(generation.token_ids) < traced:
            raise InputError(f"--trace-token {traced}: the answer ended after {len(generation.token_ids)} tokens")
        launch = launch_of(model)
        title = f"token {traced} at position {model.trace_position}: {generation.device}, {generation.path}"
        data = json.dumps(chrome_trace(launch, title), separators=(",", ":")).encode() + b"\n"
        with replacing(path, len(data), True, inputs=inputs, flag="--trace", exclusive=False) as file:
            file.write(data, 0)
        print(f"{title}\n{table_text(table_rows(launch))}", file=sys.stderr)

    yield write
