"""Measure a device's read bandwidth, which gives a lower bound of a token's time from the bytes that it reads."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from host.limits import available_bytes
from measure.timing import Spread, device_times_ms, spread

MAX_BYTES = 8 << 30  # far more than any cache holds
WARM_UP = 5
REPEATS = 20
# (elements that a program loads at a time, number of loads, warps); which is fastest depends on the device.
SHAPES = ((4096, 1, 4), (8192, 1, 8), (16384, 1, 8), (4096, 64, 8))
MAX_PROGRAM_VALUES = max(block * n_blocks for block, n_blocks, _ in SHAPES)  # a multiple of every shape's values
MIN_PROGRAM_VALUES = min(block * n_blocks for block, n_blocks, _ in SHAPES)


@dataclass(frozen=True)
class Bandwidth:
    """Times to read `n_bytes` with the fastest of SHAPES."""

    n_bytes: int
    ms: Spread  # milliseconds of device time

    @property
    def bytes_per_second(self) -> float:
        return self.n_bytes / self.ms.median * 1e3


@triton.jit
def sum_blocks(values, sums, N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Store in sums[program], int64, the sum modulo 2^32 of the program's N_BLOCKS * BLOCK int32 values."""
    pid = tl.program_id(0)
    offsets = pid.to(tl.int64) * (N_BLOCKS * BLOCK) + tl.arange(0, BLOCK)
    total = tl.load(values + offsets)
    for n in range(1, N_BLOCKS):
        total += tl.load(values + offsets + n * BLOCK)
    tl.store(sums + pid, tl.sum(total.to(tl.int64)))


def sum_int32(values: torch.Tensor, sums: torch.Tensor, shape: tuple[int, int, int]) -> int:
    """Queue `sum_blocks` with one of SHAPES, and return how many of `sums` it fills.

    values: int32, as many as a multiple of MAX_PROGRAM_VALUES.
    """
    block, n_blocks, num_warps = shape
    n_programs = values.numel() // (block * n_blocks)
    sum_blocks[(n_programs,)](values, sums, n_blocks, block, num_warps=num_warps)
    return n_programs


def measure_read_bandwidth(device: torch.device) -> Bandwidth | None:
    """Return the time to read random int32 values with the fastest of SHAPES, or None on a CPU."""
    if device.type == "cpu":
        return None
    n_bytes = min(MAX_BYTES, available_bytes(device) // 2)
    n_values = max(1, n_bytes // 4 // MAX_PROGRAM_VALUES) * MAX_PROGRAM_VALUES
    fastest = fastest_stream(torch.empty(n_values, dtype=torch.int32, device=device).random_())
    torch.cuda.empty_cache()  # models are loaded into the memory that is free
    return fastest


def fastest_stream(values: torch.Tensor) -> Bandwidth:
    """Time each of SHAPES and return the fastest. Raise RuntimeError if one finds another sum than PyTorch."""
    expected = int(values.sum(dtype=torch.int64)) % 2**32
    sums = torch.empty(values.numel() // MIN_PROGRAM_VALUES, dtype=torch.int64, device=values.device)
    times = []
    for shape in SHAPES:
        n_sums = sum_int32(values, sums, shape)
        if int(sums[:n_sums].sum()) % 2**32 != expected:
            raise RuntimeError(f"the bandwidth kernel {shape} did not read what is there")
        stream = functools.partial(sum_int32, values, sums, shape)
        device_times_ms(stream, WARM_UP)
        times.append(spread(device_times_ms(stream, REPEATS)))
    return Bandwidth(values.nbytes, min(times, key=lambda ms: ms.median))
