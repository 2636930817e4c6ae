"""load_hf on good, bad, cut, damaged and published-size checkpoints, and against a hub served on this machine."""

import dataclasses
import gc
import gzip
import http.server
import json
import math
import os
import re
import shutil
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import huggingface_hub
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.modeling_utils import _get_resolved_checkpoint_files

import load_hf
from checkpoints.checkpoint import RandomCheckpoint, write_checkpoint
from checkpoints.config import GPT_OSS_120B, ModelConfig, expected_tensors
from checkpoints.iris_compare import first_difference
from checkpoints.iris_writer import write_archive
from gpt_oss_megakernel import MegaModel
from host.launch import tuning_for
from host.weights import load_weights
from load_iris import open_archive
from reference import Reference
from system import slow_network
from system.errors import InputError

PUBLISHED = Path(__file__).parents[1] / "data" / "gpt-oss-120b"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SMALL = ModelConfig(
    n_layers=3,
    n_experts=4,
    experts_per_token=2,
    hidden_size=64,
    intermediate_size=32,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    layer_is_sliding=(True, False, True),
    stop_ids=(7, 3),
)
SMALL_RANDOM = RandomCheckpoint(SMALL)
SINKS = "model.layers.1.self_attn.sinks"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[int, Path]:
    """Number of shards -> folder. Tests must not change it."""
    root = tmp_path_factory.mktemp("written")
    return {shards: write_checkpoint(SMALL_RANDOM, root / str(shards), shards) for shards in (1, 4)}


@pytest.fixture
def single(written, tmp_path) -> Path:
    return Path(shutil.copytree(written[1], tmp_path / "single"))


@pytest.fixture
def sharded(written, tmp_path) -> Path:
    return Path(shutil.copytree(written[4], tmp_path / "sharded"))


def assert_rejected(model: object, *culprits: str, n_layers: int | None = None) -> None:
    with pytest.raises(InputError) as caught:
        load_hf.open_checkpoint(model, n_layers)
    message = str(caught.value)
    assert message.isprintable(), message
    assert all(culprit in message for culprit in culprits), message


def change_index(folder: Path, change: Callable[[dict], object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def change_shard(path: Path, change: Callable[[dict], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def header_of(path: Path) -> dict:
    """Return the header of a safetensors file by the format's definition: 8 bytes of length, then JSON."""
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length))


# Good checkpoints


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("as_given", [str, Path])
def test_every_tensor_is_what_was_written(written, shards, as_given):
    checkpoint = load_hf.open_checkpoint(as_given(written[shards]))
    assert checkpoint.config == SMALL
    assert checkpoint.folder == written[shards]
    assert checkpoint.name == str(written[shards])
    tensors = dict(checkpoint.tensors())
    assert tensors.keys() == expected_tensors(SMALL).keys()
    for name, tensor in tensors.items():
        original = SMALL_RANDOM.tensor(name)
        assert tensor.dtype == original.dtype
        assert torch.equal(tensor, original), name
        assert torch.equal(checkpoint.tensor(name), original), name


def test_unknown_name_is_a_key_error(written):
    with pytest.raises(KeyError):
        load_hf.open_checkpoint(written[1]).tensor("model.layers.3.self_attn.sinks")


@pytest.mark.parametrize("shards", [1, 4])
def test_tensors_come_shard_by_shard_in_file_order(written, shards):
    expected = []
    for path in sorted(written[shards].glob("*.safetensors")):
        offsets = {name: entry["data_offsets"] for name, entry in header_of(path).items() if name != "__metadata__"}
        expected += sorted(offsets, key=offsets.get)
    assert [name for name, _ in load_hf.open_checkpoint(written[shards]).tensors()] == expected


@pytest.mark.parametrize("shards", [1, 4])
def test_cut_asks_for_the_first_layers_only(written, shards):
    checkpoint = load_hf.open_checkpoint(written[shards], n_layers=2)
    assert checkpoint.config == SMALL.cut(2)
    assert dict(checkpoint.tensors()).keys() == expected_tensors(SMALL.cut(2)).keys()
    with pytest.raises(KeyError):
        checkpoint.tensor("model.layers.2.self_attn.sinks")


def test_cut_needs_no_shard_of_the_other_layers(single):
    """The tensors stand in two shards, the second of which holds layers 1 and 2 and is absent."""
    tensors = load_file(single / SINGLE)
    first = {name for name in tensors if not name.startswith(("model.layers.1.", "model.layers.2."))}
    save_file({name: tensors[name].clone() for name in first}, single / "a.safetensors")
    weight_map = {name: "a.safetensors" if name in first else "b.safetensors" for name in tensors}
    (single / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (single / SINGLE).unlink()
    assert load_hf.open_checkpoint(single, n_layers=1).shards.keys() == {"a.safetensors"}
    assert_rejected(single, "b.safetensors", n_layers=2)
    assert_rejected(single, "b.safetensors")


@pytest.mark.parametrize("n_layers", [0, -1, 4])
def test_cut_to_layers_that_are_not_there(written, n_layers):
    assert_rejected(written[1], f"--layers {n_layers}", n_layers=n_layers)


def test_a_shard_may_be_a_link_to_elsewhere(single):
    """The hub's cache holds links from a snapshot to its blobs."""
    blob = single.parent / "blob"
    (single / SINGLE).rename(blob)
    (single / SINGLE).symlink_to(blob)
    assert len(list(load_hf.open_checkpoint(single).tensors())) == len(expected_tensors(SMALL))


# Sizes


def write_sparse_published(folder: Path) -> Path:
    """Write the published checkpoint with its true headers and no data: 65 GB of holes that take some KB on disk."""
    for name in ("config.json", "generation_config.json"):
        shutil.copy(PUBLISHED / name, folder)
    index = gzip.decompress((PUBLISHED / f"{INDEX}.gz").read_bytes())
    (folder / INDEX).write_bytes(index)
    tensors, item_bytes = expected_tensors(GPT_OSS_120B), {"BF16": 2, "U8": 1}
    headers: dict[str, dict] = {}
    ends: dict[str, int] = {}
    for name, shard in json.loads(index)["weight_map"].items():
        shape, dtype = tensors[name]
        start = ends.get(shard, 0)
        ends[shard] = start + math.prod(shape) * item_bytes[dtype]
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [start, ends[shard]]}
        headers.setdefault(shard, {})[name] = entry
    assert sum(ends.values()) == json.loads(index)["metadata"]["total_size"] == 65_248_815_744
    for shard, header in headers.items():
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / shard, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + ends[shard])
    return folder


def test_published_checkpoint_is_accepted_by_its_headers(tmp_path):
    checkpoint = load_hf.open_checkpoint(write_sparse_published(tmp_path))
    assert checkpoint.config == GPT_OSS_120B
    assert len(checkpoint.shards) == 15
    assert sum(map(len, checkpoint.shards.values())) == 687
    last = checkpoint.tensor("model.layers.35.mlp.experts.gate_up_proj_blocks")
    assert last.shape == (128, 5760, 90, 16)
    assert last[-1, -1, -1, -1] == 0
    cut = load_hf.open_checkpoint(tmp_path, n_layers=2)
    assert {name for names in cut.shards.values() for name in names} == expected_tensors(GPT_OSS_120B.cut(2)).keys()


def mapped_shards() -> list[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split()[-1] for line in lines if line.endswith(".safetensors")})


