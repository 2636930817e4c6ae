"""system.output_file: a file is there whole or not at all, and one process writes it at a time."""

import argparse
import errno
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from system import output_file
from system.errors import InputError
from system.output_file import OutputFile, check_output, output_path, replacing


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "file"


@pytest.fixture
def part(target) -> Path:
    """A temporary file that another run may have left."""
    return Path(f"{target}.0123456789abcdef.part")


def write(target: Path, data: bytes = b"new", n_bytes: int = 3, force: bool = False, **options) -> None:
    with replacing(target, n_bytes, force, **options) as file:
        file.write(data, 0)


def files(target: Path) -> list[str]:
    return sorted(os.listdir(target.parent))


def test_the_file_has_its_name_only_when_it_is_whole(target):
    with replacing(target, 3, force=False) as file:
        file.write(b"new", 0)
        (name,) = files(target)
        assert re.fullmatch(r"file\.[0-9a-f]{16}\.part", name)
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
    with replacing(target, 3, force=True) as file:
        file.write(b"new", 0)
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
    with pytest.raises(error), replacing(target, 3, force=True) as file:
        file.write(b"ne", 0)
        raise error
    assert files(target) == ([target.name] if old else [])
    assert old is None or target.read_bytes() == old
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.descriptor)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "open"])
def test_errors_of_the_system_name_the_file(target, monkeypatch, call, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    for flag, name in (("", f"{target}"), ("--json", f"--json {target}")):
        with pytest.raises(InputError) as caught:
            write(target, flag=flag)
        assert str(caught.value) == f"{name}: {os.strerror(number)}"
    assert files(target) == []


def test_errors_of_other_files_are_not_blamed_on_this_one(target):
    with pytest.raises(BrokenPipeError), replacing(target, 3, force=False):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
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


def test_space_of_what_is_left_counts_as_free(target, part, monkeypatch):
    part.write_bytes(bytes(1000))
    usage = shutil.disk_usage(target.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=0 if part.exists() else 1000))
    write(target, n_bytes=1000)


def test_two_writers_of_one_file(target):
    with replacing(target, 3, force=False) as file:
        file.write(b"new", 0)
        for force in (False, True):
            with pytest.raises(InputError) as caught:
                write(target, b"other", force=force)
            assert str(caught.value) == f"{target}: another process is writing it"
        assert len(files(target)) == 1
    assert (files(target), target.read_bytes()) == ([target.name], b"new")


def test_of_writers_that_need_not_be_alone_the_last_one_counts(target):
    with replacing(target, 3, True, exclusive=False) as first:
        first.write(b"new", 0)
        write(target, b"not", force=True, exclusive=False)
        assert target.read_bytes() == b"not"
    assert (files(target), target.read_bytes()) == ([target.name], b"new")


def test_two_writers_in_one_folder(target):
    other = target.parent / "other"
    with replacing(target, 3, force=False) as a, replacing(other, 3, force=False) as b:
        a.write(b"new", 0)
        b.write(b"not", 0)
    assert (target.read_bytes(), other.read_bytes()) == (b"new", b"not")


def test_what_a_process_that_was_killed_leaves_is_removed(target):
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from system.output_file import replacing\n"
        "with replacing(Path(sys.argv[2]), 3, False) as file:\n"
        "    file.write(b'half', 0); os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).parents[2]
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, root, target], timeout=60).returncode == -9
        (left,) = files(target)
        assert (target.parent / left).read_bytes() == b"half"
    write(target.parent / "other file")
    assert left in files(target)
    write(target)
    assert (files(target), target.read_bytes()) == (["file", "other file"], b"new")


