"""GPT-OSS in one kernel launch per token.

Persistent programs walk through the phases of every layer together, with a grid barrier after each phase:

    embedding | per layer: QKV | attention | O projection | router | gate-up | down | then: LM head | argmax

`megakernel` below is that walk, and the phases follow it in order. `MegaModel` holds the weights and the state and
launches it; `main` is the command line. What differs between machines is behind the interface of common/machine.py.
"""

import host.start

import functools
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

from command_line.run import run_main
from command_line.scripts import arguments
from common import barrier as barriers
from common import exchange
from common.argmax import expose_doubt, keep_finite, keep_larger, reduce_argmax
from common.barrier import ABORT, LAYER_BARRIERS
from common.context import Context
from common.decode_attention import attend_head, attend_split, first_seen, merge_head, split_cache
from common.dense import lm_head_matrix, o_matrix, qkv_matrix, router_matrix
from common.experts import Choice, ExpertTiles, element, elements, pick
from common.gemv_dense import gemv_rows, load_row_vector, load_rows, vector_prescale
from common.rmsnorm import normed_blocks, rms_rstd
from common.router import top_k_softmax
from common.sampling import scores_of
from common.swiglu import swiglu
from common.trace import mark
from common.work import gate_up_tile, share_rows, share_work
from host import cli, generation
from host.backend import usable_device
from host.decoder import Decoder
from host.limits import context_length
from host.talk import Talks
from load_model import files_of, open_checkpoint, open_model, open_tokenizer
from measure import trace
from prefill import Launch, Prefill
from system.errors import InputError

AMONG_RANKS = tl.constexpr(True)  # barriers of all GPUs that share the model


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
    peers=(),
):
    """Decode the token at `position`: w is Weights, s is State, BUILD a common.build.Build.

    want_token and want_logits (0 or 1) say what to compute from the final hidden state; with neither, as for a
    prompt's tokens, the LM head is left out. peers: common.exchange.Peers, where several GPUs share the model.
    """
    FEED: tl.constexpr = BUILD.machine.feed
    ctx = open_context(w, s, position, max_context, n_layers, want_token | want_logits, n_programs, BUILD, peers)
    barrier = tl.cast(1, tl.int32)
    mark(ctx, 0, BUILD)
    embedding_phase(ctx, BUILD)
    arrive_at(ctx, barrier, BUILD, AMONG_RANKS)
    feed = FEED.open(ctx, BUILD)
    barrier = wait_at(ctx, barrier, BUILD, AMONG_RANKS)

    for n in tl.range(n_layers, disable_licm=BUILD.tuning.layers_alone):
        layer = tl.cast(n, tl.int64)
        following = tl.minimum(layer + 1, n_layers - 1)
        window = tl.load(s.windows + layer)
        barrier = 2 + n * LAYER_BARRIERS  # as a loop-carried value it cost sm_90 a spill
        feed = FEED.extend(ctx, n, feed)
        FEED.ask_small(ctx, layer, window, BUILD)

        feed = qkv_phase(ctx, layer, feed, BUILD)
        arrive_at(ctx, barrier, BUILD)
        barrier = wait_at(ctx, barrier, BUILD)

        attention_phase(ctx, layer, window, barrier, BUILD)
        arrive_at(ctx, barrier, BUILD)
        feed = FEED.ask_o(ctx, layer, feed, BUILD)
        barrier = wait_at(ctx, barrier, BUILD)

        feed = o_phase(ctx, layer, feed, BUILD)
        arrive_at(ctx, barrier, BUILD)
        FEED.ask_part_of_qkv(ctx, following, 0, BUILD)
        barrier = wait_at(ctx, barrier, BUILD)

        FEED.ask_part_of_qkv(ctx, following, 1, BUILD)
        router_phase(ctx, layer, BUILD)
        arrive_at(ctx, barrier, BUILD)
        FEED.ask_part_of_qkv(ctx, following, 2, BUILD)
        barrier = wait_at(ctx, barrier, BUILD)

        feed = FEED.extend(ctx, n + 1, feed)
        choice, feed = gate_up_phase(ctx, layer, feed, BUILD)
        arrive_at(ctx, barrier, BUILD)
        barrier = wait_at(ctx, barrier, BUILD)

        feed = down_phase(ctx, layer, choice, feed, BUILD)
        arrive_at(ctx, barrier, BUILD)
        feed = FEED.ask_qkv(ctx, following, feed, BUILD)
        barrier = wait_at(ctx, barrier, BUILD)

    if ctx.want_head:
        barrier = 2 + n_layers * LAYER_BARRIERS
        head_phase(ctx, want_logits, FEED.extend(ctx, n_layers, feed), BUILD)
        arrive_at(ctx, barrier, BUILD, AMONG_RANKS)
        barrier = wait_at(ctx, barrier, BUILD, AMONG_RANKS)
        if want_token:
            argmax_phase(ctx, BUILD, BLOCK_P)
        mark(ctx, 2 * barrier - 1, BUILD)
    exchange.leave_ranks(ctx, BUILD)


