"""convert_to_iris.py from its user's side: what it writes and refuses, and what remains when it is stopped."""

import contextlib
import errno
import filecmp
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from iris_files import CONFIG, GENERATION, TOKENIZER, archive_of, row_kinds, written_order
from made_up_models import ODD_SIZES, loud_checkpoint, small_config
from safetensors.torch import load_file, save_file
from small_model import assert_rejected, run_script, small_checkpoint, write_model

import bench_tpot
import convert_to_iris
import gpt_oss_megakernel
import run_reference
import run_triton_phased
from checkpoints import iris_compare, iris_writer
from checkpoints.checkpoint import INDEX_NAME, RandomCheckpoint, write_checkpoint
from checkpoints.config import PRESETS, ModelConfig, expected_tensors
from checkpoints.iris_writer import write_archive
from gpt_oss_megakernel import MegaModel
from load_hf import open_checkpoint as open_folder
from load_iris import open_archive
from system.output_file import OutputFile

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "models" / "sonnets"
SINKS = "model.layers.1.self_attn.sinks"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small model in two shards, with a tokenizer. Tests must not change it."""
    return write_model(tmp_path_factory.mktemp("small") / "model", shards=2)


@pytest.fixture
def own_folder(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "own"))


@pytest.fixture(scope="module")
def archive(folder) -> Path:
    """An archive of `folder`. Tests must not change it."""
    path = folder.parent / "small.iris"
    write_archive(open_folder(folder), path)
    return path


@pytest.fixture
def own_archive(archive, tmp_path) -> Path:
    return Path(shutil.copy(archive, tmp_path / "own.iris"))


@pytest.fixture
def out(tmp_path) -> Path:
    """A path to write to, alone in its folder."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "m.iris"


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; return (exit code, stdout, stderr)."""
    return lambda *words: run_script(convert_to_iris.main, list(words), monkeypatch, capsys)


@pytest.fixture
def convert(run, out):
    """Convert without errors; return the path of the archive."""

    def convert(*words) -> Path:
        code, told, err = run(*words, "--out", out)
        assert (code, "error" in err) == (0, False)
        size = out.stat().st_size / 1e9
        assert re.fullmatch(rf"{re.escape(str(out))}: {size:.3f} GB in \d+\.\d s, \d+\.\d\d GB/s\n", told)
        assert os.listdir(out.parent) == [out.name]
        return out

    return convert


def assert_same_model(path: Path, checkpoint) -> None:
    """Assert that an archive holds each tensor bit by bit, norms and sinks as equal values in float32."""
    ours = open_archive(path, verify=True)
    assert ours.config == checkpoint.config
    tensors = dict(ours.tensors())
    assert tensors.keys() == expected_tensors(checkpoint.config).keys()
    for name, tensor in tensors.items():
        theirs = checkpoint.tensor(name)
        assert torch.equal(tensor.view(torch.uint8), theirs.to(tensor.dtype).view(torch.uint8)), name


# What it writes


def test_shipped_model(run, convert):
    path = convert("--model", SHIPPED)
    folder = open_folder(SHIPPED)
    assert_same_model(path, folder)
    ours = open_archive(path)
    assert ours.config.stop_ids == folder.config.stop_ids != ()
    for name in (GENERATION, TOKENIZER):
        assert ours.document(name) == (SHIPPED / name).read_bytes()
    n_entries = len(load_file(SHIPPED / "model.safetensors")) + 3
    assert run("--verify", path, "--model", SHIPPED) == (
        0,
        f"{path}: {n_entries} checksums match\n{path}: the same as {SHIPPED}\n",
        "",
    )


def test_every_byte_is_as_the_format_says(folder, convert):
    path = convert("--model", folder)
    config = open_archive(path).document(CONFIG)
    documents = {CONFIG: config, TOKENIZER: (folder / TOKENIZER).read_bytes()}
    checkpoint = small_checkpoint()
    order = written_order(checkpoint.config.n_layers)
    assert path.read_bytes() == archive_of(checkpoint, 2, documents, order).encode()


@pytest.mark.parametrize("changes", ODD_SIZES.values(), ids=ODD_SIZES.keys())
def test_models_of_odd_sizes(changes, convert, tmp_path):
    checkpoint = loud_checkpoint(small_config(**changes))
    assert_same_model(convert("--model", write_checkpoint(checkpoint, tmp_path / "folder", 3)), checkpoint)


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_the_number_of_shards_changes_no_byte(shards, convert, archive, tmp_path):
    path = convert("--model", write_model(tmp_path / "folder", shards))
    assert filecmp.cmp(path, archive, shallow=False)


def test_a_cut_model_holds_its_layers_only(run, convert, folder, archive, tmp_path):
    path = convert("--model", folder, "--layers", 1)
    checkpoint = small_checkpoint()
    assert_same_model(path, checkpoint.with_config(**checkpoint.config.cut(1).__dict__))
    assert path.stat().st_size < archive.stat().st_size
    assert run("--model", archive, "--layers", 1, "--out", tmp_path / "cut.iris")[0] == 0
    assert filecmp.cmp(path, tmp_path / "cut.iris", shallow=False)


def test_an_archive_of_an_archive_is_the_same_file(convert, archive):
    assert filecmp.cmp(convert("--model", archive), archive, shallow=False)


@pytest.fixture
def version_1(folder, tmp_path) -> Path:
    """Write an archive of version 1 in a folder with the model's other files."""
    path = tmp_path / "v1" / "model.iris"
    path.parent.mkdir()
    path.write_bytes(archive_of(small_checkpoint(), version=1).encode())
    for name in (CONFIG, TOKENIZER):
        shutil.copy(folder / name, path.parent)
    return path


