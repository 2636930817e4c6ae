"""Archives put together with struct and hashlib alone, from the format's description, to compare with and to break.

Nothing of checkpoints.iris_format is used, so that a mistake there does not appear here as well.
"""

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from checkpoints.checkpoint import config_to_dict
from checkpoints.config import BF16 as DENSE_BF16
from checkpoints.config import FP8_ROWS, DenseFormats, ModelConfig

BF16, F32, U8, I32, F8 = range(5)
ITEM_BYTES = {BF16: 2, F32: 4, U8: 1, I32: 4, F8: 1}
PREFIX_BYTES, ROW_BYTES, DIGEST_BYTES, TRAILER_BYTES = 16, 216, 32, 16
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"

# (name in an archive, published name, dtype)
MODEL_ROWS = (
    ("embed", "model.embed_tokens.weight", BF16),
    ("final_norm", "model.norm.weight", F32),
    ("lm_head", "lm_head.weight", BF16),
)
LAYER_ROWS = (
    ("norm_attn", "input_layernorm.weight", F32),
    ("w_q", "self_attn.q_proj.weight", BF16),
    ("w_k", "self_attn.k_proj.weight", BF16),
    ("w_v", "self_attn.v_proj.weight", BF16),
    ("b_q", "self_attn.q_proj.bias", BF16),
    ("b_k", "self_attn.k_proj.bias", BF16),
    ("b_v", "self_attn.v_proj.bias", BF16),
    ("sinks", "self_attn.sinks", F32),
    ("w_o", "self_attn.o_proj.weight", BF16),
    ("b_o", "self_attn.o_proj.bias", BF16),
    ("norm_moe", "post_attention_layernorm.weight", F32),
    ("router_w", "mlp.router.weight", BF16),
    ("router_b", "mlp.router.bias", BF16),
    ("gate_up_blocks", "mlp.experts.gate_up_proj_blocks", U8),
    ("gate_up_scales", "mlp.experts.gate_up_proj_scales", U8),
    ("gate_up_b", "mlp.experts.gate_up_proj_bias", BF16),
    ("down_blocks", "mlp.experts.down_proj_blocks", U8),
    ("down_scales", "mlp.experts.down_proj_scales", U8),
    ("down_b", "mlp.experts.down_proj_bias", BF16),
)
# Names of dense matrices -> the field of DenseFormats that tells of each.
DENSE_ROWS = {"w_q": "qkv", "w_k": "qkv", "w_v": "qkv", "w_o": "o", "router_w": "router", "lm_head": "head"}
# As LAYER_ROWS lists them, but weights and biases of the same input next to each other: what the writer puts in a row.
WRITTEN_TOGETHER = (("norm_attn",), ("w_q", "w_k", "w_v"), ("b_q", "b_k", "b_v")) + tuple(
    (short,) for short, _, _ in LAYER_ROWS[7:]
)


def row_kinds(n_layers: int, dense: DenseFormats | None = None) -> dict[str, tuple[str, int]]:
    """Return name in an archive -> (published name, dtype), layer by layer, scales at the end."""
    kinds = {short: (published, dtype) for short, published, dtype in MODEL_ROWS}
    for n in range(n_layers):
        kinds |= {f"L{n}.{short}": (f"model.layers.{n}.{rest}", dtype) for short, rest, dtype in LAYER_ROWS}
    for name, (published, _) in list(kinds.items()):
        dense_format = format_of(name, dense)
        if dense_format != DENSE_BF16:
            kinds[name] = published, F8
            kinds[f"{name}_scales"] = f"{published}_scale", F32 if dense_format == FP8_ROWS else U8
    return kinds


def format_of(name: str, dense: DenseFormats | None) -> str:
    """Return the format of the tensor of this name in an archive."""
    return getattr(dense or DenseFormats(), DENSE_ROWS.get(name.rpartition(".")[2], ""), DENSE_BF16)


def written_order(n_layers: int, dense: DenseFormats | None = None) -> list[str]:
    """Return the tensors of an archive in the order of writing: all layers of one kind, then the next kind."""
    kinds = [[short] for short, _, _ in MODEL_ROWS]
    kinds += [[f"L{n}.{short}" for n in range(n_layers) for short in together] for together in WRITTEN_TOGETHER]
    names = []
    for kind in kinds:
        is_scaled = format_of(kind[0], dense) != DENSE_BF16
        names += kind + [f"{name}_scales" for name in kind if is_scaled]
    return names


