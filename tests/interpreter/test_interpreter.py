"""interpreter against torch's casts and products, numpy in float64, and kernels whose faults are known."""

import itertools
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

import interpreter
from common.sm90 import ptx
from common.sm90.ring import BARRIER_BYTES, TilePieces, describe_tile, fill_stage, open_ring, wait_for_stage

FP8 = {tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0)}


def random_float32_bits(count, exponents=range(256)):
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, count, np.uint64).astype(np.uint32) & 0x807FFFFF
    return torch.from_numpy((bits | generator.choice(list(exponents), count).astype(np.uint32) << 23).view(np.float32))


def assert_same_bits(actual, expected):
    """Assert equality down to the sign of zero; any NaN equals any NaN."""
    actual, expected = actual.double(), expected.double()
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual[~nan], expected[~nan])
    assert torch.equal(actual[~nan].signbit(), expected[~nan].signbit())


@triton.jit
def cast_kernel(source, target, N: tl.constexpr, DTYPE: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(target + at, tl.load(source + at).to(DTYPE))


def cast(values, dtype, torch_dtype):
    """Cast a flat tensor of any size to the Triton dtype, in an interpreted kernel."""
    size = triton.next_power_of_2(values.numel())
    padded = torch.zeros(size, dtype=values.dtype)
    padded[: values.numel()] = values
    out = torch.zeros(size, dtype=torch_dtype)
    cast_kernel[(1,)](padded, out, size, dtype)
    return out[: values.numel()]


# ---------------------------------------------------------------- casts


def all_bf16():
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)


def midpoints(exact):
    """Return the float32 ties between neighbours of a format's values, and the float32 numbers next to them."""
    ordered = exact.float()[exact.float().isfinite()].unique().double()
    ties = ((ordered[1:] + ordered[:-1]) / 2).float()
    infinity = torch.full_like(ties, float("inf"))
    return torch.cat([ties, ties.nextafter(infinity), ties.nextafter(-infinity)])


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"),
    [(tl.float32, torch.float32), (tl.float16, torch.float16), (tl.float64, torch.float64)],
)
def test_every_bf16_casts_to_wider_and_other_floats(dtype, torch_dtype):
    assert_same_bits(cast(all_bf16(), dtype, torch_dtype), all_bf16().to(torch_dtype))


def test_bf16_casts_to_integers():
    values = torch.linspace(-300, 300, 1024).bfloat16()
    assert torch.equal(cast(values, tl.int32, torch.int32), values.int())


@pytest.mark.parametrize("torch_dtype", [torch.int32, torch.int64, torch.uint8])
def test_integers_cast_to_bf16(torch_dtype):
    limit = 256 if torch_dtype == torch.uint8 else 1 << 24
    values = torch.randint(0, limit, (4096,)).to(torch_dtype)
    assert_same_bits(cast(values, tl.bfloat16, torch.bfloat16), values.double().float().bfloat16())


def test_float32_casts_to_bf16_to_nearest_even():
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, 9.1835e-41])
    for values in (random_float32_bits(1 << 17), midpoints(all_bf16()), special):
        assert_same_bits(cast(values, tl.bfloat16, torch.bfloat16), values.bfloat16())


