"""Timing of what runs on a device, and what is said about it: durations, their spread, the ids' checksum."""

import statistics
import time
import zlib
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spread:
    """Sums up samples, in their unit. p10 and p90 are percentiles, interpolated linearly."""

    median: float
    mean: float
    min: float
    p10: float
    p90: float
    n: int


def spread(samples: Iterable[float]) -> Spread:
    """Of one sample or more."""
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
    """Of samples in ascending order, interpolated linearly between the two nearest."""
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def checksum(token_ids: Iterable[int]) -> str:
    """CRC-32 of the ids as little-endian int32, eight hexadecimal digits: tells whether two runs wrote the same."""
    return f"{zlib.crc32(b''.join(token_id.to_bytes(4, 'little') for token_id in token_ids)):08x}"


class DeviceMarks:
    """Points in a device's queue, for the time between them."""

    def __init__(self):
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        """After what was queued so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def intervals_ms(self) -> list[float]:
        """Milliseconds of device time from each mark to the next; waits until the last one is reached."""
        if self._events:
            self._events[-1].synchronize()
        return [start.elapsed_time(end) for start, end in zip(self._events, self._events[1:])]


class WallMarks:
    """Points in the host's time."""

    def __init__(self):
        self._seconds = array("d")

    def mark(self) -> None:
        self._seconds.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        """Milliseconds from each mark to the next."""
        return [(end - start) * 1e3 for start, end in zip(self._seconds, self._seconds[1:])]


def device_times_ms(launch: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of device time of each of `repeats` launches, queued one behind the other."""
    marks = DeviceMarks()
    marks.mark()
    for _ in range(repeats):
        launch()
        marks.mark()
    return marks.intervals_ms()
