"""The grid barrier: right under any schedule, free of races, each of its parts needed, and never an endless wait."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from mutations import loud_checkpoint, random_token_ids, small_config

import common
import common.barrier
import gpt_oss_megakernel
from gpt_oss_megakernel import PHASES, MegaModel, barrier_name
from host.cpu_interpreter import simulate
from host.errors import MegakernelAborted
from host.launch import tuning_for, with_small_tiles

SPINS = 10_000
SEEDS = range(4)


@triton.jit
def exchange_kernel(slots_ptr, wrong_ptr, sync_ptr, n_programs, N_ROUNDS: tl.constexpr, SPINS: tl.constexpr):
    """Each round every program writes its slot, and after a barrier counts the slots that are not this round's."""
    pid = tl.program_id(0)
    for i in range(N_ROUNDS):
        tl.store(slots_ptr + pid, i + 1)
        common.grid_barrier(sync_ptr, 2 * i + 1, n_programs, SPINS, "cpu")
        for other in range(n_programs):
            seen = tl.load(slots_ptr + other)
            if seen != i + 1:
                tl.store(wrong_ptr + pid, tl.load(wrong_ptr + pid) + 1)
        common.grid_barrier(sync_ptr, 2 * i + 2, n_programs, SPINS, "cpu")
    common.leave_grid(sync_ptr, n_programs, "cpu")


