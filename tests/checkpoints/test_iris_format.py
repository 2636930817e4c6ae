"""The header of an .iris archive against one put together with struct, whole and broken in every way."""

import hashlib
import itertools
import math
import random
import struct
from collections.abc import Callable

import iris_files
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from iris_files import (
    BROKEN,
    BROKEN_IDS,
    CONFIG,
    GENERATION,
    TOKENIZER,
    ArchiveBytes,
    Row,
    archive_of,
    config_json,
    row_kinds,
    sealed_again,
    small_config,
    written_order,
)

from checkpoints.checkpoint import RandomCheckpoint
from checkpoints.config import GPT_OSS_20B, GPT_OSS_120B, MAX_LAYERS, expected_tensors
from checkpoints.iris_format import (
    MAX_ENTRIES,
    Entry,
    Header,
    archive_name,
    archive_tensors,
    encode_header,
    header_bytes,
    place_entries,
    read_header,
    seal,
)
from checkpoints.iris_writer import write_archive
from system.errors import InputError

DTYPES = (torch.bfloat16, torch.float32, torch.uint8, torch.int32, torch.float8_e4m3fn)
CHECKPOINT = RandomCheckpoint(small_config())
DOCUMENTS = {CONFIG: config_json(CHECKPOINT), GENERATION: b'{"eos_token_id": 5}', TOKENIZER: b"{}" * 300}

BROKEN_IN_VERSION_2 = {what: change for version, what, change, _ in BROKEN if version == 2}


@pytest.fixture(scope="module")
def good() -> dict[int, ArchiveBytes]:
    """Version -> archive. Tests must not change it."""
    return {version: archive_of(CHECKPOINT, version, DOCUMENTS) for version in (1, 2)}


def read(data: bytes, file_bytes: int | None = None) -> Header:
    return read_header(lambda at, n: data[at : at + n], len(data) if file_bytes is None else file_bytes, "x.iris")


def noting_reader(data: bytes, asked: list[tuple[int, int]]) -> Callable[[int, int], bytes]:
    def read(at: int, n_bytes: int) -> bytes:
        asked.append((at, n_bytes))
        return data[at : at + n_bytes]

    return read


def assert_rejected(data: bytes, *culprits: str, file_bytes: int | None = None) -> None:
    with pytest.raises(InputError) as caught:
        read(data, file_bytes)
    message = str(caught.value)
    assert message.startswith("x.iris: ")
    assert message.isprintable(), message
    assert all(culprit in message for culprit in culprits), message


def entry_of(row: Row) -> Entry:
    return Entry(row.name.decode(), row.offset, row.n_bytes, DTYPES[row.dtype], row.shape)


def assert_sound(header: Header, n_bytes: int) -> None:
    """Assert that every entry lies within the file where it may, and overlaps no other."""
    assert header.version in (1, 2)
    assert header.file_bytes == n_bytes
    assert 1 <= len(header.entries) <= MAX_ENTRIES
    assert header.digests is None if header.version == 1 else header.digests.keys() == header.entries.keys()
    entries = sorted(header.entries.values(), key=lambda entry: (entry.offset, entry.end))
    assert entries[0].offset >= header_bytes(header.version, len(entries))
    assert entries[-1].end <= n_bytes
    assert all(before.end <= after.offset for before, after in itertools.pairwise(entries))
    for name, entry in header.entries.items():
        assert name == entry.name and name.isprintable() and 1 <= len(name.encode()) <= 128
        assert entry.offset % 256 == 0
        assert entry.n_bytes == math.prod(entry.shape) * entry.dtype.itemsize
        assert 1 <= len(entry.shape) <= 8


# Names


@pytest.mark.parametrize("config", [small_config(), GPT_OSS_120B, GPT_OSS_20B], ids=["small", "120b", "20b"])
def test_names_dtypes_and_shapes(config):
    published = expected_tensors(config)
    kinds = row_kinds(config.n_layers)
    assert archive_tensors(config) == {name: (DTYPES[dtype], published[of][0]) for name, (of, dtype) in kinds.items()}
    assert {archive_name(of): of for of in published} == {name: of for name, (of, _) in kinds.items()}
    assert len(kinds) == len(published)


