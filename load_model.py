"""Open a model and its tokenizer from an .iris archive, a checkpoint folder, or a repository of the hub."""

import argparse
import dataclasses
import os
import stat
import sys
from pathlib import Path

import torch

from checkpoints.checkpoint import Checkpoint, RandomCheckpoint
from checkpoints.config import CONFIG_NAME, PRESETS
from host.backend import usable_device
from load_hf import HFCheckpoint
from load_hf import open_checkpoint as open_folder
from load_iris import IrisArchive, open_archive
from system.errors import InputError
from system.files import file_errors, is_there, path_of
from tokenizer_util import Tokenizer

SUFFIX = ".iris"


def open_checkpoint(
    model: str | Path, n_layers: int | None = None, verify: bool = False, show_progress: bool = False
) -> Checkpoint:
    """Check a model, given as an archive, a folder or a hub id, and return it as a Checkpoint; no weight is read.

    With n_layers only the first layers are used. With `verify` an archive is read completely and compared with its
    checksums. Raise InputError if the model is missing, damaged or not supported, or has no checksums to verify;
    TypeError if `model` is no path.
    """
    if is_archive(model):
        return open_archive(model, n_layers, verify, show_progress)
    if verify:
        raise InputError(f"--verify: {model} holds no checksums, as an .iris archive does")
    return open_folder(model, n_layers)


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """Return a checkpoint's tokenizer, or None for an archive without one.

    Raise InputError if it is damaged or a folder has none; TypeError if `checkpoint` is no checkpoint.
    """
    if not hasattr(checkpoint, "document"):
        raise TypeError(f"checkpoint is {checkpoint!r}, not what open_checkpoint gives")
    if isinstance(checkpoint, HFCheckpoint):
        return Tokenizer.from_folder(checkpoint.folder)
    return Tokenizer.from_checkpoint(checkpoint)


def open_model(args: argparse.Namespace, device: torch.device | None = None) -> tuple[Checkpoint, Tokenizer | None]:
    """Open the checkpoint that a command line names, and its tokenizer. Random weights have no tokenizer or stop ids.

    args: see command_line.options.add_model_arguments. device: that random weights are drawn on; default: the one that
    the kernels run on. Raise InputError if they cannot run here, before anything is opened, or if the model cannot be
    opened.
    """
    device = device or usable_device(None)
    if not args.random_weights:
        checkpoint = open_checkpoint(args.model, args.layers, args.verify, show_progress=sys.stderr.isatty())
        return checkpoint, open_tokenizer(checkpoint)
    if args.verify:
        raise InputError("--verify: random weights have no checksums")
    config = PRESETS[args.random_weights]
    config = dataclasses.replace(config if args.layers is None else config.cut(args.layers), stop_ids=())
    return RandomCheckpoint(config, device=device, name=f"random {args.random_weights}"), None


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """Return the paths of all files of an opened model, which no output may replace; none for random weights."""
    return checkpoint.files() if isinstance(checkpoint, (HFCheckpoint, IrisArchive)) else []


def is_archive(model: str | Path) -> bool:
    """Return whether a path names a file of any type, or nothing but ends with SUFFIX.

    A folder counts as an archive, and fails as one, if it ends with SUFFIX and has no config.json. Raise InputError if
    the path cannot be looked up, TypeError if `model` is no path.
    """
    path = path_of(model, "model")
    with file_errors(model):
        try:
            is_folder = stat.S_ISDIR(os.stat(path).st_mode)
        except FileNotFoundError:
            return path.suffix == SUFFIX
    return not is_folder or (path.suffix == SUFFIX and not is_there(path / CONFIG_NAME))