def test_version_1_becomes_version_2(convert, archive, version_1):
    assert filecmp.cmp(convert("--model", version_1), archive, shallow=False)


def test_an_archive_may_take_its_own_place(run, archive, version_1):
    assert_rejected(run("--model", version_1, "--out", version_1), "--force")
    assert run("--model", version_1, "--out", version_1, "--force")[0] == 0
    assert filecmp.cmp(version_1, archive, shallow=False)


def test_stop_ids_are_those_of_both_files(convert, own_folder):
    (own_folder / GENERATION).write_text(json.dumps({"eos_token_id": [65, 262]}))
    path = convert("--model", own_folder)
    assert open_archive(path).config.stop_ids == open_folder(own_folder).config.stop_ids == (65, 262)


def test_random_weights(run, convert, monkeypatch):
    config = small_checkpoint().config
    monkeypatch.setitem(PRESETS, "20b", config)
    path = convert("--random-weights", "20b", "--layers", 1)
    unstoppable = ModelConfig(**{**config.cut(1).__dict__, "stop_ids": ()})
    if not torch.cuda.is_available():  # GPUs draw other values
        assert_same_model(path, RandomCheckpoint(unstoppable))
    assert open_archive(path, verify=True).config == unstoppable
    assert open_archive(path).document(TOKENIZER) is None
    assert run("--verify", path)[0] == 0


# What decodes from it


def without_times(text: str) -> list[dict]:
    times = ("ttft_ms", "tpot_ms")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in text.splitlines()]


SCRIPTS = [gpt_oss_megakernel, run_reference, run_triton_phased]


