"""Values that programs hand each other one by one, each in one piece with the number of its exchange, its epoch.

    packet, int64    | epoch, upper 32 bits | float32 value |

A value is there when its epoch is: no fence, no arrival and no flag has to tell. An exchange whose packets lie at the
same places as another one's needs another epoch, and its packets must not come before the others are read.
"""

import triton
import triton.language as tl

NO_EPOCH = tl.constexpr(0)  # of packets that nobody takes for values


@triton.jit
def pack(value, epoch):
    """Return the packets of float32 values."""
    return (tl.cast(epoch, tl.int64) << 32) | (value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def value_of(packet):
    """Return the float32 values of packets."""
    return packet.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def send(packet_ptr, packet, mask):
    """Store packets where all programs of all GPUs see them."""
    tl.store(packet_ptr, packet, mask=mask, cache_modifier=".wt")


@triton.jit
def receive(pointers, mask, epoch, SPIN_LIMIT: tl.constexpr, MACHINE: tl.constexpr):
    """Wait for packets of an epoch at a tuple of pointers. Return them, and at how many places one is missing.

    None is unless it gave up after SPIN_LIMIT polls. With NO_EPOCH it does not wait. All pointers lead to packets, also
    where the mask is False.
    """
    N: tl.constexpr = len(pointers)
    packets = ()
    for n in tl.static_range(N):
        packets = packets + (tl.zeros(pointers[n].shape, tl.int64),)
    n_missing = tl.where(epoch == NO_EPOCH, 0, 1)
    spins = 0
    while (n_missing > 0) & (spins < SPIN_LIMIT):
        packets = load_all(pointers, MACHINE)
        n_missing = count_missing(packets, mask, epoch)
        spins += 1
    return packets, n_missing


@triton.jit
def load_all(pointers, MACHINE: tl.constexpr):
    """Return what is at each pointer of a tuple now."""
    N: tl.constexpr = len(pointers)
    packets = ()
    for n in tl.static_range(N):
        packets = packets + (MACHINE.load_now(pointers[n]),)
    return packets


@triton.jit
def count_missing(packets, mask, epoch):
    """Return at how many places of a tuple of packets one is not of this epoch."""
    N: tl.constexpr = len(packets)
    is_missing = mask & (packets[0] >> 32 != epoch)
    for n in tl.static_range(1, N):
        is_missing |= mask & (packets[n] >> 32 != epoch)
    return tl.sum(tl.reshape(is_missing.to(tl.int32), (is_missing.numel,)), axis=0)
