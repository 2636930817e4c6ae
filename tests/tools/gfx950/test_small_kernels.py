"""Small kernels: what the emulator makes of Triton's gfx950 code, against torch, under every model of memory."""

import contextlib
import dataclasses

import pytest
import torch
from small_kernels import DOT_SIZES, DOT_TYPES, N_PROGRAMS, N_WARPS, SCALED_SIZES

from tools.gfx950.emulator import STRICT, Conditions, Program
from tools.gfx950.layout import Problem

MODELS = {
    "plain": Conditions(),
    "late": Conditions(late=True),
    "caches": Conditions(caches=True),
    "strict": STRICT,
}
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


@pytest.fixture(params=MODELS)
def run(request, kernels):
    """Return a function that launches a case and checks that nothing was reported."""

    def run(name: str, n_programs: int, *arguments) -> None:
        kernel = kernels[name]
        result = Program(kernel["asm"]).launch(n_programs, N_WARPS, kernel["shared"], arguments, MODELS[request.param])
        assert result.is_clean, [str(finding) for finding in result.findings]

    return run


def test_add(run):
    x, y, out = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    run("add", 4, x, y, out, 1000)
    assert torch.equal(out, x + y)


def test_softmax(run):
    x, out = torch.randn(5, 300), torch.zeros(5, 300)
    run("softmax", 5, x, out, 300)
    torch.testing.assert_close(out, torch.softmax(x.double(), 1).float(), rtol=1e-5, atol=1e-8)


def test_division_is_rounded_to_nearest(run):
    """Quotients whose operands or results are near the ends of float32 take a scaling of their own."""
    exponents = torch.linspace(-126, 126, 1024)
    x, y = torch.randn(1024) * 2**exponents, torch.randn(1024) * 2 ** exponents[torch.randperm(1024)]
    x[:4], y[:4] = torch.tensor([0.0, 1.0, float("inf"), 3.0]), torch.tensor([2.0, 0.0, 5.0, float("-inf")])
    out = torch.zeros(1024)
    run("divide", 1, x, y, out)
    assert torch.equal(out, x / y)


