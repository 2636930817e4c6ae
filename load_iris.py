"""Open an .iris archive, which is a model in one file, and read its tensors as views of the mapped file."""

import dataclasses
import hashlib
import mmap
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm

from checkpoints.checkpoint import MAX_TOKENIZER_BYTES, TOKENIZER_NAME
from checkpoints.config import (
    CONFIG_NAME,
    FP8_GROUPS,
    GENERATION_NAME,
    MAX_JSON_BYTES,
    MXFP4_GROUP,
    PRESETS,
    ModelConfig,
    expected_tensors,
    parse_config,
    read_config,
)
from checkpoints.iris_format import (
    BLOB_ALIGNMENT,
    DOCUMENTS,
    SCALES_ENDING,
    Entry,
    Header,
    archive_name,
    archive_tensors,
    read_header,
    stored_formats,
    unused_spans,
)
from system.errors import InputError
from system.files import (
    LFS_POINTER_START,
    FileState,
    check_same,
    file_errors,
    file_state,
    is_there,
    open_regular,
    path_of,
    read_small,
    refuse_lfs_pointer,
)
from system.mapped import name_on_bus_error, release_pages

HASH_CHUNK = 8 << 20  # bytes
MAX_HASH_THREADS = 8
MAX_DOCUMENT_BYTES = {CONFIG_NAME: MAX_JSON_BYTES, GENERATION_NAME: MAX_JSON_BYTES, TOKENIZER_NAME: MAX_TOKENIZER_BYTES}


