"""Models on several GPUs, all ranks at once in the interpreter: right, free of races, each part of the exchange needed.

The prompts' tokens are fed one by one where results are compared with one GPU's, unless a test says that it feeds them
in blocks, as products of blocks round in another way.
"""

import contextlib
import dataclasses
import itertools

import pytest
import torch
from made_up_models import MemoryCheckpoint, loud_checkpoint, random_token_ids, small_config
from tunings import ahead_tiles, ring_tiles, small_tiles

import interpreter
from checkpoints.config import FP8_GROUPS, FP8_ROWS, DenseFormats
from common import barrier, exchange, packets
from common.barrier import ABORT
from common.cpu import CPU
from common.gfx950 import GFX950
from common.machine import Machine
from common.sm90 import SM_90
from gpt_oss_megakernel import MegaModel
from host.launch import blocks_for
from interpreter import simulate
from multi_gpu import prompts, rank_kernel, ranks
from multi_gpu.heap import LocalHeap
from multi_gpu.protocol import EPOCH_STEP, FIRST_EPOCH, LAST_EPOCH
from multi_gpu.ranks import RankModel
from system.errors import InputError, MegakernelAborted

CPU_DEVICE = torch.device("cpu")
SPINS = 500  # polls of a wait that gives up
CONTEXT = 16
SIZES = dict(n_layers=2, layer_is_sliding=(True, False), intermediate_size=256)
CONFIG = small_config(**SIZES)
ODD = small_config(**(SIZES | dict(intermediate_size=11 * 32, vocab_size=163)))  # divides into no number of ranks
TOKENS = random_token_ids(3, CONFIG)
N_DECODED = 2
CLOSE = 2e-6  # of the largest logit, or of a key: float32 sums in another order, measured 2e-7 to 5e-7

LAYOUTS = {"tp 2": ("tp", 2), "tp 4": ("tp", 4), "roles 2": ("roles", 2), "roles 3": ("roles", 3)}
with_layouts = pytest.mark.parametrize("layout, n_ranks", LAYOUTS.values(), ids=LAYOUTS.keys())
with_quant = pytest.mark.parametrize("quant", [False, True], ids=["default", "quant"])
PACKETS = {4: "the O projection phase of layer 0", 7: "the down phase of layer 0"}
PACKETS |= {10: "the O projection phase of layer 1", 13: "the down phase of layer 1"}  # exchanges of tp in layers
EXCHANGES = {
    "tp": {1: "the embedding", 14: "the LM head"},
    "roles": {5: "the router phase of layer 0", 7: "the down phase of layer 0"}
    | {11: "the router phase of layer 1", 13: "the down phase of layer 1"},
}
EXCHANGES_OF_TWO = [(layout, number) for layout, found in EXCHANGES.items() for number in found]


@pytest.fixture(scope="module")
def checkpoint() -> MemoryCheckpoint:
    return loud_checkpoint(CONFIG)


@pytest.fixture(scope="module")
def odd_checkpoint() -> MemoryCheckpoint:
    return loud_checkpoint(ODD)


def model_of(
    checkpoint, layout: str, n_ranks: int, quant: bool = False, num_programs: int = 2, tiles=small_tiles, **options
) -> RankModel:
    """Make all ranks of a model, with tiles so small that each phase has several. Options: `machine`, or Decoder's."""
    changes = {"machine": options.pop("machine")} if "machine" in options else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "tuning_for", lambda device, config: tiles(config, spin_limit=SPINS, **changes))
        return RankModel(
            checkpoint,
            layout,
            n_ranks,
            range(n_ranks),
            lambda n_bytes: LocalHeap(n_ranks, CPU_DEVICE),
            quant,
            num_programs=num_programs,
            max_context=CONTEXT,
            device="cpu",
            tuning=tiles(checkpoint.config, spin_limit=SPINS, **changes),
            **options,
        )


