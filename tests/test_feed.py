"""common.stream, interpreted, against a model of the schedule in plain Python.

Nothing is read: addresses are counted from made-up ones, so that the published sizes take no memory.
"""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import triton
import triton.language as tl
from mutations import ODD_SIZES, small_config

from common.router import elements
from common.stream import (
    Plan,
    Shares,
    describe,
    describe_and_fill,
    fill,
    locate,
    open_stream,
    plan_until,
    release,
    shares_of,
    take,
    units_of_layer,
)
from host.config import BF16, FP8_GROUPS, FP8_ROWS, GPT_OSS_120B, DenseFormats, ModelConfig
from host.launch import SM_90, Tuning, fit_ring
from host.state import new_state
from host.weights import Weights, weight_shapes

CONFIGS = {
    "small": small_config(),
    "hidden 416, top 3 of 5": small_config(
        hidden_size=416,
        intermediate_size=224,
        n_heads=3,
        n_kv_heads=3,
        vocab_size=1003,
        n_experts=5,
        experts_per_token=3,
    ),
    "hidden 32, top 1 of 3": small_config(
        hidden_size=32, intermediate_size=160, head_dim=16, vocab_size=7, n_experts=3, experts_per_token=1
    ),
    "one head a group": small_config(**ODD_SIZES["one head a group"]),
    "FP8": small_config(hidden_size=544, vocab_size=1003, dense=DenseFormats(FP8_GROUPS, FP8_ROWS, BF16, FP8_GROUPS)),
    "120b": GPT_OSS_120B,
}
SMALL = [name for name in CONFIGS if name != "120b"]
PROGRAMS = [1, 2, 3, 5, 40, 132]

with_programs = pytest.mark.parametrize("n_programs", PROGRAMS)
with_quant = pytest.mark.parametrize("quant", [False, True], ids=["", "quant"])


@triton.jit
def shares_kernel(out_ptr, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr, QUANT: tl.constexpr):
    """out [programs, fields of Shares]."""
    pid = tl.program_id(0)
    shares = shares_of(pid, n_programs, CONFIG, TUNING, QUANT)
    for field in tl.static_range(len(shares)):
        tl.store(out_ptr + pid * len(shares) + field, shares[field])


@triton.jit
def load_experts(experts_ptr, layer, CONFIG: tl.constexpr):
    """The experts of a layer, of experts [layers, power of two]."""
    BLOCK: tl.constexpr = triton.next_power_of_2(CONFIG.experts_per_token)
    return elements(tl.load(experts_ptr + layer * BLOCK + tl.arange(0, BLOCK)), CONFIG.experts_per_token)


@triton.jit
def locate_kernel(
    out_ptr,
    w,
    experts_ptr,
    pid_ptr,
    first_ptr,
    layer,
    n_layers,
    n_programs,
    CONFIG: tl.constexpr,
    TUNING: tl.constexpr,
    QUANT: tl.constexpr,
):
    """out [units, 4]: what locate gives for all units of a layer. Layer n_layers is the LM head.

    A program's units are from number first[program] on.
    """
    BLOCK: tl.constexpr = 64
    pid = tl.load(pid_ptr + tl.program_id(0))
    out_ptr += 4 * tl.load(first_ptr + tl.program_id(0))
    shares = shares_of(pid, n_programs, CONFIG, TUNING, QUANT)
    plan = Plan(tl.cast(0, tl.int32), load_experts(experts_ptr, layer, CONFIG), n_layers, shares)
    each = units_of_layer(shares)
    n_units = tl.where(layer < n_layers, each, shares.head)
    for first in range(0, n_units, BLOCK):
        n = first + tl.arange(0, BLOCK)
        unit = locate(w, layer * each + n, plan, pid, n_programs, CONFIG, TUNING)
        for i in tl.static_range(4):
            tl.store(out_ptr + 4 * n + i, unit[i], mask=n < n_units)


@triton.jit
def note(log_ptr, event, stream, pieces):
    """log [events, 4]: units asked for, units taken, the addresses of what was taken."""
    tl.store(log_ptr + 4 * event, stream.asked)
    tl.store(log_ptr + 4 * event + 1, stream.taken)
    tl.store(log_ptr + 4 * event + 2, pieces[0])
    tl.store(log_ptr + 4 * event + 3, pieces[1])
    return event + 1


