"""Damage an .iris archive in random ways; each must be refused in one printable line, or still be a whole model.

    python -m tools.fuzz_iris --cases 100000 --seed 1
Run from the repository's root. A case is a small archive of version 2 or 1, half of them with dense matrices in FP8,
after one to three mutations. Most cases get right checksums again, so that the checks behind those are reached as well.

A case that raises anything but an InputError, takes longer than 2 s or more than 64 MB is printed, and the exit code is
1. A case depends only on the seed and its number, so that `--first NUMBER --cases 1` repeats it. A case that ends the
process leaves its file.
"""

import hashlib
import math
import random
import re
import resource
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # where it is run as a file
import host.start

import torch

from checkpoints.checkpoint import TOKENIZER_NAME, Checkpoint, RandomCheckpoint
from checkpoints.config import (
    FP8_GROUPS,
    FP8_ROWS,
    GENERATION_NAME,
    DenseFormats,
    ModelConfig,
    expected_tensors,
    scale_name,
)
from checkpoints.fp8 import QuantizedCheckpoint, dequantize_fp8
from checkpoints.iris_format import (
    BLOB_ALIGNMENT,
    DIGEST_BYTES,
    DOCUMENTS,
    ENTRY,
    MAGIC,
    PREFIX,
    SAFETENSORS_DTYPES,
    TRAILER,
    header_bytes,
    seal,
)
from checkpoints.iris_writer import write_archive
from command_line.run import run_main
from load_iris import open_archive
from tools.fuzzing import JSON_VALUES, MOST_SECONDS, count, outcome, parse_arguments

CONFIG = ModelConfig(
    n_layers=2,
    n_experts=2,
    experts_per_token=1,
    hidden_size=32,
    intermediate_size=32,
    n_heads=2,
    n_kv_heads=1,
    head_dim=16,
    vocab_size=24,
    layer_is_sliding=(True, False),
    stop_ids=(7,),
)
DENSE = DenseFormats(qkv=FP8_ROWS, o=FP8_GROUPS, router=FP8_GROUPS, head=FP8_ROWS)
OTHER_DOCUMENTS = {GENERATION_NAME: b'{"eos_token_id": [7, 9]}', TOKENIZER_NAME: b'{"version": "1.0", "model": {}}'}
MOST_BYTES = 64 << 20
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss
SEALED_SHARE = 0.75

NAME_BYTES = ENTRY["name"].itemsize
NUMBERS = struct.Struct("<QQII8Q")  # what follows the name: offset, bytes, dtype, dimensions, shape
NUMBER_PLACES = [(0, 8), (8, 8), (16, 4), (20, 4), *((24 + 8 * i, 8) for i in range(8))]  # (offset, bytes) in these
NAMES = (
    b"",
    b"embed",
    b"L0.w_q",
    b"L1.w_q",
    b"L2.w_q",
    b"L00.w_q",
    b"\xff",
    b"a\nb",
    b"x" * 128,
    b"L0.w_q_scales",
    b"L1.w_o_scales",
    b"lm_head_scales",
    b"embed_scales",
    b"config.json",
    b"embed\0x",
)


class _Checkpoint(RandomCheckpoint):
    """A checkpoint of random values, with documents."""

    def document(self, name: str) -> bytes | None:
        return OTHER_DOCUMENTS.get(name)


@dataclass
class Archive:
    """A whole archive that cases start from."""

    version: int
    data: bytes
    n_rows: int

    @property
    def header_bytes(self) -> int:
        return header_bytes(self.version, self.n_rows)

    def row_at(self, index: int) -> int:
        return PREFIX.size + index * ENTRY.itemsize


def archives(folder: Path) -> tuple[Archive, ...]:
    """Return whole archives of version 1, version 2, and with FP8. The folder keeps the configuration for version 1."""
    path = folder / "whole.iris"
    checkpoint = _Checkpoint(CONFIG)
    archive = written(checkpoint, path)
    second, n_rows = archive.data, archive.n_rows
    for name in DOCUMENTS:
        (folder / name).write_bytes(open_archive(path).document(name))
    first_row, end = archive.row_at(len(DOCUMENTS)), archive.row_at(n_rows)  # the documents are the first rows
    table = second[first_row:end]
    header = PREFIX.pack(MAGIC, 1, n_rows - len(DOCUMENTS)) + table
    first = header.ljust(archive.header_bytes, b"\0") + second[archive.header_bytes :]
    return Archive(1, first, n_rows - len(DOCUMENTS)), archive, written(QuantizedCheckpoint(checkpoint, DENSE), path)