def single_of(checkpoint, quant: bool = False, tiles=small_tiles, **options) -> MegaModel:
    """Make the same model on one GPU."""
    tuning = tiles(checkpoint.config)
    return MegaModel(checkpoint, quant, CONTEXT, "cpu", num_programs=2, tuning=tuning, **options)


def fed_logits(model, token_ids=TOKENS) -> torch.Tensor:
    """Feed tokens from position 0 on, and return the logits after each one."""
    return torch.stack([model.logits(token, position) for position, token in enumerate(token_ids)])


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = CLOSE) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


def assert_like_one_gpu(found: torch.Tensor, expected: torch.Tensor, layout: str) -> None:
    """Assert the same logits: to the bit where GPUs have whole matrices, else up to the order of sums."""
    if layout == "roles":
        assert torch.equal(found, expected)
    assert_close(found, expected)
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


# ---------------------------------------------------------------- results


@pytest.fixture(scope="module", params=[False, True], ids=["default", "quant"])
def expected(request, checkpoint) -> tuple[bool, torch.Tensor, list[int]]:
    """The path, and one GPU's logits and tokens."""
    model = single_of(checkpoint, request.param)
    return request.param, fed_logits(model, TOKENS[:2]), list(model.decode(TOKENS[0], 0, N_DECODED))


@with_layouts
def test_ranks_compute_what_one_gpu_computes(layout, n_ranks, expected, checkpoint):
    quant, logits, tokens = expected
    model = model_of(checkpoint, layout, n_ranks, quant)
    with simulate(seed=n_ranks, detect_races=True) as simulation:
        found = fed_logits(model, TOKENS[:2])
        model.reset()
        assert list(model.decode(TOKENS[0], 0, N_DECODED)) == tokens
    assert not simulation.races
    assert_like_one_gpu(found, logits, layout)


@pytest.mark.parametrize(
    "layout, n_ranks, quant", [("tp", 8, True), ("tp", 4, False), ("roles", 5, False), ("roles", 5, True)]
)
def test_ranks_of_uneven_shares(layout, n_ranks, quant, odd_checkpoint):
    model = model_of(odd_checkpoint, layout, n_ranks, quant, num_programs=1 if n_ranks == 8 else 2)
    n_tokens = 1 if n_ranks == 8 else 2
    with simulate(seed=3, detect_races=True) as simulation:
        found = fed_logits(model, TOKENS[:n_tokens])
    assert not simulation.races
    assert_like_one_gpu(found, fed_logits(single_of(odd_checkpoint, quant), TOKENS[:n_tokens]), layout)


@pytest.mark.parametrize("layout", ["tp", "roles"])
@pytest.mark.parametrize(
    "tiles",
    [
        ahead_tiles,
        ring_tiles,
    ],
    ids=["gfx950", "sm_90"],
)
@with_quant
def test_ranks_with_the_orders_of_each_machine(tiles, layout, quant, checkpoint):
    model = model_of(checkpoint, layout, 2, quant, tiles=tiles)
    with simulate(seed=4, detect_races=True) as simulation:
        found = fed_logits(model, TOKENS[:2])
    assert not simulation.races
    assert_like_one_gpu(found, fed_logits(single_of(checkpoint, quant, tiles), TOKENS[:2]), layout)


@with_layouts
def test_all_ranks_have_the_same_token(layout, n_ranks, checkpoint):
    model = model_of(checkpoint, layout, n_ranks)
    token = model.step(TOKENS[0], 0)
    assert [int(state.tokens[1]) for state in model.states()] == [token] * n_ranks


@pytest.mark.parametrize("layout", ["tp", "roles"])
@pytest.mark.parametrize(
    "dense",
    [DenseFormats(qkv=FP8_ROWS, o=FP8_ROWS, router=FP8_ROWS, head=FP8_ROWS), DenseFormats(o=FP8_GROUPS)],
    ids=["rows", "o in groups"],
)
def test_ranks_with_dense_matrices_in_fp8(dense, layout, checkpoint):
    found = fed_logits(model_of(checkpoint, layout, 2, dense=dense), TOKENS[:2])
    assert_like_one_gpu(found, fed_logits(single_of(checkpoint, dense=dense), TOKENS[:2]), layout)


