"""Reading files that may be anything: a pipe, a device, larger than memory."""

import os
import stat
from pathlib import Path

from host.errors import InputError


def open_regular(path: str | Path) -> int:
    """A file descriptor for reading. InputError unless it is a regular file; a pipe does not make it wait."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    kind = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(kind):
        os.close(descriptor)
        raise InputError(f"{path}: is {'a directory' if stat.S_ISDIR(kind) else 'not a regular file'}")
    return descriptor


def read_small(path: str | Path, most: int) -> bytes:
    """All of a regular file of at most `most` bytes. InputError if it is none, cannot be read, or is larger."""
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise InputError(f"{path}: has {size} bytes, at most {most} are expected")
        try:
            return file.read(size)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
