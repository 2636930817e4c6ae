"""checkpoints.checkpoint: random values that are reproducible and sane, and folders that transformers loads."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers_model
from safetensors.torch import load_file

from checkpoints.checkpoint import RandomCheckpoint, write_checkpoint
from checkpoints.config import GPT_OSS_120B, ModelConfig, expected_tensors, read_config
from system.errors import InputError

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
DTYPES = {"BF16": torch.bfloat16, "U8": torch.uint8}
SMALL = ModelConfig(
    n_layers=3,
    n_experts=6,
    experts_per_token=2,
    hidden_size=96,
    intermediate_size=64,
    n_heads=6,
    n_kv_heads=3,
    head_dim=32,
    vocab_size=300,
    sliding_window=5,
    layer_is_sliding=(True, False, True),
    stop_ids=(7, 3),
)
EXPERT_ROWS = "model.layers.1.mlp.experts.{}_proj_{}"


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return float64 [..., K] by the definition of MXFP4: the low nibble is the even element."""
    elements = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1).reshape(*blocks.shape[:-1], 32)
    return (elements * np.exp2(scales.astype(np.float64) - 127)[..., None]).reshape(*blocks.shape[:-2], -1)


def test_shapes_and_dtypes_are_the_published_ones():
    checkpoint = RandomCheckpoint(SMALL, name="small")
    assert checkpoint.name == "small"
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in checkpoint.tensors()}
    assert found == {name: (shape, DTYPES[dtype]) for name, (shape, dtype) in expected_tensors(SMALL).items()}


def test_unknown_name_is_a_key_error():
    with pytest.raises(KeyError):
        RandomCheckpoint(SMALL).tensor("model.layers.3.self_attn.sinks")


def test_values_depend_on_seed_and_name_but_not_on_order():
    first, again, other = (
        RandomCheckpoint(SMALL, seed=1),
        RandomCheckpoint(SMALL, seed=1),
        RandomCheckpoint(SMALL, seed=2),
    )
    backwards = {name: again.tensor(name) for name in reversed(expected_tensors(SMALL))}
    for name, tensor in first.tensors():
        assert torch.equal(tensor, backwards[name]), name
        assert torch.equal(tensor, first.tensor(name)), name
        assert not torch.equal(tensor, other.tensor(name)), name
    q_proj = "model.layers.{}.self_attn.q_proj.weight"
    assert not torch.equal(first.tensor(q_proj.format(0)), first.tensor(q_proj.format(1)))


def test_a_cut_model_has_the_same_first_layers():
    whole = RandomCheckpoint(SMALL)
    for name, tensor in RandomCheckpoint(SMALL.cut(1)).tensors():
        assert torch.equal(tensor, whole.tensor(name)), name


