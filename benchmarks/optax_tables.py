"""The tables: train steps, scanned ones, a snapshot alone, and an update that is none."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax_contenders import (
    CONTENDERS,
    EVERY,
    NEVER,
    PLAIN,
    Contender,
    carried_along,
    of_none,
    ours,
)
from optax_snapshots import CEILING, Weights, c_loop
from optax_snapshots import CONTENDERS as ALONE
from optax_training import Training
from timing import Table, interleaved

# Of averages in float32, after some 25 snapshots of weights that differ by a factor of 2.
TOLERANCE = 1e-6
SCANNED = 50
CALLS = 100
Optimizer = Callable[[], optax.GradientTransformation]
OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": lambda: optax.sgd(1e-3),
    "Adam": lambda: optax.adam(1e-3),
}


@dataclass
class Bench:
    """How to measure.

    Attributes:
      rounds: rounds that count.
      tiny: whether all is small: it shows that everything runs, and no figures.
      absent: who cannot run here, and why.
    """

    rounds: int
    tiny: bool
    absent: Mapping[str, str]

    def cool(self) -> Callable[[], object]:
        """Something that empties the caches, on one thread."""
        scratch = np.zeros((1 if self.tiny else 128) << 18, np.float32)
        return lambda: np.add(scratch, 1, out=scratch)

    def ceiling(self, n_weights: int, calls: int) -> dict[str, Callable[[], None]]:
        """The C loop on so many weights, if there is a compiler."""
        if CEILING in self.absent:
            return {}
        lerp = c_loop(Weights(1, n_weights, "float32")).update

        def run() -> None:
            for _ in range(calls):
                lerp()

        return {CEILING: run}


def steps(bench: Bench, optimizer: str, n_weights: float, *, constant: bool = False) -> Table:
    """A train step with and without averaging, each in a compiled call.

    With constant gradients it is the update alone.
    """
    running = {
        who.name: Training(who, OPTIMIZERS[optimizer](), n_weights, constant=constant)
        for who in CONTENDERS
    }
    size = sum(w.size for w in jax.tree.leaves(running[PLAIN].parameters))
    runs = {name: each.run(EVERY) for name, each in running.items()}
    times = interleaved(bench.ceiling(size, EVERY) | runs, bench.rounds)
    _expect_the_same_training(running)
    errors = {}
    for who in CONTENDERS:
        if who.mix is not of_none:
            errors[who.name] = running[who.name].error()
            error = errors[who.name]
            assert error < TOLERANCE, f"{who.name}: the average is off by {error:.1e}"
    what = "An update by constant gradients" if constant else "A train step"
    title = f"{what}: {optimizer}, {size / 1e6:.1f} M float32 weights"
    kind = "constant gradients" if constant else "training"
    about = {"kind": kind, "of": f"{optimizer}, {size / 1e6:.1f} M"}
    out = Table(title, times, PLAIN, EVERY, absent=bench.absent, about=about)
    medians = out.medians()
    more = {name: medians[name] - medians[PLAIN] for name in running if name != PLAIN}
    out.column("fastest", out.fastest(), "{:.2f}")
    out.column("ms more", {name: 1e3 * seconds for name, seconds in more.items()}, "{:.3f}")
    if CEILING in times:
        of_c = {name: seconds / medians[CEILING] for name, seconds in more.items()}
        out.column("of C", of_c, "{:.2f}")
    _add_memory(out, running, 4 * size)
    out.column("error", errors, "{:.0e}")
    return out


def scans(bench: Bench, optimizer: str, n_weights: float, *, constant: bool = False) -> Table:
    """A scan of train steps in one compiled call."""
    inside = [who for who in CONTENDERS if who.in_loop is None]
    running = {
        who.name: Training(who, OPTIMIZERS[optimizer](), n_weights, SCANNED, constant)
        for who in inside
    }
    times = interleaved({name: each.run(1) for name, each in running.items()}, bench.rounds)
    _expect_the_same_training(running)
    _expect_the_same_averages(inside, running)
    size = sum(w.size for w in jax.tree.leaves(running[PLAIN].parameters))
    what = "An update by constant gradients" if constant else "A train step"
    title = f"{what} in a scan of {SCANNED}: {optimizer}, {size / 1e6:.1f} M float32 weights"
    kind = "scanned constant gradients" if constant else "scanned training"
    about = {"kind": kind, "of": f"{optimizer}, {size / 1e6:.1f} M"}
    out = Table(title, times, PLAIN, SCANNED, about=about)
    medians = out.medians()
    out.column("fastest", out.fastest(), "{:.2f}")
    more = {n: 1e3 * (s - medians[PLAIN]) for n, s in medians.items() if n != PLAIN}
    out.column("ms more", more, "{:.3f}")
    _add_memory(out, running, 4 * size)
    return out


def snapshots(bench: Bench, count: int, n_weights: float, dtype: str) -> Table:
    """A snapshot alone, by everybody, in ratios to C."""
    weights = Weights(count, 8 if bench.tiny else round(n_weights / count), dtype)
    absent = {who.name: why for who in ALONE if (why := who.missing(dtype)) is not None}
    absent |= {name: why for name, why in bench.absent.items() if name == CEILING}
    here = [who for who in ALONE if who.name not in absent]
    running = {who.name: who.build(weights) for who in here}
    compiling = {}
    weights.move()
    for who in here:
        begin = time.perf_counter()
        running[who.name].update()
        compiling[who.name] = time.perf_counter() - begin
    times = interleaved(
        {name: each.update for name, each in running.items()},
        bench.rounds,
        before_round=weights.move,
        before_each=bench.cool(),
    )
    errors = {}
    for who in here:
        if who.name == CEILING:  # whose weights do not move
            continue
        errors[who.name] = weights.error(running[who.name].averages(), who.mix)
        error = errors[who.name]
        assert error < TOLERANCE, f"{who.name}: the average is off by {error:.1e}"
    size = sum(array.size for array in weights.arrays)
    title = f"A snapshot alone: {count} tensors, {size / 1e6:.1f} M {dtype} weights"
    about = {"kind": "snapshot", "of": f"{count} tensors, {dtype}"}
    out = Table(title, times, CEILING if CEILING in times else None, absent=absent, about=about)
    out.column("fastest", out.fastest(), "{:.2f}")
    traffic = {who.name: 8 * size + weights.n_bytes * (who.passes - 2) for who in here}
    speed = {name: traffic[name] / seconds / 1e9 for name, seconds in out.medians().items()}
    out.column("GB/s", speed, "{:.1f}")
    if CEILING in speed:
        bound = {name: speed[CEILING] / value for name, value in speed.items()}
        out.column("of bound", bound, "{:.2f}")
    out.column("error", errors, "{:.0e}")
    compiling.pop(CEILING, None)
    out.column("compile s", compiling, "{:.1f}")
    return out


def skipped_updates(bench: Bench, count: int) -> Table:
    """A compiled step that does nearly nothing, and an average that is not due."""
    weights = [jnp.ones(8) for _ in range(count)]
    grads = [jnp.zeros(8) for _ in range(count)]
    # What arrays cost that a compiled function is given and gives back is JAX' own.
    contenders = [CONTENDERS[0], carried_along(), ours(NEVER, "keep"), ours(NEVER, "skip")]

    def repeat(who: Contender) -> Callable[[], None]:
        tx = who.optimizer(optax.sgd(0.0))

        def step(carry: Any, grads: Any) -> Any:
            params, state, kept = carry
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, kept

        compiled = jax.jit(step, donate_argnums=0)
        params = [jnp.array(w, copy=True) for w in weights]
        held = [(params, tx.init(params), who.init(params))]

        def run() -> None:
            for _ in range(CALLS):
                held[0] = compiled(held[0], grads)
            jax.block_until_ready(held[0])

        return run

    times = interleaved({who.name: repeat(who) for who in contenders}, bench.rounds)
    title = f"An update that is no snapshot: {count} tensors of 8 weights, SGD"
    about = {"kind": "skipped", "of": f"{count} tensors"}
    out = Table(title, times, PLAIN, CALLS, about=about)
    least = {name: min(seconds) / CALLS for name, seconds in times.items()}
    more = {name: 1e6 * (seconds - least[PLAIN]) for name, seconds in least.items()}
    out.column("fastest", out.fastest(), "{:.2f}")
    out.column("us more", more, "{:.1f}")
    return out


def _add_memory(out: Table, running: Mapping[str, Training], copy: int) -> None:
    """What averaging adds to arguments and temporaries, in copies of the weights, and compiling."""
    plain = running[PLAIN]
    held = {name: (each.held - plain.held) / copy for name, each in running.items()}
    more = {name: (each.temporary - plain.temporary) / copy for name, each in running.items()}
    out.column("holds", held, "{:.2f}")
    out.column("+ temp", more, "{:.2f}")
    out.column("compile s", {n: each.compile_seconds for n, each in running.items()}, "{:.1f}")


def _expect_the_same_training(running: Mapping[str, Training]) -> None:
    plain = running[PLAIN].weights()
    for name, each in running.items():
        if name.startswith("swa_optax"):
            assert np.array_equal(each.weights(), plain), f"{name} changed the training"
        assert np.allclose(each.weights(), plain, rtol=1e-3, atol=1e-4), f"{name} trains otherwise"


def _expect_the_same_averages(inside: list[Contender], running: Mapping[str, Training]) -> None:
    """Of scanned trainings: those of one rule have one average."""
    of_rules: dict[Any, tuple[str, Any]] = {}
    for who in inside:
        if who.mix is of_none:
            continue
        average = running[who.name].average()
        first, expected = of_rules.setdefault((who.mix, who.from_zero), (who.name, average))
        assert np.allclose(average, expected, rtol=1e-4, atol=1e-6), f"{who.name} is not {first}"
