"""The grid barrier: right under any schedule, free of races, each of its parts needed, and never an endless wait."""

import contextlib
import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from made_up_models import loud_checkpoint, small_config
from tunings import ahead_tiles, ring_tiles, small_tiles

import gpt_oss_megakernel
from common import barrier, plain_sync
from common.cpu import CPU
from common.gfx950 import GFX950
from common.machine import Machine
from common.sm90 import SM_90
from gpt_oss_megakernel import MegaModel
from host.phases import PHASES, barrier_name
from interpreter import simulate
from measure.random_cache import fill_cache
from system.errors import MegakernelAborted

SPINS = 10_000
SEEDS = range(4)
MACHINES = {machine.name: machine for machine in (CPU, GFX950, SM_90)}

with_polls = pytest.mark.parametrize("machine", [CPU, SM_90], ids=["cpu", "sm_90"])  # gfx950 polls as the CPU does
with_machines = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES.keys())


@triton.jit
def exchange_kernel(
    slots_ptr,
    wrong_ptr,
    sync_ptr,
    n_programs,
    N_ROUNDS: tl.constexpr,
    SPINS: tl.constexpr,
    MACHINE: tl.constexpr,
):
    """Write the program's slot each round, and count after a barrier the slots that are not this round's."""
    program = tl.program_id(0)
    for i in range(N_ROUNDS):
        tl.store(slots_ptr + program, i + 1)
        barrier.grid_barrier(sync_ptr, 2 * i + 1, n_programs, SPINS, MACHINE)
        for other in range(n_programs):
            seen = tl.load(slots_ptr + other)
            if seen != i + 1:
                tl.store(wrong_ptr + program, tl.load(wrong_ptr + program) + 1)
        barrier.grid_barrier(sync_ptr, 2 * i + 2, n_programs, SPINS, MACHINE)
    barrier.leave_grid(sync_ptr, n_programs, MACHINE)


