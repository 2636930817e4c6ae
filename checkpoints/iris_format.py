"""Encode and decode the header of an .iris archive; docs/iris_format.md describes the format for other programs.

No file is trusted: a size is checked before anything of that size is read, and every error is an InputError that names
the file.
"""

import hashlib
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import mode

import numpy as np
import torch

from checkpoints.checkpoint import TOKENIZER_NAME
from checkpoints.config import (
    CONFIG_NAME,
    FP8_GROUPS,
    FP8_ROWS,
    GENERATION_NAME,
    MAX_LAYERS,
    SCALE_ENDING,
    DenseFormats,
    ModelConfig,
    expected_tensors,
)
from system.errors import InputError

MAGIC = b"IRISMDL1"
VERSION = 2  # the version that is written; version 1 can be read as well
PUBLISHED_ORDER = 0  # values are stored in the order of the published checkpoints
HEADER_ALIGNMENT = 4096
BLOB_ALIGNMENT = 256
DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.int32, torch.float8_e4m3fn)  # by code
VERSION_1_DTYPES = 4  # number of codes that version 1 knows
SAFETENSORS_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
MAX_DIMS = 8

DOCUMENTS = (CONFIG_NAME, GENERATION_NAME, TOKENIZER_NAME)  # stored beside the tensors

PREFIX = struct.Struct("<8sII")  # magic, version, entries
ENTRY = np.dtype(
    [
        ("name", "V128"),
        ("offset", "<u8"),
        ("n_bytes", "<u8"),
        ("dtype", "<u4"),
        ("n_dims", "<u4"),
        ("shape", "<u8", (MAX_DIMS,)),
    ]
)
DIGEST_BYTES = 32  # SHA-256
TRAILER = struct.Struct("<IIQ")  # order, 0, bytes of the file

# Published name -> name in an archive. Those of a layer follow "L" and its number.
_SHORT = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "lm_head",
}
_SHORT_OF_LAYER = {
    "input_layernorm.weight": "norm_attn",
    "post_attention_layernorm.weight": "norm_moe",
    "self_attn.sinks": "sinks",
    "self_attn.q_proj.weight": "w_q",
    "self_attn.k_proj.weight": "w_k",
    "self_attn.v_proj.weight": "w_v",
    "self_attn.q_proj.bias": "b_q",
    "self_attn.k_proj.bias": "b_k",
    "self_attn.v_proj.bias": "b_v",
    "self_attn.o_proj.weight": "w_o",
    "self_attn.o_proj.bias": "b_o",
    "mlp.router.weight": "router_w",
    "mlp.router.bias": "router_b",
    "mlp.experts.gate_up_proj_blocks": "gate_up_blocks",
    "mlp.experts.gate_up_proj_scales": "gate_up_scales",
    "mlp.experts.gate_up_proj_bias": "gate_up_b",
    "mlp.experts.down_proj_blocks": "down_blocks",
    "mlp.experts.down_proj_scales": "down_scales",
    "mlp.experts.down_proj_bias": "down_b",
}
_FLOAT32 = {"norm_attn", "norm_moe", "sinks", "final_norm"}
# Dense matrices, which have scales in FP8 -> the field of DenseFormats with their format: 1 of a model, 5 of a layer.
_SCALED = {"lm_head": "head", "w_q": "qkv", "w_k": "qkv", "w_v": "qkv", "w_o": "o", "router_w": "router"}
SCALES_ENDING = "_scales"
MAX_ENTRIES = len(_SHORT) + 1 + (len(_SHORT_OF_LAYER) + 5) * MAX_LAYERS + len(DOCUMENTS)


@dataclass(frozen=True)
class Entry:
    """An entry of the table: a tensor, or a document as uint8 [bytes]."""

    name: str
    offset: int  # from the file's start, a multiple of BLOB_ALIGNMENT
    n_bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + self.n_bytes


@dataclass(frozen=True)
class Header:
    """The header of an archive; version 1 has no digests."""

    version: int
    file_bytes: int
    entries: dict[str, Entry]  # by name, in the order of the table
    digests: dict[str, bytes] | None  # SHA-256 of each entry's bytes


