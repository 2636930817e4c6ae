"""Programs that run concurrently in the interpreter: order, deadlocks and races of kernels whose faults are known."""

import itertools
import threading
import time

import pytest
import torch
import triton
import triton.language as tl

import interpreter
from common.gfx950 import GFX950


@triton.jit
def grid_barrier(counter_ptr, target, RELEASE: tl.constexpr, ACQUIRE: tl.constexpr):
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem=RELEASE)
    while tl.atomic_add(counter_ptr, 0, sem="relaxed") < target:
        pass
    seen = tl.atomic_add(counter_ptr, 0, sem=ACQUIRE)
    tl.debug_barrier()
    return seen


@triton.jit
def rotate_kernel(
    buffers,
    counter_ptr,
    order_ptr,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    FAULT: tl.constexpr,
    RELEASE: tl.constexpr,
    ACQUIRE: tl.constexpr,
):
    """Copy the neighbour's block from one buffer to the other in each step, with a barrier between the steps."""
    pid = tl.program_id(0)
    count = tl.num_programs(0)
    at = tl.arange(0, N)
    tl.store(order_ptr + tl.atomic_add(counter_ptr + 1, 1, sem="relaxed"), pid)
    for step in tl.static_range(STEPS):
        source, target = buffers[step % 2], buffers[(step + 1) % 2]
        values = tl.load(source + (pid + 1) % count * N + at)
        if FAULT != "late store":
            tl.store(target + pid * N + at, values + 1)
        if not (FAULT == "no barrier" and step == 1):
            grid_barrier(counter_ptr, (step + 1) * count, RELEASE, ACQUIRE)
        if FAULT == "late store":
            tl.store(target + pid * N + at, values + 1)


def rotate(programs, seed, fault=None, release="release", acquire="acquire", detect_races=True, steps=3):
    buffers = (torch.arange(programs * 4, dtype=torch.float32), torch.zeros(programs * 4))
    counter = torch.zeros(2, dtype=torch.int32)
    if fault == "no barrier":
        counter[0] = programs  # the later barriers do not wait for the missing one
    order = torch.zeros(programs, dtype=torch.int32)
    with interpreter.simulate(seed=seed, detect_races=detect_races) as simulation:
        rotate_kernel[(programs,)](buffers, counter, order, steps, 4, fault, release, acquire)
    return buffers[steps % 2], order.tolist(), simulation


@pytest.mark.parametrize("seed", range(4))
def test_a_right_barrier_works_and_has_no_races(seed):
    result, _, simulation = rotate(8, seed)
    assert torch.equal(result, torch.arange(32).roll(-12) + 3.0)
    assert simulation.races == []
    assert simulation.switches > 8 * 3