def test_float64_casts_to_bf16_with_one_rounding():
    tie = 1 + 2.0**-8
    values = torch.tensor([tie, tie + 2.0**-40, tie - 2.0**-40, -tie - 2.0**-40], dtype=torch.float64)
    expected = torch.tensor([1.0, 1 + 2.0**-7, 1.0, -1 - 2.0**-7])
    assert_same_bits(cast(values, tl.bfloat16, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", FP8)
def test_every_fp8_casts_to_other_floats(dtype):
    torch_dtype, _ = FP8[dtype]
    values = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch_dtype)
    for target, torch_target in (
        (tl.float32, torch.float32),
        (tl.float16, torch.float16),
        (tl.bfloat16, torch.bfloat16),
    ):
        assert_same_bits(cast(values, target, torch_target), values.float().to(torch_target))


@pytest.mark.parametrize("dtype", FP8)
def test_floats_cast_to_fp8_to_nearest_even_and_saturate(dtype):
    torch_dtype, largest = FP8[dtype]
    every = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch_dtype)
    special = torch.tensor([0.0, -0.0, torch.nan, largest, largest * 1.01, -largest * 1.04, 1e30, -1e30, 1e-45, -1e-45])
    near = random_float32_bits(1 << 16, range(127 - 18, 127 + 18))
    for values in (random_float32_bits(1 << 15), near, midpoints(every), special):
        expected = values.clamp(-largest, largest).to(torch_dtype).float()
        assert_same_bits(cast(values, dtype, torch_dtype).float(), expected)
        half = values.half()
        expected = half.float().clamp(-largest, largest).to(torch_dtype).float()
        assert_same_bits(cast(half, dtype, torch_dtype).float(), expected)
    infinities = cast(torch.tensor([torch.inf, -torch.inf]), dtype, torch_dtype).float()
    assert infinities.tolist() == [largest, -largest]


# ---------------------------------------------------------------- arithmetic


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr, OP: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "minimum":
        z = tl.minimum(x, y)
    elif OP == "maximum":
        z = tl.maximum(x, y)
    elif OP == "fma":
        z = tl.fma(x, y, x)
    elif OP == "less":
        z = x < y
    elif OP == "equal":
        z = x == y
    elif OP == "abs":
        z = tl.abs(x)
    elif OP == "where":
        z = tl.where(x < y, x, 2.0)
    elif OP == "constant":
        z = x * 1.1 + 3
    tl.store(out_ptr + at, z.to(out_ptr.dtype.element_ty))


ARITHMETIC = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": lambda x, y: x.float() / y.float(),
    "minimum": torch.fmin,
    "maximum": torch.fmax,
    "fma": lambda x, y: (x.double() * y.double() + x.double()).float().to(x.dtype),
    "less": torch.lt,
    "equal": torch.eq,
    "abs": lambda x, y: x.abs(),
    "where": lambda x, y: torch.where(x < y, x, torch.tensor(2.0, dtype=x.dtype)),
    "constant": lambda x, y: x * torch.tensor(1.1, dtype=x.dtype) + 3,
}


@pytest.mark.parametrize("operation", ARITHMETIC)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_arithmetic(operation, dtype):
    torch.manual_seed(0)
    x, y = (torch.randn(4096).to(dtype) for _ in range(2))
    y[::16] = x[::16]
    x[1], y[2] = torch.nan, torch.nan
    expected = ARITHMETIC[operation](x, y)
    out = torch.zeros(4096)
    arithmetic_kernel[(1,)](x, y, out, 4096, operation)
    assert_same_bits(out, expected)


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.fma(tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)))


def test_fma_rounds_once():
    # (1 + 2^-12)^2 lies halfway between two float32 numbers, and the addend is too small for a float64 sum to show.
    x = torch.tensor([1, 1, -1, -1, 1, 3]) * (1 + 2.0**-12)
    y = torch.full((6,), 1 + 2.0**-12)
    z = torch.tensor([2.0**-100, -(2.0**-100), 2.0**-100, -(2.0**-100), 0.0, torch.inf])
    out = torch.zeros(8)
    fma_kernel[(1,)](*(torch.cat([t, torch.zeros(2)]) for t in (x, y, z)), out, 8)
    low, high = 1 + 2.0**-11, 1 + 2.0**-11 + 2.0**-23
    assert out.tolist() == [high, low, -low, -high, low, torch.inf, 0, 0]


@triton.jit
def integer_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    y = tl.load(y_ptr + at)
    tl.store(out_ptr + at, x // y)
    tl.store(out_ptr + N + at, x % y)
    tl.store(out_ptr + 2 * N + at, (x << 3) ^ (y | 5) & x)
    tl.store(out_ptr + 3 * N + at, x >> 2)
    tl.store(out_ptr + 4 * N + at, tl.where((x > 3) & (y <= 7), 7 - x, y))
    tl.store(out_ptr + 5 * N + at, x * 2147483647)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint32])
