"""The loss around parameters, wherever they and their averages come from."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import (
    GeometryError,
    NothingAveragedError,
    StructureError,
    SWAWarning,
    load_average,
)
from swa_optax import (
    averaged_params,
    loss_line,
    loss_plane,
    loss_rays,
    save_average,
    swa,
    update_bn,
)

CONFIG = {"start": "2step", "every": "1step"}
PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}, "steps": jnp.int32(4)}
BATCHES = [np.float32([[0, 1], [2, 5]]), np.float32([[1, -3]])]
STATS = {"mean": jnp.zeros(3), "var": jnp.ones(3)}


def shifted(by):
    """The parameters with other weights."""
    return {
        "dense": {
            "kernel": PARAMS["dense"]["kernel"] + by * jnp.arange(6.0).reshape(2, 3),
            "bias": jnp.full(3, by, jnp.float32),
        },
        "steps": PARAMS["steps"],
    }


def squares(params):
    return sum(jnp.sum(leaf**2) for leaf in params["dense"].values())


def apply(params, stats, batch):
    """A dense layer with batch norm behind it, as flax keeps its statistics."""
    x = batch @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    new = {"mean": x.mean(0), "var": x.var(0)}
    return jax.tree.map(lambda old, of_batch: 0.9 * old + 0.1 * of_batch, stats, new)


def averaged():
    """An optimizer state that holds an average, and the parameters beside it."""
    tx = optax.chain(optax.sgd(0.1), swa(CONFIG))
    params = {"dense": PARAMS["dense"]}
    state = tx.init(params)
    for _ in range(4):
        updates, state = tx.update(params, state, params)
        params = optax.apply_updates(params, updates)
    return state, params


def test_a_quadratic_is_a_parabola_along_a_line():
    line = loss_line(PARAMS, shifted(2.0), squares)
    ends = [np.concatenate([*map(np.ravel, t["dense"].values())]) for t in (PARAMS, shifted(2.0))]
    t = line.positions
    a, b = ends
    expected = (1 - t) ** 2 * (a @ a) + 2 * t * (1 - t) * (a @ b) + t**2 * (b @ b)
    assert line.values() == pytest.approx(expected, rel=1e-5)
    assert line.length == pytest.approx(np.linalg.norm(a - b))


def test_integers_stay_and_a_measure_is_compiled_once():
    compiled = []

    @jax.jit
    def measure(params):
        compiled.append(params["steps"].dtype)
        return {"loss": squares(params), "steps": params["steps"]}

    measure(PARAMS)
    line = loss_line(PARAMS, shifted(1.0), measure)
    assert len(compiled) == 1
    assert (line.values("steps") == 4).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_measured_in_half_precision(dtype):
    def measure(params):
        assert params["w"].dtype == dtype
        return jnp.float32(params["w"].sum())

    line = loss_line(
        {"w": jnp.ones(1, dtype)}, {"w": jnp.full(1, 1.25, dtype)}, measure, positions=[0.26]
    )  # rounded
    assert line.values()[1] == (1.0625 if dtype == jnp.bfloat16 else 1 + 67 / 1024)


def test_batch_norm_is_recomputed_at_each_place():
    traced, seen = [], []

    def counted(params, stats, batch):
        traced.append(batch.shape)
        return apply(params, stats, batch)

    def measure(params, stats):
        expected = update_bn(lambda s, batch: apply(params, s, batch), STATS, BATCHES)
        for name in ("mean", "var"):
            np.testing.assert_allclose(stats[name], expected[name], rtol=1e-5, atol=1e-6)
        seen.append(tuple(map(float, stats["mean"])))
        return 0.0

    loss_line(
        PARAMS,
        shifted(1.0),
        measure,
        positions=[0.5],
        batch_stats=STATS,
        bn_data=BATCHES,
        apply=counted,
    )
    assert len(set(seen)) == 3
    # Once for each shape of batch, not for each place.
    assert len(traced) <= 2 * len({batch.shape for batch in BATCHES})


def test_statistics_that_are_not_recomputed_are_warned_of():
    def measure(params, stats):
        assert stats is STATS
        return 0.0

    with pytest.warns(SWAWarning, match="look worse") as said:
        loss_rays(PARAMS, measure, batch_stats=STATS, radii=[1], directions=1)
    assert said[0].filename == __file__


def test_overflow_in_batch_norm_is_a_hole():
    far = jax.tree.map(lambda leaf: leaf if leaf.dtype == jnp.int32 else leaf + 3e38, PARAMS)
    line = loss_line(
        PARAMS,
        far,
        lambda params, stats: 1.0,
        positions=[],
        batch_stats=STATS,
        bn_data=BATCHES,
        apply=apply,
    )
    assert line.values()[0] == 1
    assert np.isnan(line.values()[1])


@pytest.mark.parametrize("missing", ["batch_stats", "bn_data", "apply"])
def test_recomputing_batch_norm_takes_three(missing):
    given = {"batch_stats": STATS, "bn_data": BATCHES, "apply": apply}
    del given[missing]
    with pytest.raises(TypeError, match="takes three"):
        loss_line(PARAMS, shifted(1.0), lambda *_: 0.0, **given)


def test_an_iterator_of_batches_is_refused():
    with pytest.raises(TypeError, match="an iterator is empty"):
        loss_line(
            PARAMS,
            shifted(1.0),
            lambda *_: 0.0,
            batch_stats=STATS,
            apply=apply,
            bn_data=iter(BATCHES),
        )


def test_the_plane_through_two_sets_of_parameters_and_the_average():
    state, params = averaged()
    second = {"dense": shifted(1.0)["dense"]}
    first = {"dense": shifted(-0.5)["dense"]}
    first["dense"]["bias"] += jnp.arange(3.0)
    plane = loss_plane(first, second, state, squares, points=2)
    expected = [float(squares(p)) for p in (first, second, averaged_params(state, params))]
    assert plane.at_corners["loss"] == pytest.approx(expected, rel=1e-6)


def test_rays_are_as_long_as_their_radii():
    def moved(params):
        return sum(
            jnp.sum((leaf - PARAMS["dense"][key]) ** 2) for key, leaf in params["dense"].items()
        )

    rays = loss_rays(PARAMS, moved, radii=[1, 2], directions=3)
    assert rays.values() == pytest.approx(np.tile([0, 1, 4], (3, 1)), rel=1e-3, abs=1e-6)
    fixed = loss_rays(
        PARAMS,
        lambda params: params["dense"]["kernel"].sum(),
        fixed=["dense/kernel"],
        radii=[1],
        directions=1,
    )
    assert (fixed.values() == 6).all()


def test_every_form_of_an_average_is_the_same(tmp_path):
    state, params = averaged()
    save_average(tmp_path / "average.safetensors", state, CONFIG)
    average = averaged_params(state, params)
    for given in (
        state,
        average,
        tmp_path / "average.safetensors",
        str(tmp_path / "average.safetensors"),
        load_average(tmp_path / "average.safetensors"),
    ):
        rays = loss_rays(given, squares, params=params, radii=[1], directions=1)
        assert rays.values()[0, 0] == pytest.approx(float(squares(average)), rel=1e-6)
        line = loss_line(params, given, squares, positions=[])
        assert line.values()[1] == pytest.approx(float(squares(average)), rel=1e-6)


def test_what_an_average_is_of_must_be_said():
    state, _ = averaged()
    with pytest.raises(TypeError, match="params="):
        loss_rays(state, squares)


def test_an_average_without_a_snapshot_is_refused():
    params = {"dense": PARAMS["dense"]}
    with pytest.raises(NothingAveragedError):
        loss_line(params, optax.chain(swa(CONFIG)).init(params), squares)


def test_parameters_of_other_networks_are_refused():
    with pytest.raises(StructureError, match="no leaf 'dense/bias'"):
        loss_line(PARAMS, {"dense": {"kernel": jnp.ones((2, 3))}}, squares)
    with pytest.raises(GeometryError, match="are the same"):
        loss_line(PARAMS, PARAMS, squares)
    with pytest.raises(StructureError, match="same path"):
        loss_rays({"a/b": jnp.ones(2), "a": {"b": jnp.ones(2)}}, squares)


def test_a_model_of_nnx_is_to_be_split():
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"nnx\.split"):
        loss_rays(model, squares)
    graph, params = nnx.split(model, nnx.Param)
    x = jnp.ones((4, 2))

    def measure(params):
        return jnp.mean(nnx.merge(graph, params)(x) ** 2)

    rays = loss_rays(params, measure, radii=[1], directions=2)
    assert rays.values()[0, 0] == pytest.approx(float(jnp.mean(model(x) ** 2)), rel=1e-6)
