"""common.sm90.feed and common.work, interpreted, against a model of the schedule in plain Python.

No weights are read: addresses are counted from made-up ones, so that the published sizes take no memory, and a copy
leaves the tile's description in its stage.
"""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from made_up_models import ODD_SIZES, small_config
from tunings import changed

from checkpoints.config import BF16, FP8_GROUPS, FP8_ROWS, GPT_OSS_120B, DenseFormats, ModelConfig
from common.build import Build
from common.context import Context
from common.experts import Choice, elements, no_choice
from common.sm90 import ptx
from common.sm90.feed import (
    ask_experts,
    describe,
    extend,
    fill_ring,
    locate,
    open_feed,
    release,
    take,
    tiles_of_layer,
)
from common.work import share_work
from host.launch import SM_90, fit_ring
from host.tuning import Tuning
from host.weights import Weights, weight_shapes
from interpreter import assembly

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


class Share(NamedTuple):
    """A program's common.work.Work as flat fields."""

    qkv_first: int
    qkv: int
    o_first: int
    o: int
    gate_up: int
    ranks: int
    member: int
    members: int
    down_each: int
    down: int
    head_first: int
    head: int


@triton.jit
def work_kernel(out_ptr, n_programs, BUILD: tl.constexpr):
    """Write out [programs, fields of Share]."""
    program = tl.program_id(0)
    work = share_work(program, n_programs, BUILD)
    down = work.down
    numbers = (
        (work.qkv.first, work.qkv.count, work.o.first, work.o.count, work.gate_up_count)
        + (down.ranks, down.member, down.members, down.per_expert, down.count)
        + (work.lm_head.first, work.lm_head.count)
    )
    for field in tl.static_range(len(numbers)):
        tl.store(out_ptr + program * len(numbers) + field, numbers[field])


@triton.jit
def open_context(w, n_layers, want_head, program, n_programs, BUILD: tl.constexpr):
    """Make a program's Context without what the feed does not read."""
    return Context(w, (), 0, 0, n_layers, want_head, program, n_programs, share_work(program, n_programs, BUILD), ())


@triton.jit
def load_choice(experts_ptr, layer, BUILD: tl.constexpr):
    """Load the Choice of a layer from experts [layers, power of two]."""
    TOP_K: tl.constexpr = BUILD.config.experts_per_token
    BLOCK: tl.constexpr = triton.next_power_of_2(TOP_K)
    return Choice(elements(tl.load(experts_ptr + layer * BLOCK + tl.arange(0, BLOCK)), TOP_K), 0)


@triton.jit
def locate_kernel(out_ptr, w, experts_ptr, program_ptr, first_ptr, layer, n_layers, n_programs, BUILD: tl.constexpr):
    """Write out [tiles, 4]: what locate gives for all tiles of a layer. Layer n_layers is the LM head.

    A program's tiles begin at number first[program].
    """
    BLOCK: tl.constexpr = 64
    program = tl.load(program_ptr + tl.program_id(0))
    out_ptr += 4 * tl.load(first_ptr + tl.program_id(0))
    ctx = open_context(w, n_layers, 1, program, n_programs, BUILD)
    choice = load_choice(experts_ptr, layer, BUILD)
    each = tiles_of_layer(ctx.work)
    n_tiles = tl.where(layer < n_layers, each, ctx.work.lm_head.count)
    for first in range(0, n_tiles, BLOCK):
        n = first + tl.arange(0, BLOCK)
        tile = locate(ctx, layer * each + n, choice.experts, BUILD)
        for i in tl.static_range(4):
            tl.store(out_ptr + 4 * n + i, tile[i], mask=n < n_tiles)


@triton.jit
def note(log_ptr, event, feed):
    """Append to log [events, 10] int32: tiles asked for, tiles taken, and room for the taken tile's description."""
    word = tl.arange(0, 8)
    tl.store(log_ptr + 10 * event, feed.asked)
    tl.store(log_ptr + 10 * event + 1, feed.taken)
    tl.store(log_ptr + 10 * event + 2 + word, 0 * word)
    return event + 1


@triton.jit
def take_all(log_ptr, event, n, feed, ctx, choice, BUILD: tl.constexpr):
    """Take tiles in steps, as the phases do."""
    word = tl.arange(0, 8)
    for i in range(n):
        if i % BUILD.tuning.dense.step_tiles == 0:
            feed = describe(ctx, choice.experts, feed, BUILD)
        at, feed = take(feed, BUILD)
        words = ptx.load_word(at + 4 * word)
        feed = release(feed, BUILD)
        event = note(log_ptr, event, feed)
        tl.store(log_ptr + 10 * (event - 1) + 2 + word, words)
    return event, feed