def archive_name(published: str) -> str:
    """Return the name in an archive of the tensor, or scales, with this published name."""
    if published.endswith(SCALE_ENDING):
        return archive_name(published.removesuffix(SCALE_ENDING)) + SCALES_ENDING
    if published in _SHORT:
        return _SHORT[published]
    layer, _, rest = published.removeprefix("model.layers.").partition(".")
    return f"L{layer}.{_SHORT_OF_LAYER[rest]}"


def archive_tensors(config: ModelConfig) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return name in an archive -> (dtype, shape) of each tensor of a model, in the order of expected_tensors."""
    tensors = {}
    for published, (shape, dtype) in expected_tensors(config).items():
        name = archive_name(published)
        is_float32 = name.rpartition(".")[2] in _FLOAT32
        tensors[name] = (torch.float32 if is_float32 else SAFETENSORS_DTYPES[dtype], shape)
    return tensors


def stored_formats(entries: Mapping[str, Entry]) -> DenseFormats:
    """Return the formats of the dense matrices in an archive, without checking that all matrices agree.

    A component is FP8 if any of its matrices is, and the dtype of most of its scales tells which FP8 format.
    """
    scale_dtypes = {}
    for name, entry in entries.items():
        component = _SCALED.get(name.rpartition(".")[2])
        if component and entry.dtype == torch.float8_e4m3fn:
            scales = entries.get(name + SCALES_ENDING)
            scale_dtypes.setdefault(component, []).extend([scales.dtype] if scales else [])
    formats = {}
    for component, dtypes in scale_dtypes.items():
        formats[component] = FP8_GROUPS if dtypes and mode(dtypes) == torch.uint8 else FP8_ROWS
    return DenseFormats(**formats)


def place_entries(tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]]) -> list[Entry]:
    """Return an entry for each (name, dtype, shape), placed one after the other after the header."""
    tensors = list(tensors)
    end, entries = header_bytes(VERSION, len(tensors)), []
    for name, dtype, shape in tensors:
        offset = _align(end, BLOB_ALIGNMENT)
        entries.append(Entry(name, offset, math.prod(shape) * dtype.itemsize, dtype, shape))
        end = entries[-1].end
    return entries


def header_bytes(version: int, n_entries: int) -> int:
    """Return the bytes of a header, padded to HEADER_ALIGNMENT."""
    n_bytes = PREFIX.size + n_entries * ENTRY.itemsize
    if version > 1:
        n_bytes += n_entries * DIGEST_BYTES + TRAILER.size + DIGEST_BYTES
    return _align(n_bytes, HEADER_ALIGNMENT)


def encode_header(entries: list[Entry], digests: dict[str, bytes], order: int = PUBLISHED_ORDER) -> bytes:
    """Return a version 2 header. digests: the SHA-256 of each entry's bytes, by name."""
    table = np.zeros(len(entries), ENTRY)
    for row, entry in zip(table, entries):
        row["name"] = np.void(entry.name.encode().ljust(ENTRY["name"].itemsize, b"\0"))
        row["offset"], row["n_bytes"] = entry.offset, entry.n_bytes
        row["dtype"], row["n_dims"] = DTYPES.index(entry.dtype), len(entry.shape)
        row["shape"][: len(entry.shape)] = entry.shape
    header = PREFIX.pack(MAGIC, VERSION, len(entries)) + table.tobytes()
    header += b"".join(digests[entry.name] for entry in entries)
    header += TRAILER.pack(order, 0, max(entry.end for entry in entries))
    return seal(header.ljust(header_bytes(VERSION, len(entries)), b"\0"))


def seal(header: bytes) -> bytes:
    """Return a header with its last DIGEST_BYTES replaced by the digest of the bytes before them."""
    body = header[:-DIGEST_BYTES]
    return body + hashlib.sha256(body).digest()


