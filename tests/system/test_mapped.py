"""system.mapped: pages of mapped files are given back, and a file that shrinks ends the process with one line."""

import json
import mmap
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from small_model import small_checkpoint, write_model

from checkpoints.iris_writer import write_archive
from load_iris import open_archive
from system.errors import InputError
from system.mapped import _mapped_file, release_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
ROOT = Path(__file__).parents[2]
SIZE = 8 << 20


def map_tensor(path: Path) -> torch.Tensor:
    with open(path, "rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)


def resident_bytes(tensor: torch.Tensor) -> int:
    """Return the resident bytes of the mapping that the tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(errors="surrogateescape").splitlines():
        first_word = line.split()[0]
        if "-" in first_word and not first_word.endswith(":"):
            first, end = (int(part, 16) for part in first_word.split("-"))
            inside = first <= tensor.data_ptr() < end
        elif inside and first_word == "Rss:":
            return int(line.split()[1]) << 10
    raise AssertionError("no such mapping")


def random_bytes(n_bytes: int) -> torch.Tensor:
    return torch.randint(0, 256, (n_bytes,), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


NAMES = ["file", "with  spaces ", " (deleted)", "Ünï", os.fsdecode(b"\xff"), "[heap]"]


@pytest.mark.parametrize("name", NAMES)
def test_the_pages_of_a_mapped_file_go_back_and_come_again(tmp_path, name):
    path, expected = tmp_path / name, random_bytes(SIZE)
    path.write_bytes(expected.numpy().tobytes())
    tensor = map_tensor(path)
    assert torch.equal(tensor, expected)
    assert resident_bytes(tensor) == SIZE
    release_pages(tensor, str(path))
    assert resident_bytes(tensor) == 0
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("part", [slice(4096, SIZE // 2), slice(100, 8192), slice(1, SIZE - 1)])
def test_a_part_of_a_file_gives_its_whole_pages_back(tmp_path, part):
    path, expected = tmp_path / "file", random_bytes(SIZE)
    path.write_bytes(expected.numpy().tobytes())
    tensor = map_tensor(path)
    tensor.max()
    release_pages(tensor[part], str(path))
    assert resident_bytes(tensor) < SIZE - (part.stop - part.start) + 2 * mmap.PAGESIZE
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("part", [slice(1, 4097), slice(4095, 4097), slice(0, 0)])
def test_a_part_without_a_whole_page_gives_none_back(tmp_path, part):
    path = tmp_path / "file"
    path.write_bytes(random_bytes(SIZE).numpy().tobytes())
    tensor = map_tensor(path)
    tensor.max()
    release_pages(tensor[part], str(path))
    assert resident_bytes(tensor) == SIZE


def test_memory_that_is_no_file_keeps_its_values(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    mapped, expected = map_tensor(path), random_bytes(SIZE)
    anonymous = torch.frombuffer(mmap.mmap(-1, SIZE), dtype=torch.uint8).copy_(expected)
    own = expected.clone()
    for tensor in (anonymous, own):
        release_pages(tensor, str(path))
        assert torch.equal(tensor, expected)
    assert len(mapped) == SIZE


def test_a_file_of_another_name_keeps_its_pages(tmp_path):
    """The values of such a file may have been changed in memory; this code cannot know."""
    path = tmp_path / "file"
    path.write_bytes(random_bytes(SIZE).numpy().tobytes())
    tensor = map_tensor(path)
    tensor.max()
    for name in (tmp_path / "fil", tmp_path / "file2", "file", ""):
        release_pages(tensor, str(name))
    assert resident_bytes(tensor) == SIZE


def test_the_file_of_an_address(tmp_path):
    path = tmp_path / "with  spaces "
    path.write_bytes(bytes(SIZE))
    tensor = map_tensor(path)
    assert _mapped_file(tensor.data_ptr()) == str(path)
    assert _mapped_file(tensor.data_ptr() + SIZE - 1) == str(path)
    assert _mapped_file(tensor.data_ptr() + SIZE) != str(path)
    assert _mapped_file(0) is None
    assert _mapped_file(torch.zeros(SIZE).data_ptr()) is None
    assert _mapped_file(2**64 - 1) is None


def test_without_proc_nothing_is_released(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(random_bytes(SIZE).numpy().tobytes())
    tensor = map_tensor(path)
    tensor.max()
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    release_pages(tensor, str(path))
    monkeypatch.undo()
    assert resident_bytes(tensor) == SIZE


def test_safetensors_maps_the_file(tmp_path):
    """A version of safetensors that read it instead would take as much memory as the model."""
    path, expected = tmp_path / "file", random_bytes(SIZE)
    save_file({"x": expected}, path)
    with safe_open(path, framework="pt") as file:
        tensor = file.get_tensor("x")
    assert torch.equal(tensor, expected)
    release_pages(tensor, str(path))
    assert resident_bytes(tensor) <= 2 * mmap.PAGESIZE
    assert torch.equal(tensor, expected)


# A file that shrinks while it is mapped

# Once in a fork for each way of reading it.
SHRINK = """
import faulthandler, hashlib, json, mmap, os, sys, threading
sys.path.insert(0, sys.argv[1])
import torch
from system.mapped import name_on_bus_error

def by_torch():
    tensor.max()

def by_threads_of_torch():
    torch.set_num_threads(4)
    tensor.view(torch.float32).exp()

def by_python():
    mapping[: len(mapping)]

def by_another_thread():
    thread = threading.Thread(target=lambda: hashlib.sha256(mapping))
    thread.start()
    thread.join()

def while_python_is_busy():
    threading.Thread(target=lambda: hashlib.sha256(mapping)).start()
    while True:
        pass

path, results = sys.argv[2], {}
for read in (by_torch, by_threads_of_torch, by_python, by_another_thread, while_python_is_busy):
    open(path, "wb").write(bytes(8 << 20))
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(into, 2)
        faulthandler.enable()
        for name in ("other", path, path):
            name_on_bus_error(name)
        with open(path, "rb") as file:
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        os.truncate(path, mmap.PAGESIZE)
        tensor[: mmap.PAGESIZE].max()
        os.write(2, b"still there\\n")
        read()
        os._exit(0)
    os.close(into)
    results[read.__name__] = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), os.read(out, 1000).decode()]