@triton.jit
def open_context(w, s, position, max_context, n_layers, want_head, n_programs, BUILD: tl.constexpr, peers):
    """Return this program's Context."""
    program = tl.program_id(0)
    work = share_work(program, n_programs, BUILD)
    return Context(w, s, position, max_context, n_layers, want_head, program, n_programs, work, peers)


@triton.jit
def arrive_at(ctx, barrier, BUILD: tl.constexpr, AMONG_RANKS: tl.constexpr = False):
    """Arrive at a barrier at the end of a phase. Until `wait_at` only memory that no program writes may be read."""
    MACHINE: tl.constexpr = BUILD.machine
    mark(ctx, 2 * barrier - 1, BUILD)
    if AMONG_RANKS:
        exchange.arrive_among_ranks(ctx, barrier, BUILD)
    else:
        barriers.arrive(ctx.s.sync, MACHINE)


@triton.jit
def wait_at(ctx, barrier, BUILD: tl.constexpr, AMONG_RANKS: tl.constexpr = False):
    """Wait until all that programs stored before they arrived at a barrier is visible. Return the next one's number."""
    MACHINE: tl.constexpr = BUILD.machine
    SPINS: tl.constexpr = BUILD.tuning.spin_limit
    if AMONG_RANKS:
        exchange.wait_for_ranks(ctx, barrier, BUILD)
    else:
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
    token = tl.maximum(
        tl.load(s.tokens + ctx.position), 0
    )  # else -1 after an abort or where none was fed, or NOT_FINITE
    if ctx.program == 0:
        h = tl.arange(0, BLOCK_H)
        row = exchange.local_row(token, BUILD)
        values = tl.load(ctx.w.embed + row.to(tl.int64) * H + h, mask=h < H, other=0.0)
        exchange.store_embedding(ctx, token, h, values, BUILD)
        for n in range(BUILD.config.experts_per_token):
            tl.store(s.expert_out + n * H + h, tl.zeros([BLOCK_H], tl.float32), mask=h < H)


@triton.jit
def qkv_phase(ctx, layer, feed, BUILD: tl.constexpr):
    """qkv = W_qkv @ rmsnorm(x + expert_out) + b. Return the feed."""
    DENSE: tl.constexpr = BUILD.machine.dense
    MATRIX: tl.constexpr = BUILD.qkv
    STEP: tl.constexpr = BUILD.tuning.dense.step_tiles * MATRIX.tile_rows
    w, s = ctx.w, ctx.s
    x, factor = DENSE.load_normed(ctx, w.attn_norm + layer * MATRIX.k, feed, MATRIX, BUILD)
    matrix = qkv_matrix(ctx, layer, BUILD)
    first, end = share_rows(ctx.program, ctx.n_programs, MATRIX)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        # Loaded before the product, as behind it the bias would cost its latency once more.
        bias = tl.load(w.qkv_bias + layer * MATRIX.rows + row, mask=row < end, other=0.0).to(tl.float32)
        y, feed = DENSE.multiply(ctx, feed, x, matrix, row0, end, MATRIX, BUILD)
        tl.store(s.qkv + row, y * factor + bias, mask=row < end)
    return feed


