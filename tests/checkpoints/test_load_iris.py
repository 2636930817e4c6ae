"""load_iris on good archives of both versions, and on broken and hostile ones, also through the command lines."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import made_up_models
import pytest
import small_model
import torch
from iris_files import (
    BF16,
    BROKEN,
    BROKEN_IDS,
    CONFIG,
    F32,
    GENERATION,
    I32,
    TOKENIZER,
    U8,
    ArchiveBytes,
    Row,
    archive_of,
    config_json,
    header_changes,
    placed_like,
    row_changes,
    row_kinds,
    sized,
    small_config,
)
from small_model import run_script

import convert_to_iris
import gpt_oss_megakernel
import load_iris
from checkpoints.checkpoint import MAX_TOKENIZER_BYTES, Checkpoint, RandomCheckpoint, config_to_dict
from checkpoints.config import GPT_OSS_20B, MAX_JSON_BYTES, PRESETS, DenseFormats, ModelConfig, expected_tensors
from checkpoints.fp8 import QuantizedCheckpoint
from checkpoints.iris_compare import first_difference
from checkpoints.iris_writer import write_archive
from checkpoints.names import LAYER_TENSORS, published_names
from gpt_oss_megakernel import MegaModel
from host.launch import tuning_for
from host.weights import load_weights
from load_iris import IrisArchive, open_archive
from reference import Reference
from system.errors import InputError
from tokenizer_util import Tokenizer
from tools import fuzz_iris

ROOT = Path(__file__).parents[2]
SMALL = small_config()
CHECKPOINT = RandomCheckpoint(SMALL)
DOCUMENTS = {
    CONFIG: config_json(CHECKPOINT),
    GENERATION: b'{"eos_token_id": [99, 7]}',
    TOKENIZER: small_model.byte_tokenizer().to_str().encode(),
}
NAMES = list(row_kinds(1))
VERSIONS = pytest.mark.parametrize("version", [1, 2])
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module")
def good() -> dict[int, ArchiveBytes]:
    """Version -> archive. Tests must not change it."""
    return {version: archive_of(CHECKPOINT, version, DOCUMENTS) for version in (1, 2)}


def write(archive: ArchiveBytes, folder: Path) -> Path:
    """Write an archive; one of version 1 has its documents beside it."""
    path = folder / "small.iris"
    path.write_bytes(archive.encode())
    if archive.version == 1:
        for name, data in DOCUMENTS.items():
            (folder / name).write_bytes(data)
    return path


def assert_rejected(path: object, *culprits: str, **options) -> None:
    with pytest.raises(InputError) as caught:
        open_archive(path, **options)
    message = str(caught.value)
    assert message.isprintable(), message
    assert all(culprit in message for culprit in culprits), message


def assert_holds(archive: IrisArchive, checkpoint: Checkpoint, config: ModelConfig) -> None:
    assert archive.config == config
    tensors = dict(archive.tensors())
    assert tensors.keys() == expected_tensors(config).keys()
    for name, tensor in tensors.items():
        original = checkpoint.tensor(name)
        if name.endswith(("norm.weight", "sinks")):
            original = original.float()
        assert tensor.dtype == original.dtype, name
        assert torch.equal(tensor, original), name
        assert torch.equal(archive.tensor(name), original), name


# Good archives


@VERSIONS
@pytest.mark.parametrize("as_given", [str, Path])
def test_every_tensor_is_the_checkpoints(good, tmp_path, version, as_given):
    path = write(good[version], tmp_path)
    archive = open_archive(as_given(path))
    assert (archive.name, archive.header.version) == (str(path), version)
    assert_holds(archive, CHECKPOINT, dataclasses.replace(SMALL, stop_ids=(99, 7)))


@pytest.mark.parametrize("changes", made_up_models.ODD_SIZES.values(), ids=made_up_models.ODD_SIZES)
def test_odd_configurations(tmp_path, changes):
    checkpoint = made_up_models.loud_checkpoint(made_up_models.small_config(**changes))
    write_archive(checkpoint, tmp_path / "written.iris")
    assert_holds(open_archive(tmp_path / "written.iris", verify=True), checkpoint, checkpoint.config)
    (tmp_path / "version1.iris").write_bytes(archive_of(checkpoint, 1).encode())
    (tmp_path / CONFIG).write_bytes(config_json(checkpoint))
    assert_holds(open_archive(tmp_path / "version1.iris"), checkpoint, checkpoint.config)


def test_numbers_of_the_configuration_come_back_exactly(tmp_path):
    yarn = dataclasses.replace(SMALL.yarn, theta=1e4 / 3, beta_slow=0.1 + 0.2, truncate=True, attention_factor=1 / 3)
    config = dataclasses.replace(SMALL, rms_norm_eps=1e-6 / 3, swiglu_limit=1 / 7, sliding_window=5, yarn=yarn)
    write_archive(RandomCheckpoint(config), tmp_path / "small.iris")
    assert open_archive(tmp_path / "small.iris").config == config


@VERSIONS
def test_unknown_name_is_a_key_error(good, tmp_path, version):
    archive = open_archive(write(good[version], tmp_path))
    for name in ("model.layers.3.self_attn.sinks", "embed", "L0.sinks", CONFIG, ""):
        with pytest.raises(KeyError):
            archive.tensor(name)


@VERSIONS
def test_tensors_come_in_the_order_of_the_file(good, tmp_path, version):
    archive = good[version].copy()
    random.Random(2).shuffle(archive.rows)
    rows = sorted(archive.rows, key=lambda row: row.offset)
    published = {name: of for name, (of, _) in row_kinds(3).items()}
    expected = [published[row.name.decode()] for row in rows if row.name.decode() in published]
    assert [name for name, _ in open_archive(write(archive, tmp_path)).tensors()] == expected


@VERSIONS
def test_cut_asks_for_the_first_layers_only(good, tmp_path, version):
    path = write(good[version], tmp_path)
    archive = open_archive(path, n_layers=2)
    assert_holds(archive, CHECKPOINT, dataclasses.replace(SMALL, stop_ids=(99, 7)).cut(2))
    with pytest.raises(KeyError):
        archive.tensor("model.layers.2.self_attn.sinks")
    archive.cut(1)
    assert_holds(archive, CHECKPOINT, dataclasses.replace(SMALL, stop_ids=(99, 7)).cut(1))


@VERSIONS
@pytest.mark.parametrize("n_layers", [0, -1, 4])
def test_cut_to_layers_that_are_not_there(good, tmp_path, version, n_layers):
    assert_rejected(write(good[version], tmp_path), f"--layers {n_layers}", n_layers=n_layers)


@VERSIONS
def test_documents(good, tmp_path, version):
    archive = open_archive(write(good[version], tmp_path))
    assert {name: archive.document(name) for name in DOCUMENTS} == DOCUMENTS
    assert Tokenizer.from_checkpoint(archive).encode("ab") == [97, 98]


@VERSIONS
def test_documents_that_are_not_there(tmp_path, version):
    (tmp_path / "small.iris").write_bytes(archive_of(CHECKPOINT, version).encode())
    (tmp_path / CONFIG).write_bytes(config_json(CHECKPOINT))
    archive = open_archive(tmp_path / "small.iris")
    assert archive.config == SMALL
    assert archive.document(TOKENIZER) is archive.document(GENERATION) is None
    assert Tokenizer.from_checkpoint(archive) is None


def test_version_2_needs_nothing_beside_it(good, tmp_path):
    for name in DOCUMENTS:
        (tmp_path / name).write_text("{")
    archive = open_archive(write(good[2], tmp_path))
    assert archive.document(TOKENIZER) == DOCUMENTS[TOKENIZER]


def test_checksums_of_a_good_archive_match(good, tmp_path):
    open_archive(write(good[2], tmp_path), verify=True).verify(show_progress=True)


def test_version_1_has_no_checksums(good, tmp_path):
    assert_rejected(write(good[1], tmp_path), "version 1 holds no checksums", verify=True)


def test_runs_of_tensors_that_follow_each_other(tmp_path):
    write_archive(CHECKPOINT, tmp_path / "small.iris")
    archive = open_archive(tmp_path / "small.iris")
    in_one_piece = 0
    for field in LAYER_TENSORS:
        names = published_names(field, SMALL.n_layers)
        tensors = [archive.tensor(name) for name in names]
        run = archive.contiguous_bytes(names)
        assert (run is not None) == all(tensor.nbytes % 256 == 0 for tensor in tensors[:-1]), field
        if run is not None:
            in_one_piece += 1
            assert torch.equal(run, torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors]))
            assert run.data_ptr() == tensors[0].data_ptr(), "a copy"
            assert archive.contiguous_bytes(names[::-1]) is None
    assert 3 < in_one_piece < len(LAYER_TENSORS)
    alone = archive.contiguous_bytes(["model.norm.weight"])
    assert torch.equal(alone.view(torch.float32), archive.tensor("model.norm.weight"))
    with pytest.raises(KeyError):
        archive.contiguous_bytes(["embed"])


def test_no_run_where_layers_lie_apart(good, tmp_path):
    archive = open_archive(write(good[2], tmp_path))
    assert archive.contiguous_bytes(published_names("gate_up", 3)) is None
    assert archive.contiguous_bytes(published_names("qkv", 1)) is not None


@linux_only
@VERSIONS
def test_tensors_are_views_of_the_mapped_file(good, tmp_path, version):
    path = write(good[version], tmp_path)
    archive = open_archive(path)
    (line,) = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    start, end = (int(part, 16) for part in line.split()[0].split("-"))
    for short, (name, _) in row_kinds(3).items():
        row = good[version].row(short)
        assert archive.tensor(name).data_ptr() == start + row.offset
        assert start + row.end <= end
    assert line.split()[1] == "r--s"
    del archive
    assert str(path) not in Path("/proc/self/maps").read_text()


def status(key: str) -> int:
    """Return a figure of this process from /proc, in bytes."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


@linux_only
def test_iterating_copies_nothing_and_keeps_no_pages(tmp_path):
    checkpoint = RandomCheckpoint(dataclasses.replace(SMALL, vocab_size=300_000))  # two matrices of 38 MB
    write_archive(checkpoint, tmp_path / "large.iris")
    archive = open_archive(tmp_path / "large.iris")
    copied, mapped = status("RssAnon"), status("RssFile")
    for _, tensor in archive.tensors():
        tensor.view(torch.uint8).max()  # reads every byte
        assert status("RssAnon") - copied < 10e6
        assert status("RssFile") - mapped < 50e6
    assert status("RssFile") - mapped < 10e6


# Version 1, which holds no configuration


def write_sparse_preset(config: ModelConfig, path: Path) -> None:
    """Write the header of a published model, version 1, and holes of its size."""
    tensors = expected_tensors(config)
    kinds = row_kinds(config.n_layers)
    end, rows = (16 + 216 * len(kinds) + 4095) // 4096 * 4096, []
    for name, (published, dtype) in kinds.items():
        shape = tensors[published][0]
        n_bytes = torch.Size(shape).numel() * {BF16: 2, F32: 4, U8: 1}[dtype]
        rows.append(Row(name.encode(), end, n_bytes, dtype, shape, len(shape), b""))
        end = (end + n_bytes + 255) // 256 * 256
    path.write_bytes(ArchiveBytes(1, rows, b"", end).header())
    os.truncate(path, rows[-1].end)


@pytest.mark.parametrize(("preset", "n_layers"), [("20b", 1), ("20b", 24), ("120b", 1), ("120b", 36)])
def test_sizes_of_a_published_model_are_enough(tmp_path, preset, n_layers):
    path = tmp_path / "large.iris"
    config = PRESETS[preset].cut(n_layers)
    write_sparse_preset(config, path)
    archive = open_archive(path)
    assert archive.config == config
    last = archive.tensor(f"model.layers.{n_layers - 1}.mlp.experts.down_proj_bias")
    assert last.shape == (config.n_experts, 2880)
    assert last[-1, -1] == 0
    assert open_archive(path, n_layers=1).config == config.cut(1)
    (tmp_path / CONFIG).write_bytes(config_json(CHECKPOINT))
    assert_rejected(path, "embed is bfloat16 [201088, 2880], expected bfloat16 [100, 64]")


def test_sizes_of_no_published_model_need_a_configuration(good, tmp_path):
    (tmp_path / "small.iris").write_bytes(good[1].encode())
    assert_rejected(tmp_path / "small.iris", "holds no configuration", "put the model's config.json beside it")


def test_layers_of_version_1_cut_the_configuration_beside_it(tmp_path):
    (tmp_path / CONFIG).write_bytes(config_json(CHECKPOINT))
    (tmp_path / "small.iris").write_bytes(archive_of(RandomCheckpoint(SMALL.cut(2)), 1).encode())
    assert_holds(open_archive(tmp_path / "small.iris"), CHECKPOINT, SMALL.cut(2))


def test_configuration_beside_version_1_with_fewer_layers(good, tmp_path):
    path = write(good[1], tmp_path)
    (tmp_path / CONFIG).write_bytes(config_json(RandomCheckpoint(SMALL.cut(2))))
    assert_rejected(path, "unknown tensor 'L2.norm_attn'")


def test_layer_of_version_1_that_is_missing(good, tmp_path):
    archive = good[1].copy()
    archive.rows = [row for row in archive.rows if not row.name.startswith(b"L1.")]
    archive.body = bytes(good[1].header_bytes - archive.header_bytes) + archive.body
    assert_rejected(write(archive, tmp_path), "unknown tensor 'L2.norm_attn'")


def test_no_tensor_of_any_layer(good, tmp_path):
    archive = good[1].copy()
    del archive.rows[3:]
    archive.body = bytes(good[1].header_bytes - archive.header_bytes) + archive.body
    path = write(archive, tmp_path)
    assert_rejected(path, "tensor L0.norm_attn is missing")
    (tmp_path / CONFIG).unlink()
    assert_rejected(path, "holds no configuration")


def test_configuration_beside_version_1_that_is_no_file(good, tmp_path):
    path = write(good[1], tmp_path)
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).mkdir()
    assert_rejected(path, CONFIG, "is a directory")
    (tmp_path / CONFIG).rmdir()
    os.mkfifo(tmp_path / CONFIG)
    with time_limit():
        assert_rejected(path, CONFIG, "not a regular file")
    (tmp_path / CONFIG).unlink()
    (tmp_path / CONFIG).write_bytes(b" " * (MAX_JSON_BYTES + 1))
    assert_rejected(path, CONFIG, "at most 1048576 are expected")


# Headers that are broken


@contextlib.contextmanager
def time_limit(seconds: int = 20) -> Iterator[None]:
    """Fail the test instead of waiting for ever."""

    def fail(*_) -> None:
        pytest.fail(f"took longer than {seconds} s")

    former = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@pytest.mark.parametrize(("version", "_what", "change", "culprit"), BROKEN, ids=BROKEN_IDS)
def test_broken_header(good, tmp_path, version, _what, change, culprit):
    archive = good[version].copy()
    change(archive)
    path = write(archive, tmp_path)
    assert_rejected(path, str(path), culprit)
    assert_rejected(path, str(path), culprit, n_layers=1, verify=True)


@VERSIONS
def test_truncation_at_every_boundary(good, tmp_path, version):
    path = write(good[version], tmp_path)
    rows, size = good[version].rows, path.stat().st_size
    boundaries = {16, good[version].header_bytes} | {row.offset for row in rows} | {row.end for row in rows}
    cuts = {boundary + by for boundary in boundaries for by in (-1, 0, 1)}
    cuts |= set(random.Random(4).sample(range(size), 100)) | {0, 8}
    for n_bytes in sorted(cuts, reverse=True):
        if n_bytes < size:
            os.truncate(path, n_bytes)
            assert_rejected(path, str(path))


def test_flipped_bits_of_the_header(good, tmp_path):
    data = bytearray(good[2].encode())
    rng = random.Random(6)
    for at in [*range(32), *rng.sample(range(32, good[2].header_bytes), 300)]:
        bit = 1 << rng.randrange(8)
        data[at] ^= bit
        (tmp_path / "small.iris").write_bytes(data)
        assert_rejected(tmp_path / "small.iris")
        data[at] ^= bit


@pytest.mark.parametrize("name", [*NAMES, *DOCUMENTS])
def test_flipped_bit_of_a_blob(good, tmp_path, name):
    row, data = good[2].row(name), good[2].encode()
    for at in (row.offset, row.end - 1, random.Random(name).randrange(row.offset, row.end)):
        path = tmp_path / "small.iris"
        path.write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])
        assert_rejected(path, name, "the checksum does not match", verify=True)
        if name in (CONFIG, GENERATION):
            assert_rejected(path, name, "the checksum does not match")
        else:
            archive = open_archive(path, n_layers=1)
        if name == TOKENIZER:
            with pytest.raises(InputError, match=f"{TOKENIZER}: the checksum does not match"):
                Tokenizer.from_checkpoint(archive)


def test_flipped_bit_of_a_layer_that_is_cut_off(good, tmp_path):
    data, row = bytearray(good[2].encode()), good[2].row("L2.sinks")
    data[row.offset] ^= 1
    (tmp_path / "small.iris").write_bytes(data)
    open_archive(tmp_path / "small.iris", n_layers=1)
    assert_rejected(tmp_path / "small.iris", "tensor L2.sinks: the checksum does not match", n_layers=1, verify=True)


def test_wrong_checksum_in_a_header_that_is_whole(good, tmp_path):
    archive = good[2].copy()
    archive.row("L1.w_o").digest = bytes(32)
    path = write(archive, tmp_path)
    open_archive(path)
    assert_rejected(path, "tensor L1.w_o: the checksum does not match", verify=True)


# Tensors that are not those of the configuration


@VERSIONS
@pytest.mark.parametrize("name", NAMES)
def test_missing_tensor(good, tmp_path, version, name):
    archive = good[version].copy()
    archive.rows.remove(archive.row(name))
    archive.body = bytes(good[version].header_bytes - archive.header_bytes) + archive.body
    assert_rejected(write(archive, tmp_path), f"tensor {name} is missing")


@VERSIONS
@pytest.mark.parametrize("name", NAMES)
def test_tensor_of_another_shape(good, tmp_path, version, name):
    archive = good[version].copy()
    row = archive.row(name)
    rows, *rest = row.shape
    row.n_bytes -= row.n_bytes // rows
    row.shape = (rows - 1, *rest)
    dtype = ("bfloat16", "float32", "uint8")[row.dtype]
    expected = f"tensor {name} is {dtype} {[rows - 1, *rest]}, expected {dtype} {[rows, *rest]}"
    assert_rejected(write(archive, tmp_path), expected)


@VERSIONS
@pytest.mark.parametrize("name", NAMES)
def test_tensor_of_another_shape_of_the_same_size(good, tmp_path, version, name):
    """The shape is transposed, or has one dimension more."""
    archive = good[version].copy()
    row = archive.row(name)
    row.shape = row.shape[::-1] if len(set(row.shape)) > 1 else (1, *row.shape)
    row.n_dims = len(row.shape)
    assert_rejected(write(archive, tmp_path), f"tensor {name} is", str(list(row.shape)), "expected")


@VERSIONS
@pytest.mark.parametrize("name", NAMES)
def test_tensor_of_another_dtype(good, tmp_path, version, name):
    """The dtype is another one of equal size, or one of twice the size for half as many values."""
    archive = good[version].copy()
    row = archive.row(name)
    spelled = {F32: "int32", BF16: "float32", U8: "bfloat16"}[row.dtype]
    *rest, last = row.shape
    if row.dtype == F32:
        row.dtype = I32
    elif last % 2:
        row.shape, row.dtype, row.n_dims = (row.n_bytes // 2,), BF16, 1
    else:
        row.shape, row.dtype = (*rest, last // 2), {BF16: F32, U8: BF16}[row.dtype]
    assert_rejected(write(archive, tmp_path), f"tensor {name} is {spelled} {list(row.shape)}, expected")


def test_norms_and_sinks_as_bfloat16(tmp_path, good):
    archive = good[2].copy()
    for name in ("final_norm", "L0.sinks"):
        row = archive.row(name)
        row.dtype, row.n_bytes = BF16, row.n_bytes // 2
    assert_rejected(write(archive, tmp_path), "tensor final_norm is bfloat16 [64], expected float32 [64]")


@VERSIONS
@pytest.mark.parametrize(
    "name", ["L3.sinks", "L00.sinks", "L-1.sinks", "l0.sinks", "L٢.sinks", "L0.w_k ", "sinks", "model.norm.weight"]
)
def test_unknown_tensor(good, tmp_path, version, name):
    """An unknown tensor replaces an expected one, or is one too many."""
    archive = good[version].copy()
    archive.row("L2.sinks").name = name.encode()
    assert_rejected(write(archive, tmp_path), f"unknown tensor {name!r}")
    archive = good[version].copy()
    archive.rows.append(Row(name.encode(), archive.header_bytes, 0, U8, (0,), 1, bytes(32)))
    assert archive.header_bytes == good[version].header_bytes
    assert_rejected(write(archive, tmp_path), f"unknown tensor {name!r}")


def test_documents_of_another_kind(good, tmp_path):
    for name in DOCUMENTS:
        archive = good[2].copy()
        row = archive.row(name)
        row.shape, row.n_dims = (1, row.n_bytes), 2
        assert_rejected(write(archive, tmp_path), f"{name} is uint8 [1, {row.n_bytes}], expected uint8 [{row.n_bytes}]")
    archive.row(TOKENIZER).name = b"README.md"
    assert_rejected(write(archive, tmp_path), "unknown tensor 'README.md'")


def test_version_1_holds_no_documents(good, tmp_path):
    archive = good[1].copy()
    archive.rows.append(Row(TOKENIZER.encode(), archive.header_bytes, 0, U8, (0,), 1, b""))
    assert_rejected(write(archive, tmp_path), "unknown tensor 'tokenizer.json'")


# Documents that are hostile


def test_no_configuration(good, tmp_path):
    archive = good[2].copy()
    archive.rows.remove(archive.row(CONFIG))
    assert_rejected(write(archive, tmp_path), "holds no config.json")


@pytest.mark.parametrize("name", [CONFIG, GENERATION])
@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"3", b"null", b'"x"', b"{}{}", b"\xff{}", b"\0", b'{"a": "\xff"}', "{}".encode("utf-16")]
    + [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"model_type":' + b"1" * 5000 + b"}", b"\xef\xbb\xbf{}"],
    ids=lambda data: str(data[:12]),
)
def test_document_that_is_no_json_object(tmp_path, name, data):
    documents = {CONFIG: DOCUMENTS[CONFIG], name: data}
    path = write(archive_of(CHECKPOINT, 2, documents), tmp_path)
    assert_rejected(path, str(path), name)


HOSTILE_VALUES = ("null", "true", "-1", "0", "1.5", "2147483648", "9" * 4000, "1e999", "NaN", '""', '"\\ud800\\n"')
HOSTILE_VALUES += ("[]", "{}", "[" * 950 + "]" * 950, '{"":' * 900 + "0" + "}" * 900)
# Of what these say, other values may be right.
FREE_KEYS = {"architectures", "eos_token_id", "layer_types", "max_position_embeddings", "rms_norm_eps"}
FREE_KEYS |= {"sliding_window", "swiglu_limit", "attention_bias", "hidden_act", "tie_word_embeddings"}


@pytest.mark.parametrize("key", config_to_dict(SMALL))
def test_configuration_with_a_hostile_value(tmp_path, key):
    for value in HOSTILE_VALUES:
        text = json.dumps(config_to_dict(SMALL) | {key: "HERE"}).replace('"HERE"', value)
        path = write(archive_of(RandomCheckpoint(SMALL.cut(1)), 2, {CONFIG: text.encode()}), tmp_path)
        assert_rejected(path, str(path))  # if by nothing else, by its two layers too few


@pytest.mark.parametrize("key", sorted(config_to_dict(SMALL).keys() - FREE_KEYS))
def test_configuration_without_a_key(tmp_path, key):
    config = config_to_dict(SMALL)
    del config[key]
    path = write(archive_of(CHECKPOINT, 2, {CONFIG: json.dumps(config).encode()}), tmp_path)
    assert_rejected(path, CONFIG, key.partition("_")[0])


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"num_hidden_layers": 4, "layer_types": None}, "tensor L3.norm_attn is missing"),
        ({"num_hidden_layers": 1024, "layer_types": None}, "tensor L3.norm_attn is missing"),
        ({"num_hidden_layers": 1025, "layer_types": None}, "at most 1024 are supported"),
        ({"num_hidden_layers": 2, "layer_types": None}, "unknown tensor 'L2.norm_attn'"),
        ({"hidden_size": 96}, "tensor embed is bfloat16 [100, 64], expected bfloat16 [100, 96]"),
        ({"hidden_size": 2147483616, "vocab_size": 2147483647}, "expected bfloat16 [2147483647, 2147483616]"),
        ({"intermediate_size": 64}, "tensor L0.gate_up_blocks is uint8 [4, 64, 2, 16], expected uint8 [4, 128, 2, 16]"),
        ({"num_attention_heads": 8}, "tensor L0.w_q is bfloat16 [64, 64], expected bfloat16 [128, 64]"),
        ({"num_key_value_heads": 1}, "tensor L0.w_k is bfloat16 [32, 64], expected bfloat16 [16, 64]"),
        ({"num_local_experts": 5}, "tensor L0.router_w is bfloat16 [4, 64], expected bfloat16 [5, 64]"),
        ({"vocab_size": 101}, "tensor embed is"),
        ({"head_dim": 32}, "tensor L0.w_q is"),
    ],
    ids=str,
)
def test_configuration_of_another_model(tmp_path, change, culprit):
    assert_rejected(write(archive_of(CHECKPOINT, 2, {CONFIG: config_json(CHECKPOINT, **change)}), tmp_path), culprit)


@pytest.mark.parametrize("name", [CONFIG, GENERATION])
def test_largest_document_and_one_byte_more(tmp_path, name):
    documents = {CONFIG: DOCUMENTS[CONFIG], GENERATION: b"{}"}
    documents[name] = documents[name].ljust(MAX_JSON_BYTES)
    open_archive(write(archive_of(CHECKPOINT, 2, documents), tmp_path))
    documents[name] += b" "
    path = write(archive_of(CHECKPOINT, 2, documents), tmp_path)
    assert_rejected(path, f"{name} has 1048577 bytes, at most 1048576 are expected")


def test_tokenizer_that_is_too_large(good, tmp_path):
    """The tokenizer is a hole in the file and is not read."""
    archive = good[2].copy()
    archive.row(TOKENIZER).offset = archive.header_bytes + len(archive.body) + -len(archive.body) % 256
    row = archive.row(TOKENIZER)
    row.n_bytes = MAX_TOKENIZER_BYTES + 1
    row.shape = (row.n_bytes,)
    archive.file_bytes = row.end
    path = write(archive, tmp_path)
    os.truncate(path, row.end)
    opened = open_archive(path)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="tokenizer.json has 67108865 bytes, at most 67108864 are expected"):
            Tokenizer.from_checkpoint(opened)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@VERSIONS
@pytest.mark.parametrize(
    "data", [b"", b"{}", b"null", b"\xff\xfe", b"[" * 100_000, b'{"version":"9"}', b'{"model":{"type":"BPE"}}']
)
def test_tokenizer_that_is_none(good, tmp_path, version, data):
    path = write(archive_of(CHECKPOINT, version, DOCUMENTS | {TOKENIZER: data}), tmp_path)
    (tmp_path / TOKENIZER).write_bytes(data)
    archive = open_archive(path)
    with pytest.raises(InputError) as caught:
        Tokenizer.from_checkpoint(archive)
    assert str(caught.value).startswith(str(tmp_path))
    assert f"{TOKENIZER}: not a tokenizer file" in str(caught.value)
    assert str(caught.value).isprintable()


# What is no file


def make_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo.iris")
    return folder / "fifo.iris"


def make_socket(folder: Path) -> Path:
    os.mknod(folder / "socket.iris", stat.S_IFSOCK | 0o600)
    return folder / "socket.iris"


def make_link(target: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "link.iris").symlink_to(target)
        return folder / "link.iris"

    return make


def make_empty(folder: Path) -> Path:
    (folder / "empty.iris").touch()
    return folder / "empty.iris"


NO_ARCHIVES = {
    "an empty file": (make_empty, "is empty"),
    "a directory": (lambda folder: folder, "is a directory"),
    "a FIFO": (make_fifo, "is not a regular file"),
    "a socket": (make_socket, "o such device or address"),
    "a device": (make_link("/dev/zero"), "is not a regular file"),
    "a link to nothing": (make_link("nowhere"), "No such file"),
    "a link to itself": (make_link("link.iris"), "ymbolic link"),
    "a file of /proc": (make_link("/proc/self/status"), "is not an .iris archive"),
    "memory": (make_link("/proc/self/mem"), "nput/output error"),
    "nothing": (lambda folder: folder / "none.iris", "No such file"),
    "a name that is too long": (lambda folder: folder / ("x" * 300), "name too long"),
    "a file as a folder": (lambda folder: make_empty(folder) / "small.iris", "Not a directory"),
}


@pytest.mark.parametrize(("make", "culprit"), NO_ARCHIVES.values(), ids=NO_ARCHIVES)
def test_what_is_no_archive(tmp_path, make, culprit):
    with time_limit():
        path = make(tmp_path)
        assert_rejected(path, str(path), culprit)


def test_link_to_an_archive(good, tmp_path):
    """An archive of version 1 has its configuration beside the link."""
    for version in (1, 2):
        (tmp_path / f"{version}").mkdir()
        link = write(good[version], tmp_path / f"{version}")
        link.rename(tmp_path / f"blob{version}")
        link.symlink_to(tmp_path / f"blob{version}")
        assert open_archive(link).config.n_layers == 3


# What must not be allocated


HUGE = {
    "4 billion tensors": header_changes(count=2**32 - 1),
    "as many tensors as there may be": header_changes(count=19462),
    "a terabyte": sized(-1, 2**40),
    "a terabyte of configuration": sized(0, 2**40),
    "a terabyte of configuration, the file's size": lambda archive: (
        sized(0, 2**40)(archive),
        header_changes(file_bytes=2**41)(archive),
    ),
    "sizes of 2**64": row_changes(-1, shape=(2**64 - 1,) * 8, n_dims=8),
    "a large file": header_changes(file_bytes=2**64 - 1),
    "all in one place": placed_like(-1, 0),
}


def write_huge(good: dict[int, ArchiveBytes], folder: Path) -> list[Path]:
    """Write small files that claim to be large, and a hole of 13 GB, which can only be mapped."""
    paths = []
    for version in (1, 2):
        for what, change in HUGE.items():
            archive = good[version].copy()
            change(archive)
            paths.append(folder / f"{version} {what}.iris")
            paths[-1].write_bytes(archive.encode())
    config = {"hidden_size": 2**31 - 32, "vocab_size": 2**31 - 1, "num_hidden_layers": 1024, "layer_types": None}
    paths.append(folder / "configuration.iris")
    paths[-1].write_bytes(archive_of(CHECKPOINT, 2, {CONFIG: config_json(CHECKPOINT, **config)}).encode())
    return paths


def test_small_files_cost_little_memory(good, tmp_path):
    paths = write_huge(good, tmp_path)
    for path in paths:
        tracemalloc.start()
        with contextlib.suppress(InputError):
            open_archive(path)
            assert path.name == "1 a large file.iris"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # A configuration may ask for 1024 layers, whose names and shapes are listed before they are compared.
        assert peak < (20e6 if path.name == "configuration.iris" else 1e6), path.name


LIMITED = """
import resource, sys
from system.errors import InputError
from load_iris import open_archive
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (48 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        open_archive(path)
        print("accepted")
    except InputError as error:
        print(error)
"""


@linux_only
def test_little_memory_is_enough_to_refuse(good, tmp_path):
    paths = write_huge(good, tmp_path)
    (tmp_path / "hole").mkdir()
    paths.append(tmp_path / "hole" / "20b.iris")
    write_sparse_preset(GPT_OSS_20B, paths[-1])
    done = run_python(LIMITED, *paths)
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert len(lines) == len(paths) - 1
    assert all(str(path) in line or line == "accepted" for path, line in zip(paths, lines))
    assert lines.count("accepted") == 0
    assert last.startswith(f"{paths[-1]}: cannot be mapped")


def run_python(script: str, *words: object, timeout: float = 60) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)


# Files that shrink


@pytest.mark.parametrize("left", [0, 1, -1])
@VERSIONS
def test_file_cut_short_before_it_is_mapped(good, tmp_path, monkeypatch, version, left):
    path = write(good[version], tmp_path)
    check = load_iris._check_tensors

    def check_and_cut(*args) -> None:
        check(*args)
        os.truncate(path, left if left >= 0 else path.stat().st_size - 1)

    monkeypatch.setattr(load_iris, "_check_tensors", check_and_cut)
    assert_rejected(path, str(path), "cannot be mapped")


def test_file_cut_short_behind_its_header(good, tmp_path, monkeypatch):
    path = write(good[2], tmp_path)
    parse = load_iris.read_header

    def parse_and_cut(*args) -> object:
        header = parse(*args)
        os.truncate(path, good[2].header_bytes + 10)
        return header

    monkeypatch.setattr(load_iris, "read_header", parse_and_cut)
    assert_rejected(path, f"{CONFIG}: the checksum does not match")


@VERSIONS
def test_file_cut_short_within_its_header(good, tmp_path, monkeypatch, version):
    path = write(good[version], tmp_path)
    pread = os.pread

    def pread_and_cut(descriptor: int, n_bytes: int, offset: int) -> bytes:
        data = pread(descriptor, n_bytes, offset)
        os.truncate(path, 5000)
        return data

    monkeypatch.setattr(os, "pread", pread_and_cut)
    assert_rejected(path, "ends within its header")


def test_file_cut_short_before_it_is_verified(good, tmp_path):
    path = write(good[2], tmp_path)
    archive = open_archive(path)
    os.truncate(path, good[2].row("L1.w_q").offset)
    with pytest.raises(InputError, match="the checksum does not match"):
        archive.verify()


SHRINKING = """
import hashlib, os, shutil, signal, sys, threading
import torch
from load_iris import open_archive

NAME = "model.embed_tokens.weight"


def in_thread(archive):
    thread = threading.Thread(target=archive.tensor(NAME).sum)
    thread.start()
    thread.join()


READS = {
    "sum": lambda archive: archive.tensor(NAME).float().sum(),
    "all": lambda archive: [tensor.view(torch.uint8).max() for _, tensor in archive.tensors()],
    "numpy": lambda archive: archive.tensor(NAME).view(torch.uint8).numpy().tobytes(),
    "hash": lambda archive: hashlib.sha256(archive.tensor(NAME).view(torch.uint8).numpy()).digest(),
    "product": lambda archive: archive.tensor(NAME) @ archive.tensor(NAME).T[:, :5],
    "thread": in_thread,
}
for what, read in READS.items():
    path = shutil.copy(sys.argv[1], f"{sys.argv[1]}.{what}")
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os.dup2(write_end, 2)
        archive = open_archive(path)
        os.truncate(path, int(sys.argv[2]))
        read(archive)
        os._exit(0)
    os.close(write_end)
    said = open(read_end, "rb").read()
    print(what, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said)
"""