def read_header(read: Callable[[int, int], bytes], file_bytes: int, source: str) -> Header:
    """Read and check a file's header. `read(offset, n)` returns n bytes, or fewer at the file's end.

    Raise InputError, naming `source`, unless the header is valid and each entry is aligned, lies within the file and
    overlaps no other. Whether the tensors are those of the model is not checked.
    """
    prefix = read(0, PREFIX.size)
    if len(prefix) < PREFIX.size or prefix[: len(MAGIC)] != MAGIC:
        raise InputError(f"{source}: is {'empty' if not prefix else 'not an .iris archive'}")
    _, version, count = PREFIX.unpack(prefix)
    if version not in (1, VERSION):
        raise InputError(f"{source}: is of version {version}, only 1 and {VERSION} are known")
    if not 1 <= count <= MAX_ENTRIES:
        raise InputError(f"{source}: claims {count} tensors, a model has 1 to {MAX_ENTRIES}")
    size = header_bytes(version, count)
    header = read(0, size) if size <= file_bytes else b""
    if len(header) < size:
        raise InputError(f"{source}: ends within its header: it has {file_bytes} bytes, {count} tensors need {size}")
    if version > 1 and seal(header) != header:
        raise InputError(f"{source}: the header's checksum does not match: the file is damaged")
    table = np.frombuffer(header, ENTRY, count, PREFIX.size)
    entries, expected_bytes = _entries(table, version, source), file_bytes
    digests = None
    if version > 1:
        start = PREFIX.size + table.nbytes
        end = start + DIGEST_BYTES * count
        digests = {name: header[at : at + DIGEST_BYTES] for name, at in zip(entries, range(start, end, DIGEST_BYTES))}
        order, zero, expected_bytes = TRAILER.unpack_from(header, end)
        if order != PUBLISHED_ORDER:
            raise InputError(f"{source}: stores its weights in order {order}, which is not known here")
        if zero != 0:
            raise InputError(f"{source}: has {zero} where version 2 has 0")
    if file_bytes != expected_bytes:
        raise InputError(f"{source}: has {file_bytes} bytes, its header says {expected_bytes}")
    _check_places(entries.values(), size, file_bytes, source)
    if version > 1 and encode_header(list(entries.values()), digests) != header:
        raise InputError(f"{source}: holds bytes, in its header or at its end, that belong to no tensor")
    return Header(version, file_bytes, entries, digests)


def unused_spans(header: Header) -> list[range]:
    """Return the byte ranges after a file's header that belong to no blob."""
    end, spans = header_bytes(header.version, len(header.entries)), []
    for entry in sorted(header.entries.values(), key=lambda entry: (entry.offset, entry.end)):
        spans.append(range(end, entry.offset))
        end = entry.end
    return [span for span in (*spans, range(end, header.file_bytes)) if span]


def _entries(table: np.ndarray, version: int, source: str) -> dict[str, Entry]:
    entries = {}
    for number, row in enumerate(table):
        name = _name(row["name"].tobytes(), number, source)
        if name in entries:
            raise InputError(f"{source}: tensor {name!r} is there twice")
        dtype, n_dims = int(row["dtype"]), int(row["n_dims"])
        if dtype >= (VERSION_1_DTYPES if version == 1 else len(DTYPES)):
            raise InputError(f"{source}: tensor {name!r} is of dtype {dtype}, which is not known")
        if not 1 <= n_dims <= MAX_DIMS:
            raise InputError(f"{source}: tensor {name!r} has {n_dims} dimensions, not 1 to {MAX_DIMS}")
        shape = tuple(map(int, row["shape"]))
        if version > 1 and any(shape[n_dims:]):
            raise InputError(f"{source}: tensor {name!r} has sizes beyond its {n_dims} dimensions")
        entry = Entry(name, int(row["offset"]), int(row["n_bytes"]), DTYPES[dtype], shape[:n_dims])
        if entry.n_bytes != math.prod(entry.shape) * entry.dtype.itemsize:
            raise InputError(f"{source}: tensor {name!r} has {entry.n_bytes} bytes, {list(entry.shape)} has others")
        entries[name] = entry
    return entries


def _name(raw: bytes, number: int, source: str) -> str:
    name, _, padding = raw.partition(b"\0")
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable() or padding.strip(b"\0"):
        raise InputError(f"{source}: tensor {number} of the table has no readable name")
    return text


def _check_places(entries: Iterable[Entry], end: int, file_bytes: int, source: str) -> None:
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.end)):
        if entry.offset % BLOB_ALIGNMENT:
            raise InputError(f"{source}: tensor {entry.name!r} begins at {entry.offset}, not a multiple of 256")
        if entry.offset < end:
            raise InputError(f"{source}: tensor {entry.name!r} begins at {entry.offset}, within what is before it")
        if entry.end > file_bytes:
            raise InputError(
                f"{source}: is truncated: tensor {entry.name!r} ends at {entry.end}, the file at {file_bytes}"
            )
        end = entry.end


def _align(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
