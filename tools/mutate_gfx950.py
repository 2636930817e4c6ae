"""Take instructions out of the megakernel's gfx950 code, one at a time, and say which losses the emulator notices.

python tools/mutate_gfx950.py [--quant] [--kind s_waitcnt s_barrier buffer_wbl2 buffer_inv] [--every N] [--json FILE]

Runs two tokens of a small random model under several orders of waves. A loss is noticed if the emulator reports
something, if the launch does not end, or if it leaves another bit anywhere in the model's state.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "0")  # kernels are compiled
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import host.start

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from checkpoints.checkpoint import RandomCheckpoint, WithoutStopIds
from checkpoints.config import ModelConfig
from command_line.parser import ArgumentParser, positive_int
from command_line.run import run_main
from common.machine import Machine
from host.launch import GFX950
from measure.report import markdown_table, progress, write_file
from system.errors import LogitsNotFinite, MegakernelAborted
from system.output_file import output_path
from tools.gfx950.emulator import STRICT, Conditions
from tools.gfx950.layout import Traffic
from tools.gfx950.model import EmulatedModel

KINDS = ("s_waitcnt", "s_barrier", "buffer_wbl2", "buffer_inv")
CONFIG = ModelConfig(
    n_layers=2,
    n_experts=8,
    hidden_size=96,
    intermediate_size=64,
    n_heads=8,
    n_kv_heads=2,
    vocab_size=160,
    sliding_window=20,
    layer_is_sliding=(True, False),
)
TOKENS = {3: 7, 41: 11}  # position -> token: one program attends for a head, or several share its keys
ATTENTION = dataclasses.replace(GFX950.attention, head_keys=32, min_split_keys=16, max_splits=3)
N_PROGRAMS = 3
CONTEXT = 64
# Waves in turn and at random, in long and in short runs: a race shows only in some orders.
ORDERS = (
    dataclasses.replace(STRICT, seed=0),
    dataclasses.replace(STRICT, seed=11, quantum=40),
    dataclasses.replace(STRICT, seed=5, quantum=1),
    dataclasses.replace(STRICT, seed=2, quantum=3000),
)
SLACK = 4  # instructions of a launch, at most, over those of the whole code
REPORTED, HUNG, CHANGED, UNNOTICED = OUTCOMES = ("reported", "did not end", "left other bits", "unnoticed")


@dataclass(frozen=True)
class Loss:
    """An instruction that was taken out, and what came of it."""

    kind: str
    number: int
    text: str
    place: str
    outcome: str
    covered: int  # accesses that it ended, an s_waitcnt


State = tuple[torch.Tensor, ...]


class Bench:
    """A model that runs two tokens under each of ORDERS."""

    def __init__(self, quant: bool, machine: Machine = GFX950.machine, limit: int = Conditions().max_instructions):
        """limit: instructions of a launch, over which it is taken for one that does not end."""
        checkpoint = WithoutStopIds(RandomCheckpoint(CONFIG))
        tuning = dataclasses.replace(GFX950, machine=machine, attention=ATTENTION)
        self.model = EmulatedModel(checkpoint, quant, CONTEXT, num_programs=N_PROGRAMS, tuning=tuning)
        self.limit = limit

    def run(self, order: Conditions) -> State:
        """Feed both tokens, and return copies of what the launches have left."""
        emulator = self.model.emulator
        emulator.conditions = dataclasses.replace(order, max_instructions=self.limit)
        emulator.log.findings.clear()
        self.model.reset()
        (first, token), (second, other) = TOKENS.items()
        self.model.logits(token, first)
        self.model.step(other, second)
        state = self.model.state
        left = (state.logits, state.tokens, state.k_cache, state.v_cache, state.x, state.expert_out)
        return tuple(t.clone() for t in left)

    def expected(self) -> dict[Conditions, State]:
        """Return what the whole code leaves, of which nothing may be reported."""
        found = {}
        for order in ORDERS:
            found[order] = self.run(order)
            if findings := self.model.emulator.log.findings:
                raise AssertionError(f"the whole code is reported: {findings[0]}")
        return found

    def outcome(self, expected: dict[Conditions, State]) -> str:
        """Return what comes of the code as it is now."""
        return next(filter(None, (self._noticed(order, state) for order, state in expected.items())), UNNOTICED)

    def _noticed(self, order: Conditions, expected: State) -> str | None:
        try:
            state = self.run(order)
        except MegakernelAborted:
            return HUNG
        except (LogitsNotFinite, RuntimeError):  # RuntimeError: a token is none
            state = None
        if self.model.emulator.log.findings:
            return REPORTED
        return None if state and all(map(torch.equal, state, expected)) else CHANGED


def losses(quant: bool, kinds: list[str], every: int) -> Iterator[Loss]:
    """Yield what comes of each loss: of every n-th instruction of these kinds that a launch executes."""
    bench = Bench(quant)
    expected = bench.expected()
    (program,) = bench.model.emulator.programs
    executed = bench.model.emulator.counts[program]
    bench.limit = SLACK * int(executed.sum()) // (len(ORDERS) * len(TOKENS))
    covered = bench.model.emulator.traffic[program][:, Traffic.COVERED]
    places = [n for n, text in enumerate(program.texts) if executed[n] and text.split()[0] in kinds]
    for n in places[::every]:
        text = program.texts[n]
        progress(f"without instruction {n} of {len(program.texts)}: {text}")
        with program.without(n):
            outcome = bench.outcome(expected)
        yield Loss(text.split()[0], n, text, program.frames[n][0], outcome, int(covered[n]))


def table(found: list[Loss]) -> str:
    """Return a table of outcomes by kind, and the places of the losses that nothing noticed."""
    counts = Counter((loss.kind, loss.outcome) for loss in found)
    rows = [
        (kind, *(str(counts[kind, outcome]) for outcome in OUTCOMES)) for kind in dict.fromkeys(x.kind for x in found)
    ]
    unnoticed = [loss for loss in found if loss.outcome == UNNOTICED]
    n_idle = sum(loss.kind == "s_waitcnt" and not loss.covered for loss in unnoticed)
    places = Counter(f"{loss.kind}, {loss.place}" for loss in unnoticed if loss.kind != "s_waitcnt" or loss.covered)
    lines = [f"- {place}: {n}" for place, n in places.most_common()]
    return "\n".join([
        *markdown_table(("taken out", *OUTCOMES), rows),
        "",
        f"Unnoticed, as nothing was in flight: s_waitcnt, {n_idle}. Elsewhere:",
        "",
        *lines,
    ])  # fmt: skip


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quant", action="store_true", help="the path with FP4 x FP8 experts")
    parser.add_argument("--kind", nargs="*", choices=KINDS, default=[*KINDS])
    parser.add_argument("--every", metavar="N", type=positive_int, default=1, help="of each N, the first only")
    parser.add_argument("--json", metavar="FILE", type=output_path, help="write all losses as JSON")
    args = parser.parse_args()
    found = list(losses(args.quant, args.kind, args.every))
    print(table(found))
    if args.json:
        data = json.dumps([dataclasses.asdict(loss) for loss in found], indent=2) + "\n"
        write_file("--json", args.json, data.encode())


if __name__ == "__main__":
    sys.exit(run_main(main))
