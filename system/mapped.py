"""Handle mapped files: report one that shrinks in one line, and release pages that are no longer needed."""

import ctypes
import mmap
import os
import signal
import threading

import torch

from system.errors import EXIT_INPUT_ERROR

_report_lock = threading.Lock()
_names: dict[str, None] = {}  # of the files in use, in order


def name_on_bus_error(path: str) -> None:
    """Make a read from a page that a mapped file has lost print one line naming it, and exit with code 2.

    The kernel signals this by SIGBUS. A handler in Python would return to the same access forever.
    """
    if hasattr(signal, "SIGBUS"):
        _names[path] = None
        ctypes.CDLL(None).signal(int(signal.SIGBUS), _handler)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _handler(_signal: int) -> None:
    _report_lock.acquire()  # never released: several threads may fail together, and one line is enough
    files = ", ".join(_names)
    os.write(2, os.fsencode(f"error: {files}: could not be read on: was it cut short while in use?\n"))
    os._exit(EXIT_INPUT_ERROR)


def release_pages(tensor: torch.Tensor, path: str) -> None:
    """Remove a tensor's pages from this process's memory if the tensor is a view of the mapped file at `path`.

    They stay in the page cache and return when they are read.
    """
    if _mapped_file(tensor.data_ptr()) != path:
        return  # pages that no file backs would lose their content
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    if end > start:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _mapped_file(address: int) -> str | None:
    """Return the file whose mapping contains an address, or None if there is none or the system does not tell."""
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
