"""Read files that cannot be trusted: they may be pipes or devices, exceed memory, or change while they are in use."""

import contextlib
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from system.errors import InputError

# A parsed JSON value takes some 100 bytes in Python, even one as short as `[],` in the file.
MAX_JSON_VALUES = 1_000_000  # a shard with all tensors of the largest supported model has 400,000
LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"


def path_of(value: str | os.PathLike, argument: str) -> Path:
    """Return an argument as a Path. Raise TypeError, naming the argument, if it is no path; InputError if empty."""
    if not isinstance(value, str) and not isinstance(value, os.PathLike):
        raise TypeError(f"{argument} is {value!r}: a str or a Path is expected")
    if not value or not isinstance(os.fspath(value), str):
        raise InputError(f"{argument} is {os.fspath(value)!r}, which names no file or folder")
    return Path(value)


@contextlib.contextmanager
def file_errors(name: str | Path | int) -> Iterator[None]:
    """Turn an OSError of the body, or Python's ValueError for a NUL in a path, into an InputError that names a file."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def is_there(path: str | Path) -> bool:
    """Return whether a path, with its links followed, names something. Raise InputError if it cannot be looked up."""
    with file_errors(path):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def open_regular(path: str | Path) -> int:
    """Return a file descriptor for reading. Raise InputError unless it is a regular file; never wait for a pipe."""
    with file_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise InputError(f"{path}: is {'a directory' if stat.S_ISDIR(mode) else 'not a regular file'}")
    return descriptor


def read_small(path: str | Path, max_bytes: int) -> bytes:
    """Return the content of a regular file of at most max_bytes.

    Raise InputError if it is not a regular file, is larger, is a Git LFS pointer, or cannot be read.
    """
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise InputError(f"{path}: has {size} bytes, at most {max_bytes} are expected")
        with file_errors(path):
            data = file.read(size)
    refuse_lfs_pointer(data, path)
    return data


def refuse_lfs_pointer(start: bytes, path: str | Path) -> None:
    """Raise InputError if a file's first bytes are those of a Git LFS pointer, which `git clone` leaves without LFS."""
    if start.startswith(LFS_POINTER_START):
        raise InputError(f"{path}: is a Git LFS pointer, not the file itself: `git lfs pull` fetches it")


def parse_json(data: bytes, source: str, max_values: int = MAX_JSON_VALUES) -> object:
    """Parse UTF-8 JSON. Raise InputError, naming the source, if it is invalid or holds more than max_values values."""
    try:
        return json_value(data, max_values)
    except ValueError as error:
        raise InputError(f"{source}: not valid JSON ({error})") from None


def json_value(data: bytes, max_values: int = MAX_JSON_VALUES, unique_keys: bool = False) -> object:
    """Parse UTF-8 JSON. Raise a ValueError of one line if it is invalid or holds more than max_values values.

    Values are counted before any is created, by the character in front of each. With unique_keys, raise ValueError if
    an object repeats a key; otherwise Python takes the last value.
    """
    n_values = 1 + sum(map(data.count, (b"[", b"{", b",", b":")))
    if n_values > max_values:
        raise ValueError(f"some {n_values} values, at most {max_values} are expected")
    try:
        return json.loads(data.decode(), object_pairs_hook=_unique_keys if unique_keys else None)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique_keys(pairs: list[tuple[str, object]]) -> dict:
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"{next(key for key, n in counts.items() if n > 1)!r} is there twice")
    return result


class FileState(NamedTuple):
    """The properties of a file that change when it is written to or replaced."""

    device: int
    inode: int
    n_bytes: int
    modified_ns: int
    links: int
    changed_ns: int  # ctime: set by any change, also by a copy that preserves the old modification time


def file_state(file: int | str | Path) -> FileState:
    """Return the state of an open descriptor or of the file at a path. Raise InputError if there is no file."""
    with file_errors(file):
        s = os.stat(file)
    return FileState(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_nlink, s.st_ctime_ns)


def check_same(before: FileState, now: FileState, path: str | Path) -> None:
    """Raise InputError if a file was written to or replaced. Hard links to it may be added and removed."""
    if now.inode == before.inode and now.n_bytes < before.n_bytes:
        raise InputError(f"{path}: could not be read on: was it cut short while in use?")
    only_links = now.links != before.links
    if now[:4] != before[:4] or (now.changed_ns != before.changed_ns and not only_links):
        raise InputError(f"{path}: was changed while it was in use: what was read of it cannot be trusted")
