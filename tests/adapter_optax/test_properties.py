"""On any tree, schedule and rule the adapter is the core, and both are the definition."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import swa_core
from swa_core import EMA, Polynomial, SWAConfig, Uniform
from swa_core.testing.scripts import EXACT_RULES, mixing_weights
from swa_core.trees import by_path
from swa_optax import averaged_params, state_from_dict, state_to_dict, swa
from swa_optax.paths import is_averaged, leaves

UPDATES = 6  # as many snapshots at the most: more of EMA(0.5) are not exact in bfloat16


class Layer(NamedTuple):
    kernel: object
    bias: object


class Leaf:
    """The description of a leaf; no pytree, so that trees of them can be mapped."""

    def __init__(self, shape, dtype):
        self.shape, self.dtype = shape, jnp.dtype(dtype)

    def __repr__(self):
        return f"{self.dtype}{list(self.shape)}"

    def of(self, values):
        values = np.asarray(values)
        return (values * (1 + 1j) if self.dtype.kind == "c" else values).astype(self.dtype)


FLOATS = ["float32", "float16", "bfloat16", "complex64"]
OTHERS = ["int32", "bool", "uint8"]


def trees(floats):
    """Trees of any nesting with at least one leaf that is averaged."""
    shapes = st.sampled_from([(), (0,), (1,), (3,), (2, 1)])
    leaf = st.builds(Leaf, shapes, st.sampled_from(floats))
    anything = leaf | st.builds(Leaf, shapes, st.sampled_from(OTHERS)) | st.none()

    def nested(children):
        keys = st.sampled_from(["a", "b", "kernel", "0", "a.b"])
        return (
            st.dictionaries(keys, children, max_size=3)
            | st.lists(children, max_size=3)
            | st.tuples(children, children)
            | st.builds(Layer, children, children)
        )

    rest = st.recursive(anything, nested, max_leaves=5)
    return st.one_of(
        leaf,
        st.builds(lambda leaf, rest: {"z": leaf, "rest": rest}, leaf, rest),
        st.builds(lambda leaf, rest: [rest, leaf], leaf, rest),
        st.builds(Layer, leaf, rest),
    )


schedules = st.builds(
    lambda start, every, length: (start, every, start + length if length else None),
    st.integers(0, 4),
    st.integers(1, 3),
    st.integers(0, 6),
)


def config(schedule, rule, **rest):
    start, every, stop = schedule
    if stop is not None:
        rest["stop"] = f"{max(stop, start, every)}step"
    return SWAConfig(start=f"{start}step", every=f"{every}step", rule=rule, **rest)


def described(leaf):
    return isinstance(leaf, Leaf)


def mapped(function, *trees):
    return jax.tree.map(function, *trees, is_leaf=described)


def whole_numbers(tree, settings, bad, seed):
    """Weights whose running average is a whole number throughout; NaN at the ``bad`` updates.

    Then every order of rounding gives the same bits (see ``swa_core.testing.scripts``).
    """
    rng = np.random.default_rng(seed)
    schedule, shares = settings.schedule(), mixing_weights(settings.rule)
    average, script = None, []
    sizes = [leaf for leaf in jax.tree.leaves(tree, is_leaf=described) if 0 not in leaf.shape]
    if not any(leaf.dtype.kind in "fcV" for leaf in sizes):
        bad = set()  # there is no place for NaN
    for update in range(1, UPDATES + 1):
        fresh = mapped(lambda leaf: rng.integers(100, 151, leaf.shape), tree)
        if not schedule.is_snapshot(update):
            script.append(mapped(Leaf.of, tree, fresh))
        elif update in bad:
            script.append(mapped(lambda leaf, new: spoiled(leaf.of(new)), tree, fresh))
        elif average is None:
            next(shares)
            average = fresh
            script.append(mapped(Leaf.of, tree, fresh))
        else:
            share = next(shares)
            large, small = share.denominator, share.numerator

            def sign(a, rng=rng, large=large, small=small):
                # The correction may not be larger than the new average.
                return rng.integers(np.where(a - small < large, 0, -1), 2, a.shape)

            signs = jax.tree.map(sign, average)
            weights = jax.tree.map(lambda a, s, n=large: a + s * n, average, signs)
            average = jax.tree.map(lambda a, s, n=small: a + s * n, average, signs)
            script.append(mapped(Leaf.of, tree, weights))
    return script


def spoiled(array):
    if is_averaged(array) and array.size:
        array = array.copy()
        array.flat[0] = np.nan
    return array


def train(settings, script):
    """The state of the adapter after each update, in one compiled scan."""
    tx = swa(settings)

    @jax.jit
    def scan(state, script):
        def body(state, params):
            state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)[1]
            return state, state

        return jax.lax.scan(body, state, script)[1]

    state = tx.init(jax.tree.map(jnp.asarray, script[0]))
    states = scan(state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *script))
    return [jax.tree.map(lambda leaf, n=n: leaf[n], states) for n in range(len(script))]


def train_core(settings, script):
    state, states = swa_core.init(script[0]), []
    for weights in script:
        state = swa_core.update(
            state, weights, settings.schedule(), settings.rule, nonfinite=settings.nonfinite
        )
        states.append(state)
    return states


def named(average):
    return {str(path): np.asarray(leaf) for path, leaf in leaves(average).items()}


@given(st.sampled_from([FLOATS, [*FLOATS, "float64", "complex128"]]), st.data())
@settings(max_examples=12, deadline=None)
def test_the_adapter_is_the_core_bit_for_bit(floats, data):
    tree = data.draw(trees(floats))
    settings = config(data.draw(schedules), data.draw(st.sampled_from(EXACT_RULES)))
    bad = data.draw(st.sets(st.integers(1, UPDATES), max_size=3))
    with jax.enable_x64("float64" in floats):
        script = whole_numbers(tree, settings, bad, seed=data.draw(st.integers(0, 99)))
        theirs = train_core(settings, script)
        ours = train(settings, script)
        for a, b in zip(ours, theirs, strict=True):
            assert tuple(map(int, a[:3])) == b[:3]
            got, wanted = named(a.average), by_path(b.average)
            assert got.keys() == wanted.keys()
            for path, leaf in wanted.items():
                assert (got[path].dtype, got[path].shape) == (leaf.dtype, leaf.shape), path
                assert got[path].tobytes() == leaf.tobytes(), path
        # The structure comes back, with what is not averaged as it was; and so does a save.
        params = jax.tree.map(jnp.asarray, script[-1])
        if theirs[-1].n_averaged:
            read = averaged_params(ours[-1], params)
            assert jax.tree.structure(read) == jax.tree.structure(params)
            for (path, leaf), live in zip(
                leaves(read).items(), jax.tree.leaves(params), strict=True
            ):
                assert leaf.dtype == live.dtype
                if not is_averaged(live):
                    assert leaf is live, path
        fresh = swa(settings).init(params)
        loaded = state_from_dict(state_to_dict(ours[-1]), fresh)
        assert jax.tree.structure(loaded) == jax.tree.structure(fresh)
        for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(ours[-1]), strict=True):
            assert np.asarray(got).tobytes() == np.asarray(wanted).tobytes()


rules = st.one_of(
    st.just(Uniform()),
    st.floats(0.001, 0.99999).map(EMA),
    st.floats(0.01, 1e9).map(lambda n: EMA(half_life=n)),
    st.floats(0, 1e6).map(Polynomial),
)


@given(rules, schedules, st.integers(0, 99))
@settings(max_examples=8, deadline=None)
def test_any_rule_is_the_core_and_the_definition(rule, schedule, seed):
    settings = config(schedule, rule)
    rng = np.random.default_rng(seed)
    script = [{"w": (3 + rng.standard_normal(4)).astype("f4")} for _ in range(UPDATES)]
    ours, theirs = train(settings, script)[-1], train_core(settings, script)[-1]
    assert tuple(map(int, ours[:3])) == theirs[:3]
    np.testing.assert_allclose(ours.average["w"], theirs.average["w"], rtol=1e-6)
    if theirs.n_averaged:
        assert float(ours.total) == pytest.approx(theirs.total, rel=2e-6)
        taken = [script[t - 1]["w"] for t in settings.schedule().snapshots(UPDATES)]
        shares = exact_shares(rule, len(taken))
        mean = [
            float(
                sum(share * Fraction(float(w[i])) for share, w in zip(shares, taken, strict=True))
            )
            for i in range(4)
        ]
        np.testing.assert_allclose(ours.average["w"], mean, rtol=1e-6)


def exact_shares(rule, n):
    """The weights of n snapshots as fractions of sum 1, by definition."""
    if isinstance(rule, EMA):
        decay = Fraction(rule.decay if rule.decay is not None else 0.5 ** (1 / rule.half_life))
        weights = [decay ** (n - k) for k in range(1, n + 1)]
    elif isinstance(rule, Polynomial):
        weights = [Fraction(1)]
        for k in range(1, n):
            weights.append(weights[-1] * (k + Fraction(rule.eta)) / k)
    else:
        weights = [Fraction(1)] * n
    return [weight / sum(weights) for weight in weights]


@given(schedules, st.sets(st.integers(1, UPDATES)), st.sampled_from(["skip", "keep"]))
@settings(max_examples=6, deadline=None)
def test_any_pattern_of_bad_snapshots_is_counted_as_the_core_counts(schedule, bad, nonfinite):
    settings = config(schedule, Uniform(), nonfinite=nonfinite)
    script = [
        {"w": np.float32([update, np.inf if update in bad else 1]), "v": np.float32(update)}
        for update in range(1, UPDATES + 1)
    ]
    for a, b in zip(train(settings, script), train_core(settings, script), strict=True):
        assert tuple(map(int, a[:3])) == b[:3]
        np.testing.assert_allclose(a.average["v"], b.average["v"], rtol=1e-6)
        np.testing.assert_allclose(a.average["w"], b.average["w"], rtol=1e-6)


@given(trees(FLOATS), st.integers(0, 99))
@settings(max_examples=6, deadline=None)
def test_any_tree_in_a_chain_is_the_mean_of_what_was_stored(tree, seed):
    # Through a real optimizer: what has no gradient has no update.
    rng = np.random.default_rng(seed)
    params = mapped(lambda leaf: jnp.asarray(leaf.of(rng.integers(100, 151, leaf.shape))), tree)
    trained = jax.tree.map(is_averaged, params)
    optimizer = optax.chain(optax.scale(-1.0), swa(config((1, 1, None), Uniform())))
    tx = optax.partition({True: optimizer, False: optax.set_to_zero()}, trained)
    state, before = tx.init(params), params
    for change in (0, 1, 1, 2):
        grads = jax.tree.map(lambda leaf, c=change: jnp.full_like(leaf, c), params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    read = averaged_params(state, params)
    # 0, 1, 2 and 4 below the beginning.
    for path, leaf in leaves(read).items():
        live = leaves(before)[path]
        off = 1.75 if is_averaged(live) else 0
        expected = (np.asarray(live).astype("c16" if live.dtype == "c8" else "f8") - off).astype(
            live.dtype
        )
        np.testing.assert_array_equal(np.asarray(leaf), expected, err_msg=str(path))