@pytest.mark.parametrize("kept", [0, 20_000])
def test_file_that_shrinks_while_mapped(tmp_path, kept):
    write_archive(RandomCheckpoint(dataclasses.replace(SMALL, vocab_size=20_000)), tmp_path / "small.iris")
    done = run_python(SHRINKING, tmp_path / "small.iris", kept, timeout=150)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        what = line.split()[0]
        message = f"error: {tmp_path}/small.iris.{what}: could not be read on: was it cut short while in use?\n"
        assert line == f"{what} 2 {message.encode()}"


def write_behind(path: Path, keep_times: bool = False) -> None:
    """Change the last weight, perhaps with the old modification time, as some copying programs leave it."""
    before = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGED = "small.iris: was changed while it was in use"


@pytest.mark.parametrize("keep_times", [False, True], ids=["", "times kept"])
def test_file_that_is_written_to_while_it_is_read(tmp_path, keep_times):
    path = tmp_path / "small.iris"
    write_archive(CHECKPOINT, path)
    archive = open_archive(path)
    tensors, device = archive.tensors(), torch.device("cpu")
    next(tensors)
    archive.check_unchanged()
    write_behind(path, keep_times)
    uses = {
        "to the end": lambda: list(tensors),
        "load": lambda: load_weights(archive, archive.config, device, tuning_for(device, archive.config)),
        "convert": lambda: write_archive(QuantizedCheckpoint(archive, DenseFormats()), tmp_path / "copy.iris"),
        "compare": lambda: first_difference(archive, archive),
        "verify": archive.verify,
        "reference": lambda: Reference(archive).forward([1]),
    }
    for name, use in uses.items():
        with pytest.raises(InputError, match="checksum" if name == "verify" else CHANGED):
            use()
    assert not list(tmp_path.glob("copy*"))


@pytest.mark.parametrize("how", ["replaced", "removed", "linked"])
def test_file_whose_name_changes_while_it_is_read_stays_what_it_was(tmp_path, how):
    """The mapping belongs to the file that was opened."""
    path = tmp_path / "small.iris"
    write_archive(CHECKPOINT, path)
    archive = open_archive(path)
    if how == "replaced":
        write_archive(RandomCheckpoint(SMALL, seed=1), path, force=True)
    else:
        path.unlink() if how == "removed" else os.link(path, tmp_path / "link")
    for name, tensor in archive.tensors():
        assert torch.equal(tensor, CHECKPOINT.tensor(name).to(tensor.dtype))


def test_file_that_is_written_to_while_a_model_runs(tmp_path):
    """On a CPU the model's weights are those of the mapped file."""
    path = tmp_path / "small.iris"
    write_archive(small_model.small_checkpoint(), path)
    model = MegaModel.from_pretrained(path, max_context=16, device="cpu")
    tokens = list(model.generate([1, 2], 3))
    assert list(model.generate([1, 2], 3)) == tokens
    running = model.generate([1, 2], 3)
    next(running)
    write_behind(path)
    for use in (lambda: next(running), lambda: next(model.generate([1, 2], 3))):
        with pytest.raises(InputError, match=CHANGED):
            use()


# What belongs to no blob


def gaps_of(archive: IrisArchive) -> list[tuple[int, int]]:
    entries = sorted(archive.header.entries.values(), key=lambda entry: entry.offset)
    return [(entry.end, after.offset) for entry, after in pairwise(entries) if entry.end < after.offset]


@pytest.mark.parametrize("at", [0, -1], ids=["first byte", "last byte"])
@pytest.mark.parametrize("gap", [0, -1], ids=["first gap", "last gap"])
def test_bytes_between_blobs_are_zeros(tmp_path, gap, at, monkeypatch, capsys):
    path = tmp_path / "small.iris"
    write_archive(CHECKPOINT, path)
    start, end = gaps_of(open_archive(path, verify=True))[gap]
    data = bytearray(path.read_bytes())
    assert not any(data[start:end])
    data[(start, end - 1)[at]] = 1
    path.write_bytes(data)
    assert_rejected(path, f"from {start} to {end}", "belong to no tensor")
    result = run_script(convert_to_iris.main, ["--verify", path], monkeypatch, capsys)
    small_model.assert_rejected(result, "belong to no tensor")


def test_a_large_gap_is_looked_at_to_verify(good, tmp_path):
    """A program that moves a blob may leave its bytes behind; only --verify reads them."""
    archive = good[2].copy()
    row = archive.rows[-1]
    at = row.offset - archive.header_bytes
    archive.body += bytes(-len(archive.body) % 256)
    row.offset = archive.header_bytes + len(archive.body)
    archive.body += archive.body[at : at + row.n_bytes]
    archive.file_bytes = row.end
    path = write(archive, tmp_path)
    with pytest.raises(InputError, match="belong to no tensor"):
        open_archive(path).verify()
    archive.body = archive.body[:at] + bytes(len(archive.body) - at - row.n_bytes) + archive.body[-row.n_bytes :]
    open_archive(write(archive, tmp_path), verify=True)


def test_git_lfs_pointer(tmp_path):
    path = tmp_path / "small.iris"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 65\n")
    assert_rejected(path, "small.iris: is a Git LFS pointer", "git lfs pull")


def test_file_that_shrinks_while_a_model_runs(tmp_path):
    path = tmp_path / "small.iris"
    write_archive(small_model.small_checkpoint(), path)
    process = start("gpt_oss_megakernel.py", "--model", path, "--prompt-ids", "1", "--max-new-tokens", "4000")
    assert process.stdout.read(1)
    os.truncate(path, 8192)
    _, err = process.communicate(timeout=60)
    message = f"error: {path}: could not be read on: was it cut short while in use?\n"
    assert (process.returncode, err) == (2, message)


