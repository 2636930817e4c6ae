"""Every instruction of the emulator's tables is executed by a test in one of the files test_instructions_*.py."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tools.gfx950.layout import FORM_OF

UNTESTED = {
    "s_endpgm": "stands behind every test's code, in assembly.py",
}
VALUE = "\0"  # in place of what an f-string computes


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the strings of a module, but for docstrings."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else VALUE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        yield from texts(node)


def pattern_of_names() -> re.Pattern:
    """Return a pattern of the names in the tests' code."""
    paths = Path(__file__).parent.glob("test_instructions_*.py")
    found = {name for path in paths for text in texts(ast.parse(path.read_text())) for name in names_in(text)}
    return re.compile("|".join(re.escape(name).replace(VALUE, r"\w+") for name in found))


def names_in(text: str) -> list[str]:
    names = re.findall(rf"\b(?:[vs]|buffer)_[a-z0-9_{VALUE}]+", text)
    return [re.sub(r"_(e32|e64|dpp|sdwa)$", "", name) for name in names]


def test_every_instruction_is_tested():
    tested = pattern_of_names()
    assert {name for name in FORM_OF if not tested.fullmatch(name)} == {*UNTESTED}
