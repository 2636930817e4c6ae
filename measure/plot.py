"""Plot times over a number of tokens; matplotlib is imported only when a plot is drawn."""

import io
from collections.abc import Mapping, Sequence

from measure.timing import Spread

Line = Sequence[tuple[int, Spread]]  # (tokens, their time)


def plot_times(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Line],
    floor: Sequence[tuple[int, float]] = (),
    log_y: bool = False,
) -> bytes:
    """Return a PNG: a line per name with medians over tokens and p10 to p90 as bars, and the floor, if any, dashed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name, line in lines.items():
        n_tokens, times = zip(*sorted(line, key=lambda point: point[0]))
        medians = [time.median for time in times]
        bars = [[time.median - time.p10 for time in times], [time.p90 - time.median for time in times]]
        axes.errorbar(n_tokens, medians, yerr=bars, marker="o", capsize=3, label=name)
    if floor:
        axes.plot(*zip(*sorted(floor)), linestyle="--", color="grey", label="floor")
    ticks = sorted({n_tokens for line in lines.values() for n_tokens, _ in line})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=map(str, ticks), minor=False)
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    return png(figure)


def png(figure) -> bytes:
    """Return a matplotlib figure as the content of a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)
    return file.getvalue()
