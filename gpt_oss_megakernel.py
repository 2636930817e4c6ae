"""GPT-OSS in one kernel launch per token.

Persistent programs walk through the phases of every layer together, a grid barrier between two phases that depend on
each other:

    embedding | per layer: QKV | attention | O projection | router | gate-up | down | then: LM head | argmax

`megakernel` below is that walk, and the phases follow it in their order. `MegaModel` holds the weights and the state
and launches it; `main` is the command line. What differs between machines stands behind common/machine.py.
"""

if __name__ == "__main__":
    import host.start  # noqa: F401 - first, so that no end of the other imports is a traceback

import argparse
import dataclasses
import functools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

# NumPy reads this when it is imported. Interpreted blocks are too small for threads: 65 against 270 ms per token.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import torch

from host.devices import gpu_runs_kernels, notice_unused_gpu

if not gpu_runs_kernels():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when @triton.jit decorates

import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

import interpreter
from common import barrier as barriers
from common.argmax import NOT_FINITE, expose_doubt, keep_finite, keep_larger, reduce_argmax
from common.barrier import ABORT, leave_grid
from common.build import Build
from common.context import Context
from common.decode_attention import attend_head, attend_split, first_seen, merge_head, split_cache
from common.dense import lm_head_stack, o_stack, qkv_stack, router_stack
from common.experts import Choice, ExpertTiles, element, elements, pick
from common.gemv_dense import gemv_rows, load_row_vector, load_rows, vector_unit
from common.rmsnorm import normed_blocks, rms_rstd
from common.router import top_k_softmax
from common.swiglu import swiglu
from common.trace import mark
from common.work import gate_up_tile, share_rows, share_work
from host import shared_memory
from host.arguments import boolean, function_or_none, instance, integer, integer_or_none, integers, one_of
from host.checkpoint import Checkpoint, RandomCheckpoint, check_unchanged
from host.cli import (
    ArgumentParser,
    add_fp8_arguments,
    add_model_arguments,
    add_prompt_arguments,
    check_outputs,
    dense_formats,
    device_name,
    logits_writer,
    path_name,
    positive_int,
    prompt_ids_from,
    run_main,
    stream_generation,
    torch_device,
)
from host.config import PRESETS, DenseFormats, ModelConfig, check_token, checkpoint_bytes, held_formats
from host.errors import InputError, LogitsNotFinite, MegakernelAborted, PositionsLost
from host.launch import (
    LEAST_STAGES,
    BlockTuning,
    Tuning,
    blocks_for,
    check_program_count,
    compile_errors,
    next_power_of_2,
    program_count,
    quiet_compilers,
    tuning_for,
)
from host.limits import check_memory, context_length
from host.output_file import output_path
from host.phases import PHASES, barrier_name
from host.state import State, new_state
from host.trace import USUAL_TOKEN, Launch, chrome_trace, table_rows, table_text, token_to_trace, trace_writer
from host.traffic import bytes_by_phase
from host.turns import LAUNCHING, Turns, exclusive
from host.weights import Weights, bytes_to_load, load_weights, weights_in_place
from load_model import files_of, open_checkpoint, open_tokenizer
from prefill import Prefill
from tokenizer_util import Tokenizer

quiet_compilers()
shared_memory.install()