@pytest.mark.parametrize(
    ("fault", "release", "acquire"),
    [
        ("no barrier", "release", "acquire"),
        ("late store", "release", "acquire"),
        (None, "relaxed", "acquire"),
        (None, "release", "relaxed"),
        (None, "acquire", "acquire"),
        (None, "release", "release"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_a_wrong_barrier_races(fault, release, acquire, seed):
    _, _, simulation = rotate(4, seed, fault, release, acquire)
    assert simulation.races
    race = simulation.races[0]
    assert "buffers[" in race
    assert "test_programs.py:" in race
    assert "races with" in race


def test_the_seed_decides_the_order():
    orders = [rotate(8, seed, detect_races=False)[1] for seed in range(5)]
    assert orders == [rotate(8, seed, detect_races=False)[1] for seed in range(5)]
    assert len({tuple(order) for order in orders}) > 1
    assert all(sorted(order) == list(range(8)) for order in orders)


@triton.jit
def merge_kernel(parts_ptr, counter_ptr, out_ptr, SEMANTICS: tl.constexpr):
    """Leave a part; the last program to arrive adds up all parts."""
    pid = tl.program_id(0)
    count = tl.num_programs(0)
    tl.store(parts_ptr + pid, (pid + 1).to(tl.float32))
    arrived = tl.atomic_add(counter_ptr, 1, sem=SEMANTICS)
    if arrived == count - 1:
        total = 0.0
        for other in range(count):
            total += tl.load(parts_ptr + other)
        tl.store(out_ptr, total)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("semantics", "clean"), [("acq_rel", True), ("relaxed", False), ("release", False), ("acquire", False)]
)
def test_last_arriver_merge(seed, semantics, clean):
    out = torch.zeros(1)
    with interpreter.simulate(seed=seed, detect_races=True) as simulation:
        merge_kernel[(6,)](torch.zeros(6), torch.zeros(1, dtype=torch.int32), out, semantics)
    assert out.item() == 21
    assert (simulation.races == []) == clean
    assert all("parts_ptr" in race for race in simulation.races)


@triton.jit
def written_back_kernel(data_ptr, flags_ptr, out_ptr, KIND: tl.constexpr, MACHINE: tl.constexpr):
    """Let program 1 acquire a relaxed atomic of program 0, and read what program 0 stored before it."""
    if tl.program_id(0) == 0:
        if KIND != "stored after":
            tl.store(data_ptr, 5.0)
        if KIND != "none":
            MACHINE.sync.publish()
        if KIND == "stored after":
            tl.store(data_ptr, 5.0)
        if KIND == "not the next":
            tl.atomic_add(flags_ptr + 32, 1, sem="relaxed")
        tl.atomic_add(flags_ptr, 1, sem="relaxed")
    else:
        while tl.atomic_add(flags_ptr, 0, sem="acquire") < 1:
            pass
        tl.store(out_ptr, tl.load(data_ptr))
        tl.store(flags_ptr, 0)  # the atomic too came before


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("kind", "clean"), [("written back", True), ("none", False), ("stored after", False), ("not the next", False)]
)
def test_a_write_back_orders_what_was_stored_before_the_next_atomic(kind, clean, seed):
    out = torch.zeros(1)
    with interpreter.simulate(seed=seed, detect_races=True) as simulation:
        written_back_kernel[(2,)](torch.zeros(1), torch.zeros(64, dtype=torch.int32), out, kind, GFX950)
    assert out.item() == 5
    assert (simulation.races == []) == clean
    assert clean or any("data_ptr" in race for race in simulation.races)


@triton.jit
def release_sequence_kernel(data_ptr, flag_ptr, out_ptr):
    """Program 0 releases 1, program 1 adds 1 relaxed, program 2 acquires 2, which orders it after program 0."""
    pid = tl.program_id(0)
    if pid == 0:
        tl.store(data_ptr, 5.0)
        tl.atomic_add(flag_ptr, 1, sem="release")
    elif pid == 1:
        while tl.atomic_add(flag_ptr, 0, sem="relaxed") < 1:
            pass
        tl.atomic_add(flag_ptr, 1, sem="relaxed")
    else:
        while tl.atomic_cas(flag_ptr, 2, 3, sem="acquire") != 2:
            pass
        tl.store(out_ptr, tl.load(data_ptr))


@pytest.mark.parametrize("seed", range(4))
def test_a_relaxed_atomic_continues_the_release_sequence(seed):
    out = torch.zeros(1)
    with interpreter.simulate(seed=seed, detect_races=True) as simulation:
        release_sequence_kernel[(3,)](torch.zeros(1), torch.zeros(1, dtype=torch.int32), out)
    assert out.item() == 5
    assert simulation.races == []


@triton.jit
def overwritten_flag_kernel(data_ptr, flag_ptr, out_ptr):
    """Program 0 releases 1, then writes 2 plainly; program 1 acquires the 2, which orders nothing."""
    if tl.program_id(0) == 0:
        tl.store(data_ptr, 5.0)
        tl.atomic_add(flag_ptr, 1, sem="release")
        tl.store(flag_ptr, 2)
    else:
        while tl.atomic_add(flag_ptr, 0, sem="relaxed") < 2:
            pass
        tl.atomic_add(flag_ptr, 0, sem="acquire")
        tl.store(out_ptr, tl.load(data_ptr))


@pytest.mark.parametrize("seed", range(4))
def test_a_plain_store_ends_the_release_sequence(seed):
    with interpreter.simulate(seed=seed, detect_races=True) as simulation:
        overwritten_flag_kernel[(2,)](torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(1))
    assert any("data_ptr" in race for race in simulation.races)


@triton.jit
def mixed_access_kernel(flag_ptr, KIND: tl.constexpr):
    pid = tl.program_id(0)
    if pid == 0:
        tl.atomic_add(flag_ptr, 1)
    elif KIND == "atomic":
        tl.atomic_add(flag_ptr, 1, sem="relaxed")
    elif KIND == "load":
        tl.load(flag_ptr)
    elif KIND == "volatile load":
        tl.load(flag_ptr, volatile=True)
    elif KIND == "store":
        tl.store(flag_ptr, 3)
    elif KIND == "other half":
        tl.store((flag_ptr + 1).to(tl.pointer_type(tl.int16), bitcast=True), tl.full((), 1, tl.int16))
    elif KIND == "same half":
        tl.store(flag_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + 1, tl.full((), 1, tl.int16))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    ("kind", "races"),
    [
        ("atomic", False),
        ("load", True),
        ("volatile load", False),
        ("store", True),
        ("other half", False),
        ("same half", True),
    ],
)
def test_plain_accesses_race_with_atomics(kind, races, seed):
    with interpreter.simulate(seed=seed, detect_races=True) as simulation:
        mixed_access_kernel[(2,)](torch.zeros(2, dtype=torch.int32), kind)
    assert bool(simulation.races) == races
    assert all("atomic" in race and "flag_ptr+" in race for race in simulation.races)


@triton.jit
def table_kernel(table_ptr):
    pointer = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    tl.store(pointer + 3, tl.program_id(0).to(tl.float32))


def test_watched_tensors_are_followed_through_a_table_of_addresses():
    data = torch.zeros(8)
    table = torch.tensor([data.data_ptr()])
    with interpreter.simulate(detect_races=True) as simulation:
        table_kernel[(2,)](table)
    assert simulation.races == []
    with interpreter.simulate(detect_races=True, watch={"scratch": {"hidden": data}}) as simulation:
        table_kernel[(2,)](table)
    assert len(simulation.races) == 1
    assert "scratch['hidden']+12" in simulation.races[0]