def test_many_writers_at_once_leave_one_whole_file(target):
    """Later writers take no new file for a leftover; the file is one writer's, and whole."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        "from system.output_file import replacing\n"
        "for n in range(40):\n"
        "    with replacing(Path(sys.argv[2]), 3, True, exclusive=False) as file:\n"
        "        for at in range(0, 50000, 5000): file.write(sys.argv[3].encode() * 5000, at)\n"
    )
    root = Path(__file__).parents[2]
    writers = [subprocess.Popen([sys.executable, "-c", code, root, target, letter]) for letter in "abcd"]
    assert [writer.wait(timeout=60) for writer in writers] == [0] * 4
    assert files(target) == [target.name]
    assert target.read_bytes() in [letter * 50000 for letter in (b"a", b"b", b"c", b"d")]


@pytest.mark.parametrize("moment", ["locked by it", "removed by it"])
def test_a_file_that_another_process_takes_for_a_leftover_before_it_is_locked(target, monkeypatch, moment):
    flock, taken = output_file.fcntl.flock, []

    def too_late(descriptor: int, operation: int) -> None:
        if not taken:
            (name,) = files(target)
            taken.append(os.open(target.parent / name, os.O_RDWR))
            flock(taken[0], operation)
            if moment == "removed by it":
                (target.parent / name).unlink()
                os.close(taken[0])
        flock(descriptor, operation)

    monkeypatch.setattr(output_file.fcntl, "flock", too_late)
    write(target)
    assert target.read_bytes() == b"new"
    assert taken


def test_a_file_system_without_locks_keeps_leftovers(target, part, monkeypatch):
    """Without locks a leftover cannot be told from a file in use."""

    def fail(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    part.write_bytes(b"left")
    monkeypatch.setattr(output_file.fcntl, "flock", fail)
    write(target)
    assert (files(target), target.read_bytes()) == ([target.name, part.name], b"new")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("other")])
@pytest.mark.parametrize("name", ["file.part", "file.0123456789abcdef.part"])
def test_nothing_beside_the_target_is_followed_waited_for_or_removed(target, name, make):
    (target.parent / "other").write_bytes(b"precious")
    make(target.parent / name)
    write(target)
    check_output(target, force=True)
    assert files(target) == sorted(["file", name, "other"])
    assert (target.parent / "other").read_bytes() == b"precious"


def test_a_guessed_name_is_not_opened(target, part, monkeypatch):
    (target.parent / "other").write_bytes(b"precious")
    part.symlink_to("other")
    monkeypatch.setattr(output_file.secrets, "token_hex", lambda n: "0123456789abcdef")
    with pytest.raises(InputError, match="file: File exists"):
        write(target)
    assert (target.parent / "other").read_bytes() == b"precious"


@pytest.mark.parametrize("n_bytes", [232, 233, 234, 255])
@pytest.mark.parametrize("letter", ["x", "\u00e9"])
def test_the_longest_names(tmp_path, letter, n_bytes):
    name = letter * (n_bytes // len(letter.encode())) + "x" * (n_bytes % len(letter.encode()))
    with replacing(tmp_path / name, 3, False) as file:
        file.write(b"new", 0)
        with pytest.raises(InputError, match="another process"):
            write(tmp_path / name)
        write(tmp_path / f"y{name[1:]}")
    assert (tmp_path / name).read_bytes() == b"new"
    assert len(os.listdir(tmp_path)) == 2


def same_path(target: Path) -> Path:
    return target


def by_link(target: Path) -> Path:
    (target.parent / "to file").symlink_to(target)
    return target.parent / "to file"


def by_hard_link(target: Path) -> Path:
    os.link(target, target.parent / "also file")
    return target.parent / "also file"


def by_another_spelling(target: Path) -> Path:
    (target.parent / "folder").mkdir()
    return target.parent / "folder" / ".." / "file"


@pytest.mark.parametrize("spelling", [same_path, by_link, by_hard_link, by_another_spelling])
def test_an_input_is_never_replaced(target, spelling):
    target.write_bytes(b"input")
    inputs = [target.parent / "not there", spelling(target)]
    before = files(target)
    for call in (check_output, lambda path, force, **options: write(path, force=force, **options)):
        with pytest.raises(InputError) as caught:
            call(target, force=True, inputs=inputs, flag="--json")
        assert str(caught.value) == f"--json {target}: is the same file as {inputs[1]}, an input"
    assert (files(target), target.read_bytes()) == (before, b"input")
    write(target.parent / "new", inputs=inputs)


def test_an_input_that_comes_into_the_place_of_the_target(target):
    other = target.parent / "input"
    other.write_bytes(b"input")
    with pytest.raises(InputError, match="an input"), replacing(target, 3, True, inputs=[other]):
        os.link(other, target)
    assert target.read_bytes() == b"input"


def test_what_stdout_is_written_to_is_not_replaced(target):
    target.write_bytes(b"text")
    code = "import sys; from pathlib import Path\nfrom system.output_file import check_output\n"
    command = [sys.executable, "-c", f"{code}check_output(Path(sys.argv[1]), True)", target]
    with open(target, "ab") as out:
        done = subprocess.run(
            command, stdout=out, stderr=subprocess.PIPE, text=True, timeout=60, cwd=Path(__file__).parents[2]
        )
    assert f"{target}: is the same file as stdout" in done.stderr


def test_the_mode_of_an_old_file_stays(target):
    target.write_bytes(b"old")
    target.chmod(0o600)
    write(target, force=True)
    assert (stat.S_IMODE(target.stat().st_mode), target.read_bytes()) == (0o600, b"new")


def test_a_file_that_may_not_be_written_to_is_not_replaced(target, monkeypatch):
    target.write_bytes(b"old")
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (target, os.W_OK))
    with pytest.raises(InputError, match="file: is there already, and may not be written to"):
        write(target, force=True)
    assert target.read_bytes() == b"old"


def test_checking_leaves_nothing_and_removes_nothing(target, part):
    part.write_bytes(b"left")
    check_output(target, force=False)
    assert files(target) == [part.name]


def test_a_folder_that_vanishes(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder/file: No such file"), replacing(tmp_path / "folder/file", 3, False):
        shutil.rmtree(tmp_path / "folder")


@pytest.mark.parametrize("text", ["", "/", "folder/", "folder/."])
def test_what_names_no_file(text):
    with pytest.raises(argparse.ArgumentTypeError, match="names no file"):
        output_path(text)
    assert output_path("folder/file") == Path("folder/file")


def test_no_descriptor_is_left_open(target, part):
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    write(target)
    for path in (target, target.parent, target / "x", Path("nowhere/x")):
        with pytest.raises(InputError):
            write(path)
    os.mkfifo(part)
    write(target, force=True)
    assert count() == before


def test_a_folder_that_cannot_be_synced_is_no_error(target, monkeypatch):
    """Not every file system can sync a folder, and the file is in its place."""
    fsync = os.fsync

    def of_files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", of_files_only)
    write(target)
    assert target.read_bytes() == b"new"


def test_an_interrupt_after_the_file_is_in_its_place_touches_no_other_part(target, part, monkeypatch):
    """The next process may already be writing its part."""

    def interrupt(folder: Path) -> None:
        part.write_bytes(b"another's")
        raise KeyboardInterrupt

    monkeypatch.setattr(output_file, "_sync_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(target)
    assert (target.read_bytes(), part.read_bytes()) == (b"new", b"another's")


def test_writing_goes_on_after_a_short_write(tmp_path, monkeypatch):
    pwrite, sizes = os.pwrite, []

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        sizes.append(len(data))
        return pwrite(descriptor, data[:3], offset)

    monkeypatch.setattr(os, "pwrite", short)
    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    OutputFile("", descriptor).write(b"0123456789", 5)
    OutputFile("", descriptor).write(memoryview(b""), 100)
    os.close(descriptor)
    assert sizes == [10, 7, 4, 1]
    assert (tmp_path / "file").read_bytes() == bytes(5) + b"0123456789"
