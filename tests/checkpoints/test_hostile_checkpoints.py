"""Checkpoint folders made to do harm: each is refused in one line, soon, in little memory, without a hang.

tests/checkpoints/test_load_hf.py tests accidental damage.
"""

import functools
import json
import operator
import os
import random
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from iris_files import small_config
from small_model import assert_rejected as assert_script_rejected
from small_model import run_script, write_model

import convert_to_iris
import gpt_oss_megakernel
import run_reference
from checkpoints.checkpoint import RandomCheckpoint, write_checkpoint
from checkpoints.config import expected_tensors
from load_hf import MAX_HEADER_BYTES, HFCheckpoint, open_checkpoint, resolve
from system.errors import InputError
from tools import fuzz_safetensors

ROOT = Path(__file__).parents[2]
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD_1, SHARD_2 = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SINKS, HEAD = "model.layers.1.self_attn.sinks", "lm_head.weight"
SMALL = small_config()


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[int, Path]:
    """Number of shards -> folder. Tests must not change it."""
    root = tmp_path_factory.mktemp("written")
    return {shards: write_checkpoint(RandomCheckpoint(SMALL), root / str(shards), shards) for shards in (1, 2)}


@pytest.fixture
def single(written, tmp_path) -> Path:
    return Path(shutil.copytree(written[1], tmp_path / "single"))


@pytest.fixture
def sharded(written, tmp_path) -> Path:
    return Path(shutil.copytree(written[2], tmp_path / "sharded"))


@pytest.fixture(autouse=True)
def a_limit_on_time_and_memory():
    """Fail the test if an endless device or a large file is read without limit."""
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    handler = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("still not done"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, handler)
    assert time.monotonic() - start < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 400_000


def read_all(folder: Path) -> HFCheckpoint:
    checkpoint = open_checkpoint(folder)
    for name, tensor in checkpoint.tensors():
        assert tuple(tensor.shape) == expected_tensors(checkpoint.config)[name][0]
        tensor.view(torch.uint8).max()
    checkpoint.document(TOKENIZER)
    return checkpoint


def assert_rejected(folder: Path, *culprits: str) -> None:
    with pytest.raises(InputError) as caught:
        read_all(folder)
    message = str(caught.value)
    assert message.isprintable(), message
    assert all(culprit in message for culprit in culprits), message


# Other things in the place of a file

SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (Path.mkdir, "is a directory"),
    "pipe": (os.mkfifo, "is not a regular file"),
    "socket": (lambda path: os.mknod(path, stat.S_IFSOCK | 0o600), "No such device or address"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
    "empty device": (lambda path: path.symlink_to(os.devnull), "is not a regular file"),
    "random device": (lambda path: path.symlink_to("/dev/urandom"), "is not a regular file"),
}
PLACES = [(1, CONFIG), (1, GENERATION), (1, TOKENIZER), (1, INDEX), (1, SINGLE), (2, INDEX), (2, SHARD_1), (2, SHARD_2)]


@pytest.mark.parametrize(("make", "reason"), SPECIAL.values(), ids=SPECIAL.keys())
@pytest.mark.parametrize(("shards", "name"), PLACES)
def test_something_else_in_the_place_of_a_file(written, tmp_path, shards, name, make, reason):
    folder = Path(shutil.copytree(written[shards], tmp_path / "folder"))
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert_rejected(folder, f"{folder / name}: {reason}")


def test_a_pipe_that_somebody_writes_to(single):
    (single / CONFIG).unlink()
    os.mkfifo(single / CONFIG)
    writer = os.open(single / CONFIG, os.O_RDWR | os.O_NONBLOCK)
    os.write(writer, b"{}")
    assert_rejected(single, f"{single / CONFIG}: is not a regular file")
    os.close(writer)


