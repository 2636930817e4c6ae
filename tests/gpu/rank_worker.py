"""Answer prompts with a model on several ranks; torchrun starts this script once for each rank.

torchrun --standalone --nproc-per-node 2 tests/gpu/rank_worker.py CASES.json ANSWERS

CASES is a list of Case as dictionaries. torch.load(ANSWERS) is what answer_of returns for each, the same on all ranks.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import host.start

import gc
import json
import os
import signal
from dataclasses import dataclass

import torch

from checkpoints.checkpoint import RandomCheckpoint, WithoutStopIds
from checkpoints.config import PRESETS, DenseFormats
from command_line.run import run_main
from host.decoder import Decoder
from load_model import open_checkpoint
from multi_gpu.group import Group
from multi_gpu.ranks import RankModel

CONTEXT = 512
FORCED = (1, 2, 3)  # tokens that do not depend on the logits before them


@dataclass(frozen=True)
class Case:
    """A model, how it is split, and what it is asked for."""

    layout: str
    model: str  # a folder, or a name of PRESETS: random weights
    prompt_ids: tuple[int, ...]
    n_tokens: int
    quant: bool = False
    fp8: str | None = None  # format of QKV, O and the LM head
    n_layers: int | None = None  # of random weights
    twice: bool = False
    context: int = CONTEXT
    dies_at: int | None = None  # the token at which rank 1 kills itself

    def checkpoint(self):
        """Open the model's checkpoint. Random weights never stop an answer."""
        if self.model not in PRESETS:
            return open_checkpoint(self.model)
        config = PRESETS[self.model].cut(self.n_layers)
        return WithoutStopIds(RandomCheckpoint(config, device=torch.device("cuda")))

    def options(self) -> dict:
        """Return the options of Decoder."""
        dense = DenseFormats(qkv=self.fp8, o=self.fp8, head=self.fp8) if self.fp8 else None
        return {"quant": self.quant, "max_context": self.context, "dense": dense}


def answer_of(model: Decoder, case: Case, rank: int = 0) -> dict:
    """Return a case's tokens, and the logits after each of FORCED behind the prompt: twice the same, if asked for."""
    runs = []
    for _ in range(1 + case.twice):
        model.reset()
        tokens = []
        for token in model.generate(case.prompt_ids, case.n_tokens):
            tokens.append(token)
            if len(tokens) == case.dies_at and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        rows = [model.logits(token, len(case.prompt_ids) + n).cpu() for n, token in enumerate(FORCED)]
        runs.append({"tokens": tokens, "logits": torch.stack(rows)})
    if any(run["tokens"] != runs[0]["tokens"] or not torch.equal(run["logits"], runs[0]["logits"]) for run in runs):
        raise AssertionError(f"{case}: two runs differ")
    return runs[0]


def main() -> None:
    cases, answers = Path(sys.argv[1]), Path(sys.argv[2])
    group = Group()
    found = []
    for words in json.loads(cases.read_text()):
        case = Case(**words)
        model = RankModel.of_group(group, case.checkpoint(), case.layout, **case.options())
        with model.naming_lost_ranks():
            answer = answer_of(model, case, group.rank)
        del model
        gc.collect()
        torch.cuda.empty_cache()
        tokens = group.gather(answer["tokens"])
        if any(other != tokens[0] for other in tokens):
            raise AssertionError(f"{case}: ranks differ: {tokens}")
        found.append(answer)
    if group.rank == 0:
        torch.save(found, answers)
    group.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