FRESH_PROCESS = """
import resource
from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import GPT_OSS_20B
checkpoint = RandomCheckpoint(GPT_OSS_20B)
print(checkpoint.tensor("model.layers.0.self_attn.sinks").double().sum().item())
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensor = checkpoint.tensor("model.layers.0.mlp.experts.gate_up_proj_blocks")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024 / tensor.nbytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss has another unit elsewhere")
def test_another_process_draws_the_same_and_needs_no_second_copy():
    command = [sys.executable, "-c", FRESH_PROCESS]
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    root = Path(__file__).parents[2]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True, timeout=120)
    sinks_sum, growth = map(float, result.stdout.split())
    preset = dataclasses.replace(GPT_OSS_120B, n_layers=1, layer_is_sliding=(True,))
    assert sinks_sum == RandomCheckpoint(preset).tensor("model.layers.0.self_attn.sinks").double().sum().item()
    assert growth < 1.5


@pytest.fixture(scope="module")
def wide() -> RandomCheckpoint:
    """Make one expert of the published sizes, so that its rows have the published length."""
    return RandomCheckpoint(dataclasses.replace(GPT_OSS_120B, n_experts=1, experts_per_token=1, vocab_size=1000))


@pytest.mark.parametrize("proj", ["gate_up", "down"])
def test_expert_rows_map_order_1_to_order_1(wide, proj):
    blocks, scales = (wide.tensor(EXPERT_ROWS.format(proj, part)).numpy() for part in ("blocks", "scales"))
    outputs = dequantize(blocks, scales)[0] @ np.random.default_rng(0).standard_normal(2880)
    # The centre exponent is rounded, which is worth a factor of sqrt(2) either way.
    assert 0.6 < np.sqrt(np.mean(outputs**2)) < 1.5


def test_expert_bytes_cover_what_the_format_can_hold(wide):
    blocks = wide.tensor(EXPERT_ROWS.format("gate_up", "blocks")).numpy()
    counts = np.bincount(blocks.ravel(), minlength=256)
    # 8.3 million draws: 32400 a byte, standard deviation 180; six of them.
    assert np.abs(counts - blocks.size / 256).max() < 6 * math.sqrt(blocks.size / 256)
    scales = wide.tensor(EXPERT_ROWS.format("gate_up", "scales")).numpy()
    kinds = np.array([len(np.unique(row)) for row in scales[0]])
    assert kinds.min() >= 3
    assert {0, 1} == set(np.unique(scales % 2))
    assert 100 < scales.min() < scales.max() < 127


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("model.embed_tokens.weight", 0, 1),
        ("lm_head.weight", 0, 2880**-0.5),
        ("model.layers.1.self_attn.q_proj.weight", 0, 2880**-0.5),
        ("model.layers.1.self_attn.o_proj.weight", 0, 1 / 64),
        ("model.layers.1.input_layernorm.weight", 1, 0.1),
        ("model.norm.weight", 1, 0.1),
        ("model.layers.1.self_attn.q_proj.bias", 0, 0.1),
        ("model.layers.1.mlp.experts.down_proj_bias", 0, 0.1),
        ("model.layers.1.self_attn.sinks", 0, 1),
    ],
)
def test_dense_values_are_of_the_documented_size(wide, name, mean, std):
    values = wide.tensor(name).double()
    assert values.mean().item() == pytest.approx(mean, abs=5 * std / math.sqrt(values.numel()))
    # The standard error of a standard deviation is std / sqrt(2 n); rounding to bf16 is far below that.
    assert values.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * values.numel()))


def test_scales_enlarge_what_they_name_and_nothing_else():
    plain = RandomCheckpoint(SMALL)
    scaled = RandomCheckpoint(SMALL, weight_scale=2.0, expert_scale=16.0, bias_scale=8.0, sink_scale=4.0)
    for name, tensor in plain.tensors():
        if name.endswith("_scales"):
            assert torch.equal(scaled.tensor(name), tensor + 4), name
            continue
        kept = name.endswith(("norm.weight", "_blocks", "embed_tokens.weight"))
        factor = 1 if kept else 8 if name.endswith("bias") else 4 if name.endswith("sinks") else 2
        assert torch.equal(scaled.tensor(name), tensor * factor), name


@pytest.mark.parametrize("shards", [1, 4])
def test_written_folder_holds_every_tensor(tmp_path, shards):
    checkpoint = RandomCheckpoint(SMALL)
    write_checkpoint(checkpoint, tmp_path / "new" / "folder", shards)
    folder = tmp_path / "new" / "folder"
    assert read_config(folder) == SMALL
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == shards
    stored = {file.name: load_file(file) for file in files}
    tensors = {name: tensor for part in stored.values() for name, tensor in part.items()}
    assert tensors.keys() == expected_tensors(SMALL).keys()
    assert all(torch.equal(tensor, checkpoint.tensor(name)) for name, tensor in tensors.items())
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (shards > 1)
    if shards > 1:
        raw = json.loads(index.read_text())
        assert raw["weight_map"] == {name: file for file, part in stored.items() for name in part}
        assert raw["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        layer_1 = {file for name, file in raw["weight_map"].items() if name.startswith("model.layers.1.")}
        assert layer_1 == set(stored)


def test_write_checkpoint_refuses_a_folder_with_weights(tmp_path):
    write_checkpoint(RandomCheckpoint(SMALL), tmp_path)
    with pytest.raises(InputError, match="already holds"):
        write_checkpoint(RandomCheckpoint(SMALL), tmp_path, 2)


def test_transformers_finds_the_same_values(tmp_path):
    """The loader and the dequantizer of transformers agree on names, layout and the order of MXFP4 elements."""
    checkpoint = RandomCheckpoint(SMALL)
    model = transformers_model.load(write_checkpoint(checkpoint, tmp_path, 3))
    loaded = dict(model.named_parameters())
    expected = {name for name in expected_tensors(SMALL) if not name.endswith(("_blocks", "_scales"))}
    for name in expected:
        assert torch.equal(loaded[name], checkpoint.tensor(name).float()), name
    for layer in range(SMALL.n_layers):
        for proj in ("gate_up", "down"):
            name = f"model.layers.{layer}.mlp.experts.{proj}_proj"
            values = dequantize(*(checkpoint.tensor(f"{name}_{part}").numpy() for part in ("blocks", "scales")))
            # transformers keeps [experts, K, rows]; every product of an E2M1 value and a power of two is exact.
            np.testing.assert_array_equal(loaded[name].detach().numpy().swapaxes(1, 2), values.astype(np.float32))
    assert len(loaded) == len(expected) + 2 * SMALL.n_layers
    assert model(input_ids=torch.tensor([[5, 9, 200]])).logits.isfinite().all()