def written(checkpoint: Checkpoint, path: Path) -> Archive:
    """Write an archive of version 2 and return it."""
    write_archive(checkpoint, path, force=True)
    data = path.read_bytes()
    _, _, n_rows = PREFIX.unpack_from(data)
    return Archive(2, data, n_rows)


# Mutations: each changes the bytes of a file in place.

Mutation = Callable[[random.Random, Archive, bytearray], None]


def flip_bits(rng: random.Random, archive: Archive, data: bytearray) -> None:
    for _ in range(rng.randint(1, 8)):
        data[_place(rng, archive, data)] ^= 1 << rng.randrange(8)


def write_random_bytes(rng: random.Random, archive: Archive, data: bytearray) -> None:
    at, new = _place(rng, archive, data), rng.randbytes(rng.randint(1, 64))
    data[at : at + len(new)] = new


def splice(rng: random.Random, archive: Archive, data: bytearray) -> None:
    """Copy a part of the header over another place or, half the time, in front of it."""
    at, to, n = _place(rng, archive, data), _place(rng, archive, data), rng.randint(1, 600)
    data[to : to + rng.choice((0, n))] = data[at : at + n]


def remove_bytes(rng: random.Random, archive: Archive, data: bytearray) -> None:
    at = _place(rng, archive, data)
    del data[at : at + rng.randint(1, 300)]


def swap_rows(rng: random.Random, archive: Archive, data: bytearray) -> None:
    first, second = _row(rng, archive), _row(rng, archive)
    start, end = rng.choice(((0, ENTRY.itemsize), (0, NAME_BYTES), (NAME_BYTES, NAME_BYTES + 8)))  # all, name, offset
    a, b = slice(first + start, first + end), slice(second + start, second + end)
    data[a], data[b] = data[b], data[a]


def copy_row(rng: random.Random, archive: Archive, data: bytearray) -> None:
    first, second = _row(rng, archive), _row(rng, archive)
    data[second : second + ENTRY.itemsize] = data[first : first + ENTRY.itemsize]