def exchange(
    machine: Machine, n_programs: int, n_rounds: int, grid: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (wrong counts, sync words) after one launch."""
    slots = torch.zeros(n_programs, dtype=torch.int32)
    wrong = torch.zeros(n_programs, dtype=torch.int32)
    sync = torch.zeros(barrier.SYNC_WORDS, dtype=torch.int32)
    exchange_kernel[(grid or n_programs,)](
        slots, wrong, sync, n_programs, N_ROUNDS=n_rounds, SPINS=SPINS, MACHINE=machine
    )
    return wrong, sync


@with_machines
@pytest.mark.parametrize("n_programs", [1, 2, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_program_sees_what_was_stored_before_the_barrier(n_programs, seed, machine):
    with simulate(seed=seed, detect_races=True) as simulation:
        wrong, sync = exchange(machine, n_programs, n_rounds=6)
    assert not simulation.races
    assert not wrong.any()
    assert not sync.any(), "ready for the next launch"


@with_machines
def test_many_rounds(machine):
    with simulate(seed=9):
        wrong, _ = exchange(machine, 8, n_rounds=60)
    assert not wrong.any()


def mutated(module, tmp_path: Path, old: str, new: str):
    """Import a copy of a module with one piece of its text replaced."""
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    path = tmp_path / "mutated.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutated", path)
    changed_module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(changed_module)
    return changed_module


def with_sync(machine: Machine, **changes) -> Machine:
    """Make a machine that synchronizes its programs in another way."""
    return dataclasses.replace(machine, sync=machine.sync._replace(**changes))


# Each machine without a part of what orders its programs: gfx950 writes back before relaxed atomics; the polls of sm_90
# acquire, those of the others do not.
WEAKER_MACHINES = {
    "cpu, release weakened": with_sync(CPU, release="relaxed"),
    "cpu, acquire weakened": with_sync(CPU, acquire=SM_90.sync.acquire),
    "gfx950, no write-back": with_sync(GFX950, publish=CPU.sync.publish),
    "gfx950, acquire weakened": with_sync(GFX950, acquire=SM_90.sync.acquire),
    "sm_90, release weakened": with_sync(SM_90, release="relaxed"),
    "sm_90, polls weakened": with_sync(SM_90, poll=CPU.sync.poll),
}
with_weaker_machines = pytest.mark.parametrize("machine", WEAKER_MACHINES.values(), ids=WEAKER_MACHINES.keys())


@with_weaker_machines
def test_each_part_of_a_machine_s_order_is_needed(machine):
    assert races_of_exchange(machine)


def test_an_acquire_that_is_relaxed_is_caught(tmp_path):
    relaxed = mutated(plain_sync, tmp_path, 'sem="acquire", scope="gpu"', 'sem="relaxed", scope="gpu"')
    assert races_of_exchange(with_sync(CPU, acquire=relaxed.acquire))


def races_of_exchange(machine: Machine) -> list[str]:
    races = []
    for seed in SEEDS:
        with simulate(seed=seed, detect_races=True) as simulation:
            exchange(machine, 8, n_rounds=3)
        races += simulation.races
    return races


BARRIER_MUTATIONS = {
    "does not publish": (
        "MACHINE.sync.publish()\n    tl.atomic_add(counter_ptr, 1, sem=MACHINE.sync.release",
        'tl.atomic_add(counter_ptr, 1, sem="relaxed"',
    ),
    "does not acquire": ("return SYNC.acquire(counter_ptr, arrived)", "return arrived"),
    "target one too low": ("index * n_programs, sync_ptr", "index * n_programs - 1, sync_ptr"),
    "does not wait": ("(arrived < target) & (spins < SPIN_LIMIT)", "arrived < 0"),
}


@pytest.mark.parametrize("old, new", BARRIER_MUTATIONS.values(), ids=BARRIER_MUTATIONS.keys())
def test_each_part_of_the_barrier_is_needed(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(barrier, "grid_barrier", mutated(barrier, tmp_path, old, new).grid_barrier)
    assert races_of_exchange(CPU)


def test_a_missing_barrier_is_caught(monkeypatch):
    monkeypatch.setattr(barrier, "grid_barrier", lambda *args: None)
    with simulate(detect_races=True) as simulation:
        wrong, _ = exchange(CPU, 8, n_rounds=3)
    assert simulation.races
    assert wrong.any()


@with_polls
def test_a_program_that_never_arrives_ends_the_launch(machine):
    """Seven programs of eight give up, at the first barrier, which the record names."""
    with simulate(deadlock_limit=None):
        _, sync = exchange(machine, 8, n_rounds=3, grid=7)
    assert sync[barrier.ABORT.value] == 1


@triton.jit
def halves_kernel(
    slots_ptr,
    between_ptr,
    wrong_ptr,
    sync_ptr,
    n_programs,
    SPINS: tl.constexpr,
    EARLY: tl.constexpr,
    MACHINE: tl.constexpr,
):
    """Store to a place of its own between a barrier's halves, and read afterwards all that came before.

    With EARLY the program reads between the halves instead, when others may not have stored yet.
    """
    program = tl.program_id(0)
    tl.store(slots_ptr + program, 1)
    barrier.arrive(sync_ptr, MACHINE)
    tl.store(between_ptr + program, 1)
    if not EARLY:
        barrier.wait(sync_ptr, 1, n_programs, SPINS, MACHINE)
    for other in range(n_programs):
        if tl.load(slots_ptr + other) != 1:
            tl.store(wrong_ptr + program, 1)
    if EARLY:
        barrier.wait(sync_ptr, 1, n_programs, SPINS, MACHINE)
    barrier.leave_grid(sync_ptr, n_programs, MACHINE)


@with_machines
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("early", [False, True])
def test_what_came_before_the_first_half_is_seen_after_the_second(early, seed, machine):
    slots, between, wrong = (torch.zeros(5, dtype=torch.int32) for _ in range(3))
    sync = torch.zeros(barrier.SYNC_WORDS, dtype=torch.int32)
    with simulate(seed=seed, detect_races=True) as simulation:
        halves_kernel[(5,)](slots, between, wrong, sync, 5, SPINS=SPINS, EARLY=early, MACHINE=machine)
    assert bool(simulation.races) == early
    assert between.all()
    assert early or not wrong.any()
    assert not sync.any(), "ready for the next launch"


@triton.jit
def between_kernel(between_ptr, out_ptr, sync_ptr, n_programs, SPINS: tl.constexpr, MACHINE: tl.constexpr):
    program = tl.program_id(0)
    barrier.arrive(sync_ptr, MACHINE)
    tl.store(between_ptr + program, 1)
    barrier.wait(sync_ptr, 1, n_programs, SPINS, MACHINE)
    tl.store(out_ptr + program, tl.load(between_ptr + (program + 1) % n_programs))


@with_machines
def test_what_is_stored_between_the_halves_is_not_ordered(machine):
    between, out = (torch.zeros(5, dtype=torch.int32) for _ in range(2))
    sync = torch.zeros(barrier.SYNC_WORDS, dtype=torch.int32)
    with simulate(detect_races=True) as simulation:
        between_kernel[(5,)](between, out, sync, 5, SPINS=SPINS, MACHINE=machine)
    assert simulation.races


@triton.jit
def counted_kernel(
    parts_ptr,
    sums_ptr,
    counters_ptr,
    sync_ptr,
    n_programs,
    SPINS: tl.constexpr,
    N_SUMS: tl.constexpr,
    N_PARTS: tl.constexpr,
    MISSING: tl.constexpr,
    MACHINE: tl.constexpr,
):
    """Make parts of sums, then take sums whose parts have all been counted, without a barrier.

    One arrival for sum MISSING is left out; -1: none.
    """
    program = tl.program_id(0)
    for part in range(program, N_SUMS * N_PARTS, n_programs):
        tl.store(parts_ptr + part, part + 1)
        if part != MISSING * N_PARTS:
            barrier.count_arrival(counters_ptr + part // N_PARTS, MACHINE)
    for i in range(program, N_SUMS, n_programs):
        barrier.wait_for(counters_ptr + i, N_PARTS, sync_ptr, 7 + i, SPINS, MACHINE.sync)
        total = 0
        for part in range(N_PARTS):
            total += tl.load(parts_ptr + i * N_PARTS + part)
        tl.store(sums_ptr + i, total)


N_SUMS, N_PARTS = 4, 3
SUMS = torch.arange(1, 1 + N_SUMS * N_PARTS).view(N_SUMS, N_PARTS).sum(-1).tolist()


def count(machine: Machine, n_programs: int, missing: int = -1) -> tuple[list[int], list[int], torch.Tensor]:
    """Return (sums, counters, sync words) after one launch."""
    parts, sums, counters = (torch.zeros(n, dtype=torch.int32) for n in (N_SUMS * N_PARTS, N_SUMS, N_SUMS))
    sync = torch.zeros(barrier.SYNC_WORDS, dtype=torch.int32)
    counted_kernel[(n_programs,)](
        parts, sums, counters, sync, n_programs, SPINS, N_SUMS=N_SUMS, N_PARTS=N_PARTS, MISSING=missing, MACHINE=machine
    )
    return sums.tolist(), counters.tolist(), sync


@with_machines
@pytest.mark.parametrize("n_programs", [1, 3, 4, 12, 15])
@pytest.mark.parametrize("seed", SEEDS)
def test_who_waits_for_a_count_sees_what_was_stored_before_it(n_programs, seed, machine):
    with simulate(seed=seed, detect_races=True) as simulation:
        sums, counters, sync = count(machine, n_programs)
    assert not simulation.races
    assert sums == SUMS
    assert counters == [N_PARTS] * N_SUMS
    assert not sync.any(), "no barrier took part"


COUNT_MUTATIONS = {name: BARRIER_MUTATIONS[name] for name in ("does not publish", "does not acquire", "does not wait")}
COUNT_MUTATIONS |= {
    "one arrival too few": (
        "(arrived < target) & (spins < SPIN_LIMIT)",
        "(arrived < target - 1) & (spins < SPIN_LIMIT)",
    ),
    "another counter": (
        "arrived = SYNC.poll(counter_ptr, target)",
        "arrived = SYNC.poll(counter_ptr - 1, target)",
    ),
}


@pytest.mark.parametrize("old, new", COUNT_MUTATIONS.values(), ids=COUNT_MUTATIONS.keys())
def test_each_part_of_a_count_is_needed(old, new, tmp_path, monkeypatch):
    module = mutated(barrier, tmp_path, old, new)
    for name in ("count_arrival", "wait_for"):
        monkeypatch.setattr(barrier, name, getattr(module, name))
    assert races_of_count(CPU)


@with_weaker_machines
def test_each_part_of_a_machine_s_order_is_needed_by_a_count(machine):
    assert races_of_count(machine)


def races_of_count(machine: Machine) -> list[str]:
    races = []
    for seed in SEEDS:
        with simulate(seed=seed, detect_races=True, deadlock_limit=None) as simulation:
            count(machine, 4)
        races += simulation.races
    return races


@with_polls
@pytest.mark.parametrize("n_programs", [1, 5])
@pytest.mark.parametrize("missing", range(N_SUMS))
def test_a_missing_arrival_makes_the_wait_give_up(missing, n_programs, machine):
    """The record holds the number that the wait was called with; the other counts complete, and all barriers open."""
    with simulate(deadlock_limit=None):
        sums, counters, sync = count(machine, n_programs, missing)
    assert sync[barrier.ABORT.value] == 7 + missing
    assert sync[barrier.ARRIVALS.value] == barrier.OPEN_ALL.value
    assert [c for i, c in enumerate(counters) if i != missing] == [N_PARTS] * (N_SUMS - 1)
    assert counters[missing] == N_PARTS - 1
    assert [total for i, total in enumerate(sums) if i != missing] == [SUMS[i] for i in range(N_SUMS) if i != missing]


@triton.jit
def stuck_kernel(
    counter_ptr, sync_ptr, n_programs, SPINS: tl.constexpr, FEW_SPINS: tl.constexpr, MACHINE: tl.constexpr
):
    """Let program 0 wait for a count that nothing makes, and the others at barrier 1, then at barrier 2."""
    if tl.program_id(0) == 0:
        barrier.wait_for(counter_ptr, 1, sync_ptr, 7, FEW_SPINS, MACHINE.sync)
    barrier.grid_barrier(sync_ptr, 1, n_programs, SPINS, MACHINE)
    barrier.grid_barrier(sync_ptr, 2, n_programs, SPINS, MACHINE)
    barrier.leave_grid(sync_ptr, n_programs, MACHINE)


@with_machines
def test_a_wait_that_gives_up_opens_the_barriers(machine):
    """The record names the first wait that gave up, until it is cleared; the next launch is then normal."""
    counter, sync = torch.zeros(1, dtype=torch.int32), torch.zeros(barrier.SYNC_WORDS, dtype=torch.int32)
    with simulate(deadlock_limit=None):
        stuck_kernel[(5,)](counter, sync, 5, SPINS=SPINS, FEW_SPINS=50, MACHINE=machine)
    assert sync[barrier.ABORT.value] == 7
    sync[barrier.ABORT.value] = 0
    assert not sync.any()
    sync[barrier.ABORT.value] = 3
    with simulate(deadlock_limit=None):
        stuck_kernel[(5,)](counter, sync, 5, SPINS=SPINS, FEW_SPINS=50, MACHINE=machine)
    assert sync[barrier.ABORT.value] == 3
    sync[barrier.ABORT.value] = 0
    counter += 1
    stuck_kernel[(5,)](counter, sync, 5, SPINS=SPINS, FEW_SPINS=50, MACHINE=machine)
    assert not sync.any()


@triton.jit
def last_sums_kernel(parts_ptr, sum_ptr, counter_ptr, N: tl.constexpr, BLOCK: tl.constexpr, MACHINE: tl.constexpr):
    program = tl.program_id(0)
    tl.store(parts_ptr + program, program + 1)
    if barrier.arrive_last(counter_ptr, N, MACHINE):
        part = tl.arange(0, BLOCK)
        total = tl.sum(tl.load(parts_ptr + part, mask=part < N, other=0), axis=0)
        tl.store(sum_ptr, tl.load(sum_ptr) + total)


@with_machines
@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_to_arrive_sees_all_parts(seed, machine):
    parts, total, counter = (torch.zeros(n, dtype=torch.int32) for n in (7, 1, 1))
    with simulate(seed=seed, detect_races=True) as simulation:
        last_sums_kernel[(7,)](parts, total, counter, N=7, BLOCK=8, MACHINE=machine)
    assert (int(total), int(counter), simulation.races) == (28, 0, [])


@pytest.mark.parametrize(
    "machine",
    [
        with_sync(CPU, acquire_release="relaxed"),
        with_sync(GFX950, acquire_release="relaxed"),
        WEAKER_MACHINES["gfx950, no write-back"],
    ],
    ids=["cpu, relaxed", "gfx950, relaxed", "gfx950, no write-back"],
)
def test_the_last_to_arrive_needs_its_ordering(machine):
    parts, total, counter = (torch.zeros(n, dtype=torch.int32) for n in (7, 1, 1))
    with simulate(detect_races=True) as simulation:
        last_sums_kernel[(7,)](parts, total, counter, N=7, BLOCK=8, MACHINE=machine)
    assert simulation.races


POSITION = 40  # beyond the window of 20, and far enough for several splits of the full-attention layer


# With and without --quant. Weights of the next phase are asked for, or loaded, between a barrier's halves.
KINDS = {
    "loaded ahead": (False, ahead_tiles, {}),
    "quant": (True, small_tiles, {}),
    "ring, quant": (True, ring_tiles, {}),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def model_with_cache(request):
    """Make two layers with several tiles a phase and POSITION positions in the cache.

    There are five programs: of four, each would have one expert to itself and need no barrier between gate-up and down.
    """
    quant, tiles, changes = request.param
    config = small_config(n_layers=2, layer_is_sliding=(True, False))
    model = MegaModel(
        loud_checkpoint(config),
        quant,
        max_context=POSITION + 1,
        num_programs=5,
        tuning=tiles(config, spin_limit=1 << 12, **changes),
    )
    fill_cache(model.state.k_cache, model.state.v_cache, POSITION, seed=1)
    return model


@pytest.fixture
def model(model_with_cache):
    """Return the model in the state that good launches leave."""
    model_with_cache.state.sync.zero_()
    model_with_cache.state.split_arrivals.zero_()
    return model_with_cache


@pytest.mark.parametrize("seed", SEEDS)
def test_the_megakernel_has_no_race(model, seed):
    with simulate(seed=seed, detect_races=True) as simulation:
        model.step(5, POSITION)
    assert not simulation.races


def leave_out(barriers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove both halves of these barriers from the megakernel, and renumber the rest."""
    arrive, wait = gpt_oss_megakernel.arrive_at, gpt_oss_megakernel.wait_at

    def arrive_unless_left_out(ctx, barrier, *rest):
        if int(barrier) not in barriers:
            arrive(ctx, barrier, *rest)

    def wait_unless_left_out(ctx, barrier, *rest):
        if int(barrier) not in barriers:
            wait(ctx, int(barrier) - sum(gone < int(barrier) for gone in barriers), *rest)
        return barrier + 1

    monkeypatch.setattr(gpt_oss_megakernel, "arrive_at", arrive_unless_left_out)
    monkeypatch.setattr(gpt_oss_megakernel, "wait_at", wait_unless_left_out)


@pytest.mark.parametrize("phase", ["embedding", *PHASES, "LM head"])
def test_each_barrier_of_the_megakernel_is_needed(phase, model, monkeypatch):
    n_layers = model.config.n_layers
    names = [barrier_name(index, n_layers) for index in range(1, 3 + n_layers * len(PHASES))]
    left_out = [index for index, name in enumerate(names, 1) if name.startswith(f"the {phase}")]
    assert left_out
    leave_out(left_out, monkeypatch)
    # What counts splits may be zeroed under who waits for them.
    with simulate(detect_races=True, deadlock_limit=None) as simulation, contextlib.suppress(MegakernelAborted):
        model.step(5, POSITION)
    assert simulation.races


def test_leaving_out_no_barrier_brings_no_race(model, monkeypatch):
    leave_out([], monkeypatch)
    with simulate(detect_races=True) as simulation:
        model.step(5, POSITION)
    assert not simulation.races


@pytest.mark.parametrize(
    "index, place",
    [
        (1, "the embedding"),
        (3, "the attention phase of layer 0"),
        (9, "the attention phase of layer 1"),
        (13, "the down phase of layer 1"),
        (14, "the LM head"),
    ],
)
def test_a_program_that_stops_arriving_is_reported(index, place, model, monkeypatch):
    """From barrier `index` on, the last program runs past all barriers without arriving."""
    deserter = model.num_programs - 1

    def until_it_deserts(half):
        def run(ctx, barrier, *rest):
            if int(tl.program_id(0).handle.data.item()) != deserter or int(barrier) < index:
                half(ctx, barrier, *rest)
            return barrier + 1

        return run

    expected = model.step(5, POSITION)
    for name in ("arrive_at", "wait_at"):
        monkeypatch.setattr(gpt_oss_megakernel, name, until_it_deserts(getattr(gpt_oss_megakernel, name)))
    with simulate(deadlock_limit=None), pytest.raises(MegakernelAborted, match=place):
        model.step(5, POSITION)
    monkeypatch.undo()
    with pytest.raises(MegakernelAborted):  # no result from a state that may be half written
        model.step(5, POSITION)
    cache = model.state.k_cache.clone(), model.state.v_cache.clone()
    model.reset()
    model.state.k_cache.copy_(cache[0])
    model.state.v_cache.copy_(cache[1])
    assert model.step(5, POSITION) == expected