@triton.jit
def take_all(log_ptr, event, n, stream, plan, w, pid, n_programs, CONFIG: tl.constexpr, TUNING: tl.constexpr):
    """In batches, as the phases do."""
    for i in range(n):
        if i % TUNING.dense_batch == 0:
            stream = describe(stream, plan, w, pid, n_programs, CONFIG, TUNING)
        pieces, stream = take(stream, 1024, TUNING)
        stream = release(stream, CONFIG, TUNING)
        event = note(log_ptr, event, stream, pieces)
    return event, stream


@triton.jit
def decode_kernel(
    log_ptr,
    n_events,
    w,
    s,
    experts_ptr,
    n_layers,
    want_head,
    n_programs,
    CONFIG: tl.constexpr,
    TUNING: tl.constexpr,
    QUANT: tl.constexpr,
):
    """log [programs, n_events, 4]: a token as the megakernel decodes it, an event for each filling and each unit."""
    pid = tl.program_id(0)
    log_ptr += pid * 4 * n_events
    SLOTS: tl.constexpr = TUNING.ring_slots
    nothing = (tl.cast(0, tl.int64), tl.cast(0, tl.int64))
    no_experts = (tl.cast(0, tl.int32),)
    shares = shares_of(pid, n_programs, CONFIG, TUNING, QUANT)
    plan = plan_until(0, no_experts, n_layers, want_head, shares)
    stream = open_stream(s, shares, pid, 0, 0, CONFIG, TUNING)
    stream = describe_and_fill(stream, plan, w, pid, n_programs, CONFIG, TUNING)
    event = note(log_ptr, 0, stream, nothing)
    for layer in range(n_layers):
        plan = plan_until(layer, no_experts, n_layers, want_head, shares)
        event, stream = take_all(log_ptr, event, shares.qkv, stream, plan, w, pid, n_programs, CONFIG, TUNING)
        stream = fill(stream, CONFIG, TUNING, SLOTS)
        event = note(log_ptr, event, stream, nothing)
        event, stream = take_all(log_ptr, event, shares.o, stream, plan, w, pid, n_programs, CONFIG, TUNING)
        plan = plan_until(layer + 1, load_experts(experts_ptr, layer, CONFIG), n_layers, want_head, shares)
        stream = describe_and_fill(stream, plan, w, pid, n_programs, CONFIG, TUNING)
        event = note(log_ptr, event, stream, nothing)
        for n in tl.static_range(2):
            units = shares.down if n else shares.gate_up
            event, stream = take_all(log_ptr, event, units, stream, plan, w, pid, n_programs, CONFIG, TUNING)
    if want_head:
        plan = plan_until(n_layers, no_experts, n_layers, want_head, shares)
        event, stream = take_all(log_ptr, event, shares.head, stream, plan, w, pid, n_programs, CONFIG, TUNING)


class Unit(NamedTuple):
    """What is copied into a slot. `more` is 0 where there is no second piece."""

    at: int
    n_bytes: int
    more: int = 0
    more_bytes: int = 0


def tuned(config: ModelConfig, **changes) -> Tuning:
    return replace(fit_ring(SM_90, config), arch="cpu", **changes)


def experts_of(config: ModelConfig, layer: int) -> list[int]:
    """What a router might choose, in no order."""
    order = torch.randperm(config.n_experts, generator=torch.Generator().manual_seed(layer))
    return order[: config.experts_per_token].tolist()


def expert_table(config: ModelConfig, n_layers: int) -> torch.Tensor:
    """As load_experts reads it, a row for the LM head too; what it must not take are experts that do not exist."""
    table = torch.full((n_layers + 1, triton.next_power_of_2(config.experts_per_token)), 1 << 20, dtype=torch.int32)
    for layer in range(n_layers):
        table[layer, : config.experts_per_token] = torch.tensor(experts_of(config, layer))
    return table