def test_integers_divide_towards_zero_and_wrap(dtype):
    generator = np.random.default_rng(0)
    low = 0 if dtype == np.uint32 else -(1 << 30)
    x = generator.integers(low, 1 << 30, 256).astype(dtype)
    y = generator.integers(1, 50, 256).astype(dtype)
    out = np.zeros((6, 256), dtype)
    integer_kernel[(1,)](*(torch.from_numpy(a) for a in (x, y, out)), 256)
    quotient = np.trunc(x.astype(np.float64) / y).astype(dtype)
    expected = [quotient, x - quotient * y, (x << 3) ^ ((y | 5) & x), x >> 2, np.where((x > 3) & (y <= 7), 7 - x, y)]
    assert np.array_equal(out, np.stack([*expected, x * dtype(2147483647)]))


# ---------------------------------------------------------------- shortcuts

DTYPES = (tl.float32, tl.float64, tl.float16, tl.bfloat16, tl.int32, tl.int64, tl.uint32, tl.uint64, tl.uint8, tl.int1)
SHAPES = ((), (8,), (4, 8), (4, 1), (2, 4, 8))
CONSTANTS = (0, 1, -1, 7, 300, 2**31, -(2**33), 0.0, -0.0, 1.5, 1e-40, 1e39, float("inf"), True, tl.constexpr(0.5))
ARITHMETIC_OPERATORS = ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv")
INTEGER_OPERATORS = ("floordiv", "mod", "lshift", "rshift")
OTHER_OPERATORS = ("and", "or", "xor", "lt", "le", "gt", "ge", "eq", "ne")


def make_tensor(generator, dtype, shape):
    kind = triton_interpreter._get_np_dtype(dtype)
    values = generator.integers(1, 8, shape or (1,))  # small: also divisors and shifts
    if dtype == tl.int1:
        data = values % 2 == 0
    elif kind.kind == "f":
        data = (values * generator.standard_normal(values.shape)).astype(kind)
    elif dtype == tl.bfloat16:
        data = (values * 0x0811 + 0x3F00).astype(kind)
    else:
        data = values.astype(kind)
    return tl.tensor(
        triton_interpreter.TensorHandle(data, dtype), tl.block_type(dtype, list(shape)) if shape else dtype
    )


def outcome(function, *args, **kwargs):
    """Return all that a kernel can see of a result; of an error, its type."""
    try:
        result = function(*args, **kwargs)
    except Exception as error:  # noqa: BLE001 (whatever it is, both ways must raise it)
        return type(error)
    data = result.handle.data
    shape = [extent.value for extent in result.shape]
    return str(result.type), str(result.dtype), shape, result.numel.value, data.dtype, data.shape, data.tobytes()


def assert_as_ordinary(function, *args, **kwargs):
    ordinary = function
    while hasattr(ordinary, "__wrapped__"):
        ordinary = ordinary.__wrapped__
    assert ordinary is not function
    assert outcome(function, *args, **kwargs) == outcome(ordinary, *args, **kwargs), (function, args, kwargs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("symbol", ARITHMETIC_OPERATORS + INTEGER_OPERATORS + OTHER_OPERATORS)
def test_operators_give_what_the_ordinary_way_gives(symbol):
    generator = np.random.default_rng(0)
    operator = getattr(tl.tensor, f"__{symbol}__")
    others = [make_tensor(generator, *kind) for kind in itertools.product(DTYPES, SHAPES)]
    numbers = (7, tl.constexpr(3)) if symbol in INTEGER_OPERATORS else CONSTANTS
    with np.errstate(all="ignore"):
        for dtype, shape in itertools.product(DTYPES, SHAPES):
            x = make_tensor(generator, dtype, shape)
            for other in (*others, *numbers):
                assert_as_ordinary(operator, x, other)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPES)
