"""Weights as the kernel reads them: one tensor a kind, all layers stacked, on the device."""

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

PIECE_BYTES = 32 << 20  # that are packed or quantized at a time
DENSE_FIELDS = ("qkv", "o", "router", "lm_head")


class Weights(NamedTuple):
    """Device tensors; L layers, E experts, H hidden, I intermediate. bfloat16 unless said."""

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
    # Of dense matrices in E4M3, which are [.., K / 4] int32 then: [L, rows] float32 or [L, rows, scale_stride] uint8.
    qkv_scales: torch.Tensor
    o_scales: torch.Tensor
    router_scales: torch.Tensor
    lm_head_scales: torch.Tensor  # the same without L


def weight_shapes(config: ModelConfig, tuning: Tuning | None = None) -> Weights:
    """(shape, dtype) of each field. Experts packed for a tuning's machine are int32 [L, E, tiles, words]."""
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
    return Weights(
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


def dense_matrices(config: ModelConfig) -> dict[str, tuple[tuple[int, ...], str]]:
    """Field of Weights -> (shape in elements, format) of each dense matrix that is multiplied."""
    n, h, dense = config.n_layers, config.hidden_size, config.dense
    return {
        "qkv": ((n, config.qkv_size, h), dense.qkv),
        "o": ((n, h, config.q_size), dense.o),
        "router": ((n, config.n_experts, h), dense.router),
        "lm_head": ((config.vocab_size, h), dense.head),
    }


def _dense_scales(shape: tuple[int, ...], dense_format: str) -> tuple[tuple[int, ...], torch.dtype]:
    """(shape, dtype) of the scales of a dense matrix."""
    if dense_format == FP8_GROUPS:
        return (*shape[:-1], scale_stride(shape[-1], dense_format)), torch.uint8
    return shape[:-1] if dense_format == FP8_ROWS else (0,), torch.float32


def weight_bytes(config: ModelConfig, tuning: Tuning | None = None) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in weight_shapes(config, tuning))


def weights_in_place(checkpoint, config: ModelConfig, device: torch.device, tuning: Tuning) -> dict[str, torch.Tensor]:
    """Fields of Weights that a CPU can use where they lie: those that a mapped archive holds in one piece."""
    run_of = getattr(checkpoint, "run_of", None)  # see load_iris.IrisArchive
    fields = {}
    if run_of and device.type == "cpu":
        for field, (shape, dtype) in weight_shapes(config, tuning)._asdict().items():
            n_bytes = torch.Size(shape).numel() * dtype.itemsize
            stands = n_bytes and not _is_converted(field, checkpoint.config, config, tuning)
            run = run_of(tensor_names(field, config.n_layers)) if stands else None
            if run is not None and run.nbytes == n_bytes:  # scales may need padding
                fields[field] = run.view(dtype).view(shape)
    return fields


def bytes_to_load(checkpoint, config: ModelConfig, device: torch.device, tuning: Tuning) -> int:
    """What load_weights will allocate."""
    in_place = weights_in_place(checkpoint, config, device, tuning)
    return weight_bytes(config, tuning) - sum(field.nbytes for field in in_place.values())


def load_weights(
    checkpoint, config: ModelConfig, device: torch.device, tuning: Tuning, show_progress: bool = False
) -> Weights:
    """A checkpoint's weights on the device, copied but for weights_in_place.

    config: that of the checkpoint, but its `dense` says how the dense matrices are held, as `tuning` does for experts;
    those that the checkpoint has in bfloat16 are quantized on the device.
    InputError if a file of the checkpoint was changed meanwhile.
    """
    fields = weights_in_place(checkpoint, config, device, tuning)
    places = {}
    for field, (shape, dtype) in weight_shapes(config, tuning)._asdict().items():
        if field not in fields:
            fields[field] = torch.zeros(shape, dtype=dtype, device=device)
            places |= _places(config, field, fields[field])
    upload = Uploader(device)
    total = sum(place.nbytes for place in places.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights", disable=not show_progress) as bar:
        for name, tensor in checkpoint.tensors() if places else ():
            if name in places:
                place = places.pop(name)
                if tensor.dtype == torch.bfloat16 and scale_name(name) in places:
                    scales = places.pop(scale_name(name))
                    quantize_into(place, scales, tensor, PIECE_BYTES, upload)
                    bar.update(scales.nbytes)
                else:
                    _fill(place, name, tensor, tuning, upload)
                bar.update(place.nbytes)
    if places:
        raise ValueError(f"the checkpoint gave no {next(iter(places))}")
    if tuning.machine.experts.is_packed:
        for name in ("gate_up", "down"):
            for blocks, scales in zip(fields[name], fields[f"{name}_scales"]):
                drop_elements_of_nan(blocks, scales, tuning.num_warps)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    check_unchanged(checkpoint)
    return Weights(**fields)


def _is_converted(field: str, stored: ModelConfig, config: ModelConfig, tuning: Tuning) -> bool:
    """Whether the values are other than the checkpoint's, or in another order."""
    matrix = field.removesuffix("_scales")
    if matrix in DENSE_FIELDS:
        return dense_matrices(stored)[matrix][1] != dense_matrices(config)[matrix][1]
    return tuning.machine.experts.is_packed and field in ("gate_up", "gate_up_scales", "down", "down_scales")


def _fill(place: torch.Tensor, name: str, tensor: torch.Tensor, tuning: Tuning, upload: Uploader) -> None:
    if tuning.machine.experts.is_packed and name.endswith(("_blocks", "_scales")):
        # A few experts at a time, as packing takes several times their bytes.
        step = max(1, PIECE_BYTES // tensor[0].nbytes)
        for some, matrices in zip(place.split(step), tensor.split(step)):
            matrices = upload(matrices)
            some.copy_(pack_blocks(matrices) if name.endswith("_blocks") else pack_scales(matrices, tuning.num_warps))
    elif name.endswith(SCALE_ENDING):
        place[..., : tensor.shape[-1]].copy_(upload(tensor))
    else:
        target = place.view(tensor.dtype) if place.dtype == torch.int32 else place
        upload.into(target.view(tensor.shape), tensor)


def _places(config: ModelConfig, field: str, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name of a tensor -> the part of a field of Weights that it fills."""
    if not weights.numel():
        return {}
    names, shapes = tensor_names(field, config.n_layers), expected_tensors(config)
    if field.removesuffix("_scales") in MODEL_TENSORS:
        return {names[0]: weights}
    return dict(zip(names, weights.flatten(0, 1).split([shapes[name][0][0] for name in names])))
