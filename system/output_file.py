"""Write output files atomically, and never over an input.

Every file that a script writes is created beside its target, opened exclusively under a unique name, then synced and
renamed. Links are not followed, pipes and devices are not opened, and an old file stays until the new one is complete.
`replacing` says what a killed process leaves behind.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from system.errors import InputError
from system.files import file_errors

ENDING = ".{}.part"  # of an incomplete file's name, with 16 random hexadecimal digits
MAX_STEM_BYTES = 255 - len(ENDING.format("0" * 16))
STANDARD_STREAMS = {0: "stdin", 1: "stdout", 2: "stderr"}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # errors of file systems without locks


def output_path(text: str) -> Path:
    """Parse an argparse argument as a file's path, refusing "" and "folder/", which Path would accept."""
    if not text or text.endswith(("/", "/.")):
        raise argparse.ArgumentTypeError(f"{text!r} names no file")
    return Path(text)


@dataclass(frozen=True)
class OutputFile:
    """A file that is being written."""

    name: str  # in errors
    descriptor: int

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Write all of `data` at an offset in bytes. Raise InputError if the system reports an error."""
        data = memoryview(data)
        with file_errors(self.name):
            while data:
                n = os.pwrite(self.descriptor, data, offset)
                data, offset = data[n:], offset + n


@contextlib.contextmanager
def replacing(
    path: Path, n_bytes: int, force: bool, *, inputs: Sequence[Path] = (), flag: str = "", exclusive: bool = True
) -> Iterator[OutputFile]:
    """Give a new file to write n_bytes to. It is synced and replaces `path` at the end, or is removed on an error.

    A killed process leaves its file beside `path` as NAME.0123456789abcdef.part, with a checksum for a long NAME. The
    next run that writes `path` removes it unless a lock shows that its writer is alive. With `exclusive` a live writer
    is an error. Otherwise both write, and `path` becomes the complete file of the one that ends last.

    Raise InputError, naming `flag` before the path, for what check_output refuses or if there is too little space.
    """
    name = f"{flag} {path}".lstrip()
    _check_target(path, force, inputs, name)
    with file_errors(name):
        if _remove_leftovers(path) and exclusive:
            raise InputError(f"{name}: another process is writing it")
        free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise InputError(f"{name}: {n_bytes / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free")
    with _new_file(path, name) as (part, descriptor):
        yield OutputFile(name, descriptor)
        with file_errors(name):
            os.fsync(descriptor)
        old = _check_target(path, force, inputs, name)
        with file_errors(name):
            if old:
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
            part.replace(path)
    _sync_folder(path.parent)


def check_output(path: Path, force: bool, inputs: Sequence[Path] = (), flag: str = "") -> None:
    """Raise InputError if `path` cannot be written, so that a script can tell before its work.

    An existing file must be a regular one, may be replaced only with `force`, and must not be one of `inputs` (under
    any name) or this process's stdin, stdout or stderr. It must be possible to create a file in the folder.
    """
    name = f"{flag} {path}".lstrip()
    _check_target(path, force, inputs, name)
    with _new_file(path, name):
        pass


def _check_target(path: Path, force: bool, inputs: Sequence[Path], name: str) -> os.stat_result | None:
    """Return the state of an existing file that may be replaced, or None if there is no file."""
    with file_errors(name):
        try:
            existing = os.lstat(path)
        except FileNotFoundError:
            return None
    if not stat.S_ISREG(existing.st_mode):
        raise InputError(f"{name}: is there already, and not a regular file")
    for file in (*inputs, *STANDARD_STREAMS):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(file), existing):
                raise InputError(f"{name}: is the same file as {STANDARD_STREAMS.get(file, f'{file}, an input')}")
    if not force:
        raise InputError(f"{name}: is there already; --force replaces it")
    if not os.access(path, os.W_OK):
        raise InputError(f"{name}: is there already, and may not be written to")
    return existing


@contextlib.contextmanager
def _new_file(path: Path, name: str) -> Iterator[tuple[Path, int]]:
    """Give a new, locked file beside `path` and its descriptor. Remove the file at the end unless it was renamed."""
    part = descriptor = None
    try:
        with file_errors(name):
            while descriptor is None:
                part = path.parent / f"{_stem(path)}{ENDING.format(secrets.token_hex(8))}"
                descriptor = _open_locked(part)
        yield part, descriptor
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
        if descriptor is not None:
            os.close(descriptor)


def _open_locked(part: Path) -> int | None:
    """Return the descriptor of a new, locked file, or None if another process removed it as a leftover before the lock.

    On a file system without locks the file stays unlocked.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(part, flags, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        locked = error.errno in NO_LOCKS
    else:
        locked = True
    if locked and os.path.exists(part):
        return descriptor
    os.close(descriptor)
    return None


def _stem(path: Path) -> str:
    """Return what the names of a target's incomplete files begin with."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= MAX_STEM_BYTES else hashlib.sha256(name).hexdigest()


def _remove_leftovers(path: Path) -> bool:
    """Remove the incomplete files of processes that ended. Return whether another process is writing `path`."""
    pattern = re.compile(re.escape(_stem(path)) + re.escape(ENDING).replace(r"\{\}", "[0-9a-f]{16}"))
    in_use = False
    with contextlib.suppress(PermissionError), os.scandir(path.parent) as entries:
        parts = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
        for part in parts:
            in_use |= not _remove_leftover(part)
    return in_use


def _remove_leftover(part: Path) -> bool:
    """Remove a file unless a process is writing it, in which case return False.

    Leave what is not a regular file or cannot be opened, such as another user's.
    """
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.lstat(part)):  # its writer may just have renamed it
                part.unlink()
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks, where no file is known to be a leftover
        return True
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """Sync a folder's entries if the system allows it; otherwise the renamed file is in place all the same."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