print(json.dumps(results))
"""


def test_a_file_that_shrinks_is_one_line_and_exit_code_2(tmp_path):
    path = tmp_path / "file"
    command = [sys.executable, "-W", "ignore", "-c", SHRINK, ROOT, path]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert process.stderr == ""
    line = f"error: other, {path}: could not be read on: was it cut short while in use?\n"
    results = json.loads(process.stdout)
    assert len(results) == 5
    for how, result in results.items():
        assert result == [2, f"still there\n{line}"], how


# A script one of whose files shrinks as soon as its model has been looked at.
SHRINK_MODEL = """
import os, runpy, sys
script, path, *words = sys.argv[1:]
sys.path.insert(0, os.path.dirname(script))
import load_model
opened = load_model.open_checkpoint
def open_and_cut(*arguments, **options):
    checkpoint = opened(*arguments, **options)
    os.truncate(path, os.path.getsize(path) // 4)
    return checkpoint
load_model.open_checkpoint = open_and_cut
sys.argv = [script, *words]
runpy.run_path(script, run_name="__main__")
"""


def run_and_shrink(script: str, path: Path, *words) -> str:
    """Return what the program says of the file that shrinks; it says nothing else, except for a progress bar."""
    command = [sys.executable, "-c", SHRINK_MODEL, ROOT / script, path, *words]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.count("\n") == 1 or "%|" in process.stderr
    assert "Traceback" not in process.stderr
    return process.stderr[process.stderr.index("error: ") :]


def test_an_archive_that_shrinks_while_it_decodes(tmp_path):
    path = tmp_path / "m.iris"
    write_archive(small_checkpoint(), path)
    told = run_and_shrink("gpt_oss_megakernel.py", path, "--model", path, "--prompt-ids", "65")
    assert told == f"error: {path}: could not be read on: was it cut short while in use?\n"


def test_a_shard_that_shrinks_while_it_is_converted(tmp_path):
    """safetensors reads the header again, which shows it, or finds pages missing."""
    folder = write_model(tmp_path / "model")
    shard, out = folder / "model.safetensors", tmp_path / "m.iris"
    told = run_and_shrink("convert_to_iris.py", shard, "--model", folder, "--out", out)
    assert told.startswith(f"error: {shard}: c")
    assert not out.exists()


def test_verify_of_an_archive_that_shrinks_needs_no_signal(tmp_path):
    write_archive(small_checkpoint(), tmp_path / "m.iris")
    archive = open_archive(tmp_path / "m.iris")
    os.truncate(tmp_path / "m.iris", archive.header.file_bytes - 1)
    with pytest.raises(InputError, match=f"{archive.name}: tensor .*: the checksum does not match"):
        archive.verify()
