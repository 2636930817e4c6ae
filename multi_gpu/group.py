"""The processes of a launch by torchrun, one for each rank: who they are, and that all of them want the same."""

import datetime
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from multi_gpu.heap import Heap, IrisHeap, LocalHeap
from system.errors import InputError, first_line

JOIN_SECONDS = 120  # for all processes to start
Result = TypeVar("Result")


def restart_by_torchrun(n_gpus: int) -> None:
    """Start this script again as n_gpus processes, unless it is one of them. Raise InputError without so many GPUs."""
    if "RANK" in os.environ:
        return
    available = torch.cuda.device_count()
    if available < n_gpus:
        raise InputError(f"--gpus {n_gpus}: {available} found; ranks on a shared GPU would take turns, no timing")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_gpus}", *sys.argv]
    os.execv(sys.executable, command)


class Group:
    """The ranks of one model: one of them in each process, or on a CPU all of them in this one."""

    def __init__(self, n_interpreted: int | None = None):
        """Join the processes that torchrun has started, or be n_interpreted ranks of the interpreter.

        Raise InputError if neither is possible.
        """
        self.on_gpu = torch.cuda.is_available() and not n_interpreted
        if not self.on_gpu:
            if n_interpreted is None:
                raise InputError("no GPU is available: --ranks N runs N ranks in the CPU interpreter")
            self.rank, self.n_ranks, self.ranks = 0, n_interpreted, tuple(range(n_interpreted))
            self.device, self.shares_gpu = torch.device("cpu"), False
            return
        if "RANK" not in os.environ:
            raise InputError("start it by torchrun --nproc-per-node N, which starts a process for each rank")
        self.rank, self.n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.ranks = (self.rank,)
        local, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        torch.cuda.set_device(local % n_gpus)
        self.device = torch.device("cuda")
        self.shares_gpu = int(os.environ.get("LOCAL_WORLD_SIZE", self.n_ranks)) > n_gpus
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=JOIN_SECONDS))

    def open_heap(self, n_bytes: int) -> Heap:
        """Open a heap with room for n_bytes on each rank. Raise InputError if there is none."""
        if self.on_gpu:
            return self.together(lambda: IrisHeap(n_bytes))
        return LocalHeap(self.n_ranks, self.device)

    def together(self, call: Callable[[], Result]) -> Result:
        """Return what a function returns; raise InputError on all ranks if it raises one on any."""
        result, failure = None, None
        try:
            result = call()
        except InputError as error:
            failure = str(error)
        failures = self.gather(failure)
        if failure is not None:
            raise InputError(failure)
        for rank, other in enumerate(failures):
            if other is not None:
                raise InputError(f"rank {rank} has failed: {other}")
        return result

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise InputError on all ranks, naming a fact, unless all ranks have the same."""
        for rank, others in enumerate(self.gather(facts)):
            for name, value in facts.items():
                if others.get(name) != value:
                    raise InputError(f"{name}: rank {rank} has {others.get(name)!r}, rank {self.rank} {value!r}")

    def gather(self, value: Any) -> list:
        """Return every rank's value."""
        if not self.on_gpu:
            return [value]
        values = [None] * self.n_ranks
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:
            raise InputError(f"rank {self.rank}: another rank is gone ({first_line(error)})") from None
        return values

    def first(self, value: Result) -> Result:
        """Return rank 0's value."""
        return self.gather(value)[0]

    def close(self) -> None:
        """Leave the group."""
        if self.on_gpu and dist.is_initialized():
            dist.destroy_process_group()
