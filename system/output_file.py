"""Output files that are there whole or not at all, and never take the place of an input.

Every file that a script writes goes this way: a new file beside the target, opened exclusively under a name that
nothing else has, then synced and renamed. Links are not followed, pipes and devices not opened, an old file stays
until the new one is whole. See replacing for what a killed process leaves behind.
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

ENDING = ".{}.part"  # of a file that is not whole, with 16 random hexadecimal digits
MOST_NAME_BYTES = 255 - len(ENDING.format("0" * 16))
STANDARD_STREAMS = {0: "stdin", 1: "stdout", 2: "stderr"}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without them say


def output_path(text: str) -> Path:
    """An argparse type: the name of a file, where Path would make "." of "" and a file of "folder/"."""
    if not text or text.endswith(("/", "/.")):
        raise argparse.ArgumentTypeError(f"{text!r} names no file")
    return Path(text)


@dataclass(frozen=True)
class OutputFile:
    """A file that is being written."""

    name: str  # that errors give it
    descriptor: int

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """All of `data`, at an offset of the file. InputError if the system does not take it."""
        data = memoryview(data)
        with _errors(self.name):
            while data:
                n = os.pwrite(self.descriptor, data, offset)
                data, offset = data[n:], offset + n


@contextlib.contextmanager
def replacing(
    path: Path, n_bytes: int, force: bool, *, inputs: Sequence[Path] = (), flag: str = "", alone: bool = True
) -> Iterator[OutputFile]:
    """A file to write n_bytes to, which becomes `path` at the end, synced; nothing is left otherwise.

    A killed process leaves its file beside `path` as NAME.0123456789abcdef.part (of a long NAME its checksum). The next
    run that writes `path` removes it, but for one whose writer lives, as a lock on it tells. With `alone` such a
    writer is an error; else both write, and the one that ends last has its whole file there.

    InputError, in which `flag` goes before the path, if check_output finds something or there is no space.
    """
    name = f"{flag} {path}".lstrip()
    _check_target(path, force, inputs, name)
    with _errors(name):
        if _remove_leftovers(path) and alone:
            raise InputError(f"{name}: another process is writing it")
        free = shutil.disk_usage(path.parent).free
    if n_bytes > free:
        raise InputError(f"{name}: {n_bytes / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free")
    with _new_file(path, name) as (part, descriptor):
        yield OutputFile(name, descriptor)
        with _errors(name):
            os.fsync(descriptor)
        old = _check_target(path, force, inputs, name)
        with _errors(name):
            if old:
                os.fchmod(descriptor, stat.S_IMODE(old.st_mode))
            part.replace(path)
    _sync_folder(path.parent)


def check_output(path: Path, force: bool, inputs: Sequence[Path] = (), flag: str = "") -> None:
    """InputError if `path` could not be written: known before the work, not after.

    What is there must be a regular file that may be replaced (`force`), none of `inputs` under whatever name, and none
    that this process has as stdin, stdout or stderr; the folder must take a new file.
    """
    name = f"{flag} {path}".lstrip()
    _check_target(path, force, inputs, name)
    with _new_file(path, name):
        pass


def _check_target(path: Path, force: bool, inputs: Sequence[Path], name: str) -> os.stat_result | None:
    """What is there and may be replaced, if anything is."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InputError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise InputError(f"{name}: is there already, and not a regular file")
    for file in (*inputs, *STANDARD_STREAMS):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(file), found):
                raise InputError(f"{name}: is the same file as {STANDARD_STREAMS.get(file, f'{file}, an input')}")
    if not force:
        raise InputError(f"{name}: is there already; --force replaces it")
    if not os.access(path, os.W_OK):
        raise InputError(f"{name}: is there already, and may not be written to")
    return found


@contextlib.contextmanager
def _new_file(path: Path, name: str) -> Iterator[tuple[Path, int]]:
    """A new file beside `path` and its descriptor, locked; it is removed at the end, unless it was renamed."""
    part = descriptor = None
    try:
        with _errors(name):
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
    """A descriptor of a new file. None if another process, before it was locked, took it for a leftover."""
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
    """What the names of a target's files that are not whole begin with."""
    name = os.fsencode(path.name)
    return path.name if len(name) <= MOST_NAME_BYTES else hashlib.sha256(name).hexdigest()


def _remove_leftovers(path: Path) -> bool:
    """Whether another process is writing `path`; what was left by those that are gone is removed."""
    pattern = re.compile(re.escape(_stem(path)) + re.escape(ENDING).replace(r"\{\}", "[0-9a-f]{16}"))
    in_use = False
    with contextlib.suppress(PermissionError), os.scandir(path.parent) as entries:
        parts = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
        for part in parts:
            in_use |= not _remove_if_left(part)
    return in_use


def _remove_if_left(part: Path) -> bool:
    """False if a process is writing it. What is no file, or another user's, is left where it is."""
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return True
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), os.lstat(part)):  # and not just renamed
                part.unlink()
        return True
    except BlockingIOError:
        return False
    except OSError:  # there are no locks here, so that none is known to be left
        return True
    finally:
        os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    """As far as it lets itself be opened and its file system can; the file is in its place anyway."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: {getattr(error, 'strerror', None) or error}") from None
