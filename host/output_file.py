"""Large files that are there whole or not at all."""

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from host.errors import InputError


@contextlib.contextmanager
def replacing(path: Path, n_bytes: int, force: bool) -> Iterator[int]:
    """A file descriptor to write n_bytes to, which become `path` at the end, synced; nothing is left otherwise.

    They go to a file beside `path`. What an earlier run that was killed has left there is taken over, what another
    process is writing is not. InputError if `path` is there and not to be replaced, no file, or there is no space.
    """
    _check_target(path, force)
    with _errors(path):
        part = path.parent / f"{path.name}.part"
        descriptor = _lock(part)
        try:
            free = shutil.disk_usage(path.parent).free
            if n_bytes > free:
                raise InputError(f"{path}: {n_bytes / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free")
            yield descriptor
            os.fsync(descriptor)
            _check_target(path, force)
            part.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                part.unlink()
            raise
        finally:
            os.close(descriptor)
        _sync_folder(path.parent)


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    """All of `data`, at an offset of the file."""
    while data:
        n = os.pwrite(descriptor, data, offset)
        data, offset = data[n:], offset + n


def _check_target(path: Path, force: bool) -> None:
    try:
        kind = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(kind):
        raise InputError(f"{path}: is there already, and not a regular file")
    if not force:
        raise InputError(f"{path}: is there already; --force replaces it")


def _lock(part: Path) -> int:
    descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{part}: is in the way, and not a regular file")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(part)):
            raise BlockingIOError  # its writer has just put it in its place
        os.ftruncate(descriptor, 0)
    except (BlockingIOError, FileNotFoundError):
        os.close(descriptor)
        raise InputError(f"{part}: another process is writing it") from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _sync_folder(folder: Path) -> None:
    """As far as it lets itself be opened and its file system can; the file is in its place anyway."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
