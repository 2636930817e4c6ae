"""Answer a case with a model whose gfx950 code is emulated.

TRITON_INTERPRET=0 python tests/emulator/worker.py CASE.json ANSWER

CASE is a Case as a dictionary; torch.load(ANSWER) is what answer_of returns, with what the emulator reports.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import host.start

import dataclasses
import json
from dataclasses import dataclass

import torch
from made_up_models import ODD_SIZES, loud_checkpoint, small_config
from shipped import FOLDER

from checkpoints.checkpoint import RandomCheckpoint, WithoutStopIds
from checkpoints.config import GPT_OSS_120B, DenseFormats
from command_line.run import run_main
from host.decoder import Decoder
from host.launch import GFX950
from load_model import open_checkpoint
from measure.random_cache import fill_cache
from system.errors import MegakernelAborted
from tools.gfx950.emulator import STRICT, Conditions
from tools.gfx950.layout import Problem
from tools.gfx950.model import EmulatedModel

SEED = 3
SPINS = 200  # polls of a program that waits in vain
FORCED = 2  # a token that does not depend on the logits before it


@dataclass(frozen=True)
class Case:
    """A model, how it is launched, and what it is asked for."""

    model: str  # "shipped", "120b" for its width, or a name of ODD_SIZES
    prompt_ids: tuple[int, ...]
    n_tokens: int = 4
    quant: bool = False
    fp8: str | None = None  # format of QKV, O and the LM head
    n_layers: int = 1  # of 120b's width
    n_programs: int = 4
    context: int = 256
    n_cached: int = 0  # positions of random keys and values before the forced token
    is_plain: bool = False
    wave_seed: int = STRICT.seed
    n_absent: int = 0  # programs that never start, of a launch for a token

    def checkpoint(self):
        if self.model == "shipped":
            return open_checkpoint(FOLDER)
        if self.model == "120b":
            return WithoutStopIds(RandomCheckpoint(GPT_OSS_120B.cut(self.n_layers)))
        return loud_checkpoint(small_config(**ODD_SIZES[self.model]))

    def options(self) -> dict:
        """Return the options of Decoder."""
        dense = DenseFormats(qkv=self.fp8, o=self.fp8, head=self.fp8) if self.fp8 else None
        options = {"quant": self.quant, "max_context": self.context, "dense": dense}
        return options | {"num_programs": self.n_programs}

    def conditions(self) -> Conditions:
        return Conditions() if self.is_plain else dataclasses.replace(STRICT, seed=self.wave_seed)


def answer_of(model: Decoder, case: Case) -> dict:
    """Return the tokens behind the prompt, the keys that it left, and the logits of a forced token behind a cache."""
    tokens = list(model.generate(case.prompt_ids, case.n_tokens)) if case.n_tokens else []
    keys = model.state.k_cache[:, :, : len(case.prompt_ids)].clone()
    position = case.n_cached or len(case.prompt_ids)
    if case.n_cached:
        fill_cache(model.state.k_cache, model.state.v_cache, case.n_cached, SEED)
    return {"tokens": tokens, "keys": keys, "logits": model.logits(FORCED, position).clone()}


def answer_without(model: EmulatedModel, case: Case) -> dict:
    """Return what a launch with absent programs raises, and the tokens before it and after a reset.

    Races of that launch do not count: all barriers are open once a program has given up, and its results are dropped.
    """
    whole = model.grid
    before = model.step(FORCED, 0)
    model.grid = (whole[0] - case.n_absent,)
    try:
        error = f"none: {model.step(FORCED, 0)}"
    except MegakernelAborted as aborted:
        error, log = str(aborted), model.emulator.log
        log.findings = [finding for finding in log.findings if finding.problem != Problem.RACE]
    model.grid = whole
    model.reset()
    return {"error": error, "before": before, "after": model.step(FORCED, 0)}


def main() -> None:
    case = Case(**json.loads(Path(sys.argv[1]).read_text()))
    case = dataclasses.replace(case, prompt_ids=tuple(case.prompt_ids))
    tuning = dataclasses.replace(GFX950, spin_limit=SPINS) if case.n_absent else None
    model = EmulatedModel(case.checkpoint(), conditions=case.conditions(), tuning=tuning, **case.options())
    answer, log = answer_without(model, case) if case.n_absent else answer_of(model, case), model.emulator.log
    answer |= {"findings": [str(finding) for finding in log.findings], "executed": log.executed}
    answer |= {"mnemonics": dict(log.mnemonics), "launches": log.launches}
    torch.save(answer, sys.argv[2])


if __name__ == "__main__":
    sys.exit(run_main(main))
