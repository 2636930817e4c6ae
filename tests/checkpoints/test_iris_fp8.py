"""Archives with dense matrices in FP8: writing them, decoding from them, and what is refused.

They must decode like matrices that are quantized at load. tests/checkpoints/test_fp8.py tests the quantizer itself.
"""

import contextlib
import dataclasses
import filecmp
import itertools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from iris_files import (
    BF16,
    CONFIG,
    F8,
    F32,
    I32,
    ITEM_BYTES,
    TOKENIZER,
    U8,
    ArchiveBytes,
    Row,
    archive_of,
    config_json,
    written_order,
)
from made_up_models import MemoryCheckpoint, loud_checkpoint, small_config
from small_model import assert_rejected, run_script, small_checkpoint, write_model
from tunings import ring_tiles

import acc_eval
import bench_tpot
import convert_to_iris
import gpt_oss_megakernel
import run_reference
import run_triton_phased
from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import FP8_GROUPS, FP8_ROWS, PRESETS, DenseFormats, ModelConfig, checkpoint_bytes, scale_name
from checkpoints.fp8 import QuantizedCheckpoint, quantize_fp8
from checkpoints.iris_writer import write_archive
from gpt_oss_megakernel import MegaModel
from host.launch import tuning_for
from host.weights import Weights, bytes_to_load, load_weights, weights_in_place
from kernels import PhasedModel
from load_hf import open_checkpoint as open_folder
from load_iris import open_archive
from load_model import open_checkpoint
from reference import Reference
from system.errors import InputError, LogitsNotFinite

CPU = torch.device("cpu")
SCRIPTS = [gpt_oss_megakernel, run_triton_phased, run_reference]
COMPONENTS = ["qkv", "o", "router", "head"]
FORMATS = [FP8_ROWS, FP8_GROUPS]
MIXED = DenseFormats(qkv=FP8_ROWS, o=FP8_GROUPS, head=FP8_GROUPS)
# Of a checkpoint that has bfloat16 only: what to write on the command line, and what it means.
FLAGS = {
    "attn": (["--fp8-attn"], DenseFormats(qkv=FP8_ROWS, o=FP8_ROWS)),
    "head, groups": (["--fp8-head", "--fp8-scale", "32"], DenseFormats(head=FP8_GROUPS)),
    "all": (["--fp8-components", "qkv,o,router,head"], DenseFormats(*[FP8_ROWS] * 4)),
    "all, groups": (["--fp8-components", "qkv,o,router,head", "--fp8-scale", "32"], DenseFormats(*[FP8_GROUPS] * 4)),
}
PROMPT = ["--prompt-ids", "65,66,67", "--max-new-tokens", 4]


def in_fp8(dense_format: str, *components: str) -> DenseFormats:
    return DenseFormats(**dict.fromkeys(components, dense_format))


EACH = {f"{name} {dense_format}": in_fp8(dense_format, name) for name in COMPONENTS for dense_format in FORMATS}
EACH |= {"all rows": FLAGS["all"][1], "all groups": FLAGS["all, groups"][1], "mixed": MIXED}
each_format = pytest.mark.parametrize("dense", EACH.values(), ids=EACH)


@pytest.fixture(autouse=True)
def former_signals():
    """Restore the signal handlers: convert_to_iris.py takes over SIGTERM."""
    former = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, former)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("small") / "model", shards=2)


@pytest.fixture(scope="module")
def archive(folder) -> Callable[[DenseFormats], Path]:
    """Return a function: the folder's model with dense matrices in these formats. Tests must not change it."""

    def archive(dense: DenseFormats) -> Path:
        path = folder.parent / f"{'-'.join(dense.__dict__.values())}.iris"
        if not path.exists():
            write_archive(QuantizedCheckpoint(open_folder(folder), dense), path)
        return path

    return archive


@pytest.fixture
def run(monkeypatch, capsys):
    """Return run(script, words...) -> (exit code, stdout, stderr)."""
    return lambda script, *words: run_script(script.main, list(words), monkeypatch, capsys)


# A checkpoint with its matrices in FP8


@pytest.mark.parametrize("piece_bytes", [1, 2 * 96 * 5, 1 << 20])
@each_format
def test_quantized_checkpoint_has_each_matrix_as_the_quantizer_makes_it(dense, piece_bytes, monkeypatch):
    monkeypatch.setattr("checkpoints.fp8.PIECE_BYTES", piece_bytes)
    checkpoint = small_checkpoint()
    quantized = QuantizedCheckpoint(checkpoint, dense)
    assert quantized.config == dataclasses.replace(checkpoint.config, dense=dense)
    tensors = dict(quantized.tensors())
    expected = {}
    for name, tensor in checkpoint.tensors():
        ending = name.split(".")[-2]
        component = {"lm_head": "head", "router": "router", "o_proj": "o"}.get(ending, "qkv")
        is_dense = name.endswith("weight") and ending in ("lm_head", "router", "o_proj", "q_proj", "k_proj", "v_proj")
        if is_dense and getattr(dense, component) in FORMATS:
            expected[name], expected[scale_name(name)] = quantize_fp8(tensor, getattr(dense, component))
        else:
            expected[name] = tensor
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        for found in (tensors[name], quantized.tensor(name)):
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(found.view(torch.uint8), tensor.view(torch.uint8)), name
    with pytest.raises(KeyError):
        quantized.tensor(scale_name("model.embed_tokens.weight"))


