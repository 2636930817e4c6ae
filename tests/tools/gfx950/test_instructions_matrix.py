"""Matrix products of every type, against products in double precision of values that the tests decode and lay out.

Shapes and the order of lanes: the chapter "Matrix arithmetic instructions" of AMD's "CDNA4 Instruction Set
Architecture", and AMD's matrix instruction calculator; that of 8-bit elements of f8f6f4 products as other compilers'
tests have it. Formats and scales: OCP's "Microscaling Formats Specification" (E4M3, E5M2, E2M3, E3M2, E2M1, E8M0).
"""

import itertools

import numpy as np
import pytest
import torch
from assembly import LANES, pointer, run

A, B, C, D = 16, 32, 48, 64  # first registers
SCALES = 8


def small_values(exponent_bits: int, mantissa_bits: int, bias: int) -> np.ndarray:
    """Return what the codes of a format without infinities and NaN stand for."""
    sign, exponent, mantissa = np.meshgrid((1, -1), range(2**exponent_bits), range(2**mantissa_bits), indexing="ij")
    fraction = mantissa / 2**mantissa_bits + (exponent > 0)
    return (sign * fraction * 2.0 ** (np.maximum(exponent, 1) - bias)).reshape(-1)


BYTES = torch.arange(256, dtype=torch.uint8)
SHORTS = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
# The bits of an element, and what its codes stand for.
FORMATS = {
    "fp8": (8, BYTES.view(torch.float8_e4m3fn).double().numpy()),
    "bf8": (8, BYTES.view(torch.float8_e5m2).double().numpy()),
    "fp6": (6, small_values(2, 3, 1)),
    "bf6": (6, small_values(3, 2, 3)),
    "fp4": (4, small_values(2, 1, 1)),
    "f16": (16, SHORTS.view(torch.float16).double().numpy()),
    "bf16": (16, SHORTS.view(torch.bfloat16).double().numpy()),
}
NUMBER_OF = {"fp8": 0, "bf8": 1, "fp6": 2, "bf6": 3, "fp4": 4}  # in cbsz and blgp


def packed(elements: np.ndarray, bits: int) -> np.ndarray:
    """Return words that hold each row's elements, the first one lowest: [lanes, n] -> uint32 [lanes, n bits / 32]."""
    digits = elements[..., None] >> np.arange(bits) & 1
    return np.packbits(digits.reshape(len(elements), -1).astype(np.uint8), axis=1, bitorder="little").view(np.uint32)