# Headers as written


@pytest.mark.parametrize("n_documents", [1, 2, 3])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_written_header_is_that_of_struct(n_layers, n_documents):
    documents = dict(list(DOCUMENTS.items())[:n_documents])
    archive = archive_of(RandomCheckpoint(CHECKPOINT.config.cut(n_layers)), 2, documents)
    entries = [entry_of(row) for row in archive.rows]
    assert place_entries((entry.name, entry.dtype, entry.shape) for entry in entries) == entries
    digests = {row.name.decode(): row.digest for row in archive.rows}
    assert encode_header(entries, digests) == archive.header()
    archive.order = 7
    assert encode_header(entries, digests, order=7) == archive.header()


def test_written_file_is_that_of_struct(tmp_path):
    write_archive(CHECKPOINT, tmp_path / "small.iris")
    (data,) = [path.read_bytes() for path in tmp_path.iterdir()]
    start = header_bytes(2, len(expected_tensors(CHECKPOINT.config)) + 1)
    config = data[start : start + struct.unpack_from("<Q", data, 16 + 136)[0]]
    assert archive_of(CHECKPOINT, 2, {CONFIG: config}, written_order(3)).encode() == data


def test_sealed_header_ends_with_the_digest_of_what_is_before_it(good):
    header = good[2].header()
    assert header[-32:] == hashlib.sha256(header[:-32]).digest()
    assert seal(header[:-32] + bytes(32)) == header


@pytest.mark.parametrize("count", [1, 16, 17, 18, 19, 60, 61, 1000])
@pytest.mark.parametrize("version", [1, 2])
def test_header_takes_whole_pages(version, count):
    assert header_bytes(version, count) == iris_files.header_bytes(version, count)


# Headers as read


@pytest.mark.parametrize("version", [1, 2])
def test_good_header(good, version):
    archive = good[version]
    data = archive.encode()
    header = read(data)
    assert (header.version, header.file_bytes) == (version, len(data))
    assert list(header.entries.values()) == [entry_of(row) for row in archive.rows]
    assert list(header.entries) == archive.names()
    digests = {row.name.decode(): row.digest for row in archive.rows}
    assert header.digests == (None if version == 1 else digests)
    assert_sound(header, len(data))


def test_only_the_header_is_asked_for(good):
    for archive in good.values():
        header, asked = archive.header(), []
        read_header(noting_reader(header, asked), archive.file_bytes, "x.iris")
        assert asked == [(0, 16), (0, len(header))]


def test_order_of_the_table_is_free(good):
    archive = good[2].copy()
    archive.rows.reverse()
    header = read(archive.encode())
    assert list(header.entries) == archive.names()
    assert header.digests == {row.name.decode(): row.digest for row in archive.rows}


def test_version_1_may_leave_sizes_beyond_the_dimensions_and_bytes_behind_the_last_tensor(good):
    archive = good[1].copy()
    row = archive.row("final_norm")
    row.shape = (*row.shape, 9)
    assert read(archive.encode() + b"more").entries == read(good[1].encode()).entries


def test_longest_name_and_most_dimensions(good):
    archive = good[2].copy()
    row = archive.rows[-1]
    row.name, row.shape, row.n_dims = ("é" * 64).encode(), (1, 2, 1, 2, 64, 1, 1, 1), 8
    entry = read(archive.encode()).entries["é" * 64]
    assert entry.shape == row.shape


def test_entry_of_no_bytes_is_no_overlap(good):
    archive = good[2].copy()
    row = archive.row("L0.b_o")
    row.n_bytes, row.shape, row.offset = 0, (0,), archive.row("L0.w_o").offset
    assert read(archive.encode()).entries["L0.b_o"].n_bytes == 0


@pytest.mark.parametrize("version", [1, 2])
def test_as_many_entries_as_the_largest_model_has(version):
    assert MAX_ENTRIES == 3 + 19 * MAX_LAYERS + 3 + 1 + 5 * MAX_LAYERS  # documents and scales at the end
    start = iris_files.header_bytes(version, MAX_ENTRIES)
    rows = [Row(f"t{i}".encode(), start, 0, i % 4, (0, i), 2, bytes(32)) for i in range(MAX_ENTRIES)]
    archive = ArchiveBytes(version, rows, b"", start)
    assert len(read(archive.encode()).entries) == MAX_ENTRIES