@pytest.mark.parametrize("target", ["nothing", "itself"])
@pytest.mark.parametrize(("shards", "name"), [(1, CONFIG), (1, SINGLE), (2, SHARD_1), (2, SHARD_2), (2, INDEX)])
def test_a_link_that_leads_nowhere(written, tmp_path, shards, name, target):
    folder = Path(shutil.copytree(written[shards], tmp_path / "folder"))
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name if target == "itself" else "nothing")
    assert_rejected(folder, str(folder), name)


# Sizes that are not true


@pytest.mark.parametrize(("shards", "name"), PLACES)
@pytest.mark.parametrize("bytes_before", [0, 1, None], ids=["empty", "one byte", "whole"])
def test_files_of_10_gb_are_not_read_whole(written, tmp_path, shards, name, bytes_before):
    """The files are mostly holes, behind the contents or behind a part of them."""
    folder = Path(shutil.copytree(written[shards], tmp_path / "folder"))
    if name in (GENERATION, TOKENIZER) or not (folder / name).exists():
        (folder / name).write_text("{}")
    if bytes_before is not None:
        os.truncate(folder / name, bytes_before)
    os.truncate(folder / name, 10 << 30)
    assert_rejected(folder, str(folder / name))


@pytest.mark.parametrize("name", [CONFIG, GENERATION, TOKENIZER, INDEX, SINGLE])
def test_empty_files(single, name):
    (single / name).write_bytes(b"")
    if name == TOKENIZER:
        assert read_all(single).document(TOKENIZER) == b""
    else:
        assert_rejected(single, str(single / name))


def parts_of(path: Path) -> tuple[bytes, bytes]:
    """Split a file into header and tensors, by the format's definition: 8 bytes of length come first."""
    data = path.read_bytes()
    end = 8 + struct.unpack_from("<Q", data)[0]
    return data[8:end], data[end:]


def write_shard(path: Path, header: bytes | str, data: bytes, length: int | None = None) -> None:
    header = header.encode() if isinstance(header, str) else header
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def test_headers_of_every_false_length(single):
    header, data = parts_of(single / SINGLE)
    size = len(header) + len(data)
    lengths = {0, 1, 2, len(header) - 1, len(header) + 1, size - 1, size, size + 1, size + 8, 255, 256, 4096}
    lengths |= {2**bits + by for bits in (16, 24, 27, 31, 32, 53, 63, 64) for by in (-1, 0, 1, 8)}
    for length in sorted(length for length in lengths - {len(header)} if length < 2**64):
        write_shard(single / SINGLE, header, data, length)
        assert_rejected(single, str(single / SINGLE))
    write_shard(single / SINGLE, header, data)
    read_all(single)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 90 << 20])
def test_a_header_that_is_as_large_as_it_says_is_refused(single, length):
    """safetensors would accept one of 100 MB, and take much of a minute and 2 GB for it."""
    entry = b'"x%07d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
    header = b"{" + b"".join(entry % i for i in range(20_000)) + b'"__metadata__":{"a":"' + b" " * length
    write_shard(single / SINGLE, header[:length], b"")
    assert_rejected(single, str(single / SINGLE), f"header of {length} bytes")


def test_an_index_of_many_tensors_is_checked_soon(sharded):
    """The test would take hours if the time grew with the square of the number of tensors."""
    pairs = [f'"x{i}": "{SHARD_1}"' for i in range(300_000)]
    for doubles, culprit in (([], "unknown tensor 'x0'"), (pairs[-1:], "'x299999' is there twice")):
        (sharded / INDEX).write_text(f'{{"weight_map": {{{", ".join(pairs + doubles)}}}}}')
        assert_rejected(sharded, str(sharded / INDEX), culprit)


def test_truncation_at_every_boundary(single):
    path = single / SINGLE
    whole = path.read_bytes()
    header, data = parts_of(path)
    start = 8 + len(header)
    ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
    assert max(ends) == len(data)
    sizes = {0, 1, 7, 8, 9, start - 1, start, start + 1} | {start + end + by for end in ends for by in (-1, 0, 1)}
    rng = random.Random(3)
    sizes |= {rng.randrange(len(whole)) for _ in range(50)}
    for size in sorted(sizes - {len(whole), len(whole) + 1}):
        path.write_bytes(whole[:size])
        assert_rejected(single, str(path))
    for more in (b"\0", b" " * 8, whole):
        path.write_bytes(whole + more)
        assert_rejected(single, str(path))


