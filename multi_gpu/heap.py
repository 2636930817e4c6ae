"""Memory in which every rank has the same buffers, each of which all ranks may write: Iris's heap, or one process's."""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import triton

from system.errors import InputError

REQUIREMENTS = "requirements-multi-gpu.txt"
ALIGNMENT = 1 << 10  # bytes
MIN_HEAP_BYTES = 1 << 26


@dataclass(frozen=True)
class PeerPointer:
    """Address of a buffer in another rank's memory, as Triton takes it in place of a tensor."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


Buffer = torch.Tensor | PeerPointer


class Heap(Protocol):
    """Allocates a buffer in every rank's memory at once."""

    n_ranks: int

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Buffer, ...]:
        """Return each rank's buffer of a collective allocation; a tensor if it is in this process."""

    def all_true(self, value: bool) -> bool:
        """Return whether the value is True in all processes, which all call this."""


class LocalHeap:
    """All ranks in one process: each buffer is a tensor of its own, on one device."""

    def __init__(self, n_ranks: int, device: torch.device):
        self.n_ranks = n_ranks
        self._device = device

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(shape, dtype=dtype, device=self._device) for _ in range(self.n_ranks))

    def all_true(self, value: bool) -> bool:
        return value


class IrisHeap:
    """This process is one rank of several, whose memory Iris maps into this one.

    torch.distributed must be set up. The allocator maps the memory of processes that share a GPU as well. Buffers are
    cut from one allocation, so that they lie at the same offset on every rank.
    """

    def __init__(self, n_bytes: int):
        """Make room for n_bytes of buffers on each rank. Raise InputError if Iris is missing or finds no memory."""
        try:
            import iris
        except ImportError as error:
            raise InputError(
                f"Iris cannot be imported ({str(error).splitlines()[0]}): pip install -r {REQUIREMENTS}"
            ) from None
        try:
            # A power of two, as the allocator's chunks must be.
            heap_bytes = max(MIN_HEAP_BYTES, triton.next_power_of_2(2 * n_bytes))
            self._context = iris.iris(heap_size=heap_bytes, allocator_type="vmem_chunked")
            self._memory = self._context.zeros(n_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise InputError(f"Iris's heap of {n_bytes} bytes: {str(error).splitlines()[0]}") from None
        self.rank, self.n_ranks = self._context.get_rank(), self._context.get_num_ranks()
        bases = [int(base) for base in self._context.get_heap_bases()]
        self._starts = [self._memory.data_ptr() - bases[self.rank] + base for base in bases]
        self._used = 0

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Buffer, ...]:
        start, n_bytes = self._used, math.prod(shape) * dtype.itemsize
        self._used += aligned(n_bytes)
        if self._used > len(self._memory):
            raise ValueError(f"the heap has {len(self._memory)} bytes, {self._used} are needed")
        own = self._memory[start : start + n_bytes].view(dtype).view(shape)
        return tuple(
            own if rank == self.rank else PeerPointer(address + start, dtype)
            for rank, address in enumerate(self._starts)
        )

    def all_true(self, value: bool) -> bool:
        values = [False] * self.n_ranks
        torch.distributed.all_gather_object(values, value)
        return all(values)


def aligned(n_bytes: int) -> int:
    """Return the bytes that a buffer of n_bytes takes of a heap."""
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT
