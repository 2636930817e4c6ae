"""The committed figures are what tools/draw_figures.py draws and show what they should; paths in documents exist."""

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from host.phases import PHASE_NAMES, barrier_name, phases_of_token
from tools import draw_figures

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("system", "command_line", "checkpoints", "common", "interpreter", "host", "measure", "multi_gpu", "tools")
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SVG = "{http://www.w3.org/2000/svg}"
TIMES = """
## Over context

Measured.

| path | context | ms per token | floor, ms |
|---|---|---|---|
| default | 128 | 2.0 | 1.0 |
| default | 2,048 | 3.5 | 1.5 |
| `--quant` | 128 | 2.5 | 1.0 |
| `--quant` | 2,048 | 3.0 | 1.5 |

## After
| path | context |
|---|---|
| default | 4096 |
"""


def words(figure: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(figure).iter(f"{SVG}text")]


@pytest.mark.parametrize("path", draw_figures.figures(), ids=lambda path: path.name)
def test_committed_figure_is_what_the_script_draws(path):
    assert path.read_text(encoding="utf-8") == draw_figures.figures()[path]


def test_every_phase_is_drawn_in_order_with_a_barrier_behind_all_but_the_last():
    found = words(draw_figures.draw_phases())
    assert [word for word in found if word in PHASE_NAMES][: len(PHASE_NAMES)] == list(PHASE_NAMES)
    labels = [draw_figures.barrier_label(n) for n in range(len(PHASE_NAMES) - 1)]
    assert [word for word in found if word in labels] == labels


def test_barriers_have_the_numbers_that_the_kernel_reports():
    n_layers = 3
    phases = phases_of_token(n_layers)
    for barrier, phase in enumerate(phases[:-1], start=1):
        label = draw_figures.barrier_label(PHASE_NAMES.index(phase.name))
        value = eval(re.sub(r"(\d) ([nN])", r"\1 * \2", label), {"n": phase.layer, "N": n_layers})
        assert value == barrier
        assert phase.name in barrier_name(barrier, n_layers)


def test_times_are_those_of_the_table():
    rows = draw_figures.table_rows(TIMES, "Over context")
    assert draw_figures.points_of(rows, "`--quant`", "ms per token") == [(128, 2.5), (2048, 3.0)]
    drawn = ElementTree.fromstring(draw_figures.draw_times(TIMES))
    places = [float(dot.get(axis)) for dot in drawn.iter(f"{SVG}circle") for axis in ("cx", "cy")]
    # 4 ms are the plot's whole height, its top at 44; 128 and 2,048 are 4 octaves apart, with half a one at either end.
    assert places == pytest.approx([116, 174, 564, 76.5, 116, 141.5, 564, 109], abs=0.1)


def test_a_missing_table_is_an_error():
    with pytest.raises(ValueError, match="no table under Over context"):
        draw_figures.table_rows("## Over context\n\nNothing.\n", "Over context")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_scripts_and_flags_of_a_document_exist(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert target.startswith("http") or (document.parent / target).exists(), target
    sources = [*ROOT.glob("*.py"), *(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))]
    known = "".join(source.read_text(encoding="utf-8") for source in sources)
    for command in re.findall(r"^\.venv/bin/python (.*?)(?: {2,}#.*)?$", text, re.MULTILINE):
        script, *arguments = command.split()
        if script == "-m":
            script = arguments[0].replace(".", "/") + ".py"
        if script in ("pytest.py", "pip.py"):
            continue
        assert (ROOT / script).is_file(), command
        flags = [word for word in arguments if word.startswith("--")]
        assert [flag for flag in flags if f'"{flag}"' not in known] == [], command


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_source_files_that_a_document_names_exist(document):
    names = re.findall(r"[\w./-]+\.py\b", document.read_text(encoding="utf-8"))
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200
