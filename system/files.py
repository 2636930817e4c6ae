"""Reading files that may be anything: a pipe, a device, larger than memory, changed while they are in use."""

import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from system.errors import InputError

# What Python makes of JSON takes some 100 bytes a value, however short it is written: `[],` has three.
MAX_JSON_VALUES = 1_000_000  # a shard that holds all tensors of the largest model that is taken has 400,000
LFS_POINTER_START = b"version https://git-lfs.github.com/spec/"


def path_of(value: str | os.PathLike, argument: str) -> Path:
    """The path that an argument gives. TypeError, naming the argument, if it is none; InputError if it is empty."""
    if not isinstance(value, str) and not isinstance(value, os.PathLike):
        raise TypeError(f"{argument} is {value!r}: a str or a Path is expected")
    if not value or not isinstance(os.fspath(value), str):
        raise InputError(f"{argument} is {os.fspath(value)!r}, which names no file or folder")
    return Path(value)


def is_there(path: str | Path) -> bool:
    """Whether something stands at a path, at the end of its links. InputError if that cannot be told."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return True


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
    """All of a regular file of at most `most` bytes. InputError if it is none, cannot be read, or is larger.

    InputError, too, if it is a Git LFS pointer.
    """
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > most:
            raise InputError(f"{path}: has {size} bytes, at most {most} are expected")
        try:
            data = file.read(size)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
    refuse_lfs_pointer(data, path)
    return data


def refuse_lfs_pointer(start: bytes, path: str | Path) -> None:
    """InputError if a file that begins like this is what `git clone` leaves where Git LFS is not installed."""
    if start.startswith(LFS_POINTER_START):
        raise InputError(f"{path}: is a Git LFS pointer, not the file itself: `git lfs pull` fetches it")


def parse_json(data: bytes, source: str, most_values: int = MAX_JSON_VALUES) -> object:
    """What UTF-8 JSON holds. InputError, naming the source, if it is none or holds too many values."""
    try:
        return json_value(data, most_values)
    except ValueError as error:
        raise InputError(f"{source}: not valid JSON ({error})") from None


def json_value(data: bytes, most_values: int = MAX_JSON_VALUES, unique_keys: bool = False) -> object:
    """What UTF-8 JSON holds. ValueError, whose text is one line, if it is none or holds too many values.

    Values are counted before any is made, by what stands in front of each. unique_keys: ValueError if an object has a
    key twice, of which Python takes the last.
    """
    n_values = 1 + sum(map(data.count, (b"[", b"{", b",", b":")))
    if n_values > most_values:
        raise ValueError(f"some {n_values} values, at most {most_values} are expected")
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
    """What changes when a file is written to or another takes its place."""

    device: int
    inode: int
    n_bytes: int
    modified_ns: int
    links: int
    changed_ns: int  # set by whatever happens to the file; a copy that brings its old time of modification along too


def file_state(file: int | str | Path) -> FileState:
    """The state of an open file, or of what stands at a path. InputError if there is nothing."""
    try:
        found = os.stat(file)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_nlink, found.st_ctime_ns)


def check_same(before: FileState, now: FileState, path: str | Path) -> None:
    """InputError if a file was written to, or another has taken its place. Its links may come and go."""
    if now.inode == before.inode and now.n_bytes < before.n_bytes:
        raise InputError(f"{path}: could not be read on: was it cut short while in use?")
    only_links = now.links != before.links
    if now[:4] != before[:4] or (now.changed_ns != before.changed_ns and not only_links):
        raise InputError(f"{path}: was changed while it was in use: what was read of it cannot be trusted")