def anonymous_bytes() -> int:
    """Return the bytes that this process holds in memory beyond mapped files."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_iterating_holds_one_shard_mapped_and_copies_nothing(tmp_path):
    config = dataclasses.replace(SMALL, vocab_size=300_000)  # two matrices of 38 MB
    write_checkpoint(RandomCheckpoint(config), tmp_path, 4)
    gc.collect()  # an earlier test's exception may still hold a tensor
    assert mapped_shards() == []
    checkpoint = load_hf.open_checkpoint(tmp_path)
    assert mapped_shards() == [], "opening keeps files mapped"
    before = anonymous_bytes()
    for _, tensor in checkpoint.tensors():
        tensor.view(torch.uint8).max()  # reads every byte
        assert len(mapped_shards()) <= 2  # the one read, and the one that `tensor` of the last round lies in
        assert anonymous_bytes() - before < 10e6
    del tensor
    assert mapped_shards() == []
    tensor = checkpoint.tensor("lm_head.weight")
    assert len(mapped_shards()) == 1
    del tensor
    assert mapped_shards() == []


# Bad folders and indexes


def test_folder_that_is_not_there_nor_a_hub_id():
    for model in ("", "nowhere", "/no/where", "./no/where", "../no", "a/b/c", "org/", "/name", "org/na me", "a\0/b"):
        assert_rejected(model or "no-such-folder", "not a hub id")
    assert_rejected("x" * 5000)
    assert_rejected("x/" * 3000)


def test_file_instead_of_a_folder(written):
    assert_rejected(written[1] / SINGLE, SINGLE, "is a file")


def test_folder_without_config(tmp_path):
    assert_rejected(tmp_path, "config.json")


def test_folder_without_weights(single):
    (single / SINGLE).unlink()
    assert_rejected(single, str(single), SINGLE, INDEX)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"weight_map": []}', '{"weight_map": null}', "[" * 100_000, '{"weight_map": {}']
    + ['{"weight_map": {"lm_head.weight": "a.safetensors", "lm_head.weight": "b.safetensors"}}'],
)
def test_index_that_is_no_index(sharded, text):
    (sharded / INDEX).write_text(text)
    assert_rejected(sharded, INDEX)


def test_index_that_is_not_utf8_or_a_folder(sharded):
    (sharded / INDEX).write_bytes(b'{"weight_map": {"\xff": "a"}}')
    assert_rejected(sharded, INDEX)
    (sharded / INDEX).unlink()
    (sharded / INDEX).mkdir()
    assert_rejected(sharded, INDEX)


@pytest.mark.parametrize("duplicate", ["lm_head.weight", SINKS])
def test_index_that_lists_a_tensor_twice(sharded, duplicate):
    text = (sharded / INDEX).read_text()
    entry = f'"{duplicate}": "{shard_of(sharded, duplicate).name}"'
    (sharded / INDEX).write_text(text.replace(entry, f"{entry}, {entry}"))
    assert_rejected(sharded, INDEX, duplicate, "twice")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "a\0b", "a\nb", None, 3, ["x"], {}],
)
def test_index_that_names_no_file_of_the_folder(sharded, shard):
    shutil.copy(shard_of(sharded, SINKS), sharded.parent / "x.safetensors")
    assert_rejected(change_index(sharded, lambda weight_map: weight_map.update({SINKS: shard})), INDEX, SINKS)


@pytest.mark.parametrize("name", list(expected_tensors(SMALL.cut(1))))
def test_index_that_lacks_a_tensor(sharded, name):
    assert_rejected(change_index(sharded, lambda weight_map: weight_map.pop(name)), INDEX, f"tensor {name} is missing")


@pytest.mark.parametrize("name", ["model.layers.3.self_attn.sinks", "model.rotary.inv_freq", "x\ny", ""])
def test_index_with_an_unknown_tensor(sharded, name):
    changed = change_index(sharded, lambda weight_map: weight_map.update({name: "model-00001-of-00004.safetensors"}))
    assert_rejected(changed, INDEX, f"unknown tensor {name!r}")
    assert_rejected(changed, f"unknown tensor {name!r}", n_layers=1)


def test_index_that_places_a_tensor_in_another_shard(sharded):
    right = shard_of(sharded, SINKS).name
    (wrong, *_) = sorted(path.name for path in sharded.glob("*.safetensors") if path.name != right)
    assert_rejected(change_index(sharded, lambda weight_map: weight_map.update({SINKS: wrong})), SINKS, ".safetensors")


def test_shard_that_lacks_its_tensor(sharded):
    shard = shard_of(sharded, SINKS)
    change_shard(shard, lambda tensors: tensors.pop(SINKS))
    assert_rejected(sharded, shard.name, SINKS)


def test_tensor_in_two_shards(sharded):
    here = shard_of(sharded, SINKS)
    (other, *_) = sorted(path for path in sharded.glob("*.safetensors") if path != here)
    change_shard(other, lambda tensors: tensors.update({SINKS: torch.zeros(4, dtype=torch.bfloat16)}))
    assert_rejected(sharded, other.name, SINKS, here.name)


def test_what_an_index_does_not_name_is_ignored_with_one_line(sharded, caplog):
    """transformers ignores such tensors and files too."""
    shard = shard_of(sharded, SINKS)
    change_shard(shard, lambda tensors: tensors.update({"extra": torch.zeros(4), "x\x1b[2J": torch.zeros(1)}))
    save_file({SINKS: torch.zeros(4)}, sharded / "other.safetensors")
    for _ in range(2):
        checkpoint = load_hf.open_checkpoint(sharded)
        assert {name for names in checkpoint.shards.values() for name in names} == expected_tensors(SMALL).keys()
        assert torch.equal(checkpoint.tensor(SINKS), SMALL_RANDOM.tensor(SINKS))
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for culprit in (str(sharded), INDEX, "'other.safetensors'", f"'extra' of {shard.name}", r"'x\x1b[2J'"):
        assert culprit in record.message


def test_folders_without_anything_else_say_nothing(written, caplog):
    for folder in written.values():
        load_hf.open_checkpoint(folder)
    assert not caplog.records


# model.safetensors beside an index


@pytest.fixture
def both(sharded) -> Path:
    """Make a folder whose single file holds new sinks; its index and shards are old."""
    tensors = {}
    for path in sharded.glob("*.safetensors"):
        tensors |= {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors[SINKS] = tensors[SINKS] + 1
    save_file(tensors, sharded / SINGLE)
    return sharded


@pytest.mark.parametrize("old_shards", ["all", "some", "none"])
def test_a_single_file_counts_whatever_an_index_says(both, old_shards):
    """transformers 5.17 opens the single file too: _get_resolved_checkpoint_files asks for it first."""
    for path in list(both.glob("model-*"))[: {"all": 0, "some": 2, "none": None}[old_shards]]:
        path.unlink()
    theirs, _ = _get_resolved_checkpoint_files(str(both), None, None, None, None, False)
    assert theirs == [str(both / SINGLE)]
    checkpoint = load_hf.open_checkpoint(both)
    assert checkpoint.shards.keys() == {SINGLE}
    assert torch.equal(checkpoint.tensor(SINKS), SMALL_RANDOM.tensor(SINKS) + 1)


@pytest.mark.parametrize("damage", ["truncated", "link to nothing", "folder"])
def test_a_single_file_that_cannot_be_read_is_not_passed_over_for_old_shards(both, damage):
    if damage == "truncated":
        os.truncate(both / SINGLE, 1000)
    else:
        (both / SINGLE).unlink()
        (both / SINGLE).mkdir() if damage == "folder" else (both / SINGLE).symlink_to("nothing")
    assert_rejected(both, str(both / SINGLE))


# Dtypes that hold the published values too

NORMS = [name for name in expected_tensors(SMALL) if name.endswith("norm.weight")]
BIASES = [name for name in expected_tensors(SMALL) if name.endswith("bias")]
SCALES = [name for name in expected_tensors(SMALL) if name.endswith("_scales")]


@pytest.mark.parametrize("shards", [1, 4])
def test_norms_sinks_and_biases_in_float32(written, tmp_path, shards):
    """Norms and sinks stay as they are; biases are rounded to bfloat16, halves to even, as torch rounds."""
    folder = Path(shutil.copytree(written[shards], tmp_path / "folder"))
    sinks = [name for name in expected_tensors(SMALL) if name.endswith("sinks")]
    values = {}
    for name in (*NORMS, *BIASES, *sinks):
        shape, _ = expected_tensors(SMALL)[name]
        values[name] = torch.rand(shape) + 1 / 3
        values[name].view(-1)[:2] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8])  # halves: to 1 and to 1 + 2**-6
    for path in folder.glob("*.safetensors"):
        change_shard(path, lambda tensors: tensors.update({k: v for k, v in values.items() if k in tensors}))
    checkpoint = load_hf.open_checkpoint(folder)
    write_archive(checkpoint, tmp_path / "m.iris")
    archive = open_archive(tmp_path / "m.iris", verify=True)
    for source in (checkpoint, archive):
        for name, tensor in source.tensors():
            if name in BIASES:
                assert torch.equal(tensor, values[name].to(torch.bfloat16)), name
                assert tensor.view(-1)[:2].tolist() == [1.0, 1 + 2**-6]
            elif name in values:
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, values[name]), name
            assert torch.equal(source.tensor(name), tensor)
    assert first_difference(archive, checkpoint) is None


@pytest.mark.parametrize("shards", [1, 4])
def test_scales_stored_as_e8m0(written, tmp_path, shards):
    folder = Path(shutil.copytree(written[shards], tmp_path / "folder"))

    def change(tensors):
        for name in SCALES:
            if name in tensors:
                tensors[name] = tensors[name].view(torch.float8_e8m0fnu)

    for path in folder.glob("*.safetensors"):
        change_shard(path, change)
    checkpoint = load_hf.open_checkpoint(folder)
    for name, tensor in checkpoint.tensors():
        assert tensor.dtype == SMALL_RANDOM.tensor(name).dtype
        assert torch.equal(tensor, SMALL_RANDOM.tensor(name)), name
        assert torch.equal(checkpoint.tensor(name), tensor)
    write_archive(checkpoint, tmp_path / "m.iris")
    assert first_difference(open_archive(tmp_path / "m.iris", verify=True), SMALL_RANDOM) is None


# Files that change while they are in use


def overwrite(path: Path, keep_times: bool) -> None:
    """Write other weights in place, perhaps with the old modification time, as some copying programs leave it."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(before.st_size - 64)
        file.write(b"x" * 64)
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("how", ["written to", "written to, times kept", "replaced"])
@pytest.mark.parametrize("shards", [1, 4])
def test_a_shard_that_changes_while_it_is_loaded(written, tmp_path, shards, how):
    folder = Path(shutil.copytree(written[shards], tmp_path / "folder"))
    checkpoint = load_hf.open_checkpoint(folder)
    tensors = checkpoint.tensors()
    next(tensors)
    checkpoint.check_unchanged()
    path = sorted(folder.glob("*.safetensors"))[-1]
    if how == "replaced":
        (folder / "new").write_bytes(path.read_bytes())
        (folder / "new").replace(path)
    else:
        overwrite(path, "kept" in how)
    for use in (lambda: list(tensors), checkpoint.check_unchanged, lambda: load_all(checkpoint)):
        with pytest.raises(InputError, match=f"{path}: was changed while it was in use"):
            use()
    with pytest.raises(InputError, match="was changed"):
        write_archive(checkpoint, tmp_path / "m.iris")
    assert not list(tmp_path.glob("m.iris*"))
    with pytest.raises(InputError, match="was changed"):
        Reference(checkpoint).forward([1])


