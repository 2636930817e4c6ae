"""NVIDIA H100 and H200: weights through a ring in shared memory, experts' products on tensor cores."""

from common.machine import Dense, Experts, Feed, Machine, Synchronization
from common.plain_sync import publish
from common.sm90 import dense, experts, feed, prefetch, ptx
from common.sm90.prompt_tiles import TILES

SYNC = Synchronization(
    publish=publish,
    release="release",
    acquire_release="acq_rel",
    poll=ptx.poll,
    acquire=ptx.acquired,
    clock_ns=ptx.clock_ns,
)
SM_90 = Machine(
    name="sm_90",
    opaque_zero=ptx.zero,
    load_now=ptx.load_now,
    sync=SYNC,
    rank_sync=SYNC._replace(poll=ptx.poll_ranks),
    feed=Feed(
        open=feed.open_feed,
        open_phase=feed.open_phase,
        extend=feed.extend,
        ask_small=prefetch.ask_small,
        ask_qkv=feed.keep,
        ask_part_of_qkv=prefetch.ask_part_of_qkv,
        ask_o=feed.fill_ring,
        ask_experts=feed.ask_experts,
        ask_head=feed.keep_for_head,
    ),
    dense=Dense(
        load_vector=dense.load_vector,
        load_normed=dense.load_normed,
        multiply=dense.multiply,
        e4m3_to_float32=ptx.e4m3_to_float32,
    ),
    experts=Experts(
        is_packed=True,
        store_input=experts.store_input,
        load_input=experts.load_input,
        store_act=experts.store_act,
        load_act=experts.load_act,
        multiply=experts.multiply,
    ),
    prompts=TILES,
)
