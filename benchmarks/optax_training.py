"""A training with JAX whose steps are compiled and donated, with any way of averaging in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from optax_contenders import Contender, Tree

LAYERS, BATCH = 4, 8


def network(n_weights: float) -> tuple[Tree, jax.Array]:
    """Parameters of four dense layers without biases, and a batch; the same each time.

    >>> params, x = network(16)
    >>> [w.shape for w in params["layers"]], x.shape
    ([(2, 2), (2, 2), (2, 2), (2, 2)], (8, 2))
    """
    width = round((n_weights / LAYERS) ** 0.5)
    rng = np.random.default_rng(0)
    layers = [rng.normal(0, width**-0.5, (width, width)) for _ in range(LAYERS)]
    x = rng.standard_normal((BATCH, width))
    as_float32 = partial(jnp.asarray, dtype=jnp.float32)
    return {"layers": list(map(as_float32, layers))}, as_float32(x)


def _loss(params: Tree, x: jax.Array) -> jax.Array:
    for w in params["layers"]:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


class Training:
    """One contender's training, which goes on.

    Args:
      contender: who averages.
      inner: the optimizer it has.
      n_weights: how many, about.
      scanned: updates in one compiled call; None for a call of its own for each.
      constant: whether the gradients are ones, so that there is nothing but the update.

    Attributes:
      parameters: those it begins with.
      compile_seconds: what compiling took.
      held: what the averaging adds to what the step is given and gives back [bytes].
      temporary: what the compiled step needs besides [bytes].
    """

    def __init__(
        self,
        contender: Contender,
        inner: optax.GradientTransformation,
        n_weights: float,
        scanned: int | None = None,
        constant: bool = False,
    ) -> None:
        self._contender, self._scanned, self._constant = contender, scanned, constant
        self.parameters, self._x = network(n_weights)
        self._tx = contender.optimizer(inner)
        self._start()
        begin = time.perf_counter()
        step = self._step if scanned is None else self._epoch
        lowered = jax.jit(step, donate_argnums=0).lower(self._carry, self._x)
        self._compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        memory = self._compiled.memory_analysis()
        self.held = memory.argument_size_in_bytes
        if contender.in_loop is not None:
            self.held += sum(
                leaf.nbytes for leaf in jax.tree.leaves(self._in_loop) if hasattr(leaf, "nbytes")
            )
        self.temporary = memory.temp_size_in_bytes

    def _start(self) -> None:
        params = jax.tree.map(partial(jnp.array, copy=True), self.parameters)
        kept = self._contender.init(params)
        self._in_loop = () if self._contender.in_loop is None else kept
        if self._contender.in_loop is not None:
            kept = ()
        self._carry = (params, self._tx.init(params), kept)

    def _step(self, carry: Any, x: jax.Array) -> Any:
        params, opt_state, kept = carry
        if self._constant:
            grads = jax.tree.map(jnp.ones_like, params)
        else:
            grads = jax.grad(_loss)(params, x)
        updates, opt_state = self._tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, self._contender.in_step(kept, params)

    def _epoch(self, carry: Any, x: jax.Array) -> Any:
        def body(carry: Any, _: None) -> tuple[Any, None]:
            return self._step(carry, x), None

        return jax.lax.scan(body, carry, length=self._scanned)[0]

    def update(self) -> None:
        """One update, or as many as are scanned."""
        self._carry = self._compiled(self._carry, self._x)
        if self._contender.in_loop is not None:
            self._in_loop = self._contender.in_loop(self._in_loop, self._carry[0])

    def run(self, calls: int) -> Callable[[], None]:
        """Something that makes so many calls and waits for them."""

        def run() -> None:
            for _ in range(calls):
                self.update()
            jax.block_until_ready((self._carry, self._in_loop))

        return run

    def weights(self) -> npt.NDArray[np.float32]:
        """The first layer's, on the host."""
        return np.array(self._carry[0]["layers"][0])

    def error(self) -> float:
        """How far the average of the first layer is from float64's, relative; a new training.

        Over 12 updates, of which the 1st and the 11th are the snapshots of those who take every
        10th. Not of scanned trainings.
        """
        mix = self._contender.mix
        self._start()
        expected = np.float64(self.weights()) * (not self._contender.from_zero)
        for update in range(1, 13):
            self.update()
            expected += mix(update) * (self.weights() - expected)
        return float(np.linalg.norm(self.average() - expected) / np.linalg.norm(expected))

    def average(self) -> npt.NDArray[np.float32]:
        """That of the first layer, on the host."""
        _, opt_state, kept = self._carry
        kept = kept if self._contender.in_loop is None else self._in_loop
        return np.array(self._contender.average(opt_state, kept)["layers"][0])
