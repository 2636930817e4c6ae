"""Answer prompts with a model on several ranks; torchrun starts this script once for each rank.

torchrun --standalone --nproc-per-node 2 tests/gpu/rank_worker.py CASES.json ANSWERS.json

CASES is a list of Case as dictionaries. ANSWERS is, for each, the tokens and a checksum of the logits behind them; all
ranks have the same tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import host.start

import gc
import json
import os
import signal
import zlib
from dataclasses import dataclass

import torch

from checkpoints.checkpoint import RandomCheckpoint, WithoutStopIds
from checkpoints.config import PRESETS, DenseFormats
from host.cli import run_main
from host.decoder import Decoder
from load_model import open_checkpoint
from multi_gpu.group import Group
from multi_gpu.ranks import RankModel

CONTEXT = 512


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
        return {"quant": self.quant, "max_context": CONTEXT, "dense": dense}


def answer_of(model: Decoder, case: Case, rank: int = 0) -> dict:
    """Return a case's tokens, twice the same, and a checksum of the logits behind them."""
    runs = []
    for _ in range(2):
        model.reset()
        tokens = []
        for token in model.generate(case.prompt_ids, case.n_tokens):
            tokens.append(token)
            if len(tokens) == case.dies_at and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        position = len(case.prompt_ids) + len(tokens) - 1
        logits = model.logits(tokens[-1], position)
        runs.append({"tokens": tokens, "logits": zlib.crc32(logits.cpu().numpy().tobytes())})
    if runs[0] != runs[1]:
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
        everyone = group.gather(answer)
        if any(other["tokens"] != answer["tokens"] for other in everyone):
            raise AssertionError(f"{case}: ranks differ: {everyone}")
        found.append(answer)
    if group.rank == 0:
        answers.write_text(json.dumps(found))
    group.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
