"""Time launches on a device and on the host, and summarize durations and token ids."""

import statistics
import time
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Statistics of n samples, in their unit. p10 and p90 are percentiles, interpolated linearly."""

    median: float
    mean: float
    min: float
    p10: float
    p90: float
    n: int


def spread(samples: Iterable[float]) -> Spread:
    """Return the statistics of one or more samples."""
    ordered = sorted(samples)
    return Spread(
        median=statistics.median(ordered),
        mean=statistics.fmean(ordered),
        min=ordered[0],
        p10=percentile(ordered, 10),
        p90=percentile(ordered, 90),
        n=len(ordered),
    )


def percentile(ordered: list[float], percent: float) -> float:
    """Return a percentile of samples in ascending order, interpolated linearly between the two nearest."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def checksum(token_ids: Iterable[int]) -> str:
    """Return the CRC-32 of the ids as little-endian int32 in eight hexadecimal digits, to compare two runs."""
    return f"{zlib.crc32(b''.join(token_id.to_bytes(4, 'little') for token_id in token_ids)):08x}"


class DeviceMarks:
    """Points in a device's queue between which its time is measured."""

    def __init__(self):
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """Add a point after all that was queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def intervals_ms(self) -> list[float]:
        """Return the milliseconds of device time from each mark to the next, after waiting for the last one."""
        if self._events:
            self._events[-1].synchronize()
        return [start.elapsed_time(end) for start, end in zip(self._events, self._events[1:])]


class WallMarks:
    """Points in the host's wall-clock time."""

    def __init__(self):
        self._seconds = array("d")

    def mark(self) -> None:
        self._seconds.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Return the milliseconds from each mark to the next."""
        return [(end - start) * 1e3 for start, end in zip(self._seconds, self._seconds[1:])]


def device_times_ms(launch: Callable[[], object], repeats: int) -> list[float]:
    """Return the milliseconds of device time of each of `repeats` launches, queued one after the other."""
    marks = DeviceMarks()
    marks.mark()
    for _ in range(repeats):
        launch()
        marks.mark()
    return marks.intervals_ms()
