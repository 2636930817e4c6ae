"""measure.plot: the points, axes and labels of a plot."""

import fake_matplotlib
import pytest

from measure.plot import plot_times
from measure.timing import Spread


def time(median: float, p10: float = 0.0, p90: float = 0.0) -> Spread:
    return Spread(median, median, median, p10, p90, 1)


def test_points_are_medians_in_order_with_bars_from_p10_to_p90(monkeypatch):
    axes = fake_matplotlib.install(monkeypatch)
    lines = {"a": [(64, time(4.0, 3.5, 6.0)), (8, time(1.0, 0.75, 1.5))], "b": [(16, time(2.0, 2.0, 2.0))]}
    assert plot_times("title", "x", "y", lines, floor=[(64, 0.5), (8, 0.25)]) == fake_matplotlib.PNG
    first, second = axes.errorbar.call_args_list
    assert first.args == ((8, 64), [1.0, 4.0])
    assert (first.kwargs["yerr"], first.kwargs["label"]) == ([[0.25, 0.5], [0.5, 2.0]], "a")
    assert (second.args, second.kwargs["label"]) == (((16,), [2.0]), "b")
    assert axes.plot.call_args.args == ((8, 64), (0.25, 0.5))
    assert axes.set_xticks.call_args.args == ([8, 16, 64],)
    assert (axes.set_ylim.call_args.kwargs, axes.set_yscale.called) == ({"bottom": 0}, False)


def test_without_a_floor_none_is_drawn(monkeypatch):
    axes = fake_matplotlib.install(monkeypatch)
    plot_times("title", "x", "y", {"a": [(8, time(1.0))]}, log_y=True)
    assert (axes.plot.called, axes.set_ylim.called) == (False, False)
    axes.set_yscale.assert_called_once_with("log")


@pytest.mark.parametrize("log_y", [False, True])
def test_matplotlib_makes_a_png_of_it(log_y):
    pytest.importorskip("matplotlib")
    spread = time(2.0, 1.5, 2.5)
    png = plot_times("title", "x", "y", {"a": [(8, spread), (100, spread)], "b": [(8, spread)]}, [(8, 1.0)], log_y)
    assert png.startswith(b"\x89PNG")
