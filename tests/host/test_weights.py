"""host.weights: a kernel gets what the checkpoint holds, copied or used in place."""

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up_models import loud_checkpoint, small_config
from tunings import ring_tiles

from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import (
    FP8_GROUPS,
    FP8_ROWS,
    GPT_OSS_120B,
    DenseFormats,
    ModelConfig,
    checkpoint_bytes,
    expected_tensors,
)
from checkpoints.fp8 import quantize_fp8
from checkpoints.iris_writer import write_archive
from checkpoints.names import LAYER_TENSORS, MODEL_TENSORS, published_names
from gpt_oss_megakernel import MegaModel
from host import limits
from host.launch import tuning_for
from host.weights import (
    Weights,
    bytes_to_load,
    load_weights,
    weight_bytes,
    weights_in_place,
)
from load_iris import open_archive

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
# Blobs of every kind are multiples of 256 bytes.
EVEN = ModelConfig(
    n_layers=3,
    n_experts=8,
    experts_per_token=2,
    hidden_size=128,
    intermediate_size=64,
    n_heads=64,
    n_kv_heads=32,
    head_dim=16,
    vocab_size=100,
    layer_is_sliding=(True, False, True),
    stop_ids=(),
)
SMALL_KINDS = {"router_bias"}  # of EVEN: too small to lie side by side
DENSE_SCALES = {
    "qkv_scales",
    "o_scales",
    "router_scales",
    "lm_head_scales",
}  # of no published tensor, empty in bfloat16


def archive_of(checkpoint, path: Path):
    write_archive(checkpoint, path)
    return open_archive(path)


def assert_same(actual: Weights, expected: Weights) -> None:
    for field, ours, theirs in zip(Weights._fields, actual, expected):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), field
        assert torch.equal(ours, theirs), field
        assert ours.is_contiguous(), field


def test_each_published_tensor_is_in_one_field():
    names = [name for field in (*MODEL_TENSORS, *LAYER_TENSORS) for name in published_names(field, 3)]
    assert sorted(names) == sorted(expected_tensors(EVEN))
    assert {*MODEL_TENSORS, *LAYER_TENSORS} | DENSE_SCALES == set(Weights._fields)


def test_stacked_values_are_the_checkpoints():
    checkpoint = RandomCheckpoint(EVEN)
    weights = load_weights(checkpoint, checkpoint.config, CPU, tuning_for(CPU, EVEN))
    for n in range(EVEN.n_layers):
        layer = f"model.layers.{n}"
        q, k, v = (checkpoint.tensor(f"{layer}.self_attn.{name}_proj.weight") for name in "qkv")
        assert torch.equal(weights.qkv[n].view(torch.bfloat16), torch.cat([q, k, v]))
        q, k, v = (checkpoint.tensor(f"{layer}.self_attn.{name}_proj.bias") for name in "qkv")
        assert torch.equal(weights.qkv_bias[n], torch.cat([q, k, v]))
        assert torch.equal(weights.sinks[n], checkpoint.tensor(f"{layer}.self_attn.sinks").float())
        assert torch.equal(weights.mlp_norm[n], checkpoint.tensor(f"{layer}.post_attention_layernorm.weight").float())
        blocks = checkpoint.tensor(f"{layer}.mlp.experts.down_proj_blocks")
        assert torch.equal(weights.down[n].view(torch.uint8), blocks.flatten(-2))
    assert torch.equal(weights.lm_head.view(torch.bfloat16), checkpoint.tensor("lm_head.weight"))
    assert torch.equal(weights.final_norm, checkpoint.tensor("model.norm.weight").float())


@pytest.mark.parametrize("config", [EVEN, small_config(), small_config(n_layers=1, layer_is_sliding=(True,))])
def test_an_archive_gives_the_weights_of_its_checkpoint(config, tmp_path):
    checkpoint = loud_checkpoint(config)
    tuning = tuning_for(CPU, config)
    archive = archive_of(checkpoint, tmp_path / "m.iris")
    assert_same(
        load_weights(archive, archive.config, CPU, tuning), load_weights(checkpoint, checkpoint.config, CPU, tuning)
    )


def test_an_archive_packs_like_its_checkpoint(tmp_path):
    checkpoint = loud_checkpoint(small_config())
    tuning = ring_tiles(checkpoint.config)
    assert tuning.machine.experts.is_packed
    archive = archive_of(checkpoint, tmp_path / "m.iris")
    assert_same(
        load_weights(archive, archive.config, CPU, tuning), load_weights(checkpoint, checkpoint.config, CPU, tuning)
    )
    assert (
        not {"gate_up", "gate_up_scales", "down", "down_scales"}
        & weights_in_place(archive, archive.config, CPU, tuning).keys()
    )


