"""What mapped files need beyond being mapped: one line when they shrink, and their pages back."""

import ctypes
import mmap
import os
import signal
import threading

import torch

from system.errors import EXIT_INPUT_ERROR

_first = threading.Lock()
_names: dict[str, None] = {}  # of the files in use, in order


def name_on_bus_error(path: str) -> None:
    """From now on reading a page that a mapped file no longer has prints one line naming it, and exits with code 2.

    The kernel tells of this by SIGBUS, on which Python's own handlers would return to the same access for ever.
    """
    if hasattr(signal, "SIGBUS"):
        _names[path] = None
        ctypes.CDLL(None).signal(int(signal.SIGBUS), _handler)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _handler(_signal: int) -> None:
    _first.acquire()  # for ever: threads that read together come here together, and one line is enough
    files = ", ".join(_names)
    os.write(2, os.fsencode(f"error: {files}: could not be read on: was it cut short while in use?\n"))
    os._exit(EXIT_INPUT_ERROR)


def release_pages(tensor: torch.Tensor, path: str) -> None:
    """Take the pages of a tensor, if it is a view of that mapped file, out of this process's memory.

    They stay in the page cache, from where they come back when they are read.
    """
    if _mapped_file(tensor.data_ptr()) != path:
        return  # elsewhere the kernel would forget what is in them
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _mapped_file(address: int) -> str | None:
    """The file of the mapping that an address lies in, where the system tells."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
            for line in maps:
                span, *_, name = line.rstrip("\n").split(None, 5)
                first, end = (int(part, 16) for part in span.split("-"))
                if first <= address < end:
                    return name if name.startswith("/") else None
    except OSError:
        pass
    return None
