"""Loads, stores and atomics of every width, in memory and in LDS, against bytes in numpy.

What they do: AMD's "CDNA4 Instruction Set Architecture", chapters "Vector memory operations", "Flat memory
instructions" and "Data share operations"; the layout of ds_read_b64_tr_*: LLVM's AMDGPU usage guide.
"""

import numpy as np
import pytest
import torch
from assembly import CONDITIONS, FIRST_POINTER, LANES, evaluate, kernel, pointer, registers, run

from tools.gfx950.layout import Problem

LINE = 32  # bytes of a lane
LOW, HIGH = f"s{FIRST_POINTER}", f"s{FIRST_POINTER + 1}"  # of the first tensor's address
BUFFER = f"""
    s_mov_b32 s8, {LOW}
    s_mov_b32 s9, {HIGH}
    s_mov_b32 s10, {{size}}
    s_mov_b32 s11, 0x27000
"""
LANE_OFFSETS = f"v_mul_u32_u24 v1, {LINE}, v0\n"
OLD = 0x89ABCDEF
# What follows the opcode -> bytes, whether the sign is extended, and the half of the register, if only one changes.
LOADS = {
    "ubyte": (1, False, None),
    "sbyte": (1, True, None),
    "ushort": (2, False, None),
    "sshort": (2, True, None),
    "dword": (4, False, None),
    "dwordx2": (8, False, None),
    "dwordx3": (12, False, None),
    "dwordx4": (16, False, None),
    "short_d16": (2, False, 0),
    "short_d16_hi": (2, False, 1),
    "ubyte_d16": (1, False, 0),
    "ubyte_d16_hi": (1, False, 1),
}
# Bytes, and the first byte of the register that is stored.
STORES = {
    "byte": (1, 0),
    "short": (2, 0),
    "dword": (4, 0),
    "dwordx2": (8, 0),
    "dwordx3": (12, 0),
    "dwordx4": (16, 0),
    "short_d16_hi": (2, 2),
    "byte_d16_hi": (1, 2),
}


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.int64).astype(np.uint8)


def loaded(values: np.ndarray, is_signed: bool, half: int | None) -> np.ndarray:
    """Return the words that a register gets: uint8 [n, bytes] -> uint32 [n, words]. OLD is what was there before."""
    n_bytes = values.shape[1]
    if n_bytes >= 4:
        return np.ascontiguousarray(values).view(np.uint32)
    numbers = [int.from_bytes(bytes(row), "little", signed=is_signed) for row in values]
    if half is not None:
        numbers = [(OLD & 0xFFFF0000 >> 16 * half) | number % 2**16 << 16 * half for number in numbers]
    return np.array([[number % 2**32] for number in numbers], np.uint32)


def lane_bits(active: np.ndarray) -> str:
    bits = int.from_bytes(np.packbits(active, bitorder="little").tobytes(), "little")
    return f"s_mov_b32 exec_lo, {bits % 2**32}\ns_mov_b32 exec_hi, {bits >> 32}\n"


ACTIVE = np.arange(LANES) % 5 != 3
# An instruction's addressing -> the operands behind its data, and the byte that a lane accesses within its line.
ADDRESSING = {
    "global": (f"v1, {pointer(0)} offset:8", 8),
    "global, 64-bit": ("v[2:3], off offset:-4", 12),
    "buffer": ("v1, s[8:11], s20 offen offset:4", 12),
}
ADDRESSES = f"""{LANE_OFFSETS}
    v_mov_b32 v3, {HIGH}
    v_add_co_u32 v2, vcc, {LOW}, v1
    v_addc_co_u32 v3, vcc, 0, v3, vcc
    v_add_co_u32 v2, vcc, 16, v2
    v_addc_co_u32 v3, vcc, 0, v3, vcc
    s_mov_b32 s20, 8
{BUFFER.format(size=LANES * LINE)}"""