def load_all(checkpoint) -> None:
    device = torch.device("cpu")
    load_weights(checkpoint, checkpoint.config, device, tuning_for(device, checkpoint.config))


# Git LFS, and paths that are none

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4792272488\n"


@pytest.mark.parametrize(
    ("shards", "name"),
    [(1, SINGLE), (4, INDEX), (4, "model-00002-of-00004.safetensors"), (1, "config.json")]
    + [(1, "generation_config.json")],
)
def test_git_lfs_pointers(written, tmp_path, shards, name):
    folder = Path(shutil.copytree(written[shards], tmp_path / "folder"))
    (folder / name).write_bytes(LFS_POINTER)
    assert_rejected(folder, f"{folder / name}: is a Git LFS pointer", "git lfs pull")


def test_an_empty_path_is_not_this_folder(written, monkeypatch):
    monkeypatch.chdir(written[1])
    assert_rejected("", "model is ''")


@pytest.mark.parametrize("model", [None, b"folder", 3, ["folder"], torch.zeros(1)])
def test_what_is_no_path(model):
    with pytest.raises(TypeError, match="model is .*: a str or a Path is expected"):
        load_hf.open_checkpoint(model)


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_folders_that_may_not_be_read(cache, written):
    snapshot = add_snapshot(cache, written[1], "c1", main=True)
    for folder in (snapshot, snapshot.parent, cache):
        folder.chmod(0)
        try:
            assert_rejected(REPO, "Permission denied")
        finally:
            folder.chmod(0o700)


