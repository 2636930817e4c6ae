"""Write any checkpoint as an .iris archive, one tensor at a time."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from checkpoints.checkpoint import TOKENIZER_NAME, Checkpoint, check_unchanged, config_to_dict
from checkpoints.config import BF16, CONFIG_NAME, GENERATION_NAME, scale_name
from checkpoints.iris_format import Entry, archive_name, archive_tensors, encode_header, place_entries
from checkpoints.names import LAYER_TENSORS, MODEL_TENSORS, published_names
from system.output_file import replacing

CHUNK = 16 << 20  # bytes that are written and hashed at a time
QUIET_SECONDS = 10  # between two lines of progress without a terminal


def write_archive(
    checkpoint: Checkpoint,
    path: Path,
    force: bool = False,
    show_progress: bool = False,
    on_terminal: bool = True,
    check: Callable[[], None] = lambda: None,
    inputs: Sequence[Path] = (),
) -> int:
    """Write an archive of version 2, and return its size in bytes.

    Host memory holds one tensor at a time, or a mapped file's pages. Dense matrices keep the checkpoint's formats; wrap
    it in checkpoints.fp8.QuantizedCheckpoint to write FP8.

    force: replace an existing file, unless it is one of `inputs`.
    check: is called for every CHUNK; an exception that it raises ends the writing.

    Raise InputError if `path` exists (without `force`), there is too little space, or the checkpoint is damaged. After
    an error `path` is as it was before.
    """
    documents = _documents(checkpoint)
    entries = _plan(checkpoint, documents)
    by_name = {entry.name: entry for entry in entries}
    n_bytes = max(entry.end for entry in entries)
    digests = {}
    with (
        replacing(path, n_bytes, force, inputs=inputs) as file,
        ThreadPoolExecutor(1) as hashing,
        tqdm(
            total=sum(entry.n_bytes for entry in entries),
            unit="B",
            unit_scale=True,
            desc=path.name,
            disable=not show_progress,
            mininterval=0.1 if on_terminal else QUIET_SECONDS,
        ) as bar,
    ):

        def write(entry: Entry, data: memoryview) -> None:
            digest = hashlib.sha256()
            for start in range(0, len(data), CHUNK):
                check()
                chunk = data[start : start + CHUNK]
                hashed = hashing.submit(digest.update, chunk)
                file.write(chunk, entry.offset + start)
                hashed.result()
                bar.update(len(chunk))
            digests[entry.name] = digest.digest()

        for name, data in documents.items():
            write(by_name[name], memoryview(data))
        for name, tensor in checkpoint.tensors():
            entry = by_name[archive_name(name)]
            write(entry, _bytes_of(tensor, entry))
            del tensor  # frees it before the next one is read
        check()
        check_unchanged(checkpoint)
        file.write(encode_header(entries, digests), 0)
        bar.set_postfix_str("syncing")
    return n_bytes


def _documents(checkpoint: Checkpoint) -> dict[str, bytes]:
    documents = {CONFIG_NAME: json.dumps(config_to_dict(checkpoint.config), indent=2).encode() + b"\n"}
    for name in (GENERATION_NAME, TOKENIZER_NAME):
        data = checkpoint.document(name)
        if data:
            documents[name] = data
    return documents


def _plan(checkpoint: Checkpoint, documents: dict[str, bytes]) -> list[Entry]:
    """Return the entries: documents, then each field's tensors contiguously, so that a CPU can read them in place."""
    config = checkpoint.config
    tensors = archive_tensors(config)
    names = []
    for field in (*MODEL_TENSORS, *LAYER_TENSORS):
        published = published_names(field, config.n_layers)
        names += map(archive_name, published)
        if config.dense.format_of(published[0]) != BF16:
            names += [archive_name(scale_name(name)) for name in published]
    document_tensors = [(name, torch.uint8, (len(data),)) for name, data in documents.items()]
    return place_entries(document_tensors + [(name, *tensors[name]) for name in names])


def _bytes_of(tensor: torch.Tensor, entry: Entry) -> memoryview:
    assert tuple(tensor.shape) == entry.shape, entry.name
    tensor = tensor.cpu().to(entry.dtype).contiguous()
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())