def test_functions_give_what_the_ordinary_way_gives(dtype):
    generator = np.random.default_rng(0)
    others = [make_tensor(generator, *kind) for kind in itertools.product(DTYPES, SHAPES[:3])]
    with np.errstate(all="ignore"):
        for shape in SHAPES[:4]:
            x = make_tensor(generator, dtype, shape)
            for other in (*others, *CONSTANTS):
                assert_as_ordinary(tl.minimum, x, other)
                assert_as_ordinary(tl.maximum, x, other)
                assert_as_ordinary(tl.maximum, x, other, propagate_nan=tl.PropagateNan.ALL)
                for condition in (make_tensor(generator, tl.int1, s) for s in SHAPES[:3]):
                    assert_as_ordinary(tl.where, condition, x, other)
                    assert_as_ordinary(tl.where, condition, other, x)
            for target in (*DTYPES, tl.float8e4nv, tl.float8e5):
                assert_as_ordinary(tl.cast, x, target)
                assert_as_ordinary(tl.cast, x, target, bitcast=True)
            for name in ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "abs", "floor", "ceil"):
                assert_as_ordinary(getattr(tl, name), x)
            for reduction, options in itertools.product(
                (tl.sum, tl.max, tl.min), ({}, {"axis": 0}, {"axis": 1}, {"axis": 0, "keep_dims": True})
            ):
                if shape and dtype != tl.int1:
                    assert_as_ordinary(reduction, x, **options)
    for value in CONSTANTS:
        assert_as_ordinary(tl.full, [tl.constexpr(4), 2], value, dtype)


# ---------------------------------------------------------------- matrix products


