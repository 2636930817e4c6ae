"""Time one exchange of all ranks by itself: bytes of values that each rank stores at every other one, against time.

By packets, as behind a layer's O projection and experts, a program waits for its own values alone; by flags, as with
prompts, for all programs of all ranks. common/exchange.py says how.

torchrun --nproc-per-node 2 multi_gpu/bench_exchange.py
python multi_gpu/bench_exchange.py --ranks 2      # in the CPU interpreter: right or wrong, no timing
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import host.start

import math
import time
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

import interpreter
from checkpoints.config import GPT_OSS_120B
from command_line.run import run_main
from command_line.scripts import arguments
from common.barrier import ABORT, SYNC_WORDS, leave_grid
from common.build import Build
from common.context import Context
from common.exchange import LINE_WORDS, advance, raise_flags, store, sum_packets, wait_for_flags
from host.backend import usable_device
from host.launch import program_count, tuning_for
from measure.report import markdown_table
from multi_gpu.group import Group
from multi_gpu.heap import aligned
from multi_gpu.prompts import RowPeers
from multi_gpu.protocol import FIRST_EPOCH, epoch_after
from prefill import Launch
from system.errors import InputError, MegakernelAborted

KINDS = ("packets", "flags")
BLOCK = 256  # elements that a program stores at a time
GPU_ROUNDS, CPU_ROUNDS = 1000, 4
REPEATS = 5


class Sync(NamedTuple):
    """The part of a State that an exchange uses."""

    sync: Any


@triton.jit(do_not_specialize=["n_elements", "capacity", "rounds", "n_programs"])
def exchange_rounds_kernel(
    sync_ptr, wrong_ptr, n_elements, capacity, rounds, n_programs, peers, N: tl.constexpr, BUILD: tl.constexpr
):
    """Exchange n_elements float32 of every rank, `rounds` times; count values that are not the sender's.

    capacity: elements from one rank's values to the next rank's; two sets of them are taken in turns.
    """
    N_RANKS: tl.constexpr = BUILD.n_ranks
    EVERYONE: tl.constexpr = BUILD.everyone
    program = tl.program_id(0)
    ctx = Context((), Sync(sync_ptr), 0, 0, 0, 0, program, n_programs, (), peers)
    wrong = 0
    for n in range(1, rounds + 1):
        first = n % 2 * N_RANKS * capacity
        for block in range(program, tl.cdiv(n_elements, N), n_programs):
            i = block * N + tl.arange(0, N)
            value = (i + n + 7 * BUILD.rank).to(tl.float32)
            store(advance(peers.rows, first + BUILD.rank * capacity + i, BUILD), value, i < n_elements, BUILD)
        raise_flags(ctx, n, n, EVERYONE, BUILD)
        wait_for_flags(ctx, n, EVERYONE, BUILD)
        for block in range(program, tl.cdiv(n_elements, N), n_programs):
            i = block * N + tl.arange(0, N)
            for rank in tl.static_range(N_RANKS):
                value = tl.load(peers.own_rows + first + rank * capacity + i, mask=i < n_elements, other=0.0)
                expected = (i + n + 7 * rank).to(tl.float32)
                wrong += tl.sum(((value != expected) & (i < n_elements)).to(tl.int32))
    tl.atomic_add(wrong_ptr, wrong)
    MACHINE: tl.constexpr = BUILD.machine
    leave_grid(sync_ptr, n_programs, MACHINE)


@triton.jit(do_not_specialize=["n_elements", "rounds", "n_programs"])
def packet_rounds_kernel(
    sync_ptr,
    wrong_ptr,
    n_elements,
    rounds,
    n_programs,
    peers,
    CAPACITY: tl.constexpr,
    N: tl.constexpr,
    BUILD: tl.constexpr,
):
    """Add up n_elements float32 of every rank, `rounds` times; count sums that are not the expected ones."""
    N_RANKS: tl.constexpr = BUILD.n_ranks
    program = tl.program_id(0)
    ctx = Context((), Sync(sync_ptr), 0, 0, 0, 0, program, n_programs, (), peers)
    wrong = 0
    for n in range(1, rounds + 1):
        buffers = advance(peers.packets, n % 2 * N_RANKS * CAPACITY, BUILD)
        for block in range(program, tl.cdiv(n_elements, N), n_programs):
            i = block * N + tl.arange(0, N)
            mask = i < n_elements
            expected = (N_RANKS * (i + n) + 7 * (N_RANKS * (N_RANKS - 1) // 2)).to(tl.float32)
            value = (i + n + 7 * BUILD.rank).to(tl.float32)
            found = sum_packets(ctx, buffers, CAPACITY, i, (value,), mask, (peers.epoch + n, n), BUILD)[0]
            wrong += tl.sum(((found != expected) & mask).to(tl.int32))
    tl.atomic_add(wrong_ptr, wrong)
    MACHINE: tl.constexpr = BUILD.machine
    leave_grid(sync_ptr, n_programs, MACHINE)


class PacketPeers(NamedTuple):
    """What an exchange by packets knows of all ranks; see common.exchange.Peers."""

    packets: Any  # tuple, int64 [2, ranks, elements]
    epoch: Any


class Exchange:
    """Buffers and launches of one rank or, in the interpreter, of all."""

    def __init__(self, group: Group, max_bytes: int):
        self.group, self.capacity, self.epoch = group, max_bytes // 4, FIRST_EPOCH
        n = group.n_ranks
        tuning = tuning_for(group.device, GPT_OSS_120B)
        self.n_programs = program_count(group.device, tuning) if group.on_gpu else 2
        shapes = {
            "rows": ((2 * n, self.capacity), torch.float32),
            "packets": ((2 * n, self.capacity), torch.int64),
            "flags": ((n, LINE_WORDS.value), torch.int32),
        }
        n_bytes = sum(aligned(math.prod(shape) * dtype.itemsize) for shape, dtype in shapes.values())
        self.heap = group.open_heap(n_bytes)  # kept, as its memory goes with it
        self.rows, self.packets, self.flags = (self.heap.zeros(*shape, dtype=dtype) for shape, dtype in shapes.values())
        self.tuning = tuning
        self.builds = [Build(GPT_OSS_120B.compiled(), tuning, n_ranks=n, rank=rank) for rank in group.ranks]
        self.sync = [torch.zeros(SYNC_WORDS, dtype=torch.int32, device=group.device) for _ in group.ranks]
        self.wrong = torch.zeros(1, dtype=torch.int32, device=group.device)

    def launches(self, by: str, n_bytes: int, rounds: int) -> list[Launch]:
        """Return the launch of each rank of this process; by: of KINDS."""
        found = []
        for rank, build, sync in zip(self.group.ranks, self.builds, self.sync):
            options = {"N": BLOCK, "BUILD": build, **self.tuning.options()}
            if by == "packets":
                peers = PacketPeers(self.packets, self.epoch)
                arguments = (sync, self.wrong, n_bytes // 4, rounds, self.n_programs, peers)
                found.append(
                    (packet_rounds_kernel, (self.n_programs,), arguments, {"CAPACITY": self.capacity} | options)
                )
            else:
                peers = RowPeers(self.rows, self.rows[rank], self.flags, self.flags[rank], self.epoch)
                arguments = (sync, self.wrong, n_bytes // 4, self.capacity, rounds, self.n_programs, peers)
                found.append((exchange_rounds_kernel, (self.n_programs,), arguments, options))
        self.epoch = epoch_after(self.epoch, rounds)
        return found

    def run(self, by: str, n_bytes: int, rounds: int) -> float:
        """Exchange so many times, and return the seconds. Raise MegakernelAborted if a rank stays away."""
        self.group.gather(None)
        start = time.perf_counter()
        launches = self.launches(by, n_bytes, rounds)
        if self.group.on_gpu:
            for kernel, grid, arguments, options in launches:
                kernel[grid](*arguments, **options)
            torch.cuda.synchronize()
        else:
            interpreter.launch_together(launches)
        seconds = time.perf_counter() - start
        if any(int(sync[ABORT.value]) for sync in self.sync):
            raise MegakernelAborted(f"rank {self.group.rank}: another rank did not arrive at an exchange")
        if int(self.wrong):
            raise MegakernelAborted(f"rank {self.group.rank}: {int(self.wrong)} values were not those that were sent")
        return seconds


def microseconds(exchange: Exchange, by: str, n_bytes: int) -> float:
    """Return the least time of an exchange, launches left out: that of many less that of one, by their number."""
    rounds = GPU_ROUNDS if exchange.group.on_gpu else CPU_ROUNDS
    exchange.run(by, n_bytes, 1)
    one = min(exchange.run(by, n_bytes, 1) for _ in range(REPEATS))
    many = min(exchange.run(by, n_bytes, rounds) for _ in range(REPEATS))
    return (many - one) / (rounds - 1) * 1e6


def main() -> None:
    """Run the benchmark, and print a table on rank 0."""
    args = arguments("multi_gpu/bench_exchange.py")
    if any(n_bytes % 4 for n_bytes in args.bytes):
        raise InputError("--bytes: multiples of 4, as values are float32")
    group = Group(args.ranks)
    try:
        usable_device(group.device)
        exchange = Exchange(group, max(args.bytes))
        timed = group.on_gpu and not group.shares_gpu
        rows = []
        for n_bytes in args.bytes:
            times = [microseconds(exchange, by, n_bytes) for by in KINDS]
            rows.append((str(n_bytes), *(f"{time:.2f}" if timed else "-" for time in times)))
        if group.rank == 0:
            state = "" if timed else "; shared GPU, no timing" if group.on_gpu else "; CPU interpreter, no timing"
            print(f"An exchange of {group.n_ranks} ranks, {exchange.n_programs} programs each{state}")
            print("\n".join(markdown_table(("bytes to each rank", *(f"us by {by}" for by in KINDS)), rows)))
    finally:
        group.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
