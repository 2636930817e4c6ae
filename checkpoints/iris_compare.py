"""Compare two checkpoints, tensor by tensor."""

import dataclasses

import torch
from huggingface_hub.utils import tqdm

from checkpoints.checkpoint import TOKENIZER_NAME, Checkpoint, check_unchanged

CHUNK = 1 << 24  # elements compared at a time


def first_difference(ours: Checkpoint, theirs: Checkpoint, show_progress: bool = False) -> str | None:
    """Return the first difference between two checkpoints, for example "tensor NAME", or None if they are equal.

    Values are compared bit by bit in the wider of the two dtypes. Raise InputError if a file changes meanwhile.
    """
    if dataclasses.replace(ours.config, dense=theirs.config.dense) != theirs.config:
        return "the configuration"
    if ours.config.dense != theirs.config.dense:
        return "the format of the dense matrices"
    if ours.document(TOKENIZER_NAME) != theirs.document(TOKENIZER_NAME):
        return "the tokenizer"
    with tqdm(unit="tensors", desc="comparing", disable=not show_progress) as bar:
        for name, tensor in ours.tensors():
            if not _same(tensor, theirs.tensor(name)):
                return f"tensor {name}"
            bar.update()
    check_unchanged(ours)
    check_unchanged(theirs)
    return None


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.shape == b.shape and all(
        torch.equal(x.to(dtype).view(torch.uint8), y.to(dtype).view(torch.uint8))
        for x, y in zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK))
    )
