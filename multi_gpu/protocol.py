"""Who holds what, and what is sent when: the layouts of a model on several GPUs, as data.

A rank is a process with a GPU. Every rank launches one persistent kernel per token. Ranks exchange values inside the
kernel, by flags or by packets (common/exchange.py): a program stores its part in the memory of another rank. By flags,
the last program of a rank to arrive raises a flag there, and the programs of that rank wait for the flag. By packets,
each value comes with its epoch, and only the program of the same number waits for it.

Layout "tp" (tensor parallel) splits every large matrix. All ranks run all phases; the residual is equal on all:

    rank 0   embedding ══ QKV | attention | O ↕| router | gate-up | down ↕| ... | LM head ══ argmax
                       ║                      │                          │                ║
    rank 1   embedding ══ QKV | attention | O ↕| router | gate-up | down ↕| ... | LM head ══ argmax

    | a grid barrier of one rank
    ↕ an exchange by packets, at the end of the phase's work: of a program with those of its number on other ranks
    ══ an exchange by flags, which is also a barrier of all ranks' programs

Layout "roles" gives whole matrices to ranks. Rank 0 has attention, router and tail, the others the chosen experts in
turn (expert rank i, counted from the largest weight, belongs to expert-holding rank i % (ranks - 1)):

    rank 0   embedding | QKV | attention | O | router ──┐ expert input   ┌── QKV ...  | LM head | argmax ──┐ token
                                                        ▼ router logits  │ expert output                   ▼
    rank 1+                                             gate-up | down ──┘ ...                             next launch
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from checkpoints.config import MXFP4_GROUP, ModelConfig
from system.errors import InputError

TP_RANKS = (1, 2, 4, 8)
ROLES_RANKS = (2, 3, 5)  # one for attention, router and tail; 1, 2 or 4 for the experts

# Triton compiles a kernel anew for integers that 16 divides, and for 1: epochs are neither, so that no rank waits while
# another one compiles.
FIRST_EPOCH, EPOCH_STEP, LAST_EPOCH = 8, 16, 1 << 29


def epoch_after(epoch: int, n_numbers: int) -> int:
    """Return the epoch of the next launch, behind one whose exchanges have numbers up to n_numbers."""
    return epoch + -(-(n_numbers + 1) // EPOCH_STEP) * EPOCH_STEP


@dataclass(frozen=True)
class Exchange:
    """A point of a launch at which ranks hand each other values."""

    name: str  # the phase after which it comes
    values: tuple[str, ...]  # fields of host.state.State, or of common.exchange.Peers
    senders: tuple[int, ...]
    receivers: tuple[int, ...]


@dataclass(frozen=True)
class Share:
    """What one rank of a layout holds of a model."""

    layout: str
    rank: int
    n_ranks: int
    heads: range
    kv_heads: range
    groups: range  # scale groups of the experts' intermediate size
    vocabulary: range  # rows of the embedding and of the LM head
    has_attention: bool = True  # and router, embedding and LM head
    has_experts: bool = True

    @property
    def intermediate(self) -> range:
        """Elements of the experts' intermediate size."""
        return range(self.groups.start * MXFP4_GROUP, self.groups.stop * MXFP4_GROUP)

    def config_of(self, config: ModelConfig) -> ModelConfig:
        """Return the model that this rank's kernels are compiled for, with its share of heads, rows and groups."""
        return replace(
            config,
            n_heads=len(self.heads),
            n_kv_heads=len(self.kv_heads),
            intermediate_size=len(self.intermediate),
            vocab_size=len(self.vocabulary),
            stop_ids=(),
        )


def check_ranks(layout: str, n_ranks: int) -> None:
    """Raise InputError unless a layout exists for so many ranks."""
    allowed = {"tp": TP_RANKS, "roles": ROLES_RANKS}[layout]
    if n_ranks not in allowed:
        raise InputError(f"--layout {layout}: {n_ranks} ranks; it takes {', '.join(map(str, allowed))}")


