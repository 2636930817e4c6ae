"""What scripts that measure have in common: output files checked before the work and written after it, and tables."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from checkpoints.checkpoint import Checkpoint
from measure.plot import png
from system.errors import InputError
from system.output_file import check_output, replacing


def check_report_files(args: argparse.Namespace, inputs: Sequence[Path] = ()) -> None:
    """InputError if --json or --plot could not be written or drawn, are the same file, or one of `inputs`."""
    check_output_file("--json", args.json, inputs)
    check_output_file("--plot", args.plot, inputs)
    if args.json and args.plot and os.path.realpath(args.json) == os.path.realpath(args.plot):
        raise InputError(f"--plot {args.plot}: is --json's file")
    check_matplotlib(args.plot)


def check_output_file(flag: str, path: Path | None, inputs: Sequence[Path] = ()) -> None:
    """InputError if the file could not be written: known before the measurement, not after."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: there is no such folder")
    if not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: its folder cannot be written to")
    check_output(_end_of_links(path), True, inputs, flag)


def check_matplotlib(path: Path | None) -> None:
    """InputError if a plot is wanted and cannot be drawn: an empty one is."""
    if path is None:
        return
    try:
        from matplotlib.figure import Figure

        png(Figure())
    except ImportError as error:
        missing = "matplotlib is not installed" if "matplotlib" in str(error.name) else str(error)
        raise InputError(f"--plot {path}: {missing}") from None
    except Exception as error:  # noqa: BLE001 - a library that is only half there
        raise InputError(f"--plot {path}: matplotlib fails ({error})") from None


def write_file(flag: str, path: Path, data: bytes, inputs: Sequence[Path] = ()) -> None:
    """The whole file or none, in the place of an earlier one. InputError names the flag."""
    target = _end_of_links(path)
    with replacing(target, len(data), force=True, inputs=inputs, flag=flag, alone=False) as file:
        file.write(data, 0)


def _end_of_links(path: Path) -> Path:
    """A report's name may be a link, to the latest one for example, which stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def display_name(checkpoint: Checkpoint) -> str:
    """What a report calls a model."""
    return f"{Path(checkpoint.name).name}, {checkpoint.config.n_layers} layers"


def progress(message: str) -> None:
    """On stderr, at once."""
    print(message, file=sys.stderr, flush=True)


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows)]
