"""A stand-in for matplotlib, which need not be installed: it notes what is drawn."""

import sys
from types import ModuleType
from unittest.mock import MagicMock

import pytest

PNG = b"\x89PNG of nothing"


def install(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """Install the stand-in for one test; return the axes of all figures, whose calls can be inspected."""
    axes = MagicMock()

    class Figure:
        def __init__(self, **_):
            pass

        def add_subplot(self) -> MagicMock:
            return axes

        def savefig(self, file, format, **_) -> None:
            assert format == "png"
            file.write(PNG)

    module = ModuleType("matplotlib.figure")
    module.Figure = Figure
    package = ModuleType("matplotlib")
    package.figure = module
    monkeypatch.setitem(sys.modules, "matplotlib", package)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    return axes