def shares_of(config: ModelConfig, layout: str, n_ranks: int) -> tuple[Share, ...]:
    """Return the share of each rank. Raise InputError if the model cannot be split so.

    Layout tp: KV heads, scale groups and the vocabulary are split into consecutive runs of nearly equal length, the
    first ones longer. With fewer KV heads than ranks several ranks hold the same KV head and split its query heads.
    """
    check_ranks(layout, n_ranks)
    everything = dict(
        heads=range(config.n_heads),
        kv_heads=range(config.n_kv_heads),
        groups=range(config.intermediate_size // MXFP4_GROUP),
        vocabulary=range(config.vocab_size),
    )
    if layout == "roles":
        if n_ranks - 1 > config.experts_per_token:
            raise InputError(f"--layout roles: {n_ranks - 1} ranks for {config.experts_per_token} experts per token")
        return tuple(
            Share(layout, rank, n_ranks, **everything, has_attention=rank == 0, has_experts=rank > 0)
            for rank in range(n_ranks)
        )
    heads = split_heads(config, n_ranks)
    groups = split_evenly(config.intermediate_size // MXFP4_GROUP, n_ranks, "scale groups of the experts")
    vocabulary = split_evenly(config.vocab_size, n_ranks, "rows of the LM head")
    return tuple(Share(layout, rank, n_ranks, *heads[rank], groups[rank], vocabulary[rank]) for rank in range(n_ranks))


def split_evenly(n: int, n_ranks: int, what: str) -> list[range]:
    """Split range(n) into consecutive runs, the first n % n_ranks of them longer by one."""
    if n < n_ranks:
        raise InputError(f"--layout tp: {n} {what} cannot be split over {n_ranks} ranks")
    ends = [n // n_ranks * rank + min(rank, n % n_ranks) for rank in range(n_ranks + 1)]
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def split_heads(config: ModelConfig, n_ranks: int) -> list[tuple[range, range]]:
    """Return (query heads, KV heads) of each rank."""
    group = config.n_heads // config.n_kv_heads
    if config.n_kv_heads >= n_ranks:
        runs = split_evenly(config.n_kv_heads, n_ranks, "KV heads")
        return [(range(run.start * group, run.stop * group), run) for run in runs]
    sharers, rest = divmod(n_ranks, config.n_kv_heads)
    if rest or group % sharers:
        raise InputError(
            f"--layout tp: {config.n_heads} query heads with {config.n_kv_heads} KV heads cannot be split over "
            f"{n_ranks} ranks"
        )
    size = group // sharers
    return [
        (range(rank * size, (rank + 1) * size), range(rank // sharers, rank // sharers + 1)) for rank in range(n_ranks)
    ]


def exchanges_of(layout: str, n_ranks: int, n_layers: int, want_head: bool) -> Sequence[tuple[Exchange, int | None]]:
    """Return the exchanges of a launch in their order, each with its layer (None outside the layers)."""
    everyone = tuple(range(n_ranks))
    if layout == "tp":
        before = [Exchange("embedding", ("x",), everyone, everyone)]
        layer = [
            Exchange("O projection", ("o_packets",), everyone, everyone),
            Exchange("down", ("down_packets",), everyone, everyone),
        ]
        after = [Exchange("LM head", ("head_value", "head_index", "logits"), everyone, everyone)]
    else:
        before = []
        layer = [
            Exchange("router", ("expert_in", "expert_in_scale", "router_logits"), (0,), everyone[1:]),
            Exchange("down", ("expert_out",), everyone[1:], (0,)),
        ]
        after = [Exchange("argmax", ("tokens",), (0,), everyone[1:])]
    return (
        [(exchange, None) for exchange in before]
        + [(exchange, n) for n in range(n_layers) for exchange in layer]
        + [(exchange, None) for exchange in after if want_head]
    )
