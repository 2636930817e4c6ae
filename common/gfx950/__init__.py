"""AMD MI350X and MI355X: rows are read straight from memory, those of a dense tile one tile ahead."""

from common import plain_sync, rows
from common.gfx950 import asm, feed
from common.machine import Dense, Feed, Machine, Synchronization
from common.prompt_rows import ROWS

SYNC = Synchronization(
    publish=asm.publish,
    release="relaxed",  # `publish` has written back
    acquire_release="acquire",
    poll=plain_sync.poll,
    acquire=plain_sync.acquire,
    clock_ns=asm.clock_ns,
)
GFX950 = Machine(
    name="gfx950",
    opaque_zero=asm.opaque_zero,
    load_now=asm.load_now,
    sync=SYNC,
    rank_sync=SYNC._replace(
        publish=asm.publish_to_ranks,
        release="release",  # the flag follows the arrivals of other programs, which have each written back
        poll=plain_sync.poll_ranks,
        acquire=plain_sync.acquire_from_ranks,
    ),
    feed=Feed(
        open=feed.open_feed,
        open_phase=feed.open_phase,
        extend=rows.extend,
        ask_small=rows.ask_nothing_small,
        ask_qkv=feed.ask_qkv,
        ask_part_of_qkv=rows.ask_no_part,
        ask_o=feed.ask_o,
        ask_experts=rows.ask_no_experts,
        ask_head=feed.ask_head,
    ),
    dense=Dense(
        load_vector=rows.load_vector,
        load_normed=rows.load_normed,
        multiply=feed.multiply,
        e4m3_to_float32=asm.e4m3_to_float32,
    ),
    experts=rows.EXPERTS._replace(e2m1_words_to_float32=asm.e2m1_words_to_float32, e2m1_half_bias=1.0),
    prompts=ROWS,
)
