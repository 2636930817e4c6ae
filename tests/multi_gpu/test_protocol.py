"""multi_gpu/protocol.py: every rank's share of a model, the exchanges of a launch, and the numbers of their flags."""

import itertools
import re

import pytest
from made_up_models import small_config

from checkpoints.config import GPT_OSS_20B, GPT_OSS_120B, ModelConfig
from command_line.options import LAYOUTS
from host.phases import PHASE_NAMES, PHASES
from multi_gpu.protocol import (
    EPOCH_STEP,
    FIRST_EPOCH,
    LAST_EPOCH,
    ROLES_RANKS,
    TP_RANKS,
    check_ranks,
    epoch_after,
    exchanges_of,
    shares_of,
    split_evenly,
)
from system.errors import InputError

UNEVEN = small_config(n_heads=18, n_kv_heads=6, intermediate_size=11 * 32, vocab_size=163)
SPLITS = {
    "120b": (GPT_OSS_120B, TP_RANKS),
    "20b": (GPT_OSS_20B, TP_RANKS),
    "small": (small_config(intermediate_size=256), TP_RANKS),
    "uneven": (UNEVEN, (1, 2, 4)),
}
SPLITS = {f"{name}, {n}": (config, n) for name, (config, numbers) in SPLITS.items() for n in numbers}
with_splits = pytest.mark.parametrize("config, n_ranks", SPLITS.values(), ids=SPLITS.keys())


def refused(call, text: str) -> None:
    """Assert that a call raises InputError with exactly this text."""
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        call()


def joined(runs) -> list[int]:
    return [i for run in runs for i in run]