def set_field(rng: random.Random, archive: Archive, data: bytearray) -> None:
    """Put an extreme number, or one near the former, into a field of the prefix, the trailer or a row."""
    trailer = archive.row_at(archive.n_rows) + DIGEST_BYTES * archive.n_rows
    elsewhere = [(8, 4), (12, 4)] + ([(trailer, 4), (trailer + 4, 4), (trailer + 8, 8)] if archive.version > 1 else [])
    row = _row(rng, archive)
    of_row = [(row + NAME_BYTES + at, size) for at, size in NUMBER_PLACES]
    at, size = rng.choice(elsewhere if rng.random() < 0.2 else of_row)
    former = int.from_bytes(data[at : at + size], "little")
    extremes = (0, 1, 2, 3, 8, 9, 255, 256, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 256, 2**64 - 1)
    near = tuple(former + by for by in (-4096, -256, -1, 1, 256, 4096)) + (len(data), former * 2, former // 2)
    data[at : at + size] = (rng.choice(extremes + near) % 2 ** (8 * size)).to_bytes(size, "little")


def set_sizes(rng: random.Random, archive: Archive, data: bytearray) -> None:
    """Change dtype, shape and place of a row so that they agree with each other."""
    row = _row(rng, archive)
    shape = [rng.choice((0, 1, 2, 16, 24, 32, 64)) for _ in range(rng.randint(1, 4))]
    dtype, item_bytes = rng.choice(((0, 2), (1, 4), (2, 1), (3, 4), (4, 1)))
    n_bytes = item_bytes * math.prod(shape)
    offset = rng.randrange(len(data) // BLOB_ALIGNMENT) * BLOB_ALIGNMENT
    if rng.random() < 0.5:
        offset, _ = _place_of(data, row)
    NUMBERS.pack_into(data, row + NAME_BYTES, offset, n_bytes, dtype, len(shape), *shape, *[0] * (8 - len(shape)))


def set_dtype(rng: random.Random, archive: Archive, data: bytearray) -> None:
    """Change the dtype of a row, half the time of all rows whose names end alike."""
    row, dtype = _row(rng, archive), rng.choice((0, 1, 2, 4))
    kind = _name_of(data, row).rpartition(b".")[2]
    rows = [archive.row_at(index) for index in range(archive.n_rows)]
    for at in rows if rng.random() < 0.5 else (row,):
        if _name_of(data, at).rpartition(b".")[2] == kind:
            data[at + NAME_BYTES + 16 : at + NAME_BYTES + 20] = dtype.to_bytes(4, "little")


def damage_blob(rng: random.Random, archive: Archive, data: bytearray) -> None:
    """Fill a part of a blob with one byte, such as the NaN of E4M3 or E8M0."""
    offset, n_bytes = _place_of(data, _row(rng, archive))
    start = offset + rng.randrange(n_bytes or 1)
    n = min(rng.randint(1, 64), offset + n_bytes - start, len(data) - start)
    if n > 0:
        data[start : start + n] = rng.choice((b"\0", b"\x7f", b"\x80", b"\xff")) * n


def transpose(rng: random.Random, archive: Archive, data: bytearray) -> None:
    shape = _row(rng, archive) + ENTRY.fields["shape"][1]
    data[shape : shape + 16] = data[shape + 8 : shape + 16] + data[shape : shape + 8]


def rename(rng: random.Random, archive: Archive, data: bytearray) -> None:
    row = _row(rng, archive)
    data[row : row + NAME_BYTES] = rng.choice(NAMES).ljust(NAME_BYTES, b"\0")


def resize(rng: random.Random, archive: Archive, data: bytearray) -> None:
    """Truncate or extend the file; half the time the header follows."""
    if rng.random() < 0.7:
        del data[rng.choice((rng.randrange(len(data)), len(data) - 1, archive.header_bytes, _row(rng, archive))) :]
    else:
        data += bytes(rng.choice((1, 255, 256, 4096)))
    if rng.random() < 0.5:
        _set_file_bytes(archive, data)


def damage_document(rng: random.Random, archive: Archive, data: bytearray) -> None:
    """Change some bytes of a document, or of a tensor in version 1, which has no documents."""
    offset, n_bytes = _place_of(data, _document_row(rng, archive))
    for _ in range(rng.randint(1, 4)):
        at = offset + rng.randrange(n_bytes or 1)
        if at < len(data):
            data[at] = rng.choice((rng.randrange(256), *b'{}[]",:0 '))


def replace_document(rng: random.Random, archive: Archive, data: bytearray) -> None:
    """Replace one value of a document, and put the document at the end of the file, where there is room."""
    if archive.version == 1:
        return
    row = _document_row(rng, archive)
    offset, n_bytes = _place_of(data, row)
    text = bytes(data[offset : offset + n_bytes]).decode("utf-8", "replace")
    values = [match.span(1) for match in re.finditer(r'[:\[,]\s*("[^"]*"|[\d.e+-]+|true|false|null)', text)]
    if values:
        start, end = rng.choice(values)
        text = text[:start] + rng.choice(JSON_VALUES) + text[end:]
    new = text.encode()
    data += bytes(-len(data) % BLOB_ALIGNMENT)
    NUMBERS.pack_into(data, row + NAME_BYTES, len(data), len(new), 2, 1, len(new), *[0] * 7)
    data += new
    _set_file_bytes(archive, data)


MUTATIONS: tuple[Mutation, ...] = (
    flip_bits,
    write_random_bytes,
    splice,
    remove_bytes,
    swap_rows,
    copy_row,
    set_field,
    set_field,
    set_field,
    set_sizes,
    set_dtype,
    damage_blob,
    transpose,
    rename,
    resize,
    damage_document,
    replace_document,
)


def _place(rng: random.Random, archive: Archive, data: bytearray) -> int:
    """Choose a place in the header, more often in the numbers of a row, seldom in padding."""
    if rng.random() < 0.5:
        return _row(rng, archive) + rng.randrange(NAME_BYTES, ENTRY.itemsize)
    used = archive.row_at(archive.n_rows) + (archive.n_rows * DIGEST_BYTES + TRAILER.size) * (archive.version > 1)
    return rng.randrange(used if rng.random() < 0.9 else archive.header_bytes)


def _row(rng: random.Random, archive: Archive) -> int:
    """Choose a row of the table; return where it begins."""
    return archive.row_at(rng.randrange(archive.n_rows))


def _document_row(rng: random.Random, archive: Archive) -> int:
    return archive.row_at(rng.randrange(len(DOCUMENTS)))


def _place_of(data: bytearray, row: int) -> tuple[int, int]:
    """Return the (offset, bytes) that a row states."""
    return NUMBERS.unpack_from(data, row + NAME_BYTES)[:2]


def _name_of(data: bytearray, row: int) -> bytes:
    return bytes(data[row : row + NAME_BYTES]).rstrip(b"\0")


def _set_file_bytes(archive: Archive, data: bytearray) -> None:
    if archive.version > 1 and len(data) >= archive.header_bytes:
        struct.pack_into("<Q", data, archive.row_at(archive.n_rows) + DIGEST_BYTES * archive.n_rows + 8, len(data))


def mutated(rng: random.Random, archive: Archive) -> bytes:
    """Return an archive after one to three mutations, most often with checksums of its new contents."""
    data = bytearray(archive.data)
    for mutation in rng.choices(MUTATIONS, k=rng.choice((1, 1, 2, 3))):
        mutation(rng, archive, data)
        if len(data) < archive.header_bytes:
            break
    return sealed(bytes(data)) if rng.random() < SEALED_SHARE else bytes(data)


def sealed(data: bytes) -> bytes:
    """Return a file with right checksums of blobs and header, if it has the form of version 2."""
    if len(data) < PREFIX.size:
        return data
    _, version, n_rows = PREFIX.unpack_from(data)
    n_bytes = header_bytes(version, n_rows)
    if version != 2 or n_bytes > len(data):
        return data
    places = [_place_of(data, PREFIX.size + i * ENTRY.itemsize) for i in range(n_rows)]
    digests = b"".join(hashlib.sha256(data[at : at + n]).digest() for at, n in places)
    start = PREFIX.size + n_rows * ENTRY.itemsize
    return seal(data[:start] + digests + data[start + len(digests) : n_bytes]) + data[n_bytes:]


# Outcomes


def problem_or_message(path: Path, verify: bool) -> tuple[str | None, str | None]:
    """Return tools.fuzzing.outcome of reading the archive; much memory or time is a problem too."""
    former = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    problem, message = outcome(lambda: read_all(path, verify), f"{path}: ", MOST_SECONDS)
    if time.perf_counter() - start > MOST_SECONDS:
        problem = problem or f"took {time.perf_counter() - start:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - former) * RSS_UNIT
    if grown > MOST_BYTES:
        problem = problem or f"took {grown / 1e6:.0f} MB"
    return problem, message


def read_all(path: Path, verify: bool) -> None:
    """Open an archive and read all of it. Raises AssertionError unless it holds what its configuration describes."""
    archive = open_archive(path, verify=verify)
    entries = sorted(archive.header.entries.values(), key=lambda entry: (entry.offset, entry.end))
    end = header_bytes(archive.header.version, len(entries))
    for entry in entries:
        assert entry.offset >= end and entry.offset % BLOB_ALIGNMENT == 0, f"{entry.name} is at {entry.offset}"
        end = entry.end
    assert end <= path.stat().st_size, f"{entries[-1].name} ends at {end}"
    for name, (shape, dtype) in expected_tensors(archive.config).items():
        tensor = archive.tensor(name)
        kinds = (SAFETENSORS_DTYPES[dtype], torch.float32) if dtype == "BF16" else (SAFETENSORS_DTYPES[dtype],)
        assert tuple(tensor.shape) == shape and tensor.dtype in kinds, f"{name} is {tensor.dtype} {list(tensor.shape)}"
        tensor.view(-1).view(torch.uint8).max()
        if tensor.dtype == torch.float8_e4m3fn:
            assert dequantize_fp8(tensor, archive.tensor(scale_name(name))).shape == shape, name
    for name in DOCUMENTS:
        archive.document(name)


def cases(seed: int, numbers: range, whole: tuple[Archive, ...], path: Path) -> Iterator[tuple[int, bool]]:
    """Write the file of each case; yield (its number, whether checksums are to be compared)."""
    for number in numbers:
        rng = random.Random(f"{seed} {number}")
        data = mutated(rng, whole[rng.choice((0, 1, 2, 2))])
        path.write_bytes(data)
        yield number, rng.random() < 0.5


def main() -> None:
    args = parse_arguments(__doc__)
    numbers = range(args.first, args.first + args.cases)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.iris"
        whole = archives(Path(folder))
        outcomes = (
            (number, *problem_or_message(path, verify)) for number, verify in cases(args.seed, numbers, whole, path)
        )
        count(outcomes, args, f"{path}: ")


if __name__ == "__main__":
    sys.exit(run_main(main))