# Headers


def with_text_in_front(text: str) -> Callable[[str], str]:
    return lambda header: "{" + text + "," + header[1:]


def entry(dtype="BF16", shape=(4,), data_offsets=(0, 8)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": data_offsets})


HEADERS: dict[str, Callable[[str], str | bytes]] = {
    "nothing": lambda header: "",
    "spaces": lambda header: " " * len(header),
    "zeros": lambda header: "\0" * len(header),
    "a list": lambda header: f"[{header}]",
    "a string": lambda header: json.dumps(header),
    "null": lambda header: "null",
    "two objects": lambda header: header + header,
    "an object and more": lambda header: header + "x",
    "no tensors": lambda header: "{}",
    "metadata only": lambda header: '{"__metadata__": {"format": "pt"}}',
    "no end": lambda header: header[:-1],
    "a byte order mark": lambda header: "\ufeff" + header,
    "UTF-16": lambda header: header.encode("utf-16"),
    "a name that is not UTF-8": lambda header: header.encode().replace(b"lm_head", b"lm\xff_head"),
    "a name that ends within a character": lambda header: header.encode().replace(b"lm_head.weight", b"lm_head\xc3"),
    "a name of a surrogate": lambda header: header.replace("lm_head", "\\ud800"),
    "a name with a NUL": lambda header: header.replace("lm_head", "lm_head\\u0000"),
    "a name of two lines": lambda header: header.replace("lm_head", "lm_\\nhead"),
    "a name with an escape sequence": lambda header: header.replace("lm_head", "\\u001b[2Jlm_head"),
    "a name written backwards": lambda header: header.replace("lm_head", "\u202elm_head"),
    "a name with an escape sequence and no place": with_text_in_front(
        f'"\\u001b[2J\\u202e": {entry("U8", (1,), (9, 3))}'
    ),
    "a dtype with an escape sequence": with_text_in_front(f'"x": {entry(chr(27) + "[2J")}'),
    "an empty name": lambda header: header.replace("lm_head.weight", ""),
    "the same tensor twice": with_text_in_front(f'"{SINKS}": {entry()}'),
    "the same tensor twice, first as float16": with_text_in_front(f'"{HEAD}": {entry("F16", (100, 64), (0, 12800))}'),
    "metadata twice": with_text_in_front('"__metadata__": {"format": "pt"}'),
    "metadata of numbers": lambda header: header.replace('"pt"', "3"),
    "metadata nested": lambda header: header.replace('"pt"', '{"a": "b"}'),
    "lists nested deeply": lambda header: header.replace('"pt"', "[" * 100_000),
    "lists nested deeply and closed": lambda header: header.replace('"pt"', "[" * 100_000 + "]" * 100_000),
    "objects nested deeply": lambda header: '{"a":' * 100_000,
    "objects nested deeply and closed": lambda header: '{"a":' * 100_000 + "1" + "}" * 100_000,
    "a shape nested deeply": with_text_in_front('"x": {"shape": ' + "[" * 5000 + "]" * 5000 + "}"),
    "an integer of 5000 digits": with_text_in_front(f'"x": {entry().replace("8", "8" * 5000)}'),
    "a string of megabytes": with_text_in_front(f'"{"x" * (4 << 20)}": {entry()}'),
    "a tensor of no bytes": with_text_in_front(f'"x": {entry("U8", (0,), (0, 0))}'),
    "a tensor of no dimensions": with_text_in_front(f'"x": {entry("BF16", (), (0, 2))}'),
    "a tensor that is null": with_text_in_front('"x": null'),
    "a tensor that is a number": with_text_in_front('"x": 1e400'),
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=HEADERS.keys())
def test_headers(single, change):
    header, data = parts_of(single / SINGLE)
    text = json.dumps(json.loads(header))
    changed = change(text)
    assert changed != text
    write_shard(single / SINGLE, changed, data)
    assert_rejected(single, str(single / SINGLE))


def test_spaces_and_unknown_fields_are_no_harm(single):
    header, data = parts_of(single / SINGLE)
    for text in (header.decode().rstrip() + " " * 64, "\n " + header.decode()):
        write_shard(single / SINGLE, text, data)
        read_all(single)


NUMBERS = (-1, -(2**63), 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1, 2**64, 2**64 + 8, 10**400)
NO_NUMBERS = (0.5, 1e308, None, True, "8", [], {}, [[0, 8]])


@pytest.fixture
def changed(written, single):
    """Return changed(change): a one-shard folder whose header's entries, as a dictionary, were changed."""

    def changed(change: Callable[[dict], object]) -> Path:
        header, data = parts_of(written[1] / SINGLE)
        entries = json.loads(header)
        change(entries)
        write_shard(single / SINGLE, json.dumps(entries), data)
        return single

    return changed


def put(new: object, *keys: str | int) -> Callable[[dict], object]:
    """Set the value behind a path of dictionary keys and list indices."""

    def change(entries: dict) -> None:
        *outer, last = keys
        functools.reduce(operator.getitem, outer, entries)[last] = new

    return change


@pytest.mark.parametrize("key", ["shape", "data_offsets"])
@pytest.mark.parametrize("name", [SINKS, HEAD])
def test_numbers_that_cannot_be(changed, name, key):
    for index in (0, -1):
        for new in (*NUMBERS, *NO_NUMBERS):
            folder = changed(put(new, name, key, index))
            assert_rejected(folder, str(folder / SINGLE))


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_fields_that_cannot_be(changed, key):
    for new in (*NO_NUMBERS, 8, "bf16", "BF16 ", [0], [0, 8, 16], [8, 0]):
        if (key, new) != ("data_offsets", [0, 8]):
            folder = changed(put(new, SINKS, key))
            assert_rejected(folder, str(folder / SINGLE))
    folder = changed(lambda entries: entries[SINKS].pop(key))
    assert_rejected(folder, str(folder / SINGLE))


# Their product is the right one in 64 bits, or none at all.
@pytest.mark.parametrize(
    "shape", [[4, 2**32, 2**32], [2**62 + 4], [2**63 + 4], [4 * pow(3, -1, 2**64) % 2**64, 3], [2**40] * 8, [2] * 70]
)
def test_shapes_whose_product_overflows(changed, shape):
    folder = changed(lambda entries: entries[SINKS].update(shape=shape))
    assert_rejected(folder, str(folder / SINGLE))


def move(by: int, names: tuple[str, ...] | None = None) -> Callable[[dict], object]:
    def change(entries: dict) -> None:
        for name in names or entries.keys() - {"__metadata__"}:
            entries[name]["data_offsets"] = [at + by for at in entries[name]["data_offsets"]]

    return change


def swap(key: str, first: str, second: str) -> Callable[[dict], object]:
    def change(entries: dict) -> None:
        a, b = entries[first], entries[second]
        a[key], b[key] = b[key], a[key]

    return change


def like(first: str, second: str) -> Callable[[dict], object]:
    return lambda entries: entries[first].update(data_offsets=entries[second]["data_offsets"])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(move(2), id="a gap in front"),
        pytest.param(move(-2), id="below the start"),
        pytest.param(move(8, (SINKS,)), id="a gap and an overlap"),
        pytest.param(move(1, (SINKS,)), id="an odd place"),
        pytest.param(move(2**63, (SINKS,)), id="far behind the end"),
        pytest.param(like(SINKS, "model.layers.0.self_attn.sinks"), id="the same place"),
        pytest.param(swap("data_offsets", SINKS, HEAD), id="places of other sizes"),
        pytest.param(swap("dtype", "model.layers.0.mlp.experts.down_proj_scales", HEAD), id="dtypes of others"),
        pytest.param(lambda entries: entries[HEAD]["data_offsets"].reverse(), id="end before start"),
        pytest.param(lambda entries: entries.pop(SINKS), id="a gap for a missing tensor"),
    ],
)
def test_places_that_overlap_or_leave_gaps(changed, change):
    folder = changed(change)
    assert_rejected(folder, str(folder / SINGLE))