@triton.jit
def two_flags_kernel(flags_ptr, out_ptr, TURNS: tl.constexpr):
    """Wait for flag 0 in even programs, for flag 1 in odd ones; nobody sets them. Give up after TURNS."""
    pid = tl.program_id(0)
    turns = 0
    if pid % 2 == 0:
        while tl.atomic_add(flags_ptr, 0, sem="relaxed") == 0 and turns != TURNS:
            turns += 1
    else:
        while tl.load(flags_ptr + 1, volatile=True) == 0 and turns != TURNS:
            turns += 1
    tl.store(out_ptr + pid, turns)


@pytest.mark.parametrize("programs", [1, 8])
def test_deadlock_is_found(programs):
    flags, out = torch.zeros(2, dtype=torch.int32), torch.zeros(8, dtype=torch.int32)
    threads = threading.active_count()
    start = time.perf_counter()
    with pytest.raises(interpreter.GridDeadlock) as caught:
        two_flags_kernel[(programs,)](flags, out, -1)
    assert time.perf_counter() - start < 5  # 0.3 s where nothing else runs
    message = str(caught.value)
    for number in range(programs):
        assert f"program ({number}, 0, 0) at test_programs.py:" in message
    assert threading.active_count() == threads


def test_a_kernel_may_bound_its_spinning_itself():
    flags, out = torch.zeros(2, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    with interpreter.simulate(deadlock_limit=None):
        two_flags_kernel[(4,)](flags, out, 1500)
    assert out.tolist() == [1500] * 4
    with interpreter.simulate(deadlock_limit=2000):
        two_flags_kernel[(4,)](flags, out, 1500)
    with pytest.raises(interpreter.GridDeadlock), interpreter.simulate(deadlock_limit=50):
        two_flags_kernel[(4,)](flags, out, 1500)


@triton.jit
def relay_kernel(token_ptr, ROUNDS: tl.constexpr, VOLATILE: tl.constexpr):
    """Pass a token round; only the token's atomics change memory."""
    pid = tl.program_id(0)
    count = tl.num_programs(0)
    for turn in range(ROUNDS):
        if VOLATILE:
            while tl.load(token_ptr, volatile=True) != turn * count + pid:
                pass
        else:
            while tl.atomic_add(token_ptr, 0, sem="relaxed") != turn * count + pid:
                pass
        tl.atomic_add(token_ptr, 1, sem="relaxed")


@pytest.mark.parametrize("volatile", [False, True])
def test_progress_by_atomics_alone_is_no_deadlock(volatile):
    token = torch.zeros(1, dtype=torch.int32)
    with interpreter.simulate(deadlock_limit=30):
        relay_kernel[(3,)](token, 50, volatile)
    assert token.item() == 150


@triton.jit
def failing_kernel(counter_ptr):
    if tl.program_id(0) == 2:
        tl.static_assert(False, "program 2 fails")
    grid_barrier(counter_ptr, 4, "release", "acquire")


def test_an_exception_in_one_program_ends_the_grid():
    threads = threading.active_count()
    for _ in range(3):
        with pytest.raises(AssertionError, match="program 2 fails"):
            failing_kernel[(4,)](torch.zeros(1, dtype=torch.int32))
        assert threading.active_count() == threads
    # A later launch is not affected.
    assert rotate(4, 0)[2].races == []


@triton.jit
def identify_kernel(out_ptr, counter_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    count = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    grid_barrier(counter_ptr, count, "release", "acquire")
    tl.store(out_ptr + x * 6 + y * 3 + z, x * 100 + y * 10 + z)


def test_programs_keep_their_number_across_switches():
    out = torch.zeros(12, dtype=torch.int32)
    identify_kernel[lambda arguments: (2, 2, 3)](out, torch.zeros(1, dtype=torch.int32))
    assert out.tolist() == [100 * x + 10 * y + z for x, y, z in itertools.product(range(2), range(2), range(3))]


@triton.jit
def hand_over_kernel(place_ptr, WRITTEN_THROUGH: tl.constexpr, VOLATILE: tl.constexpr):
    if tl.program_id(0) == 0:
        if WRITTEN_THROUGH:
            tl.store(place_ptr, 1, cache_modifier=".wt")
        else:
            tl.store(place_ptr, 1)
    else:
        tl.load(place_ptr, volatile=VOLATILE)


@pytest.mark.parametrize("written_through, volatile", [(True, True), (True, False), (False, True), (False, False)])
def test_stores_that_are_written_through_may_meet_volatile_loads(written_through, volatile):
    """Any other pair of a store and a load that nothing orders is a race."""
    with interpreter.simulate(seed=1, detect_races=True) as simulation:
        hand_over_kernel[(2,)](torch.zeros(1, dtype=torch.int64), written_through, volatile)
    assert bool(simulation.races) != (written_through and volatile)
