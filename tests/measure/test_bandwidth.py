"""The streaming kernel reads every value once; times are for tests/gpu/test_bench_tpot_on_gpu.py."""

import pytest
import torch

from measure import bandwidth
from measure.bandwidth import (
    MAX_PROGRAM_VALUES,
    MIN_PROGRAM_VALUES,
    SHAPES,
    fastest_stream,
    measure_read_bandwidth,
    sum_int32,
)


@pytest.fixture(scope="module")
def values():
    """Return values for two programs of the largest share; their sum does not fit 32 bits."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(-(2**31), 2**31, (2 * MAX_PROGRAM_VALUES,), generator=generator, dtype=torch.int32)


@pytest.fixture
def made_up_times(monkeypatch):
    """Return times under which the second shape is the fastest."""
    times = iter([[5.0]] * 2 + [[1.0]] * 2 + [[4.0, 3.0, 8.0]] * 4)
    monkeypatch.setattr(bandwidth, "device_times_ms", lambda launch, repeats: next(times))


@pytest.mark.parametrize("shape", SHAPES)
def test_each_program_sums_its_share(values, shape):
    block, n_blocks, _ = shape
    sums = torch.zeros(values.numel() // MIN_PROGRAM_VALUES, dtype=torch.int64)
    n_sums = sum_int32(values, sums, shape)
    expected = values.view(-1, block * n_blocks).sum(1, dtype=torch.int64)
    assert torch.equal(sums[:n_sums] % 2**32, expected % 2**32)


def test_the_fastest_shape_counts(values, made_up_times):
    found = fastest_stream(values)
    assert found.ms.median == 1.0
    assert found.n_bytes == 2 * MAX_PROGRAM_VALUES * 4
    assert found.bytes_per_second == 2 * MAX_PROGRAM_VALUES * 4 * 1000


def test_a_kernel_that_reads_something_else_is_noticed(values, made_up_times, monkeypatch):
    def one_block_less(values, sums, shape):
        return sum_int32(values, sums, shape) - 1

    monkeypatch.setattr(bandwidth, "sum_int32", one_block_less)
    with pytest.raises(RuntimeError, match="did not read what is there"):
        fastest_stream(values)


def test_a_cpu_is_not_measured():
    assert measure_read_bandwidth(torch.device("cpu")) is None
