"""Benchmarks on several GPUs: --gpus N starts a script as N processes, one for each rank, of which rank 0 reports."""

import argparse
import os
import sys

from checkpoints.checkpoint import Checkpoint
from gpt_oss_megakernel import MegaModel
from multi_gpu.group import Group, restart_by_torchrun
from multi_gpu.protocol import check_ranks
from multi_gpu.ranks import RankModel


def open_group(args: argparse.Namespace) -> Group | None:
    """Return the processes that --gpus asks for, or None without it; the first call starts them.

    Ranks but 0 print errors alone and write no report. Raise InputError if the layout takes another number of GPUs, or
    the machine has fewer.
    """
    if not args.gpus:
        return None
    check_ranks(args.layout, args.gpus)
    restart_by_torchrun(args.gpus)
    group = Group()
    if group.rank > 0:
        args.json = args.plot = None
        sys.stdout = open(os.devnull, "w")
    return group


def load_model(group: Group | None, layout: str, checkpoint: Checkpoint, quant: bool, **options) -> MegaModel:
    """Load a model, or this process's share of it. See Decoder for the options and for the errors that are raised."""
    if group is None:
        return MegaModel(checkpoint, quant, **options)
    return RankModel.of_group(group, checkpoint, layout, quant, **options)


def described(name: str, group: Group | None, layout: str) -> str:
    """Return a model's name for a report, with the GPUs that share it."""
    return f"{name}, {group.n_ranks} GPUs, layout {layout}" if group else name