@dataclass
class Row:
    """A row of the table as the file states it, true or not."""

    name: bytes
    offset: int
    n_bytes: int
    dtype: int
    shape: tuple[int, ...]
    n_dims: int
    digest: bytes

    def encode(self) -> bytes:
        shape = (*self.shape, *[0] * (8 - len(self.shape)))
        return struct.pack("<128sQQII8Q", self.name, self.offset, self.n_bytes, self.dtype, self.n_dims, *shape)

    @property
    def end(self) -> int:
        return self.offset + self.n_bytes


@dataclass
class ArchiveBytes:
    """An archive in its parts. Changing a row changes the header, not where the blobs are."""

    version: int
    rows: list[Row]
    body: bytes = field(repr=False)  # what follows the header
    file_bytes: int
    magic: bytes = b"IRISMDL1"
    count: int | None = None  # of the rows
    order: int = 0
    zero: int = 0

    def copy(self) -> "ArchiveBytes":
        return copy.deepcopy(self)

    def row(self, name: str) -> Row:
        (row,) = [row for row in self.rows if row.name == name.encode()]
        return row

    def names(self) -> list[str]:
        return [row.name.decode() for row in self.rows]

    @property
    def header_bytes(self) -> int:
        return header_bytes(self.version, len(self.rows))

    def header(self) -> bytes:
        """Return the header's bytes, with the right checksum if the version has one."""
        count = len(self.rows) if self.count is None else self.count
        data = struct.pack("<8sII", self.magic, self.version, count) + b"".join(row.encode() for row in self.rows)
        if self.version != 1:
            data += b"".join(row.digest for row in self.rows)
            data += struct.pack("<IIQ", self.order, self.zero, self.file_bytes)
        return sealed(data, self.version, self.header_bytes)

    def encode(self) -> bytes:
        """Return the bytes of the whole file."""
        return self.header() + self.body


def sealed(header: bytes, version: int, n_bytes: int) -> bytes:
    if version == 1:
        return header.ljust(n_bytes, b"\0")
    body = header.ljust(n_bytes - DIGEST_BYTES, b"\0")[: n_bytes - DIGEST_BYTES]
    return body + hashlib.sha256(body).digest()


def sealed_again(data: bytes) -> bytes:
    """Return the file with the right checksum of its changed header."""
    _, version, count = struct.unpack_from("<8sII", data)
    n_bytes = header_bytes(version, count)
    if version == 1 or n_bytes > len(data):
        return data
    return sealed(data[: n_bytes - DIGEST_BYTES], version, n_bytes) + data[n_bytes:]


def header_bytes(version: int, count: int) -> int:
    needed = PREFIX_BYTES + count * ROW_BYTES
    if version != 1:
        needed += count * DIGEST_BYTES + TRAILER_BYTES + DIGEST_BYTES
    return rounded_up(needed, 4096)


def rounded_up(n: int, multiple: int) -> int:
    return (n + multiple - 1) // multiple * multiple


def blob_of(tensor: torch.Tensor, dtype: int) -> bytes:
    if dtype == F32:
        return tensor.float().numpy().tobytes()
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def config_json(checkpoint, **changes) -> bytes:
    return json.dumps(config_to_dict(checkpoint.config) | changes).encode()


def archive_of(
    checkpoint, version: int = 2, documents: dict[str, bytes] | None = None, names: list[str] | None = None
) -> ArchiveBytes:
    """Make an archive of a checkpoint, in the order of `names`, or layer by layer without them.

    Version 2 holds `documents`, by default the configuration alone; version 1 holds none.
    """
    kinds = row_kinds(checkpoint.config.n_layers, checkpoint.config.dense)
    if documents is None:
        documents = {CONFIG: config_json(checkpoint)}
    parts = [(name, U8, (len(data),), data) for name, data in documents.items() if version != 1]
    for name in names or kinds:
        published, dtype = kinds[name]
        tensor = checkpoint.tensor(published)
        parts.append((name, dtype, tuple(tensor.shape), blob_of(tensor, dtype)))
    start = header_bytes(version, len(parts))
    body, rows = bytearray(), []
    for name, dtype, shape, data in parts:
        body += bytes(-len(body) % 256)
        offset = start + len(body)
        rows.append(Row(name.encode(), offset, len(data), dtype, shape, len(shape), hashlib.sha256(data).digest()))
        body += data
    return ArchiveBytes(version, rows, bytes(body), start + len(body))