@triton.jit
def decode_kernel(log_ptr, n_events, w, experts_ptr, n_layers, want_head, n_programs, BUILD: tl.constexpr):
    """Run a token's feed like the megakernel. Log [programs, n_events, 10] gets an event for each filling and tile."""
    program = tl.program_id(0)
    log_ptr += program * 10 * n_events
    ctx = open_context(w, n_layers, want_head, program, n_programs, BUILD)
    feed = open_feed(ctx, BUILD)
    event = note(log_ptr, 0, feed)
    for layer in range(n_layers):
        feed = extend(ctx, layer, feed)
        event, feed = take_all(log_ptr, event, ctx.work.qkv.count, feed, ctx, no_choice(), BUILD)
        feed = fill_ring(ctx, layer, feed, BUILD)
        event = note(log_ptr, event, feed)
        event, feed = take_all(log_ptr, event, ctx.work.o.count, feed, ctx, no_choice(), BUILD)
        feed = extend(ctx, layer + 1, feed)
        choice = load_choice(experts_ptr, layer, BUILD)
        feed = ask_experts(ctx, choice, feed, BUILD)
        event = note(log_ptr, event, feed)
        event, feed = take_all(log_ptr, event, ctx.work.gate_up_count, feed, ctx, choice, BUILD)
        event, feed = take_all(log_ptr, event, ctx.work.down.count, feed, ctx, choice, BUILD)
    if want_head:
        feed = extend(ctx, n_layers, feed)
        event, feed = take_all(log_ptr, event, ctx.work.lm_head.count, feed, ctx, no_choice(), BUILD)


def copy_description(_barrier: np.ndarray, stage: np.ndarray, description: np.ndarray) -> list[np.ndarray]:
    """Copy a tile's description, instead of its bytes, to the stage; replaces interpreter.assembly.copy_tile."""
    at, place = int(description.item()), int(stage.item())
    shared = assembly.memory(np.uint8)
    shared[place : place + 32] = shared[at : at + 32]
    return [np.zeros_like(stage)]


@pytest.fixture
def copies(monkeypatch):
    """Make the copy engine copy descriptions."""
    monkeypatch.setitem(assembly.BY_TEXT, ptx.COPY.value, copy_description)


class Tile(NamedTuple):
    """The description that is copied into a stage. `more` is 0 where there is no second piece."""

    at: int
    n_bytes: int
    more: int = 0
    more_bytes: int = 0


def tuned(config: ModelConfig, **changes) -> Tuning:
    return changed(fit_ring(SM_90, config), **changes)


def experts_of(config: ModelConfig, layer: int) -> list[int]:
    """Make choices that a router might make, in no order."""
    order = torch.randperm(config.n_experts, generator=torch.Generator().manual_seed(layer))
    return order[: config.experts_per_token].tolist()


def expert_table(config: ModelConfig, n_layers: int) -> torch.Tensor:
    """Make the table that load_choice reads, with a row for the LM head.

    Unused places name experts that do not exist.
    """
    table = torch.full((n_layers + 1, triton.next_power_of_2(config.experts_per_token)), 1 << 20, dtype=torch.int32)
    for layer in range(n_layers):
        table[layer, : config.experts_per_token] = torch.tensor(experts_of(config, layer))
    return table


