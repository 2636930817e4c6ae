"""common.spread: every thread gets the elements that meet its part of a row, whatever the layouts."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl

from common.gemv_bf16 import load_lane_vector
from common.gemv_dense import item_bytes, row_lanes
from common.spread import spread_vector, spread_words
from common.stream import scratch_words
from host.config import FP8_ROWS, GPT_OSS_120B, DenseFormats
from host.launch import SM_90, fit_ring


@triton.jit
def both_kernel(
    out_ptr,
    x_ptr,
    memory_ptr,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    LANES: tl.constexpr,
    EACH: tl.constexpr,
    WORDS: tl.constexpr,
):
    """out [2, blocks, THREADS]: load_lane_vector, and what is spread."""
    COPIES: tl.constexpr = THREADS // LANES
    direct = load_lane_vector(x_ptr, K, LANES, COPIES, EACH)
    x = load_lane_vector(x_ptr, K, THREADS, 1, 4)
    spread = spread_vector(memory_ptr.to(tl.int64), x, K, LANES, COPIES, EACH, WORDS, "cpu")
    at = tl.arange(0, COPIES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    for i in tl.static_range(len(direct)):
        tl.store(out_ptr + i * THREADS + at, direct[i])
        tl.store(out_ptr + (len(direct) + i) * THREADS + at, spread[i])


@pytest.mark.parametrize("lanes, each", [(32, 8), (64, 8), (32, 16), (64, 16)])
@pytest.mark.parametrize("k", [32, 96, 416, 1024, 1536, 2880])
@pytest.mark.parametrize("threads, pieces", [(64, 1), (128, 1), (128, 2.5), (64, 99)])
def test_each_thread_gets_its_elements(k, threads, lanes, each, pieces):
    n_blocks = -(-k // (each * lanes)) * each
    words = int(pieces * spread_words(each * lanes, threads))
    x = torch.randn(k, generator=torch.Generator().manual_seed(k))
    memory = torch.full((words + 100,), torch.nan)
    out = torch.empty(2, n_blocks, threads)
    both_kernel[(1,)](out, x, memory, K=k, THREADS=threads, LANES=lanes, EACH=each, WORDS=words)
    assert torch.equal(out[1], out[0])
    # Lane l of each copy: elements each * l .. of each run.
    padded = torch.zeros(n_blocks * lanes)
    padded[:k] = x
    expected = padded.view(-1, lanes, each).permute(0, 2, 1).reshape(n_blocks, lanes)
    assert torch.equal(out[1].view(n_blocks, -1, lanes), expected[:, None].expand(-1, threads // lanes, -1))
    assert memory[words:].isnan().all()


@pytest.mark.parametrize("dense", [DenseFormats(), DenseFormats(qkv=FP8_ROWS), DenseFormats(head=FP8_ROWS)])
@pytest.mark.parametrize("hidden_size", [1536, 2880, 3584])
def test_a_program_has_memory_for_it(hidden_size, dense):
    config = dataclasses.replace(GPT_OSS_120B, hidden_size=hidden_size, dense=dense)
    tuning = fit_ring(SM_90, config)
    for name in (dense.qkv, dense.head):
        run = row_lanes(hidden_size, name, tuning) * 16 // item_bytes(name)
        assert scratch_words(config, tuning) >= spread_words(run, 256)
