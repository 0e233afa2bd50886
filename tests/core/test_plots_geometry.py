"""Lines, planes and directions through weights: distances, coordinates, and what is refused."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import hypothesis.extra.numpy as arrays
import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from swa_core import GeometryError, StructureError
from swa_core.plots import LineThrough, PlaneThrough, random_direction

numbers = st.floats(-10, 10, width=32)
vectors = arrays.arrays(np.float64, 7, elements=numbers)


class Pair(NamedTuple):
    kernel: np.ndarray
    rest: list


def tree(vector, dtype=np.float64):
    """Seven numbers as weights of some containers, with what is no weight beside them."""
    vector = np.asarray(vector, dtype)
    rest = [{"b": vector[6]}, None, np.int32(4)]
    return Pair(kernel=vector[:6].reshape(2, 3), rest=rest)


def flat(weights):
    return np.concatenate([np.ravel(weights.kernel), np.ravel(weights.rest[0]["b"])])


def distance(some, others):
    return np.linalg.norm(flat(some) - flat(others))


@given(vectors, vectors, st.floats(-3, 3))
def test_a_line_divides_the_distance(first, second, position):
    assume(np.linalg.norm(first - second) > 1e-3)
    line = LineThrough(tree(first), tree(second))
    assert line.length == pytest.approx(np.linalg.norm(first - second))
    at = line.at(position)
    assert distance(at, tree(first)) == pytest.approx(abs(position) * line.length, abs=1e-9)
    assert flat(at) == pytest.approx((1 - position) * first + position * second, abs=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(vectors, vectors)
def test_the_ends_of_a_line_are_the_weights_to_the_bit(dtype, first, second):
    first, second = first.astype(dtype) * dtype(1e-20), second.astype(dtype)
    assume((first != second).any())
    line = LineThrough(tree(first, dtype), tree(second, dtype))
    assert (flat(line.at(0)) == first).all()
    assert (flat(line.at(1)) == second).all()


def triangle(first, second, third):
    sides = [second - first, third - first, third - second]
    assume(min(map(np.linalg.norm, sides)) > 1e-2)
    a, b = sides[0], sides[1]
    off = b - a * (a @ b) / (a @ a)
    assume(np.linalg.norm(off) > 1e-3 * max(map(np.linalg.norm, sides)))
    return PlaneThrough(tree(first), tree(second), tree(third))


@given(vectors, vectors, vectors, st.floats(-20, 20), st.floats(-20, 20))
def test_coordinates_of_a_place_are_its_own(first, second, third, x, y):
    plane = triangle(first, second, third)
    found = plane.coordinates(plane.at(x, y))
    assert found == pytest.approx((x, y, 0), abs=1e-6)


@given(vectors, vectors, vectors, *[st.floats(-20, 20)] * 4)
def test_distances_in_the_plane_are_those_in_weight_space(first, second, third, x, y, u, v):
    plane = triangle(first, second, third)
    assert distance(plane.at(x, y), plane.at(u, v)) == pytest.approx(
        np.hypot(x - u, y - v), abs=1e-6
    )


@given(vectors, vectors, vectors)
def test_the_corners_are_the_weights(first, second, third):
    plane = triangle(first, second, third)
    for corner, weights in zip(plane.corners, (first, second, third), strict=True):
        assert flat(plane.at(*corner)) == pytest.approx(weights, abs=1e-9)
    assert plane.corners[0] == (0, 0)
    assert plane.corners[1][1] == 0
    assert plane.corners[2][1] > 0


@given(vectors, vectors, vectors, vectors)
def test_what_is_off_the_plane_is_projected(first, second, third, other):
    plane = triangle(first, second, third)
    x, y, off = plane.coordinates(tree(other))
    foot = flat(plane.at(x, y))
    assert np.linalg.norm(other - foot) == pytest.approx(off, abs=1e-6)
    for side in (second - first, third - first):
        assert (other - foot) @ side == pytest.approx(0, abs=1e-4)


@given(vectors, vectors, st.floats(-3, 3))
def test_three_on_a_line_are_refused(first, second, position):
    assume(np.linalg.norm(first - second) > 1e-3)
    assume(abs(position) > 1e-3)
    third = first + position * (second - first)
    with pytest.raises(GeometryError, match=r"on one line|same"):
        PlaneThrough(tree(first), tree(second), tree(third))


def test_the_average_of_two_float32_snapshots_is_on_their_line():
    random = np.random.default_rng(0)
    first = {"w": random.normal(size=100_000).astype(np.float32)}
    # So near that rounding lifts the average off the line by more than a millionth.
    second = {"w": first["w"] + np.float32(1e-4) * random.normal(size=100_000).astype(np.float32)}
    average = {"w": (first["w"] + second["w"]) / 2}
    with pytest.raises(GeometryError, match="average of two snapshots") as raised:
        PlaneThrough(first, second, average)
    assert "on one line" in str(raised.value)


def test_a_thin_triangle_keeps_its_height():
    # By Pythagoras it would be the difference of two numbers that agree in 12 digits.
    third = {"w": np.float64([0.5, 1e-5, 0])}
    plane = PlaneThrough({"w": np.zeros(3)}, {"w": np.float64([1, 0, 0])}, third)
    assert plane.corners[2] == pytest.approx((0.5, 1e-5), rel=1e-12)


def test_the_same_weights_are_refused():
    weights = {"w": np.ones(2)}
    with pytest.raises(GeometryError, match="take copies of weights"):
        LineThrough(weights, {"w": np.ones(2)})
    with pytest.raises(GeometryError, match="first and the second"):
        PlaneThrough(weights, {"w": np.ones(2)}, {"w": np.zeros(2)})
    with pytest.raises(GeometryError, match="on one line"):
        PlaneThrough({"w": np.zeros(2)}, weights, {"w": np.ones(2)})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(value):
    spoilt, sound = {"w": np.float32([value, 1])}, {"w": np.float32([1, 2])}
    with pytest.raises(GeometryError, match="NaN or Inf"):
        LineThrough(sound, spoilt)
    with pytest.raises(GeometryError, match="NaN or Inf"):
        PlaneThrough(sound, {"w": np.float32([3, 4])}, spoilt)
    with pytest.raises(GeometryError, match="NaN or Inf"):
        random_direction(spoilt, 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"a": np.ones(2)}, "no leaf 'b/0'"),
        ({"a": np.ones(3), "b": [np.ones(1)]}, r"leaf 'a' .* shape \(3,\), and \(2,\)"),
        ({"a": np.ones(2), "b": [np.ones(1), np.ones(1)]}, "leaf 'b/1' more"),
    ],
)
def test_weights_of_another_network_are_refused(other, message):
    with pytest.raises(StructureError, match=message):
        LineThrough({"a": np.zeros(2), "b": [np.zeros(1)]}, other)


def test_no_weights_are_refused():
    with pytest.raises(StructureError, match="no weights"):
        LineThrough({"steps": np.int32(1)}, {"steps": np.int32(2)})


def test_containers_may_differ_and_the_first_ones_stay():
    first = OrderedDict(w=[np.float32([0])], steps=3)
    at = LineThrough(first, {"w": (np.float32([1]),)}).at(0.25)
    assert type(at) is OrderedDict
    assert at == {"w": [0.25], "steps": 3}


def test_an_average_stands_beside_weights_of_half_precision():
    first = {"w": np.asarray([1, 2], ml_dtypes.bfloat16), "steps": np.int32(1)}
    average = {"w": np.float32([1, 4]), "steps": None}
    line = LineThrough(first, average)
    assert line.length == 2
    at = line.at(0.5)["w"]
    assert at.dtype == np.float32
    assert at.tolist() == [1, 3]


def test_results_are_as_wide_as_the_widest_and_share_no_memory():
    first, second = {"w": np.zeros(2, np.float64)}, {"w": np.ones(2, np.float32)}
    at = LineThrough(second, first).at(0)["w"]
    assert at.dtype == np.float32  # what is not walked towards adds nothing
    assert LineThrough(second, first).at(0.5)["w"].dtype == np.float64
    assert not np.shares_memory(at, second["w"])


def test_complex_weights_have_twice_the_dimensions():
    line = LineThrough({"w": np.complex64([0])}, {"w": np.complex64([3 + 4j])})
    assert line.length == 5
    assert line.at(2)["w"].tolist() == [6 + 8j]


def test_weights_of_any_layout_in_memory():
    first = np.arange(12, dtype=np.float32).reshape(3, 4)
    line = LineThrough({"w": np.asfortranarray(first)}, {"w": first[::-1, ::-1]})
    assert line.at(0.5)["w"].tolist() == np.full((3, 4), 5.5).tolist()


def test_leaves_longer_than_a_block_are_walked_whole():
    first, second = {"w": np.zeros(200_001, np.float32)}, {"w": np.ones(200_001, np.float32)}
    line = LineThrough(first, second)
    assert line.length == pytest.approx(np.sqrt(200_001))
    assert (line.at(0.25)["w"] == 0.25).all()


# Random directions.

CENTER = {
    "kernel": np.float32([[1, 0, 2], [3, 0, 4]]),
    "bias": np.float32([1, 2, 2]),
    "steps": np.int32(3),
}


@given(st.integers(0, 2**32), st.floats(-5, 5))
def test_a_step_is_as_long_as_the_radius(seed, radius):
    at = random_direction(CENTER, seed).at(radius)
    moved = np.concatenate([np.ravel(at[key] - CENTER[key]) for key in ("kernel", "bias")])
    assert np.linalg.norm(moved) == pytest.approx(abs(radius), rel=1e-5, abs=1e-5)
    assert at["steps"] == 3


def test_seeds_give_directions():
    def first(seed):
        return random_direction(CENTER, seed).at(1)["kernel"]

    assert (first(1) == first(1)).all()
    assert (first((1, 0)) != first((1, 1))).all()


def test_directions_are_spread_evenly():
    center = {"a": np.zeros(1), "b": np.zeros((1, 1))}
    steps = [random_direction(center, seed).at(1) for seed in range(400)]
    angles = np.arctan2([s["b"][0, 0] for s in steps], [s["a"][0] for s in steps])
    # Five standard errors of a mean of cosines.
    for turns in (1, 2, 4):
        assert abs(np.exp(1j * turns * angles).mean()) < 5 / np.sqrt(2 * 400) * np.sqrt(2)


@pytest.mark.parametrize(("axis", "others"), [(-1, 0), (0, 1)])
def test_a_filter_moves_as_far_as_it_is_long(axis, others):
    at = random_direction(CENTER, 5, normalization="filter", filter_axis=axis).at(0.5)
    moved = np.linalg.norm(at["kernel"] - CENTER["kernel"], axis=others)
    assert moved == pytest.approx(0.5 * np.linalg.norm(CENTER["kernel"], axis=others), rel=1e-5)
    assert np.linalg.norm(at["bias"] - CENTER["bias"]) == pytest.approx(1.5, rel=1e-5)


def test_a_filter_normalised_direction_does_not_see_the_scale_of_filters():
    scaled = CENTER | {"kernel": CENTER["kernel"] * np.float32([8, 1, 0.25])}
    step, of_scaled = (
        random_direction(weights, 5, normalization="filter").at(1)["kernel"] - weights["kernel"]
        for weights in (CENTER, scaled)
    )
    assert of_scaled == pytest.approx(step * [8, 1, 0.25], rel=1e-5)


def test_leaves_of_one_dimension_stay_if_asked():
    at = random_direction(CENTER, 0, move_vectors=False).at(2.0)
    assert (at["bias"] == CENTER["bias"]).all()
    assert np.linalg.norm(at["kernel"] - CENTER["kernel"]) == pytest.approx(2, rel=1e-5)


def test_fixed_leaves_stay():
    at = random_direction(CENTER, 0, fixed=["kernel"]).at(2.0)
    assert (at["kernel"] == CENTER["kernel"]).all()
    assert np.linalg.norm(at["bias"] - CENTER["bias"]) == pytest.approx(2, rel=1e-5)
    with pytest.raises(StructureError, match="fix leaf 'kernels'"):
        random_direction(CENTER, 0, fixed=["kernels"])
    with pytest.raises(StructureError, match="no weights are left"):
        random_direction(CENTER, 0, fixed=["kernel"], move_vectors=False)


def test_zeros_have_no_filters_to_be_compared_with():
    with pytest.raises(GeometryError, match="zero"):
        random_direction({"w": np.zeros((2, 2))}, 0, normalization="filter")


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="normalization"):
        random_direction(CENTER, 0, normalization="layer")


def test_a_filter_axis_beyond_the_dimensions_is_refused():
    with pytest.raises(ValueError, match="filter_axis 2"):
        random_direction(CENTER, 0, normalization="filter", filter_axis=2)


def test_a_direction_of_complex_weights_is_complex():
    at = random_direction({"w": np.zeros(3, np.complex64)}, 0).at(1.0)["w"]
    assert at.dtype == np.complex64
    assert (at.imag != 0).all()
    assert np.linalg.norm(at) == pytest.approx(1, rel=1e-5)


def test_directions_of_doubles_are_doubles():
    assert random_direction({"w": np.zeros(3)}, 0).at(1.0)["w"].dtype == np.float64
    at = random_direction({"w": np.zeros(3)}, 0).at(1.0)["w"]
    assert np.linalg.norm(at) == pytest.approx(1, rel=1e-14)