# The command lines


def start(script: str, *words: object) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / script), *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def hostile_file(what: str, good: dict[int, ArchiveBytes], folder: Path) -> Path:
    folder.mkdir()
    if what in NO_ARCHIVES:
        return NO_ARCHIVES[what][0](folder)
    archive = good[2].copy()
    if what == "configuration of many levels":
        archive = archive_of(CHECKPOINT, 2, {CONFIG: b"[" * 100_000})
    elif what == "missing tensor":
        archive.rows.remove(archive.row("L0.sinks"))
    elif what == "another sum":
        archive.zero = 1
    else:
        (change,) = [change for version, broken, change, _ in BROKEN if (version, broken) == (2, what)]
        change(archive)
    return write(archive, folder)


HOSTILE = [
    "an empty file", "a FIFO", "a device", "a link to nothing", "version 3", "4 billion tensors", "name of two lines",
    "name with an escape sequence", "place of another tensor", "end that overflows", "a file that is too short",
    "order 1", "configuration of many levels", "missing tensor",
]  # fmt: skip
COMMANDS = {
    "run": (gpt_oss_megakernel, ["--prompt-ids", "1", "--max-new-tokens", "1", "--model"]),
    "info": (convert_to_iris, ["--info"]),
    "verify": (convert_to_iris, ["--verify"]),
}


@pytest.fixture
def former_signals() -> Iterator[None]:
    """Restore the signal handlers: the scripts take over SIGTERM."""
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)


@pytest.mark.usefixtures("former_signals")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("what", HOSTILE)
def test_command_line_refuses(good, tmp_path, monkeypatch, capsys, command, what):
    script, words = COMMANDS[command]
    path = hostile_file(what, good, tmp_path / "x")
    with time_limit():
        small_model.assert_rejected(run_script(script.main, [*words, path], monkeypatch, capsys), str(path))


@pytest.mark.usefixtures("former_signals")
@pytest.mark.parametrize("command", COMMANDS)
def test_command_line_takes_a_good_archive(tmp_path, monkeypatch, capsys, command):
    write_archive(small_model.small_checkpoint(), tmp_path / "small.iris")
    script, words = COMMANDS[command]
    code, out, err = run_script(script.main, [*words, tmp_path / "small.iris"], monkeypatch, capsys)
    assert code == 0
    assert out
    assert [line[:6] for line in err.splitlines()] == (["[1 pro", "the an"] if command == "run" else [])


@pytest.mark.usefixtures("former_signals")
def test_verify_names_the_tensor_that_is_damaged(good, tmp_path, monkeypatch, capsys):
    path = write(good[2], tmp_path)
    data = bytearray(path.read_bytes())
    data[good[2].row("L1.down_blocks").offset + 3] ^= 64
    path.write_bytes(data)
    result = run_script(convert_to_iris.main, ["--verify", path], monkeypatch, capsys)
    small_model.assert_rejected(result, str(path), "tensor L1.down_blocks: the checksum does not match")


@pytest.mark.parametrize("command", ["run", "verify"])
def test_program_refuses_in_one_line_and_waits_for_nothing(good, tmp_path, command):
    script, words = COMMANDS[command]
    paths = [hostile_file(what, good, tmp_path / what) for what in ("a FIFO", "place of another tensor")]
    processes = [start(Path(script.__file__).name, *words, path) for path in paths]
    for path, process in zip(paths, processes):
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
        small_model.assert_rejected((process.returncode, out, err), str(path))


# Random damage


@pytest.fixture
def fuzz(monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Return fuzz(cases) -> (exit code, printed text)."""

    def run(cases: int) -> tuple[int, str]:
        try:
            return run_script(fuzz_iris.main, ["--cases", cases, "--seed", 11], monkeypatch, capsys)[:2]
        except SystemExit as error:
            return error.code, capsys.readouterr().out

    former = signal.getsignal(signal.SIGALRM)
    yield run
    signal.signal(signal.SIGALRM, former)


def test_random_damage_is_refused_or_harmless(fuzz):
    code, out = fuzz(1000)
    assert code == 0, out
    accepted, rejected, kinds, problems = map(int, re.findall(r"\d+", out.splitlines()[-1]))
    assert (accepted + rejected, problems) == (1000, 0)
    assert accepted > 20
    assert kinds > 20


def refuse_in_two_lines(path: Path, verify: bool) -> None:
    error = InputError("")
    error.args = (f"{path}: is\nbroken",)  # what InputError itself makes of it is one line
    raise error


def refuse_without_a_name(path: Path, verify: bool) -> None:
    raise InputError("is broken")


@pytest.mark.parametrize(
    ("opening", "problem"),
    [
        (lambda path, verify: path.no_such_thing, "AttributeError"),
        (lambda path, verify: time.sleep(60), "not done after 0.1 s"),
        (refuse_in_two_lines, "message"),
        (refuse_without_a_name, "message"),
    ],
)
def test_the_fuzzer_notices(fuzz, monkeypatch, opening, problem):
    reading = fuzz_iris.archives

    def archives(folder: Path) -> tuple:
        whole = reading(folder)
        monkeypatch.setattr(fuzz_iris, "open_archive", opening)
        return whole

    monkeypatch.setattr(fuzz_iris, "archives", archives)
    monkeypatch.setattr(fuzz_iris, "MOST_SECONDS", 0.1)
    code, out = fuzz(2)
    assert code == 1
    assert f"seed 11 case 0: {problem}" in out
    assert f"seed 11 case 1: {problem}" in out
    assert "2 problems" in out


def test_the_fuzzer_notices_memory(fuzz, monkeypatch):
    monkeypatch.setattr(fuzz_iris, "MOST_BYTES", -1)
    code, out = fuzz(1)
    assert code == 1
    assert "seed 11 case 0: took 0 MB" in out