def test_a_cpu_uses_an_archive_where_it_is_mapped(tmp_path):
    archive = archive_of(RandomCheckpoint(EVEN), tmp_path / "m.iris")
    tuning = tuning_for(CPU, EVEN)
    fields = weights_in_place(archive, archive.config, CPU, tuning)
    assert fields.keys() == set(Weights._fields) - SMALL_KINDS - DENSE_SCALES
    mapped = archive.tensor("model.embed_tokens.weight").untyped_storage().data_ptr()
    assert all(field.untyped_storage().data_ptr() == mapped for field in fields.values())
    weights = load_weights(archive, archive.config, CPU, tuning)
    assert weights.qkv.untyped_storage().data_ptr() == mapped
    copied = [field for name, field in weights._asdict().items() if name in SMALL_KINDS]
    assert bytes_to_load(archive, EVEN, CPU, tuning) == sum(field.nbytes for field in copied)
    assert bytes_to_load(RandomCheckpoint(EVEN), EVEN, CPU, tuning) == weight_bytes(EVEN, tuning)


def test_a_cut_archive_is_used_in_place_too(tmp_path):
    checkpoint = RandomCheckpoint(EVEN)
    write_archive(checkpoint, tmp_path / "m.iris")
    archive = open_archive(tmp_path / "m.iris", n_layers=2)
    tuning = tuning_for(CPU, archive.config)
    assert "qkv" in weights_in_place(archive, archive.config, CPU, tuning)
    assert_same(
        load_weights(archive, archive.config, CPU, tuning),
        load_weights(RandomCheckpoint(EVEN.cut(2)), archive.config, CPU, tuning),
    )


def test_layers_that_lie_apart_are_copied(tmp_path, monkeypatch):
    import checkpoints.iris_writer as writer

    place = writer.place_entries
    monkeypatch.setattr(writer, "place_entries", lambda kinds: place(kinds[::-1]))
    checkpoint = RandomCheckpoint(EVEN)
    archive = archive_of(checkpoint, tmp_path / "m.iris")
    tuning = tuning_for(CPU, EVEN)
    assert weights_in_place(archive, archive.config, CPU, tuning).keys() == set(MODEL_TENSORS)
    assert_same(
        load_weights(archive, archive.config, CPU, tuning), load_weights(checkpoint, checkpoint.config, CPU, tuning)
    )


ALL_ROWS = DenseFormats(FP8_ROWS, FP8_ROWS, FP8_ROWS, FP8_ROWS)
ALL_GROUPS = DenseFormats(FP8_GROUPS, FP8_GROUPS, FP8_GROUPS, FP8_GROUPS)
MIXED = DenseFormats(qkv=FP8_GROUPS, head=FP8_ROWS)


