"""Happens-before race detection: vector clocks on the atomics, shadow memory on loads and stores.

Programs are the threads of the model. An atomic with release semantics publishes its program's clock at its address;
one with acquire semantics takes over what is published there. The first atomic after a write-back (gfx950) publishes
its program's clock of that moment, whatever its semantics. All atomics are read-modify-writes, so each continues the
release sequence of the earlier ones, whatever its own semantics; a plain store to the address ends it. Scopes are
ignored.
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
    """Per cell of one storage: when and where each program last accessed it, for each kind of access.

    A cell is as wide as the narrowest access so far. Zeros come lazily from the system: untouched memory costs nothing.
    """

    def __init__(self, base, size, owners, programs):
        self.base, self.size, self.owners, self.programs = base, size, owners, programs
        self.cell = 4
        self.clocks = {}
        self.sites = {}

    def cells(self, offsets, width):
        """Cell numbers of the accesses of `width` bytes at byte `offsets`; makes the cells narrower if need be."""
        while self.cell > 1 and (width % self.cell or (offsets % self.cell).any()):
            self.cell //= 2
            for table in (self.clocks, self.sites):
                for kind in table:
                    table[kind] = np.repeat(table[kind], 2, axis=0)
        first = offsets // self.cell
        count = width // self.cell
        return first if count == 1 else (first[:, None] + np.arange(count)).reshape(-1)

    def record(self, kind, cells, program, clock, site):
        if kind not in self.clocks:
            shape = (-(-self.size // self.cell), self.programs)
            self.clocks[kind] = np.zeros(shape, np.int32)
            self.sites[kind] = np.zeros(shape, np.int32)
        self.clocks[kind][cells, program] = clock
        self.sites[kind][cells, program] = site

    def describe(self, offset):
        """The tensor argument that holds a byte of the storage, with the byte's offset in it."""
        address = self.base + offset
        for name, start, end in self.owners:
            if start <= address < end:
                return f"{name}+{address - start}"
        name, start, _ = self.owners[0]
        return f"{name}{address - start:+d}"


def named_tensors(name, value):
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
    """Follows one launch of `programs` programs on named arguments; appends a line a race to `races`."""

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

    def access(self, kind, program, pointers, mask, width, time=None):
        """An access of `width` bytes at each pointer that the mask (None: all) leaves; `time`: if not now."""
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
        if kind == STORE and self.published:
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
                self._access_storage(shadow, kind, program, shadow.cells(offsets, width), site, time)

    def _access_storage(self, shadow, kind, program, cells, site, time):
        clock = self.clock[program]
        for earlier in _CONFLICTS[kind]:
            if earlier in shadow.clocks:
                unordered = shadow.clocks[earlier][cells] > clock
                if unordered.any():
                    self._report(shadow, kind, earlier, program, cells, unordered, site)
        shadow.record(kind, cells, program, clock[program] if time is None else time, site)

    def _report(self, shadow, kind, earlier, program, cells, unordered, site):
        for other in np.flatnonzero(unordered.any(axis=0)):
            cell = cells[np.argmax(unordered[:, other])]
            other_site = shadow.sites[earlier][cell, other]
            offset = int(cell) * shadow.cell
            place = shadow.describe(offset)
            key = (kind, earlier, place.rpartition("+")[0], site, int(other_site))
            if key not in self.reported:
                self.reported.add(key)
                self.races.append(
                    f"{_NAMES[kind]} of program {program} at {describe_sites(self.site_list[site])} races with "
                    f"{_NAMES[earlier]} of program {other} at {describe_sites(self.site_list[other_site])}: {place}"
                )

    def _site(self, frame):
        sites = kernel_sites(frame)
        number = self.site_numbers.setdefault(sites, len(self.site_list))
        if number == len(self.site_list):
            self.site_list.append(sites)
        return number

    def atomic(self, program, pointers, mask, semantics, stored, width):
        """An atomic: the ordering that it gives, and its access. `stored` is False for a failed compare-and-swap."""
        lanes = pointers.reshape(-1) if mask is None else pointers.reshape(-1)[mask.reshape(-1)]
        addresses = set(lanes.tolist())
        clock = self.clock[program]
        if semantics in _ACQUIRES:
            for address in addresses & self.published.keys():
                np.maximum(clock, self.published[address], out=clock)
        written_back = self.written_back.pop(program, None) if stored else None
        released = clock if semantics in _RELEASES else written_back
        # Who acquires it comes after this atomic too, as it has one address.
        time = None if released is None else released[program]
        self.access(ATOMIC if stored else VOLATILE_LOAD, program, pointers, mask, width, time)
        if released is not None and stored:
            for address in addresses:
                earlier = self.published.get(address)
                self.published[address] = released.copy() if earlier is None else np.maximum(released, earlier)
        if semantics in _RELEASES and stored:
            clock[program] += 1

    def write_back(self, program):
        """All that a program has stored so far comes before its next atomic."""
        self.written_back[program] = self.clock[program].copy()
        self.clock[program][program] += 1
