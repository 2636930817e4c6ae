"""The rooms of the project import only downwards, without circles. Imports are read from the sources, not run."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAY_IMPORT = {
    "system": set(),
    "checkpoints": {"system"},
    "command_line": {"checkpoints", "system"},
    "common": set(),
    "interpreter": {"common", "system"},
    "host": {"command_line", "checkpoints", "common", "interpreter", "system"},
    "measure": {"host", "command_line", "checkpoints", "common", "interpreter", "system"},
    "endpoint": {"host", "checkpoints", "common", "interpreter", "system"},
    "tools": {"multi_gpu", "measure", "host", "command_line", "checkpoints", "common", "interpreter", "system", "root"},
    "multi_gpu": {"measure", "host", "command_line", "checkpoints", "common", "interpreter", "system", "root"},
    "root": {
        "multi_gpu",
        "endpoint",
        "measure",
        "host",
        "command_line",
        "checkpoints",
        "common",
        "interpreter",
        "system",
    },
}


def module_name(path: Path) -> str:
    """Return the dotted name under which a source file is imported; a package's is that of its folder."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the room of a module: its first folder, or "root"."""
    first = module.split(".")[0]
    return first if first in MAY_IMPORT else "root"


PATHS = [*ROOT.glob("*.py"), *(path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py")))]
MODULES = {module_name(path): path for path in PATHS}


def imported_names(source: str) -> set[tuple[str, str | None]]:
    """Return (module, name) of each `from module import name` and (module, None) of each `import module`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {(alias.name, None) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {(node.module, alias.name) for alias in node.names}
    return names


def imported_modules(module: str) -> set[str]:
    """Return the modules of this project that a module imports anywhere in its source."""
    names = imported_names(MODULES[module].read_text(encoding="utf-8"))
    candidates = {f"{parent}.{name}" if f"{parent}.{name}" in MODULES else parent for parent, name in names}
    return candidates & set(MODULES)


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\n\ndef f():\n    from c.d import e, f as g\n    if True:\n        import h as i\n"
    assert imported_names(source) == {("a.b", None), ("c.d", "e"), ("c.d", "f"), ("h", None)}


def test_every_room_has_modules():
    assert {room_of(module) for module in MODULES} == set(MAY_IMPORT)


def test_no_modules_import_each_other_in_a_circle():
    order = graphlib.TopologicalSorter({module: imported_modules(module) for module in MODULES}).static_order()
    assert set(order) == set(MODULES)  # static_order raises CycleError for a circle


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_the_rooms_below_it(room):
    modules = [module for module in MODULES if room_of(module) == room]
    edges = [(module, target) for module in modules for target in imported_modules(module)]
    assert [edge for edge in edges if room_of(edge[1]) not in MAY_IMPORT[room] | {room}] == []


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_no_private_name_of_another(module):
    names = imported_names(MODULES[module].read_text(encoding="utf-8"))
    assert [(parent, name) for parent, name in names if parent in MODULES and (name or "").startswith("_")] == []
