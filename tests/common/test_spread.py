"""common.sm90.spread, interpreted: every thread gets the elements that meet its part of a row, whatever the layouts."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from checkpoints.config import FP8_ROWS, GPT_OSS_120B, DenseFormats
from common.build import Build
from common.gemv_dense import item_bytes
from common.sm90 import ptx
from common.sm90.feed import scratch_words
from common.sm90.gemv import load_thread_vector, row_threads
from common.sm90.ring import BARRIER_BYTES, open_ring
from common.sm90.spread import spread_vector, spread_words
from host.launch import SM_90, fit_ring

BEHIND = tl.constexpr(128)  # float32 of shared memory that are nobody's


@triton.jit
def both_kernel(
    out_ptr,
    behind_ptr,
    x_ptr,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    SHARERS: tl.constexpr,
    EACH: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Write out [2, blocks, THREADS]: load_thread_vector and the spread vector.

    `behind` is the memory after its WORDS.
    """
    COPIES: tl.constexpr = THREADS // SHARERS
    memory = open_ring(0, 0, 4 * (WORDS + BEHIND)) + BARRIER_BYTES
    direct = load_thread_vector(x_ptr, K, SHARERS, COPIES, EACH)
    x = load_thread_vector(x_ptr, K, THREADS, 1, 4)
    spread = spread_vector(memory, x, K, SHARERS, COPIES, EACH, WORDS)
    at = tl.arange(0, COPIES)[:, None] * SHARERS + tl.arange(0, SHARERS)[None, :]
    for i in tl.static_range(len(direct)):
        tl.store(out_ptr + i * THREADS + at, direct[i])
        tl.store(out_ptr + (len(direct) + i) * THREADS + at, spread[i])
    word = tl.arange(0, BEHIND)
    tl.store(behind_ptr + word, ptx.load_float(memory + 4 * (WORDS + word)))


@pytest.mark.parametrize("sharers, each", [(32, 8), (64, 8), (32, 16), (64, 16)])
@pytest.mark.parametrize("k", [32, 96, 416, 1024, 1536, 2880])
@pytest.mark.parametrize("threads, pieces", [(64, 1), (128, 1), (128, 2.5), (64, 99)])
def test_each_thread_gets_its_elements(k, threads, sharers, each, pieces):
    n_blocks = -(-k // (each * sharers)) * each
    words = int(pieces * spread_words(each * sharers, threads))
    x = torch.randn(k, generator=torch.Generator().manual_seed(k))
    out, behind = torch.empty(2, n_blocks, threads), torch.empty(BEHIND.value)
    both_kernel[(1,)](out, behind, x, K=k, THREADS=threads, SHARERS=sharers, EACH=each, WORDS=words)
    assert torch.equal(out[1], out[0])
    # Thread t of each copy: elements each * t .. of each run.
    padded = torch.zeros(n_blocks * sharers)
    padded[:k] = x
    expected = padded.view(-1, sharers, each).permute(0, 2, 1).reshape(n_blocks, sharers)
    assert torch.equal(out[1].view(n_blocks, -1, sharers), expected[:, None].expand(-1, threads // sharers, -1))
    assert behind.isnan().all()


@pytest.mark.parametrize("dense", [DenseFormats(), DenseFormats(qkv=FP8_ROWS), DenseFormats(head=FP8_ROWS)])
@pytest.mark.parametrize("hidden_size", [1536, 2880, 3584])
def test_a_program_has_memory_for_it(hidden_size, dense):
    config = dataclasses.replace(GPT_OSS_120B, hidden_size=hidden_size, dense=dense)
    build = Build(config, fit_ring(SM_90, config))
    for name in (dense.qkv, dense.head):
        run = row_threads(hidden_size, name, build.tuning.dense) * 16 // item_bytes(name)
        assert scratch_words(build) >= spread_words(run, 256)