@pytest.mark.parametrize(("version", "_what", "change", "culprit"), BROKEN, ids=BROKEN_IDS)
def test_broken_header(good, version, _what, change, culprit):
    archive = good[version].copy()
    change(archive)
    assert archive != good[version]
    assert_rejected(archive.encode(), culprit)


@pytest.mark.parametrize("field", ["offset", "n_bytes", "dtype", "n_dims"])
@pytest.mark.parametrize("index", [0, 1, 30, -1])
@pytest.mark.parametrize("version", [1, 2])
def test_extreme_numbers_in_a_row(good, version, index, field):
    bits = 32 if field in ("dtype", "n_dims") else 64
    for value in {0, 1, 2, 255, 256, 4096, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 256, 2**bits - 1}:
        archive = good[version].copy()
        if value != getattr(archive.rows[index], field):
            setattr(archive.rows[index], field, value)
            assert_rejected(archive.encode())


@pytest.mark.parametrize("version", [1, 2])
def test_two_rows_with_each_others_place(good, version):
    archive = good[version].copy()
    first, second = archive.row("L0.norm_attn"), archive.row("L2.down_b")
    first.offset, second.offset = second.offset, first.offset
    assert_rejected(archive.encode(), "'L0.w_q'", "within what is before it")


@pytest.mark.parametrize("change", BROKEN_IN_VERSION_2.values(), ids=BROKEN_IN_VERSION_2)
def test_changed_header_with_the_former_checksum(good, change):
    archive = good[2].copy()
    change(archive)
    header, data = archive.header(), good[2].encode()
    if header != good[2].header():
        changed = header[:-32] + data[len(header) - 32 :]
        assert_rejected(changed, "checksum" if header[:16] == data[:16] else "")


@pytest.mark.parametrize("at", [-33, -100])
def test_padding_of_the_header_that_is_not_zero(good, at):
    header = bytearray(good[2].header())
    header[at] = 1
    assert_rejected(sealed_again(bytes(header) + good[2].body), "bytes, in its header", "belong to no tensor")


def test_any_flipped_bit_of_the_header_is_noticed(good):
    data = bytearray(good[2].encode())
    rng = random.Random(5)
    for at in range(len(good[2].header())):
        bit = 1 << rng.randrange(8)
        data[at] ^= bit
        with pytest.raises(InputError):
            read(data)
        data[at] ^= bit
    read(data)


@pytest.mark.parametrize("n_bytes", [0, 1, 7, 8, 15])
def test_file_shorter_than_any_header(good, n_bytes):
    for archive in good.values():
        assert_rejected(archive.encode()[:n_bytes], "is empty" if n_bytes == 0 else "is not an .iris archive")


@pytest.mark.parametrize("version", [1, 2])
def test_truncation_at_every_boundary(good, version):
    data, header = good[version].encode(), good[version].header()
    rows = good[version].rows
    table = 16 + 216 * len(rows)
    boundaries = {16 + 216 * i for i in range(len(rows) + 1)} | {table + 32 * i for i in range(len(rows) + 1)}
    boundaries |= {row.offset for row in rows} | {row.end for row in rows} | {8, 12, table + 32 * len(rows) + 16}
    boundaries |= {len(header), len(header) - 32, 4096, 8192, len(data)}
    for n in sorted({boundary + by for boundary in boundaries for by in (-1, 0, 1)}):
        if n < len(data):
            assert_rejected(data[:n], "ends within its header" if 16 <= n < len(header) else "")
    for n in random.Random(3).sample(range(len(data)), 200):
        assert_rejected(data[:n])


def test_file_that_gives_less_than_its_size(good):
    """A file that is cut short while it is read gives less than its size."""
    for archive in good.values():
        header = archive.header()
        for n in (0, 15, 16, 4096, len(header) - 1):
            assert_rejected(header[:n], file_bytes=len(archive.encode()))