def spread(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return the registers of a factor of M x K codes, B's columns as rows.

    Lanes of a row hold consecutive parts of K; where a lane has 32 elements of 8 bits, consecutive parts of each half.
    """
    rows, depth = codes.shape
    n = depth * rows // LANES
    if n == 32 and bits == 8:
        parts = codes.reshape(rows, 2, LANES // rows, 16).transpose(2, 0, 1, 3)
    else:
        parts = codes.reshape(rows, LANES // rows, n).transpose(1, 0, 2)
    return packed(parts.reshape(LANES, n).astype(np.int64), bits)


def registers_of(x: np.ndarray) -> np.ndarray:
    """Return C's registers: a lane has a column; of 32 rows, the halves of each 8 lie in two groups of lanes."""
    if len(x) == 16:
        return x.reshape(4, 4, 16).transpose(0, 2, 1).reshape(LANES, 4)
    return x.reshape(4, 2, 4, 32).transpose(1, 3, 0, 2).reshape(LANES, 16)


def matrix_of(registers: np.ndarray) -> np.ndarray:
    if registers.shape[1] == 4:
        return registers.reshape(4, 16, 4).transpose(0, 2, 1).reshape(16, 16)
    return registers.reshape(2, 32, 4, 4).transpose(2, 0, 3, 1).reshape(32, 32)


def scale_registers(scales: np.ndarray, byte: int) -> np.ndarray:
    """Return registers whose `byte` has the scales of M rows, K / 32 each; the other bytes are something else."""
    lanes = scales.T.reshape(LANES).astype(np.uint32)
    return (lanes << 8 * byte) | (0x81828384 & ~(255 << 8 * byte))


def multiply(name, a, b, c, scales=None, modifiers="", summand=None, before="") -> np.ndarray:
    """Execute a product of registers; c may be replaced by a constant. Return D as a matrix."""
    tensors = [a, b, np.ascontiguousarray(c), *(scale[:, None] for scale in scales or ())]
    firsts = [A, B, C, SCALES, SCALES + 1]
    n = c.shape[1]
    loads, spans = [], []
    for k, (first, tensor) in enumerate(zip(firsts, tensors, strict=False)):
        words = tensor.shape[1]
        loads.append(f"v_mul_u32_u24 v1, {4 * words}, v0")
        loads += [f"global_load_dword v{first + j}, v1, {pointer(k)} offset:{4 * j}" for j in range(words)]
        loads.append("s_waitcnt vmcnt(0)")
        spans.append(f"v[{first}:{first + words - 1}]" if words > 1 else f"v{first}")
    if summand is not None:
        spans[2] = summand
    out = np.zeros((LANES, n), np.float32)
    stores = [f"global_store_dword v1, v{D + j}, {pointer(len(tensors))} offset:{4 * j}" for j in range(n)]
    lines = [
        *loads,
        before,
        f"{name} v[{D}:{D + n - 1}], {', '.join(spans)} {modifiers}",
        "s_mov_b64 exec, -1",
        f"v_mul_u32_u24 v1, {4 * n}, v0",
        *stores,
    ]
    run("\n".join(lines), *(torch.from_numpy(np.ascontiguousarray(x).view(np.int32)) for x in (*tensors, out)))
    return matrix_of(out)


def finite_codes(name: str, *shape: int, seed: int = 0) -> np.ndarray:
    """Return random codes of numbers of moderate size, among them all small codes."""
    values = FORMATS[name][1]
    codes = np.flatnonzero(np.abs(np.nan_to_num(values, nan=1e9)) <= 1e4)
    return np.random.default_rng(seed).choice(codes, shape)


def assert_rounded_once(found: np.ndarray, exact: np.ndarray, magnitude: np.ndarray) -> None:
    """Check float32 values against a sum in double precision. magnitude: the sum of the summands' absolute values."""
    error = np.abs(found - exact)
    assert (error <= np.abs(exact) * 2.0**-24 + magnitude * 2.0**-48 + 2.0**-150).all(), error.max()


PLAIN = [
    *("v_mfma_f32_16x16x16_f16", "v_mfma_f32_32x32x8_f16", "v_mfma_f32_16x16x32_f16", "v_mfma_f32_32x32x16_f16"),
    *("v_mfma_f32_16x16x16_bf16", "v_mfma_f32_32x32x8_bf16", "v_mfma_f32_16x16x32_bf16", "v_mfma_f32_32x32x16_bf16"),
    *("v_mfma_f32_16x16x32_fp8_fp8", "v_mfma_f32_32x32x16_fp8_fp8"),
    *("v_mfma_f32_16x16x32_bf8_bf8", "v_mfma_f32_32x32x16_bf8_bf8"),
]


def shape_of(name: str) -> tuple[int, int]:
    """Return M and K."""
    size = next(part for part in name.split("_") if part.count("x") == 2)
    rows, _, depth = map(int, size.split("x"))
    return rows, depth


@pytest.mark.parametrize("name", PLAIN)
def test_products(name):
    rows, depth = shape_of(name)
    kind = name.rsplit("_", 1)[1]
    bits, values = FORMATS[kind]
    a, b = (finite_codes(kind, rows, depth, seed=seed) for seed in (1, 2))
    c = np.random.default_rng(3).standard_normal((rows, rows)).astype(np.float32) * 100
    found = multiply(name, spread(a, bits), spread(b, bits), registers_of(c))
    magnitude = np.abs(values[a]) @ np.abs(values[b]).T + np.abs(c)
    assert_rounded_once(found, values[a] @ values[b].T + c, magnitude)


@pytest.mark.parametrize("name", ["v_mfma_f32_16x16x4_f32", "v_mfma_f32_32x32x2_f32"])
def test_float32_products_are_added_in_order(name):
    rows, depth = shape_of(name)
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, depth), (rows, depth), (rows, rows)))
    lanes = [x.T.reshape(LANES, 1) for x in (a, b)]
    found = multiply(name, *lanes, registers_of(c))
    exact, magnitude = a.astype(np.float64) @ b.T.astype(np.float64) + c, np.abs(a) @ np.abs(b).T + np.abs(c)
    assert (np.abs(found - exact) <= depth * magnitude * 2.0**-24).all()
    integers = [np.round(x * 100) for x in (a, b, c)]
    found = multiply(name, *(x.T.reshape(LANES, 1) for x in integers[:2]), registers_of(integers[2]))
    np.testing.assert_array_equal(found, integers[0] @ integers[1].T + integers[2])


def test_a_constant_summand_and_inactive_lanes():
    """A product does not ask which lanes are active."""
    codes = [finite_codes("f16", 16, 32, seed=seed) for seed in (1, 2)]
    a, b = (spread(x, 16) for x in codes)
    values = [FORMATS["f16"][1][x] for x in codes]
    for summand, number in (("0", 0), ("1.0", 1), ("-4.0", -4)):
        found = multiply(
            "v_mfma_f32_16x16x32_f16",
            a,
            b,
            np.zeros((LANES, 4), np.float32),
            summand=summand,
            before="s_mov_b64 exec, 5",
        )
        exact = values[0] @ values[1].T + number
        assert_rounded_once(found, exact, np.abs(values[0]) @ np.abs(values[1]).T + abs(number))


SCALED = {"v_mfma_scale_f32_16x16x128_f8f6f4": (16, 128), "v_mfma_scale_f32_32x32x64_f8f6f4": (32, 64)}
PAIRS = [*itertools.product(NUMBER_OF, NUMBER_OF)]


def selectors(byte_a: int, byte_b: int) -> str:
    """Return op_sel and op_sel_hi, the low and the high bit of the numbers of both scales' bytes."""
    return f"op_sel:[{byte_a & 1},{byte_b & 1},0] op_sel_hi:[{byte_a >> 1},{byte_b >> 1},0]"