# Bad shards


def test_missing_shard(sharded):
    shard = shard_of(sharded, SINKS)
    shard.unlink()
    assert_rejected(sharded, shard.name, "no such file")


def test_shard_that_is_a_folder(sharded):
    shard = shard_of(sharded, SINKS)
    shard.unlink()
    shard.mkdir()
    assert_rejected(sharded, shard.name)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_shard(sharded, kept):
    shard = shard_of(sharded, SINKS)
    shard.write_bytes(shard.read_bytes()[:kept])
    assert_rejected(sharded, shard.name)


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"[]", b'{"a": 3}', b'{"a":{"dtype":"Q7","shape":[1],"data_offsets":[0,1]}}', b"\xff" * 16]
    + [
        b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,1]}}',
    ],
)
def test_corrupt_header(sharded, header):
    shard = shard_of(sharded, SINKS)
    shard.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    assert_rejected(sharded, shard.name)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 0])
def test_header_of_a_false_length(sharded, length):
    shard = shard_of(sharded, SINKS)
    shard.write_bytes(struct.pack("<Q", length) + shard.read_bytes()[8:])
    assert_rejected(sharded, shard.name)


@pytest.mark.parametrize("name", ["extra", "model.layers.3.self_attn.sinks", "x\ny"])
def test_single_file_with_an_unknown_tensor(single, name):
    change_shard(single / SINGLE, lambda tensors: tensors.update({name: torch.zeros(4)}))
    assert_rejected(single, SINGLE, f"unknown tensor {name!r}")