@with_splits
def test_tp_shares_cover_everything_once(config, n_ranks):
    shares = shares_of(config, "tp", n_ranks)
    assert [(share.layout, share.rank, share.n_ranks) for share in shares] == [
        ("tp", n, n_ranks) for n in range(n_ranks)
    ]
    assert joined(share.heads for share in shares) == list(range(config.n_heads))
    assert joined(share.groups for share in shares) == list(range(config.intermediate_size // 32))
    assert joined(share.intermediate for share in shares) == list(range(config.intermediate_size))
    assert joined(share.vocabulary for share in shares) == list(range(config.vocab_size))
    assert all(share.has_attention and share.has_experts for share in shares)
    held = joined(share.kv_heads for share in shares)
    sharers = max(1, n_ranks // config.n_kv_heads)
    assert held == [head for head in range(config.n_kv_heads) for _ in range(sharers)]


@with_splits
def test_each_query_head_finds_its_kv_head_on_its_rank(config, n_ranks):
    """A rank's kernels take query head i of theirs to KV head i // (heads / KV heads)."""
    group = config.n_heads // config.n_kv_heads
    for share in shares_of(config, "tp", n_ranks):
        own = share.config_of(config)
        assert own.n_heads % own.n_kv_heads == 0
        own_group = own.n_heads // own.n_kv_heads
        for i, head in enumerate(share.heads):
            assert share.kv_heads[i // own_group] == head // group


@with_splits
def test_a_rank_is_compiled_for_its_share_alone(config, n_ranks):
    for share in shares_of(config, "tp", n_ranks):
        own = share.config_of(config)
        assert (own.n_heads, own.n_kv_heads) == (len(share.heads), len(share.kv_heads))
        assert (own.intermediate_size, own.vocab_size) == (len(share.intermediate), len(share.vocabulary))
        assert own.stop_ids == ()
        assert (own.hidden_size, own.n_layers, own.n_experts) == (config.hidden_size, config.n_layers, config.n_experts)


def test_uneven_runs_differ_by_one_and_the_first_are_longer():
    assert [len(share.groups) for share in shares_of(GPT_OSS_120B, "tp", 8)] == [12, 12, 11, 11, 11, 11, 11, 11]
    assert [len(share.groups) for share in shares_of(UNEVEN, "tp", 4)] == [3, 3, 3, 2]
    assert [len(share.kv_heads) for share in shares_of(UNEVEN, "tp", 4)] == [2, 2, 1, 1]
    assert [len(share.heads) for share in shares_of(UNEVEN, "tp", 4)] == [6, 6, 3, 3]
    assert [len(share.vocabulary) for share in shares_of(UNEVEN, "tp", 4)] == [41, 41, 41, 40]


@pytest.mark.parametrize("n", [*range(8, 40), 90, 201088])
@pytest.mark.parametrize("n_ranks", TP_RANKS)
def test_split_evenly(n, n_ranks):
    runs = split_evenly(n, n_ranks, "things")
    lengths = [len(run) for run in runs]
    assert (len(runs), runs[0].start, runs[-1].stop) == (n_ranks, 0, n)
    assert all(first.stop == second.start for first, second in itertools.pairwise(runs))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] - lengths[-1] == (1 if n % n_ranks else 0)


@pytest.mark.parametrize("n_ranks", ROLES_RANKS)
def test_roles_hold_whole_matrices(n_ranks):
    config = small_config()
    shares = shares_of(config, "roles", n_ranks)
    assert [share.rank for share in shares] == list(range(n_ranks))
    assert [share.has_attention for share in shares] == [True] + [False] * (n_ranks - 1)
    assert [share.has_experts for share in shares] == [False] + [True] * (n_ranks - 1)
    for share in shares:
        own = share.config_of(config)
        assert (own.n_heads, own.n_kv_heads) == (config.n_heads, config.n_kv_heads)
        assert (own.intermediate_size, own.vocab_size) == (config.intermediate_size, config.vocab_size)


@pytest.mark.parametrize(
    "layout, n_ranks, changes, text",
    [
        ("tp", 3, {}, "--layout tp: 3 ranks; it takes 1, 2, 4, 8"),
        ("roles", 4, {}, "--layout roles: 4 ranks; it takes 2, 3, 5"),
        ("tp", 8, {}, "--layout tp: 2 scale groups of the experts cannot be split over 8 ranks"),
        (
            "tp",
            8,
            dict(intermediate_size=224),
            "--layout tp: 7 scale groups of the experts cannot be split over 8 ranks",
        ),
        (
            "tp",
            8,
            dict(intermediate_size=256, vocab_size=7),
            "--layout tp: 7 rows of the LM head cannot be split over 8 ranks",
        ),
        (
            "tp",
            4,
            dict(n_heads=9, n_kv_heads=3),
            "--layout tp: 9 query heads with 3 KV heads cannot be split over 4 ranks",
        ),
        (
            "tp",
            4,
            dict(n_heads=6, n_kv_heads=2),
            "--layout tp: 6 query heads with 2 KV heads cannot be split over 4 ranks",
        ),
        ("roles", 3, dict(experts_per_token=1), "--layout roles: 2 ranks for 1 experts per token"),
        ("roles", 5, dict(experts_per_token=3), "--layout roles: 4 ranks for 3 experts per token"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(layout, n_ranks, changes, text):
    refused(lambda: shares_of(small_config(**changes), layout, n_ranks), text)


@pytest.mark.parametrize("layout, allowed", [("tp", (1, 2, 4, 8)), ("roles", (2, 3, 5))])
def test_numbers_of_ranks(layout, allowed):
    for n_ranks in range(17):
        if n_ranks in allowed:
            check_ranks(layout, n_ranks)
        else:
            names = ", ".join(map(str, allowed))
            refused(lambda n=n_ranks: check_ranks(layout, n), f"--layout {layout}: {n_ranks} ranks; it takes {names}")


def test_epochs_do_not_make_triton_compile_anew():
    """Triton specializes a kernel for integers that 16 divides, and for 1."""
    epoch = FIRST_EPOCH
    for n_numbers in [0, 1, 2, 7, 8, 14, 15, 16, 17, 31, 32, 218, *range(0, 500, 3)]:
        assert epoch % 16 and epoch != 1
        following = epoch_after(epoch, n_numbers)
        assert following > epoch + n_numbers, "a number of the launch before would raise a flag of the next one"
        assert following <= epoch + n_numbers + EPOCH_STEP
        epoch = following
    assert FIRST_EPOCH > 0, "flags are zero at first"


@pytest.mark.parametrize("config", [GPT_OSS_120B, small_config()], ids=["120b", "small"])
def test_flags_stay_below_an_int32(config: ModelConfig):
    """The last epoch's launch may be that of a prompt block, with an exchange per epoch step."""
    block_of_prompt = EPOCH_STEP * (1 + 2 * config.n_layers)
    assert epoch_after(LAST_EPOCH, max(block_of_prompt, 2 + len(PHASES) * config.n_layers)) < 1 << 30


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("want_head", [False, True])
def test_exchanges_are_listed_in_order(layout, want_head):
    n_ranks, n_layers = {"tp": 4, "roles": 3}[layout], 2
    found = exchanges_of(layout, n_ranks, n_layers, want_head)
    names = [(exchange.name, layer) for exchange, layer in found]
    if layout == "tp":
        layers = [(name, n) for n in range(n_layers) for name in ("O projection", "down")]
        assert names == [("embedding", None), *layers] + [("LM head", None)] * want_head
        assert all(exchange.senders == exchange.receivers == (0, 1, 2, 3) for exchange, _ in found)
    else:
        layers = [(name, n) for n in range(n_layers) for name in ("router", "down")]
        assert names == layers + [("argmax", None)] * want_head
        for exchange, _ in found:
            ends = (1, 2), (0,)
            assert (exchange.senders, exchange.receivers) == (ends if exchange.name == "down" else ends[::-1])
    assert all(name in PHASE_NAMES for name, _ in names)
