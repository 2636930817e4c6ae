"""What scripts that measure have in common: output files checked before the work, and tables."""

from pathlib import Path

from host.errors import InputError


def check_output_file(flag: str, path: Path | None) -> None:
    """InputError if the file could not be written: known before the measurement, not after."""
    if path is not None and not path.absolute().parent.is_dir():
        raise InputError(f"{flag} {path}: there is no such folder")
    if path is not None and path.exists() and not path.is_file():
        raise InputError(f"{flag} {path}: is there already, and not a regular file")


def check_matplotlib(path: Path | None) -> None:
    """InputError if a plot is wanted and cannot be drawn."""
    if path is None:
        return
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise InputError(f"--plot {path}: matplotlib is not installed") from None


def markdown_table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Its lines."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ("---",) * len(header), *rows)]
