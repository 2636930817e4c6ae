"""measure.timing: statistics against NumPy, the checksum against a published value, marks against a made-up clock."""

import numpy as np
import pytest
import torch

from measure import timing
from measure.timing import DeviceMarks, WallMarks, checksum, device_times_ms, spread


@pytest.mark.parametrize("n", [1, 2, 7, 10, 101])
def test_spread_is_what_numpy_computes(n):
    samples = np.random.default_rng(n).exponential(size=n).tolist()
    found = spread(samples)
    assert found.n == n
    assert found.min == min(samples)
    assert found.mean == pytest.approx(np.mean(samples))
    assert [found.p10, found.median, found.p90] == pytest.approx(np.percentile(samples, [10, 50, 90]).tolist())


def test_checksum_is_the_crc32_of_little_endian_words():
    assert checksum([0x34333231, 0x38373635]) == "9ae0daaf"  # CRC-32 of the text 12345678
    assert checksum([]) == "00000000"


def test_checksum_tells_order_and_value():
    assert len({checksum(ids) for ids in ([1, 2], [2, 1], [1, 3], [1], [256, 2])}) == 5


class FakeEvent:
    """An event on a clock that advances by 1 ms, 2 ms, 3 ms ... from record to record."""

    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.recorded += 1
        self.ms = FakeEvent.recorded * (FakeEvent.recorded + 1) / 2
        self.reached = False

    def synchronize(self):
        self.reached = True

    def elapsed_time(self, end):
        return end.ms - self.ms


@pytest.fixture
def fake_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "recorded", 0)


def test_device_marks_give_the_time_between_neighbours(fake_events):
    marks = DeviceMarks()
    for _ in range(4):
        marks.mark()
    assert marks.intervals_ms() == [2, 3, 4]


def test_no_marks_no_intervals():
    assert DeviceMarks().intervals_ms() == WallMarks().intervals_ms() == []


def test_device_times_are_one_for_each_launch(fake_events):
    launches = []
    assert device_times_ms(lambda: launches.append(1), 3) == [2, 3, 4]
    assert len(launches) == 3


def test_wall_marks_are_in_milliseconds(monkeypatch):
    clock = iter([1.0, 1.5, 1.75])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    marks = WallMarks()
    for _ in range(3):
        marks.mark()
    assert marks.intervals_ms() == [500, 250]
