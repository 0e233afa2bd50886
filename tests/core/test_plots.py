"""Measures along lines, over planes and along rays; the numbers to quote; files."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swa_core import (
    NonFiniteStatisticsError,
    NothingAveragedError,
    StateError,
    SWAConfig,
    SWAState,
    plots,
    safetensors_files,
    save_average,
)
from swa_core.plots import Line, Plane, Rays
from swa_core.plots.given import averages_of, read

W1, W2, SWA = ({"w": np.float32(w)} for w in ([0, 0, 1], [4, 0, 1], [1, 2, 1]))


def quadratic(weights):
    """A quarter in one direction, one in another: known everywhere."""
    x, y, _ = map(float, weights["w"])
    return {"loss": x * x / 4 + (y - 1) ** 2, "error": abs(x)}


# Along a line.


def test_a_quadratic_is_a_parabola_along_a_line():
    line = plots.loss_line(W1, W2, quadratic)
    assert line.positions.tolist() == [n / 10 for n in range(-5, 16)]
    assert line.values() == pytest.approx((4 * line.positions) ** 2 / 4 + 1)
    assert line.values("error") == pytest.approx(abs(4 * line.positions))
    assert line.length == 4
    assert line.distances == pytest.approx(4 * line.positions)


def test_the_ends_are_measured_first_and_always():
    seen = []

    def measure(weights):
        seen.append(float(weights["w"][0]))
        return seen[-1]

    line = plots.loss_line(W1, W2, measure, positions=[0.5, 2])
    assert seen == [0, 4, 2, 8]
    assert line.positions.tolist() == [0, 0.5, 1, 2]
    assert line.values().tolist() == [0, 2, 4, 8]


def test_the_measure_gets_float32_of_half_precision():
    def measure(weights):
        assert weights["w"].dtype == np.float32
        return 0.0

    halves = [{"w": np.float16([0, 1])}, {"w": np.float16([1, 0])}, {"w": np.float16([1, 1])}]
    plots.loss_line(*halves[:2], measure)
    plots.loss_plane(*halves, measure, points=2)
    plots.loss_rays(halves[0], measure, radii=[1], directions=1)


def test_nan_and_statistics_that_overflow_are_holes():
    def measure(weights):
        x = float(weights["w"][0])
        if x > 5:
            raise NonFiniteStatisticsError("the statistics of bn would hold NaN or Inf.")
        return {"a": float("nan") if x == 2 else x, "b": 1.0}

    line = plots.loss_line(W1, W2, measure, positions=[0.25, 0.5, 1.5])
    assert np.isnan(line.values()).tolist() == [False, False, True, False, True]
    assert np.isnan(line.values("b")).tolist() == [False, False, False, False, True]


def test_nothing_but_holes_has_a_name_still():
    def measure(weights):
        raise NonFiniteStatisticsError("the statistics of bn would hold NaN or Inf.")

    assert np.isnan(plots.loss_line(W1, W2, measure, positions=[]).values("loss")).all()


@pytest.mark.parametrize("result", ["many", None, {}, {"a": None}, [1, 2]])
def test_what_is_no_number_is_refused(result):
    with pytest.raises(TypeError, match="measure returned"):
        plots.loss_line(W1, W2, lambda weights: result)


def test_measures_that_change_their_names_are_refused():
    results = iter([{"a": 1}, {"b": 1}])
    with pytest.raises(TypeError, match=r"\['b'\], and \['a'\] before"):
        plots.loss_line(W1, W2, lambda weights: next(results))


def test_other_errors_of_a_measure_come_out():
    def measure(weights):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        plots.loss_line(W1, W2, measure)


def test_progress_is_told():
    told = []
    plots.loss_line(W1, W2, quadratic, positions=[], progress=lambda *now: told.append(now))
    assert told == [(1, 2), (2, 2)]
    told.clear()
    plots.loss_plane(W1, W2, SWA, quadratic, points=(2, 3), progress=lambda *now: told.append(now))
    assert told[-1] == (9, 9)
    told.clear()
    plots.loss_rays(
        W1, quadratic, radii=[1, 2], directions=3, progress=lambda *now: told.append(now)
    )
    assert told[-1] == (7, 7)


def line_of(positions, losses):
    return Line(positions=positions, measures={"loss": losses}, length=1)


def test_a_barrier_stands_above_the_chord():
    # Higher outside, and higher than both ends without being above the chord: neither counts.
    line = line_of([-1, 0, 0.25, 0.5, 1, 2], [9, 0, 1, 3, 4, 50])
    assert line.barrier() == (1.0, 0.5)


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_a_straight_loss_has_no_barrier(slope, offset):
    at = np.linspace(0, 1, 7)
    assert line_of(at, offset + slope * at).barrier().height == pytest.approx(0, abs=1e-12)


def test_a_valley_has_no_barrier():
    assert line_of([0, 0.5, 1], [1, 0, 1]).barrier().height == 0


def test_a_barrier_with_a_hole_is_unknown():
    assert np.isnan(line_of([0, 0.5, 1], [1, np.nan, 1]).barrier()).all()
    assert line_of([0, 0.5, 1, 2], [1, 2, 1, np.nan]).barrier().height == 1


def test_a_barrier_needs_both_ends():
    with pytest.raises(ValueError, match="positions 0 and 1"):
        line_of([0.5, 1], [1, 1]).barrier()


# Over a plane.


def test_a_quadratic_over_a_plane():
    plane = plots.loss_plane(W1, W2, SWA, quadratic, points=(5, 4), margin=0.5)
    assert plane.corners == {"w1": (0, 0), "w2": (4, 0), "w_SWA": (1, 2)}
    assert plane.x == pytest.approx(np.linspace(-2, 6, 5))  # half of the larger extent, 4
    assert plane.y == pytest.approx(np.linspace(-2, 4, 4))
    expected = plane.x[None] ** 2 / 4 + (plane.y[:, None] - 1) ** 2
    assert plane.values() == pytest.approx(expected)
    assert plane.values("error") == pytest.approx(np.abs(plane.x[None]) + 0 * expected)
    assert plane.at_corners["loss"].tolist() == [1, 5, 1.25]


def test_a_plane_at_places_of_ones_own():
    plane = plots.loss_plane(W1, W2, SWA, quadratic, x=[2, 0, 2], y=[1])
    assert plane.x.tolist() == [0, 2]
    assert plane.values().tolist() == [[0, 1]]


def test_a_plane_needs_three_names_and_two_points():
    with pytest.raises(ValueError, match="three names"):
        plots.loss_plane(W1, W2, SWA, quadratic, names=("w1", "w1", "w2"))
    with pytest.raises(ValueError, match="at least 2"):
        plots.loss_plane(W1, W2, SWA, quadratic, points=1)
    with pytest.raises(ValueError, match="finite"):
        plots.loss_plane(W1, W2, SWA, quadratic, x=[0, np.nan])


# Along rays.


def sphere(weights):
    return sum(float((leaf**2).sum()) for leaf in weights.values())


@settings(max_examples=25)
@given(st.floats(0.1, 8.9), st.integers(0, 5))
def test_the_radius_of_a_rise_on_a_sphere(amount, seed):
    radii = np.linspace(0, 3, 31)
    center = {"w": np.zeros((2, 2)), "b": np.zeros(3)}
    rays = plots.loss_rays(center, sphere, radii=radii, directions=3, seed=seed)
    rise = rays.rise(amount)
    # Linear interpolation of a square errs by less than a quarter of a step.
    assert rise.radii == pytest.approx(np.sqrt(amount), abs=0.025)
    assert rise.mean == pytest.approx(np.sqrt(amount), abs=0.025)
    assert rise.median == pytest.approx(rise.mean)
    assert rise.spread == pytest.approx(0, abs=1e-9)
    assert rise.n_reached == 3


def test_a_sharper_minimum_rises_sooner():
    center = {"w": np.zeros(5)}
    flat, sharp = (
        plots.loss_rays(center, lambda w, by=by: by * sphere(w), radii=np.linspace(0, 2, 9), seed=3)
        for by in (1, 16)
    )
    assert sharp.rise(1.0).mean < 0.5 * flat.rise(1.0).mean


def test_rays_hold_what_they_were_made_with():
    center = {"w": np.full((2, 2), 2.0), "b": np.full(9, 4.0)}
    rays = plots.loss_rays(center, sphere, move_vectors=False, directions=2, seed=7, name="w_SWA")
    assert rays.norm == 4
    assert rays.radii == pytest.approx(np.linspace(0, 2, 11))  # to half of that
    assert rays.values().shape == (2, 11)
    assert rays.values()[:, 0].tolist() == [160, 160]
    assert (rays.seed, rays.move_vectors, rays.name) == (7, False, "w_SWA")
    assert (rays.values()[0, 1:] != rays.values()[1, 1:]).all()
    relative = plots.loss_rays(center, sphere, normalization="filter", directions=1)
    assert relative.radii[-1] == 0.5


def test_the_same_seed_walks_the_same_rays():
    center = {"w": np.arange(4.0)}
    first, again, other = (
        plots.loss_rays(center, sphere, seed=seed).values() for seed in (1, 1, 2)
    )
    assert (first == again).all()
    assert (first[:, 1:] != other[:, 1:]).all()


def rays_of(losses, radii=(0, 1, 2, 4)):
    return Rays(radii=radii, measures={"loss": losses}, norm=1, seed=0)


def test_a_rise_is_the_first_one():
    assert rays_of([[1, 2, 1, 3]]).rise(0.5).radii.tolist() == [0.5]
    assert rays_of([[1, 0, 1, 3]]).rise(1.0).radii.tolist() == [3.0]


def test_a_rise_beyond_the_rays_is_infinite_and_spoils_the_mean():
    rise = rays_of([[0, 1, 2, 3], [0, 1, 1, 1], [0, 2, 2, 2]]).rise(2)
    assert rise.radii.tolist() == [2, np.inf, 1]
    assert rise.n_reached == 2
    assert rise.median == 2
    assert np.isnan(rise.mean)
    assert np.isnan(rise.spread)
    assert rays_of([[0, 1, 2, 3], [0, 0, 0, 0]]).rise(1).median == np.inf


def test_a_hole_before_a_rise_is_unknown_and_one_behind_is_nothing():
    rise = rays_of([[0, np.nan, 0, 3], [0, 2, np.nan, np.nan]]).rise(1)
    assert np.isnan(rise.radii[0])
    assert rise.radii[1] == 0.5
    assert np.isnan(rise.median)


def test_a_rise_to_infinity():
    assert rays_of([[0, 1, np.inf, np.inf]]).rise(2).radii.tolist() == [1]


@pytest.mark.parametrize("amount", [0, -1, np.nan])
def test_no_rise_is_refused(amount):
    with pytest.raises(ValueError, match="above 0"):
        rays_of([[0, 1, 2, 3]]).rise(amount)


def test_rays_need_a_direction_and_radii_from_0():
    with pytest.raises(ValueError, match="directions"):
        plots.loss_rays(W1, sphere, directions=0)
    with pytest.raises(ValueError, match="radii must be at least 0"):
        plots.loss_rays(W1, sphere, radii=[-1])


# The data.

LINE = line_of([0, 0.1, 1], [1, np.nan, np.inf])
PLANE = Plane(
    x=[0, 1, 2],
    y=[-1, 1],
    measures={"loss": [[1, 2, 3], [4, 5, np.nan]], "error": np.ones((2, 3))},
    corners={"a": (0, 0), "b": (1, 0), "c": (0.5, 1)},
    at_corners={"loss": [1, 2, 3], "error": [4, 5, -np.inf]},
)
RAYS = Rays(
    radii=[0, 1],
    measures={"loss": [[1, 2], [3, np.nan]]},
    norm=2.5,
    seed=3,
    normalization="filter",
    move_vectors=False,
    name="w_SWA",
)


@pytest.mark.parametrize("data", [LINE, PLANE, RAYS], ids=lambda data: data.kind)
def test_files_hold_everything(data, tmp_path):
    data.save(tmp_path / "curve.json")
    found = plots.load(tmp_path / "curve.json")
    assert type(found) is type(data)
    assert found.to_dict() == data.to_dict()
    for name, values in data.measures.items():
        np.testing.assert_array_equal(found.values(name), values)
        assert found.values(name).dtype == np.float64
    assert type(data).from_dict(json.loads(json.dumps(data.to_dict()))).to_dict() == data.to_dict()
    # Strict JSON, which has neither NaN nor infinity.
    json.loads((tmp_path / "curve.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("data", [LINE, PLANE, RAYS], ids=lambda data: data.kind)
def test_damaged_files_are_refused(data, tmp_path):
    saved = data.to_dict()
    for key in saved:
        for damaged in (
            {k: v for k, v in saved.items() if k != key},
            saved | {key: ["x"]},
        ):
            with pytest.raises(StateError):
                type(data).from_dict(damaged)
    with pytest.raises(StateError, match="version 2"):
        plots.from_dict(saved | {"version": 2})
    with pytest.raises(StateError, match="expected a saved"):
        (Plane if data is LINE else Line).from_dict(saved)
    (tmp_path / "cut.json").write_text(json.dumps(saved)[:-9])
    with pytest.raises(StateError, match=r"cut\.json is no JSON"):
        plots.load(tmp_path / "cut.json")


@pytest.mark.parametrize("saved", [{}, [], None, {"kind": "curve"}, {"kind": []}])
def test_something_else_is_refused(saved):
    with pytest.raises(StateError, match="no saved line"):
        plots.from_dict(saved)


def test_data_are_frozen_copies():
    losses = np.ones(2)
    line = line_of([0, 1], losses)
    losses[0] = 5
    assert line.values()[0] == 1
    with pytest.raises(ValueError, match="read-only"):
        line.values()[0] = 5
    with pytest.raises(AttributeError):
        line.length = 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": [0, 0]}, "increasing"),
        ({"positions": [1, 0]}, "increasing"),
        ({"positions": [0, np.nan]}, "increasing"),
        ({"positions": [0, 1, 2]}, "shape"),
        ({"measures": {}}, "no measures"),
    ],
)
def test_data_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Line(**{"positions": [0, 1], "measures": {"loss": [1, 2]}, "length": 1} | arguments)


def test_rays_that_do_not_begin_at_0_are_refused():
    with pytest.raises(ValueError, match="begin at 0"):
        rays_of([[1, 2]], radii=[1, 2])


def test_an_unknown_measure_is_named():
    with pytest.raises(KeyError, match=r"no measure 'top5'; there are \['loss', 'error'\]"):
        PLANE.values("top5")


# Weights in files.


def test_weights_come_out_of_files(tmp_path):
    state = SWAState(7, 2, 0, 2.0, {"w": np.float32([1, 2])})
    save_average(tmp_path / "average.safetensors", state, SWAConfig())
    assert averages_of(read(tmp_path / "average.safetensors"))["w"].tolist() == [1, 2]
    safetensors_files.write(tmp_path / "model.safetensors", {"w": np.float32([3])}, {})
    assert read(tmp_path / "model.safetensors")["w"].tolist() == [3]


def test_a_file_without_a_snapshot_is_refused(tmp_path):
    save_average(tmp_path / "empty.safetensors", SWAState(7, 0, 0, 0.0, {}), SWAConfig())
    with pytest.raises(NothingAveragedError, match="before the first snapshot"):
        averages_of(read(tmp_path / "empty.safetensors"))