@pytest.mark.parametrize("size", LOADS)
@pytest.mark.parametrize("addressing", ADDRESSING)
def test_loads(addressing, size):
    n_bytes, is_signed, half = LOADS[size]
    operands, first = ADDRESSING[addressing]
    words = max(n_bytes // 4, 1)
    memory, out = torch.from_numpy(random_bytes(LANES, LINE)), torch.zeros(LANES, 4, dtype=torch.int32)
    run(
        f"""{ADDRESSES}
        {"".join(f"v_mov_b32 v{4 + k}, {OLD:#x}{chr(10)}" for k in range(4))}
        {lane_bits(ACTIVE)}
        {addressing[:6]}_load_{size} {registers("v", 4, words)}, {operands}
        s_mov_b64 exec, -1
        v_lshlrev_b32 v9, 4, v0
        s_waitcnt vmcnt(0)
        global_store_dwordx4 v9, v[4:7], {pointer(1)}""",
        memory,
        out,
    )
    expected = np.full((LANES, 4), OLD, np.uint32)
    words_loaded = loaded(memory.numpy()[:, first : first + n_bytes], is_signed, half)
    expected[ACTIVE, :words] = words_loaded[ACTIVE]
    np.testing.assert_array_equal(out.numpy().view(np.uint32), expected)


@pytest.mark.parametrize("size", STORES)
@pytest.mark.parametrize("addressing", ADDRESSING)
def test_stores(addressing, size):
    n_bytes, first_byte = STORES[size]
    operands, first = ADDRESSING[addressing]
    memory, data = torch.from_numpy(random_bytes(LANES, LINE)), torch.from_numpy(random_bytes(LANES, 16)[::-1].copy())
    expected = memory.numpy().copy()
    expected[ACTIVE, first : first + n_bytes] = data.numpy()[ACTIVE, first_byte : first_byte + n_bytes]
    value = registers("v", 4, max(n_bytes // 4, 1))
    kind = addressing[:6]
    address, rest = operands.split(", ", 1)
    arguments = f"{address}, {value}, {rest}" if kind == "global" else f"{value}, {operands}"
    run(
        f"""{ADDRESSES}
        v_lshlrev_b32 v9, 4, v0
        global_load_dwordx4 v[4:7], v9, {pointer(1)}
        s_waitcnt vmcnt(0)
        {lane_bits(ACTIVE)}
        {kind}_store_{size} {arguments}
        s_mov_b64 exec, -1""",
        memory,
        data,
    )
    np.testing.assert_array_equal(memory.numpy(), expected)


def test_beyond_a_buffers_end_zeros_are_read_and_nothing_is_written():
    memory, out = torch.from_numpy(random_bytes(LANES, LINE)), torch.ones(LANES, dtype=torch.int32)
    before, size = memory.numpy().copy(), 20 * LINE
    run(
        f"""{LANE_OFFSETS}{BUFFER.format(size=size)}
        buffer_load_dword v4, v1, s[8:11], 0 offen
        v_mov_b32 v5, 7
        buffer_store_dword v5, v1, s[8:11], 0 offen offset:4
        v_lshlrev_b32 v9, 2, v0
        s_waitcnt vmcnt(0)
        global_store_dword v9, v4, {pointer(1)}""",
        memory,
        out,
    )
    within = np.arange(LANES) < 20
    np.testing.assert_array_equal(out.numpy(), np.where(within, before[:, :4].copy().view(np.int32)[:, 0], 0))
    stored = before.copy()
    stored[:20, 4:8] = (7, 0, 0, 0)
    np.testing.assert_array_equal(memory.numpy(), stored)


ATOMICS = {
    "add": lambda old, x: (old + x) % 2**32,
    "sub": lambda old, x: (old - x) % 2**32,
    "smax": lambda old, x: max(old, x, key=lambda v: (v + 2**31) % 2**32),
    "smin": lambda old, x: min(old, x, key=lambda v: (v + 2**31) % 2**32),
    "umax": max,
    "umin": min,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "swap": lambda old, x: x,
    "add_f32": lambda old, x: int((np.uint32(old).view(np.float32) + np.uint32(x).view(np.float32)).view(np.uint32)),
}


def atomic_values(name: str) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(4)
    if name.endswith("f32"):
        return tuple(rng.standard_normal(LANES).astype(np.float32).view(np.uint32) for _ in range(2))
    return tuple(rng.integers(0, 2**32, LANES, np.int64).astype(np.uint32) for _ in range(2))


@pytest.mark.parametrize("returns", [True, False])
@pytest.mark.parametrize("kind", ["global", "buffer"])
@pytest.mark.parametrize("name", [*ATOMICS, "cmpswap"])
def test_atomics(name, kind, returns):
    """With sc0 they return what was there. cmpswap stores the first word where the second one is found."""
    old, x = atomic_values(name)
    compared = np.where(np.arange(LANES) % 2 == 0, old, x)
    memory, given = (torch.from_numpy(v.view(np.int32).copy()) for v in (old, np.stack([x, compared], 1)))
    out = torch.full((LANES,), 77, dtype=torch.int32)
    data = "v[4:5]" if name == "cmpswap" else "v4"
    if kind == "global":
        arguments = f"{'v6, ' * returns}v1, {data}, {pointer(0)}"
    else:  # the returned value replaces the data
        arguments = f"{data}, v1, s[8:11], 0 offen"
    run(
        f"""{BUFFER.format(size=4 * LANES)}
        v_lshlrev_b32 v1, 2, v0
        v_lshlrev_b32 v2, 3, v0
        global_load_dwordx2 v[4:5], v2, {pointer(1)}
        s_waitcnt vmcnt(0)
        v_mov_b32 v6, 77
        {lane_bits(ACTIVE)}
        {kind}_atomic_{name} {arguments}{" sc0" * returns}
        s_waitcnt vmcnt(0)
        {"v_mov_b32 v6, v4" if kind == "buffer" and returns else ""}
        s_mov_b64 exec, -1
        global_store_dword v1, v6, {pointer(2)}""",
        memory,
        given,
        out,
    )
    if name == "cmpswap":
        results = np.where(compared == old, x, old)
    else:
        results = np.array([ATOMICS[name](*row) for row in zip(old.tolist(), x.tolist(), strict=True)], np.uint32)
    np.testing.assert_array_equal(memory.numpy().view(np.uint32), np.where(ACTIVE, results, old))
    expected = np.where(ACTIVE & returns, old, 77)
    np.testing.assert_array_equal(out.numpy().view(np.uint32), expected)


def test_all_lanes_add_to_one_place():
    total, out = torch.zeros(1, dtype=torch.int32), torch.zeros(4 * LANES, dtype=torch.int32)
    run(
        f"""
        v_mov_b32 v1, 0
        v_lshlrev_b32 v3, 2, v0
        global_atomic_add v2, v1, v0, {pointer(0)} sc0
        s_waitcnt vmcnt(0)
        global_store_dword v3, v2, {pointer(1)}""",
        total,
        out,
        n_warps=4,
    )
    assert total.item() == sum(range(4 * LANES))
    assert len(set(out.tolist())) == 4 * LANES - 1  # thread 0 adds nothing


# ---- LDS ----
LDS_READS = {
    **{f"u{bits}": (bits // 8, False, None) for bits in (8, 16)},
    **{f"i{bits}": (bits // 8, True, None) for bits in (8, 16)},
    **{f"b{bits}": (bits // 8, False, None) for bits in (32, 64, 96, 128)},
    "u8_d16": (1, False, 0),
    "u8_d16_hi": (1, False, 1),
    "i8_d16": (1, True, 0),
    "i8_d16_hi": (1, True, 1),
    "u16_d16": (2, False, 0),
    "u16_d16_hi": (2, False, 1),
}
LDS_WRITES = {
    **{f"b{bits}": (bits // 8, 0) for bits in (8, 16, 32, 64, 96, 128)},
    "b8_d16_hi": (1, 2),
    "b16_d16_hi": (2, 2),
}
FILL = "ds_write_b128 {a}, {b}\ns_waitcnt lgkmcnt(0)\ns_barrier\n"


def lds_lines() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where a lane writes 16 bytes, those bytes as words, and whose bytes it reads."""
    return (
        np.arange(LANES, dtype=np.uint32) * 16,
        random_bytes(LANES, 16).view(np.uint32),
        np.random.default_rng(1).permutation(LANES),
    )


@pytest.mark.parametrize("size", LDS_READS)
def test_lds_reads(size):
    n_bytes, is_signed, half = LDS_READS[size]
    at, data, other = lds_lines()
    words, offset = max(n_bytes // 4, 1), 0 if n_bytes > 8 else 8
    code = FILL + f"s_mov_b64 exec, {{mask}}\nds_read_{size} {registers('v', 4, words)}, {{c}} offset:{offset}"
    old = np.full((LANES, 4), OLD, np.uint32)
    found = evaluate(code, at, data, at[other], old=old, mask=ACTIVE, shared=16 * LANES).words
    expected = old.copy()
    values = data.view(np.uint8)[other, offset : offset + n_bytes]
    expected[ACTIVE, :words] = loaded(values, is_signed, half)[ACTIVE]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("size", LDS_WRITES)
def test_lds_writes(size):
    n_bytes, first_byte = LDS_WRITES[size]
    at, data, other = lds_lines()
    new = random_bytes(LANES, 16)[::-1].copy()
    words, offset = max(n_bytes // 4, 1), {8: 8, 12: 0, 16: 0}.get(n_bytes, 4)
    value = registers("v", 17, words)  # behind a, b
    code = FILL + f"s_mov_b64 exec, {{mask}}\nds_write_{size} {{e}}, {value} offset:{offset}\ns_mov_b64 exec, -1\n"
    code += "s_waitcnt lgkmcnt(0)\nds_read_b128 v[4:7], {a}"
    found = evaluate(code, at, data, new.view(np.uint32), at[other], mask=ACTIVE, shared=16 * LANES).words
    expected = data.view(np.uint8).copy()
    expected[other[ACTIVE], offset : offset + n_bytes] = new[ACTIVE, first_byte : first_byte + n_bytes]
    np.testing.assert_array_equal(found, expected.view(np.uint32))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("stride", [1, 64])
def test_lds_accesses_with_two_offsets(bits, stride):
    """Offsets count elements, or 64 of them."""
    n_bytes, infix = bits // 8, "st64" if stride == 64 else ""
    low, high = random_bytes(2, LANES, n_bytes).view(np.uint32)
    at = np.arange(LANES, dtype=np.uint32) * n_bytes * 2
    unit = n_bytes * stride
    near, far = (1, 0) if stride == 1 else (3, 5)
    size = 2 * n_bytes * LANES + 6 * unit
    code = f"ds_write2{infix}_b{bits} {{a}}, {{b}}, {{c}} offset0:{near} offset1:{far}\ns_waitcnt lgkmcnt(0)\n"
    code += f"ds_read2{infix}_b{bits} {registers('v', 4, n_bytes // 2)}, {{a}} offset0:{far} offset1:{near}"
    found = evaluate(code, at, low, high, shared=size).words[:, : n_bytes // 2]
    np.testing.assert_array_equal(found, np.concatenate([high, low], 1))
    # Elements by single reads: the first offset's is where it should be.
    code = code.splitlines()[0] + f"\ns_waitcnt lgkmcnt(0)\nds_read_b{bits} {{d}}, {{a}} offset:{near * unit}"
    found = evaluate(code, at, low, high, words=n_bytes // 4, shared=size).words[:, : n_bytes // 4]
    np.testing.assert_array_equal(found, low)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_transposed_reads(bits):
    """The 16 lanes of a group read a matrix by rows of 16 elements, 64 bits each, and get its columns."""
    at, data, _ = lds_lines()
    n = 64 // bits  # rows
    lines = data[:, :2].copy()
    code = f"ds_write_b64 {{a}}, {{b}}\ns_waitcnt lgkmcnt(0)\nds_read_b64_tr_b{bits} {{d}}, {{a}}"
    found = evaluate(code, at, lines, words=2, shared=16 * LANES).words[:, :2]

    def elements(words: np.ndarray) -> np.ndarray:
        """Return elements of `bits`, [lanes, n]."""
        digits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
        return digits.reshape(LANES, n, bits) @ (1 << np.arange(bits))

    matrices = elements(lines).reshape(4, n, 16)
    np.testing.assert_array_equal(elements(found), matrices.transpose(0, 2, 1).reshape(LANES, n))


@pytest.mark.parametrize("address", [8, 2**32, 2**63, 2**64 - 4, 2**64 - 1])
@pytest.mark.parametrize("name", ["global_load_dword v4, v[2:3], off", "global_store_dword v[2:3], v4, off"])
def test_an_address_outside_all_tensors_is_reported(name, address):
    """The lowest and the highest addresses too, where one plus a size begins again at 0."""
    body = f"""
        v_mov_b32 v2, {hex(address % 2**32)}
        v_mov_b32 v3, {hex(address >> 32)}
        v_mov_b32 v4, 0
        {name}
        s_waitcnt vmcnt(0)"""
    result = kernel(body, 1).launch(1, 1, 0, [torch.zeros(64)], CONDITIONS)
    assert Problem.OUT_OF_BOUNDS in {finding.problem for finding in result.findings}