def dense_parts(checkpoint) -> dict[str, list[list[torch.Tensor]]]:
    """Return field -> the published matrices in it, layer by layer; the LM head counts as a layer."""

    def of_layers(*names: str) -> list[list[torch.Tensor]]:
        layers = range(checkpoint.config.n_layers)
        return [[checkpoint.tensor(f"model.layers.{n}.{name}.weight") for name in names] for n in layers]

    return {
        "qkv": of_layers("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "o": of_layers("self_attn.o_proj"),
        "router": of_layers("mlp.router"),
        "lm_head": [[checkpoint.tensor("lm_head.weight")]],
    }


def assert_dense(weights: Weights, checkpoint, dense: DenseFormats) -> None:
    """Assert that bytes and scales are those of each published matrix, in the published order, and padding is 0."""
    formats = {"qkv": dense.qkv, "o": dense.o, "router": dense.router, "lm_head": dense.head}
    for field, layers in dense_parts(checkpoint).items():
        found, scales = getattr(weights, field), getattr(weights, f"{field}_scales")
        if formats[field] not in (FP8_ROWS, FP8_GROUPS):
            published = torch.cat([part for parts in layers for part in parts])
            assert torch.equal(found.view(torch.bfloat16).flatten(), published.flatten())
            assert scales.numel() == 0
            continue
        for n, parts in enumerate(layers):
            elements, right = zip(*(quantize_fp8(part, formats[field]) for part in parts))
            mine, mine_scales = (found, scales) if field == "lm_head" else (found[n], scales[n])
            assert torch.equal(mine.view(torch.uint8), torch.cat(elements).view(torch.uint8)), field
            right = torch.cat(right)
            assert mine_scales.dtype == right.dtype
            if formats[field] == FP8_GROUPS:
                groups = right.shape[1]
                assert mine_scales.shape[1] % 16 == 0
                assert mine_scales.shape[1] - groups < 16
                assert (mine_scales[:, groups:] == 0).all()
                mine_scales = mine_scales[:, :groups]
            assert torch.equal(mine_scales, right), field


@pytest.mark.parametrize("dense", [ALL_ROWS, ALL_GROUPS, MIXED], ids=["rows", "groups", "mixed"])
@pytest.mark.parametrize("config", [EVEN, small_config(hidden_size=544)], ids=["even", "odd"])
def test_dense_matrices_in_fp8(config, dense, tmp_path, monkeypatch):
    """Matrices in FP8 come from a checkpoint, also a few rows at a time, or from an archive.

    Other tensors do not change.
    """
    checkpoint = loud_checkpoint(config)
    held = dataclasses.replace(config, dense=dense)
    tuning = tuning_for(CPU, held)
    plain = load_weights(checkpoint, config, CPU, tuning_for(CPU, config))
    weights = load_weights(checkpoint, held, CPU, tuning)
    assert_dense(weights, checkpoint, dense)
    for field in set(Weights._fields) - {"qkv", "o", "router", "lm_head"} - DENSE_SCALES:
        assert torch.equal(getattr(weights, field), getattr(plain, field)), field
    assert bytes_to_load(checkpoint, held, CPU, tuning) == sum(field.nbytes for field in weights)
    archive = archive_of(checkpoint, tmp_path / "m.iris")
    assert_same(load_weights(archive, held, CPU, tuning), weights)
    monkeypatch.setattr("host.weights.PIECE_BYTES", 5 * 2 * config.hidden_size)
    assert_same(load_weights(checkpoint, held, CPU, tuning), weights)


def test_what_is_not_in_fp8_is_used_in_place(tmp_path):
    archive = archive_of(RandomCheckpoint(EVEN), tmp_path / "m.iris")
    held = dataclasses.replace(EVEN, dense=MIXED)
    tuning = tuning_for(CPU, held)
    fields = weights_in_place(archive, held, CPU, tuning)
    assert fields.keys() == set(Weights._fields) - SMALL_KINDS - DENSE_SCALES - {"qkv", "lm_head"}
    weights = load_weights(archive, held, CPU, tuning)
    mapped = archive.tensor("model.embed_tokens.weight").untyped_storage().data_ptr()
    assert {name for name, field in weights._asdict().items() if field.untyped_storage().data_ptr() == mapped} == set(
        fields
    )
    assert_dense(weights, archive, MIXED)
    copied = [field.nbytes for name, field in weights._asdict().items() if name not in fields]
    assert bytes_to_load(archive, held, CPU, tuning) == sum(copied)
    # By hand: a byte an element; 8 E8M0 bytes of 4 groups padded to 16; a float32 for each row of the LM head.
    rows = 3 * (64 + 2 * 32) * 16
    assert sum(copied) == rows * (128 + 16) + 100 * (128 + 4) + 2 * 3 * 8


def test_a_missing_tensor_is_noticed():
    checkpoint = loud_checkpoint(small_config())
    checkpoint.tensors = lambda: iter(list(type(checkpoint).tensors(checkpoint))[:-1])
    with pytest.raises(ValueError, match="the checkpoint gave no model.layers"):
        load_weights(checkpoint, checkpoint.config, CPU, tuning_for(CPU, checkpoint.config))


def test_mapped_weights_need_no_memory(tmp_path, monkeypatch):
    config = EVEN
    archive = archive_of(RandomCheckpoint(config), tmp_path / "m.iris")
    needed = limits.required_bytes(config, 16, weights=0)
    monkeypatch.setattr(limits, "available_bytes", lambda device: needed + 1000)
    assert weight_bytes(config) > 1000
    MegaModel(archive, max_context=16).step(1, 0)


MEASURE = """
import sys
import gpt_oss_megakernel as g
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) << 10
before = anonymous()
model = g.MegaModel.from_pretrained(sys.argv[1], max_context=64)
ids = list(model.generate([1], 2))
print(anonymous() - before, ids)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_decoding_an_archive_keeps_no_copy_of_it(tmp_path):
    config = ModelConfig(**{**EVEN.__dict__, "vocab_size": 200_000})
    archive = archive_of(RandomCheckpoint(config), tmp_path / "m.iris")
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "m.iris")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        check=True,
        env={"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "PATH": ""},
    )
    grown, ids = result.stdout.split(" ", 1)
    assert archive.header.file_bytes > 100e6
    # An LM head tile of 8,192 rows is widened at a time, and the logits are kept: no second 51 MB matrix.
    assert int(grown) < 40e6
    assert ids.strip() == str(list(MegaModel(archive, max_context=64).generate([1], 2)))


def test_bytes_of_the_published_model():
    with gzip.open(Path(__file__).parents[1] / "data" / "gpt-oss-120b" / "model.safetensors.index.json.gz") as file:
        assert checkpoint_bytes(GPT_OSS_120B) == json.load(file)["metadata"]["total_size"]
