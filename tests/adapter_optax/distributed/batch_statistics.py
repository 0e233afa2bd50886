"""``update_bn`` on batches whose rows lie on several devices."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from adapter_optax.distributed.training import P, mesh_of, whole
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from swa_optax import update_bn

X = np.random.default_rng(3).normal(2, 3, (40, 6)).astype("f4")
BATCHES = (X[:16], X[16:32], X[32:])  # the last one is smaller
KERNEL = np.random.default_rng(4).normal(size=(6, 4)).astype("f4")
WHOLE = P()


class Network(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = jnp.tanh(nn.Dense(4, use_bias=False, name="dense")(x))
        return nn.BatchNorm(use_running_average=False, momentum=0.9, name="norm")(x)


def forward(variables: Any, stats: Any, x: Any) -> Any:
    with jax.numpy_rank_promotion("allow"):  # flax adds its vectors to matrices
        variables = {"params": variables, "batch_stats": stats}
        return Network().apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]


def variables(mesh: Mesh, spec: Any = WHOLE) -> tuple[Any, Any]:
    """Parameters with a kernel of this sharding, and statistics that every device has whole."""
    scale = {"scale": np.ones(4, "f4"), "bias": np.zeros(4, "f4")}
    params = jax.device_put({"norm": scale}, NamedSharding(mesh, P()))
    params["dense"] = {"kernel": jax.device_put(KERNEL, NamedSharding(mesh, spec))}
    stats = {"norm": {"mean": np.zeros(4, "f4"), "var": np.ones(4, "f4")}}
    return params, jax.device_put(stats, NamedSharding(mesh, P()))


def are_those_of_all(stats: Any) -> None:
    hidden = np.tanh(X.astype("f8") @ KERNEL)
    mean, var = (whole(stats["norm"][name]) for name in ("mean", "var"))
    np.testing.assert_allclose(mean, hidden.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(var, hidden.var(0), rtol=1e-5)


def updated(mesh: Mesh, kernel: Any = WHOLE) -> Any:
    params, stats = variables(mesh, kernel)
    rows = NamedSharding(mesh, P("data"))
    batches = [jax.make_array_from_callback(b.shape, rows, b.__getitem__) for b in BATCHES]
    found = update_bn(jax.tree_util.Partial(forward, params), stats, batches)
    for now, before in zip(jax.tree.leaves(found), jax.tree.leaves(stats), strict=True):
        assert now.sharding == before.sharding
        assert now.dtype == before.dtype
    return found


def check_rows_on_eight_devices() -> None:
    are_those_of_all(updated(mesh_of("line")))


def check_rows_and_features_on_a_grid() -> None:
    are_those_of_all(updated(mesh_of("grid"), P(None, "model")))
    with jax.set_mesh(mesh_of("grid")):
        are_those_of_all(updated(mesh_of("grid"), P(None, "model")))


def check_statistics_that_are_sharded_stay_so() -> None:
    params, stats = variables(mesh_of("grid"), P(None, "model"))
    place = NamedSharding(mesh_of("grid"), P("model"))
    stats = jax.device_put(stats, place)
    found = update_bn(jax.tree_util.Partial(forward, params), stats, BATCHES)
    assert all(leaf.sharding == place for leaf in jax.tree.leaves(found))
    are_those_of_all(found)


def check_a_model_of_nnx_stays_where_it_is() -> None:
    mesh = mesh_of("grid")
    model = nnx.Dict(dense=nnx.Linear(6, 4, use_bias=False, rngs=nnx.Rngs(0)))
    model.norm = nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model), NamedSharding(mesh, P())))
    model.dense.kernel.set_value(jax.device_put(KERNEL, NamedSharding(mesh, P(None, "model"))))
    before = jax.tree.map(lambda leaf: leaf.sharding, nnx.to_pure_dict(nnx.state(model)))

    def forward(model: Any, x: Any) -> None:
        with jax.numpy_rank_promotion("allow"):
            model.norm(jnp.tanh(model.dense(x)))

    rows = NamedSharding(mesh, P("data"))
    update_bn(forward, model, [jax.device_put(batch, rows) for batch in BATCHES])
    state = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == before
    are_those_of_all(state)


CHECKS = {
    f"batch_statistics-{name.removeprefix('check_')}": check
    for name, check in list(globals().items())
    if name.startswith("check_")
}
