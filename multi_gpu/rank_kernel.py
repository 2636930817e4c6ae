"""The kernels of layout "roles": one rank has attention, router and tail, the others the experts.

They call the megakernel's phases. Layout "tp" needs no kernel of its own: the megakernel itself exchanges partial sums
where its Build names several ranks, see common/exchange.py.
"""

import host.start

import triton
import triton.language as tl

import gpt_oss_megakernel as mega
from common.barrier import LAYER_BARRIERS
from common.exchange import DOWN, ROUTER, leave_ranks, raise_flags, wait_for_flags
from common.experts import no_choice


@triton.jit(do_not_specialize=["position", "want_token", "want_logits", "n_layers", "n_programs"])
def attention_rank_kernel(
    w,
    s,
    position,
    want_token,
    want_logits,
    n_layers,
    max_context,
    n_programs,
    peers,
    BUILD: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Decode the token at `position` with the experts of other ranks; arguments as the megakernel's.

    The pointers of s to what the router leaves lead to the first rank with experts, those of peers.inputs to all.
    """
    FEED: tl.constexpr = BUILD.machine.feed
    EXPERT_RANKS: tl.constexpr = BUILD.expert_ranks
    ctx = mega.open_context(w, s, position, max_context, n_layers, want_token | want_logits, n_programs, BUILD, peers)
    mega.embedding_phase(ctx, BUILD)
    mega.arrive_at(ctx, 1, BUILD)
    feed = FEED.open(ctx, BUILD)
    barrier = mega.wait_at(ctx, tl.cast(1, tl.int32), BUILD)

    for n in tl.range(n_layers, disable_licm=BUILD.tuning.layers_alone):
        layer = tl.cast(n, tl.int64)
        barrier = 2 + n * 4  # of this rank, which has no barriers of gate-up and down
        first = 2 + n * LAYER_BARRIERS
        feed = FEED.extend(ctx, n, feed)
        feed = mega.qkv_phase(ctx, layer, feed, BUILD)
        mega.arrive_at(ctx, barrier, BUILD)
        barrier = mega.wait_at(ctx, barrier, BUILD)

        mega.attention_phase(ctx, layer, tl.load(s.windows + layer), barrier, BUILD)
        mega.arrive_at(ctx, barrier, BUILD)
        feed = FEED.ask_o(ctx, layer, feed, BUILD)
        barrier = mega.wait_at(ctx, barrier, BUILD)

        feed = mega.o_phase(ctx, layer, feed, BUILD)
        mega.arrive_at(ctx, barrier, BUILD)
        barrier = mega.wait_at(ctx, barrier, BUILD)

        mega.router_phase(ctx, layer, BUILD)
        raise_flags(ctx, barrier, first + ROUTER, EXPERT_RANKS, BUILD)
        feed = FEED.extend(ctx, n + 1, feed)
        feed = FEED.ask_experts(ctx, no_choice(), feed, BUILD)  # which has none: the next layer's dense tiles
        feed = FEED.ask_qkv(ctx, tl.minimum(layer + 1, n_layers - 1), feed, BUILD)
        wait_for_flags(ctx, first + DOWN, EXPERT_RANKS, BUILD)

    if ctx.want_head:
        barrier = 2 + n_layers * 4
        mega.head_phase(ctx, want_logits, FEED.extend(ctx, n_layers, feed), BUILD)
        mega.arrive_at(ctx, barrier, BUILD)
        barrier = mega.wait_at(ctx, barrier, BUILD)
        if want_token:
            mega.argmax_phase(ctx, BUILD, BLOCK_P)
            share_token(ctx, BUILD)
            raise_flags(ctx, barrier, 2 + n_layers * LAYER_BARRIERS, EXPERT_RANKS, BUILD)
    leave_ranks(ctx, BUILD)


@triton.jit
def share_token(ctx, BUILD: tl.constexpr):
    """Store the next token, which this program's argmax has stored here, at the ranks with experts."""
    N: tl.constexpr = BUILD.n_expert_ranks
    if ctx.program == 0:
        tl.debug_barrier()
        token = tl.load(ctx.s.tokens + ctx.position + 1)
        for i in tl.static_range(N):
            tl.store(ctx.peers.tokens[1 + i] + ctx.position + 1, token)


@triton.jit(do_not_specialize=["want_token", "n_layers", "n_programs"])
def expert_rank_kernel(w, s, want_token, n_layers, n_programs, peers, BUILD: tl.constexpr):
    """Compute the chosen experts of this rank in every layer of a token, for the rank with attention.

    The pointer of s to what the experts leave leads to that rank.
    """
    FEED: tl.constexpr = BUILD.machine.feed
    GATE_UP: tl.constexpr = BUILD.gate_up
    ATTENTION_RANKS: tl.constexpr = BUILD.attention_ranks
    ctx = mega.open_context(w, s, 0, 0, n_layers, 0, n_programs, BUILD, peers)
    feed = FEED.open_phase(ctx, tl.cast(0, tl.int64), GATE_UP, no_choice(), BUILD)
    for n in tl.range(n_layers, disable_licm=BUILD.tuning.layers_alone):
        layer = tl.cast(n, tl.int64)
        barrier = 1 + n * 2
        first = 2 + n * LAYER_BARRIERS
        wait_for_flags(ctx, first + ROUTER, ATTENTION_RANKS, BUILD)
        feed = FEED.extend(ctx, n + 1, feed)
        choice, feed = mega.gate_up_phase(ctx, layer, feed, BUILD)
        mega.arrive_at(ctx, barrier, BUILD)
        barrier = mega.wait_at(ctx, barrier, BUILD)

        feed = mega.down_phase(ctx, layer, choice, feed, BUILD)
        raise_flags(ctx, barrier, first + DOWN, ATTENTION_RANKS, BUILD)
    if want_token:
        wait_for_flags(ctx, 2 + n_layers * LAYER_BARRIERS, ATTENTION_RANKS, BUILD)
    leave_ranks(ctx, BUILD)
