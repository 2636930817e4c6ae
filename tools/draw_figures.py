"""Draw the README's figures as SVG: a token's phases and barriers, and the time of a token over its context.

    python -m tools.draw_figures

The phases are those of host/phases.py, the times those of the table "Over context" in docs/performance.md. A test
checks that the committed figures are what this draws.
"""

import html
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from host.phases import PHASE_NAMES, PHASES

DOCS = Path(__file__).resolve().parent.parent / "docs"
INK, GREY, PALE, BLUE, ORANGE = "#24292f", "#8c959f", "#e4e8ec", "#3b72a8", "#c77d2e"

# ---------------------------------------------------------------- elements of an SVG


def svg(width: float, height: float, title: str, elements: Iterable[str]) -> str:
    """Return the text of a whole SVG file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" font-family="Helvetica, Arial, sans-serif" fill="{INK}">'
    )
    lines = [head, f"<title>{html.escape(title)}</title>", rect(0, 0, width, height, "white"), *elements, "</svg>"]
    return "\n".join(lines) + "\n"


def rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>'


def text(x: float, y: float, words: str, size: float = 11, anchor: str = "middle", fill: str = INK) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{fill}">'
        f"{html.escape(words)}</text>"
    )


def polyline(points: Iterable[tuple[float, float]], stroke: str, width: float = 1, dash: str = "none") -> str:
    places = " ".join(f"{x:g},{y:g}" for x, y in points)
    return (
        f'<polyline points="{places}" fill="none" stroke="{stroke}" stroke-width="{width:g}" '
        f'stroke-dasharray="{dash}"/>'
    )


def circle(x: float, y: float, radius: float, fill: str) -> str:
    return f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{fill}"/>'


# ---------------------------------------------------------------- phases and barriers

PROGRAMS = ("program 0", "program 1", "program 2", "...", "program P - 1")
# How long each of these programs works in a phase, as a fraction of the longest. Not measured.
WORK = {
    "embedding": (1.0, 0, 0, 0, 0),
    "QKV": (0.93, 1.0, 0.88, 0.95, 0.9),
    "attention": (1.0, 0.92, 0.97, 0, 0),
    "O projection": (0.9, 0.96, 1.0, 0.87, 0.93),
    "router": (0.95, 1.0, 0.9, 0.92, 0.85),
    "gate-up": (0.9, 1.0, 0.94, 0.86, 0.97),
    "down": (1.0, 0.88, 0.95, 0.92, 0.98),
    "LM head": (0.96, 0.92, 1.0, 0.97, 0.9),
    "argmax": (1.0, 0, 0, 0, 0),
}
LEAVES = {
    "embedding": ("x",),
    "QKV": ("queries, keys,", "values"),
    "attention": ("attention,", "KV cache"),
    "O projection": ("x",),
    "router": ("logits,", "experts' input"),
    "gate-up": ("SwiGLU of the", "chosen experts"),
    "down": ("the experts'", "parts of x"),
    "LM head": ("each program's", "best logit"),
    "argmax": ("the next token",),
}
# (weights that fill a program's ring, phase in which the first are asked for, how far into it, phase that reads them)
WEIGHTS = (
    ("QKV", "embedding", 0.5, "QKV"),
    ("O projection", "QKV", 0.8, "O projection"),
    ("gate-up", "gate-up", 0.1, "gate-up"),
    ("down", "gate-up", 0.8, "down"),
    ("QKV or LM head", "down", 0.8, "LM head"),
)
LABEL_WIDTH, COLUMN, GAP = 100, 94, 12
TOP, ROW, ROW_GAP = 74, 20, 6


def draw_phases() -> str:
    """Draw a token's phases, one column each, the barriers between them, and one row for each program."""
    left = {name: LABEL_WIDTH + n * (COLUMN + GAP) for n, name in enumerate(PHASE_NAMES)}
    bottom = TOP + len(PROGRAMS) * (ROW + ROW_GAP) - ROW_GAP
    lane = bottom + 84
    width = LABEL_WIDTH + len(PHASE_NAMES) * (COLUMN + GAP) + 4
    elements = [
        text(LABEL_WIDTH - 8, TOP + n * (ROW + ROW_GAP) + 14, name, anchor="end") for n, name in enumerate(PROGRAMS)
    ]
    elements += [
        text(LABEL_WIDTH - 8, bottom + 22, "barrier", anchor="end", fill=GREY),
        text(LABEL_WIDTH - 8, bottom + 44, "leaves", anchor="end"),
        text(LABEL_WIDTH - 8, lane + 14, "weights, NVIDIA", anchor="end"),
    ]
    for name in PHASE_NAMES:
        elements += _phase(name, left[name], bottom)
    for n, name in enumerate(PHASE_NAMES[:-1]):
        elements += _barrier(barrier_label(n), left[name] + COLUMN + GAP / 2, bottom)
    elements += _layers_bracket(left[PHASES[0]], left[PHASES[-1]] + COLUMN)
    for name, asked_in, fraction, read_in in WEIGHTS:
        start, end = left[asked_in] + fraction * COLUMN, left[read_in] + 0.75 * COLUMN
        elements += [
            rect(start, lane, end - start, ROW, ORANGE),
            text((start + end) / 2, lane + 14, name, fill="white"),
        ]
    notes = (
        "Blue: a program multiplies its tiles. Grey: it waits at the barrier for the others. Widths are not to scale.",
        "Orange: asked for ahead, on its way into shared memory; experts' weights once the router has chosen.",
    )
    elements += [text(LABEL_WIDTH, lane + 44 + 18 * n, note, anchor="start") for n, note in enumerate(notes)]
    return svg(width, lane + 76, "The phases of a token and the barriers between them", elements)


