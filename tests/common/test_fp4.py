"""common.fp4: every E2M1 code against the table of OCP Microscaling Formats v1.0."""

import pytest
import torch
import triton
import triton.language as tl

from common.fp4 import HALF_BIAS, e2m1_to_float32

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


@triton.jit
def e2m1_kernel(out_ptr, nibble_ptr):
    i = tl.arange(0, 16)
    tl.store(out_ptr + i, e2m1_to_float32(tl.load(nibble_ptr + i)))


@pytest.mark.parametrize("garbage", [0, 0x10, 0xF0, 0x5A5A5A50, -16, -(1 << 31)], ids=hex)
def test_every_code_whatever_the_higher_bits(garbage):
    out = torch.full((16,), torch.nan)
    e2m1_kernel[(1,)](out, torch.arange(16, dtype=torch.int32) | garbage)
    values = out.double() * 2.0**126
    assert values.tolist() == E2M1
    assert values.signbit().tolist() == [code >= 8 for code in range(16)]


def test_the_two_halves_of_the_bias_make_up_for_it():
    assert HALF_BIAS.value**2 == 2.0**126