# How they are written


@pytest.mark.parametrize(("words", "dense"), FLAGS.values(), ids=FLAGS)
def test_every_byte_is_as_the_format_says(run, folder, tmp_path, words, dense):
    path = tmp_path / "m.iris"
    code, told, _ = run(convert_to_iris, "--model", folder, "--out", path, *words)
    assert code == 0
    assert told.startswith(f"{path}: {path.stat().st_size / 1e9:.3f} GB in ")
    documents = {CONFIG: open_archive(path).document(CONFIG), TOKENIZER: (folder / TOKENIZER).read_bytes()}
    checkpoint = QuantizedCheckpoint(small_checkpoint(), dense)
    order = written_order(checkpoint.config.n_layers, dense)
    assert path.read_bytes() == archive_of(checkpoint, 2, documents, order).encode()
    assert path.stat().st_size < open_archive_bytes(folder, tmp_path)


def open_archive_bytes(folder: Path, tmp_path: Path) -> int:
    """Return an archive of the same model in bfloat16, in its parts."""
    write_archive(open_folder(folder), tmp_path / "bf16.iris")
    return (tmp_path / "bf16.iris").stat().st_size


def test_a_conversion_from_an_archive_is_that_from_the_folder(run, folder, archive, tmp_path):
    plain = archive(DenseFormats())
    for number, (words, dense) in enumerate(FLAGS.values()):
        assert run(convert_to_iris, "--model", plain, "--out", tmp_path / f"{number}.iris", *words)[0] == 0
        assert filecmp.cmp(tmp_path / f"{number}.iris", archive(dense), shallow=False)


@pytest.mark.parametrize("words", [[], ["--fp8-components", "qkv"], ["--fp8-attn"]], ids=len)
def test_what_is_in_fp8_is_copied(run, archive, tmp_path, words):
    path = archive(FLAGS["all"][1])
    assert run(convert_to_iris, "--model", path, "--out", tmp_path / "m.iris", *words)[0] == 0
    assert filecmp.cmp(tmp_path / "m.iris", path, shallow=False)


def test_the_rest_can_be_quantized_later_and_otherwise(run, archive, folder, tmp_path):
    words = ["--fp8-components", "o,head", "--fp8-scale", "32"]
    source = archive(in_fp8(FP8_ROWS, "qkv"))
    assert run(convert_to_iris, "--model", source, "--out", tmp_path / "m.iris", *words)[0] == 0
    assert filecmp.cmp(tmp_path / "m.iris", archive(MIXED), shallow=False)
    assert run(convert_to_iris, "--verify", tmp_path / "m.iris", "--model", folder)[0] == 0


def test_a_cut_model(run, archive, folder, tmp_path):
    for source in (folder, archive(MIXED)):
        write_archive(QuantizedCheckpoint(open_checkpoint(source, 1), MIXED), tmp_path / f"{source.name}.iris")
    assert filecmp.cmp(tmp_path / "model.iris", tmp_path / f"{archive(MIXED).name}.iris", shallow=False)
    assert open_archive(archive(MIXED), 1).config == open_archive(tmp_path / "model.iris").config


def test_random_weights(run, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "20b", small_checkpoint().config)
    words, dense = FLAGS["head, groups"]
    assert run(convert_to_iris, "--random-weights", "20b", "--out", tmp_path / "m.iris", *words)[0] == 0
    assert open_archive(tmp_path / "m.iris", verify=True).config.dense == dense