def exchange(n_programs: int, n_rounds: int, grid: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(wrong counts, sync words) after one launch."""
    slots = torch.zeros(n_programs, dtype=torch.int32)
    wrong = torch.zeros(n_programs, dtype=torch.int32)
    sync = torch.zeros(common.SYNC_WORDS, dtype=torch.int32)
    exchange_kernel[(grid or n_programs,)](slots, wrong, sync, n_programs, N_ROUNDS=n_rounds, SPINS=SPINS)
    return wrong, sync


@pytest.mark.parametrize("n_programs", [1, 2, 8])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_program_sees_what_was_stored_before_the_barrier(n_programs, seed):
    with simulate(seed=seed, detect_races=True) as simulation:
        wrong, sync = exchange(n_programs, n_rounds=6)
    assert not simulation.races
    assert not wrong.any()
    assert not sync.any(), "ready for the next launch"


def test_many_rounds():
    with simulate(seed=9):
        wrong, _ = exchange(8, n_rounds=60)
    assert not wrong.any()


def mutated_barrier(tmp_path: Path, old: str, new: str):
    """common/barrier.py with one piece of its text replaced, as a module of its own."""
    source = Path(common.barrier.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1
    path = tmp_path / "mutated_barrier.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutated_barrier", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BARRIER_MUTATIONS = {
    "release weakened": ('else "release"', 'else "relaxed"'),
    "acquire weakened": ('sem="acquire"', 'sem="relaxed"'),
    "target one too low": ("target = index * n_programs", "target = index * n_programs - 1"),
    "does not wait": ("(arrived < target) & (spins < SPIN_LIMIT)", "arrived < 0"),
}


@pytest.mark.parametrize("old, new", BARRIER_MUTATIONS.values(), ids=BARRIER_MUTATIONS.keys())
def test_each_part_of_the_barrier_is_needed(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "grid_barrier", mutated_barrier(tmp_path, old, new).grid_barrier)
    races = []
    for seed in SEEDS:
        with simulate(seed=seed, detect_races=True) as simulation:
            exchange(8, n_rounds=3)
        races += simulation.races
    assert races


def test_a_missing_barrier_is_caught(monkeypatch):
    monkeypatch.setattr(common, "grid_barrier", lambda *args: None)
    with simulate(detect_races=True) as simulation:
        wrong, _ = exchange(8, n_rounds=3)
    assert simulation.races
    assert wrong.any()


def test_a_program_that_never_arrives_ends_the_launch():
    """Seven programs of eight: all give up, at the first barrier, which the record names."""
    with simulate(deadlock_limit=None):
        _, sync = exchange(8, n_rounds=3, grid=7)
    assert sync[common.ABORT.value] == 1


@triton.jit
def halves_kernel(slots_ptr, between_ptr, wrong_ptr, sync_ptr, n_programs, SPINS: tl.constexpr, EARLY: tl.constexpr):
    """Between a barrier's halves each program stores to a place of its own; after them it reads all that came before.

    With EARLY it reads between the halves instead, when the others may not have stored yet.
    """
    pid = tl.program_id(0)
    tl.store(slots_ptr + pid, 1)
    common.arrive(sync_ptr, "cpu")
    tl.store(between_ptr + pid, 1)
    if not EARLY:
        common.wait(sync_ptr, 1, n_programs, SPINS, "cpu")
    for other in range(n_programs):
        if tl.load(slots_ptr + other) != 1:
            tl.store(wrong_ptr + pid, 1)
    if EARLY:
        common.wait(sync_ptr, 1, n_programs, SPINS, "cpu")
    common.leave_grid(sync_ptr, n_programs, "cpu")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("early", [False, True])
def test_what_came_before_the_first_half_is_seen_after_the_second(early, seed):
    slots, between, wrong = (torch.zeros(5, dtype=torch.int32) for _ in range(3))
    sync = torch.zeros(common.SYNC_WORDS, dtype=torch.int32)
    with simulate(seed=seed, detect_races=True) as simulation:
        halves_kernel[(5,)](slots, between, wrong, sync, 5, SPINS=SPINS, EARLY=early)
    assert bool(simulation.races) == early
    assert between.all()
    assert early or not wrong.any()
    assert not sync.any(), "ready for the next launch"


@triton.jit
def between_kernel(between_ptr, out_ptr, sync_ptr, n_programs, SPINS: tl.constexpr):
    pid = tl.program_id(0)
    common.arrive(sync_ptr, "cpu")
    tl.store(between_ptr + pid, 1)
    common.wait(sync_ptr, 1, n_programs, SPINS, "cpu")
    tl.store(out_ptr + pid, tl.load(between_ptr + (pid + 1) % n_programs))


def test_what_is_stored_between_the_halves_is_not_ordered():
    between, out = (torch.zeros(5, dtype=torch.int32) for _ in range(2))
    sync = torch.zeros(common.SYNC_WORDS, dtype=torch.int32)
    with simulate(detect_races=True) as simulation:
        between_kernel[(5,)](between, out, sync, 5, SPINS=SPINS)
    assert simulation.races


@triton.jit
def last_sums_kernel(parts_ptr, sum_ptr, counter_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    tl.store(parts_ptr + pid, pid + 1)
    if common.arrive_last(counter_ptr, N, "cpu"):
        part = tl.arange(0, BLOCK)
        total = tl.sum(tl.load(parts_ptr + part, mask=part < N, other=0), axis=0)
        tl.store(sum_ptr, tl.load(sum_ptr) + total)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_to_arrive_sees_all_parts(seed):
    parts, total, counter = (torch.zeros(n, dtype=torch.int32) for n in (7, 1, 1))
    with simulate(seed=seed, detect_races=True) as simulation:
        last_sums_kernel[(7,)](parts, total, counter, N=7, BLOCK=8)
    assert (int(total), int(counter), simulation.races) == (28, 0, [])


def test_the_last_to_arrive_needs_its_ordering(tmp_path, monkeypatch):
    module = mutated_barrier(tmp_path, 'else "acq_rel"', 'else "relaxed"')
    monkeypatch.setattr(common, "arrive_last", module.arrive_last)
    parts, total, counter = (torch.zeros(n, dtype=torch.int32) for n in (7, 1, 1))
    with simulate(detect_races=True) as simulation:
        last_sums_kernel[(7,)](parts, total, counter, N=7, BLOCK=8)
    assert simulation.races


POSITION = 40  # beyond the window of 20, and far enough for several splits of the full-attention layer


KINDS = {
    "default": (False, {}),
    "quant": (True, {}),
    # Tiles are loaded between a barrier's halves; who reads activations quantizes them.
    "fragments, loaded ahead": (True, dict(fragments=True, gate_up_m=16, down_m=16, num_warps=2, prefetch=True)),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=KINDS.keys())
def model(request):
    """Two layers, several tiles a phase, with POSITION tokens in the cache.

    Five programs: of four, each would have one expert to itself, and need no barrier between gate-up and down.
    """
    quant, changes = request.param
    config = small_config(n_layers=2, layer_is_sliding=(True, False))
    tuning = replace(with_small_tiles(tuning_for(torch.device("cpu"), config)), **changes)
    model = MegaModel(loud_checkpoint(config), quant, max_context=POSITION + 1, num_programs=5, tuning=tuning)
    for position, token in enumerate(random_token_ids(POSITION, config)):
        model.hidden(token, position, config.n_layers)
    return model


@pytest.mark.parametrize("seed", SEEDS)
def test_the_megakernel_has_no_race(model, seed):
    with simulate(seed=seed, detect_races=True) as simulation:
        model.step(5, POSITION)
    assert not simulation.races


def leave_out(barriers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both halves of these barriers of the megakernel, and renumber the rest."""
    arrive, wait = gpt_oss_megakernel.arrive, gpt_oss_megakernel.wait

    def arrive_unless_left_out(s, barrier, *rest):
        if int(barrier) not in barriers:
            arrive(s, barrier, *rest)

    def wait_unless_left_out(s, barrier, *rest):
        if int(barrier) not in barriers:
            wait(s, int(barrier) - sum(gone < int(barrier) for gone in barriers), *rest)

    monkeypatch.setattr(gpt_oss_megakernel, "arrive", arrive_unless_left_out)
    monkeypatch.setattr(gpt_oss_megakernel, "wait", wait_unless_left_out)


@pytest.mark.parametrize("phase", ["embedding", *PHASES, "LM head"])
def test_each_barrier_of_the_megakernel_is_needed(phase, model, monkeypatch):
    n_layers = model.config.n_layers
    names = [barrier_name(index, n_layers) for index in range(1, 3 + n_layers * len(PHASES))]
    left_out = [index for index, name in enumerate(names, 1) if name.startswith(f"the {phase}")]
    assert left_out
    leave_out(left_out, monkeypatch)
    with simulate(detect_races=True) as simulation:
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
        (13, "the down phase of layer 1"),
        (14, "the LM head"),
    ],
)
def test_a_program_that_stops_arriving_is_reported(index, place, model, monkeypatch):
    """From barrier `index` on, the last program runs past all barriers without arriving."""
    deserter = model.num_programs - 1

    def until_it_deserts(half):
        def run(s, barrier, *rest):
            if int(tl.program_id(0).handle.data.item()) != deserter or int(barrier) < index:
                half(s, barrier, *rest)

        return run

    expected = model.step(5, POSITION)
    for name in ("arrive", "wait"):
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
