"""system.files: reading any path ends soon and takes little memory."""

import os
import resource
import stat
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest

from system.errors import InputError
from system.files import json_value, open_regular, parse_json, read_small

DEVICES = ["/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/tty"]


def as_folder(path: Path) -> None:
    path.mkdir()


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_pipe_that_is_written_to(path: Path) -> None:
    os.mkfifo(path)
    os.write(os.open(path, os.O_RDWR | os.O_NONBLOCK), b"{}")


def as_socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def as_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def as_link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing")


def as_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def as_nothing(path: Path) -> None:
    """Leave the path without a file."""


NO_FILES = [
    (as_folder, "is a directory"),
    (as_pipe, "is not a regular file"),
    (as_pipe_that_is_written_to, "is not a regular file"),
    (as_socket, "No such device or address"),
    (as_link_to_a_device, "is not a regular file"),
    (as_link_to_nothing, "No such file or directory"),
    (as_link_to_itself, "Too many levels of symbolic links"),
    (as_nothing, "No such file or directory"),
]


def open_and_close(path) -> None:
    os.close(open_regular(path))


READERS = pytest.mark.parametrize("read", [open_and_close, lambda path: read_small(path, 100)], ids=["open", "read"])


@READERS
@pytest.mark.parametrize(("make", "reason"), NO_FILES, ids=lambda value: getattr(value, "__name__", ""))
def test_what_is_no_file(tmp_path, read, make, reason):
    path = tmp_path / "x"
    make(path)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(caught.value) == f"{path}: {reason}"


@READERS
@pytest.mark.parametrize("device", [device for device in DEVICES if os.path.exists(device)])
def test_devices(read, device):
    with pytest.raises(InputError, match=f"{device}: "):
        read(device)


@READERS
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("x" * 300, "File name too long"),
        ("x/" * 3000, "File name too long"),
        (f"{__file__}/x", "Not a directory"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_paths_that_cannot_be(read, path, reason):
    with pytest.raises(InputError, match=reason):
        read(path)


@READERS
@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_must_not_be_read(tmp_path, read):
    (tmp_path / "x").touch(0)
    with pytest.raises(InputError, match="x: Permission denied"):
        read(tmp_path / "x")


@pytest.mark.parametrize("as_given", [str, Path])
@pytest.mark.parametrize("data", [b"", b"x", bytes(range(100))])
def test_all_of_a_small_file(tmp_path, data, as_given):
    (tmp_path / "x").write_bytes(data)
    (tmp_path / "link").symlink_to("x")
    assert read_small(as_given(tmp_path / "x"), 100) == read_small(as_given(tmp_path / "link"), 100) == data


def test_one_byte_too_many(tmp_path):
    (tmp_path / "x").write_bytes(bytes(101))
    with pytest.raises(InputError) as caught:
        read_small(tmp_path / "x", 100)
    assert str(caught.value) == f"{tmp_path / 'x'}: has 101 bytes, at most 100 are expected"


def test_a_file_of_10_gb_is_not_read(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        file.truncate(10 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="has 10737418240 bytes"):
        read_small(tmp_path / "x", 1 << 28)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1000


def test_a_file_that_grows_meanwhile_is_read_as_far_as_it_was_checked(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"12345")
    fstat = os.fstat

    def fstat_and_grow(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        os.truncate(tmp_path / "x", 10 << 30)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat_and_grow)
        patch.setattr("system.files.open_regular", lambda path: os.open(path, os.O_RDONLY))
        assert read_small(tmp_path / "x", 100) == b"12345"


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs /proc")
def test_an_error_while_reading(monkeypatch):
    """A network file system whose server is gone gives such errors; this file has nothing to read at 0."""
    monkeypatch.setattr(os, "fstat", lambda descriptor: SimpleNamespace(st_mode=stat.S_IFREG, st_size=5))
    with pytest.raises(InputError) as caught:
        read_small("/proc/self/mem", 100)
    assert str(caught.value) == "/proc/self/mem: Input/output error"


def test_a_file_of_an_open_descriptor_is_closed(tmp_path):
    (tmp_path / "x").write_bytes(bytes(101))
    before = len(os.listdir("/proc/self/fd"))
    read_small(tmp_path / "x", 101)
    for path in (tmp_path / "x", tmp_path, "/dev/zero"):
        with pytest.raises(InputError):
            read_small(path, 100)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_descriptor_is_not_for_programs_that_are_started(tmp_path):
    (tmp_path / "x").touch()
    descriptor = open_regular(tmp_path / "x")
    assert not os.get_inheritable(descriptor)
    os.close(descriptor)


# JSON


@pytest.mark.parametrize("value", [b"[]", b"{}", b"0", b'{"a":[]}', b'["ab"]', b"1e9"], ids=bytes.decode)
def test_json_of_many_values_takes_little_memory(value):
    """An allowed value takes some hundred bytes, and one too many next to nothing."""
    tracemalloc.start()
    try:
        json_value(b"[" + b",".join([value] * 50_000) + b"]")
        assert tracemalloc.get_traced_memory()[1] < 50_000 * 500
        data = b"[" + b",".join([value] * 1_000_000) + b"]"
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        with pytest.raises(InputError, match="x.json: not valid JSON .some .* values, at most 1000000"):
            parse_json(data, "x.json")
        assert tracemalloc.get_traced_memory()[1] - before < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text", ["[" * 10**5, '{"a":' * 10**5, "9" * 5000, '"\\ud800', "", "NaNs", "\ufeff{}"], ids=range(7)
)
def test_what_is_no_json_is_one_line(text):
    with pytest.raises(InputError, match="x.json: not valid JSON") as caught:
        parse_json(text.encode(), "x.json")
    assert str(caught.value).isprintable()


def test_keys_that_are_there_twice():
    assert json_value(b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="'a' is there twice"):
        json_value(b'[{"a": 1, "b": 0, "a": 2}]', unique_keys=True)


def test_a_git_lfs_pointer_is_named_as_one(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 27868174\n")
    with pytest.raises(InputError, match="tokenizer.json: is a Git LFS pointer, not the file itself: `git lfs pull`"):
        read_small(path, 1000)