def test_the_space_needed_is_that_of_the_smaller_file(run, folder, archive, tmp_path, monkeypatch):
    needed = archive(FLAGS["all"][1]).stat().st_size
    usage = shutil.disk_usage(tmp_path)
    for free, expected in ((needed - 1, 2), (needed, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        words = ["--model", folder, "--out", tmp_path / "m.iris", *FLAGS["all"][0]]
        code, _, err = run(convert_to_iris, *words)
        assert code == expected
        assert code == 0 or f"{needed / 1e9:.3f} GB needed" in err


def test_writing_ends_at_each_check(folder, tmp_path):
    checkpoint = QuantizedCheckpoint(open_folder(folder), FLAGS["all"][1])
    for n_checks in itertools.count():
        calls = iter([None] * n_checks)
        try:
            write_archive(checkpoint, tmp_path / "m.iris", check=lambda calls=calls: next(calls))
            break
        except StopIteration:
            assert os.listdir(tmp_path) == []
    assert n_checks >= len(open_archive(tmp_path / "m.iris", verify=True).header.entries)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="looks into /proc")
@pytest.mark.parametrize("dense", [in_fp8(FP8_ROWS, "head"), in_fp8(FP8_GROUPS, "head")], ids=FORMATS)
def test_memory_holds_one_matrix_and_a_few_rows(dense, tmp_path, monkeypatch):
    """The LM head has 51 MB in bfloat16, which are mapped, and 26 MB in FP8; in float32 it would have 102 MB."""
    pieces = []

    def noting_quantizer(rows: torch.Tensor, dense_format: str) -> tuple[torch.Tensor, torch.Tensor]:
        pieces.append(rows.nbytes)
        return quantize_fp8(rows, dense_format)

    monkeypatch.setattr("checkpoints.fp8.quantize_fp8", noting_quantizer)
    config = small_config(vocab_size=200_000, hidden_size=128, n_layers=1, layer_is_sliding=(True,))
    write_archive(RandomCheckpoint(config), tmp_path / "bf16.iris")
    peaks = []
    for formats in (DenseFormats(), dense):
        checkpoint = QuantizedCheckpoint(open_archive(tmp_path / "bf16.iris"), formats)
        before = status("RssAnon")
        seen = []
        write_archive(checkpoint, tmp_path / "m.iris", True, check=lambda seen=seen: seen.append(status("RssAnon")))
        peaks.append(max(seen) - before)
    assert peaks[0] < 10e6
    assert peaks[1] < 60e6
    assert sum(pieces) == 200_000 * 128 * 2
    assert max(pieces) <= 1 << 20


def status(key: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


# What decodes from them


def logits_of(model: MegaModel, token_ids: list[int]) -> torch.Tensor:
    return torch.stack([model.logits(token_id, position) for position, token_id in enumerate(token_ids)])


@pytest.mark.parametrize("quant", [False, True], ids=["default", "quant"])
@each_format
def test_the_same_logits_as_quantized_at_load(folder, archive, dense, quant):
    """Logits agree bit by bit, for kernel and reference, whether the formats are asked for or found in the archive."""
    checkpoint, ids = open_folder(folder), [65, 66, 67]
    expected = logits_of(MegaModel(checkpoint, quant, 8, dense=dense), ids)
    model = MegaModel.from_pretrained(archive(dense), quant, 8)
    assert model.config.dense == dense
    assert torch.equal(logits_of(model, ids), expected)
    assert torch.equal(logits_of(MegaModel(open_archive(archive(dense)), quant, 8, dense=dense), ids), expected)
    expected = Reference(checkpoint, quant, max_context=8, dense=dense).forward(ids)
    for asked in (None, dense):
        reference = Reference(open_archive(archive(dense)), quant, max_context=8, dense=asked)
        assert torch.equal(reference.forward(ids), expected)
    assert not torch.equal(Reference(checkpoint, quant, max_context=8).forward(ids), expected)


def test_the_same_bits_through_the_ring_and_by_phases(folder, archive):
    checkpoint, ids = open_folder(folder), [65, 66]
    tuning = ring_tiles(dataclasses.replace(checkpoint.config, dense=MIXED))
    for kind in (MegaModel, PhasedModel):
        expected = logits_of(kind(checkpoint, True, 8, num_programs=3, tuning=tuning, dense=MIXED), ids)
        found = kind(open_archive(archive(MIXED)), True, 8, num_programs=3, tuning=tuning)
        assert torch.equal(logits_of(found, ids), expected)


def test_a_big_model_is_dequantized_anew(folder, archive, monkeypatch):
    expected = Reference(open_folder(folder), max_context=8, dense=MIXED).forward([65, 66])
    monkeypatch.setattr("reference.KEEP_BYTES", 0)
    assert torch.equal(Reference(open_archive(archive(MIXED)), max_context=8).forward([65, 66]), expected)


def test_part_from_the_archive_and_part_quantized_at_load(folder, archive):
    some, more = in_fp8(FP8_ROWS, "qkv"), in_fp8(FP8_GROUPS, "o", "head")
    expected = logits_of(MegaModel(open_folder(folder), max_context=8, dense=MIXED), [65, 66])
    model = MegaModel(open_archive(archive(some)), max_context=8, dense=more)
    assert model.config.dense == MIXED
    assert torch.equal(logits_of(model, [65, 66]), expected)
    expected = Reference(open_folder(folder), max_context=8, dense=MIXED).forward([65, 66])
    assert torch.equal(Reference(open_archive(archive(some)), max_context=8, dense=more).forward([65, 66]), expected)


def answer_of(run, script, *words) -> dict:
    code, out, err = run(script, *PROMPT, "--json", *words)
    assert (code, err) == (0, "")
    return {key: value for key, value in json.loads(out).items() if not key.endswith("_ms")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@pytest.mark.parametrize(
    ("kind", "quant", "path"),
    [
        ("attn", [], "default, qkv o fp8-row"),
        ("head, groups", ["--quant"], "quant, head fp8-32"),
        ("all, groups", [], "default, qkv o router head fp8-32"),
    ],
)
def test_each_script_says_the_same_and_tells_the_path(run, folder, archive, script, kind, quant, path):
    words, dense = FLAGS[kind]
    expected = answer_of(run, script, "--model", folder, *words, *quant)
    assert expected["path"].endswith(path.removeprefix("default, "))
    assert answer_of(run, script, "--model", archive(dense), *quant) == expected
    assert answer_of(run, script, "--model", archive(dense), *words, *quant, "--verify") == expected


def test_formats_of_both_kinds_are_told(run, folder, archive):
    plain = archive(in_fp8(FP8_ROWS, "qkv"))
    words = ["--model", plain, "--fp8-components", "o,head", "--fp8-scale", "32"]
    answers = [answer_of(run, script, *words) for script in SCRIPTS]
    others = ("default", "phased", "reference")
    assert [answer["path"] for answer in answers] == [f"{other}, qkv fp8-row, o head fp8-32" for other in others]
    assert len({tuple(answer["token_ids"]) for answer in answers}) == 1
    assert answer_of(run, gpt_oss_megakernel, "--model", archive(MIXED)) == answers[0]


def test_the_benchmark(run, folder, archive, tmp_path):
    def results(*words) -> list[tuple]:
        plan = ("--both", "--contexts", "4", "--steps", 3, "--repeats", 1, "--json", tmp_path / "report.json")
        assert run(bench_tpot, *plan, *words)[0] == 0
        rows = json.loads((tmp_path / "report.json").read_text())["results"]
        return [(row["path"], row["checksum"], row["bytes_per_token"]) for row in rows]

    words, dense = FLAGS["attn"]
    expected = results("--model", folder, *words)
    assert results("--model", archive(dense)) == expected
    assert [path for path, *_ in expected] == ["default, qkv o fp8-row", "quant, qkv o fp8-row"]


def test_the_load_rate_is_that_of_the_file(run, folder, archive):
    sizes = {}
    for dense in (DenseFormats(), FLAGS["all"][1]):
        code, _, err = run(gpt_oss_megakernel, "--model", archive(dense), "--load-rate", *PROMPT)
        assert code == 0
        config = open_archive(archive(dense)).config
        assert err.startswith(f"weights: {checkpoint_bytes(config) / 1e9:.3f} GB in ")
        sizes[dense] = checkpoint_bytes(config)
    q, kv, hidden = 8 * 64, 2 * 64, 96
    rows = 2 * (q + 2 * kv + hidden + 8) + 264
    elements = 2 * ((q + 2 * kv) * hidden + hidden * q + 8 * hidden) + 264 * hidden
    assert sizes[DenseFormats()] - sizes[FLAGS["all"][1]] == elements - 4 * rows
    model = MegaModel(open_folder(folder), max_context=8, dense=FLAGS["all"][1])
    assert model.checkpoint_bytes == sizes[DenseFormats()]


# Where their bytes go

# Blobs of every kind are multiples of 256 bytes but for the router's scales; 16 groups a row need no padding.
EVEN = ModelConfig(
    n_layers=2,
    n_experts=8,
    experts_per_token=2,
    hidden_size=512,
    intermediate_size=64,
    n_heads=32,
    n_kv_heads=16,
    head_dim=16,
    vocab_size=100,
    layer_is_sliding=(True, False),
    stop_ids=(),
)
DENSE_FIELDS = {"qkv", "o", "router", "lm_head"}
SCALE_FIELDS = {f"{field}_scales" for field in DENSE_FIELDS}


@pytest.mark.parametrize(
    ("config", "dense_format", "copied"),
    [
        (EVEN, FP8_ROWS, {"router_scales"}),
        (EVEN, FP8_GROUPS, {"router_scales"}),
        (dataclasses.replace(EVEN, hidden_size=256), FP8_GROUPS, SCALE_FIELDS - {"o_scales"}),
    ],
    ids=["rows", "groups", "padded groups"],
)
def test_a_cpu_uses_them_where_they_are_mapped(config, dense_format, copied, tmp_path):
    checkpoint, dense = RandomCheckpoint(config), in_fp8(dense_format, *COMPONENTS)
    write_archive(QuantizedCheckpoint(checkpoint, dense), tmp_path / "m.iris")
    archive, tuning = open_archive(tmp_path / "m.iris"), tuning_for(CPU, dataclasses.replace(config, dense=dense))
    fields = weights_in_place(archive, archive.config, CPU, tuning)
    assert (DENSE_FIELDS | SCALE_FIELDS) - fields.keys() == copied
    weights = load_weights(archive, archive.config, CPU, tuning)
    assert_same(weights, load_weights(checkpoint, archive.config, CPU, tuning))
    mapped = archive.tensor("model.embed_tokens.weight").untyped_storage().data_ptr()
    not_mapped = {n for n, field in weights._asdict().items() if field.untyped_storage().data_ptr() != mapped}
    assert not_mapped == set(Weights._fields) - fields.keys()
    assert bytes_to_load(archive, archive.config, CPU, tuning) == sum(getattr(weights, n).nbytes for n in not_mapped)


def assert_same(actual: Weights, expected: Weights) -> None:
    for field, ours, theirs in zip(Weights._fields, actual, expected):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), field
        assert torch.equal(ours, theirs), field
        assert ours.is_contiguous(), field


@each_format
@pytest.mark.parametrize("n_layers", [1, 3])
def test_what_is_copied_is_what_would_be_quantized(dense, n_layers, tmp_path):
    """Layers lie apart, sizes are odd, and weights may be packed for a GPU; nothing is quantized twice."""
    checkpoint = loud_checkpoint(small_config(hidden_size=544))
    held = dataclasses.replace(checkpoint.config, dense=dense).cut(n_layers)
    (tmp_path / "m.iris").write_bytes(archive_of(QuantizedCheckpoint(checkpoint, dense)).encode())  # layer by layer
    for tuning in (tuning_for(CPU, held), ring_tiles(held)):
        expected = load_weights(loud_cut(checkpoint, n_layers), held, CPU, tuning)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("checkpoints.fp8.quantize_fp8", None)
            archive = open_archive(tmp_path / "m.iris", n_layers)
            assert_same(load_weights(archive, archive.config, CPU, tuning), expected)


def loud_cut(checkpoint: MemoryCheckpoint, n_layers: int) -> MemoryCheckpoint:
    return checkpoint.with_config(**checkpoint.config.cut(n_layers).__dict__)


# Formats that are asked for and cannot be had

REFUSED = [
    ("all", ["--fp8-attn", "--fp8-scale", "32"], "--fp8-attn", "qkv in fp8-row, which cannot become fp8-32"),
    ("all, groups", ["--fp8-head"], "--fp8-head", "head in fp8-32, which cannot become fp8-row"),
    ("all, groups", ["--fp8-components", "o,router"], "--fp8-components", "o in fp8-32, which cannot become fp8-row"),
    ("attn", ["--fp8-components", "qkv,head", "--fp8-scale", "32"], "--fp8-components", "qkv in fp8-row"),
]


@pytest.mark.parametrize("script", [*SCRIPTS, bench_tpot, convert_to_iris], ids=lambda script: script.__name__)
@pytest.mark.parametrize(("kind", "words", "flag", "reason"), REFUSED)
def test_another_format_is_one_line_that_names_flag_and_file(run, archive, tmp_path, script, kind, words, flag, reason):
    path, out = archive(FLAGS[kind][1]), ["--out", tmp_path / "m.iris"] if script is convert_to_iris else []
    assert_rejected(run(script, "--model", path, *words, *out), f"error: {flag}: {path} holds {reason}")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", [MegaModel, Reference, QuantizedCheckpoint])
def test_another_format_from_python(archive, kind):
    path = archive(FLAGS["all"][1])
    with pytest.raises(InputError, match=f"dense.head: {path} holds head in fp8-row, which cannot become fp8-32"):
        kind(open_archive(path), dense=in_fp8(FP8_GROUPS, "head"))


@pytest.mark.parametrize("words", [["--fp8-head"], ["--fp8-scale", "32"], ["--fp8-components", "o"], ["--fp8-attn"]])
@pytest.mark.parametrize("task", ["--verify", "--info"])
def test_formats_go_with_a_conversion(run, archive, task, words):
    assert_rejected(run(convert_to_iris, task, archive(MIXED), *words), "--fp8-scale go with --out")


def test_a_scale_of_nothing(run, folder, tmp_path):
    words = ["--model", folder, "--out", tmp_path / "m.iris", "--fp8-scale", "32"]
    assert_rejected(run(convert_to_iris, *words), "--fp8-scale: which matrices?")


def test_rows_that_are_no_groups_leave_nothing_behind(run, tmp_path):
    write_archive(RandomCheckpoint(small_config(n_heads=17, n_kv_heads=1, head_dim=16)), tmp_path / "bf16.iris")
    words = ["--model", tmp_path / "bf16.iris", "--out", tmp_path / "m.iris", "--fp8-attn", "--fp8-scale", "32"]
    code, _, err = run(convert_to_iris, *words)
    assert code == 2
    assert err.splitlines()[-1] == "error: fp8-32: rows of 272 elements are no whole groups of 32"
    assert os.listdir(tmp_path) == ["bf16.iris"]


# acc_eval.py

SHORT = ["--streams", "random", "--window", 3, "--max-windows", 4, "--tokens", 12]


@pytest.mark.parametrize("test", ["default+fp8-attn", "reference+fp8-attn"])
def test_accuracy_of_an_archive_against_its_folder(run, folder, archive, tmp_path, test):
    """The result is that of the folder against itself with the same matrices quantized at load."""

    def metrics(*words) -> dict:
        words = [*SHORT, "--model", folder, "--test", test, "--json", tmp_path / "report.json", *words]
        assert run(acc_eval, *words)[0] == 0
        return json.loads((tmp_path / "report.json").read_text())["metrics"]

    assert metrics("--test-model", archive(FLAGS["attn"][1])) == metrics()
    assert metrics()["kl"] > 0


def test_both_sides_from_an_archive(run, archive):
    path = archive(FLAGS["all, groups"][1])
    words = "+fp8-attn+fp8-head+fp8-router+scale-32"
    code, out, _ = run(acc_eval, *SHORT, "--model", path, "--ref", f"reference{words}", "--test", f"reference{words}")
    assert code == 0
    assert f"reference{words} against reference{words}" in out
    more = archive(in_fp8(FP8_ROWS, "qkv"))
    words = ["--ref", "reference+fp8-qkv", "--test", "reference+fp8-qkv+fp8-head"]
    assert run(acc_eval, *SHORT, "--model", more, *words)[0] == 0


@pytest.mark.parametrize(
    ("words", "culprits"),
    [
        ([], ["--ref reference: ", "holds qkv o fp8-row, of which no bfloat16 can be had"]),
        (["--ref", "reference+fp8-attn"], ["--test default: ", "of which no bfloat16 can be had"]),
        (["--ref", "reference+fp8-qkv"], ["--ref reference+fp8-qkv: ", "of which no bfloat16 can be had"]),
        (["--ref", "quant+fp8-attn+scale-32"], ["--ref quant+fp8-attn+scale-32: ", "qkv in fp8-row, which cannot"]),
    ],
)
def test_sides_that_an_archive_has_not(run, archive, words, culprits):
    path = archive(FLAGS["attn"][1])
    assert_rejected(run(acc_eval, *SHORT, "--model", path, *words), str(path), *culprits)


def test_a_test_side_that_its_archive_has_not(run, folder, archive):
    path = archive(FLAGS["attn"][1])
    assert_rejected(run(acc_eval, *SHORT, "--model", folder, "--test-model", path), f"--test default: {path} holds")


# --verify and --info


@each_format
def test_verify_quantizes_what_it_compares_with(run, folder, archive, dense):
    path = archive(dense)
    n_entries = len(open_archive(path).header.entries)
    for model in (folder, archive(DenseFormats()), path):
        told = f"{path}: {n_entries} checksums match\n{path}: the same as {model}\n"
        assert run(convert_to_iris, "--verify", path, "--model", model) == (0, told, "")


@pytest.mark.parametrize("name", ["L1.w_k", "L0.w_o_scales", "lm_head", "lm_head_scales", "L1.w_v_scales"])
def test_verify_finds_a_bit_that_is_not_the_quantizers(run, folder, archive, tmp_path, name):
    """The file's checksums are right for the flipped bit."""
    checkpoint = QuantizedCheckpoint(open_folder(folder), MIXED)
    for bits in (1, 0x80):
        data = archive_with(checkpoint, name, bits)
        (tmp_path / "m.iris").write_bytes(data.encode())
        code, told, err = run(convert_to_iris, "--verify", tmp_path / "m.iris", "--model", folder)
        assert (code, told.count("checksums match")) == (2, 1)
        published = checkpoint_name(name)
        assert err == f"error: {tmp_path / 'm.iris'}: tensor {published} differs from that of {folder}\n"


def checkpoint_name(name: str) -> str:
    return {
        "L1.w_k": "model.layers.1.self_attn.k_proj.weight",
        "L1.w_v_scales": "model.layers.1.self_attn.v_proj.weight_scale",
        "L0.w_o_scales": "model.layers.0.self_attn.o_proj.weight_scale",
        "lm_head": "lm_head.weight",
        "lm_head_scales": "lm_head.weight_scale",
    }[name]


def archive_with(checkpoint, name: str, bits: int) -> ArchiveBytes:
    """Flip some bits of a blob's byte, and correct the checksums."""
    documents = {CONFIG: config_json(checkpoint), TOKENIZER: checkpoint.document(TOKENIZER)}
    tensors = dict(checkpoint.tensors())
    published = checkpoint_name(name)
    raw = tensors[published].clone().view(-1).view(torch.uint8)
    raw[5] ^= bits
    tensors[published] = raw.view(tensors[published].dtype).view(tensors[published].shape)
    changed = MemoryCheckpoint(checkpoint.config, tensors)
    return archive_of(changed, 2, documents)


def test_verify_tells_formats_apart(run, folder, archive):
    rows, groups, plain = archive(FLAGS["all"][1]), archive(FLAGS["all, groups"][1]), archive(DenseFormats())
    code, _, err = run(convert_to_iris, "--verify", plain, "--model", rows)
    assert (code, err) == (2, f"error: {plain}: the format of the dense matrices differs from that of {rows}\n")
    code, _, err = run(convert_to_iris, "--verify", rows, "--model", groups)
    assert (code, err) == (2, f"error: {rows}: {groups} holds qkv in fp8-32, which cannot become fp8-row\n")


def test_info_tells_formats(run, archive):
    code, told, err = run(convert_to_iris, "--info", archive(MIXED))
    assert (code, err) == (0, "")
    assert told.splitlines()[7] == "dense matrices qkv fp8-row, o head fp8-32"
    rows = [" ".join(line.split()[:6]) for line in told.splitlines()]
    assert "L*.w_q 2 x float8_e4m3fn [512, 96]" in rows
    assert "L*.w_q_scales 2 x float32 [512] 0.004" in rows
    assert "L*.w_o_scales 2 x uint8 [96, 16]" in rows
    assert "lm_head_scales 1 x uint8 [264, 3]" in rows
    assert "L*.router_w 2 x bfloat16 [8, 96]" in rows


# Tables that are wrong

SMALL = RandomCheckpoint(small_config())  # q 512, KV 128, hidden 96, 8 experts, vocabulary 160, three layers
FP8_NAMES = [f"L{n}.{name}" for n in (0, 2) for name in ("w_q", "w_k", "w_v", "w_o", "router_w")] + ["lm_head"]


@pytest.fixture(scope="module")
def good() -> dict[str, ArchiveBytes]:
    """Format -> archive with all dense matrices in it. Tests must not change it."""
    return {name: archive_of(QuantizedCheckpoint(SMALL, in_fp8(name, *COMPONENTS))) for name in FORMATS}


def assert_refused(archive: ArchiveBytes, folder: Path, *culprits: str) -> None:
    path = folder / "m.iris"
    path.write_bytes(archive.encode())
    with pytest.raises(InputError) as caught:
        open_archive(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    assert all(culprit in message for culprit in culprits), message


def add_row(archive: ArchiveBytes, name: str, dtype: int, shape: tuple[int, ...]) -> None:
    """Add a row of the table, with zeros at the end of the file as its blob."""
    data = bytes(math.prod(shape) * ITEM_BYTES[dtype])
    before = archive.header_bytes
    archive.body += bytes(-len(archive.body) % 256)
    archive.rows.append(Row(name.encode(), before + len(archive.body), len(data), dtype, shape, len(shape), bytes(32)))
    archive.body += data
    for row in archive.rows:
        row.offset += archive.header_bytes - before
    archive.file_bytes = archive.header_bytes + len(archive.body)


def remove_row(archive: ArchiveBytes, name: str) -> None:
    before = archive.header_bytes
    archive.rows.remove(archive.row(name))
    archive.file_bytes = max(row.end for row in archive.rows)
    archive.body = (bytes(before - archive.header_bytes) + archive.body)[: archive.file_bytes - archive.header_bytes]


def retype(archive: ArchiveBytes, name: str, dtype: int, shape: tuple[int, ...]) -> None:
    """Give a row another dtype, and a blob at the end of the file."""
    remove_row(archive, name)
    add_row(archive, name, dtype, shape)


@pytest.mark.parametrize("dense_format", FORMATS)
@pytest.mark.parametrize("name", FP8_NAMES)
def test_scales_that_are_missing(good, tmp_path, name, dense_format):
    archive = good[dense_format].copy()
    remove_row(archive, f"{name}_scales")
    assert_refused(archive, tmp_path, f"tensor {name}_scales is missing")


@pytest.mark.parametrize("dense_format", FORMATS)
@pytest.mark.parametrize("name", FP8_NAMES)
def test_scales_of_another_shape_or_dtype(good, tmp_path, name, dense_format):
    row = good[dense_format].row(f"{name}_scales")
    rows, *groups = row.shape
    shapes = [(rows + 1, *groups), (rows - 1, *groups), (1, rows, *groups), (rows, *groups, 1), (rows * 2,), ()]
    for shape in shapes + ([(rows, groups[0] + 1), (rows, groups[0] - 1), groups * 2, (rows,)] if groups else []):
        if shape and tuple(shape) != row.shape:
            archive = good[dense_format].copy()
            retype(archive, f"{name}_scales", row.dtype, tuple(shape))
            assert_refused(archive, tmp_path, f"tensor {name}_scales is", "expected")
    for dtype in {BF16, F32, U8, I32, F8} - {row.dtype}:
        archive = good[dense_format].copy()
        retype(archive, f"{name}_scales", dtype, row.shape)
        assert_refused(archive, tmp_path, f"tensor {name}_scales is", str(list(row.shape)), "expected")


@pytest.mark.parametrize("dense_format", FORMATS)
@pytest.mark.parametrize("name", FP8_NAMES)
def test_a_matrix_in_another_format_than_those_of_its_kind(good, tmp_path, name, dense_format):
    shape = good[dense_format].row(name).shape
    for dtype in (BF16, F32, U8):
        archive = good[dense_format].copy()
        retype(archive, name, dtype, shape)
        if name != "lm_head":
            assert_refused(archive, tmp_path, f"tensor {name} is", "expected float8_e4m3fn")
        else:
            assert_refused(archive, tmp_path, "tensor lm_head_scales is there, but lm_head is not FP8")
    if name != "lm_head":
        archive = good[dense_format].copy()
        retype(archive, name, BF16, shape)
        remove_row(archive, f"{name}_scales")
        assert_refused(archive, tmp_path, f"tensor {name} is bfloat16", "expected float8_e4m3fn")
        other = F32 if dense_format == FP8_GROUPS else U8
        archive = good[dense_format].copy()
        retype(archive, f"{name}_scales", other, shape[:1] if other == F32 else (shape[0], shape[1] // 32))
        assert_refused(archive, tmp_path, f"tensor {name}_scales is", "expected")


@pytest.mark.parametrize("name", ["L0.w_q", "L2.w_v", "lm_head"])
def test_scales_without_an_fp8_matrix(tmp_path, name):
    archive = archive_of(SMALL)
    add_row(archive, f"{name}_scales", F32, archive.row(name).shape[:1])
    assert_refused(archive, tmp_path, f"tensor {name}_scales is there, but {name} is not FP8")


@pytest.mark.parametrize("name", ["embed", "L0.b_q", "L0.sinks", "L0.gate_up_blocks", "final_norm", "L1.down_scales"])
def test_fp8_where_there_is_none(good, tmp_path, name):
    archive = good[FP8_ROWS].copy()
    retype(archive, name, F8, archive.row(name).shape)
    assert_refused(archive, tmp_path, f"tensor {name} is float8_e4m3fn", "expected")
    archive = good[FP8_ROWS].copy()
    add_row(archive, f"{name}_scales", F32, archive.row(name).shape[:1])
    assert_refused(archive, tmp_path, f"tensor {name}_scales is there, but {name} is not FP8")


@pytest.mark.parametrize("name", ["w_q_scales", "L0.w_x_scales", "L3.w_q_scales", "L0.w_q_scales_scales"])
def test_unknown_scales(good, tmp_path, name):
    archive = good[FP8_ROWS].copy()
    add_row(archive, name, F32, (4,))
    assert_refused(archive, tmp_path, name)


def test_groups_that_are_not_whole(tmp_path):
    """17 heads of 16 make rows of 272 elements, which are 8 groups and a half."""
    checkpoint = RandomCheckpoint(small_config(n_heads=17, n_kv_heads=1, head_dim=16))
    for n_groups in (8, 9):
        archive = archive_of(QuantizedCheckpoint(checkpoint, in_fp8(FP8_ROWS, "o")))
        for layer in range(3):
            retype(archive, f"L{layer}.w_o_scales", U8, (96, n_groups))
        assert_refused(archive, tmp_path, "tensor L0.w_o_scales", "272 elements are no whole groups of 32")


def test_version_1_has_no_fp8(good, tmp_path):
    archive = archive_of(SMALL, 1)
    remove_row(archive, "L0.w_q")
    add_row(archive, "L0.w_q", F8, (512, 96))
    (tmp_path / CONFIG).write_bytes(config_json(SMALL))
    assert_refused(archive, tmp_path, "'L0.w_q' is of dtype 4, which is not known")


# Values that are no numbers

HOSTILE = {
    "elements of NaN": (F8, 0x7F),
    "elements of -NaN": (F8, 0xFF),
    "scales of NaN": (F32, 0x7FC00000),
    "scales of infinity": (F32, 0x7F800000),
    "scales of -infinity": (F32, 0xFF800000),
    "scales of 0": (F32, 0),
    "scales of -1": (F32, 0xBF800000),
    "scales of 1e-45": (F32, 1),
    "exponents of NaN": (U8, 0xFF),
    "exponents of 2^127": (U8, 0xFE),
    "exponents of 2^-127": (U8, 0),
}


def hostile_archive(component: str, what: str, path: Path) -> None:
    """Replace elements or scales of one row in the last layer or in the LM head."""
    dtype, bits = HOSTILE[what]
    checkpoint = QuantizedCheckpoint(small_checkpoint(), in_fp8(FP8_GROUPS if dtype == U8 else FP8_ROWS, component))
    name = {"qkv": "self_attn.v_proj", "o": "self_attn.o_proj", "router": "mlp.router"}.get(component)
    name = f"model.layers.1.{name}.weight" if name else "lm_head.weight"
    tensors = dict(checkpoint.tensors())
    changed = tensors[name if dtype == F8 else scale_name(name)]
    row = changed[7:8].view({F8: torch.uint8, U8: torch.uint8, F32: torch.int32}[dtype])
    row.copy_(torch.tensor(bits).to(row.dtype))
    write_archive(MemoryCheckpoint(checkpoint.config, tensors), path)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_values_are_data(tmp_path, component, what):
    """Tokens stay in the vocabulary, or decoding ends where logits are not finite.

    The result of a number that overflows may depend on the order of sums.
    """
    hostile_archive(component, what, tmp_path / "m.iris")
    archive, ids = open_archive(tmp_path / "m.iris", verify=True), [65, 66]
    for quant in (False, True):
        model = MegaModel(archive, quant, 16)
        found = torch.stack([stored_logits(model, token, position) for position, token in enumerate(ids)])
        expected = Reference(archive, quant, max_context=16).forward(ids)
        overflows = "infinity" in what or "2^127" in what
        if not overflows:
            assert torch.equal(found.isfinite(), expected.isfinite())
        torch.testing.assert_close(*both_finite(found, expected), rtol=0.1, atol=0.1)
        tokens, ended = spoken(model, 3)
        if not overflows:
            logits = Reference(archive, quant, max_context=16).forward([65, *tokens][:3])
            assert ended == (not logits[-1].isfinite().all())


def stored_logits(model: MegaModel, token: int, position: int) -> torch.Tensor:
    """Return the logits that the kernel stored, finite or not."""
    with contextlib.suppress(LogitsNotFinite):
        model.logits(token, position)
    return model.state.logits.clone()


def spoken(model: MegaModel, n_tokens: int) -> tuple[list[int], bool]:
    """Return (tokens that follow token 65, whether decoding ended because logits are not finite)."""
    tokens = []
    try:
        for token in model.generate([65], n_tokens):
            assert 0 <= token < 264
            tokens.append(token)
    except LogitsNotFinite:
        return tokens, True
    assert tokens
    return tokens, False


def both_finite(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    where = a.isfinite() & b.isfinite()
    return a[where], b[where]


def test_hostile_values_through_the_ring(tmp_path):
    for what, component in (("scales of NaN", "qkv"), ("exponents of NaN", "router"), ("elements of NaN", "o")):
        with contextlib.suppress(FileNotFoundError):
            (tmp_path / "m.iris").unlink()
        hostile_archive(component, what, tmp_path / "m.iris")
        archive = open_archive(tmp_path / "m.iris")
        model = MegaModel(archive, True, 4, tuning=ring_tiles(archive.config))
        assert spoken(model, 2)[1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_scripts_end_well_on_hostile_values(run, tmp_path, script):
    hostile_archive("head", "scales of NaN", tmp_path / "m.iris")
    code, _, err = run(script, "--model", tmp_path / "m.iris", *PROMPT)
    assert code == 2
    assert re.fullmatch(r"error: logits are not finite at position \d+: .*\n", err)