def test_heads_that_end_within_a_scale_group_are_refused():
    checkpoint = loud_checkpoint(small_config(**SIZES, head_dim=16, n_heads=8, n_kv_heads=8))
    with pytest.raises(InputError, match=r"^--layout tp: 1 heads are no whole scale groups of o$"):
        model_of(checkpoint, "tp", 8, dense=DenseFormats(o=FP8_GROUPS))


@pytest.mark.parametrize("layout", ["tp", "roles"])
def test_hidden_states(layout, checkpoint):
    model, single = model_of(checkpoint, layout, 2), single_of(checkpoint)
    for n_layers in range(CONFIG.n_layers + 1):
        assert_close(model.hidden(TOKENS[0], 0, n_layers), single.hidden(TOKENS[0], 0, n_layers))


@pytest.mark.parametrize("layout, n_ranks", [("tp", 2), ("roles", 3)])
def test_bits_depend_on_no_order_and_no_number_of_programs(layout, n_ranks, checkpoint):
    model = model_of(checkpoint, layout, n_ranks)
    found = []
    for seed in (1, 2):
        with simulate(seed=seed):
            found.append(fed_logits(model, TOKENS[:2]))
    found.append(fed_logits(model_of(checkpoint, layout, n_ranks, num_programs=3), TOKENS[:2]))
    assert torch.equal(found[0], found[1]), "another order of programs"
    assert torch.equal(found[0], found[2]), "another number of programs"


@pytest.mark.parametrize("layout, n_ranks", [("tp", 2), ("roles", 3)])
def test_switch_path_and_reset_begin_anew(layout, n_ranks, checkpoint):
    model = model_of(checkpoint, layout, n_ranks)
    expected = {False: fed_logits(model, TOKENS[:2])}
    expected[True] = fed_logits(model_of(checkpoint, layout, n_ranks, quant=True), TOKENS[:2])
    assert not torch.equal(expected[False], expected[True])
    for quant in (True, False):
        model.switch_path(quant)
        assert torch.equal(fed_logits(model, TOKENS[:2]), expected[quant])
    model.reset()
    assert not any(state.k_cache.any() or state.v_cache.any() for state in model.states())
    assert torch.equal(fed_logits(model, TOKENS[:2]), expected[False])


@pytest.mark.parametrize("layout", ["tp", "roles"])
def test_epochs_begin_anew_in_time(layout, checkpoint):
    """Flags are lowered before a launch could reach OPEN_ALL, and the launches after that wait again."""
    model = model_of(checkpoint, layout, 2)
    expected = fed_logits(model)
    model.epoch = LAST_EPOCH - 20
    with simulate(seed=1, detect_races=True) as simulation:
        assert torch.equal(fed_logits(model), expected)
    assert not simulation.races
    assert FIRST_EPOCH <= model.epoch < FIRST_EPOCH + 100
    assert max(int(flags.max()) for flags in model.buffers["flags"]) < model.epoch


# ---------------------------------------------------------------- prompts in blocks

PROMPT = random_token_ids(8, CONFIG)
BLOCK_TOKENS = 5  # so that the prompt takes two blocks


def block_model(make, checkpoint, *arguments, **options):
    """Make a model that feeds a prompt in blocks of BLOCK_TOKENS."""
    blocks = dataclasses.replace(blocks_for(CPU_DEVICE), tokens=BLOCK_TOKENS, min_tokens=2)
    return make(checkpoint, *arguments, blocks=blocks, **options)