@triton.jit
def attention_phase(ctx, layer, window, barrier, BUILD: tl.constexpr):
    """attention = softmax(q k) v over the window or all earlier positions; append the position's key and value.

    RoPE rotates q and k of qkv; a sink is one more logit. Programs that merge splits wait within this phase.
    """
    CONFIG: tl.constexpr = BUILD.config
    first = first_seen(window, ctx.position)
    if ctx.position - first <= BUILD.tuning.attention.head_keys:
        for head in range(ctx.program, CONFIG.n_heads, ctx.n_programs):
            attend_head(ctx, layer, head, first, BUILD)
    else:
        span = split_cache(first, ctx.position, BUILD)
        for item in range(ctx.program, CONFIG.n_kv_heads * span.n_splits, ctx.n_programs):
            attend_split(ctx, layer, item, span, BUILD)
        if span.n_splits > 1:
            # From the last program on, as the first ones may have one split more.
            for head in range(ctx.n_programs - 1 - ctx.program, CONFIG.n_heads, ctx.n_programs):
                merge_head(ctx, head, span.n_splits, barrier, BUILD)


@triton.jit
def o_phase(ctx, layer, feed, BUILD: tl.constexpr):
    """x = x + expert_out + W_o @ attention + b, on all ranks. Return the feed."""
    DENSE: tl.constexpr = BUILD.machine.dense
    MATRIX: tl.constexpr = BUILD.o
    H: tl.constexpr = MATRIX.rows
    STEP: tl.constexpr = BUILD.tuning.dense.step_tiles * MATRIX.tile_rows
    N_KV_HEADS: tl.constexpr = BUILD.config.n_kv_heads
    N_OUTS: tl.constexpr = BUILD.config.experts_per_token
    w, s = ctx.w, ctx.s
    epoch = exchange.epoch_of(ctx, layer, exchange.O, BUILD)
    attention = DENSE.load_vector(s.attention, MATRIX, BUILD)
    matrix = o_matrix(ctx, layer, BUILD)
    if ctx.program == ctx.n_programs - 1:
        kv_head = tl.arange(0, triton.next_power_of_2(N_KV_HEADS))
        tl.store(s.split_arrivals + kv_head, 0, mask=kv_head < N_KV_HEADS)  # nobody waits for them any more
    first, end = share_rows(ctx.program, ctx.n_programs, MATRIX)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        x = tl.load(s.x + row, mask=row < end, other=0.0)
        for n in tl.static_range(N_OUTS):
            x += tl.load(s.expert_out + n * H + row, mask=row < end, other=0.0)
        x += tl.load(w.o_bias + layer * H + row, mask=row < end, other=0.0).to(tl.float32)
        y, feed = DENSE.multiply(ctx, feed, attention, matrix, row0, end, MATRIX, BUILD)
        y *= 1.0 / vector_prescale(MATRIX.format)
        tl.store(s.x + row, x + exchange.sum_o(ctx, layer, row, y, row < end, epoch, BUILD), mask=row < end)
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
    N_TARGETS: tl.constexpr = BUILD.n_expert_ranks
    targets = exchange.router_targets(ctx, BUILD)
    program, n_programs = ctx.program, ctx.n_programs
    norm_ptr = ctx.w.mlp_norm + layer * H
    # Tiles from the first program on, blocks from the last one on, so that few programs have both.
    if (program < MATRIX.n_tiles) | (n_programs - 1 - program < N_BLOCKS):
        rows, bias = load_router_tile(ctx, layer, program, BUILD)
        x = load_row_vector(ctx.s.x, MATRIX, zero)
        rstd = rms_rstd(x, H, BUILD.config.rms_norm_eps)
        x, factor = normed_blocks(x, load_row_vector(norm_ptr, MATRIX, zero), rstd, vector_prescale(MATRIX.format))
        for tile in range(program, MATRIX.n_tiles, n_programs):
            if tile != program:
                rows, bias = load_router_tile(ctx, layer, tile, BUILD)
            row = tile * M + tl.arange(0, M)
            logits = gemv_rows(rows, x, MATRIX, MACHINE) * factor + bias
            for n in tl.static_range(N_TARGETS):
                tl.store(targets[n].router_logits + row, logits, mask=row < MATRIX.rows)
        for block in range(n_programs - 1 - program, N_BLOCKS, n_programs):
            h = block * NORM + tl.arange(0, NORM) + zero
            residual = tl.load(ctx.s.x + h, mask=h < H, other=0.0)
            normed = residual * rstd * tl.load(norm_ptr + h, mask=h < H, other=0.0)
            for n in tl.static_range(N_TARGETS):
                MACHINE.experts.store_input(targets[n], block, normed, x, factor, BUILD)