@pytest.mark.parametrize("count", [19462, 24583, 24584, 2**31, 2**32 - 1])
@pytest.mark.parametrize("version", [1, 2])
def test_nothing_is_read_that_cannot_be_there(good, version, count):
    archive, asked = good[version].copy(), []
    archive.count = count
    data = archive.encode()
    with pytest.raises(InputError):
        read_header(noting_reader(data, asked), len(data), "x.iris")
    assert asked == [(0, 16)]


# Random damage

FUZZ = settings(max_examples=250, deadline=5000, derandomize=True)
U32 = st.one_of(st.integers(0, 70), st.integers(0, 2**32 - 1), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1]))
U64 = st.one_of(
    U32,
    st.integers(0, 2**64 - 1),
    st.integers(0, 700).map(lambda n: n * 256),
    st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64 - 256, 167_168, 167_424]),
)
NAMES = st.one_of(
    st.sampled_from([name.encode() for name in row_kinds(4)] + [CONFIG.encode(), TOKENIZER.encode()]),
    st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")[:128]),
    st.binary(max_size=128),
)
SHAPES = st.lists(U64, min_size=8, max_size=8).map(tuple)
ROW_EDITS = st.one_of(
    st.tuples(st.just("name"), NAMES),
    st.tuples(st.sampled_from(["offset", "n_bytes"]), U64),
    st.tuples(st.sampled_from(["dtype", "n_dims"]), U32),
    st.tuples(st.just("shape"), SHAPES),
)
HEADER_EDITS = st.one_of(
    st.tuples(st.sampled_from(["version", "count", "order", "zero"]), U32),
    st.tuples(st.just("file_bytes"), U64),
    st.tuples(st.just("body"), st.integers(0, 200_000).map(bytes)),
    st.tuples(st.just("magic"), st.binary(min_size=8, max_size=8)),
)


def sound_or_one_line(data: bytes) -> None:
    try:
        header = read(data)
    except InputError as error:
        assert str(error).startswith("x.iris: ")
        assert str(error).isprintable()
    else:
        assert_sound(header, len(data))


@FUZZ
@given(
    version=st.sampled_from([1, 2]),
    row_edits=st.lists(st.tuples(st.integers(0, 59), ROW_EDITS), max_size=4),
    header_edits=st.lists(HEADER_EDITS, max_size=1),
    moves=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 59)), max_size=2),
)
def test_random_fields(good, version, row_edits, header_edits, moves):
    archive = good[version].copy()
    for index, (field, value) in row_edits:
        setattr(archive.rows[index], field, value)
    for field, value in header_edits:
        setattr(archive, field, value)
    for first, second in moves:
        archive.rows[first].offset = archive.rows[second].offset
    sound_or_one_line(archive.encode())


@FUZZ
@given(
    version=st.sampled_from([1, 2]),
    sizes=st.lists(st.tuples(st.integers(0, 59), st.integers(0, 40), st.integers(0, 700)), min_size=1, max_size=3),
)
def test_random_places_of_rows_that_agree_with_themselves(good, version, sizes):
    archive = good[version].copy()
    for index, n_bytes, page in sizes:
        iris_files.sized(index, n_bytes * 128)(archive)
        archive.rows[index].offset = page * 256
    sound_or_one_line(archive.encode())


@FUZZ
@given(
    version=st.sampled_from([1, 2]),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.binary(max_size=8), st.one_of(st.just(None), st.integers(0, 8))),
        min_size=1,
        max_size=4,
    ),
    sealed=st.booleans(),
)
def test_random_bytes(good, version, edits, sealed):
    """Some bytes of the header are replaced by equally many, or by more or fewer, which moves all bytes behind them."""
    data = bytearray(good[version].encode())
    for fraction, new, removed in edits:
        at = int(fraction * len(good[version].header()))
        data[at : at + (len(new) if removed is None else removed)] = new
    sound_or_one_line(sealed_again(bytes(data)) if sealed else bytes(data))


@FUZZ
@given(data=st.binary(max_size=400), version=st.integers(0, 3), count=st.integers(0, 3))
def test_random_table(data, version, count):
    header = struct.pack("<8sII", b"IRISMDL1", version, count) + data
    sound_or_one_line(sealed_again(header.ljust(8192, b"\0")))
    sound_or_one_line(header)
    sound_or_one_line(data)