@triton.jit(do_not_specialize=["position", "want_token", "want_logits", "n_layers", "n_programs"])
def megakernel(
    w,
    s,
    position,
    want_token,
    want_logits,
    n_layers,
    max_context,
    n_programs,
    BUILD: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Decode the token at `position`: w is Weights, s is State, BUILD a common.build.Build.

    want_token and want_logits (0 or 1) say what to make of the final hidden state; without either, for a prompt's
    tokens, the LM head is left out.
    """
    FEED: tl.constexpr = BUILD.machine.feed
    ctx = open_context(w, s, position, max_context, n_layers, want_token | want_logits, n_programs, BUILD)
    barrier = tl.cast(1, tl.int32)
    mark(ctx, 0, BUILD)
    embedding_phase(ctx, BUILD)
    arrive(ctx, barrier, BUILD)
    feed = FEED.open(ctx, BUILD)
    barrier = wait(ctx, barrier, BUILD)

    for n in tl.range(n_layers, disable_licm=BUILD.tuning.layers_alone):
        layer = tl.cast(n, tl.int64)
        following = tl.minimum(layer + 1, n_layers - 1)
        window = tl.load(s.windows + layer)
        barrier = 2 + n * 6  # carried around the loop it cost sm_90 a spill
        feed = FEED.extend(ctx, n, feed)
        FEED.ask_small(ctx, layer, window, BUILD)

        feed = qkv_phase(ctx, layer, feed, BUILD)
        arrive(ctx, barrier, BUILD)
        barrier = wait(ctx, barrier, BUILD)

        attention_phase(ctx, layer, window, barrier, BUILD)
        arrive(ctx, barrier, BUILD)
        feed = FEED.ask_o(ctx, layer, feed, BUILD)
        barrier = wait(ctx, barrier, BUILD)

        feed = o_phase(ctx, layer, feed, BUILD)
        arrive(ctx, barrier, BUILD)
        FEED.ask_part_of_qkv(ctx, following, 0, BUILD)
        barrier = wait(ctx, barrier, BUILD)

        FEED.ask_part_of_qkv(ctx, following, 1, BUILD)
        router_phase(ctx, layer, BUILD)
        arrive(ctx, barrier, BUILD)
        FEED.ask_part_of_qkv(ctx, following, 2, BUILD)
        barrier = wait(ctx, barrier, BUILD)

        feed = FEED.extend(ctx, n + 1, feed)
        choice, feed = gate_up_phase(ctx, layer, feed, BUILD)
        arrive(ctx, barrier, BUILD)
        barrier = wait(ctx, barrier, BUILD)

        feed = down_phase(ctx, layer, choice, feed, BUILD)
        arrive(ctx, barrier, BUILD)
        feed = FEED.ask_qkv(ctx, following, feed, BUILD)
        barrier = wait(ctx, barrier, BUILD)

    if ctx.want_head:
        barrier = 2 + n_layers * 6
        head_phase(ctx, want_logits, FEED.extend(ctx, n_layers, feed), BUILD)
        arrive(ctx, barrier, BUILD)
        barrier = wait(ctx, barrier, BUILD)
        if want_token:
            argmax_phase(ctx, BLOCK_P)
        mark(ctx, 2 * barrier - 1, BUILD)
    MACHINE: tl.constexpr = BUILD.machine
    leave_grid(s.sync, n_programs, MACHINE)


@triton.jit
def open_context(w, s, position, max_context, n_layers, want_head, n_programs, BUILD: tl.constexpr):
    """This program's Context."""
    program = tl.program_id(0)
    work = share_work(program, n_programs, BUILD)
    return Context(w, s, position, max_context, n_layers, want_head, program, n_programs, work)


@triton.jit
def arrive(ctx, barrier, BUILD: tl.constexpr):
    """Come to a barrier at the end of a phase. Only what no program writes may be read until `wait`."""
    MACHINE: tl.constexpr = BUILD.machine
    mark(ctx, 2 * barrier - 1, BUILD)
    barriers.arrive(ctx.s.sync, MACHINE)


@triton.jit
def wait(ctx, barrier, BUILD: tl.constexpr):
    """Wait until all that programs stored before they came to a barrier is visible. Returns the next one's number."""
    MACHINE: tl.constexpr = BUILD.machine
    SPINS: tl.constexpr = BUILD.tuning.spin_limit
    barriers.wait(ctx.s.sync, barrier, ctx.n_programs, SPINS, MACHINE)
    mark(ctx, 2 * barrier, BUILD)
    return barrier + 1


# ---------------------------------------------------------------- the phases of a token, in order


@triton.jit
def embedding_phase(ctx, BUILD: tl.constexpr):
    """x = the token's embedding; expert_out = 0."""
    H: tl.constexpr = BUILD.config.hidden_size
    BLOCK_H: tl.constexpr = triton.next_power_of_2(H)
    s = ctx.s
    token = tl.maximum(tl.load(s.tokens + ctx.position), 0)  # -1 after an abort or where none was fed; NOT_FINITE
    if ctx.program == 0:
        h = tl.arange(0, BLOCK_H)
        row = tl.load(ctx.w.embed + token.to(tl.int64) * H + h, mask=h < H, other=0.0)
        tl.store(s.x + h, row.to(tl.float32), mask=h < H)
        for rank in range(BUILD.config.experts_per_token):
            tl.store(s.expert_out + rank * H + h, tl.zeros([BLOCK_H], tl.float32), mask=h < H)


@triton.jit
def qkv_phase(ctx, layer, feed, BUILD: tl.constexpr):
    """qkv = W_qkv @ rmsnorm(x + expert_out) + b. Returns the feed."""
    DENSE: tl.constexpr = BUILD.machine.dense
    MATRIX: tl.constexpr = BUILD.qkv
    STEP: tl.constexpr = BUILD.tuning.dense.step_tiles * MATRIX.tile_rows
    w, s = ctx.w, ctx.s
    x, factor = DENSE.load_normed(ctx, w.attn_norm + layer * MATRIX.k, feed, MATRIX, BUILD)
    stack = qkv_stack(ctx, layer, BUILD)
    first, end = share_rows(ctx.program, ctx.n_programs, MATRIX)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        # Before the product, as behind it the bias would cost its latency once more.
        bias = tl.load(w.qkv_bias + layer * MATRIX.rows + row, mask=row < end, other=0.0).to(tl.float32)
        y, feed = DENSE.multiply(ctx, feed, x, stack, row0, end, MATRIX, BUILD)
        tl.store(s.qkv + row, y * factor + bias, mask=row < end)
    return feed


@triton.jit
def attention_phase(ctx, layer, window, barrier, BUILD: tl.constexpr):
    """attention = softmax(q k) v over the window or all of the past; the cache gets the position's key and value.

    q and k come from qkv by RoPE; a sink is one more logit. Programs that merge splits wait within this phase.
    """
    CONFIG: tl.constexpr = BUILD.config
    start = first_seen(window, ctx.position)
    if ctx.position - start <= BUILD.tuning.attention.head_keys:
        for head in range(ctx.program, CONFIG.n_heads, ctx.n_programs):
            attend_head(ctx, layer, head, start, BUILD)
    else:
        span = split_cache(start, ctx.position, BUILD)
        for unit in range(ctx.program, CONFIG.n_kv_heads * span.n_splits, ctx.n_programs):
            attend_split(ctx, layer, unit, span, BUILD)
        if span.n_splits > 1:
            # From the last program on: it is the first ones that have one split more, if any have.
            for head in range(ctx.n_programs - 1 - ctx.program, CONFIG.n_heads, ctx.n_programs):
                merge_head(ctx, head, span.n_splits, barrier, BUILD)


@triton.jit
def o_phase(ctx, layer, feed, BUILD: tl.constexpr):
    """x = x + expert_out + W_o @ attention + b. Returns the feed."""
    DENSE: tl.constexpr = BUILD.machine.dense
    MATRIX: tl.constexpr = BUILD.o
    H: tl.constexpr = MATRIX.rows
    STEP: tl.constexpr = BUILD.tuning.dense.step_tiles * MATRIX.tile_rows
    N_KV_HEADS: tl.constexpr = BUILD.config.n_kv_heads
    TOP_K: tl.constexpr = BUILD.config.experts_per_token
    w, s = ctx.w, ctx.s
    attention = DENSE.load_vector(s.attention, MATRIX, BUILD)
    stack = o_stack(ctx, layer, BUILD)
    if ctx.program == ctx.n_programs - 1:
        kv_head = tl.arange(0, triton.next_power_of_2(N_KV_HEADS))
        tl.store(s.split_arrivals + kv_head, 0, mask=kv_head < N_KV_HEADS)  # none is waited for any more
    first, end = share_rows(ctx.program, ctx.n_programs, MATRIX)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        x = tl.load(s.x + row, mask=row < end, other=0.0)
        for rank in tl.static_range(TOP_K):
            x += tl.load(s.expert_out + rank * H + row, mask=row < end, other=0.0)
        x += tl.load(w.o_bias + layer * H + row, mask=row < end, other=0.0).to(tl.float32)
        y, feed = DENSE.multiply(ctx, feed, attention, stack, row0, end, MATRIX, BUILD)
        tl.store(s.x + row, x + y * (1.0 / vector_unit(MATRIX.format)), mask=row < end)
    return feed


@triton.jit
def router_phase(ctx, layer, BUILD: tl.constexpr):
    """router_logits = W_r @ rmsnorm(x) + b; expert_in = rmsnorm(x)."""
    MACHINE: tl.constexpr = BUILD.machine
    MATRIX: tl.constexpr = BUILD.router
    H: tl.constexpr = MATRIX.k
    M: tl.constexpr = MATRIX.tile_rows
    NORM: tl.constexpr = BUILD.tuning.experts.norm_block
    N_BLOCKS: tl.constexpr = (H + NORM - 1) // NORM
    zero = BUILD.machine.opaque_zero()
    s, program, n_programs = ctx.s, ctx.program, ctx.n_programs
    norm_ptr = ctx.w.mlp_norm + layer * H
    # Rows from the first program on, blocks from the last one on, so that few have both.
    if (program < MATRIX.n_tiles) | (n_programs - 1 - program < N_BLOCKS):
        tile, bias = load_router_tile(ctx, layer, program, BUILD)
        x = load_row_vector(s.x, MATRIX, zero)
        rstd = rms_rstd(x, H, BUILD.config.rms_norm_eps)
        x, factor = normed_blocks(x, load_row_vector(norm_ptr, MATRIX, zero), rstd, vector_unit(MATRIX.format))
        for n in range(program, MATRIX.n_tiles, n_programs):
            if n != program:
                tile, bias = load_router_tile(ctx, layer, n, BUILD)
            row = n * M + tl.arange(0, M)
            logits = gemv_rows(tile, x, MATRIX, MACHINE) * factor + bias
            tl.store(s.router_logits + row, logits, mask=row < MATRIX.rows)
        for block in range(n_programs - 1 - program, N_BLOCKS, n_programs):
            h = block * NORM + tl.arange(0, NORM) + zero
            normed = tl.load(s.x + h, mask=h < H, other=0.0) * rstd * tl.load(norm_ptr + h, mask=h < H, other=0.0)
            MACHINE.experts.store_input(ctx, block, normed, x, factor, BUILD)


@triton.jit
def load_router_tile(ctx, layer, n, BUILD: tl.constexpr):
    """(rows, bias) of tile number n of a layer's router."""
    MATRIX: tl.constexpr = BUILD.router
    zero = BUILD.machine.opaque_zero()
    row = n * MATRIX.tile_rows + tl.arange(0, MATRIX.tile_rows)
    at = ctx.w.router_bias + layer * MATRIX.rows + row
    bias = tl.load(at, mask=row < MATRIX.rows, other=0.0).to(tl.float32)
    rows = load_rows(router_stack(ctx, layer, BUILD), n * MATRIX.tile_rows, MATRIX.rows, MATRIX, zero)
    return rows, bias


@triton.jit
def choose_experts(ctx, BUILD: tl.constexpr):
    """The router's Choice, which every program makes for itself."""
    TOP_K: tl.constexpr = BUILD.config.experts_per_token
    N_EXPERTS: tl.constexpr = BUILD.config.n_experts
    # A copy of the logits for each warp.
    expert = tl.arange(0, triton.next_power_of_2(N_EXPERTS))[None, :] + BUILD.machine.opaque_zero()
    expert += 0 * tl.arange(0, BUILD.tuning.num_warps)[:, None]
    logits = tl.load(ctx.s.router_logits + expert, mask=expert < N_EXPERTS, other=0.0)
    experts, weights = top_k_softmax(logits, N_EXPERTS, TOP_K)
    return Choice(elements(experts, TOP_K), weights)


@triton.jit
def gate_up_phase(ctx, layer, feed, BUILD: tl.constexpr):
    """expert_act = swiglu(W_gate_up @ expert_in + b) of every chosen expert; gate and up rows alternate.

    Returns the router's Choice and the feed.
    """
    EXPERTS: tl.constexpr = BUILD.machine.experts
    CONFIG: tl.constexpr = BUILD.config
    MATRIX: tl.constexpr = BUILD.gate_up
    TILES: tl.constexpr = BUILD.tuning.experts.step_tiles
    OUTPUTS: tl.constexpr = MATRIX.tile_rows // 2  # of a tile
    w = ctx.w
    # Before any tile is asked for: behind them it waited for 3.2 us. 12.5 us a layer instead of 13.1.
    vector, missing = EXPERTS.load_input(ctx, BUILD)
    choice = choose_experts(ctx, BUILD)
    feed = BUILD.machine.feed.ask_experts(ctx, choice, feed, BUILD)
    number = tl.arange(0, TILES * OUTPUTS) // OUTPUTS
    count = ctx.work.gate_up_count
    for step in range(tl.cdiv(count, TILES)):
        tile = gate_up_tile(step * TILES + number, ctx.program, ctx.n_programs, BUILD)
        rank = tile // MATRIX.n_tiles
        i = tile % MATRIX.n_tiles * OUTPUTS + tl.arange(0, TILES * OUTPUTS) % OUTPUTS
        gate_bias = load_expert_bias(w.gate_up_bias, layer, choice, rank, 2 * i, MATRIX, BUILD)
        up_bias = load_expert_bias(w.gate_up_bias, layer, choice, rank, 2 * i + 1, MATRIX, BUILD)
        first = gate_up_tile(step * TILES, ctx.program, ctx.n_programs, BUILD)
        tiles = ExpertTiles(first // MATRIX.n_tiles, first % MATRIX.n_tiles, tl.minimum(count - step * TILES, TILES))
        gate, up, feed = EXPERTS.multiply(ctx, layer, feed, choice, vector, tiles, MATRIX, BUILD)
        gate, up = gate * missing + gate_bias, up * missing + up_bias
        act = swiglu(gate, up, CONFIG.swiglu_limit, CONFIG.swiglu_alpha)
        EXPERTS.store_act(ctx, rank, i, act, BUILD)
    return choice, feed


@triton.jit
def down_phase(ctx, layer, choice, feed, BUILD: tl.constexpr):
    """expert_out = weight * (W_down @ expert_act + b) of every chosen expert. Returns the feed."""
    EXPERTS: tl.constexpr = BUILD.machine.experts
    MATRIX: tl.constexpr = BUILD.down
    M: tl.constexpr = MATRIX.tile_rows
    TILES: tl.constexpr = BUILD.tuning.experts.step_tiles
    w, s, down = ctx.w, ctx.s, ctx.work.down
    number, pair = tl.arange(0, TILES * (M // 2)) // (M // 2), tl.arange(0, TILES * (M // 2)) % (M // 2)
    for rank in range(ctx.program % down.ranks, BUILD.config.experts_per_token, down.ranks):
        vector = EXPERTS.load_act(ctx, rank, BUILD)
        weight = pick(choice.weights, rank)
        for first in range(down.member, MATRIX.n_tiles, down.members * TILES):
            row = (first + down.members * number) * M + 2 * pair
            ranks = rank + 0 * row
            even_bias = load_expert_bias(w.down_bias, layer, choice, ranks, row, MATRIX, BUILD)
            odd_bias = load_expert_bias(w.down_bias, layer, choice, ranks, row + 1, MATRIX, BUILD)
            tiles = ExpertTiles(rank, first, tl.minimum(tl.cdiv(MATRIX.n_tiles - first, down.members), TILES))
            even, odd, feed = EXPERTS.multiply(ctx, layer, feed, choice, vector, tiles, MATRIX, BUILD)
            out = s.expert_out + rank * MATRIX.rows + row
            tl.store(out, weight * (even + even_bias), mask=row < MATRIX.rows)
            tl.store(out + 1, weight * (odd + odd_bias), mask=row + 1 < MATRIX.rows)
    return feed


@triton.jit
def load_expert_bias(bias_ptr, layer, choice, rank, row, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """float32 biases of rows of the experts of ranks `rank`; 0 where there is no such row or rank."""
    mask = (row < MATRIX.rows) & (rank < BUILD.config.experts_per_token)
    at = bias_ptr + (layer * BUILD.config.n_experts + element(choice.experts, rank)) * MATRIX.rows + row
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def head_phase(ctx, want_logits, feed, BUILD: tl.constexpr):
    """head_value, head_index = each program's largest of logits = W_head @ rmsnorm(x + expert_out).

    The index is NOT_FINITE if any of the program's logits is not finite. The logits themselves are stored if asked for.
    """
    DENSE: tl.constexpr = BUILD.machine.dense
    MATRIX: tl.constexpr = BUILD.lm_head
    STEP: tl.constexpr = BUILD.tuning.dense.step_tiles * MATRIX.tile_rows
    s = ctx.s
    first, end = share_rows(ctx.program, ctx.n_programs, MATRIX)
    stack = lm_head_stack(ctx, BUILD)
    feed = BUILD.machine.feed.ask_head(ctx, feed, BUILD)
    x, factor = DENSE.load_normed(ctx, ctx.w.final_norm, feed, MATRIX, BUILD)
    best = tl.full([STEP], float("-inf"), tl.float32)
    best_index = tl.zeros([STEP], tl.int32)
    doubt = tl.zeros([STEP], tl.float32)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        y, feed = DENSE.multiply(ctx, feed, x, stack, row0, end, MATRIX, BUILD)
        logits = y * factor
        if want_logits:
            tl.store(s.logits + row, logits, mask=row < end)
        doubt = keep_finite(doubt, tl.where(row < end, logits, 0.0))
        best, best_index = keep_larger(best, best_index, tl.where(row < end, logits, float("-inf")), row)
    best, best_index = expose_doubt(best, best_index, doubt)
    value, index = reduce_argmax(best, best_index)
    tl.store(s.head_value + ctx.program, value)
    tl.store(s.head_index + ctx.program, index)


@triton.jit
def argmax_phase(ctx, BLOCK_P: tl.constexpr):
    """tokens[position + 1] = index of the largest logit, or NOT_FINITE, unless a barrier gave up."""
    s = ctx.s
    if ctx.program == 0:
        program = tl.arange(0, BLOCK_P)
        value = tl.load(s.head_value + program, mask=program < ctx.n_programs, other=float("-inf"))
        index = tl.load(s.head_index + program, mask=program < ctx.n_programs, other=0x7FFFFFFF)
        _, token = reduce_argmax(value, index)
        if tl.load(s.sync + ABORT) == 0:  # otherwise -1 stays there
            tl.store(s.tokens + ctx.position + 1, token)


class MegaModel:
    """A GPT-OSS model on one device, decoded greedily, one token a launch.

    It holds one sequence. generate and decode check their arguments when they are called and take the model when their
    first token is asked for; from then on generate, decode, step, logits, hidden, reset and switch_path end the
    sequence, and the generator raises GenerationOvertaken at its next token. Closing a generator changes nothing.

    Threads may share a model, and each may have one of its own: a use waits until another thread's is over, be it a
    call or one token of a generator. No lock is held between two tokens, nor while on_logits or on_launch run, which
    may use any model. A signal handler may not, amid a use by its thread: ModelInUse.

    Whatever ends a use early, an interrupt or an error, the next one starts clean: positions that were fed before it
    count as fed, those that it was feeding do not. PositionsLost if a token is to be fed behind them. After
    MegakernelAborted each use raises it again until reset.
    """

    _last_stream = None  # of a GPU, that any model used last

    def __init__(
        self,
        checkpoint,
        quant: bool = False,
        max_context: int | None = None,
        device: torch.device | str | None = None,
        num_programs: int | None = None,
        tuning: Tuning | None = None,
        kv_dtype: torch.dtype = torch.bfloat16,
        show_progress: bool = False,
        trace_position: int | None = None,
        weights: Weights | None = None,
        dense: DenseFormats | None = None,
        blocks: BlockTuning | None = None,
    ):
        """The context defaults to 4096 positions, or all of a model with fewer; the device to the GPU if there is one.

        dense: how the dense matrices are held that the checkpoint has in bfloat16, quantized while they are loaded; as
        they are unless said. InputError if an archive has them in another FP8 format than this says.
        blocks: how prompts are fed, see prefill.py.
        kv_dtype is float32 for comparisons without rounding. `weights` are those of another model, with the same
        checkpoint and tuning, to share. InputError if the context is longer than the model's, or it does not fit the
        device; TypeError names an argument of the wrong kind.
        """
        if not hasattr(checkpoint, "config"):
            raise TypeError(f"checkpoint must be an open one, not {type(checkpoint).__name__}; see from_pretrained")
        boolean(show_progress, "show_progress")
        for value, kind, name in (
            (tuning, Tuning, "tuning"),
            (weights, Weights, "weights"),
            (dense, DenseFormats, "dense"),
            (blocks, BlockTuning, "blocks"),
        ):
            instance(value, kind, name)
        max_context = integer_or_none(max_context, "max_context")
        num_programs = integer_or_none(num_programs, "num_programs")
        one_of(kv_dtype, (torch.bfloat16, torch.float32), "kv_dtype")
        self.config: ModelConfig = dataclasses.replace(checkpoint.config, dense=held_formats(checkpoint, dense))
        self.compiled_config = self.config.compiled()
        self.device = usable_device(device)
        self.quant = boolean(quant, "quant")
        self.max_context = context_length(self.config, max_context)
        self.trace_position = integer_or_none(trace_position, "trace_position", least=0)
        if self.trace_position is not None and self.trace_position >= self.max_context:
            raise InputError(f"trace_position {trace_position}: the context has {self.max_context} positions")
        self.tuning = tuning or tuning_for(self.device, self.config)
        self.num_programs = program_count(self.device, self.tuning) if num_programs is None else num_programs
        check_program_count(self.num_programs, self.device, self.tuning)
        self.grid = (self.num_programs,)
        self.blocks = blocks or blocks_for(self.device)
        needed = bytes_to_load(checkpoint, self.config, self.device, self.tuning) if weights is None else 0
        check_memory(self.config, self.max_context, kv_dtype, self.device, needed)
        start = time.perf_counter()
        # Weights that stay in a mapped file are as good as that file.
        in_place = weights_in_place(checkpoint, self.config, self.device, self.tuning)
        self._mapped = checkpoint if in_place else None
        self.weights = weights or load_weights(checkpoint, self.config, self.device, self.tuning, show_progress)
        self.load_seconds = time.perf_counter() - start
        self.checkpoint_bytes = checkpoint_bytes(checkpoint.config)
        self.kv_dtype = kv_dtype
        self.turns = Turns()
        self._start()

    def _start(self) -> None:
        """A new sequence in new memory."""
        self._started = False
        self.state = self.prefill = None  # before the new ones need their memory
        self.n_fed = 0  # positions that the cache holds, whose tokens are the first of state.tokens
        self._feeding: range | None = None  # positions whose launches have begun and not ended
        self._lost = 0  # so far the cache may hold anything behind n_fed, left by launches that did not end; 0: nowhere
        self.state = self._new_state(self.kv_dtype)
        self._build()
        self.prefill = Prefill(self.config, self.build, self.blocks, self.weights, self.state)
        with compile_errors(self.device):
            self._compile()
        self._check_barriers()
        self._started = True

    def _build(self) -> None:
        """What kernels are compiled for."""
        self.build = Build(self.compiled_config, self.tuning, self.quant)
        self.traced_build = Build(self.compiled_config, self.tuning, self.quant, trace=True)

    def _compile(self) -> None:
        """Launch without layers: shows that the programs can be resident before anyone waits.

        What attention needs of shared memory, more with a float32 cache or wide heads, is taken from the ring.
        """
        while missing := self._missing_shared_memory():
            ring = self.tuning.ring
            stages = ring.stages - -(-missing // ring.stage_bytes) if ring else 0
            if stages < LEAST_STAGES:
                raise InputError(f"{self.device} has too little shared memory for this model")
            distance = min(ring.prefetch_distance, stages)
            ring = dataclasses.replace(ring, stages=stages, prefetch_distance=distance)
            self.tuning = dataclasses.replace(self.tuning, ring=ring)
            self._build()

    def _missing_shared_memory(self) -> int:
        """Bytes that the kernel needs beyond what there is."""
        try:
            for position in {0, self.trace_position or 0}:
                self._run(range(0), self._launch, position, n_layers=0)
        except OutOfResources as error:
            return error.required - error.limit
        return 0

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        quant: bool = False,
        max_context: int | None = None,
        device: torch.device | str | None = None,
        **options,
    ) -> "MegaModel":
        """Load an .iris archive, a checkpoint folder in the Hugging Face layout, or a hub id.

        Options and errors: see MegaModel.
        """
        device = usable_device(device)  # before anything is loaded
        return cls(open_checkpoint(path), quant, max_context, device, **options)

    @exclusive
    def reset(self) -> None:
        """Forget all positions, and a barrier that gave up."""
        self._take()
        s, self.n_fed = self.state, 0
        self._feeding = range(self.max_context)  # an interrupt may leave some
        for tensor in (s.k_cache, s.v_cache, s.split_arrivals, s.sync):
            tensor.zero_()
        self._feeding, self._lost = None, 0

    @exclusive
    def switch_path(self, quant: bool) -> None:
        """Go on with the quantized or the default path: the same weights, a new state."""
        quant = boolean(quant, "quant")
        self._take()
        self._started, self.quant = False, quant
        self._start()

    def _take(self) -> int:
        """Begin a use of the model, which ends the generation before it, and put right what an unfinished one left."""
        turn = self.turns.take()
        if not self._started:
            self._start()
        self._follow_stream()
        if self._feeding is not None:
            self.n_fed = min(self.n_fed, self._feeding.start)
            self._lost = max(self._lost, self._feeding.stop)
            self.state.sync[: ABORT.value] = 0  # arrivals of programs that were stopped
            self.state.split_arrivals.zero_()
            self._feeding = None
        return turn

    def _go_on(self, turn: int) -> None:
        """Go on with a generation. GenerationOvertaken if the model has been put to another use."""
        self.turns.check(turn)
        self._follow_stream()

    def _follow_stream(self) -> None:
        """What this thread queues on a GPU from now on runs behind all that models queued before, on any stream.

        Two kernels whose programs wait for each other must not share the GPU.
        """
        if self.device.type == "cuda":
            with LAUNCHING:
                stream, last = torch.cuda.current_stream(), MegaModel._last_stream
                if last is not None and last != stream:
                    stream.wait_stream(last)
                MegaModel._last_stream = stream

    def _new_state(self, kv_dtype: torch.dtype) -> State:
        barriers = 2 + len(PHASES) * self.config.n_layers
        return new_state(
            self.config,
            self.tuning,
            self.quant,
            self.max_context,
            self.num_programs,
            self.device,
            kv_dtype,
            trace_events=0 if self.trace_position is None else 2 + 2 * barriers,
        )

    def traced_launch(self) -> Launch:
        """What the launch at trace_position noted, once it has ended. ValueError if there was none."""
        n_bytes = bytes_by_phase(self.config, self.trace_position or 0)
        return Launch.from_events(self.state.trace.cpu().numpy(), self.config.n_layers, n_bytes)

    @exclusive
    def step(self, token_id: int, position: int) -> int:
        """Feed a token at a position whose predecessors were fed; returns the most likely next token.

        InputError if the logits are not finite, the position lies outside the context or the token outside the
        vocabulary; TypeError if they are no integers.
        """
        token_id, position = self._placed(token_id, position)
        self._take_at(token_id, position)
        self._feed(position, token=True)
        return self._token(self.state.tokens[position + 1], position)

    @exclusive
    def logits(self, token_id: int, position: int) -> torch.Tensor:
        """The same, but returns the next token's logits, float32 [vocab], a copy on the model's device."""
        token_id, position = self._placed(token_id, position)
        self._take_at(token_id, position)
        return self._feed_for_logits(position)

    @exclusive
    def hidden(self, token_id: int, position: int, n_layers: int) -> torch.Tensor:
        """The same, but returns the residual stream after the first n_layers, float32 [hidden], a copy."""
        n_layers = integer(n_layers, "n_layers")
        if not 0 <= n_layers <= self.config.n_layers:
            raise InputError(f"n_layers {n_layers}: the model has {self.config.n_layers}")
        token_id, position = self._placed(token_id, position)
        self._take_at(token_id, position)
        self._run(range(position, position + 1), self._launch, position, n_layers=n_layers)
        self._check_barriers()
        return functools.reduce(torch.add, self.state.expert_out, self.state.x)

    def generate(
        self,
        prompt_ids: Iterable[int],
        max_new_tokens: int,
        on_logits: Callable[[torch.Tensor], None] | None = None,
    ) -> Iterator[int]:
        """Yield the ids that follow the prompt, a stop id last. Ends early when the context is full.

        What the prompt has in common with the sequence before it, such as a chat's earlier turns, is not fed again. The
        rest is fed in blocks (prefill.py), but for its last token. `on_logits` receives the logits, float32 [vocab], of
        each position of the prompt and the answer, for which all are fed one by one: a copy on the model's device.

        Raises what step does; GenerationOvertaken if the model was used otherwise since the last token. InputError if
        weights lie in a mapped file, which a CPU's may, that was changed since it was opened.
        """
        prompt_ids = integers(prompt_ids, "prompt_ids")
        max_new_tokens = integer(max_new_tokens, "max_new_tokens", least=0)
        function_or_none(on_logits, "on_logits")
        if not prompt_ids:
            raise InputError("the prompt is empty")
        self._check_fit(prompt_ids, 0)
        return self._generate(prompt_ids, max_new_tokens, on_logits)

    def _generate(
        self, prompt_ids: list[int], max_new_tokens: int, on_logits: Callable[[torch.Tensor], None] | None
    ) -> Iterator[int]:
        check_unchanged(self._mapped)
        last = len(prompt_ids) - 1
        turn = self._begin(prompt_ids, in_blocks=on_logits is None)
        if on_logits:
            for position in range(last):
                on_logits(self._next_logits(turn, position))
        for token in self._decode(turn, last, min(last + max_new_tokens, self.max_context), on_logits):
            check_unchanged(self._mapped)
            yield token
            if token in self.config.stop_ids:
                return

    @exclusive
    def _begin(self, prompt_ids: list[int], in_blocks: bool) -> int:
        """Take the model for a prompt; in_blocks: and feed all that the cache does not hold but the last token."""
        turn = self._take()
        last = len(prompt_ids) - 1
        held = min(self._held(prompt_ids), last) if in_blocks else 0
        self._write_tokens(prompt_ids[held:], held)
        if not in_blocks:
            return turn
        if last - held < self.blocks.least_tokens or not self.prefill.holds_experts:
            for position in range(held, last):
                self._feed(position)
        else:
            self._run(range(held, last), self.prefill.feed, held, last - held)
            self._fed(last)
        return turn

    def _held(self, token_ids: list[int]) -> int:
        """How many of these tokens the cache holds: the first ones that it has in common with them."""
        held = self.state.tokens[: min(self.n_fed, len(token_ids))].tolist()
        return next((n for n, (a, b) in enumerate(zip(held, token_ids)) if a != b), len(held))

    def decode(
        self, token_id: int, position: int, n_tokens: int, on_launch: Callable[[], None] | None = None
    ) -> Iterator[int]:
        """Feed a token at a position whose predecessors are in the cache and yield the n_tokens ids that follow.

        Stop ids end nothing; a full context does. `on_launch` is called after each launch, which a GPU may only have
        queued: events recorded there mark where it ends. Raises what generate does.
        """
        token_id, position = self._placed(token_id, position)
        n_tokens = integer(n_tokens, "n_tokens", least=0)
        function_or_none(on_launch, "on_launch")
        return self._decode_from(token_id, position, n_tokens, on_launch)

    def _decode_from(
        self, token_id: int, position: int, n_tokens: int, on_launch: Callable[[], None] | None
    ) -> Iterator[int]:
        turn = self._begin_at(token_id, position)
        yield from self._decode(turn, position, min(position + n_tokens, self.max_context), on_launch=on_launch)

    @exclusive
    def _begin_at(self, token_id: int, position: int) -> int:
        return self._take_at(token_id, position)

    def _decode(
        self,
        turn: int,
        start: int,
        end: int,
        on_logits: Callable[[torch.Tensor], None] | None = None,
        on_launch: Callable[[], None] | None = None,
    ) -> Iterator[int]:
        """Launch positions start .. end - 1, each on the token before it, and yield their tokens.

        On a GPU the next launch is queued before a token is read back, so that the device never waits for the host.
        """
        ahead = 0 if on_logits or self.device.type == "cpu" else 1
        queued: deque[Launched] = deque()
        for position in range(start, end):
            queued.append(self._next_launch(turn, position, on_logits is not None))
            if on_launch:
                on_launch()
            if len(queued) > ahead:
                launched = queued.popleft()
                token_id = self._next_token(turn, launched)
                if on_logits:
                    on_logits(launched.logits)
                yield token_id
        while queued:
            yield self._next_token(turn, queued.popleft())

    @exclusive
    def _next_launch(self, turn: int, position: int, logits: bool) -> "Launched":
        """Feed the token at a position of a generation."""
        self._go_on(turn)
        self._feed(position, token=True, logits=logits)
        kept = self.state.logits.clone() if logits else None
        token = self.state.tokens[position + 1]
        if self.device.type == "cpu":
            return Launched(position, token.clone(), None, kept)
        pinned = torch.empty((), dtype=torch.int32, pin_memory=True)
        pinned.copy_(token, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return Launched(position, pinned, copied, kept)

    def _next_token(self, turn: int, launched: "Launched") -> int:
        if launched.copied is not None:
            launched.copied.synchronize()
        return self._checked_token(turn, launched)

    @exclusive
    def _checked_token(self, turn: int, launched: "Launched") -> int:
        self._go_on(turn)
        return self._token(launched.token, launched.position)

    @exclusive
    def _next_logits(self, turn: int, position: int) -> torch.Tensor:
        self._go_on(turn)
        return self._feed_for_logits(position)

    def _check_fit(self, token_ids: list[int], position: int) -> None:
        """InputError unless positions from `position` on are in the context, and tokens in the vocabulary."""
        if position < 0 or position + len(token_ids) > self.max_context:
            raise InputError(
                f"positions {position} to {position + len(token_ids) - 1} "
                f"do not fit a context of {self.max_context} tokens"
            )
        for token_id in token_ids:
            check_token(token_id, self.config)

    def _write_tokens(self, token_ids: list[int], position: int) -> None:
        """Put tokens at positions from `position` on, still to be fed; later ones become -1, "not decoded"."""
        self._check_fit(token_ids, position)
        self.n_fed = min(self.n_fed, position)
        self.state.tokens[position:] = -1
        ids = torch.tensor(token_ids, dtype=torch.int32)
        self.state.tokens[position : position + len(token_ids)] = ids.to(self.device)

    def _placed(self, token_id: int, position: int) -> tuple[int, int]:
        """Both as int. TypeError and InputError, see step."""
        token_id, position = integer(token_id, "token_id"), integer(position, "position")
        self._check_fit([token_id], position)
        return token_id, position

    def _take_at(self, token_id: int, position: int) -> int:
        """Take the model for a token behind what was fed. PositionsLost if some of that an interrupted use has lost."""
        turn = self._take()
        if self.n_fed < min(position, self._lost):
            raise PositionsLost(
                f"position {position}: an interrupted call lost those from {self.n_fed} on; feed them again or reset()"
            )
        self._write_tokens([token_id], position)
        return turn

    def _feed(self, position: int, token: bool = False, logits: bool = False) -> None:
        """Launch a position, whose token was written, through all layers. Behind a gap the cache does not hold it."""
        self._run(range(position, position + 1), self._launch, position, token=token, logits=logits)
        if self.n_fed == position:
            self._fed(position + 1)

    def _run(self, positions: range, launch: Callable[..., None], *arguments, **options) -> None:
        """Launch what feeds these positions."""
        self._feeding = positions
        with LAUNCHING:
            self._follow_stream()
            launch(*arguments, **options)
        self._feeding = None

    def _fed(self, n: int) -> None:
        """The cache holds the first n positions; on a GPU, for what is launched from now on."""
        self.n_fed = n
        if n >= self._lost:
            self._lost = 0

    def _feed_for_logits(self, position: int) -> torch.Tensor:
        self._feed(position, logits=True)
        self._check_barriers()
        if int(self.state.head_index.min()) < 0:
            raise LogitsNotFinite(position)
        return self.state.logits.clone()

    def _launch(self, position: int, token: bool = False, logits: bool = False, n_layers: int | None = None) -> None:
        try:
            megakernel[self.grid](
                self.weights,
                self.state,
                position,
                int(token),
                int(logits),
                self.config.n_layers if n_layers is None else n_layers,
                self.max_context,
                self.num_programs,
                BUILD=self.traced_build if position == self.trace_position else self.build,
                BLOCK_P=next_power_of_2(self.num_programs),
                **self.tuning.options(),
            )
        except RuntimeError as error:
            if "cooperative launch" not in str(error):
                raise
            raise InputError(
                f"--num-programs {self.num_programs}: more than can be resident on {self.device}"
            ) from None

    def _token(self, token: torch.Tensor, position: int) -> int:
        """What the launch of a position left."""
        token_id = int(token)
        if token_id == NOT_FINITE.value:
            raise LogitsNotFinite(position)
        if token_id < 0:
            self._check_barriers()
            raise RuntimeError("the kernel ended without a token and without an abort record")
        return token_id

    def _check_barriers(self) -> None:
        barrier = int(self.state.sync[ABORT.value])
        if barrier:
            raise MegakernelAborted(
                f"a program did not arrive at the barrier after {barrier_name(barrier, self.config.n_layers)}; "
                "call reset() before the next step"
            )


class Launched(NamedTuple):
    """A position that a generation has fed, and what becomes of it."""

    position: int
    token: torch.Tensor  # [] int32, on the host
    copied: torch.cuda.Event | None  # when it is there; None: it is
    logits: torch.Tensor | None


def parse_arguments() -> argparse.Namespace:
    """The command line; InputError where it is wrong."""
    parser = ArgumentParser(description="GPT-OSS decoded by one persistent kernel launch per token.")
    add_model_arguments(parser)
    add_prompt_arguments(parser)
    parser.add_argument("--quant", action="store_true", help="experts as FP4 x FP8, activations quantized on the way")
    add_fp8_arguments(parser)
    parser.add_argument("--num-programs", metavar="N", type=positive_int, help="default: all that are resident at once")
    parser.add_argument("--load-rate", action="store_true", help="say how long loading took, and at what rate")
    parser.add_argument(
        "--trace",
        metavar="FILE.json",
        type=output_path,
        help="time the phases of one token, as a Chrome trace and a table",
    )
    parser.add_argument(
        "--trace-token",
        metavar="N",
        type=positive_int,
        help=f"time the Nth generated token; default: {USUAL_TOKEN}, or the last one",
    )
    return parser.parse_args()


def open_model(args: argparse.Namespace) -> tuple[Checkpoint, Tokenizer | None]:
    """The checkpoint that the command line names, and its tokenizer. Random weights have none, and no stop ids.

    InputError before anything is opened if the kernels cannot run here.
    """
    device = usable_device(None)
    if not args.random_weights:
        checkpoint = open_checkpoint(args.model, args.layers, args.verify, show_progress=sys.stderr.isatty())
        return checkpoint, open_tokenizer(checkpoint)
    if args.verify:
        raise InputError("--verify: random weights have no checksums")
    config = PRESETS[args.random_weights]
    config = dataclasses.replace(config if args.layers is None else config.cut(args.layers), stop_ids=())
    return RandomCheckpoint(config, device=device, name=f"random {args.random_weights}"), None


def main() -> None:
    args = parse_arguments()
    check_outputs(args)
    checkpoint, tokenizer = open_model(args)
    prompt_ids = prompt_ids_from(args, tokenizer, checkpoint.config)
    traced = token_to_trace(args, len(prompt_ids), context_length(checkpoint.config, args.max_context))
    inputs = files_of(checkpoint)
    with trace_writer(args.trace, inputs) as write_trace:
        with logits_writer(args.logits_out, checkpoint.config.vocab_size, inputs) as on_logits:
            model = MegaModel(
                checkpoint,
                args.quant,
                args.max_context,
                num_programs=args.num_programs,
                show_progress=sys.stderr.isatty(),
                dense=dense_formats(args, checkpoint),
                trace_position=None if traced is None else len(prompt_ids) - 1 + traced - 1,
            )
            if args.load_rate:
                print(load_rate(model), file=sys.stderr)
            generation = stream_generation(
                model.generate(prompt_ids, args.max_new_tokens, on_logits),
                prompt_ids,
                tokenizer,
                checkpoint.config,
                args.max_new_tokens,
                device=device_name(model.device),
                path=path_name(args.quant, model.config.dense),
                as_json=args.json,
            )
        if write_trace:
            if len(generation.token_ids) < traced:
                raise InputError(f"--trace-token {traced}: the answer ended after {len(generation.token_ids)} tokens")
            launch = model.traced_launch()
            title = f"token {traced} at position {model.trace_position}: {generation.device}, {generation.path}"
            write_trace(chrome_trace(launch, title))
            print(f"{title}\n{table_text(table_rows(launch))}", file=sys.stderr)


def load_rate(model: MegaModel) -> str:
    """One line: bytes of the weights as the checkpoint has them, and what loading took, packing included."""
    gigabytes = model.checkpoint_bytes / 1e9
    return f"weights: {gigabytes:.3f} GB in {model.load_seconds:.2f} s, {gigabytes / model.load_seconds:.2f} GB/s"


def usable_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, or the one Triton was set up for when this module was imported. Raises InputError."""
    interpreted = isinstance(megakernel, InterpretedFunction)
    if interpreted and device is None:
        notice_unused_gpu()
    device = torch_device(("cpu" if interpreted else "cuda") if device is None else device, for_kernels=True)
    if (device.type == "cpu") != interpreted:
        raise InputError(f"device {device}: set TRITON_INTERPRET=1 for the CPU, unset it for a GPU")
    if interpreted:
        interpreter.install()
    elif device.index not in (None, torch.cuda.current_device()):
        raise InputError(f"device {device}: not the current one; choose it with CUDA_VISIBLE_DEVICES")
    return device


if __name__ == "__main__":
    sys.exit(run_main(main))