@triton.jit
def load_router_tile(ctx, layer, tile, BUILD: tl.constexpr):
    """Return (rows, bias) of a tile of a layer's router."""
    MATRIX: tl.constexpr = BUILD.router
    zero = BUILD.machine.opaque_zero()
    row = tile * MATRIX.tile_rows + tl.arange(0, MATRIX.tile_rows)
    bias_ptr = ctx.w.router_bias + layer * MATRIX.rows + row
    bias = tl.load(bias_ptr, mask=row < MATRIX.rows, other=0.0).to(tl.float32)
    rows = load_rows(router_matrix(ctx, layer, BUILD), tile * MATRIX.tile_rows, MATRIX.rows, MATRIX, zero)
    return rows, bias


@triton.jit
def choose_experts(ctx, BUILD: tl.constexpr):
    """Return the router's Choice, which every program computes for itself."""
    TOP_K: tl.constexpr = BUILD.n_chosen
    N_EXPERTS: tl.constexpr = BUILD.config.n_experts
    # A copy of the logits for each warp, see top_k_softmax.
    expert = tl.arange(0, triton.next_power_of_2(N_EXPERTS))[None, :] + BUILD.machine.opaque_zero()
    expert += 0 * tl.arange(0, BUILD.tuning.num_warps)[:, None]
    logits = tl.load(ctx.s.router_logits + expert, mask=expert < N_EXPERTS, other=0.0)
    experts, weights = top_k_softmax(logits, N_EXPERTS, TOP_K)
    return exchange.own_choice(Choice(elements(experts, TOP_K), weights), BUILD)


