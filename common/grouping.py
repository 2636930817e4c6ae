"""(token, expert) pairs in the order of their experts, so that an expert's weights meet all its tokens at once.

Pair number token * top_k + slot is a token's choice at that slot. Within an expert pairs keep their order: nothing
depends on who ran when.
"""

import triton
import triton.language as tl


@triton.jit
def group_pairs(chosen_ptr, order_ptr, starts_ptr, expert, n_pairs, BLOCK: tl.constexpr):
    """Write one expert's pairs to their places in order int32 [n_pairs], and where they begin and end.

    chosen_ptr: int32 [n_pairs], experts; starts_ptr: int32 [experts + 1].
    """
    below = tl.zeros([BLOCK], tl.int32)
    own = tl.zeros([BLOCK], tl.int32)
    for first in range(0, n_pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        chosen = tl.load(chosen_ptr + pair, mask=pair < n_pairs, other=0x7FFFFFFF)
        below += (chosen < expert).to(tl.int32)
        own += (chosen == expert).to(tl.int32)
    start = tl.sum(below, axis=0)
    tl.store(starts_ptr + expert, start)
    tl.store(starts_ptr + expert + 1, start + tl.sum(own, axis=0))  # the same from the next expert
    for first in range(0, n_pairs, BLOCK):
        pair = first + tl.arange(0, BLOCK)
        chosen = tl.load(chosen_ptr + pair, mask=pair < n_pairs, other=0x7FFFFFFF)
        mine = (chosen == expert).to(tl.int32)
        tl.store(order_ptr + start + tl.cumsum(mine, axis=0) - 1, pair, mask=mine > 0)
        start += tl.sum(mine, axis=0)


@triton.jit
def find_block(starts_ptr, block, E: tl.constexpr, BLOCK_N: tl.constexpr):
    """(expert, first place, end) of block number `block` when each expert's pairs are cut into blocks of BLOCK_N.

    The expert is E if there are fewer blocks.
    """
    e = tl.arange(0, triton.next_power_of_2(E))
    start = tl.load(starts_ptr + e, mask=e < E, other=0)
    end = tl.load(starts_ptr + e + 1, mask=e < E, other=0)
    n_blocks = (end - start + BLOCK_N - 1) // BLOCK_N
    before = tl.cumsum(n_blocks, axis=0) - n_blocks
    mine = (e < E) & (before <= block) & (block < before + n_blocks)
    found = tl.sum(mine.to(tl.int32), axis=0) > 0
    expert = tl.where(found, tl.sum(tl.where(mine, e, 0), axis=0), E)
    first = tl.sum(tl.where(mine, start + (block - before) * BLOCK_N, 0), axis=0)
    return expert, first, tl.sum(tl.where(mine, end, 0), axis=0)