class Schedule:
    """A model's tiles and the program of each, counted from the weights' shapes and the rules of common/work.py."""

    def __init__(self, config: ModelConfig, tuning: Tuning, n_programs: int, quant: bool):
        self.config, self.tuning, self.n_programs, self.quant = config, tuning, n_programs, quant
        self.build = Build(config, tuning, quant)
        shapes = weight_shapes(config, tuning)
        self.bases = Weights(*((n + 1) << 44 for n in range(len(shapes))))
        self._weights = Weights(*(torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in shapes))

    def _piece(self, name: str, *index) -> tuple[int, int]:
        part = getattr(self._weights, name)[index]
        return getattr(self.bases, name) + part.storage_offset() * part.element_size(), part.nbytes

    def _dense(self, name: str, m: int, *layer: int) -> list[Tile]:
        """Return the tiles of a dense matrix, with their scales if those are of groups."""
        n_rows = getattr(self._weights, name).shape[-2]
        pieces = [name] + [f"{name}_scales"] * (getattr(self._weights, f"{name}_scales").dtype == torch.uint8)
        return [
            Tile(*(part for piece in pieces for part in self._piece(piece, *layer, slice(row, row + m))))
            for row in range(0, n_rows, m)
        ]

    def _expert(self, name: str, layer: int, expert: int) -> list[Tile]:
        n_tiles = getattr(self._weights, name).shape[2]
        return [
            Tile(*self._piece(name, layer, expert, tile), *self._piece(f"{name}_scales", layer, expert, tile))
            for tile in range(n_tiles)
        ]

    def tiles(self, layer: int) -> dict[str, list]:
        """Return all tiles of a layer, those of the chosen experts in the order of choice."""
        chosen = experts_of(self.config, layer)
        return {
            "qkv": self._dense("qkv", self.tuning.dense.qkv_rows, layer),
            "o": self._dense("o", self.tuning.dense.o_rows, layer),
            "gate_up": [self._expert("gate_up", layer, expert) for expert in chosen],
            "down": [self._expert("down", layer, expert) for expert in chosen],
        }

    def head_tiles(self) -> list[Tile]:
        return self._dense("lm_head", self.tuning.dense.head_rows)

    def _consecutive(self, tiles: list[Tile]) -> list[list[Tile]]:
        """Deal tiles out in consecutive runs, by program."""
        ends = [program * len(tiles) // self.n_programs for program in range(self.n_programs + 1)]
        return [tiles[first:end] for first, end in pairwise(ends)]

    def of_layer(self, layer: int) -> list[dict[str, list[Tile]]]:
        """Return each program's tiles of each phase in order."""
        tiles = self.tiles(layer)
        programs = [
            {"qkv": qkv, "o": o, "gate_up": [], "down": []}
            for qkv, o in zip(self._consecutive(tiles["qkv"]), self._consecutive(tiles["o"]), strict=True)
        ]
        run = 4 if self.quant else 1
        gate_up = [tile for expert in tiles["gate_up"] for tile in expert]
        for number, first in enumerate(range(0, len(gate_up), run)):
            programs[number % self.n_programs]["gate_up"] += gate_up[first : first + run]
        ranks = min(self.n_programs, len(tiles["down"]))
        for rank, expert in enumerate(tiles["down"]):
            members = programs[rank % ranks :: ranks]
            for number, tile in enumerate(expert):
                members[number % len(members)]["down"].append(tile)
        return programs

    def of_head(self) -> list[list[Tile]]:
        return self._consecutive(self.head_tiles())


@cache
def schedule(name: str, n_programs: int, quant: bool) -> Schedule:
    return Schedule(CONFIGS[name], tuned(CONFIGS[name]), n_programs, quant)


@cache
def shares(name: str, n_programs: int, quant: bool) -> list[Share]:
    out = torch.full((n_programs, len(Share._fields)), -1, dtype=torch.int32)
    work_kernel[(n_programs,)](out, n_programs, BUILD=schedule(name, n_programs, quant).build)
    return [Share(*row) for row in out.tolist()]


@cache
def located(name: str, n_programs: int, quant: bool, layer: int, programs=None) -> list[list[Tile]]:
    """Return the located tiles by program, of `programs` or all; the layer number n_layers stands for the LM head."""
    model, config = schedule(name, n_programs, quant), CONFIGS[name]
    programs = programs or range(n_programs)
    mine = [shares(name, n_programs, quant)[program] for program in programs]
    if layer == config.n_layers:
        counts = [s.head for s in mine]
    else:
        counts = [s.qkv + s.o + s.gate_up + s.down for s in mine]
    first = torch.tensor([0, *counts]).cumsum(0).int()
    out = torch.full((sum(counts), 4), -1)
    locate_kernel[(len(programs),)](
        out,
        model.bases,
        expert_table(config, config.n_layers),
        torch.tensor(programs, dtype=torch.int32),
        first,
        layer,
        config.n_layers,
        n_programs,
        BUILD=model.build,
    )
    all_tiles = [Tile(at, n, more if more_n else 0, more_n) for at, n, more, more_n in out.tolist()]
    return [all_tiles[i:j] for i, j in pairwise(first.tolist())]


def flat(share: dict[str, list[Tile]]) -> list[Tile]:
    return [tile for phase in share.values() for tile in phase]


@with_quant
@with_programs
@pytest.mark.parametrize("name", CONFIGS)
def test_programs_share_all_tiles(name, n_programs, quant):
    """Each program has as many tiles of each matrix as the model deals out, and knows where they are."""
    config, model = CONFIGS[name], schedule(name, n_programs, quant)
    found, of_head = shares(name, n_programs, quant), model.of_head()
    ranks = min(n_programs, config.experts_per_token)
    n_down = len(model.tiles(0)["down"][0])
    first = dict(qkv=0, o=0, head=0)
    for program, (mine, expected) in enumerate(zip(found, model.of_layer(0), strict=True)):
        assert (mine.qkv_first, mine.o_first, mine.head_first) == tuple(first.values())
        assert {phase: getattr(mine, phase) for phase in expected} == {p: len(share) for p, share in expected.items()}
        assert mine.head == len(of_head[program])
        first = {phase: n + getattr(mine, phase) for phase, n in first.items()}
        of_expert = range(program % ranks, n_programs, ranks)
        assert (model.build.gate_up_run, mine.ranks) == (4 if quant else 1, ranks)
        assert (mine.member, mine.members) == (of_expert.index(program), len(of_expert))
        assert mine.down_each == len(range(mine.member, n_down, mine.members))
    # Dense tiles are shared as evenly as can be.
    for phase in first:
        assert max(getattr(s, phase) for s in found) - min(getattr(s, phase) for s in found) <= 1


@with_quant
@with_programs
@pytest.mark.parametrize("name", SMALL)
def test_every_tile_of_a_layer_is_one_program_s(name, n_programs, quant):
    """Blocks appear exactly once, with their scales, and each program has its own in the model's order."""
    layer = CONFIGS[name].n_layers - 1
    found, model = located(name, n_programs, quant, layer), schedule(name, n_programs, quant)
    tiles = model.tiles(layer)
    experts = [tile for phase in ("gate_up", "down") for expert in tiles[phase] for tile in expert]
    assert sorted(tile for share in found for tile in share) == sorted([*tiles["qkv"], *tiles["o"], *experts])
    assert found == [flat(share) for share in model.of_layer(layer)]


@with_programs
@pytest.mark.parametrize("name", SMALL)
def test_every_tile_of_the_head_is_one_program_s(name, n_programs):
    found, model = located(name, n_programs, False, CONFIGS[name].n_layers), schedule(name, n_programs, False)
    assert [tile for share in found for tile in share] == model.head_tiles()
    assert found == model.of_head()


@with_quant
def test_tiles_of_the_published_sizes_are_found(quant):
    """The last layer's tiles lie gigabytes behind the first's; a few programs are checked."""
    programs, layer = (0, 57, 131), GPT_OSS_120B.n_layers - 1
    expected = schedule("120b", 132, quant).of_layer(layer)
    assert located("120b", 132, quant, layer, programs) == [flat(expected[program]) for program in programs]


def test_the_head_of_published_sizes():
    programs = (0, 131)
    expected = schedule("120b", 132, False).of_head()
    assert located("120b", 132, False, GPT_OSS_120B.n_layers, programs) == [expected[program] for program in programs]


def test_tiles_of_a_head_of_more_than_two_gigabytes_are_found(monkeypatch):
    """A hidden size of 8192 with the published vocabulary makes such an LM head."""
    monkeypatch.setitem(CONFIGS, "wide", replace(GPT_OSS_120B, hidden_size=8192))
    model = schedule("wide", 132, False)
    expected = model.of_head()[131]
    assert expected[0].at - model.bases.lm_head > 1 << 31
    assert located("wide", 132, False, GPT_OSS_120B.n_layers, (131,)) == [expected]


@with_programs
@pytest.mark.parametrize("name", SMALL)
def test_tiles_that_share_a_scale_are_consecutive_in_one_program(name, n_programs):
    """With --quant four tiles, 64 rows, make the 32 outputs of an MXFP8 scale."""
    layer = CONFIGS[name].n_layers - 1
    number = {}
    for expert in schedule(name, n_programs, True).tiles(layer)["gate_up"]:
        assert len(expert) % 4 == 0
        number |= {tile: len(number) + n for n, tile in enumerate(expert)}
    seen = []
    for mine, share in zip(shares(name, n_programs, True), located(name, n_programs, True, layer), strict=True):
        first = mine.qkv + mine.o
        numbers = [number[tile] for tile in share[first : first + mine.gate_up]]
        for n in range(0, len(numbers), 4):
            assert numbers[n] % 4 == 0
            assert numbers[n : n + 4] == list(range(numbers[n], numbers[n] + 4))
        seen += numbers
    assert sorted(seen) == list(range(len(number)))


NOTHING = Tile(0, 0)


class Event(NamedTuple):
    asked: int
    taken: int
    tile: Tile = NOTHING


def expected_events(model: Schedule, program: int, n_layers: int, want_head: bool) -> list[Event]:
    """Return the events that decode_kernel should log for a program."""
    distance, stages = model.tuning.ring.prefetch_distance, model.tuning.ring.stages
    events, asked, taken = [], 0, 0
    layers = [model.of_layer(layer)[program] for layer in range(n_layers)]
    dense = [len(share["qkv"]) + len(share["o"]) for share in layers]
    head = model.of_head()[program] if want_head else []
    # Known before the router of a layer has spoken; after the last one has, all.
    known = [sum(len(flat(share)) for share in layers[:layer]) + dense[layer] for layer in range(n_layers)]
    known.append(sum(len(flat(share)) for share in layers) + len(head))

    def filled(limit: int, ahead: int) -> None:
        nonlocal asked
        asked = max(asked, min(limit, taken + ahead))
        events.append(Event(asked, taken))

    def took(share: list[Tile], limit: int) -> None:
        nonlocal asked, taken
        for tile in share:
            assert taken < asked
            taken += 1
            if asked < limit and asked - taken < distance:
                asked += 1
            events.append(Event(asked, taken, tile))

    filled(known[0], distance)
    for layer, share in enumerate(layers):
        took(share["qkv"], known[layer])
        filled(known[layer], stages)
        took(share["o"], known[layer])
        filled(known[layer + 1], distance)
        took([*share["gate_up"], *share["down"]], known[layer + 1])
    took(head, known[-1])
    assert asked == taken == known[-1]
    return events


def decode(model: Schedule, n_layers: int, want_head: bool) -> list[list[Event]]:
    """Return the events that decode_kernel logs, by program."""
    config = model.config
    expected = [expected_events(model, program, n_layers, want_head) for program in range(model.n_programs)]
    n_events = max(map(len, expected))
    log = torch.full((model.n_programs, n_events, 10), -1, dtype=torch.int32)
    decode_kernel[(model.n_programs,)](
        log,
        n_events,
        model.bases,
        expert_table(config, n_layers),
        n_layers,
        int(want_head),
        model.n_programs,
        BUILD=model.build,
    )
    found = []
    for events, rows in zip(expected, log, strict=True):
        assert (rows[len(events) :] == -1).all()
        descriptions = rows[:, 2:].contiguous().view(torch.int64).tolist()
        found.append(
            [
                Event(asked, taken, Tile(at, n, more if more_n else 0, more_n))
                for (asked, taken), (at, n, more, more_n) in zip(rows[:, :2].tolist(), descriptions)
            ][: len(events)]
        )
        assert found[-1] == events
    return found


@pytest.mark.parametrize(
    "name, n_programs, quant, changes",
    [
        ("small", 1, False, dict(dense=dict(qkv_rows=32, o_rows=16))),
        ("small", 5, True, {}),
        ("small", 3, False, dict(ring=dict(stages=2, prefetch_distance=2))),
        ("hidden 416, top 3 of 5", 2, True, dict(dense=dict(qkv_rows=32, o_rows=32, head_rows=32))),
        ("hidden 416, top 3 of 5", 40, False, dict(ring=dict(stages=3, prefetch_distance=1))),
        ("hidden 32, top 1 of 3", 1, False, {}),
        ("hidden 32, top 1 of 3", 40, True, {}),
        ("FP8", 3, False, {}),
    ],
)
def test_a_token_takes_its_tiles_in_order(name, n_programs, quant, changes, copies):
    """From the first layer to the LM head, tiles are asked for as far ahead as allowed and no further."""
    config = CONFIGS[name]
    model = Schedule(config, tuned(config, **changes), n_programs, quant)
    decode(model, 2, want_head=True)


def test_programs_without_a_tile_of_any_layer_have_tiles_of_the_head(copies):
    """Such programs still have tiles of the LM head."""
    model = schedule("one head a group", 132, False)
    idle = [program for program, share in enumerate(model.of_layer(0)) if not flat(share)]
    assert any(model.of_head()[program] for program in idle)
    decode(model, 2, want_head=True)


def test_a_prompt_s_token_asks_for_no_head(copies):
    decode(schedule("hidden 32, top 1 of 3", 3, False), 2, want_head=False)


def test_a_launch_without_layers_has_the_head_alone(copies):
    decode(schedule("small", 3, False), 0, want_head=True)


def test_nothing_is_asked_for_without_layers_and_head(copies):
    assert decode(schedule("small", 2, False), 0, want_head=False) == [[Event(0, 0)]] * 2