class IrisArchive:
    """A checkpoint in one file whose table has been checked against its configuration; blobs are not read yet.

    Tensors are views of the mapped file, so host memory holds only the pages in use. Norms and sinks are float32.
    `config.dense` says which dense matrices are FP8; their scales are separate tensors.

    check_unchanged, and `tensors` at its end, raise InputError if the file was written to since it was opened. The name
    may move to another file, because the mapping keeps the one that was opened.
    """

    def __init__(self, path: Path, descriptor: int):
        """Open the file of a descriptor, and take over the descriptor. Raise InputError as open_archive does."""
        self.name = str(path)
        self._path = path
        self._file = open(descriptor, "rb", buffering=0)
        self._state: FileState = file_state(descriptor)
        refuse_lfs_pointer(self._read(0, len(LFS_POINTER_START)), self.name)
        self.header: Header = read_header(self._read, self._state.n_bytes, self.name)
        self.config: ModelConfig = dataclasses.replace(self._read_config(), dense=stored_formats(self.header.entries))
        _check_tensors(self.header, self.config, self.name)
        self._check_unused(max_bytes=BLOB_ALIGNMENT)
        self._entries = self._entries_of(self.config)
        name_on_bus_error(self.name)
        self._bytes = _map(self._file, self.header.file_bytes, self.name)

    def cut(self, n_layers: int) -> None:
        """Use only the first n_layers. Raise InputError if the model has fewer, TypeError if that is no integer."""
        self.config = self.config.cut(n_layers)
        self._entries = self._entries_of(self.config)

    def tensor(self, name: str) -> torch.Tensor:
        """Return the tensor of this published name. Raise KeyError if the model has no such tensor."""
        entry = self._entries[name]
        return self._bytes[entry.offset : entry.end].view(entry.dtype).view(entry.shape)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each (published name, tensor), in the order of the file."""
        for name in sorted(self._entries, key=lambda name: self._entries[name].offset):
            tensor = self.tensor(name)
            yield name, tensor
            release_pages(tensor, str(self._path.resolve()))
        self.check_unchanged()

    def contiguous_bytes(self, names: Sequence[str]) -> torch.Tensor | None:
        """Return the bytes of these tensors, uint8, or None unless they follow each other in the file without gaps."""
        entries = [self._entries[name] for name in names]
        if any(entry.end != following.offset for entry, following in pairwise(entries)):
            return None
        return self._bytes[entries[0].offset : entries[-1].end]

    def document(self, name: str) -> bytes | None:
        """Return the content of a document in the archive, or beside one of version 1, or None if there is none.

        Raise InputError if it is too large, damaged, or cannot be read.
        """
        max_bytes = MAX_DOCUMENT_BYTES[name]
        if self.header.version == 1:
            path = self._path.parent / name
            return read_small(path, max_bytes) if is_there(path) else None
        entry = self.header.entries.get(name)
        if entry is None:
            return None
        if entry.n_bytes > max_bytes:
            raise InputError(f"{self.name}: {name} has {entry.n_bytes} bytes, at most {max_bytes} are expected")
        data = self._read(entry.offset, entry.n_bytes)
        if hashlib.sha256(data).digest() != self.header.digests[name]:
            raise InputError(f"{self.name}: {name}: the checksum does not match: the file is damaged")
        return data

    def check_unchanged(self) -> None:
        """Raise InputError if the file was written to since it was opened."""
        check_same(self._state, file_state(self._file.fileno()), self.name)

    def files(self) -> list[Path]:
        """Return the paths of the archive and, for version 1, of the documents beside it."""
        return [self._path, *(self._path.parent / name for name in MAX_DOCUMENT_BYTES if self.header.version == 1)]

    def verify(self, show_progress: bool = False) -> None:
        """Read the whole file and compare checksums.

        Raise InputError, naming the tensor, if one does not match, if bytes outside the blobs are not zero, or if the
        archive is of version 1, which has no checksums.
        """
        if self.header.digests is None:
            raise InputError(f"{self.name}: version 1 holds no checksums")
        self._check_unused()
        entries = sorted(self.header.entries.values(), key=lambda entry: entry.offset)
        total = sum(entry.n_bytes for entry in entries)
        with (
            ThreadPoolExecutor(min(MAX_HASH_THREADS, os.cpu_count() or 1)) as pool,
            tqdm(total=total, unit="B", unit_scale=True, desc="checksums", disable=not show_progress) as bar,
        ):
            try:
                for entry, digest in zip(entries, pool.map(self._digest, entries)):
                    if digest != self.header.digests[entry.name]:
                        raise InputError(
                            f"{self.name}: tensor {entry.name}: the checksum does not match: the file is damaged"
                        )
                    bar.update(entry.n_bytes)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        self.check_unchanged()

    def _check_unused(self, max_bytes: int | None = None) -> None:
        """Raise InputError unless all bytes between the blobs are zero, which version 1 does not require.

        Spans of more than max_bytes are skipped.
        """
        for span in unused_spans(self.header) if self.header.version > 1 else ():
            if max_bytes is not None and len(span) > max_bytes:
                continue
            for offset in range(span.start, span.stop, HASH_CHUNK):
                if self._read(offset, min(HASH_CHUNK, span.stop - offset)).strip(b"\0"):
                    where = f"from {span.start} to {span.stop}"
                    raise InputError(f"{self.name}: holds bytes other than zero, {where}, that belong to no tensor")

    def _digest(self, entry: Entry) -> bytes:
        digest = hashlib.sha256()
        for offset in range(entry.offset, entry.end, HASH_CHUNK):
            digest.update(self._read(offset, min(HASH_CHUNK, entry.end - offset)))
        return digest.digest()

    def _entries_of(self, config: ModelConfig) -> dict[str, Entry]:
        """Return published name -> entry for the tensors of a configuration."""
        return {name: self.header.entries[archive_name(name)] for name in expected_tensors(config)}

    def _read(self, offset: int, n_bytes: int) -> bytes:
        """Read without the mapping, because a truncated file then gives fewer bytes instead of a signal."""
        pieces, descriptor = [], self._file.fileno()
        with file_errors(self.name):
            while n_bytes and (piece := os.pread(descriptor, n_bytes, offset)):
                pieces.append(piece)
                offset, n_bytes = offset + len(piece), n_bytes - len(piece)
        return b"".join(pieces)

    def _read_config(self) -> ModelConfig:
        if self.header.version == 1:
            return self._config_of_version_1()
        config = self.document(CONFIG_NAME)
        if config is None:
            raise InputError(f"{self.name}: holds no {CONFIG_NAME}")
        return parse_config(
            config,
            self.document(GENERATION_NAME),
            f"{self.name}: {CONFIG_NAME}",
            f"{self.name}: {GENERATION_NAME}",
        )

    def _config_of_version_1(self) -> ModelConfig:
        """Return the configuration in the file's folder, or that of the published model with the tensors' sizes."""
        layers = {int(match[1]) for name in self.header.entries if (match := re.match(r"L(\d{1,4})\.", name))}
        n_layers = len(layers)
        if is_there(self._path.parent / CONFIG_NAME):
            config = read_config(self._path.parent)
            return config.cut(n_layers) if 1 <= n_layers < config.n_layers else config
        stored = {name: (entry.dtype, entry.shape) for name, entry in self.header.entries.items()}
        for preset in PRESETS.values():
            if 1 <= n_layers <= preset.n_layers and stored == archive_tensors(preset.cut(n_layers)):
                return preset.cut(n_layers)
        raise InputError(
            f"{self.name}: version 1 holds no configuration, and the sizes are not those of gpt-oss-120b or 20b: "
            f"put the model's {CONFIG_NAME} beside it"
        )


def open_archive(
    path: str | Path, n_layers: int | None = None, verify: bool = False, show_progress: bool = False
) -> IrisArchive:
    """Open an archive and check its header and configuration; with n_layers only the first layers are used.

    With `verify` every blob is compared with its checksum. Raise InputError, naming the file and tensor, if it is no
    archive, damaged, of an unknown version or order, or does not hold exactly the tensors of its configuration;
    TypeError if `path` is no path.
    """
    path = path_of(path, "model")
    archive = IrisArchive(path, open_regular(path))
    if n_layers is not None:
        archive.cut(n_layers)
    if verify:
        archive.verify(show_progress)
    return archive


def _map(file, n_bytes: int, name: str) -> torch.Tensor:
    """Map a file, and return its bytes as uint8, which must not be written to."""
    try:
        mapping = mmap.mmap(file.fileno(), n_bytes, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise InputError(f"{name}: cannot be mapped ({error})") from None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapping, dtype=torch.uint8)


def _check_tensors(header: Header, config: ModelConfig, source: str) -> None:
    """Raise InputError unless an archive holds exactly its configuration's tensors, with their dtypes and shapes."""
    if config.dense.o == FP8_GROUPS and config.q_size % MXFP4_GROUP:  # read_config checks the hidden sizes
        raise InputError(
            f"{source}: tensor L0.w_o_scales is uint8, but rows of {config.q_size} elements are no whole groups of 32"
        )
    expected = archive_tensors(config)
    for name, entry in header.entries.items():
        if name in DOCUMENTS and header.version > 1:
            required = (torch.uint8, (entry.n_bytes,))
        elif name in expected:
            required = expected[name]
        elif name.removesuffix(SCALES_ENDING) in expected:
            raise InputError(f"{source}: tensor {name} is there, but {name.removesuffix(SCALES_ENDING)} is not FP8")
        else:
            raise InputError(f"{source}: unknown tensor {name!r}: not part of the model that {CONFIG_NAME} describes")
        if (entry.dtype, entry.shape) != required:
            stored = _type_text(entry.dtype, entry.shape)
            raise InputError(f"{source}: tensor {name} is {stored}, expected {_type_text(*required)}")
    for name in expected:
        if name not in header.entries:
            raise InputError(f"{source}: tensor {name} is missing")


def _type_text(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
