"""What scripts that measure have in common: output files checked before the work and written after it, and tables."""

import argparse
import os
import sys
from pathlib import Path

from host.checkpoint import Checkpoint
from host.errors import InputError
from host.output_file import replacing, write_all


def check_report_files(args: argparse.Namespace) -> None:
    """InputError if --json or --plot could not be written, or both are the same file."""
    check_output_file("--json", args.json)
    check_output_file("--plot", args.plot)
    if args.json and args.plot and os.path.realpath(args.json) == os.path.realpath(args.plot):
        raise InputError(f"--plot {args.plot}: is --json's file")
    check_matplotlib(args.plot)


def check_output_file(flag: str, path: Path | None) -> None:
    """InputError if the file could not be written: known before the measurement, not after."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: there is no such folder")
    if path.exists() and not path.is_file():
        raise InputError(f"{flag} {path}: is there already, and not a regular file")
    if not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: its folder cannot be written to")


def check_matplotlib(path: Path | None) -> None:
    """InputError if a plot is wanted and cannot be drawn."""
    if path is None:
        return
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError(f"--plot {path}: matplotlib is not installed") from None


def write_file(flag: str, path: Path, data: bytes) -> None:
    """The whole file or none, in the place of an earlier one. InputError names the flag."""
    try:
        with replacing(Path(os.path.realpath(path)), len(data), force=True) as descriptor:
            write_all(descriptor, memoryview(data), 0)
    except InputError as error:
        raise InputError(f"{flag} {error}") from None


def display_name(checkpoint: Checkpoint) -> str:
    """What a report calls a model."""
    return f"{Path(checkpoint.name).name}, {checkpoint.config.n_layers} layers"


def progress(message: str) -> None:
    """On stderr, at once."""
    print(message, file=sys.stderr, flush=True)


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows)]
