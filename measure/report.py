"""Write the reports of scripts that measure: files that are checked before the work, and tables."""

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
    """Raise InputError if --json or --plot cannot be written or drawn, are the same file, or are one of `inputs`."""
    check_output_file("--json", args.json, inputs)
    check_output_file("--plot", args.plot, inputs)
    if args.json and args.plot and os.path.realpath(args.json) == os.path.realpath(args.plot):
        raise InputError(f"--plot {args.plot}: is --json's file")
    check_matplotlib(args.plot)


def check_output_file(flag: str, path: Path | None, inputs: Sequence[Path] = ()) -> None:
    """Raise InputError, before the measurement, if the file cannot be written."""
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: there is no such folder")
    if not os.access(os.path.dirname(os.path.realpath(path)), os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: its folder cannot be written to")
    check_output(_follow_links(path), True, inputs, flag)


def check_matplotlib(path: Path | None) -> None:
    """Raise InputError if a plot is requested but matplotlib cannot draw an empty one."""
    if path is None:
        return
    try:
        from matplotlib.figure import Figure

        png(Figure())
    except ImportError as error:
        missing = "matplotlib is not installed" if "matplotlib" in str(error.name) else str(error)
        raise InputError(f"--plot {path}: {missing}") from None
    except Exception as error:  # noqa: BLE001 - an incomplete installation may raise anything
        raise InputError(f"--plot {path}: matplotlib fails ({error})") from None


def write_file(flag: str, path: Path, data: bytes, inputs: Sequence[Path] = ()) -> None:
    """Write a file completely or not at all, replacing an earlier one. Raise InputError, naming the flag, if not."""
    target = _follow_links(path)
    with replacing(target, len(data), force=True, inputs=inputs, flag=flag, exclusive=False) as file:
        file.write(data, 0)


def _follow_links(path: Path) -> Path:
    """Return the target of a path that is a link, for example to the latest report, so that the link stays."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def display_name(checkpoint: Checkpoint) -> str:
    """Return a model's name in a report."""
    return f"{Path(checkpoint.name).name}, {checkpoint.config.n_layers} layers"


def progress(message: str) -> None:
    """Print a message on stderr without buffering."""
    print(message, file=sys.stderr, flush=True)


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows)]
