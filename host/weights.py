"""Load weights in the layout that the kernels read: on the device, one tensor per kind with all layers stacked."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from huggingface_hub.utils import tqdm

from checkpoints.checkpoint import check_unchanged
from checkpoints.config import FP8_GROUPS, FP8_ROWS, SCALE_ENDING, ModelConfig, expected_tensors, scale_name
from checkpoints.fp8 import quantize_into
from checkpoints.names import MODEL_TENSORS, tensor_names
from common.gemv_dense import item_bytes, scale_stride
from common.sm90.tiles import block_bytes, drop_elements_of_nan, pack_blocks, pack_scales, scale_bytes, tile_count
from host.tuning import Tuning
from host.upload import Uploader

PIECE_BYTES = 32 << 20  # packed or quantized at a time
DENSE_FIELDS = ("qkv", "o", "router", "lm_head")


class Weights(NamedTuple):
    """Device tensors for L layers, E experts, H hidden and I intermediate; bfloat16 unless a comment says otherwise."""

    embed: torch.Tensor  # [vocab, H]
    attn_norm: torch.Tensor  # [L, H] float32
    qkv: torch.Tensor  # [L, q + k + v rows, H / 2] int32, two bfloat16 each, as all dense matrices that a GEMV reads
    qkv_bias: torch.Tensor  # [L, q + k + v rows]
    sinks: torch.Tensor  # [L, heads] float32
    o: torch.Tensor  # [L, H, q rows / 2] int32
    o_bias: torch.Tensor  # [L, H]
    mlp_norm: torch.Tensor  # [L, H] float32
    router: torch.Tensor  # [L, E, H / 2] int32
    router_bias: torch.Tensor  # [L, E]
    gate_up: torch.Tensor  # [L, E, 2I, H / 8] int32, eight E2M1 each; or packed tiles, see common/sm90/tiles.py
    gate_up_scales: torch.Tensor  # [L, E, 2I, H / 32] uint8, E8M0
    gate_up_bias: torch.Tensor  # [L, E, 2I]
    down: torch.Tensor  # [L, E, H, I / 8] int32, eight E2M1 each
    down_scales: torch.Tensor  # [L, E, H, I / 32] uint8, E8M0
    down_bias: torch.Tensor  # [L, E, H]
    final_norm: torch.Tensor  # [H] float32
    lm_head: torch.Tensor  # [vocab, H / 2] int32
    # Scales of dense matrices in E4M3, which are int32 [.., K / 4]: float32 [L, rows] or uint8 [L, rows, scale_stride].
    qkv_scales: torch.Tensor
    o_scales: torch.Tensor
    router_scales: torch.Tensor
    lm_head_scales: torch.Tensor  # without the dimension L


def weight_shapes(
    config: ModelConfig, tuning: Tuning | None = None, fields: Sequence[str] = Weights._fields
) -> Weights:
    """Return (shape, dtype) of each field. Experts packed for the tuning's machine are int32 [L, E, tiles, words].

    fields: those that a device holds; the others are empty.
    """
    n, e, h, i = config.n_layers, config.n_experts, config.hidden_size, config.intermediate_size
    bf16, f32, u8, i32 = torch.bfloat16, torch.float32, torch.uint8, torch.int32
    experts = {}
    for name, rows, k in (("gate_up", 2 * i, h), ("down", h, i)):
        if tuning and tuning.machine.experts.is_packed:
            tiles = (n, e, tile_count(rows))
            experts[name] = ((*tiles, block_bytes(k) // 4), i32)
            experts[f"{name}_scales"] = ((*tiles, scale_bytes(k, tuning.num_warps) // 4), i32)
        else:
            experts[name] = ((n, e, rows, k // 8), i32)
            experts[f"{name}_scales"] = ((n, e, rows, k // 32), u8)
    dense = {}
    for name, (shape, dense_format) in dense_matrices(config).items():
        dense[name] = ((*shape[:-1], shape[-1] * item_bytes(dense_format) // 4), i32)
        dense[f"{name}_scales"] = _dense_scales(shape, dense_format)
    shapes = Weights(
        embed=((config.vocab_size, h), bf16),
        attn_norm=((n, h), f32),
        qkv_bias=((n, config.qkv_size), bf16),
        sinks=((n, config.n_heads), f32),
        o_bias=((n, h), bf16),
        mlp_norm=((n, h), f32),
        router_bias=((n, e), bf16),
        gate_up_bias=((n, e, 2 * i), bf16),
        down_bias=((n, e, h), bf16),
        final_norm=((h,), f32),
        **dense,
        **experts,
    )
    return shapes._replace(
        **{name: ((0,), dtype) for name, (_, dtype) in shapes._asdict().items() if name not in fields}
    )


def held_fields(checkpoint) -> Sequence[str]:
    """Return the fields of Weights that a checkpoint fills: all, but for one of several GPUs with other matrices."""
    return getattr(checkpoint, "fields", Weights._fields)


def dense_matrices(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return field of Weights -> (shape in elements, format) for each dense matrix that is multiplied."""
    n, h, dense = config.n_layers, config.hidden_size, config.dense
    return {
        "qkv": ((n, config.qkv_size, h), dense.qkv),
        "o": ((n, h, config.q_size), dense.o),
        "router": ((n, config.n_experts, h), dense.router),
        "lm_head": ((config.vocab_size, h), dense.head),
    }