@pytest.mark.parametrize("words", [[], ["--quant"]], ids=["default", "quant"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_the_same_tokens_and_logits_from_the_archive(script, words, convert, monkeypatch, capsys, tmp_path):
    def decode(model: Path) -> tuple[list[dict], bytes]:
        logits = tmp_path / "logits.npy"
        prompt = ("--prompt", "Shall I", "--max-new-tokens", 4, "--json", "--logits-out", logits)
        code, told, err = run_script(script.main, ["--model", model, *prompt, *words], monkeypatch, capsys)
        assert (code, err) == (0, "")
        return without_times(told), logits.read_bytes()

    assert decode(convert("--model", SHIPPED)) == decode(SHIPPED)


def test_the_benchmark_decodes_the_same_tokens(convert, monkeypatch, capsys, tmp_path):
    def checksums(model: Path) -> list[str]:
        plan = ("--both", "--contexts", "4", "--steps", 3, "--repeats", 1, "--json", tmp_path / "report.json")
        assert run_script(bench_tpot.main, ["--model", model, *plan], monkeypatch, capsys)[0] == 0
        return [row["checksum"] for row in json.loads((tmp_path / "report.json").read_text())["results"]]

    assert checksums(convert("--model", SHIPPED)) == checksums(SHIPPED)


@pytest.mark.parametrize("quant", [False, True])
def test_from_python_the_same_tokens(quant, folder, archive, version_1):
    expected = list(MegaModel.from_pretrained(folder, quant, 16).generate([65, 66], 8))
    for path in (archive, str(archive), version_1):
        assert list(MegaModel.from_pretrained(path, quant, 16).generate([65, 66], 8)) == expected


# --verify


def test_verify_finds_a_flipped_bit_in_any_blob(run, archive, own_archive):
    entries = open_archive(archive).header.entries.values()
    assert len(entries) == len(row_kinds(2)) + 2
    rng = random.Random(1)
    with open(own_archive, "r+b", buffering=0) as file:
        for entry in entries:
            at = entry.offset + rng.choice((0, entry.n_bytes - 1, rng.randrange(entry.n_bytes)))
            original = os.pread(file.fileno(), 1, at)
            os.pwrite(file.fileno(), bytes([original[0] ^ 1 << rng.randrange(8)]), at)
            assert_rejected(run("--verify", own_archive), f"{own_archive}: ", f"{entry.name}: ", "checksum")
            os.pwrite(file.fileno(), original, at)
    assert run("--verify", own_archive)[0] == 0


def test_verify_finds_a_flipped_bit_anywhere_in_the_header(run, own_archive):
    first = min(entry.offset for entry in open_archive(own_archive).header.entries.values())
    data = bytearray(own_archive.read_bytes())
    for at in range(0, first, 97):
        data[at] ^= 1 << at % 8
        own_archive.write_bytes(data)
        assert_rejected(run("--verify", own_archive), str(own_archive))
        data[at] ^= 1 << at % 8


def change_tensor(folder: Path, name: str, change) -> None:
    path = folder / json.loads((folder / INDEX_NAME).read_text())["weight_map"][name]
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    path.unlink()
    save_file(tensors | {name: change(tensors[name])}, path)


def with_last_bit_flipped(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.clone().view(-1).view(torch.uint8)
    raw[-1] ^= 1
    return raw.view(tensor.dtype).view(tensor.shape)


@pytest.mark.parametrize(
    "name",
    ["model.embed_tokens.weight", "model.norm.weight", SINKS, "model.layers.0.mlp.experts.down_proj_blocks"],
)
def test_verify_finds_a_tensor_that_is_not_the_checkpoints(run, archive, own_folder, name, monkeypatch):
    monkeypatch.setattr(iris_compare, "CHUNK", 1000)
    change_tensor(own_folder, name, with_last_bit_flipped)
    code, told, err = run("--verify", archive, "--model", own_folder)
    assert (code, told) == (2, f"{archive}: 43 checksums match\n")
    assert err == f"error: {archive}: tensor {name} differs from that of {own_folder}\n"


def test_verify_takes_no_nan_for_another(run, own_folder, out):
    """Tensors are compared by bits: a NaN is not equal to itself, and two NaNs may have different bits."""

    def with_nan(bits: int):
        def change(tensor: torch.Tensor) -> torch.Tensor:
            raw = tensor.clone().view(torch.int16)
            raw[0] = bits
            return raw.view(torch.bfloat16)

        return change

    change_tensor(own_folder, SINKS, with_nan(0x7FC1))
    assert run("--model", own_folder, "--out", out)[0] == 0
    assert run("--verify", out, "--model", own_folder)[0] == 0
    change_tensor(own_folder, SINKS, with_nan(0x7FC2))
    assert run("--verify", out, "--model", own_folder)[2].endswith(
        f"tensor {SINKS} differs from that of {own_folder}\n"
    )


def test_verify_finds_another_configuration_or_tokenizer(run, archive, own_folder, tmp_path):
    cut = tmp_path / "cut.iris"
    assert run("--model", own_folder, "--layers", 1, "--out", cut)[0] == 0
    assert run("--verify", cut, "--model", own_folder)[2].endswith(
        f"{cut}: the configuration differs from that of {own_folder}\n"
    )
    assert run("--verify", cut, "--model", own_folder, "--layers", 1)[0] == 0
    (own_folder / TOKENIZER).write_text("{}")
    assert run("--verify", archive, "--model", own_folder)[2].endswith(
        f"{archive}: the tokenizer differs from that of {own_folder}\n"
    )


def test_verify_compares_with_archives_and_folders(run, archive, own_archive, folder, version_1):
    for model in (own_archive, folder, version_1):
        assert run("--verify", archive, "--model", model) == (
            0,
            f"{archive}: 43 checksums match\n{archive}: the same as {model}\n",
            "",
        )


def test_version_1_has_no_checksums_but_can_be_compared(run, version_1, folder):
    assert_rejected(run("--verify", version_1), str(version_1), "version 1 holds no checksums", "--model")
    assert run("--verify", version_1, "--model", folder) == (0, f"{version_1}: the same as {folder}\n", "")
    data = bytearray(version_1.read_bytes())
    data[-1] ^= 1
    version_1.write_bytes(data)
    assert_rejected(run("--verify", version_1, "--model", folder), str(version_1), "differs from that of")


# --info


def listed(text: str) -> dict[str, tuple[int, str, list[int], float]]:
    """Parse the table of --info: name -> (count, dtype, shape, MB)."""
    rows = re.findall(r"^  (\S+) +(\d+) x (\w+) (\[[\d, ]+\]) +([\d.]+) MB$", text, re.MULTILINE)
    return {name: (int(count), dtype, json.loads(shape), float(mb)) for name, count, dtype, shape, mb in rows}


def test_info_of_the_shipped_model(run, convert):
    path = convert("--model", SHIPPED)
    code, told, err = run("--info", path)
    assert (code, err) == (0, "")
    assert told.splitlines()[:7] == [
        f"{path}: version 2, {path.stat().st_size / 1e9:.3f} GB, values in published order",
        "checksums: SHA-256 of each tensor and of the header",
        "layers 4, hidden 128, intermediate 128",
        "heads 16, KV heads 2, head_dim 32",
        "experts 8, 4 for each token",
        "vocabulary 1024, stop ids 1017, 1016, 1023",
        "positions 131072",
    ]
    rows, tensors = listed(told), load_file(SHIPPED / "model.safetensors")
    assert len(rows) == len(told.splitlines()) - 7 == 3 + 22
    assert sum(count for count, *_ in rows.values()) == len(tensors) + 3
    for name in (GENERATION, TOKENIZER):
        n_bytes = (SHIPPED / name).stat().st_size
        assert rows[name] == (1, "uint8", [n_bytes], round(n_bytes / 1e6, 3))
    for name, (published, _) in row_kinds(1).items():
        tensor, is_layer = tensors[published], name.startswith("L0.")
        count, dtype, shape, mb = rows[name.replace("L0.", "L*.")]
        assert (count, shape) == (4 if is_layer else 1, list(tensor.shape))
        is_float32 = name.endswith(("norm_attn", "norm_moe", "sinks", "final_norm"))
        assert dtype == ("float32" if is_float32 else str(tensor.dtype).removeprefix("torch."))
        assert mb == pytest.approx(count * tensor.numel() * {"f": 4, "b": 2, "u": 1}[dtype[0]] / 1e6, abs=6e-4)


def test_info_of_an_archive_without_checksums_or_stop_ids(run, version_1):
    config = json.loads((version_1.parent / CONFIG).read_text())
    (version_1.parent / CONFIG).write_text(json.dumps(config | {"eos_token_id": None}))
    code, told, err = run("--info", version_1)
    assert (code, err) == (0, "")
    lines = told.splitlines()
    assert lines[0].startswith(f"{version_1}: version 1, ")
    assert lines[1] == "checksums: none"
    assert lines[5] == "vocabulary 264, stop ids none"
    assert sum(count for count, *_ in listed(told).values()) == len(row_kinds(2))


# Progress


def test_progress_has_rate_and_time_left(run, folder, out, monkeypatch):
    monkeypatch.setattr(iris_writer, "QUIET_SECONDS", 0)
    code, _, err = run("--model", folder, "--out", out)
    assert code == 0
    updates = re.split(r"[\r\n]+", err.strip())
    assert len(updates) > 10
    number = r"[\d.]+[kMG]?"
    rated = [re.search(rf"(\d+)%\|.*\| {number}/{number} \[\d\d:\d\d<\d\d:\d\d, +{number}B/s", u) for u in updates]
    percents = [int(match[1]) for match in rated if match]
    assert len(percents) > 5
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert all(update.startswith(out.name) for update in updates)


def test_progress_is_quiet_where_there_is_no_terminal(run, folder, out):
    """A log gets a line at the start and one at the end, rather than ten a second."""
    assert run("--model", folder, "--out", out)[2].count("%|") <= 4


# What it refuses


@pytest.mark.parametrize(
    ("words", "culprits"),
    [
        ([], ["--out", "--verify", "--info", "required"]),
        (["--model", "x"], ["required"]),
        (["--out", "x.iris"], ["--out", "--model or --random-weights"]),
        (["--out", "x.iris", "--info", "x.iris"], ["--info", "not allowed with", "--out"]),
        (["--out", "x.iris", "--verify", "x.iris"], ["--verify", "not allowed with", "--out"]),
        (["--out", "x.iris", "--model", "x", "--random-weights", "20b"], ["--random-weights", "not allowed with"]),
        (["--out", "x.iris", "--random-weights", "7b"], ["--random-weights", "'7b'"]),
        (["--out", "x.iris", "--random-weights", "20b", "--layers", "25"], ["--layers 25", "layers 1 to 24"]),
        (["--out", "x.iris", "--random-weights", "20b", "--layers", "0"], ["--layers", "'0'"]),
        (["--out", "x.iris", "--model", SHIPPED, "--layers", "5"], ["--layers 5", "layers 1 to 4"]),
        (["--out", "x.iris", "--model", "no/such/path"], ["'no/such/path': no such folder"]),
        (["--out", "x.iris", "--model", ROOT / "README.md"], ["README.md: is not an .iris archive"]),
        (["--verify", "x.iris", "--force"], ["--force", "--out"]),
        (["--verify", "x.iris", "--layers", "2"], ["--layers", "--model"]),
        (["--verify", "x.iris", "--random-weights", "20b"], ["--random-weights", "--out"]),
        (["--info", "x.iris", "--force"], ["--force", "--out"]),
        (["--info", "x.iris", "--model", SHIPPED], ["--info", "--model"]),
        (["--verify", "x.iris"], ["x.iris: No such file or directory"]),
        (["--info", "x.iris"], ["x.iris: No such file or directory"]),
        (["--info", "."], [".: is a directory"]),
        (["--verify", os.devnull], [f"{os.devnull}: is not a regular file"]),
        (["--verify", ROOT / "README.md"], ["README.md: is not an .iris archive"]),
        (["--frobnicate"], ["required"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, monkeypatch, out, words, culprits):
    monkeypatch.chdir(out.parent)
    assert_rejected(run(*words), *culprits)
    assert os.listdir() == []


def as_folder(path: Path) -> None:
    path.mkdir()


def as_pipe(path: Path) -> None:
    os.mkfifo(path)


def as_link(path: Path) -> None:
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("make", [as_folder, as_pipe, as_link])
@pytest.mark.parametrize("words", [[], ["--force"]], ids=["", "force"])
def test_a_target_that_is_no_file(run, folder, out, make, words):
    make(out)
    before = out.lstat()
    assert_rejected(run("--model", folder, "--out", out, *words), str(out), "not a regular file")
    assert os.listdir(out.parent) == [out.name]
    assert os.path.samestat(out.lstat(), before)


@pytest.mark.parametrize("device", [os.devnull, "/dev/full", "/dev/zero"])
def test_a_target_that_is_a_device(run, folder, device):
    assert_rejected(run("--model", folder, "--out", device, "--force"), device, "not a regular file")
    assert Path(device).is_char_device()


@pytest.mark.parametrize("make", [as_folder, as_pipe, as_link])
def test_what_else_is_beside_the_target_is_left_alone(run, folder, out, make):
    """Other entries of the folder are not opened: a link would be followed, a pipe would block."""
    part = Path(f"{out}.part")
    make(part)
    assert run("--model", folder, "--out", out)[0] == 0
    assert sorted(os.listdir(out.parent)) == [out.name, part.name]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"]
)
def test_force_replaces_no_file_of_the_source(run, tmp_path, name):
    source = write_model(tmp_path / "source")
    path = source / name
    path.exists() or path.write_text("{}")
    before = path.read_bytes()
    result = run("--model", source, "--out", path, "--force")
    assert_rejected(result, f"{path}: is the same file as {path}, an input")
    assert path.read_bytes() == before
    new = source / "new.iris"
    assert run("--model", source, "--out", new)[0] == 0, "in the folder, under a new name"
    before = new.read_bytes()
    for words in (["--layers", 1], ["--fp8-attn"]):
        assert_rejected(run("--model", new, "--out", new, "--force", *words), f"{new}, an input")
    assert new.read_bytes() == before
    assert run("--model", source, "--out", new, "--force")[0] == 0


def test_an_existing_target_needs_force(run, folder, archive, out):
    out.write_bytes(b"old")
    assert_rejected(run("--model", folder, "--out", out), f"{out}: is there already; --force replaces it")
    assert out.read_bytes() == b"old"
    assert run("--model", folder, "--out", out, "--force")[0] == 0
    assert filecmp.cmp(out, archive, shallow=False)
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize(
    ("name", "culprit"),
    [
        ("nowhere/m.iris", "No such file or directory"),
        ("file/m.iris", "Not a directory"),
        ("x" * 300, "File name too long"),
        ("x" * 256, "File name too long"),
    ],
)
def test_a_target_that_cannot_be(run, folder, out, name, culprit):
    (out.parent / "file").touch()
    assert_rejected(run("--model", folder, "--out", out.parent / name), name, culprit)
    assert os.listdir(out.parent) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_must_not_be_written_to(run, folder, out):
    out.parent.chmod(0o555)
    assert_rejected(run("--model", folder, "--out", out), str(out), "Permission denied")
    assert os.listdir(out.parent) == []


@pytest.mark.parametrize("old", [None, b"old"])
def test_too_little_space_is_told_before_anything_is_written(run, folder, archive, out, monkeypatch, old):
    if old:
        out.write_bytes(old)
    needed = archive.stat().st_size

    def with_free(n_bytes: int) -> tuple[int, str, str]:
        usage = shutil.disk_usage(out.parent)._replace(free=n_bytes)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: usage)
            return run("--model", folder, "--out", out, "--force")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", None)
        assert_rejected(with_free(needed - 1), str(out), f"{needed / 1e9:.3f} GB needed", "GB free")
    assert os.listdir(out.parent) == ([out.name] if old else [])
    assert old is None or out.read_bytes() == old
    assert with_free(needed)[0] == 0


def full_at(monkeypatch, room: int) -> None:
    """Make writes beyond a number of bytes find no space left; the last write before them is partial."""
    pwrite = os.pwrite

    def limited(descriptor: int, data, offset: int) -> int:
        if offset >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data[: room - offset], offset)

    monkeypatch.setattr(os, "pwrite", limited)


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("room", [0, 20_000, 500_000, -1])
def test_a_disk_that_fills_up_leaves_the_old_file_and_no_half_one(run, folder, archive, out, monkeypatch, room, old):
    if old:
        out.write_bytes(old)
    full_at(monkeypatch, room % archive.stat().st_size)
    code, told, err = run("--model", folder, "--out", out, "--force")
    assert (code, told) == (2, "")
    assert err.splitlines()[-1] == f"error: {out}: No space left on device"
    assert os.listdir(out.parent) == ([out.name] if old else [])
    assert old is None or out.read_bytes() == old


def test_a_disk_that_fails_at_the_end_leaves_nothing(run, folder, out, monkeypatch):
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    code, told, err = run("--model", folder, "--out", out)
    assert (code, told, err.splitlines()[-1]) == (2, "", f"error: {out}: Input/output error")
    assert os.listdir(out.parent) == []


def test_everything_is_on_the_disk_before_it_gets_its_name(run, folder, archive, out, monkeypatch):
    synced = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def note_replace(path: Path, target: Path) -> Path:
        assert synced == [str(path)]
        assert filecmp.cmp(path, archive, shallow=False)
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    assert run("--model", folder, "--out", out)[0] == 0
    assert synced[1:] == [str(out.parent)]


def test_a_damaged_checkpoint_leaves_nothing(run, own_folder, out, monkeypatch):
    """The second shard is replaced after the first was converted."""
    (first, second) = sorted(own_folder.glob("*.safetensors"))
    write = OutputFile.write

    def replace_and_write(*arguments) -> None:
        shutil.copy(first, second)
        write(*arguments)

    monkeypatch.setattr(OutputFile, "write", replace_and_write)
    code, told, err = run("--model", own_folder, "--out", out)
    assert (code, told) == (2, "")
    assert err.splitlines()[-1].startswith(f"error: {second}: tensor ")
    assert os.listdir(out.parent) == []


# What is left when it is stopped

# Runs the command line in forks of one process that has imported everything: each then starts within milliseconds.
FORKS = """
import json, os, resource, sys, time
sys.path.insert(0, sys.argv[1])
import convert_to_iris
from command_line.run import run_main

def figures(pid):
    with open(f"/proc/{pid}/status") as status:
        values = dict(line.split(":", 1) for line in status)
    return [int(values[key].split()[0]) << 10 for key in ("VmHWM", "RssAnon") if key in values]

def delay_writes(seconds, pwrite=os.pwrite):
    os.pwrite = lambda *arguments: (time.sleep(seconds), pwrite(*arguments))[1]

for line in sys.stdin:
    words, log, delay, file_limit = json.loads(line)
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if delay:
            delay_writes(delay)
        if file_limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        sys.argv = ["convert_to_iris.py", *words]
        try:
            code = run_main(convert_to_iris.main)
        except SystemExit as stop:
            code = stop.code
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # taking the interpreter down takes longer than a run
    print(pid, flush=True)
    peaks = [0, 0]
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        peaks = [max(pair) for pair in zip(peaks, figures(pid))] or peaks
        time.sleep(1e-3)
    seconds = time.perf_counter() - start
    peaks[1] -= figures(os.getpid())[1]
    sys.stdin.readline()  # until then the process id can be sent signals
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    print(json.dumps([code, seconds, *peaks]), flush=True)
"""


@dataclass
class Ended:
    """How a run ended, and its peaks of memory in bytes."""

    code: int
    seconds: float
    peak: int  # libraries and mapped files included
    peak_anonymous: int  # beyond what importing took
    text: str


class Forks:
    def __init__(self, log: Path):
        self._log = log
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", FORKS, str(ROOT)], **pipes)

    def start(self, *words, delay: float = 0, file_limit: int = 0) -> int:
        """Start the run, which waits `delay` seconds before each write; return its process id."""
        self.process.stdin.write(json.dumps([list(map(str, words)), str(self._log), delay, file_limit]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait(self) -> Ended:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return Ended(*json.loads(self.process.stdout.readline()), self._log.read_text())

    def run(self, *words, **options) -> Ended:
        self.start(*words, **options)
        return self.wait()


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Iterator[Forks]:
    forks = Forks(tmp_path_factory.mktemp("forks") / "log")
    with forks.process:
        yield forks
        forks.process.stdin.close()


def random_folder(folder: Path, n_layers: int, shards: int) -> Path:
    """Make a model folder of 15 MB a layer."""
    config = small_config(
        n_layers=n_layers,
        layer_is_sliding=(True,) * n_layers,
        n_experts=32,
        hidden_size=512,
        intermediate_size=512,
        head_dim=64,
        stop_ids=(),
    )
    return write_checkpoint(RandomCheckpoint(config), folder, shards)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of 130 MB in 174 tensors."""
    return random_folder(tmp_path_factory.mktemp("large") / "model", 9, 2)


def wait_for(condition) -> None:
    limit = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < limit
        time.sleep(1e-3)


def unfinished(out: Path) -> list[Path]:
    """Return the temporary files that writers of `out` have begun."""
    return list(out.parent.glob(f"{out.name}.*.part"))


def is_writing(out: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return any(part.stat().st_size for part in unfinished(out))
    return False


def start_and_see_it_write(forks: Forks, large: Path, out: Path, *words) -> int:
    """Start a conversion that goes on for a second or more, and return its process id once it writes."""
    pid = forks.start("--model", large, "--out", out, *words, delay=0.01)
    wait_for(lambda: is_writing(out))
    return pid


class Interrupted:
    """A checkpoint whose third tensor raises a signal inside code that treats exceptions as errors of its own."""

    def __init__(self, checkpoint, number: signal.Signals):
        self._checkpoint, self._number = checkpoint, number
        self.name, self.config, self.document = checkpoint.name, checkpoint.config, checkpoint.document

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for index, (name, tensor) in enumerate(self._checkpoint.tensors()):
            if index == 2:
                try:
                    os.kill(os.getpid(), self._number)
                    time.sleep(0.01)
                except BaseException as error:
                    raise ValueError("no such shape") from error
            yield name, tensor


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupt_breaks_into_no_other_code(run, folder, out, monkeypatch, number, code):
    """torch turned such an interrupt into its own error 'could not determine the shape of object type ...'."""
    monkeypatch.setattr(convert_to_iris, "open_checkpoint", lambda *_: Interrupted(open_folder(folder), number))
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    exit_code, told, err = run("--model", folder, "--out", out)
    assert (exit_code, told) == (code, "")
    assert err.splitlines()[-1].startswith(f"interrupted: {out} was not written")
    assert os.listdir(out.parent) == []
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers


def test_writing_ends_at_each_check(folder, out):
    checkpoint = open_folder(folder)
    n_checks = 0
    while True:
        calls = iter([None] * n_checks)
        try:
            write_archive(checkpoint, out, check=lambda: next(calls))  # noqa: B023 - called in this round only
            break
        except StopIteration:
            assert os.listdir(out.parent) == []
            n_checks += 1
    assert n_checks >= len(expected_tensors(checkpoint.config)) + 3
    assert next(calls, "all") == "all"


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupt_leaves_the_old_file_and_says_how_to_go_on(forks, large, out, number, code, old):
    if old:
        out.write_bytes(old)
    os.kill(start_and_see_it_write(forks, large, out, "--force"), number)
    ended = forks.wait()
    assert ended.code == code
    assert ended.text.splitlines()[-1] == f"interrupted: {out} was not written; the same command starts again"
    assert "Traceback" not in ended.text
    assert os.listdir(out.parent) == ([out.name] if old else [])
    assert old is None or out.read_bytes() == old


def test_a_kill_at_any_moment_leaves_no_bad_file(forks, large, archive, out):
    """Ten runs are killed, half of them over an earlier archive."""
    whole = out.parent / "whole.iris"
    words = ("--model", large, "--out", out, "--force")
    delay = 0.003  # lets a run take about the same time whatever else the machine does
    seconds = forks.run("--model", large, "--out", whole, delay=delay).seconds
    rng, killed_writing = random.Random(5), 0
    for moment in range(10):
        out.unlink(missing_ok=True)
        if moment % 2:
            shutil.copy(archive, out)
        pid = forks.start(*words, delay=delay)
        time.sleep(seconds * (moment + rng.random()) / 10)
        os.kill(pid, signal.SIGKILL)
        assert forks.wait().code in (-signal.SIGKILL, 0)
        killed_writing += bool(unfinished(out))
        assert out.exists() or not moment % 2
        if out.exists():
            open_archive(out, verify=True)
            assert any(filecmp.cmp(out, good, shallow=False) for good in (whole, archive))
    assert killed_writing >= 2
    Path(f"{out}.0123456789abcdef.part").write_bytes(os.urandom(1 << 20))
    assert forks.run(*words).code == 0
    assert filecmp.cmp(out, whole, shallow=False)
    assert not unfinished(out)


def test_what_a_killed_run_left_is_removed(forks, large, folder, archive, out, run):
    os.kill(start_and_see_it_write(forks, large, out), signal.SIGKILL)
    assert forks.wait().code == -signal.SIGKILL
    assert [out.parent / name for name in os.listdir(out.parent)] == unfinished(out)
    assert run("--model", folder, "--out", out)[0] == 0
    assert filecmp.cmp(out, archive, shallow=False)
    assert os.listdir(out.parent) == [out.name]


def test_two_at_a_time_are_refused(forks, large, folder, out, run):
    pid = start_and_see_it_write(forks, large, out)
    os.kill(pid, signal.SIGSTOP)
    try:
        for words in ([], ["--force"]):
            result = run("--model", folder, "--out", out, *words)
            assert_rejected(result, f"{out}: another process is writing it")
            assert len(os.listdir(out.parent)) == len(unfinished(out)) == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    assert forks.wait().code == 0
    assert run("--verify", out, "--model", large)[0] == 0


def test_a_target_that_appears_meanwhile_is_kept(forks, large, out):
    pid = start_and_see_it_write(forks, large, out)
    os.kill(pid, signal.SIGSTOP)
    out.write_bytes(b"mine")
    os.kill(pid, signal.SIGCONT)
    ended = forks.wait()
    assert (ended.code, ended.text.splitlines()[-1]) == (2, f"error: {out}: is there already; --force replaces it")
    assert os.listdir(out.parent) == [out.name]
    assert out.read_bytes() == b"mine"


def test_a_limit_on_the_size_of_files(forks, large, out):
    ended = forks.run("--model", large, "--out", out, file_limit=50_000_000)
    assert (ended.code, ended.text.splitlines()[-1]) == (2, f"error: {out}: File too large")
    assert os.listdir(out.parent) == []


SLOW_PROGRAM = """
import os, runpy, sys, time
sys.path.insert(0, os.path.dirname(sys.argv[1]))
pwrite = os.pwrite
os.pwrite = lambda *arguments: (time.sleep(0.01), pwrite(*arguments))[1]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_as_a_program_that_is_interrupted(large, out, number, code):
    command = [sys.executable, "-c", SLOW_PROGRAM, ROOT / "convert_to_iris.py", "--model", large, "--out", out]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=out.parent)
    wait_for(lambda: is_writing(out))
    process.send_signal(number)
    told, err = process.communicate(timeout=60)
    assert (process.returncode, told) == (code, "")
    assert err.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in err
    assert os.listdir(out.parent) == []


# Memory

# A tensor's pages, 8 MB here, and buffers. Without a bound a conversion would take 250 MB more than the other.
MOST_ANONYMOUS, MOST_DIFFERENCE = 24 << 20, 12 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("source", ["one shard", "four shards", "archive"])
def test_memory_does_not_grow_with_the_model(forks, out, tmp_path, source):
    """Memory is flat from 45 MB to 300 MB of model.

    Even mapped pages, which belong to the page cache, are given back.
    """
    ended = []
    for n_layers in (3, 20):
        model = random_folder(tmp_path / str(n_layers), n_layers, 4 if source == "four shards" else 1)
        if source == "archive":
            model = tmp_path / f"{n_layers}.iris"
            write_archive(open_folder(tmp_path / str(n_layers)), model)
        ended.append(forks.run("--model", model, "--out", out, "--force"))
    small, large = ended
    assert (small.code, large.code) == (0, 0)
    assert out.stat().st_size > 290e6
    assert max(small.peak_anonymous, large.peak_anonymous) < MOST_ANONYMOUS
    assert large.peak - small.peak < MOST_DIFFERENCE
    assert large.peak_anonymous - small.peak_anonymous < MOST_DIFFERENCE


def test_a_junk_tokenizer_is_neither_converted_nor_called_the_same(run, tmp_path, out, monkeypatch):
    folder = write_model(tmp_path / "folder")
    junk = folder / "tokenizer.json"
    junk.write_text("junk")
    assert_rejected(run("--model", folder, "--out", out), "tokenizer.json: not a tokenizer file")
    assert list(out.parent.iterdir()) == []
    with monkeypatch.context() as patch:  # as an archive was made before conversions looked
        patch.setattr(convert_to_iris.Tokenizer, "from_checkpoint", lambda checkpoint: None)
        assert run("--model", folder, "--out", out)[0] == 0
    for words in (("--verify", out), ("--verify", out, "--model", folder)):
        assert_rejected(run(*words), str(out), "tokenizer.json: not a tokenizer file")