def small_config(**changes) -> ModelConfig:
    """Return a configuration of three layers with 4 experts, 170 KB."""
    sizes = {
        "n_layers": 3,
        "n_experts": 4,
        "experts_per_token": 2,
        "hidden_size": 64,
        "intermediate_size": 32,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "layer_is_sliding": (True, False, True),
        "stop_ids": (7, 3),
    }
    return ModelConfig(**(sizes | changes))


Change = Callable[[ArchiveBytes], None]


def header_changes(**values) -> Change:
    """Set fields of the archive; a function gives the new value for the old one."""
    return lambda archive: _set(archive, values)


def row_changes(index: int, **values) -> Change:
    """Set fields of a row; a function gives the new value for the old one."""
    return lambda archive: _set(archive.rows[index], values)


def _set(target: ArchiveBytes | Row, values: dict) -> None:
    for key, value in values.items():
        setattr(target, key, value(getattr(target, key)) if callable(value) else value)


def sized(index: int, n_bytes: int | Callable[[int], int]) -> Change:
    """Make a row uint8 of that many bytes; its shape and byte count agree."""

    def change(archive: ArchiveBytes) -> None:
        row_changes(index, n_bytes=n_bytes, dtype=U8, n_dims=1)(archive)
        archive.rows[index].shape = (archive.rows[index].n_bytes,)

    return change


def placed_like(index: int, other: int, by: int = 0) -> Change:
    def change(archive: ArchiveBytes) -> None:
        archive.rows[index].offset = archive.rows[other].offset + by

    return change


def both(first: Change, second: Change) -> Change:
    return lambda archive: (first(archive), second(archive))[1]


def product_that_overflows(archive: ArchiveBytes) -> None:
    """Return sizes whose product is right only modulo 2^64."""
    row = archive.rows[-1]
    row.dtype, row.n_dims = U8, 2
    row.shape = (row.n_bytes * pow(3, -1, 2**64) % 2**64, 3)
    assert row.shape[0] * 3 % 2**64 == row.n_bytes != row.shape[0] * 3