def _dense_scales(shape: tuple[int, ...], dense_format: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Return (shape, dtype) of a dense matrix's scales."""
    if dense_format == FP8_GROUPS:
        return (*shape[:-1], scale_stride(shape[-1], dense_format)), torch.uint8
    return shape[:-1] if dense_format == FP8_ROWS else (0,), torch.float32


def weight_bytes(config: ModelConfig, tuning: Tuning | None = None, fields: Sequence[str] = Weights._fields) -> int:
    """Return the bytes of all weights, with experts packed for the tuning's machine if it packs them."""
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in weight_shapes(config, tuning, fields))


def weights_in_place(checkpoint, config: ModelConfig, device: torch.device, tuning: Tuning) -> dict[str, torch.Tensor]:
    """Return the fields of Weights that a CPU reads in place: those that a mapped archive stores contiguously."""
    contiguous_bytes = getattr(checkpoint, "contiguous_bytes", None)  # see load_iris.IrisArchive
    fields = {}
    if contiguous_bytes and device.type == "cpu":
        for field, (shape, dtype) in weight_shapes(config, tuning)._asdict().items():
            n_bytes = torch.Size(shape).numel() * dtype.itemsize
            is_stored = n_bytes and not _is_converted(field, checkpoint.config, config, tuning)
            stored = contiguous_bytes(tensor_names(field, config.n_layers)) if is_stored else None
            if stored is not None and stored.nbytes == n_bytes:  # scales may need padding
                fields[field] = stored.view(dtype).view(shape)
    return fields


def bytes_to_load(checkpoint, config: ModelConfig, device: torch.device, tuning: Tuning) -> int:
    """Return the bytes that load_weights will allocate on the device."""
    in_place = weights_in_place(checkpoint, config, device, tuning)
    return weight_bytes(config, tuning, held_fields(checkpoint)) - sum(field.nbytes for field in in_place.values())


def load_weights(
    checkpoint, config: ModelConfig, device: torch.device, tuning: Tuning, show_progress: bool = False
) -> Weights:
    """Load a checkpoint's weights onto the device, copying all fields except those of weights_in_place.

    config: the checkpoint's configuration, with `dense` set to the formats of the dense matrices on the device. Those
        that the checkpoint holds in bfloat16 are quantized on the device.
    tuning: its machine determines whether experts are packed.

    Raise InputError if a file of the checkpoint changed while it was read, ValueError if a tensor is missing.
    """
    fields = weights_in_place(checkpoint, config, device, tuning)
    targets = {}
    for field, (shape, dtype) in weight_shapes(config, tuning, held_fields(checkpoint))._asdict().items():
        if field not in fields:
            fields[field] = torch.zeros(shape, dtype=dtype, device=device)
            targets |= _targets(config, field, fields[field])
    upload = Uploader(device)
    total = sum(target.nbytes for target in targets.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not show_progress) as bar:
        for name, tensor in checkpoint.tensors() if targets else ():
            if name in targets:
                target = targets.pop(name)
                if tensor.dtype == torch.bfloat16 and scale_name(name) in targets:
                    scales = targets.pop(scale_name(name))
                    quantize_into(target, scales, tensor, PIECE_BYTES, upload)
                    bar.update(scales.nbytes)
                else:
                    _fill(target, name, tensor, tuning, upload)
                bar.update(target.nbytes)
    if targets:
        raise ValueError(f"the checkpoint gave no {next(iter(targets))}")
    if tuning.machine.experts.is_packed:
        for name in ("gate_up", "down"):
            for blocks, scales in zip(fields[name], fields[f"{name}_scales"]):
                drop_elements_of_nan(blocks, scales, tuning.num_warps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    check_unchanged(checkpoint)
    return Weights(**fields)


def _is_converted(field: str, stored: ModelConfig, config: ModelConfig, tuning: Tuning) -> bool:
    """Return whether loading changes a field's values or their order."""
    matrix = field.removesuffix("_scales")
    if matrix in DENSE_FIELDS:
        return dense_matrices(stored)[matrix][1] != dense_matrices(config)[matrix][1]
    return tuning.machine.experts.is_packed and field in ("gate_up", "gate_up_scales", "down", "down_scales")


def _fill(target: torch.Tensor, name: str, tensor: torch.Tensor, tuning: Tuning, upload: Uploader) -> None:
    if tuning.machine.experts.is_packed and name.endswith(("_blocks", "_scales")):
        # A few experts at a time, as packing takes several times their bytes.
        step = max(1, PIECE_BYTES // tensor[0].nbytes)
        for packed, matrices in zip(target.split(step), tensor.split(step)):
            matrices = upload(matrices)
            packed.copy_(pack_blocks(matrices) if name.endswith("_blocks") else pack_scales(matrices, tuning.num_warps))
    elif name.endswith(SCALE_ENDING):
        target[..., : tensor.shape[-1]].copy_(upload(tensor))
    else:
        target = target.view(tensor.dtype) if target.dtype == torch.int32 else target
        upload.into(target.view(tensor.shape), tensor)


def _targets(config: ModelConfig, field: str, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return published name -> the part of a field of Weights that the tensor fills."""
    if not weights.numel():
        return {}
    names, shapes = tensor_names(field, config.n_layers), expected_tensors(config)
    if field.removesuffix("_scales") in MODEL_TENSORS:
        return {names[0]: weights}
    return dict(zip(names, weights.flatten(0, 1).split([shapes[name][0][0] for name in names])))
