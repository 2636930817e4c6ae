"""Open a model, and its tokenizer: an .iris archive, a checkpoint folder, or a repository of the hub."""

import os
import stat
from pathlib import Path

from host.checkpoint import Checkpoint
from host.config import CONFIG_NAME
from host.errors import InputError
from host.files import is_there, path_of
from load_hf import HFCheckpoint
from load_hf import open_checkpoint as open_folder
from load_iris import IrisArchive, open_archive
from tokenizer_util import Tokenizer

SUFFIX = ".iris"


def open_checkpoint(
    model: str | Path, n_layers: int | None = None, verify: bool = False, show_progress: bool = False
) -> Checkpoint:
    """Check a model, given as an archive, a folder or a hub id, and return it as a Checkpoint; no weight is read.

    With n_layers only the first layers are used. `verify` reads all of an archive first, which must match its
    checksums; nothing else has any. Raises InputError; TypeError if `model` is no path.
    """
    if is_archive(model):
        return open_archive(model, n_layers, verify, show_progress)
    if verify:
        raise InputError(f"--verify: {model} holds no checksums, as an .iris archive does")
    return open_folder(model, n_layers)


def open_tokenizer(checkpoint: Checkpoint) -> Tokenizer | None:
    """A model's tokenizer. An archive may have none, a folder not. Raises InputError; TypeError for no checkpoint."""
    if not hasattr(checkpoint, "document"):
        raise TypeError(f"checkpoint is {checkpoint!r}, not what open_checkpoint gives")
    if isinstance(checkpoint, HFCheckpoint):
        return Tokenizer.from_folder(checkpoint.folder)
    return Tokenizer.of(checkpoint)


def files_of(checkpoint: Checkpoint) -> list[Path]:
    """Paths of all files that an opened model consists of, which no output may replace; none for random weights."""
    return checkpoint.files() if isinstance(checkpoint, (HFCheckpoint, IrisArchive)) else []


def is_archive(model: str | Path) -> bool:
    """Whether a path names a file of any kind, or by its ending should. InputError if it cannot be looked at."""
    path = path_of(model, "model")
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        return path.suffix == SUFFIX
    except (OSError, ValueError) as error:
        raise InputError(f"{model}: {getattr(error, 'strerror', None) or error}") from None
    return not is_folder or (path.suffix == SUFFIX and not is_there(path / CONFIG_NAME))
