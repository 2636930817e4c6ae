"""Detect races by happens-before order: vector clocks on atomics, shadow memory for loads and stores.

Programs are the threads of the memory model. An atomic with release semantics publishes its program's clock at its
address, and one with acquire semantics merges the clock published there into its own. The first atomic after a
write-back (gfx950) publishes its program's clock at the write-back, whatever its semantics. All atomics are
read-modify-writes, so each one continues the release sequence of earlier ones; a plain store to the address ends it.
Scopes are ignored.
"""

import sys

import numpy as np
from triton._C.libtriton import ir

from interpreter.scheduler import describe_sites, kernel_sites

LOAD, STORE, ATOMIC, VOLATILE_LOAD = range(4)
_NAMES = ("load", "store", "atomic", "volatile load")
_CONFLICTS = {
    LOAD: (STORE, ATOMIC),
    STORE: (STORE, LOAD, ATOMIC, VOLATILE_LOAD),
    ATOMIC: (STORE, LOAD),
    VOLATILE_LOAD: (STORE,),
}
_ACQUIRES = (ir.MEM_SEMANTIC.ACQUIRE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_RELEASES = (ir.MEM_SEMANTIC.RELEASE, ir.MEM_SEMANTIC.ACQUIRE_RELEASE)


class _Shadow:
    """The clock and code site of each program's last access to each cell of one storage, by type of access.

    A cell is as wide as the narrowest access so far. The system provides zeroed pages lazily, so that untouched memory
    costs nothing.
    """

    def __init__(self, base, size, owners, programs):
        self.base, self.size, self.owners, self.programs = base, size, owners, programs
        self.cell = 4
        self.clocks = {}
        self.sites = {}

    def cells(self, offsets, width):
        """Return the cell numbers of accesses of `width` bytes at byte `offsets`, narrowing the cells if necessary."""
        while self.cell > 1 and (width % self.cell or (offsets % self.cell).any()):
            self.cell //= 2
            for table in (self.clocks, self.sites):
                for access_type in table:
                    table[access_type] = np.repeat(table[access_type], 2, axis=0)
        first = offsets // self.cell
        count = width // self.cell
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)

    def record(self, access_type, cells, program, clock, site):
        if access_type not in self.clocks:
            shape = (-(-self.size // self.cell), self.programs)
            self.clocks[access_type] = np.zeros(shape, np.int32)
            self.sites[access_type] = np.zeros(shape, np.int32)
        self.clocks[access_type][cells, program] = clock
        self.sites[access_type][cells, program] = site

    def describe(self, offset):
        """Return the name of the tensor that holds a byte of the storage, and the byte's offset in it."""
        address = self.base + offset
        for name, start, end in self.owners:
            if start <= address < end:
                return f"{name}+{address - start}"
        name, start, _ = self.owners[0]
        return f"{name}{address - start:+d}"


def named_tensors(name, value):
    """Yield (name, tensor) for the tensors in a value, also in nested tuples, lists and dicts."""
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        for position, item in enumerate(value):
            yield from named_tensors(f"{name}.{fields[position]}" if fields else f"{name}[{position}]", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from named_tensors(f"{name}[{key!r}]", item)
    elif isinstance(value, list):
        yield from named_tensors(name, tuple(value))
    elif hasattr(value, "untyped_storage"):
        yield name, value


class RaceDetector:
    """Observes one launch of `programs` programs on named arguments, and appends a line per race to `races`."""

    def __init__(self, arguments, programs, races):
        self.races = races
        self.reported = set()
        self.clock = np.eye(programs, dtype=np.int32)
        self.published = {}
        self.written_back = {}
        self.site_numbers = {}
        self.site_list = []
        storages = {}
        for argument, value in arguments.items():
            for name, tensor in named_tensors(argument, value):
                storage = tensor.untyped_storage()
                if storage.nbytes() and tensor.numel():
                    start = tensor.data_ptr()
                    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
                    owners = storages.setdefault((storage.data_ptr(), storage.nbytes()), [])
                    owners.append((name, start, start + (last + 1) * tensor.element_size()))
        self.shadows = [_Shadow(base, size, owners, programs) for (base, size), owners in sorted(storages.items())]
        self.bases = np.array([shadow.base for shadow in self.shadows], np.int64)

    def access(self, access_type, program, pointers, mask, width, time=None):
        """Check and record accesses of `width` bytes at the pointers selected by a mask, or all if it is None.

        time: the clock to record, if not the program's current one.
        """
        if not self.shadows:
            return
        pointers = pointers.reshape(-1)
        if mask is not None:
            mask = mask.reshape(-1)
            if not mask.all():
                pointers = pointers[mask]
        if not pointers.size:
            return
        addresses = pointers.astype(np.int64)
        site = self._site(sys._getframe(1))
        if access_type == STORE and self.published:
            for address in self.published.keys() & set(addresses.tolist()):
                del self.published[address]
        first, last = np.searchsorted(self.bases, (addresses.min(), addresses.max()), "right") - 1
        for number in range(max(first, 0), last + 1):
            shadow = self.shadows[number]
            offsets = addresses - shadow.base
            inside = (offsets >= 0) & (offsets < shadow.size)
            if not inside.all():
                offsets = offsets[inside]
            if offsets.size:
                self._access_storage(shadow, access_type, program, shadow.cells(offsets, width), site, time)

    def _access_storage(self, shadow, access_type, program, cells, site, time):
        clock = self.clock[program]
        for earlier in _CONFLICTS[access_type]:
            if earlier in shadow.clocks:
                unordered = shadow.clocks[earlier][cells] > clock
                if unordered.any():
                    self._report(shadow, access_type, earlier, program, cells, unordered, site)
        shadow.record(access_type, cells, program, clock[program] if time is None else time, site)

    def _report(self, shadow, access_type, earlier, program, cells, unordered, site):
        for other in np.flatnonzero(unordered.any(axis=0)):
            cell = cells[np.argmax(unordered[:, other])]
            other_site = shadow.sites[earlier][cell, other]
            offset = int(cell) * shadow.cell
            place = shadow.describe(offset)
            key = (access_type, earlier, place.rpartition("+")[0], site, int(other_site))
            if key not in self.reported:
                self.reported.add(key)
                self.races.append(
                    f"{_NAMES[access_type]} of program {program} at {describe_sites(self.site_list[site])} races with "
                    f"{_NAMES[earlier]} of program {other} at {describe_sites(self.site_list[other_site])}: {place}"
                )

    def _site(self, frame):
        sites = kernel_sites(frame)
        number = self.site_numbers.setdefault(sites, len(self.site_list))
        if number == len(self.site_list):
            self.site_list.append(sites)
        return number

    def atomic(self, program, pointers, mask, semantics, stored, width):
        """Record an atomic's access and its ordering. `stored` is False for a compare-and-swap that failed."""
        lanes = pointers.reshape(-1) if mask is None else pointers.reshape(-1)[mask.reshape(-1)]
        addresses = set(lanes.tolist())
        clock = self.clock[program]
        if semantics in _ACQUIRES:
            for address in addresses & self.published.keys():
                np.maximum(clock, self.published[address], out=clock)
        written_back = self.written_back.pop(program, None) if stored else None
        released = clock if semantics in _RELEASES else written_back
        # A program that acquires what this atomic releases is also ordered after the atomic itself.
        time = None if released is None else released[program]
        self.access(ATOMIC if stored else VOLATILE_LOAD, program, pointers, mask, width, time)
        if released is not None and stored:
            for address in addresses:
                earlier = self.published.get(address)
                self.published[address] = released.copy() if earlier is None else np.maximum(released, earlier)
        if semantics in _RELEASES and stored:
            clock[program] += 1

    def write_back(self, program):
        """Order a program's stores so far before its next atomic."""
        self.written_back[program] = self.clock[program].copy()
        self.clock[program][program] += 1