@triton.jit
def gate_up_phase(ctx, layer, feed, BUILD: tl.constexpr):
    """expert_act = swiglu(W_gate_up @ expert_in + b) of every chosen expert; gate and up rows alternate.

    Return the router's Choice and the feed.
    """
    EXPERTS: tl.constexpr = BUILD.machine.experts
    CONFIG: tl.constexpr = BUILD.config
    MATRIX: tl.constexpr = BUILD.gate_up
    TILES: tl.constexpr = BUILD.tuning.experts.step_tiles
    OUTPUTS: tl.constexpr = MATRIX.tile_rows // 2  # per tile
    w = ctx.w
    # Loaded before any tile is asked for: behind them it waited for 3.2 us. 12.5 us per layer instead of 13.1.
    vector, vector_scale = EXPERTS.load_input(ctx, BUILD)
    choice = choose_experts(ctx, BUILD)
    feed = BUILD.machine.feed.ask_experts(ctx, choice, feed, BUILD)
    tile_of_step = tl.arange(0, TILES * OUTPUTS) // OUTPUTS
    count = ctx.work.gate_up_count
    for step in range(tl.cdiv(count, TILES)):
        tile = gate_up_tile(step * TILES + tile_of_step, ctx.program, ctx.n_programs, BUILD)
        rank = tile // MATRIX.n_tiles
        i = tile % MATRIX.n_tiles * OUTPUTS + tl.arange(0, TILES * OUTPUTS) % OUTPUTS
        gate_bias = load_expert_bias(w.gate_up_bias, layer, choice, rank, 2 * i, MATRIX, BUILD)
        up_bias = load_expert_bias(w.gate_up_bias, layer, choice, rank, 2 * i + 1, MATRIX, BUILD)
        first = gate_up_tile(step * TILES, ctx.program, ctx.n_programs, BUILD)
        tiles = ExpertTiles(first // MATRIX.n_tiles, first % MATRIX.n_tiles, tl.minimum(count - step * TILES, TILES))
        gate, up, feed = EXPERTS.multiply(ctx, layer, feed, choice, vector, tiles, MATRIX, BUILD)
        gate, up = gate * vector_scale + gate_bias, up * vector_scale + up_bias
        act = swiglu(gate, up, CONFIG.swiglu_limit, CONFIG.swiglu_alpha)
        EXPERTS.store_act(ctx, rank, i, act, BUILD)
    return choice, feed


@triton.jit
def down_phase(ctx, layer, choice, feed, BUILD: tl.constexpr):
    """expert_out = weight * (W_down @ expert_act + b) of every chosen expert, on all ranks. Return the feed."""
    EXPERTS: tl.constexpr = BUILD.machine.experts
    MATRIX: tl.constexpr = BUILD.down
    M: tl.constexpr = MATRIX.tile_rows
    TILES: tl.constexpr = BUILD.tuning.experts.step_tiles
    w, down = ctx.w, ctx.work.down
    epoch = exchange.epoch_of(ctx, layer, exchange.DOWN, BUILD)
    PAIRS: tl.constexpr = M // 2  # of an even and an odd row
    tile_of_step, pair = tl.arange(0, TILES * PAIRS) // PAIRS, tl.arange(0, TILES * PAIRS) % PAIRS
    for rank in range(ctx.program % down.ranks, BUILD.config.experts_per_token, down.ranks):
        vector = EXPERTS.load_act(ctx, rank, BUILD)
        weight = pick(choice.weights, rank)
        for first in range(down.member, MATRIX.n_tiles, down.members * TILES):
            row = (first + down.members * tile_of_step) * M + 2 * pair
            ranks = rank + 0 * row
            even_bias = load_expert_bias(w.down_bias, layer, choice, ranks, row, MATRIX, BUILD)
            odd_bias = load_expert_bias(w.down_bias, layer, choice, ranks, row + 1, MATRIX, BUILD)
            tiles = ExpertTiles(rank, first, tl.minimum(tl.cdiv(MATRIX.n_tiles - first, down.members), TILES))
            even, odd, feed = EXPERTS.multiply(ctx, layer, feed, choice, vector, tiles, MATRIX, BUILD)
            rows, biases = (even, odd), (even_bias, odd_bias)
            rows, biases = exchange.sum_down(ctx, layer, rank, row, rows, biases, epoch, BUILD)
            out_ptr = ctx.s.expert_out + rank * MATRIX.rows + row
            tl.store(out_ptr, weight * (rows[0] + biases[0]), mask=row < MATRIX.rows)
            tl.store(out_ptr + 1, weight * (rows[1] + biases[1]), mask=row + 1 < MATRIX.rows)
    return feed


@triton.jit
def load_expert_bias(bias_ptr, layer, choice, rank, row, MATRIX: tl.constexpr, BUILD: tl.constexpr):
    """Return float32 biases of rows of the experts of ranks `rank`; 0 where there is no such row or rank."""
    mask = (row < MATRIX.rows) & (rank < BUILD.config.experts_per_token)
    index = layer * BUILD.config.n_experts + element(choice.experts, rank)
    return tl.load(bias_ptr + index * MATRIX.rows + row, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def head_phase(ctx, want_logits, feed, BUILD: tl.constexpr):
    """head_value, head_index = each program's largest of logits = W_head @ rmsnorm(x + expert_out).

    With a temperature it is the largest of logits / temperature + noise, see common/sampling.py. The index is
    NOT_FINITE if any of the program's logits is not finite. With want_logits all logits are stored too.
    """
    DENSE: tl.constexpr = BUILD.machine.dense
    MATRIX: tl.constexpr = BUILD.lm_head
    STEP: tl.constexpr = BUILD.tuning.dense.step_tiles * MATRIX.tile_rows
    first, end = share_rows(ctx.program, ctx.n_programs, MATRIX)
    matrix = lm_head_matrix(ctx, BUILD)
    feed = BUILD.machine.feed.ask_head(ctx, feed, BUILD)
    x, factor = DENSE.load_normed(ctx, ctx.w.final_norm, feed, MATRIX, BUILD)
    sampling = (tl.load(ctx.s.inverse_temperature), tl.load(ctx.s.seed))
    best = tl.full([STEP], float("-inf"), tl.float32)
    best_index = tl.zeros([STEP], tl.int32)
    doubt = tl.zeros([STEP], tl.float32)
    for row0 in range(first, end, STEP):
        row = row0 + tl.arange(0, STEP)
        y, feed = DENSE.multiply(ctx, feed, x, matrix, row0, end, MATRIX, BUILD)
        logits = y * factor
        if want_logits:
            exchange.store_logits(ctx, row, logits, row < end, BUILD)
        doubt = keep_finite(doubt, tl.where(row < end, logits, 0.0))
        scores = scores_of(logits, sampling, ctx.position, BUILD.first_row + row)
        best, best_index = keep_larger(best, best_index, tl.where(row < end, scores, float("-inf")), row)
    best, best_index = expose_doubt(best, best_index, doubt)
    value, index = reduce_argmax(best, best_index)
    exchange.store_largest(ctx, value, index, BUILD)


@triton.jit
def argmax_phase(ctx, BUILD: tl.constexpr, BLOCK_P: tl.constexpr):
    """tokens[position + 1] = index of the largest logit, or NOT_FINITE, unless a barrier gave up."""
    s = ctx.s
    if ctx.program == 0:
        program = tl.arange(0, BLOCK_P)
        n_programs = ctx.n_programs * BUILD.n_ranks
        value = tl.load(s.head_value + program, mask=program < n_programs, other=float("-inf"))
        index = tl.load(s.head_index + program, mask=program < n_programs, other=0x7FFFFFFF)
        _, token = reduce_argmax(value, index)
        if tl.load(s.sync + ABORT) == 0:  # otherwise -1 stays in tokens
            tl.store(s.tokens + ctx.position + 1, token)


class MegaModel(Talks, Decoder):
    """A GPT-OSS model on one device, decoded by one launch of the megakernel per token.

    host.decoder.Decoder documents its methods, and which threads may call them when; host.talk.Talks adds `chat` and
    `complete`, which take and give text.
    """

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

        See Decoder for the options and for the errors that are raised. Its tokenizer is opened by the first use.
        """
        device = usable_device(device)  # before anything is loaded
        checkpoint = open_checkpoint(path)
        model = cls(checkpoint, quant, max_context, device, **options)
        model._open_tokenizer = functools.partial(open_tokenizer, checkpoint)
        return model

    def _new_prefill(self) -> Prefill:
        return Prefill(self.config, self.build, self.blocks, self.weights, self.state)

    def _launch(self, position: int, token: bool = False, logits: bool = False, n_layers: int | None = None) -> None:
        kernel, grid, arguments, options = self._launch_of(position, token, logits, n_layers)
        try:
            kernel[grid](*arguments, **options)
        except RuntimeError as error:
            if "cooperative launch" not in str(error):
                raise
            raise InputError(
                f"--num-programs {self.num_programs}: more than can be resident on {self.device}"
            ) from None

    def _launch_of(self, position: int, token: bool, logits: bool, n_layers: int | None) -> Launch:
        last_layer = self.config.n_layers if n_layers is None else n_layers
        numbers = (position, int(token), int(logits), last_layer, self.max_context, self.num_programs)
        build = self.traced_build if position == self.trace_position else self.build
        constants = {"BUILD": build, "BLOCK_P": triton.next_power_of_2(self.num_programs)}
        return megakernel, self.grid, (self.weights, self.state, *numbers), constants | self.tuning.options()


def main() -> None:
    """Run the command line that docs/using.md describes."""
    args = arguments("gpt_oss_megakernel.py")
    sampling = cli.sampling_of(args)
    generation.check_outputs(args)
    checkpoint, tokenizer = open_model(args)
    prompt_ids = generation.prompt_ids_from(args, tokenizer, checkpoint.config)
    traced = trace.token_to_trace(args, len(prompt_ids), context_length(checkpoint.config, args.max_context))
    inputs = files_of(checkpoint)
    with trace.trace_writer(args.trace, inputs) as write_trace:
        with generation.logits_writer(args.logits_out, checkpoint.config.vocab_size, inputs) as on_logits:
            trace_position = None if traced is None else len(prompt_ids) - 1 + traced - 1
            model = cli.load_model(MegaModel, args, checkpoint, trace_position=trace_position)
            path = cli.path_name(args.quant, model.config.dense)
            answer = generation.print_answer(args, model, path, prompt_ids, tokenizer, on_logits, sampling)
        if write_trace:
            write_trace(model, traced, answer)


if __name__ == "__main__":
    sys.exit(run_main(main))