def joined_cache(model, field: str) -> torch.Tensor:
    """Return the keys or values of all ranks, each KV head once: [layers, KV heads, positions fed, head_dim]."""
    sharers = max(1, len(model.ranks) // CONFIG.n_kv_heads) if model.layout == "tp" else len(model.ranks)
    heads = [getattr(rank.own_state, field) for rank in model.ranks[::sharers]]
    return torch.cat(heads, 1)[:, :, : len(PROMPT)].float()


@pytest.mark.parametrize("n_ranks, quant", [(2, False), (2, True), (4, False)])
def test_prompts_in_blocks(n_ranks, quant, checkpoint):
    """Keys and values are those of one GPU's blocks, up to bfloat16 that rounds to the other side."""
    model = block_model(model_of, checkpoint, "tp", n_ranks, quant)
    single = block_model(single_of, checkpoint, quant)
    with simulate(seed=5, detect_races=True) as simulation:
        token = next(iter(model.generate(PROMPT, 1)))
    # Programs of prefill.py's grouping kernel store the same value twice, on one GPU as well.
    assert not [race for race in simulation.races if "grouping.py" not in race]
    assert token == next(iter(single.generate(PROMPT, 1)))
    for field in ("k_cache", "v_cache"):
        expected = getattr(single.state, field)[:, :, : len(PROMPT)].float()
        assert_close(joined_cache(model, field), expected, 2**-7)
        sharers = n_ranks // CONFIG.n_kv_heads
        for rank in model.ranks:
            first = model.ranks[rank.share.rank // sharers * sharers]
            assert torch.equal(getattr(rank.own_state, field), getattr(first.own_state, field))


@pytest.mark.parametrize(
    "n_ranks, tiles, quant",
    [
        (2, small_tiles, True),
        (3, small_tiles, False),
        (5, small_tiles, True),
        (2, ring_tiles, False),
        (3, ring_tiles, True),
    ],
)
def test_prompts_in_blocks_over_roles(n_ranks, tiles, quant, checkpoint):
    """Keys, values and tokens are those of one GPU's blocks, bit for bit."""
    model = block_model(model_of, checkpoint, "roles", n_ranks, quant, tiles=tiles)
    single = block_model(single_of, checkpoint, quant, tiles=tiles)
    with simulate(seed=5, detect_races=True) as simulation:
        tokens = list(model.generate(PROMPT, 2))
    assert not [race for race in simulation.races if "grouping.py" not in race]  # see test_prompts_in_blocks
    assert tokens == list(single.generate(PROMPT, 2))
    for field in ("k_cache", "v_cache"):
        assert torch.equal(joined_cache(model, field), getattr(single.state, field)[:, :, : len(PROMPT)].float())


def test_each_rank_with_experts_multiplies_its_own(checkpoint):
    """Over roles a block's pairs are distributed by expert."""
    model = block_model(model_of, checkpoint, "roles", 3)
    next(iter(model.generate(PROMPT, 1)))
    kept = [prefill.buffers.chosen for prefill in model.prefill._prefills[1:]]
    halves = range(4), range(4, 8)
    for chosen, own in zip(kept, halves, strict=True):
        used = chosen[chosen < CONFIG.n_experts].tolist()
        assert used and set(used) <= set(own)
        assert (chosen == CONFIG.n_experts).any()


@pytest.mark.parametrize("first, awaited", [(0, 1), (1, 0)])
def test_ranks_of_a_prompt_wait_for_each_other(first, awaited, monkeypatch):
    """All launches of one rank before any of the other: it waits for flags that nobody raises.

    Having given up in one layer, it must not tell the other one that the next layers are done.
    """
    three_layers = loud_checkpoint(dataclasses.replace(CONFIG, n_layers=3, layer_is_sliding=(True, False, True)))
    model = block_model(model_of, three_layers, "roles", 2)
    monkeypatch.setattr(prompts, "one_by_one", lambda launches: itertools.chain(launches[first], launches[1 - first]))
    with simulate(deadlock_limit=None), pytest.raises(MegakernelAborted):
        next(iter(model.generate(PROMPT, 1)))
    assert all(rank.own_state.sync[ABORT.value] for rank in model.ranks)
    model.ranks = [model.ranks[first]]  # the other one gave up too, later
    place = "the router of layer 0 of a prompt's block" if first else "the down of layer 0 of a prompt's block"
    text = rf"^rank {awaited} did not arrive behind {place} \(rank {first} waited for it\)$"
    with pytest.raises(MegakernelAborted, match=text):
        model._check_barriers()


def test_prompts_in_blocks_agree_with_tokens_one_by_one(checkpoint):
    model = block_model(model_of, checkpoint, "tp", 2)
    token = next(iter(model.generate(PROMPT, 1)))
    cache = joined_cache(model, "k_cache")
    model.reset()
    logits = fed_logits(model, PROMPT)
    assert token == int(logits[-1].argmax())
    assert_close(cache, joined_cache(model, "k_cache"), 0.05)


# ---------------------------------------------------------------- each part is needed


def fed_twice(model, seed: int = 6) -> tuple[list[str], torch.Tensor | str]:
    """Feed two tokens and a third; return the races and the first two's logits, or the text of MegakernelAborted."""
    with simulate(seed=seed, detect_races=True, deadlock_limit=None) as simulation:
        try:
            logits = fed_logits(model, TOKENS[:2])
            model.step(TOKENS[2], 2)
            return simulation.races, logits
        except MegakernelAborted as error:
            return simulation.races, str(error)


def with_rank_sync(machine: Machine, **changes) -> Machine:
    """Make a machine that synchronizes ranks in another way."""
    return dataclasses.replace(machine, rank_sync=machine.rank_sync._replace(**changes))


WEAKER_MACHINES = {
    "flags are raised relaxed": with_rank_sync(CPU, release="relaxed"),
    "arrivals are relaxed": with_rank_sync(CPU, acquire_release="relaxed"),
    "arrivals only acquire": with_rank_sync(CPU, acquire_release="acquire"),
    "arrivals only release": with_rank_sync(CPU, acquire_release="release"),
    "waits do not acquire": with_rank_sync(CPU, acquire=SM_90.rank_sync.acquire),
    "gfx950, no write-back": with_rank_sync(GFX950, publish=CPU.sync.publish),
}


@pytest.mark.parametrize("layout", ["tp", "roles"])
@pytest.mark.parametrize("machine", WEAKER_MACHINES.values(), ids=WEAKER_MACHINES.keys())
def test_each_part_of_the_order_among_ranks_is_needed(machine, layout, checkpoint):
    model = model_of(checkpoint, layout, 2, num_programs=3, machine=machine)
    assert any(fed_twice(model, seed)[0] for seed in range(4))


@pytest.mark.parametrize("layout", ["tp", "roles"])
def test_the_whole_order_among_ranks_brings_no_race(layout, checkpoint):
    """The other tests of this part do find their races, as this one finds none."""
    races, logits = fed_twice(model_of(checkpoint, layout, 2, num_programs=3))
    assert not races
    assert_like_one_gpu(logits, fed_logits(single_of(checkpoint), TOKENS[:2]), layout)


def replace_everywhere(name: str, function, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a function in the place of one of common/exchange.py, wherever it is called from."""
    for module in (exchange, rank_kernel, prompts):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize("layout, number", EXCHANGES_OF_TWO)
def test_each_wait_for_flags_is_needed(layout, number, checkpoint, monkeypatch):
    """In its place the programs wait for those of their own rank alone, who have arrived before them."""
    model = model_of(checkpoint, layout, 2)
    wait = exchange.wait_for_flags

    def wait_unless_left_out(ctx, at, *rest):
        if int(at) != number:
            wait(ctx, at, *rest)

    replace_everywhere("wait_for_flags", wait_unless_left_out, monkeypatch)
    races, _ = fed_twice(model)
    assert races


@pytest.mark.parametrize("layout, number", EXCHANGES_OF_TWO)
def test_a_rank_whose_flag_stays_down_is_named(layout, number, checkpoint, monkeypatch):
    """The programs of the rank still arrive among themselves, and all ranks end."""
    model = model_of(checkpoint, layout, 2)
    sender = 0 if EXCHANGES[layout][number].startswith("the router") else 1
    raise_flags = exchange.raise_flags

    def raise_unless_left_out(ctx, local, at, to, build):
        if int(at) == number and build.rank == sender:
            barrier.arrive(ctx.s.sync, build.machine)
        else:
            raise_flags(ctx, local, at, to, build)

    replace_everywhere("raise_flags", raise_unless_left_out, monkeypatch)
    _, outcome = fed_twice(model)
    assert isinstance(outcome, str), "MegakernelAborted"
    records = [int(state.sync[barrier.ABORT.value]) for state in model.states()]
    assert number + (sender + 1) * exchange.RANK_UNIT.value in records
    if sender == 1:  # else rank 0, which waits for what rank 1 cannot make, gives up as well and speaks first
        assert outcome.startswith(f"rank 1 did not arrive behind {EXCHANGES[layout][number]} (rank 0 ")


def number_of(epoch) -> int:
    """Return the number of the exchange of an epoch, whose launches are EPOCH_STEP apart here."""
    return (int(epoch) - FIRST_EPOCH) % EPOCH_STEP


@pytest.mark.parametrize("number", PACKETS)
def test_each_wait_for_packets_is_needed(number, checkpoint, monkeypatch):
    """Without it programs take packets of the layer or token before."""
    expected = fed_logits(model_of(checkpoint, "tp", 2, num_programs=3), TOKENS[:2])
    count_missing = packets.count_missing

    def none_missing(found, mask, epoch):
        return 0 if number_of(epoch) == number else count_missing(found, mask, epoch)

    monkeypatch.setattr(packets, "count_missing", none_missing)
    model = model_of(checkpoint, "tp", 2, num_programs=3)
    outcomes = [fed_twice(model, seed)[1] for seed in range(3)]
    assert any(isinstance(outcome, str) or not torch.equal(outcome, expected) for outcome in outcomes)


@pytest.mark.parametrize("number", PACKETS)
def test_a_rank_whose_packets_stay_away_is_named(number, checkpoint, monkeypatch):
    """The rank that waits gives up, and sends no packet from then on that the other would take for a value."""
    model = model_of(checkpoint, "tp", 2)
    build = model.ranks[1].build  # which waits longer, so that it would take a later packet for a value
    model.ranks[1].build = dataclasses.replace(build, tuning=dataclasses.replace(build.tuning, spin_limit=4 * SPINS))
    sum_packets = exchange.sum_packets

    def without_packets(ctx, buffers, size, place, values, mask, when, build):
        if int(when[1]) == number and build.rank == 1:
            when = (packets.NO_EPOCH, when[1])
        return sum_packets(ctx, buffers, size, place, values, mask, when, build)

    monkeypatch.setattr(exchange, "sum_packets", without_packets)
    _, outcome = fed_twice(model)
    assert isinstance(outcome, str), "MegakernelAborted"
    assert outcome.startswith(f"rank 1 did not arrive behind {PACKETS[number]} (rank 0 waited for it)")
    following = {4: 7, 7: 10, 10: 13, 13: 14}[number]
    records = [int(state.sync[barrier.ABORT.value]) for state in model.states()]
    assert records == [number + 2 * exchange.RANK_UNIT.value, following + exchange.RANK_UNIT.value]


@pytest.mark.parametrize("layout", ["tp", "roles"])
def test_epochs_must_not_be_used_again(layout, checkpoint):
    """With flags that the launch before has raised, nobody waits."""
    model = model_of(checkpoint, layout, 2)
    model.advance_epoch = lambda n_numbers: None
    races, _ = fed_twice(model)
    assert races


def test_exchanges_of_a_block_need_an_epoch_each(checkpoint, monkeypatch):
    model = block_model(model_of, checkpoint, "tp", 2)
    monkeypatch.setattr(prompts, "epoch_after", lambda epoch, n_numbers: epoch)
    with simulate(seed=6, detect_races=True, deadlock_limit=None) as simulation, contextlib.suppress(MegakernelAborted):
        next(iter(model.generate(PROMPT, 1)))
    assert [race for race in simulation.races if "prompts.py" in race]


# ---------------------------------------------------------------- a rank that is gone

DEAD = [("tp", 2, 0, "the embedding"), ("tp", 2, 1, "the embedding")]
DEAD += [
    ("tp", 4, 2, "the embedding"),
    ("roles", 2, 0, "the router phase of layer 0"),
    ("roles", 3, 2, "the down phase of layer 0"),
]


@pytest.mark.parametrize("layout, n_ranks, dead, place", DEAD)
def test_a_rank_that_does_not_launch_is_named(layout, n_ranks, dead, place, checkpoint, monkeypatch):
    """The others give up, and reset() makes the model usable again."""
    model = model_of(checkpoint, layout, n_ranks)
    expected = fed_logits(model, TOKENS[:2])
    text = rf"^rank {dead} did not arrive behind {place} \(rank {1 if dead == 0 else 0} waited for it\)$"

    def launch_the_others(launches):
        interpreter.launch_together([launch for rank, launch in enumerate(launches) if rank != dead])

    with monkeypatch.context() as patch:
        patch.setattr(model, "run_together", launch_the_others)
        with simulate(deadlock_limit=None), pytest.raises(MegakernelAborted, match=text):
            model.step(TOKENS[0], 0)
        with pytest.raises(MegakernelAborted, match=text):
            model._check_barriers()
    model.reset()
    model._check_barriers()
    with simulate(deadlock_limit=None):
        fed_logits(model, TOKENS[:2])  # see test_flags_are_down_after_reset
        assert torch.equal(fed_logits(model, TOKENS[:2]), expected)


def abort(model, dead: int) -> None:
    """Leave a rank out of a launch, so that the others give up."""
    launch = model.run_together
    model.run_together = lambda launches: launch([each for rank, each in enumerate(launches) if rank != dead])
    with simulate(deadlock_limit=None), pytest.raises(MegakernelAborted):
        model.step(TOKENS[0], 0)
    model.run_together = launch


@pytest.mark.parametrize("layout", ["tp", "roles"])
def test_flags_are_down_after_reset(layout, checkpoint):
    """A rank that gave up has raised the flags that it waits for beyond every target: none may stay so."""
    model = model_of(checkpoint, layout, 2)
    expected = fed_logits(model, TOKENS[:2])
    abort(model, dead=1)
    model.reset()
    assert max(int(flags.max()) for flags in model.buffers["flags"]) < barrier.OPEN_ALL.value
    races, logits = fed_twice(model)
    assert not races
    assert torch.equal(logits, expected)


@pytest.mark.parametrize("seed", range(3))
def test_packets_of_before_a_reset_do_not_count(seed, checkpoint):
    """The first launch after a reset has the epochs of the first one after the reset before."""
    model = model_of(checkpoint, "tp", 2, num_programs=3)
    model.reset()
    model.logits(TOKENS[0], 0)
    model.reset()
    with simulate(seed=seed):
        found = model.logits(TOKENS[1], 0)
    assert torch.equal(found, model_of(checkpoint, "tp", 2).logits(TOKENS[1], 0))


@pytest.mark.parametrize("dead", [0, 1])
def test_a_model_that_gave_up_stays_unusable_until_reset(dead, checkpoint):
    model = model_of(checkpoint, "tp", 2)
    abort(model, dead)
    with simulate(deadlock_limit=None), pytest.raises(MegakernelAborted):
        model.step(TOKENS[0], 0)