def barrier_label(phase: int) -> str:
    """Return the number of the barrier behind phase number 0, 1, ... of PHASE_NAMES; n is a layer of N."""
    if phase == 0:
        return "1"
    if phase <= len(PHASES):
        return f"{phase + 1} + {len(PHASES)} n"
    return f"2 + {len(PHASES)} N"


def _phase(name: str, x: float, bottom: float) -> list[str]:
    elements = [text(x + COLUMN / 2, TOP - 10, name, size=12.5)]
    for n, fraction in enumerate(WORK[name]):
        y = TOP + n * (ROW + ROW_GAP)
        elements.append(rect(x, y, COLUMN, ROW, PALE))
        if fraction:
            elements.append(rect(x, y, fraction * COLUMN, ROW, BLUE))
    lines = enumerate(LEAVES[name])
    return elements + [text(x + COLUMN / 2, bottom + 44 + 14 * n, words) for n, words in lines]


def _barrier(label: str, x: float, bottom: float) -> list[str]:
    return [polyline([(x, TOP - 4), (x, bottom + 8)], INK, 2.5), text(x, bottom + 22, label, size=10, fill=GREY)]


def _layers_bracket(start: float, end: float) -> list[str]:
    points = [(start, 44), (start, 36), (end, 36), (end, 44)]
    return [polyline(points, INK), text((start + end) / 2, 26, "layer n = 0, 1, ... N - 1", size=12.5)]


# ---------------------------------------------------------------- time of a token

PLOT_LEFT, PLOT_TOP, PLOT_WIDTH, PLOT_HEIGHT = 60, 44, 560, 260
LINES = (("default", "ms per token", BLUE), ("`--quant`", "ms per token", ORANGE), ("default", "floor, ms", GREY))


def table_rows(markdown: str, heading: str) -> list[dict[str, str]]:
    """Return the first table under a heading, a dictionary for each row. Raises ValueError if there is none."""
    lines = markdown.splitlines()
    under = lines[lines.index(f"## {heading}") + 1 :]
    start = next((n for n, line in enumerate(under) if line.startswith("|")), len(under))
    rows = []
    for line in under[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    if len(rows) < 3:
        raise ValueError(f"no table under {heading}")
    return [dict(zip(rows[0], row)) for row in rows[2:]]


def points_of(rows: Sequence[dict[str, str]], path: str, column: str) -> list[tuple[int, float]]:
    """Return (context, milliseconds) of each row of a path."""
    return [(int(row["context"].replace(",", "")), float(row[column])) for row in rows if row["path"] == path]


def draw_times(markdown: str) -> str:
    """Draw time per token over context, from the text of performance.md."""
    rows = table_rows(markdown, "Over context")
    lines = [(path, column, colour, points_of(rows, path, column)) for path, column, colour in LINES]
    contexts = [context for context, _ in lines[0][3]]
    most = math.ceil(max(time for *_, points in lines for _, time in points))
    low, high = math.log2(contexts[0]) - 0.5, math.log2(contexts[-1]) + 0.5

    def place(context: float, time: float) -> tuple[float, float]:
        across = (math.log2(context) - low) / (high - low)
        return round(PLOT_LEFT + PLOT_WIDTH * across, 1), round(PLOT_TOP + PLOT_HEIGHT * (1 - time / most), 1)

    right, bottom = PLOT_LEFT + PLOT_WIDTH, PLOT_TOP + PLOT_HEIGHT
    elements = [text(PLOT_LEFT, 24, "GPT-OSS-120B sizes, one stream, one NVIDIA H200", size=13, anchor="start")]
    for time in range(most + 1):
        y = place(contexts[0], time)[1]
        elements += [polyline([(PLOT_LEFT, y), (right, y)], PALE), text(PLOT_LEFT - 8, y + 4, str(time), anchor="end")]
    for context in contexts:
        x = place(context, 0)[0]
        elements += [polyline([(x, bottom), (x, bottom + 5)], INK), text(x, bottom + 19, f"{context:,}")]
    elements += [
        text((PLOT_LEFT + right) / 2, bottom + 40, "context, tokens"),
        text(PLOT_LEFT - 8, 24, "ms", anchor="end"),
    ]
    for n, (path, column, colour, points) in enumerate(lines):
        is_floor = column != "ms per token"
        places = [place(*point) for point in points]
        elements.append(polyline(places, colour, 2, "6 4" if is_floor else "none"))
        elements += [] if is_floor else [circle(*at, 3, colour) for at in places]
        name = "floor: bytes over read bandwidth" if is_floor else path.strip("`")
        y = PLOT_TOP + 16 + 18 * n
        elements.append(polyline([(PLOT_LEFT + 14, y), (PLOT_LEFT + 42, y)], colour, 2, "6 4" if is_floor else "none"))
        elements.append(text(PLOT_LEFT + 50, y + 4, name, anchor="start"))
    return svg(right + 20, bottom + 52, "Time per token over context", elements)


def figures() -> dict[Path, str]:
    """Return file -> text of every figure."""
    performance = (DOCS / "performance.md").read_text(encoding="utf-8")
    return {DOCS / "phases.svg": draw_phases(), DOCS / "time_per_token.svg": draw_times(performance)}


if __name__ == "__main__":
    for path, figure in figures().items():
        path.write_text(figure, encoding="utf-8")
