"""One rank's part of a checkpoint, as a checkpoint of its own."""

from collections.abc import Iterator

import torch
from torch import Tensor

from checkpoints.checkpoint import Checkpoint, check_unchanged
from checkpoints.config import MXFP4_GROUP, SCALE_ENDING, DenseFormats
from checkpoints.fp8 import QuantizedCheckpoint
from host.weights import Weights
from multi_gpu.protocol import Share

EXPERTS = ".mlp.experts."


class ShareCheckpoint:
    """The tensors of a checkpoint that a rank holds, cut to its share.

    Dense matrices are quantized before they are cut, so that all ranks together hold the values of a single GPU.
    """

    def __init__(self, checkpoint: Checkpoint, share: Share, dense: DenseFormats | None = None):
        """Wrap a checkpoint. Raise InputError if it holds a dense matrix in another FP8 format, see held_formats."""
        self._checkpoint = QuantizedCheckpoint(checkpoint, dense or DenseFormats())
        self._share = share
        self.config = share.config_of(self._checkpoint.config)
        self.name = checkpoint.name

    def tensor(self, name: str) -> Tensor:
        """Return this rank's part of the tensor of this published name. Raise KeyError if the rank has none of it."""
        if not self.holds(name):
            raise KeyError(name)
        return cut(name, self._checkpoint.tensor(name), self._share, self.config.head_dim)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each (name, part), in the checkpoint's order."""
        for name, tensor in self._checkpoint.tensors():
            if self.holds(name):
                yield name, cut(name, tensor, self._share, self.config.head_dim)

    @property
    def fields(self) -> list[str]:
        """The fields of host.weights.Weights that the rank holds."""
        return [name for name in Weights._fields if self._holds(name.startswith(("gate_up", "down")))]

    def _holds(self, is_of_experts: bool) -> bool:
        return self._share.has_experts if is_of_experts else self._share.has_attention

    def holds(self, name: str) -> bool:
        """Return whether the rank has any of the tensor of this published name."""
        return self._holds(EXPERTS in name)

    def document(self, name: str) -> bytes | None:
        """Return the checkpoint's document of this name, or None if it has none."""
        return self._checkpoint.document(name)

    def check_unchanged(self) -> None:
        """Raise InputError if a file that the checkpoint reads has changed since it was opened."""
        check_unchanged(self._checkpoint)


def cut(name: str, tensor: Tensor, share: Share, head_dim: int) -> Tensor:
    """Return a share's part of the tensor of this published name, in the published layout.

    The biases of down projections are added once: by rank 0, so that others have zeros.
    """
    matrix = name.removesuffix(SCALE_ENDING)
    queries = range(share.heads.start * head_dim, share.heads.stop * head_dim)
    keys = range(share.kv_heads.start * head_dim, share.kv_heads.stop * head_dim)
    gate_up = range(2 * share.intermediate.start, 2 * share.intermediate.stop)
    if ".q_proj." in name:
        return _part(tensor, 0, queries)
    if ".k_proj." in name or ".v_proj." in name:
        return _part(tensor, 0, keys)
    if matrix.endswith("o_proj.weight"):
        if matrix == name:
            return _part(tensor, 1, queries)
        if tensor.dim() == 1:  # a scale per row
            return tensor
        return _part(tensor, 1, range(queries.start // MXFP4_GROUP, queries.stop // MXFP4_GROUP))
    if name.endswith(".sinks"):
        return _part(tensor, 0, share.heads)
    if matrix in ("model.embed_tokens.weight", "lm_head.weight"):
        return _part(tensor, 0, share.vocabulary)
    if ".gate_up_proj_" in name:
        return _part(tensor, 1, gate_up)
    if ".down_proj_blocks" in name or ".down_proj_scales" in name:
        return _part(tensor, 2, share.groups)
    if name.endswith(".down_proj_bias") and share.layout == "tp" and share.rank > 0:
        return torch.zeros_like(tensor)
    return tensor


def _part(tensor: Tensor, dim: int, run: range) -> Tensor:
    return tensor.narrow(dim, run.start, len(run))