def test_tensors_in_any_order_are_read_by_their_places(changed, written):
    """Two sinks of one size have swapped places, in a header in alphabetical order."""
    first = "model.layers.0.self_attn.sinks"
    read = read_all(changed(swap("data_offsets", first, SINKS)))
    original = open_checkpoint(written[1])
    assert torch.equal(read.tensor(first), original.tensor(SINKS))
    assert torch.equal(read.tensor(SINKS), original.tensor(first))


# Indexes


def change_index(folder: Path, change: Callable[[dict], object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", HEAD])
@pytest.mark.parametrize("shard", ["x" * 300, "x" * 5000, "\ud800", "\u202e", INDEX, CONFIG, ".hidden", "~", "-"])
def test_an_index_that_names_odd_shards(sharded, name, shard):
    assert_rejected(change_index(sharded, lambda weight_map: weight_map.update({name: shard})), str(sharded))


def test_an_index_whose_shards_are_the_index(sharded):
    assert_rejected(
        change_index(sharded, lambda weight_map: weight_map.update(dict.fromkeys(weight_map, INDEX))), INDEX
    )


def test_an_index_of_one_shard_that_is_there_under_two_names(sharded):
    (sharded / "link.safetensors").symlink_to(SHARD_1)
    shards = {SHARD_1: "link.safetensors"}
    change_index(sharded, lambda names: names.update({name: shards.get(shard, shard) for name, shard in names.items()}))
    read_all(sharded)
    change_index(sharded, lambda weight_map: weight_map.update({SINKS: SHARD_1, HEAD: "link.safetensors"}))
    assert_rejected(sharded, "safetensors: holds tensor")


# Folders that change


def test_a_shard_that_is_replaced_by_another(sharded):
    checkpoint = open_checkpoint(sharded)
    name = checkpoint.shards[SHARD_1][0]
    shutil.copy(sharded / SHARD_2, sharded / SHARD_1)
    for read in (lambda: checkpoint.tensor(name), lambda: list(checkpoint.tensors())):
        with pytest.raises(InputError, match=f"{SHARD_1}: tensor .* is another than when the checkpoint was opened"):
            read()


def test_a_tensor_that_is_replaced_by_another(changed, single):
    checkpoint = open_checkpoint(single)
    first = changed(lambda entries: entries[SINKS].update(shape=[2, 2])) / SINGLE
    with pytest.raises(InputError, match=f"{first}: tensor {SINKS} is another"):
        checkpoint.tensor(SINKS)
    assert torch.equal(checkpoint.tensor(HEAD), RandomCheckpoint(SMALL).tensor(HEAD))


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_shard_that_is_cut_short_after_it_was_checked(single, size):
    checkpoint = open_checkpoint(single)
    os.truncate(single / SINGLE, size % (single / SINGLE).stat().st_size)
    with pytest.raises(InputError, match=SINGLE):
        next(checkpoint.tensors())


SHRINK = """
import os, sys
sys.path.insert(0, sys.argv[1])
import load_hf
folder, shard = sys.argv[2:]
tensors = load_hf.open_checkpoint(folder).tensors()
next(tensors)
os.truncate(shard, 4096)
for name, tensor in tensors:
    tensor.sum()
print("never here")
"""


def test_a_shard_that_shrinks_while_it_is_mapped(single):
    command = [sys.executable, "-c", SHRINK, ROOT, single, single / SINGLE]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == f"error: {single / SINGLE}: could not be read on: was it cut short while in use?\n"


# The hub's cache


@pytest.mark.parametrize("size", [5 << 30, 5000])
def test_a_cache_whose_reference_is_endless(written, tmp_path, size):
    repo = tmp_path / "repo"
    snapshot = Path(shutil.copytree(written[1], repo / "snapshots" / "c1"))
    (snapshot / TOKENIZER).write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c1")
    assert resolve(repo) == snapshot
    os.truncate(repo / "refs" / "main", size)
    assert_rejected(repo, str(repo))


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_a_cache_whose_reference_is_no_file(written, tmp_path, make):
    repo = tmp_path / "repo"
    snapshot = Path(shutil.copytree(written[1], repo / "snapshots" / "c1"))
    (snapshot / TOKENIZER).write_text("{}")
    (repo / "refs").mkdir()
    make(repo / "refs" / "main")
    assert resolve(repo) == snapshot


# The command lines


SCRIPTS = {
    "megakernel": (gpt_oss_megakernel.main, ["--max-new-tokens", 1]),
    "reference": (run_reference.main, ["--max-new-tokens", 1]),
    "convert": (convert_to_iris.main, ["--out", "m.iris"]),
}


@pytest.mark.parametrize(("main", "words"), SCRIPTS.values(), ids=SCRIPTS.keys())
@pytest.mark.parametrize("name", [CONFIG, TOKENIZER, INDEX, SHARD_2])
def test_scripts_tell_in_one_line(tmp_path, monkeypatch, capsys, main, words, name):
    folder = write_model(tmp_path / "model", shards=2)
    path = folder / name
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGTERM)
    for make, reason in (*SPECIAL.values(), (lambda path: path.touch() or os.truncate(path, 10 << 30), "")):
        path.unlink()
        make(path)
        result = run_script(main, ["--model", folder, *words], monkeypatch, capsys)
        assert_script_rejected(result, f"{path}: {reason}")
        if path.is_dir():
            path.rmdir()
            path.touch()
    signal.signal(signal.SIGTERM, handler)
    assert os.listdir() == ["model"]


# Random damage


def test_random_damage_of_headers_is_refused_or_harmless(tmp_path):
    """tools/fuzz_safetensors.py runs more cases of this."""
    folder = write_checkpoint(RandomCheckpoint(fuzz_safetensors.CONFIG), tmp_path / "model")
    whole = (folder / SINGLE).read_bytes()
    accepted = 0
    for case in range(500):
        (folder / SINGLE).write_bytes(fuzz_safetensors.mutated(random.Random(f"tests {case}"), whole))
        problem, message = fuzz_safetensors.problem_or_message(folder)
        assert problem is None, f"case {case}: {problem}"
        accepted += message is None
    assert 20 < accepted < 250


def test_the_fuzzer_notices_what_it_looks_for(tmp_path, monkeypatch):
    folder = write_checkpoint(RandomCheckpoint(fuzz_safetensors.CONFIG), tmp_path / "model")
    assert fuzz_safetensors.problem_or_message(folder) == (None, None)

    def raise_error(*_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(fuzz_safetensors, "open_checkpoint", raise_error)
    assert fuzz_safetensors.problem_or_message(folder) == ("KeyError: 'x'", None)
    monkeypatch.setattr(
        fuzz_safetensors, "open_checkpoint", lambda _: RandomCheckpoint(fuzz_safetensors.CONFIG, seed=1)
    )
    assert "has other values" in fuzz_safetensors.problem_or_message(folder)[0]


def test_the_fuzzers_command_line(monkeypatch, capsys):
    code, told, _ = run_script(fuzz_safetensors.main, ["--cases", 20, "--seed", 3], monkeypatch, capsys)
    assert code == 0
    assert told.splitlines()[-1].endswith(" 0 problems")
    assert_script_rejected(run_script(fuzz_safetensors.main, ["--cases", 0], monkeypatch, capsys), "--cases")