class Schedule:
    """The units of a model and whose they are, counted from the weights' shapes and from what common/stream.py says."""

    def __init__(self, config: ModelConfig, tuning: Tuning, n_programs: int, quant: bool):
        self.config, self.tuning, self.n_programs, self.quant = config, tuning, n_programs, quant
        shapes = weight_shapes(config, tuning)
        self.bases = Weights(*((n + 1) << 44 for n in range(len(shapes))))
        self._weights = Weights(*(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes))

    def _piece(self, name: str, *index) -> tuple[int, int]:
        part = getattr(self._weights, name)[index]
        return getattr(self.bases, name) + part.storage_offset() * part.element_size(), part.nbytes

    def _dense(self, name: str, m: int, *layer: int) -> list[Unit]:
        """With their scales, if those are of groups."""
        n_rows = getattr(self._weights, name).shape[-2]
        pieces = [name] + [f"{name}_scales"] * (getattr(self._weights, f"{name}_scales").dtype == torch.uint8)
        return [
            Unit(*(part for piece in pieces for part in self._piece(piece, *layer, slice(row, row + m))))
            for row in range(0, n_rows, m)
        ]

    def _expert(self, name: str, layer: int, expert: int) -> list[Unit]:
        n_tiles = getattr(self._weights, name).shape[2]
        return [
            Unit(*self._piece(name, layer, expert, tile), *self._piece(f"{name}_scales", layer, expert, tile))
            for tile in range(n_tiles)
        ]

    def tiles(self, layer: int) -> dict[str, list]:
        """All tiles of a layer, those of the chosen experts in the order of choice."""
        chosen = experts_of(self.config, layer)
        return {
            "qkv": self._dense("qkv", self.tuning.qkv_m, layer),
            "o": self._dense("o", self.tuning.o_m, layer),
            "gate_up": [self._expert("gate_up", layer, expert) for expert in chosen],
            "down": [self._expert("down", layer, expert) for expert in chosen],
        }

    def head_tiles(self) -> list[Unit]:
        return self._dense("lm_head", self.tuning.head_m)

    def _consecutive(self, tiles: list[Unit]) -> list[list[Unit]]:
        """By program."""
        ends = [pid * len(tiles) // self.n_programs for pid in range(self.n_programs + 1)]
        return [tiles[first:end] for first, end in pairwise(ends)]

    def of_layer(self, layer: int) -> list[dict[str, list[Unit]]]:
        """By program: its units of each phase in order."""
        tiles = self.tiles(layer)
        programs = [
            {"qkv": qkv, "o": o, "gate_up": [], "down": []}
            for qkv, o in zip(self._consecutive(tiles["qkv"]), self._consecutive(tiles["o"]), strict=True)
        ]
        run = 4 if self.quant else 1
        gate_up = [unit for expert in tiles["gate_up"] for unit in expert]
        for number, first in enumerate(range(0, len(gate_up), run)):
            programs[number % self.n_programs]["gate_up"] += gate_up[first : first + run]
        lanes = min(self.n_programs, len(tiles["down"]))
        for slot, expert in enumerate(tiles["down"]):
            members = programs[slot % lanes :: lanes]
            for number, unit in enumerate(expert):
                members[number % len(members)]["down"].append(unit)
        return programs

    def of_head(self) -> list[list[Unit]]:
        return self._consecutive(self.head_tiles())


@cache
def schedule(name: str, n_programs: int, quant: bool) -> Schedule:
    return Schedule(CONFIGS[name], tuned(CONFIGS[name]), n_programs, quant)


@cache
def shares(name: str, n_programs: int, quant: bool) -> list[Shares]:
    out = torch.full((n_programs, len(Shares._fields)), -1, dtype=torch.int32)
    shares_kernel[(n_programs,)](out, n_programs, CONFIG=CONFIGS[name], TUNING=tuned(CONFIGS[name]), QUANT=quant)
    return [Shares(*row) for row in out.tolist()]


@cache
def located(name: str, n_programs: int, quant: bool, layer: int, pids=None) -> list[list[Unit]]:
    """By program, of `pids` or all; the LM head's units where the layer is the number of layers."""
    model, config = schedule(name, n_programs, quant), CONFIGS[name]
    pids = pids or range(n_programs)
    mine = [shares(name, n_programs, quant)[pid] for pid in pids]
    if layer == config.n_layers:
        counts = [s.head for s in mine]
    else:
        counts = [s.qkv + s.o + s.gate_up + s.down for s in mine]
    first = torch.tensor([0, *counts]).cumsum(0).int()
    out = torch.full((sum(counts), 4), -1)
    locate_kernel[(len(pids),)](
        out,
        model.bases,
        expert_table(config, config.n_layers),
        torch.tensor(pids, dtype=torch.int32),
        first,
        layer,
        config.n_layers,
        n_programs,
        CONFIG=config,
        TUNING=model.tuning,
        QUANT=quant,
    )
    units = [Unit(at, n, more if more_n else 0, more_n) for at, n, more, more_n in out.tolist()]
    return [units[i:j] for i, j in pairwise(first.tolist())]


def flat(units: dict[str, list[Unit]]) -> list[Unit]:
    return [unit for phase in units.values() for unit in phase]


@with_quant
@with_programs
@pytest.mark.parametrize("name", CONFIGS)
def test_shares(name, n_programs, quant):
    """Of each matrix as many tiles as the model deals out, and what says where they are."""
    config, model = CONFIGS[name], schedule(name, n_programs, quant)
    found, of_head = shares(name, n_programs, quant), model.of_head()
    lanes = min(n_programs, config.experts_per_token)
    n_down = len(model.tiles(0)["down"][0])
    first = dict(qkv=0, o=0, head=0)
    for pid, (mine, expected) in enumerate(zip(found, model.of_layer(0), strict=True)):
        assert (mine.qkv_first, mine.o_first, mine.head_first) == tuple(first.values())
        assert {phase: getattr(mine, phase) for phase in expected} == {p: len(units) for p, units in expected.items()}
        assert mine.head == len(of_head[pid])
        first = {phase: n + getattr(mine, phase) for phase, n in first.items()}
        of_expert = range(pid % lanes, n_programs, lanes)
        assert (mine.run, mine.lanes) == (4 if quant else 1, lanes)
        assert (mine.member, mine.members) == (of_expert.index(pid), len(of_expert))
        assert mine.down_each == len(range(mine.member, n_down, mine.members))
    # Dense tiles are shared as evenly as can be.
    for phase in first:
        assert max(getattr(s, phase) for s in found) - min(getattr(s, phase) for s in found) <= 1


@with_quant
@with_programs
@pytest.mark.parametrize("name", SMALL)
def test_every_tile_of_a_layer_is_one_program_s(name, n_programs, quant):
    """Exactly once, blocks with their scales, nothing else; and each program has its own in the model's order."""
    layer = CONFIGS[name].n_layers - 1
    found, model = located(name, n_programs, quant, layer), schedule(name, n_programs, quant)
    tiles = model.tiles(layer)
    experts = [unit for phase in ("gate_up", "down") for expert in tiles[phase] for unit in expert]
    assert sorted(unit for units in found for unit in units) == sorted([*tiles["qkv"], *tiles["o"], *experts])
    assert found == [flat(units) for units in model.of_layer(layer)]


@with_programs
@pytest.mark.parametrize("name", SMALL)
def test_every_tile_of_the_head_is_one_program_s(name, n_programs):
    found, model = located(name, n_programs, False, CONFIGS[name].n_layers), schedule(name, n_programs, False)
    assert [unit for units in found for unit in units] == model.head_tiles()
    assert found == model.of_head()


@with_quant
def test_the_published_sizes(quant):
    """Of a few programs: the last layer's tiles lie gigabytes behind the first's."""
    pids, layer = (0, 57, 131), GPT_OSS_120B.n_layers - 1
    expected = schedule("120b", 132, quant).of_layer(layer)
    assert located("120b", 132, quant, layer, pids) == [flat(expected[pid]) for pid in pids]


def test_the_head_of_published_sizes():
    pids = (0, 131)
    expected = schedule("120b", 132, False).of_head()
    assert located("120b", 132, False, GPT_OSS_120B.n_layers, pids) == [expected[pid] for pid in pids]


def test_a_head_of_more_than_two_gigabytes(monkeypatch):
    """As a hidden size of 8192 makes it with the published vocabulary."""
    monkeypatch.setitem(CONFIGS, "wide", replace(GPT_OSS_120B, hidden_size=8192))
    model = schedule("wide", 132, False)
    expected = model.of_head()[131]
    assert expected[0].at - model.bases.lm_head > 1 << 31
    assert located("wide", 132, False, GPT_OSS_120B.n_layers, (131,)) == [expected]


@with_programs
@pytest.mark.parametrize("name", SMALL)
def test_tiles_that_share_a_scale_are_consecutive_in_one_program(name, n_programs):
    """With quant 64 rows, four tiles, make the 32 outputs of an MXFP8 scale."""
    layer = CONFIGS[name].n_layers - 1
    number = {}
    for expert in schedule(name, n_programs, True).tiles(layer)["gate_up"]:
        assert len(expert) % 4 == 0
        number |= {unit: len(number) + tile for tile, unit in enumerate(expert)}
    seen = []
    for mine, units in zip(shares(name, n_programs, True), located(name, n_programs, True, layer), strict=True):
        first = mine.qkv + mine.o
        numbers = [number[unit] for unit in units[first : first + mine.gate_up]]
        for n in range(0, len(numbers), 4):
            assert numbers[n] % 4 == 0
            assert numbers[n : n + 4] == list(range(numbers[n], numbers[n] + 4))
        seen += numbers
    assert sorted(seen) == list(range(len(number)))


class Event(NamedTuple):
    asked: int
    taken: int
    at: int = 0
    more: int | None = 0  # None: of no account


def expected_events(model: Schedule, pid: int, n_layers: int, want_head: bool) -> list[Event]:
    """What decode_kernel should log of a program."""
    window, slots = model.tuning.window, model.tuning.ring_slots
    events, asked, taken = [], 0, 0
    layers = [model.of_layer(layer)[pid] for layer in range(n_layers)]
    dense = [len(units["qkv"]) + len(units["o"]) for units in layers]
    head = model.of_head()[pid] if want_head else []
    # Known before the router of a layer has spoken; after the last one has, all.
    known = [sum(len(flat(units)) for units in layers[:layer]) + dense[layer] for layer in range(n_layers)]
    known.append(sum(len(flat(units)) for units in layers) + len(head))

    def filled(limit: int, ahead: int) -> None:
        nonlocal asked
        asked = max(asked, min(limit, taken + ahead))
        events.append(Event(asked, taken))

    def took(units: list[Unit], limit: int) -> None:
        nonlocal asked, taken
        for unit in units:
            assert taken < asked
            taken += 1
            if asked < limit and asked - taken < window:
                asked += 1
            events.append(Event(asked, taken, unit.at, unit.more if unit.more_bytes else None))

    filled(known[0], window)
    for layer, units in enumerate(layers):
        took(units["qkv"], known[layer])
        filled(known[layer], slots)
        took(units["o"], known[layer])
        filled(known[layer + 1], window)
        took([*units["gate_up"], *units["down"]], known[layer + 1])
    took(head, known[-1])
    assert asked == taken == known[-1]
    return events


def decode(model: Schedule, n_layers: int, want_head: bool) -> list[list[Event]]:
    """What decode_kernel logs, by program."""
    config = model.config
    expected = [expected_events(model, pid, n_layers, want_head) for pid in range(model.n_programs)]
    n_events = max(map(len, expected))
    log = torch.full((model.n_programs, n_events, 4), -1)
    decode_kernel[(model.n_programs,)](
        log,
        n_events,
        model.bases,
        new_state(config, model.tuning, model.quant, 16, model.n_programs, "cpu"),
        expert_table(config, n_layers),
        n_layers,
        int(want_head),
        model.n_programs,
        CONFIG=config,
        TUNING=model.tuning,
        QUANT=model.quant,
    )
    found = []
    for events, rows in zip(expected, log.tolist(), strict=True):
        assert all(row == [-1] * 4 for row in rows[len(events) :])
        mine = [Event(*row) for row in rows[: len(events)]]
        found.append([f._replace(more=None) if e.more is None else f for e, f in zip(events, mine, strict=True)])
        assert found[-1] == events
    return found


@pytest.mark.parametrize(
    "name, n_programs, quant, changes",
    [
        ("small", 1, False, dict(qkv_m=32, o_m=16)),
        ("small", 5, True, {}),
        ("small", 3, False, dict(ring_slots=2, window=2)),
        ("hidden 416, top 3 of 5", 2, True, dict(qkv_m=32, o_m=32, head_m=32)),
        ("hidden 416, top 3 of 5", 40, False, dict(ring_slots=3, window=1)),
        ("hidden 32, top 1 of 3", 1, False, {}),
        ("hidden 32, top 1 of 3", 40, True, {}),
        ("FP8", 3, False, {}),
    ],
)
def test_a_token_takes_its_units_in_order(name, n_programs, quant, changes):
    """From the first layer to the LM head, asked for as far ahead as may be and no further."""
    config = CONFIGS[name]
    model = Schedule(config, tuned(config, **changes), n_programs, quant)
    decode(model, 2, want_head=True)


def test_programs_without_a_unit_of_any_layer():
    """They still have their tiles of the LM head."""
    model = schedule("one head a group", 132, False)
    idle = [pid for pid, units in enumerate(model.of_layer(0)) if not flat(units)]
    assert any(model.of_head()[pid] for pid in idle)
    decode(model, 2, want_head=True)


def test_a_prompt_s_token_asks_for_no_head():
    decode(schedule("hidden 32, top 1 of 3", 3, False), 2, want_head=False)


def test_a_launch_without_layers_has_the_head_alone():
    decode(schedule("small", 3, False), 0, want_head=True)


def test_nothing_is_asked_for_without_layers_and_head():
    assert decode(schedule("small", 2, False), 0, want_head=False) == [[Event(0, 0)]] * 2