# What is wrong with a header that is otherwise whole -> (the change, a part of the message about it).
BROKEN_HEADERS: dict[str, tuple[Change, str]] = {
    "another magic": (header_changes(magic=b"IRISMDL2"), "not an .iris archive"),
    "version 0": (header_changes(version=0), "of version 0, only 1 and 2"),
    "version 3": (header_changes(version=3), "of version 3, only 1 and 2"),
    "version 4294967295": (header_changes(version=2**32 - 1), "of version 4294967295"),
    "no tensors": (header_changes(count=0), "claims 0 tensors"),
    "4 billion tensors": (header_changes(count=2**32 - 1), "claims 4294967295 tensors"),
    "one tensor more than any model has": (header_changes(count=24584), "claims 24584 tensors, a model has 1 to 24583"),
    "more tensors than there is room for": (header_changes(count=19462), "ends within its header"),
    "name that is not UTF-8": (row_changes(3, name=b"\xff\xfe"), "tensor 3 of the table has no readable name"),
    "name that ends within a character": (row_changes(3, name=b"x" * 127 + b"\xc3"), "tensor 3 of the table"),
    "name of a surrogate": (row_changes(3, name=b"\xed\xa0\x80"), "tensor 3 of the table"),
    "overlong NUL": (row_changes(3, name=b"embed\xc0\x80"), "tensor 3 of the table"),
    "name of two lines": (row_changes(3, name=b"em\nbed"), "tensor 3 of the table"),
    "name with an escape sequence": (row_changes(3, name=b"\x1b[2Jembed"), "tensor 3 of the table"),
    "name written backwards": (row_changes(3, name="\u202eembed".encode()), "tensor 3 of the table"),
    "no name": (row_changes(0, name=b""), "tensor 0 of the table"),
    "name with more behind its end": (row_changes(-1, name=b"embed\0x"), "of the table has no readable name"),
    "name that is there twice": (row_changes(-1, name=b"lm_head"), "tensor 'lm_head' is there twice"),
    "dtype 5": (row_changes(3, dtype=5), "is of dtype 5, which is not known"),
    "dtype 4294967295": (row_changes(3, dtype=2**32 - 1), "is of dtype 4294967295"),
    "no dimensions": (row_changes(3, n_dims=0), "has 0 dimensions, not 1 to 8"),
    "9 dimensions": (row_changes(3, n_dims=9), "has 9 dimensions, not 1 to 8"),
    "4 billion dimensions": (row_changes(3, n_dims=2**32 - 1), "has 4294967295 dimensions"),
    "one dimension less": (row_changes(-2, n_dims=1), ""),
    "one byte more": (row_changes(-1, n_bytes=lambda n: n + 1), "bytes, ["),
    "one byte less": (row_changes(-1, n_bytes=lambda n: n - 1), "bytes, ["),
    "no bytes": (row_changes(-1, n_bytes=0), "has 0 bytes, ["),
    "all bytes there are": (row_changes(-1, n_bytes=2**64 - 1), "has 18446744073709551615 bytes, ["),
    "sizes that overflow to 0": (
        row_changes(-1, n_bytes=0, dtype=U8, shape=(2**32, 2**32), n_dims=2),
        "has 0 bytes, [4294967296, 4294967296]",
    ),
    "sizes that overflow to the right one": (product_that_overflows, "bytes, ["),
    "eight largest sizes": (row_changes(-1, shape=(2**64 - 1,) * 8, n_dims=8), "bytes, [18446744073709551615, "),
    "odd place": (row_changes(-1, offset=lambda at: at + 1), "not a multiple of 256"),
    "place that is a multiple of 128": (row_changes(-1, offset=lambda at: at - 128), "not a multiple of 256"),
    "place at the file's start": (row_changes(-1, offset=0), "begins at 0, within what is before it"),
    "place within the header": (row_changes(0, offset=lambda at: at - 256), "within what is before it"),
    "place of another tensor": (placed_like(4, 3), "within what is before it"),
    "place of the first tensor": (placed_like(-1, 0), "within what is before it"),
    "end within the next tensor": (sized(0, lambda n: n + 256), "within what is before it"),
    "nothing within another tensor": (both(sized(-1, 0), placed_like(-1, 5, by=256)), "within what is before it"),
    "end one byte behind the file's": (sized(-1, lambda n: n + 1), "is truncated: tensor"),
    "place behind the file's end": (row_changes(-1, offset=lambda at: at + (1 << 20)), "is truncated: tensor"),
    "place of 2**63": (row_changes(-1, offset=2**63), "is truncated: tensor"),
    "end that overflows": (row_changes(-1, offset=2**64 - 256), "is truncated: tensor"),
    "a terabyte": (sized(-1, 2**40), "is truncated: tensor"),
    "all the bytes that 64 bits can count": (sized(-1, 2**64 - 1), "is truncated: tensor"),
    "a file that is too short": (header_changes(body=lambda body: body[:-1]), ""),
}
BROKEN_HEADERS_OF_VERSION_2: dict[str, tuple[Change, str]] = {
    "a size beyond the dimensions": (row_changes(0, shape=lambda old: (*old, 1)), "has sizes beyond its 1 dimensions"),
    "order 1": (header_changes(order=1), "in order 1, which is not known"),
    "order 4294967295": (header_changes(order=2**32 - 1), "in order 4294967295"),
    "a one for the zero": (header_changes(zero=1), "has 1 where version 2 has 0"),
    "a byte less than the header says": (header_changes(file_bytes=lambda n: n + 1), "its header says"),
    "a byte more than the header says": (header_changes(file_bytes=lambda n: n - 1), "its header says"),
    "0 bytes, the header says": (header_changes(file_bytes=0), "its header says 0"),
    "2**64 - 1 bytes, the header says": (header_changes(file_bytes=2**64 - 1), "its header says 18446744073709551615"),
    "a file that is too long": (header_changes(body=lambda body: body + b"\0"), "its header says"),
    "bytes behind the last tensor": (
        header_changes(body=lambda body: body + b"\0", file_bytes=lambda n: n + 1),
        "at its end, that belong to no tensor",
    ),
}
BROKEN: list[tuple[int, str, Change, str]] = [
    (1, "dtype 4", row_changes(3, dtype=4), "is of dtype 4, which is not known"),
    *[(version, what, *broken) for version in (1, 2) for what, broken in BROKEN_HEADERS.items()],
    *[(2, what, *broken) for what, broken in BROKEN_HEADERS_OF_VERSION_2.items()],
]
BROKEN_IDS = [f"{what}, version {version}" for version, what, *_ in BROKEN]
