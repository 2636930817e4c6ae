"""multi_gpu/checkpoint.py: the parts of all ranks are the checkpoint, each tensor cut the way its phase needs it."""

import pytest
import torch
from made_up_models import MemoryCheckpoint, loud_checkpoint, small_config

from checkpoints.config import FP8_GROUPS, FP8_ROWS, SCALE_ENDING, DenseFormats, expected_tensors
from checkpoints.fp8 import QuantizedCheckpoint
from host.weights import Weights
from multi_gpu.checkpoint import ShareCheckpoint
from multi_gpu.protocol import shares_of
from system.errors import InputError

FORMATS = {
    "bf16": DenseFormats(),
    "FP8 rows": DenseFormats(qkv=FP8_ROWS, o=FP8_ROWS, router=FP8_ROWS, head=FP8_ROWS),
    "FP8 groups": DenseFormats(qkv=FP8_GROUPS, o=FP8_GROUPS, router=FP8_GROUPS, head=FP8_GROUPS),
}
SIZES = {
    "even": small_config(n_layers=1, layer_is_sliding=(True,), intermediate_size=256),
    "uneven": small_config(n_layers=1, layer_is_sliding=(True,), intermediate_size=11 * 32, vocab_size=163),
}
with_dense = pytest.mark.parametrize("dense", FORMATS.values(), ids=FORMATS.keys())
with_ranks = pytest.mark.parametrize("n_ranks", [1, 2, 4, 8])


@pytest.fixture(scope="module", params=SIZES.values(), ids=SIZES.keys())
def checkpoint(request) -> MemoryCheckpoint:
    return loud_checkpoint(request.param)


def parts_of(checkpoint, layout: str, n_ranks: int, dense: DenseFormats | None = None) -> list[ShareCheckpoint]:
    return [ShareCheckpoint(checkpoint, share, dense) for share in shares_of(checkpoint.config, layout, n_ranks)]