@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c_at = c_ptr + m[:, None] * N + n[None, :]
    tl.store(c_at, tl.dot(a, b, tl.load(c_at)))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2]
)
def test_dot(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(16, 64).to(dtype), torch.randn(64, 32).to(dtype)
    c = torch.randn(16, 32)
    expected = a.double() @ b.double() + c.double()
    dot_kernel[(1,)](a, b, c, 16, 32, 64)
    # 64 float32 sums of values up to about 30: an error of 64 ulps of 2^-19 bounds any order of summation.
    torch.testing.assert_close(c.double(), expected, rtol=0, atol=64 * 2.0**-19)


@triton.jit
def dot_scaled_kernel(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    c_ptr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    A_FORMAT: tl.constexpr,
    B_FORMAT: tl.constexpr,
    A_K_PACK: tl.constexpr,
    B_K_PACK: tl.constexpr,
):
    A_PACK: tl.constexpr = 2 if A_FORMAT == "e2m1" else 1
    B_PACK: tl.constexpr = 2 if B_FORMAT == "e2m1" else 1
    A_ROWS: tl.constexpr = M if A_K_PACK else M // A_PACK
    A_COLUMNS: tl.constexpr = K // A_PACK if A_K_PACK else K
    B_ROWS: tl.constexpr = K // B_PACK if B_K_PACK else K
    B_COLUMNS: tl.constexpr = N if B_K_PACK else N // B_PACK
    a = tl.load(a_ptr + tl.arange(0, A_ROWS)[:, None] * A_COLUMNS + tl.arange(0, A_COLUMNS)[None, :])
    b = tl.load(b_ptr + tl.arange(0, B_ROWS)[:, None] * B_COLUMNS + tl.arange(0, B_COLUMNS)[None, :])
    m, n, groups = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K // 32)
    a_scale = None
    if a_scale_ptr is not None:
        a_scale = tl.load(a_scale_ptr + m[:, None] * (K // 32) + groups[None, :])
    b_scale = None
    if b_scale_ptr is not None:
        b_scale = tl.load(b_scale_ptr + n[:, None] * (K // 32) + groups[None, :])
    c_at = c_ptr + m[:, None] * N + n[None, :]
    c = tl.dot_scaled(
        a, a_scale, A_FORMAT, b, b_scale, B_FORMAT, tl.load(c_at), lhs_k_pack=A_K_PACK, rhs_k_pack=B_K_PACK
    )
    tl.store(c_at, c)


def e2m1_value(code):
    """Decode E2M1 by OCP MX v1.0: sign, 2 exponent bits with bias 1, 1 mantissa bit."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -magnitude if code & 8 else magnitude


def random_elements(shape, element_format, pack_axis):
    """Make random elements of a format: what the kernel takes, and the numbers in float64.

    `pack_axis` None: not packed.
    """
    if element_format == "e2m1":
        codes = torch.randint(0, 16, shape, dtype=torch.uint8)
        values = torch.tensor([e2m1_value(code) for code in range(16)], dtype=torch.float64)[codes.long()]
        low, high = (codes[tuple(slice(i, None, 2) if d == pack_axis else slice(None) for d in (0, 1))] for i in (0, 1))
        return (low | high << 4).contiguous(), values
    dtypes = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2, "bf16": torch.bfloat16, "fp16": torch.float16}
    elements = torch.randn(shape).to(dtypes[element_format])
    return elements, elements.double()


@pytest.mark.parametrize(
    ("formats", "shape", "packs"),
    [
        (("e2m1", "e4m3"), (16, 16, 128), (True, True)),
        (("e2m1", "e4m3"), (32, 16, 256), (True, True)),
        (("e2m1", "e4m3"), (32, 16, 128), (False, True)),
        (("e4m3", "e2m1"), (16, 32, 128), (True, True)),
        (("e4m3", "e2m1"), (16, 32, 256), (True, False)),
        (("e2m1", "e2m1"), (16, 16, 64), (False, False)),
        (("e5m2", "e4m3"), (16, 16, 64), (True, True)),
        (("e2m1", "bf16"), (16, 16, 128), (True, True)),
        (("fp16", "e2m1"), (16, 16, 64), (True, True)),
        (("bf16", "e5m2"), (16, 16, 64), (True, True)),
    ],
)
def test_dot_scaled(formats, shape, packs):
    torch.manual_seed(0)
    m, n, k = shape
    a, a_values = random_elements((m, k), formats[0], 1 if packs[0] else 0)
    b, b_values = random_elements((k, n), formats[1], 0 if packs[1] else 1)
    scales = [torch.randint(120, 134, (rows, k // 32), dtype=torch.uint8) for rows in (m, n)]
    scales = [None if f in ("bf16", "fp16") else scale for f, scale in zip(formats, scales)]
    if scales[0] is not None:
        a_values = a_values * torch.exp2(scales[0].double() - 127).repeat_interleave(32, 1)
    if scales[1] is not None:
        b_values = b_values * torch.exp2(scales[1].double() - 127).repeat_interleave(32, 1).T
    c = torch.randn(m, n)
    expected = c.double() + a_values @ b_values
    dot_scaled_kernel[(1,)](a, scales[0], b, scales[1], c, m, n, k, *formats, *packs)
    # Any order of K float32 sums errs by at most K ulps of the sum of magnitudes.
    bound = k * 2.0**-24 * (a_values.abs() @ b_values.abs() + 1)
    assert ((c.double() - expected).abs() <= bound).all()


def test_scale_255_is_nan_and_scale_0_the_smallest():
    a, _ = random_elements((16, 64), "e2m1", 1)
    a[:] = 0x22  # all ones
    b = torch.ones(64, 16).to(torch.float8_e4m3fn)
    scales = torch.full((16, 2), 127, dtype=torch.uint8)
    scales[3, 1], scales[4] = 255, 0
    c = torch.zeros(16, 16)
    plain = torch.full((16, 2), 127, dtype=torch.uint8)
    dot_scaled_kernel[(1,)](a, scales, b, plain, c, 16, 16, 64, "e2m1", "e4m3", True, True)
    assert c[3].isnan().all()
    assert (c[4].double() == 64 * 2.0**-127).all()
    assert (c[[0, 1, 2, *range(5, 16)]] == 64).all()


# ---------------------------------------------------------------- control flow and arguments


@triton.jit
def plus(x, extra: tl.constexpr):
    return x + extra


@triton.jit
def plus_and_product(x, y):
    total = plus(x, 0) + y
    return total, x * y


class Pair(NamedTuple):
    data: torch.Tensor
    count: int


@triton.jit
def control_kernel(pair, scale, flag, limits_ptr, out_ptr, MAYBE: tl.constexpr, N: tl.constexpr):
    stop = tl.load(limits_ptr)
    total = 0.0
    for i in range(1, stop, 2):
        total += tl.load(pair.data + i).to(tl.float32) + i.to(tl.float32)
    for _i in tl.range(stop):
        total = plus(total, 1)
    for i in tl.static_range(0, N, step=2):
        half: tl.constexpr = i // 2
        if half == 0:
            total += tl.sum(tl.zeros((2 << half,), tl.float32), axis=0)
    left, right = plus_and_product(total, scale.to(tl.float64).to(tl.float32))
    if MAYBE is not None:
        right += MAYBE
    if flag:
        left = -left
    while right < 100:
        right = right * 2
    tl.store(out_ptr, left)
    tl.store(out_ptr + 1, right)
    tl.store(out_ptr + 2, pair.count + (1 if stop == 7 and not flag else 0))


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("maybe", [None, 5])
def test_control_flow(flag, maybe):
    data, out = torch.arange(8, dtype=torch.bfloat16), torch.zeros(3)
    control_kernel[(1,)](Pair(data, 11), 0.5, flag, torch.tensor([7], dtype=torch.int32), out, maybe, 6)
    total = sum(2 * i for i in (1, 3, 5)) + 7
    right = total * 0.5 + (maybe or 0)
    while right < 100:
        right *= 2
    sign = -1 if flag else 1
    assert out.tolist() == [sign * (total + 0.5), right, 11 + (not flag)]


@triton.jit
def first_largest(value1, index1, value2, index2):
    keep = value1 > value2 or (value1 == value2 and not index1 > index2)
    return tl.where(keep, value1, value2), tl.where(keep, index1, index2)


@triton.jit
def first_of(a, b):
    return a


@triton.jit
def product_of(a, b):
    return a * b


@triton.jit
def reduce_kernel(x_ptr, out_ptr, index_ptr, M: tl.constexpr, N: tl.constexpr):
    m = tl.arange(0, M)
    at = m[:, None] * N + tl.arange(0, N)[None, :]
    x = tl.load(x_ptr + at)
    columns = tl.broadcast_to(tl.arange(0, N)[None, :], (M, N))
    value, index = tl.reduce((x, columns), 1, first_largest)
    tl.store(out_ptr + m, value.to(tl.float32))
    tl.store(index_ptr + m, index)
    tl.store(out_ptr + M + m, tl.reduce(x, 1, first_of).to(tl.float32))
    tl.store(out_ptr + 2 * M + m, tl.max(x, axis=1).to(tl.float32))
    tl.store(out_ptr + 3 * M + m, tl.sum(x, axis=1).to(tl.float32))
    tl.store(index_ptr + M + m, tl.argmax(x, axis=1))
    tl.store(out_ptr + 4 * M, tl.max(x).to(tl.float32))


@triton.jit
def scan_kernel(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.cumsum(x, 0))
    tl.store(out_ptr + N + at, tl.associative_scan(x, 0, first_of))
    tl.store(out_ptr + 2 * N + at, tl.associative_scan(x, 0, first_of, reverse=True))
    tl.store(out_ptr + 3 * N + at, tl.associative_scan(x, 0, product_of))
    tl.store(out_ptr + 4 * N + at, tl.sort(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reductions(dtype):
    torch.manual_seed(0)
    m, n = 8, 64
    x = torch.randint(-20, 20, (m, n)).to(dtype)  # ties; all sums are exact in float32, and rounded once for bf16
    out, index = torch.zeros(4 * m + 1), torch.zeros(2 * m, dtype=torch.int32)
    reduce_kernel[(1,)](x, out, index, m, n)
    largest = x.float().max(1).values
    first = (x.float() == largest[:, None]).int().argmax(1)
    assert torch.equal(out[:m], largest)
    assert torch.equal(index[:m].long(), first)
    assert torch.equal(out[m : 2 * m], x[:, 0].float())
    assert torch.equal(out[2 * m : 3 * m], largest)
    assert torch.equal(out[3 * m : 4 * m], x.float().sum(1).to(dtype).float())
    assert torch.equal(index[m:].long(), first)
    assert out[-1] == x.float().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scans(dtype):
    torch.manual_seed(0)
    x = torch.randint(1, 3, (16,)).to(dtype)
    out = torch.zeros(5, 16)
    scan_kernel[(1,)](x, out, 16)
    x = x.float()
    expected = [x.cumsum(0), x[0].expand(16), x[-1].expand(16), x.cumprod(0), x.sort().values]
    assert torch.equal(out, torch.stack(expected))


@triton.jit
def masked_copy_kernel(x_ptr, out_ptr, rows, columns, stride, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    mask = (m < rows) & (n < columns)
    x = tl.load(x_ptr + m * stride + n, mask=mask, other=0.0)
    tl.store(out_ptr + m * N + n, x, mask=m < rows)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64])
@pytest.mark.parametrize("extents", [(16, 32), (7, 31), (0, 5), (2, 1)])
def test_large_and_small_masked_blocks(dtype, extents):
    rows, columns = extents
    x = torch.randint(0, 100, (16, 40)).to(dtype)
    out = torch.full((16, 32), 77).to(dtype)
    masked_copy_kernel[(1,)](x, out, rows, columns, 40, 16, 32)
    expected = torch.full((16, 32), 77).to(dtype)
    expected[:rows] = 0
    expected[:rows, :columns] = x[:rows, :columns]
    assert torch.equal(out, expected)


@triton.jit
def unaligned_kernel(bytes_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    pointers = (bytes_ptr + at * 5).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(out_ptr + at, tl.load(pointers))


def test_unaligned_loads():
    data = torch.randint(0, 256, (512 * 5,), dtype=torch.uint8)
    out = torch.zeros(512, dtype=torch.int32)
    unaligned_kernel[(1,)](data, out, 512)
    expected = [int.from_bytes(bytes(data[5 * i : 5 * i + 4].tolist()), "little", signed=True) for i in range(512)]
    assert out.tolist() == expected


@triton.jit
def asm_kernel(out_ptr):
    zero = tl.inline_asm_elementwise("mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(out_ptr, zero)


def test_unknown_inline_assembly_is_refused_clearly():
    with pytest.raises(NotImplementedError, match=r"no meaning on a CPU: .* or a constexpr .* keep it out"):
        asm_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


@triton.jit
def shared_kernel(out_ptr, turn_ptr, WORDS: tl.constexpr):
    """Write out [programs, 2, WORDS]: shared memory when opened, and when all programs have stored to half of it."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    memory = open_ring(0, 0, 4 * WORDS) + BARRIER_BYTES
    word = tl.arange(0, WORDS)
    tl.store(out_ptr + 2 * program * WORDS + word, ptx.load_float(memory + 4 * word))
    half = tl.arange(0, WORDS // 2)
    ptx.store_float(memory + 4 * half, 0.0 * half + program)
    tl.atomic_add(turn_ptr, 1)
    while tl.atomic_add(turn_ptr, 0) < programs:
        pass
    tl.store(out_ptr + (2 * program + 1) * WORDS + word, ptx.load_float(memory + 4 * word))


def test_shared_memory_is_each_program_s_own_and_nan_until_it_is_written():
    out, words = torch.zeros(3, 2, 16), 16
    shared_kernel[(3,)](out, torch.zeros(1, dtype=torch.int32), WORDS=words)
    assert out[:, 0].isnan().all()
    assert torch.equal(out[:, 1, : words // 2], torch.arange(3.0)[:, None].expand(-1, words // 2))
    assert out[:, 1, words // 2 :].isnan().all()


@triton.jit
def beyond_kernel(out_ptr, WORDS: tl.constexpr, N: tl.constexpr):
    memory = open_ring(0, 0, 4 * WORDS) + BARRIER_BYTES
    tl.store(out_ptr, tl.sum(ptx.load_word(memory + 4 * tl.arange(0, N)), axis=0))


def test_a_read_beyond_shared_memory_raises():
    out = torch.zeros(1, dtype=torch.int32)
    beyond_kernel[(1,)](out, WORDS=8, N=8)
    with pytest.raises(Exception, match="out of bounds"):
        beyond_kernel[(1,)](out, WORDS=8, N=16)


@triton.jit
def tile_kernel(out_ptr, tile_ptr, more_ptr, n_bytes, more_bytes, STAGE_BYTES: tl.constexpr):
    """Write out [STAGE_BYTES] uint8: a ring's only stage with a tile of two pieces."""
    ring = open_ring(1, STAGE_BYTES, 32)
    description = ring + BARRIER_BYTES + STAGE_BYTES + tl.arange(0, 1)
    piece = tl.zeros([1], tl.int64)
    describe_tile(
        description,
        TilePieces(piece + tile_ptr.to(tl.int64), piece + n_bytes, piece + more_ptr.to(tl.int64), piece + more_bytes),
        piece == 0,
    )
    fill_stage(ring, 0, ring + BARRIER_BYTES + STAGE_BYTES, 1, STAGE_BYTES)
    byte = tl.arange(0, STAGE_BYTES)
    tl.store(out_ptr + byte, ptx.load_byte(wait_for_stage(ring, 0, 1, STAGE_BYTES) + byte).to(tl.uint8))


@pytest.mark.parametrize("more_bytes", [0, 16, 32])
def test_a_tile_s_pieces_lie_one_behind_the_other(more_bytes):
    tile, more = torch.arange(48, dtype=torch.uint8), torch.arange(100, 132, dtype=torch.uint8)
    out = torch.zeros(128, dtype=torch.uint8)
    tile_kernel[(1,)](out, tile, more, 48, more_bytes, STAGE_BYTES=128)
    poison = torch.full((128 - 48 - more_bytes,), 255, dtype=torch.uint8)
    assert torch.equal(out, torch.cat((tile, more[:more_bytes], poison)))


@pytest.mark.parametrize(("n_bytes", "more_bytes"), [(4096, 0), (16, 4096)])
def test_a_tile_that_does_not_fit_raises(n_bytes, more_bytes):
    tile, more = torch.zeros(2, 4096, dtype=torch.uint8)
    with pytest.raises(Exception, match="4096 bytes does not fit"):
        tile_kernel[(1,)](torch.zeros(128, dtype=torch.uint8), tile, more, n_bytes, more_bytes, STAGE_BYTES=128)


# ---------------------------------------------------------------- installing


def run_python(source, interpret):
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p), "PATH": "/usr/bin:/bin"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_variable_must_be_set_before_triton_is_imported():
    late = "import os, triton.language\nos.environ['TRITON_INTERPRET'] = '1'\n"
    done = run_python(late + "import interpreter\ninterpreter.install()", interpret=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("RuntimeError: set TRITON_INTERPRET=1 before")


def test_an_unknown_version_is_refused_in_one_line():
    source = "import triton\ntriton.__version__ = '9.1.0'\nimport interpreter\ninterpreter.install()"
    done = run_python(source, interpret=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("system.errors.InputError: ")
    assert "knows Triton 3.6.x, 3.9.x, not 9.1.0" in done.stderr.splitlines()[-1]


def test_installing_again_changes_nothing():
    add = tl.tensor.__add__
    interpreter.install()
    assert tl.tensor.__add__ is add
