"""A device's read bandwidth, measured: what a token's bytes are divided by to get the floor of its time."""

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from host.limits import available_bytes
from measure.timing import Spread, device_times_ms, spread

MOST_BYTES = 8 << 30  # far more than any cache holds
WARM_UP = 5
REPEATS = 20
# (elements a program loads at a time, how many times, warps): the best is a matter of the device.
SHAPES = ((4096, 1, 4), (8192, 1, 8), (16384, 1, 8), (4096, 64, 8))
GRAIN = max(block * n_blocks for block, n_blocks, _ in SHAPES)  # of which the others are divisors
LEAST = min(block * n_blocks for block, n_blocks, _ in SHAPES)


@dataclass(frozen=True)
class Bandwidth:
    """One way to stream `n_bytes`, the fastest of SHAPES, timed over and over."""

    n_bytes: int
    ms: Spread

    @property
    def bytes_per_second(self) -> float:
        return self.n_bytes / self.ms.median * 1e3


@triton.jit
def sum_blocks(values, sums, N_BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """sums[program], int64, is the sum of the program's N_BLOCKS * BLOCK int32 values, but for a multiple of 2^32."""
    pid = tl.program_id(0)
    offsets = pid.to(tl.int64) * (N_BLOCKS * BLOCK) + tl.arange(0, BLOCK)
    total = tl.load(values + offsets)
    for n in range(1, N_BLOCKS):
        total += tl.load(values + offsets + n * BLOCK)
    tl.store(sums + pid, tl.sum(total.to(tl.int64)))


def sum_int32(values: torch.Tensor, sums: torch.Tensor, shape: tuple[int, int, int]) -> int:
    """Queue `sum_blocks` in one of SHAPES; returns how many of `sums` it fills. values: a multiple of GRAIN int32."""
    block, n_blocks, num_warps = shape
    n_programs = values.numel() // (block * n_blocks)
    sum_blocks[(n_programs,)](values, sums, n_blocks, block, num_warps=num_warps)
    return n_programs


def measure_read_bandwidth(device: torch.device) -> Bandwidth | None:
    """Stream random int32 values with the fastest of SHAPES. None on a CPU, where it means nothing."""
    if device.type == "cpu":
        return None
    n_values = max(1, min(MOST_BYTES, available_bytes(device) // 2) // 4 // GRAIN) * GRAIN
    fastest = fastest_stream(torch.empty(n_values, dtype=torch.int32, device=device).random_())
    torch.cuda.empty_cache()  # what is free is what a model may take
    return fastest


def fastest_stream(values: torch.Tensor) -> Bandwidth:
    """Time each of SHAPES, all of which must find the same sum as PyTorch."""
    expected = int(values.sum(dtype=torch.int64)) % 2**32
    sums = torch.empty(values.numel() // LEAST, dtype=torch.int64, device=values.device)
    times = []
    for shape in SHAPES:
        n_sums = sum_int32(values, sums, shape)
        if int(sums[:n_sums].sum()) % 2**32 != expected:
            raise RuntimeError(f"the bandwidth kernel {shape} did not read what is there")
        stream = functools.partial(sum_int32, values, sums, shape)
        device_times_ms(stream, WARM_UP)
        times.append(spread(device_times_ms(stream, REPEATS)))
    return Bandwidth(values.nbytes, min(times, key=lambda ms: ms.median))