def put_together(name: str, parts: list[torch.Tensor], n_kv_heads: int) -> torch.Tensor:
    """Return the published tensor from the parts of all ranks, which this file cuts in its own way."""
    end = name.removesuffix(SCALE_ENDING)
    if ".k_proj." in name or ".v_proj." in name:
        sharers = max(1, len(parts) // n_kv_heads)
        for n in range(0, len(parts), sharers):
            assert all(same_bits(part, parts[n]) for part in parts[n : n + sharers]), "ranks that share a KV head"
        return torch.cat([part.view(bits(part)) for part in parts[::sharers]])
    columns = end.endswith("o_proj.weight") and parts[0].dim() == 2
    rows = ".q_proj." in name or end.endswith(("embed_tokens.weight", "lm_head.weight", ".sinks"))
    of_experts = ".gate_up_proj_" in name, name.endswith((".down_proj_blocks", ".down_proj_scales"))
    for condition, dim in ((columns, 1), (rows, 0), (of_experts[0], 1), (of_experts[1], 2)):
        if condition:
            return torch.cat([part.view(bits(part)) for part in parts], dim)
    if name.endswith("down_proj_bias"):
        assert not any(part.any() for part in parts[1:]), "only rank 0 adds the bias"
        return parts[0]
    assert all(same_bits(part, parts[0]) for part in parts), f"{name} is whole on every rank"
    return parts[0]


def bits(tensor: torch.Tensor) -> torch.dtype:
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    same_kind = one.itemsize == other.itemsize and one.shape == other.shape
    return same_kind and torch.equal(one.contiguous().view(bits(one)), other.contiguous().view(bits(other)))


@with_dense
@with_ranks
def test_the_parts_of_all_ranks_are_the_checkpoint(checkpoint, n_ranks, dense):
    """Dense matrices are those of one GPU to the bit, quantized before they are cut."""
    parts = parts_of(checkpoint, "tp", n_ranks, dense)
    whole = dict(QuantizedCheckpoint(checkpoint, dense).tensors())
    found = [dict(part.tensors()) for part in parts]
    for part, tensors in zip(parts, found):
        assert list(tensors) == list(whole)
        for name, tensor in tensors.items():
            assert same_bits(part.tensor(name), tensor)
    for name, tensor in whole.items():
        assert same_bits(put_together(name, [each[name] for each in found], checkpoint.config.n_kv_heads), tensor), name


@with_dense
@with_ranks
def test_a_part_has_the_shapes_of_its_own_config(checkpoint, n_ranks, dense):
    for part in parts_of(checkpoint, "tp", n_ranks, dense):
        expected = expected_tensors(part.config)
        assert {name: shape for name, (shape, _) in expected.items()} == {
            name: tuple(tensor.shape) for name, tensor in part.tensors()
        }
        assert part.config.dense == dense


def test_gate_and_up_rows_of_the_same_outputs_stay_together(checkpoint):
    """Row 2i is the gate and row 2i + 1 the up of intermediate element i, whose column of down is on the same rank."""
    name = "model.layers.0.mlp.experts.{}"
    for part, share in zip(parts_of(checkpoint, "tp", 4), shares_of(checkpoint.config, "tp", 4)):
        for kind in ("blocks", "scales", "bias"):
            whole = checkpoint.tensor(name.format(f"gate_up_proj_{kind}"))
            rows = [row for i in share.intermediate for row in (2 * i, 2 * i + 1)]
            assert torch.equal(part.tensor(name.format(f"gate_up_proj_{kind}")), whole[:, rows])
        scales = checkpoint.tensor(name.format("down_proj_scales"))
        columns = [i // 32 for i in share.intermediate[::32]]
        assert torch.equal(part.tensor(name.format("down_proj_scales")), scales[:, :, columns])


def test_o_biases_are_whole_on_every_rank(checkpoint):
    """The residual without the projection, which every rank has, includes the bias; the partial sums do not."""
    name = "model.layers.0.self_attn.o_proj.bias"
    for part in parts_of(checkpoint, "tp", 4):
        assert torch.equal(part.tensor(name), checkpoint.tensor(name))


@pytest.mark.parametrize("n_ranks", [2, 3, 5])
def test_roles_hold_whole_tensors_of_their_kind(checkpoint, n_ranks):
    attention, *experts = parts_of(checkpoint, "roles", n_ranks)
    of_experts = {name: tensor for name, tensor in checkpoint.tensors() if ".mlp.experts." in name}
    others = {name: tensor for name, tensor in checkpoint.tensors() if name not in of_experts}
    assert len(of_experts) == 6
    for part, expected, missing in [(attention, others, of_experts), *((part, of_experts, others) for part in experts)]:
        found = dict(part.tensors())
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        for name in missing:
            assert not part.holds(name)
            with pytest.raises(KeyError):
                part.tensor(name)


def test_fields_of_a_rank(checkpoint):
    of_experts = {"gate_up", "gate_up_scales", "gate_up_bias", "down", "down_scales", "down_bias"}
    attention, expert = parts_of(checkpoint, "roles", 2)
    assert set(expert.fields) == of_experts
    assert set(attention.fields) == set(Weights._fields) - of_experts
    assert all(part.fields == list(Weights._fields) for part in parts_of(checkpoint, "tp", 2))


def test_a_part_passes_on_name_and_documents(checkpoint):
    class WithDocuments(MemoryCheckpoint):
        def document(self, name: str) -> bytes:
            return name.encode()

    part = ShareCheckpoint(
        WithDocuments(checkpoint.config, dict(checkpoint.tensors())), shares_of(checkpoint.config, "tp", 2)[1]
    )
    assert (part.name, part.document("tokenizer.json")) == ("memory", b"tokenizer.json")
    part.check_unchanged()


def test_another_fp8_format_than_the_checkpoint_holds_is_refused(checkpoint):
    held = FORMATS["FP8 rows"]
    tensors = dict(QuantizedCheckpoint(checkpoint, held).tensors())
    quantized = MemoryCheckpoint(checkpoint.config, tensors).with_config(dense=held)
    share = shares_of(checkpoint.config, "tp", 2)[0]
    assert ShareCheckpoint(quantized, share).config.dense == held
    with pytest.raises(InputError):
        ShareCheckpoint(quantized, share, FORMATS["FP8 groups"])
