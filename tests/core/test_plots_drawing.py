"""Pictures: what stands in them, and that drawing alone asks for matplotlib."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from swa_core import plots
from swa_core.plots.drawing import log_levels, pretty

matplotlib = pytest.importorskip("matplotlib", reason="drawing is the extra demo's")
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402


@pytest.fixture(autouse=True)
def _closed():
    yield
    pyplot.close("all")


def rendered(ax):
    ax.figure.canvas.draw()
    return ax


def a_plane(values, **arguments):
    return plots.Plane(
        x=[0, 1, 2],
        y=[0, 2],
        measures={"test error [%]": values, "loss": np.ones((2, 3))},
        corners={"w1": (0, 0), "w2": (2, 0), "w_SWA": (1, 1)},
        at_corners={"test error [%]": [1, 2, 3], "loss": [1, 1, 1]},
        **arguments,
    )


def test_a_line_says_what_its_ends_are():
    line = plots.Line(
        positions=[0, 0.5, 1],
        measures={"loss": [1, np.nan, 2], "error": [3, 4, 5]},
        length=12.345,
        names=("w1", "w_SWA"),
    )
    ax = rendered(line.draw())
    assert "0 is $w_" in ax.get_xlabel()
    assert "12.3 apart in weight space" in ax.get_xlabel()
    assert ax.get_ylabel() == "loss"
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [1, np.nan, 2])
    # Another into the same axes.
    assert line.draw(ax, measure="error", label="error", color="red") is ax
    assert rendered(ax).get_legend() is not None


def test_a_plane_has_levels_that_grow_and_three_weights():
    values = [[0, 1, 10], [100, 1000, np.nan]]
    ax = rendered(a_plane(values).draw(levels=4, highest=100))
    bar = ax.figure.axes[1]
    assert bar.get_yticks() == pytest.approx([0, 1, 10, 100])
    assert {text.get_text() for text in ax.texts} == {pretty(n) for n in ("w1", "w2", "w_SWA")}
    markers = [tuple(map(float, np.ravel(line.get_data()))) for line in ax.lines]
    assert markers == [(0, 0), (2, 0), (1, 1)]
    assert ax.get_aspect() == 1
    assert "from $w_" in ax.get_xlabel()
    assert "orthogonal" in ax.get_ylabel()
    assert bar.get_ylabel() == "test error [%]"


@pytest.mark.parametrize("values", [np.ones((2, 3)), np.full((2, 3), np.nan), np.zeros((2, 3))])
def test_planes_without_a_relief_are_drawn(values):
    ax = rendered(a_plane(values).draw())
    assert len(ax.texts) == 3


def test_a_plane_in_axes_of_ones_own_without_a_bar():
    figure, ax = pyplot.subplots()
    drawn = a_plane(np.arange(6).reshape(2, 3)).draw(ax, levels=[1, 2, 3], colorbar=False)
    assert rendered(drawn) is ax
    assert figure.axes == [ax]


def test_rays_are_thin_and_their_mean_is_thick():
    rays = plots.Rays(
        radii=[0, 1, 2], measures={"loss": [[0, 1, np.nan], [0, 3, 5]]}, norm=1, seed=0
    )
    ax = rendered(rays.draw())
    mean, *each = ax.lines
    np.testing.assert_array_equal(mean.get_ydata(), [0, 2, np.nan])
    assert len(each) == 2
    assert {line.get_color() for line in each} == {mean.get_color()}
    assert each[0].get_linewidth() < mean.get_linewidth()
    assert "in weight space" in ax.get_xlabel()
    rays.draw(ax, label="the average", color="red")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["w", "the average"]


def test_relative_radii_are_said_to_be():
    rays = plots.Rays(
        radii=[0, 1], measures={"loss": [[0, 1]]}, norm=1, seed=0, normalization="filter"
    )
    assert "relative to the norm of each filter" in rays.draw().get_xlabel()


def test_levels_grow_by_a_factor_above_the_lowest():
    levels = log_levels(np.array([[5.0, 105.0, np.inf]]), 6, highest=105.0)
    above = levels - 5
    assert above[0] == 0
    assert above[1:] == pytest.approx([1, 10**0.5, 10, 10**1.5, 100])


def test_levels_end_at_the_90th_percentile():
    assert log_levels(np.arange(101.0), 3)[-1] == 90


@pytest.mark.parametrize("levels", [1, [3.0], [3.0, 3.0]])
def test_one_level_is_refused(levels):
    with pytest.raises(ValueError, match="at least 2 levels"):
        log_levels(np.arange(3.0), levels)


def test_data_need_no_matplotlib_and_drawing_says_so():
    script = """
import sys
sys.modules["matplotlib"] = None
import numpy as np
from swa_core import plots
line = plots.loss_line({"w": np.zeros(1)}, {"w": np.ones(1)}, lambda w: 1.0)
try:
    line.draw()
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install matplotlib" in done.stdout


def test_nothing_is_imported_before_it_is_drawn():
    script = "import sys, swa_core.plots; print('matplotlib' in sys.modules, 'tqdm' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["False", "False"]


def test_a_bar_is_shown(capsys):
    pytest.importorskip("tqdm", reason="the bar is the extra demo's")
    plots.loss_line({"w": np.zeros(1)}, {"w": np.ones(1)}, lambda w: 1.0, progress=True)
    assert "21/21" in capsys.readouterr().err