def powers(scales: np.ndarray) -> np.ndarray:
    """Return E8M0 numbers, one for each element along K."""
    return np.repeat(np.where(scales == 255, np.nan, 2.0 ** (scales.astype(np.float64) - 127)), 32, axis=1)


def scaled_product(name, formats, codes, scales, c, chosen=(0, 0)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what the emulator makes of it, the product in double precision, and the sum of absolute values."""
    bits = [FORMATS[kind][0] for kind in formats]
    factors = [FORMATS[kind][1][x] for kind, x in zip(formats, codes, strict=True)]
    lanes = [spread(x, size) for x, size in zip(codes, bits, strict=True)]
    registers = [scale_registers(x, byte) for x, byte in zip(scales, chosen, strict=True)]
    modifiers = f"{selectors(*chosen)} cbsz:{NUMBER_OF[formats[0]]} blgp:{NUMBER_OF[formats[1]]}"
    found = multiply(name, *lanes, registers_of(c), registers, modifiers)
    left, right = (factor * powers(scale) for factor, scale in zip(factors, scales, strict=True))
    return found, left @ right.T + c, np.abs(left) @ np.abs(right).T + np.abs(c)


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("formats", PAIRS, ids="-".join)
def test_scaled_products(name, formats):
    """Each 32 elements along K have a scale, in the lane of their row, in the byte that op_sel chooses."""
    rows, depth = SCALED[name]
    rng = np.random.default_rng(7)
    codes = [finite_codes(kind, rows, depth, seed=seed) for seed, kind in enumerate(formats)]
    scales = [rng.integers(117, 138, (rows, depth // 32)) for _ in range(2)]
    c = rng.standard_normal((rows, rows)).astype(np.float32)
    chosen = (PAIRS.index(formats) % 4, PAIRS.index(formats) // 4 % 4)
    assert_rounded_once(*scaled_product(name, formats, codes, scales, c, chosen))


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("chosen", [*itertools.product(range(4), range(4))], ids=str)
def test_all_bytes_of_scales(name, chosen):
    rows, depth = SCALED[name]
    codes = [finite_codes("fp4", rows, depth, seed=seed) for seed in (0, 1)]
    scales = [np.random.default_rng(seed).integers(120, 135, (rows, depth // 32)) for seed in (2, 3)]
    assert_rounded_once(
        *scaled_product(name, ("fp4", "fp4"), codes, scales, np.zeros((rows, rows), np.float32), chosen)
    )


@pytest.mark.parametrize("name", SCALED)
def test_products_without_scales(name):
    rows, depth = SCALED[name]
    plain = name.replace("_scale", "")
    for formats in (("fp8", "fp8"), ("bf8", "fp4"), ("fp6", "bf6")):
        codes = [finite_codes(kind, rows, depth, seed=seed) for seed, kind in enumerate(formats)]
        lanes = [spread(x, FORMATS[kind][0]) for x, kind in zip(codes, formats, strict=True)]
        values = [FORMATS[kind][1][x] for kind, x in zip(formats, codes, strict=True)]
        modifiers = f"cbsz:{NUMBER_OF[formats[0]]} blgp:{NUMBER_OF[formats[1]]}"
        found = multiply(plain, *lanes, registers_of(np.ones((rows, rows), np.float32)), modifiers=modifiers)
        assert_rounded_once(found, values[0] @ values[1].T + 1, np.abs(values[0]) @ np.abs(values[1]).T + 1)


@pytest.mark.parametrize("name", SCALED)
def test_extreme_scales_and_elements(name):
    """The largest and smallest scales, their NaN, and an element's NaN and infinity, each in a row of its own."""
    rows, depth = SCALED[name]
    one, nan, largest, denormal = 0x38, 0x7F, 0x7E, 0x01  # of E4M3
    a, b = np.full((rows, depth), one), np.full((rows, depth), 0x3C)  # b: of E5M2, 1
    a[1, 5], a[2], a[3] = nan, largest, denormal
    scales = [np.full((rows, depth // 32), 127) for _ in range(2)]
    scales[0][4], scales[0][5], scales[0][6, 1] = 0, 254, 255
    b[1, 3], b[2, 3] = 0x7C, 0xFC  # infinities
    b[2, 9] = 0x7C
    scales[1][3], scales[1][4], scales[1][5, 0] = 0, 254, 255
    b[6] = 0x7B  # the largest
    b[7], a[7] = 0x01, 0x00
    with np.errstate(all="ignore"):
        found, exact, _ = scaled_product(name, ("fp8", "bf8"), (a, b), scales, np.zeros((rows, rows), np.float32))
        expected = exact.astype(np.float32)
    np.testing.assert_array_equal(found, expected)
    assert np.isnan(found[1]).all() and np.isnan(found[:, 2]).all() and np.isnan(found[:, 5]).all()
    assert found[0, 1] == np.inf and found[5, 4] == np.inf and found[4, 3] == 0
    assert found[4, 0] == depth * 2.0**-127 and found[3, 0] == depth * 2.0**-9 and found[2, 0] == depth * 448