@pytest.mark.parametrize("name", list(expected_tensors(SMALL.cut(1))))
def test_single_file_that_lacks_a_tensor(single, name):
    change_shard(single / SINGLE, lambda tensors: tensors.pop(name))
    assert_rejected(single, SINGLE, f"tensor {name} is missing")


@pytest.mark.parametrize("name", list(expected_tensors(SMALL.cut(1))))
def test_tensor_of_another_shape(single, name):
    change_shard(single / SINGLE, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    shape, dtype = expected_tensors(SMALL)[name]
    found = f"{dtype} {[shape[0] - 1, *shape[1:]]}"
    assert_rejected(single, SINGLE, f"tensor {name} is {found}, expected {dtype} {list(shape)}")


def test_transposed_tensor(single):
    name = "model.layers.0.self_attn.k_proj.weight"
    change_shard(single / SINGLE, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    assert_rejected(single, f"tensor {name} is BF16 [64, 32], expected BF16 [32, 64]")


@pytest.mark.parametrize(
    ("dtype", "spelling"), [(torch.float32, "F32"), (torch.float16, "F16"), (torch.uint8, "U8"), (torch.int8, "I8")]
)
@pytest.mark.parametrize("name", [SINKS, "lm_head.weight", "model.layers.2.mlp.experts.down_proj_scales"])
def test_tensor_of_another_dtype(single, name, dtype, spelling):
    shape, expected = expected_tensors(SMALL)[name]
    change_shard(single / SINGLE, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    if spelling == expected or (name, spelling) == (SINKS, "F32"):
        load_hf.open_checkpoint(single)
    else:
        assert_rejected(single, f"tensor {name} is {spelling} {list(shape)}, expected {expected} {list(shape)}")


def test_layers_that_are_cut_off_are_not_checked(single):
    name = "model.layers.2.self_attn.sinks"
    change_shard(single / SINGLE, lambda tensors: tensors.update({name: tensors[name].half()}))
    assert_rejected(single, name)
    load_hf.open_checkpoint(single, n_layers=2)


# Random damage

ONE_LAYER = SMALL.cut(1)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory) -> Path:
    """A folder whose files the tests below damage."""
    return write_checkpoint(RandomCheckpoint(ONE_LAYER), tmp_path_factory.mktemp("damaged") / "folder", 2)


def read_all(folder: Path) -> None:
    for name, tensor in load_hf.open_checkpoint(folder).tensors():
        assert list(tensor.shape) == list(expected_tensors(ONE_LAYER)[name][0])
        tensor.view(torch.uint8).max()


def only_input_errors(folder: Path, name: str, content: bytes) -> None:
    """Assert that reading succeeds or raises an InputError of one line, whatever the file holds."""
    original = (folder / name).read_bytes()
    try:
        (folder / name).write_bytes(content)
        read_all(folder)
    except InputError as error:
        assert str(error).isprintable()
    finally:
        (folder / name).write_bytes(original)


FUZZ = settings(
    max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
SHARD_1 = "model-00001-of-00002.safetensors"
FILES = st.sampled_from([SHARD_1, INDEX, "config.json"])


@FUZZ
@given(name=FILES, fraction=st.floats(0, 1), in_header=st.booleans())
@example(SHARD_1, 1.0, False)
def test_random_truncation(damaged, name, fraction, in_header):
    content = (damaged / name).read_bytes()
    limit = min(len(content), 3000) if in_header else len(content)
    only_input_errors(damaged, name, content[: int(fraction * limit)])


@FUZZ
@given(
    name=FILES,
    edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4),
)
def test_random_edits(damaged, name, edits):
    """Some bytes, mostly of the header, are replaced by others; the length may change."""
    content = bytearray((damaged / name).read_bytes())
    for fraction, new, removed in edits:
        at = int(fraction * min(len(content), 3000))
        content[at : at + removed] = new
    only_input_errors(damaged, name, bytes(content))


JSON_TEXT = st.sampled_from(
    ["0", "-1", "1", "18446744073709551615", "1e400", "NaN", "null", "true", "[]", "{}", '""', '"U8"', '"F32"', '"F4"']
)


@FUZZ
@given(name=FILES, position=st.integers(0, 400), new=JSON_TEXT)
def test_random_values(damaged, name, position, new):
    """One value of a JSON text is replaced by another, perhaps of another type; the header's length is kept right."""
    content = (damaged / name).read_bytes()
    is_shard = name == SHARD_1
    start, end = (8, 8 + struct.unpack("<Q", content[:8])[0]) if is_shard else (0, len(content))
    text = content[start:end].decode()
    values = list(json_values(text))
    begin, stop = values[position % len(values)]
    changed = (text[:begin] + new + text[stop:]).encode()
    length = struct.pack("<Q", len(changed)) if is_shard else b""
    only_input_errors(damaged, name, length + changed + content[end:])


def json_values(text: str) -> Iterator[tuple[int, int]]:
    """Return (start, end) of each value in a JSON text: numbers, strings, true, false, null and lists of numbers."""
    for match in re.finditer(r'(?<=[:\[,])\s*("[^"]*"|[\d.e+-]+|true|false|null)(?=\s*[,\]}])|\[[\d,\s]+\]', text):
        yield match.span()


# The hub

REPO = "some-org/small.model"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """Make the hub's cache empty and the network unreachable."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(load_hf, "snapshot_download", lambda *_, **__: pytest.fail("asked the network"))
    return folder


def add_snapshot(cache: Path, source: Path, commit: str, main: bool = False) -> Path:
    repo = cache / "models--some-org--small.model"
    snapshot = Path(shutil.copytree(source, repo / "snapshots" / commit))
    (snapshot / "tokenizer.json").write_text("{}")
    if main:
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
    return snapshot


def test_cached_snapshot_is_used_without_the_network(cache, written):
    snapshot = add_snapshot(cache, written[4], "c1", main=True)
    assert load_hf.resolve(REPO) == snapshot
    checkpoint = load_hf.open_checkpoint(REPO)
    assert checkpoint.name == REPO
    assert checkpoint.folder == snapshot


def test_snapshot_of_main_goes_before_others(cache, written):
    main = add_snapshot(cache, written[1], "c2", main=True)
    add_snapshot(cache, written[1], "c1")
    add_snapshot(cache, written[1], "c3")
    assert load_hf.resolve(REPO) == main


@pytest.mark.parametrize("lacking", ["config.json", "tokenizer.json", INDEX, "model-00003-of-00004.safetensors"])
def test_incomplete_snapshot_is_passed_over(cache, written, lacking):
    (add_snapshot(cache, written[4], "c1", main=True) / lacking).unlink()
    complete = add_snapshot(cache, written[4], "c2")
    assert load_hf.resolve(REPO) == complete


def test_damaged_cache_is_passed_over(cache, written):
    complete = add_snapshot(cache, written[4], "c1")
    dangling = add_snapshot(cache, written[1], "c2")
    (dangling / SINGLE).unlink()
    (dangling / SINGLE).symlink_to("no-blob")
    broken = add_snapshot(cache, written[4], "c3", main=True)
    (broken / INDEX).write_text("{")
    assert load_hf.resolve(REPO) == complete


@pytest.mark.parametrize("shards, shard", [(1, SINGLE), (4, "model-00003-of-00004.safetensors")])
def test_snapshot_with_a_shard_cut_short_is_passed_over(cache, written, shards, shard):
    cut = add_snapshot(cache, written[shards], "c1", main=True) / shard
    os.truncate(cut, cut.stat().st_size - 1)
    assert_rejected(REPO, str(cut))  # rather than a word about the network
    whole = add_snapshot(cache, written[shards], "c2")
    assert load_hf.resolve(REPO) == whole


def test_folder_of_a_repository_in_the_cache(cache, written):
    snapshot = add_snapshot(cache, written[4], "c1")
    (add_snapshot(cache, written[4], "c2", main=True) / "config.json").unlink()
    repo = snapshot.parent.parent
    assert load_hf.resolve(repo) == load_hf.resolve(str(repo)) == snapshot
    (snapshot / "config.json").unlink()
    assert_rejected(repo, str(repo), "config.json")


def test_newest_snapshot_is_taken_where_none_is_main(cache, written):
    snapshots = [add_snapshot(cache, written[1], commit, main=True) for commit in ("c1", "c2", "c3")]
    for snapshot, seconds in zip(snapshots, (1000, 3000, 2000), strict=True):
        os.utime(snapshot, (seconds, seconds))
    (cache / "models--some-org--small.model" / "refs" / "main").write_bytes(b"\xff\n")
    assert load_hf.resolve(REPO) == snapshots[1]


class Hub(http.server.ThreadingHTTPServer):
    """The part of the hub's protocol that a download uses; `files` is the content of its one repository."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self, files: dict[str, bytes], failure: tuple[int, str] | None = None):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files, self.failure, self.sent = files, failure, []
        self.dripping, self.pause = None, 0.0  # what comes a byte at a time; seconds before an answer

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self):
        self._answer(with_body=True)

    def do_HEAD(self):
        self._answer(with_body=False)

    def log_message(self, *_):
        pass

    def _answer(self, with_body: bool) -> None:
        path = self.path.split("?")[0]
        files, failure = self.server.files, self.server.failure
        resolve = f"/{REPO}/resolve/{Hub.COMMIT}/"
        if failure:
            self._send(failure[0], b"{}", {"X-Error-Code": failure[1], "X-Error-Message": "said by the hub"}, with_body)
        elif path == f"/api/models/{REPO}/revision/main":
            info = {"id": REPO, "sha": Hub.COMMIT, "siblings": [{"rfilename": name} for name in files]}
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, with_body)
        elif path == f"/api/models/{REPO}/tree/{Hub.COMMIT}":
            tree = [
                {"type": "file", "path": k, "size": len(v), "oid": f"oid-{k}".replace("/", "-")}
                for k, v in files.items()
            ]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"}, with_body)
        elif path.startswith(resolve) and path.removeprefix(resolve) in files:
            name = path.removeprefix(resolve)
            if with_body:
                self.server.sent.append(name)
            tag = f'"oid-{name}"'.replace("/", "-")
            self._send(200, files[name], {"X-Repo-Commit": Hub.COMMIT, "ETag": tag}, with_body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        dripping = self.server.dripping
        time.sleep(self.server.pause)
        if dripping == "headers":
            self._drip(b"HTTP/1.1 200 OK\r\nX-Padding: " + b"x" * 1000)
            return
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body and dripping == self._part():
            self._drip(body)
        elif with_body:
            self.wfile.write(body)

    def _part(self) -> str:
        path = self.path.split("?")[0]
        return "info" if path.endswith("/revision/main") else "tree" if "/tree/" in path else path.rpartition("/")[2]

    def _drip(self, data: bytes) -> None:
        try:
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
        except OSError:
            pass  # hung up


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Return serve(files), which starts a hub that the hub client talks to, with an empty cache."""
    hubs = []

    def start(files: dict[str, bytes], failure: tuple[int, str] | None = None) -> Hub:
        hub = Hub(files, failure)
        hubs.append(hub)
        threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        return hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield start
    for hub in hubs:
        hub.shutdown()
        hub.server_close()


def repository(folder: Path, **others: bytes) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {"tokenizer.json": b"{}", "README.md": b"read"} | others


def test_download_fetches_what_is_needed_and_nothing_else(serve, written):
    unneeded = {"original/model.safetensors": b"o", "metal/model.bin": b"m", "model-extra.safetensors": b"x"}
    hub = serve(repository(written[4], **unneeded))
    checkpoint = load_hf.open_checkpoint(REPO)
    for name, tensor in checkpoint.tensors():
        assert torch.equal(tensor, SMALL_RANDOM.tensor(name)), name
    shards = [path.name for path in written[4].glob("*.safetensors")]
    assert sorted(hub.sent) == sorted([*shards, INDEX, "config.json", "tokenizer.json"])
    assert load_hf.resolve(REPO) == checkpoint.folder
    assert len(hub.sent) == len(shards) + 3, "the second time went to the network"


def test_download_of_a_single_file(serve, written):
    serve(repository(written[1], **{"original/model.safetensors": b"o"}))
    assert len(list(load_hf.open_checkpoint(REPO).tensors())) == len(expected_tensors(SMALL))


@pytest.mark.parametrize("old_shards", [True, False])
def test_download_of_a_single_file_beside_an_old_index(serve, written, old_shards):
    files = repository(written[4]) if old_shards else {INDEX: (written[4] / INDEX).read_bytes()}
    hub = serve(files | repository(written[1]))
    assert load_hf.open_checkpoint(REPO).shards.keys() == {SINGLE}
    assert not any(name.startswith("model-") for name in hub.sent)
    sent = len(hub.sent)
    assert load_hf.open_checkpoint(REPO).shards.keys() == {SINGLE}
    assert len(hub.sent) == sent, "the second time went to the network"


def test_interrupted_download_is_completed(serve, written):
    hub = serve(repository(written[4]))
    shard = load_hf.resolve(REPO) / "model-00002-of-00004.safetensors"
    shard.resolve().unlink()
    shard.unlink()
    hub.sent.clear()
    assert len(list(load_hf.open_checkpoint(REPO).tensors())) == len(expected_tensors(SMALL))
    assert hub.sent == [shard.name]


def test_download_of_another_kind_of_model_stops_before_its_weights(serve, written):
    hub = serve(repository(written[1], **{"config.json": b'{"model_type": "llama"}'}))
    assert_rejected(REPO, "config.json", "llama")
    assert SINGLE not in hub.sent


@pytest.mark.parametrize("lacking", ["config.json", "tokenizer.json", "model-00003-of-00004.safetensors"])
def test_repository_that_lacks_a_file(serve, written, lacking):
    files = repository(written[4])
    del files[lacking]
    serve(files)
    assert_rejected(REPO, lacking)


@pytest.mark.parametrize(
    ("status", "code", "culprit"),
    [
        (404, "RepoNotFound", "no such repository"),
        (401, "RepoNotFound", "no such repository"),
        (403, "GatedRepo", "gated"),
        (401, "GatedRepo", "gated"),
        (404, "RevisionNotFound", "hub"),
        (403, "", "hub"),
    ],
)
def test_hub_that_refuses(serve, status, code, culprit):
    serve({}, (status, code))
    assert_rejected(REPO, REPO, culprit)


def test_no_network(serve, monkeypatch):
    hub = serve({})
    hub.shutdown()
    hub.server_close()
    assert_rejected(REPO, REPO, "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_rejected(REPO, REPO, "hub")


def test_hub_that_never_answers(serve, monkeypatch):
    serve({})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(load_hf, "HUB_REPLY_SECONDS", 0.2)
        assert_rejected(REPO, REPO, "timed out")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(slow_network, "REPLY_SECONDS", 0.5)


@pytest.mark.parametrize("part", ["headers", "info", "tree", "config.json", SINGLE])
def test_hub_that_sends_a_byte_now_and_then(serve, written, impatient, part):
    hub = serve(repository(written[1]))
    hub.dripping = part
    start = time.monotonic()
    assert_rejected(REPO, REPO, "too slowly")
    assert time.monotonic() - start < 5


def test_slow_answers_of_a_hub_that_brings_enough(serve, written, impatient):
    """Each answer waits for nearly as long as it may; together they take longer."""
    hub = serve(repository(written[4]))
    hub.pause = 0.2
    load_hf.open_checkpoint(REPO)


def test_wrong_name_without_a_network_is_one_line(serve, monkeypatch):
    def fail(*_args, **_options):
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    serve({})
    monkeypatch.setattr(load_hf.HfApi, "model_info", fail)
    with pytest.raises(
        InputError, match="not in the hub's cache, and the Hugging Face hub cannot be reached"
    ) as caught:
        load_hf.open_checkpoint(REPO)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert len(traceback.format_exception(caught.value)) < 12


@pytest.mark.parametrize("use", [load_hf.open_checkpoint, MegaModel.from_pretrained])
def test_a_wrong_name_in_python_prints_one_traceback(use, serve):
    """It is that of the InputError alone, not also those of the client's layers that could not connect."""
    hub = serve({})
    hub.shutdown()
    hub.server_close()
    for name, reason in ((REPO, "the Hugging Face hub cannot be reached"), ("./no-such", "not a hub id")):
        with pytest.raises(InputError, match=f"no such folder, .*{reason}") as caught:
            use(name)
        printed = "".join(traceback.format_exception(caught.value))
        assert printed.count("Traceback (most recent call last)") == 1
        assert printed.splitlines()[-1].startswith(
            f"system.errors.InputError: {name if name == REPO else repr(name)}: no"
        )


def test_id_that_the_hub_does_not_allow(serve):
    serve({})
    assert_rejected("a--b/c..d", "a--b/c..d")
