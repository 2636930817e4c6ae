"""host.output_file: a file is there whole or not at all, and one process writes it at a time."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from host import output_file
from host.errors import InputError
from host.output_file import replacing, write_all


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "file"


@pytest.fixture
def part(target) -> Path:
    return Path(f"{target}.part")


def write(target: Path, data: bytes = b"new", n_bytes: int = 3, force: bool = False) -> None:
    with replacing(target, n_bytes, force) as descriptor:
        write_all(descriptor, memoryview(data), 0)


def files(target: Path) -> list[str]:
    return sorted(os.listdir(target.parent))


def test_the_file_has_its_name_only_when_it_is_whole(target, part):
    with replacing(target, 3, force=False) as descriptor:
        write_all(descriptor, memoryview(b"new"), 0)
        assert files(target) == [part.name]
    assert files(target) == [target.name]
    assert target.read_bytes() == b"new"


def test_a_path_without_a_folder(monkeypatch, target):
    monkeypatch.chdir(target.parent)
    write(Path("file"))
    assert files(target) == ["file"]


def test_the_users_mask_decides_who_may_read_it(target):
    previous = os.umask(0o027)
    try:
        write(target)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_the_old_file_stays_until_the_new_one_is_whole(target):
    target.write_bytes(b"old")
    with replacing(target, 3, force=True) as descriptor:
        write_all(descriptor, memoryview(b"new"), 0)
        assert target.read_bytes() == b"old"
    assert (files(target), target.read_bytes()) == ([target.name], b"new")


def test_who_reads_the_old_file_goes_on_reading_it(target):
    target.write_bytes(b"old")
    with open(target, "rb") as reader:
        write(target, force=True)
        assert reader.read() == b"old"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("old", [None, b"old"])
def test_whatever_goes_wrong_leaves_what_was_there(target, error, old):
    if old:
        target.write_bytes(old)
    with pytest.raises(error), replacing(target, 3, force=True) as descriptor:
        write_all(descriptor, memoryview(b"ne"), 0)
        raise error
    assert files(target) == ([target.name] if old else [])
    assert old is None or target.read_bytes() == old
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_errors_of_the_system_name_the_file(target, number):
    with pytest.raises(InputError) as caught, replacing(target, 3, force=False):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"{target}: {os.strerror(number)}"
    assert files(target) == []


def test_an_existing_file_is_replaced_only_by_force(target):
    target.write_bytes(b"old")
    with pytest.raises(InputError, match="file: is there already; --force"):
        write(target)
    assert (files(target), target.read_bytes()) == ([target.name], b"old")
    write(target, force=True)
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("elsewhere")])
def test_nothing_but_a_file_is_replaced(target, make, force):
    make(target)
    with pytest.raises(InputError, match="file: is there already, and not a regular file"):
        write(target, force=force)
    assert files(target) == [target.name]


def test_a_file_that_appears_meanwhile_is_kept(target):
    with pytest.raises(InputError, match="is there already"), replacing(target, 3, force=False):
        target.write_bytes(b"mine")
    assert (files(target), target.read_bytes()) == ([target.name], b"mine")


def test_a_folder_that_appears_meanwhile_is_kept_by_force_too(target):
    with pytest.raises(InputError, match="not a regular file"), replacing(target, 3, force=True):
        target.mkdir()
    assert files(target) == [target.name]


def test_space_is_looked_for_where_the_file_goes(target, monkeypatch):
    asked = []
    usage = shutil.disk_usage(target.parent)._replace(free=2_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or usage)
    with pytest.raises(InputError) as caught:
        write(target, n_bytes=2_100_000_000)
    assert str(caught.value) == f"{target}: 2.100 GB needed, 2.000 GB free"
    assert (files(target), asked) == ([], [target.parent])
    write(target, n_bytes=2_000_000_000)


def test_space_of_an_earlier_part_counts_as_free(target, part, monkeypatch):
    part.write_bytes(bytes(1000))
    usage = shutil.disk_usage(target.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000 - part.stat().st_size))
    write(target, n_bytes=1000)


def test_what_a_killed_process_left_is_taken_over(target, part):
    part.write_bytes(b"longer than the new file")
    write(target)
    assert (files(target), target.read_bytes()) == ([target.name], b"new")


def test_two_writers_of_one_file(target, part):
    with replacing(target, 3, force=False) as descriptor:
        write_all(descriptor, memoryview(b"new"), 0)
        for force in (False, True):
            with pytest.raises(InputError) as caught:
                write(target, b"other", force=force)
            assert str(caught.value) == f"{part}: another process is writing it"
        assert part.read_bytes() == b"new"
    assert (files(target), target.read_bytes()) == ([target.name], b"new")


def test_two_writers_in_one_folder(target):
    other = target.parent / "other"
    with replacing(target, 3, force=False) as a, replacing(other, 3, force=False) as b:
        write_all(a, memoryview(b"new"), 0)
        write_all(b, memoryview(b"not"), 0)
    assert (target.read_bytes(), other.read_bytes()) == (b"new", b"not")


def test_the_lock_of_a_process_that_was_killed_is_gone(target, part):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from host.output_file import replacing\n"
        "with replacing(Path(sys.argv[2]), 3, False) as descriptor:\n"
        "    os.write(descriptor, b'half'); os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", code, root, target], timeout=60).returncode == -9
    assert part.read_bytes() == b"half"
    write(target)
    assert (files(target), target.read_bytes()) == ([target.name], b"new")


@pytest.mark.parametrize("meanwhile", ["finished", "failed", "finished, another began"])
def test_a_writer_that_ends_between_opening_and_locking(target, part, monkeypatch, meanwhile):
    """The descriptor is then that of a file which is no longer the part: of the target, for example."""
    flock, first = output_file.fcntl.flock, replacing(target, 3, force=False)
    write_all(first.__enter__(), memoryview(b"new"), 0)

    def end_and_lock(descriptor: int, operation: int) -> None:
        if meanwhile == "failed":
            first.__exit__(ValueError, ValueError("failed"), None)
        else:
            first.__exit__(None, None, None)
        if meanwhile.endswith("began"):
            part.write_bytes(b"another's")
        flock(descriptor, operation)

    with monkeypatch.context() as patch:
        patch.setattr(output_file.fcntl, "flock", end_and_lock)
        with pytest.raises(InputError, match="another process is writing it"):
            output_file._lock(part)
    assert target.exists() == (meanwhile != "failed")
    if target.exists():
        assert target.read_bytes() == b"new"
    if meanwhile.endswith("began"):
        assert part.read_bytes() == b"another's"


@pytest.mark.parametrize(
    ("make", "reason"), [(Path.mkdir, "Is a directory"), (os.mkfifo, "is in the way, and not a regular file")]
)
def test_a_part_that_is_no_file(target, part, make, reason):
    make(part)
    with pytest.raises(InputError, match=f"file.*: {reason}"):
        write(target)
    assert files(target) == [part.name]


def test_a_part_that_is_a_link_to_another_file(target, part, tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    part.symlink_to("other")
    with pytest.raises(InputError, match="file"):
        write(target)
    assert (tmp_path / "other").read_bytes() == b"other"


def test_no_descriptor_is_left_open(target, part):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    write(target)
    for path in (target, target.parent, target / "x", Path("nowhere/x")):
        with pytest.raises(InputError):
            write(path)
    os.mkfifo(part)
    with pytest.raises(InputError):
        write(target, force=True)
    assert count() == before


def test_a_folder_that_cannot_be_synced_is_no_error(target, monkeypatch):
    """Not every file system can, and the file is in its place."""
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    write(target)
    assert target.read_bytes() == b"new"


def test_an_interrupt_after_the_file_is_in_its_place_touches_no_other_part(target, part, monkeypatch):
    """The next process may already be writing there."""

    def interrupt(folder: Path) -> None:
        part.write_bytes(b"another's")
        raise KeyboardInterrupt

    monkeypatch.setattr(output_file, "_sync_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(target)
    assert (target.read_bytes(), part.read_bytes()) == (b"new", b"another's")


def test_write_all_goes_on_after_a_short_write(tmp_path, monkeypatch):
    pwrite, sizes = os.pwrite, []

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(descriptor, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", short)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    write_all(descriptor, memoryview(b"0123456789"), 5)
    write_all(descriptor, memoryview(b""), 100)
    os.close(descriptor)
    assert sizes == [10, 7, 4, 1]
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"0123456789"