def test_conversions_are_those_of_torch(run):
    ties = torch.tensor([1.0625, 1.1875, 464.0, 465.0, 0.0009765625, 65504.0, 65520.0, 3.3895e38])
    x = torch.cat([ties, -ties, torch.randn(1008) * 2 ** torch.randint(-20, 10, (1008,))])
    half, bf16, fp8, integer = (
        torch.zeros(1024, dtype=dtype) for dtype in (torch.float16, torch.bfloat16, torch.uint8, torch.int32)
    )
    run("convert", 1, x, half, bf16, fp8, integer)
    # For FP8, Triton sets MODE.FP16_OVFL, by which float16 saturates too.
    assert torch.equal(half, x.clamp(-65504, 65504).half())
    assert torch.equal(bf16, x.bfloat16())
    # Triton saturates where torch gives NaN.
    assert torch.equal(fp8, x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    fits = x.abs() < 2**31
    assert torch.equal(integer[fits], x[fits].int())


def test_integers(run):
    x = torch.randint(-(2**31), 2**31, (256,), dtype=torch.int32)
    y = torch.randint(1, 2**20, (256,), dtype=torch.int32) * torch.tensor([1, -1], dtype=torch.int32).repeat(128)
    out = torch.zeros(7, 256, dtype=torch.int32)
    run("integers", 1, x, y, out)
    wide, divisor = x.long(), y.long()
    expected = [
        wide * divisor,
        torch.div(wide, divisor, rounding_mode="trunc"),
        torch.fmod(wide, divisor),
        (wide << (divisor & 7)) ^ (wide >> (divisor & 15)),
        torch.maximum(wide, divisor) - torch.minimum(wide, -divisor),
        wide.cumsum(0),
        wide * divisor >> 16,
    ]
    for found, value in zip(out, expected, strict=True):
        assert torch.equal(found, value.int())


def test_atomics(run):
    x = torch.randint(0, 1000, (4 * 256,), dtype=torch.int32)
    sums, largest, last = (torch.zeros(n, dtype=torch.int32) for n in (8, 8, 4))
    run("atomics", 4, x, sums, largest, last)
    for n in range(8):
        assert sums[n] == x[x % 8 == n].sum()
        assert largest[n] == x[x % 8 == n].max()
    assert torch.equal(last, x.reshape(4, 256).sum(1).int())


@pytest.mark.parametrize("size", DOT_SIZES, ids=str)
@pytest.mark.parametrize("dtype", DOT_TYPES)
def test_dot(dtype, size, run):
    m, n, k = size
    a, b, out = torch.randn(m, k).to(TYPES[dtype]), torch.randn(k, n).to(TYPES[dtype]), torch.zeros(m, n)
    run(f"dot {dtype} {m} {n} {k}", 1, a, b, out)
    torch.testing.assert_close(out.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("size", SCALED_SIZES, ids=str)
def test_dot_scaled(size, run):
    """Scales are powers of two from 2^-9 to 2^8, so that float64 holds every product."""
    m, n, k = size
    a = torch.randint(0, 256, (m, k // 2), dtype=torch.uint8)
    b = (torch.randn(n, k) * 8).to(torch.float8_e4m3fn)
    scales = [torch.randint(118, 136, (rows, k // 32), dtype=torch.uint8) for rows in (m, n)]
    out = torch.zeros(m, n)
    run(f"dot_scaled {m} {n} {k}", 1, a, scales[0], b.view(torch.uint8), scales[1], out)
    values = torch.stack([E2M1[(a & 15).long()], E2M1[(a >> 4).long()]], -1).reshape(m, k)
    left, right = (2.0 ** (scale.double().repeat_interleave(32, 1) - 127) for scale in scales)
    expected = (values * left) @ (b.double() * right).T
    assert ((out - expected).abs().max() / expected.abs().max()) < 1e-6


def barrier_arguments() -> tuple:
    x, part, out = torch.randn(N_PROGRAMS, 256), torch.zeros(N_PROGRAMS), torch.zeros(N_PROGRAMS)
    return x, part, out, torch.zeros(32, dtype=torch.int32), N_PROGRAMS


@pytest.mark.parametrize("name", ["buffer_wbl2", "buffer_inv"])
def test_each_part_of_a_grid_barrier_is_needed(name, kernels):
    """Without it memory is accessed in no order: a race that is reported in any order of waves.

    Of write-backs there are two, one of publish and one of the release, so that all are left out together.
    """
    kernel = kernels["sum_of_all"]
    program = Program(kernel["asm"])
    conditions = dataclasses.replace(STRICT, stall=False, seed=0)
    with contextlib.ExitStack() as stack:
        for n, text in enumerate(program.texts):
            if text.startswith(name):
                stack.enter_context(program.without(n))
        result = program.launch(N_PROGRAMS, N_WARPS, kernel["shared"], barrier_arguments(), conditions)
    assert {finding.problem for finding in result.findings} == {Problem.RACE}


def test_a_store_in_flight_at_a_release_is_a_race(kernels):
    """A barrier of Triton's is a bare s_barrier on gfx950, and a release waits for one wave's stores only."""
    kernel = kernels["sum_of_all, undrained"]
    result = Program(kernel["asm"]).launch(N_PROGRAMS, N_WARPS, kernel["shared"], barrier_arguments(), STRICT)
    assert {finding.problem for finding in result.findings} == {Problem.RACE}


def test_grid_barrier(run):
    x, _, out, sync, _ = arguments = barrier_arguments()
    run("sum_of_all", N_PROGRAMS, *arguments)
    torch.testing.assert_close(out, x.sum().expand(N_PROGRAMS), rtol=1e-5, atol=1e-4)
    assert sync[0] == N_PROGRAMS
