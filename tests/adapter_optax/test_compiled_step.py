"""What XLA makes of an averaged, donated training: the program is read, not timed."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from adapter_optax.program import Program

from swa_core import SWAConfig
from swa_optax import n_averaged, n_skipped, swa

# optax' Adam promotes its counter.
pytestmark = pytest.mark.usefixtures("relaxed_jax")

SIZE = 256
WHOLE = f"f32[{SIZE},{SIZE}]"  # of every weight, and nothing else in these trainings
OPTIMIZERS = {"sgd": optax.sgd(0.1), "adam": optax.adam(0.1)}
BESIDES = 4096  # bytes: counters

every_training = pytest.mark.parametrize("scanned", [False, True], ids=["step", "scan"])
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)
every_schedule = pytest.mark.parametrize("every", [1, 9])
both_ways = pytest.mark.parametrize("nonfinite", ["keep", "skip"])


def step(tx):
    def step(params, state, x):
        grads = jax.grad(lambda p: jnp.square(jnp.tanh(x @ p["w"]) @ p["v"]).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def epoch(tx):
    def epoch(params, state, xs):
        def body(carry, x):
            return step(tx)(*carry, x), None

        return jax.lax.scan(body, (params, state), xs)[0]

    return epoch


def start(tx):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((2, SIZE, SIZE)) / SIZE
    params = dict(zip("vw", jnp.asarray(weights, jnp.float32), strict=True))
    return params, tx.init(params)


def averaging(optimizer, every, nonfinite):
    config = SWAConfig(start=f"{every}step", every=f"{every}step", nonfinite=nonfinite)
    return optax.chain(OPTIMIZERS[optimizer], swa(config))


@cache
def compiled(scanned, optimizer, *arguments):
    """The donated step, or five in a scan, and its program; averaged if there are arguments."""
    tx = averaging(optimizer, *arguments) if arguments else OPTIMIZERS[optimizer]
    training, inputs = (epoch, (5, 2, SIZE)) if scanned else (step, (2, SIZE))
    lowered = jax.jit(training(tx), donate_argnums=(0, 1)).lower(*start(tx), jnp.ones(inputs))
    done = lowered.compile()
    return done, Program(done.as_text())


@every_training
@every_optimizer
@every_schedule
@both_ways
def test_it_needs_the_average_and_nothing_besides(scanned, optimizer, every, nonfinite):
    before = compiled(scanned, optimizer)[0].memory_analysis()
    after = compiled(scanned, optimizer, every, nonfinite)[0].memory_analysis()
    average = 2 * 4 * SIZE * SIZE
    assert after.temp_size_in_bytes - before.temp_size_in_bytes < BESIDES
    for what in ("argument", "output", "alias"):
        more = getattr(after, f"{what}_size_in_bytes") - getattr(before, f"{what}_size_in_bytes")
        assert average <= more < average + BESIDES, what


@every_training
@every_optimizer
@every_schedule
@both_ways
def test_nothing_of_the_size_of_the_average_is_copied(scanned, optimizer, every, nonfinite):
    def copies(program):
        return sum(
            line.operation.startswith("copy") and WHOLE in line.shape for line in program.all()
        )

    _, plain = compiled(scanned, optimizer)
    _, program = compiled(scanned, optimizer, every, nonfinite)
    assert copies(program) <= copies(plain)


@both_ways
def test_an_update_by_constants_needs_no_second_copy_of_the_weights(nonfinite):
    # XLA on the CPU makes one where the average is mixed without a condition.
    def program(tx):
        def update(params, state):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
            return optax.apply_updates(params, updates), state

        done = jax.jit(update, donate_argnums=(0, 1)).lower(*start(tx)).compile()
        copies = [line for line in Program(done.as_text()).all() if line.operation == "copy"]
        return done.memory_analysis().temp_size_in_bytes, [c for c in copies if c.shape == WHOLE]

    temporary, copies = program(averaging("sgd", 1, nonfinite))
    assert temporary < BESIDES
    assert not copies


@every_training
@every_optimizer
@both_ways
def test_the_average_moves_under_a_condition_alone(scanned, optimizer, nonfinite):
    _, program = compiled(scanned, optimizer, 9, nonfinite)
    conditions = [line.shape for line in program.all() if line.operation == "conditional"]
    average = f"({WHOLE}, {WHOLE})"
    # Whether there is NaN is asked under a condition too, and its second look under another.
    assert conditions.count(average) == 1
    assert len(conditions) == (1 if nonfinite == "keep" else 3)
    inside = program.under_conditions()
    outside = [line for line in program.all(inside) if line.operation == "select"]
    assert not [line for line in outside if WHOLE in line.shape]
    # The first snapshot is selected, in the branch that is taken.
    assert [line for line in program.all() if line.operation == "select" and WHOLE in line.shape]


@every_training
@every_optimizer
def test_the_weights_are_looked_at_for_nan_under_the_condition_alone(scanned, optimizer):
    def reductions(program, leaving_out=frozenset()):
        return [
            line
            for line in program.all(leaving_out)
            if line.operation.startswith("reduce") and WHOLE in line.operands
        ]

    _, plain = compiled(scanned, optimizer)
    _, keeping = compiled(scanned, optimizer, 9, "keep")
    _, skipping = compiled(scanned, optimizer, 9, "skip")
    assert not reductions(plain)
    assert not reductions(keeping)
    # Two leaves: their sums, and the second look at each.
    assert len(reductions(skipping)) == 4
    assert not reductions(skipping, skipping.under_conditions())


@every_training
@every_optimizer
@every_schedule
@both_ways
def test_every_leaf_of_the_average_is_donated(scanned, optimizer, every, nonfinite):
    _, program = compiled(scanned, optimizer, every, nonfinite)
    given = start(averaging(optimizer, every, nonfinite))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(given)]
    averages = {number for number, path in enumerate(paths) if ".average" in path}
    assert len(averages) == 2
    assert averages <= program.donated()
    assert program.donated() == set(range(len(paths)))  # and everything else


@every_training
@every_optimizer
@both_ways
def test_nothing_leaves_the_device_or_calls_back(scanned, optimizer, nonfinite):
    def foreign(program):
        names = {"custom-call", "outfeed", "infeed", "send", "recv", "all-reduce", "all-gather"}
        return [line.operation for line in program.all() if line.operation in names]

    _, plain = compiled(scanned, optimizer)
    _, program = compiled(scanned, optimizer, 9, nonfinite)
    assert foreign(program) == foreign(plain)


def test_one_compilation_for_updates_that_are_none_snapshots_and_ones_left_out():
    tx = averaging("adam", 2, "skip")
    training = jax.jit(step(tx), donate_argnums=(0, 1))
    params, state = start(tx)
    for update in range(1, 7):
        if update == 5:
            params = jax.tree.map(lambda w: w.at[0, 0].set(jnp.nan), params)
        params, state = training(params, state, jnp.ones((2, SIZE)))
    assert (n_averaged(state[1]), n_skipped(state[1])) == (2, 1)
    assert training._cache_size() == 1
