from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections import OrderedDict, defaultdict
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_core import EMA, Polynomial, Schedule, StructureError, SWAState, Uniform, init, update

ALWAYS = Schedule(1, 1)
RULES = (Uniform(), EMA(0.9), EMA(0.9999), EMA(half_life=50), Polynomial(eta=3), Polynomial(0.5))


class Layer(NamedTuple):
    kernel: object
    bias: object


def run(script, rule=Uniform(), schedule=ALWAYS, **options):  # noqa: B008 - a frozen value
    script = iter(script)
    state = init(next(script))
    for weights in script:
        state = update(state, weights, schedule, rule, **options)
    return state


def vectors(values, dtype=np.float32):
    return [{"w": np.asarray(value, dtype)} for value in values]


def shares(rule, n):
    """The weights of n snapshots, of sum 1, from the mixing weights."""
    found, rest = np.empty(n), 1.0
    for k in range(n, 0, -1):
        share = rule.mixing_weight(float(k))
        found[k - 1] = share * rest
        rest *= 1 - share
    return found


# The mean


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("schedule", [ALWAYS, Schedule(10, 4), Schedule(0, 3, 20)], ids=repr)
def test_is_the_weighted_mean_of_the_snapshots(rule, schedule):
    rng = np.random.default_rng(0)
    script = [{"w": rng.standard_normal((3, 2))} for _ in range(41)]
    state = run(script, rule, schedule)
    taken = list(schedule.snapshots(40))
    snapshots = np.stack([script[update]["w"] for update in taken])
    mean = np.tensordot(shares(rule, len(taken)), snapshots, 1)
    np.testing.assert_allclose(state.average["w"], mean, rtol=1e-13)
    assert (state.updates, state.n_averaged, state.n_skipped) == (40, len(taken), 0)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_stays_precise_over_ten_thousand_snapshots(rule):
    rng = np.random.default_rng(1)
    state, n = init({"w": np.zeros(64, np.float32)}), 10_000
    mean, weights = np.zeros(64), shares(rule, n)
    for k in range(n):
        new = (5 + 0.001 * k + rng.standard_normal(64)).astype(np.float32)
        state = update(state, {"w": new}, ALWAYS, rule)
        mean += weights[k] * new
    assert state.average["w"].dtype == np.float32
    assert np.linalg.norm(state.average["w"] - mean) <= 2e-6 * np.linalg.norm(mean)
    assert state.total == pytest.approx(1 / rule.mixing_weight(float(n)), rel=1e-9)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=30), st.sampled_from(RULES))
def test_lies_between_the_snapshots(values, rule):
    average = run(vectors([0, *values]), rule).average["w"]
    slack = 1e-6 * max(map(abs, values))
    assert min(values) - slack <= average <= max(values) + slack


def test_is_exact_where_the_arithmetic_is():
    assert run(vectors([0, 2, 4, 9])).average["w"] == 5
    assert run(vectors([0, 6, 3]), EMA(0.5)).average["w"] == 4
    assert run(vectors([0, 9, 3]), Polynomial(eta=1)).average["w"] == 5


def test_the_first_snapshot_is_a_copy_to_the_bit():
    awkward = np.float32([-0.0, 0.0, 1 / 3, 1e-45, -3.4e38, 16777217])
    state = run([{"w": np.full(6, 3e38, np.float32)}, {"w": awkward}])
    assert state.average["w"].tobytes() == awkward.tobytes()
    assert state.total == 1


def test_before_the_first_snapshot_it_holds_the_initial_weights():
    state = run(vectors([1, 2, 3]), schedule=Schedule(10, 1))
    assert (state.updates, state.n_averaged, state.total) == (2, 0, 0)
    assert state.average["w"] == 1


def test_an_update_that_is_no_snapshot_does_not_look_at_the_weights():
    state = update(init({"w": np.ones(2)}), "not even a tree of arrays", Schedule(2, 1), Uniform())
    assert state.updates == 1


# Purity


@pytest.mark.parametrize("n_before", [0, 1, 2])
def test_is_pure(n_before):
    rng = np.random.default_rng(2)
    script = [{"a": rng.standard_normal(4), "b": [np.float32(k), np.int64(k)]} for k in range(9)]
    state = run(script[: n_before + 1])
    weights = script[n_before + 1]
    before, kept = pickle.dumps((state, weights)), copy.deepcopy(state)
    for array in (state.average["a"], weights["a"]):
        array.flags.writeable = False
    new = update(state, weights, ALWAYS, EMA(0.9))
    for array in (state.average["a"], weights["a"]):
        array.flags.writeable = True
    assert pickle.dumps((state, weights)) == before
    assert not np.shares_memory(new.average["a"], weights["a"])
    assert not np.shares_memory(new.average["a"], state.average["a"])
    weights["a"][:] = 777
    new.average["a"][:] = 555
    np.testing.assert_array_equal(state.average["a"], kept.average["a"])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_init_and_the_first_snapshot_copy(dtype):
    weights = {"w": np.ones(3, dtype)}
    state = init(weights)
    assert not np.shares_memory(state.average["w"], weights["w"])
    state = update(state, weights, ALWAYS, Uniform())
    assert not np.shares_memory(state.average["w"], weights["w"])
    weights["w"][:] = 9
    assert state.average["w"].tolist() == [1, 1, 1]


def test_the_same_state_twice_gives_the_same_twice():
    state = run(vectors([1, 2, 4]))
    again = [update(state, {"w": np.float32(9)}, ALWAYS, Uniform()) for _ in range(2)]
    assert again[0] == again[1]


# Trees


@pytest.mark.parametrize(
    "wrap",
    [
        lambda leaf: leaf,
        lambda leaf: {"w": leaf},
        lambda leaf: [leaf, {"b": (leaf, None)}],
        lambda leaf: Layer(leaf, None),
        lambda leaf: (Layer({"deep": [leaf]}, leaf),),
        lambda leaf: OrderedDict(z=leaf, a=leaf),
        lambda leaf: {1: leaf, ("a", 2): leaf},
        lambda leaf: defaultdict(list, {"w": leaf}),
        lambda leaf: {"empty": {}, "none": None, "list": [], "w": leaf},
    ],
)
def test_any_nesting_keeps_its_structure(wrap):
    state = run([wrap(np.float32([value])) for value in (0, 2, 4)])
    expected = wrap(np.float32([3]))
    assert repr(state.average) == repr(expected)
    assert type(state.average) is type(expected)


@pytest.mark.parametrize("tree", [{}, [], (), None, {"a": {"b": []}}])
def test_an_empty_tree_is_averaged_like_any(tree):
    state = run([tree, tree, tree])
    assert state.average == tree
    assert state.n_averaged == 2


def test_the_order_of_a_mapping_does_not_matter():
    a, b = np.float32([1]), np.float32([2])
    state = run([{"a": a, "b": b}, {"b": b, "a": a}, {"b": b * 3, "a": a * 3}])
    assert state.average == {"a": 2, "b": 4}


@pytest.mark.parametrize("tree", [{"a/b": 1.0, "a": {"b": 2.0}}, [{1: 1.0, "1": 2.0}]])
def test_paths_that_meet_are_refused(tree):
    with pytest.raises(StructureError, match=r"two leaves have the path '(a/b|0/1)'"):
        init(tree)


def test_a_slash_in_a_key_is_no_harm_by_itself():
    state = run([{"a/b": np.float32(k), "a": {"c": np.float32(2 * k)}} for k in (0, 1, 3)])
    assert state.average == {"a/b": 2, "a": {"c": 4}}


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (np.float16, np.float32),
        (ml_dtypes.bfloat16, np.float32),
        (ml_dtypes.float8_e4m3fn, np.float32),
        (ml_dtypes.float8_e5m2, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float64),
        (np.longdouble, np.longdouble),
        (np.complex64, np.complex64),
        (np.complex128, np.complex128),
        (np.dtype(">f4"), np.float32),
    ],
)
@pytest.mark.parametrize("shape", [(2,), (), (0,), (2, 1, 2)])
def test_the_average_is_float32_or_wider(dtype, kept, shape):
    script = [{"w": np.full(shape, value).astype(dtype)} for value in (7, 1, 2)]
    states = [init(script[0])]
    for weights in script[1:]:
        states.append(update(states[-1], weights, ALWAYS, Uniform()))
    for state in states:
        leaf = state.average["w"]
        assert type(leaf) is np.ndarray
        assert leaf.dtype == kept
        assert leaf.shape == shape
    assert (states[-1].average["w"] == 1.5).all()


def test_half_precision_is_averaged_beyond_its_own_precision():
    # 1000 snapshots of 1 and 1 + 2^-10: in float16 the running mean would not move.
    script = [{"w": np.float16([1 + (k % 2) * 2**-10])} for k in range(1001)]
    assert run(script).average["w"] == pytest.approx(1 + 2**-11, rel=1e-6)


def test_float16_sums_do_not_overflow():
    assert run([{"w": np.float16([60000])}] * 6).average["w"] == np.float16(60000)


def test_complex_weights_average_both_parts():
    assert run(vectors([0, 1 + 2j, 3 - 6j], np.complex64)).average["w"] == 2 - 2j


def test_integers_and_booleans_are_kept_out():
    def weights(value):
        return {
            "w": np.float32([value]),
            "steps": np.int32(value),
            "mask": np.array([True]),
            "key": np.uint32([value, 2]),
            "small": np.zeros(2, ml_dtypes.int4),
            "python": value,
        }

    state = run([weights(value) for value in (0, 2, 4)])
    assert state.average == {
        "w": 3, "steps": None, "mask": None, "key": None, "small": None, "python": None
    }  # fmt: skip


def test_python_floats_are_weights_too():
    assert run([{"w": 0.0}, {"w": 1.0}, {"w": 2.0}]).average["w"] == 1.5


# NaN and Inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype",
    [np.float16, np.float32, np.float64, np.complex64, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2],
)
def test_a_nonfinite_snapshot_is_left_out_and_counted(bad, dtype):
    state = run([{"a": np.ones(2, dtype), "b": np.ones(2)}] * 3)
    spoilt = {"a": np.array([1, bad]).astype(dtype), "b": np.full(2, 9.0)}
    after = update(state, spoilt, ALWAYS, Uniform())
    assert after == state._replace(n_updates=3, n_skipped=1)
    following = update(after, {"a": np.full(2, 4, dtype), "b": np.full(2, 4.0)}, ALWAYS, Uniform())
    assert following.average["b"].tolist() == [2, 2]  # the mean of 1, 1 and 4
    assert (following.n_averaged, following.n_skipped) == (3, 1)


def test_a_nonfinite_first_snapshot_leaves_the_next_one_first():
    state = run(vectors([1, math.nan, 5]))
    assert (state.n_averaged, state.n_skipped, state.total) == (1, 1, 1)
    assert state.average["w"] == 5


def test_nan_between_snapshots_is_no_matter():
    state = run(vectors([1, math.nan, 2, math.nan, 4]), schedule=Schedule(2, 2))
    assert (state.n_averaged, state.n_skipped) == (2, 0)
    assert state.average["w"] == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_keep_does_not_look(bad):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = run(vectors([[1, 1], [2, bad], [4, bad], [6, 3]]), nonfinite="keep")
    assert (state.n_averaged, state.n_skipped) == (3, 0)
    assert state.average["w"][0] == 4
    assert not np.isfinite(state.average["w"][1])


@pytest.mark.parametrize("bad", ["drop", None, True])
def test_another_word_for_nonfinite_is_refused(bad):
    with pytest.raises(ValueError, match='nonfinite must be "skip" or "keep", got'):
        update(init({}), {}, ALWAYS, Uniform(), nonfinite=bad)


# Errors


HELD = {"dense": {"kernel": np.ones((2, 3), np.float32), "bias": [np.ones(3)]}, "n": np.int32(1)}


def changed(**leaves):
    dense = {"kernel": HELD["dense"]["kernel"], "bias": HELD["dense"]["bias"]}
    weights = {"dense": dense, "n": HELD["n"]}
    for name, leaf in leaves.items():
        place = dense if name in dense else weights
        if leaf is None:
            del place[name]
        else:
            place[name] = leaf
    return weights


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (changed(kernel=None), "leaf 'dense/kernel' is missing."),
        (changed(bias=[]), "leaf 'dense/bias/0' is missing."),
        (changed(bias=[np.ones(3), np.ones(3)]), "leaf 'dense/bias/1' of dtype float64 is not in"),
        (changed(head=np.ones(3, np.float32)), "leaf 'head' of dtype float32 is not in"),
        (
            changed(kernel=np.ones((3, 2), np.float32)),
            "leaf 'dense/kernel' has shape (3, 2), but the running average holds (2, 3).",
        ),
        (
            changed(kernel=np.ones((1, 3), np.float32)),
            "leaf 'dense/kernel' has shape (1, 3), but the running average holds (2, 3).",
        ),
        (
            changed(kernel=np.ones((2, 3), np.float64)),
            "leaf 'dense/kernel' has dtype float64, but the running average holds float32.",
        ),
        (
            changed(kernel=np.ones((2, 3), np.int32)),
            "leaf 'dense/kernel' has dtype int32, but the running average holds float32.",
        ),
        (
            changed(kernel=np.ones((2, 3), np.complex64)),
            "leaf 'dense/kernel' has dtype complex64, but the running average holds float32.",
        ),
        (changed(bias=["oops"]), "leaf 'dense/bias/0' has shape (), but the running average holds"),
        (
            changed(n=np.float32(1)),
            "leaf 'n' of dtype float32 is not in the running average; it is",
        ),
        ({}, "leaf 'dense/kernel' is missing."),
        (None, "leaf 'dense/kernel' is missing."),
        (np.ones(3), "leaf 'dense/kernel' is missing."),
    ],
)
def test_changed_weights_are_refused_with_the_path(weights, message):
    state = run([HELD] * 8, schedule=Schedule(3, 1))
    before = pickle.dumps(state)
    with pytest.raises(StructureError) as caught:
        update(state, weights, Schedule(3, 1), Uniform())
    assert str(caught.value).startswith(f"cannot add snapshot 6 at update 8: {message}")
    assert str(caught.value).endswith(
        "\nHint: every snapshot needs the same weights. If the model changed on purpose, start a "
        "new average."
    )
    assert pickle.dumps(state) == before


def test_the_first_snapshot_is_held_against_the_initial_weights():
    with pytest.raises(StructureError, match="cannot add snapshot 1 at update 1: leaf 'w' has sha"):
        run([{"w": np.ones(2)}, {"w": np.ones(3)}])


def test_new_integers_beside_the_weights_are_no_change():
    state = run([{"w": np.ones(2), "n": np.int32(1)}, {"w": np.ones(2)}])
    state = update(state, {"w": np.ones(2), "m": np.int32(1)}, ALWAYS, Uniform())
    assert state.n_averaged == 2


# The state as a value


def equal(a, b):
    return a[:4] == b[:4] and all(
        np.array_equal(x, y) and x.dtype == y.dtype
        for x, y in zip(a.average["layers"], b.average["layers"], strict=True)
    )


@pytest.fixture
def state():
    return run([{"layers": Layer(np.float32([k, 1]), np.float64(k)), "n": 3} for k in range(5)])


@pytest.mark.parametrize(
    "clone",
    [
        copy.copy,
        copy.deepcopy,
        *(
            lambda s, p=p: pickle.loads(pickle.dumps(s, p))
            for p in range(pickle.HIGHEST_PROTOCOL + 1)
        ),
    ],
)
def test_copies_and_pickles(state, clone):
    cloned = clone(state)
    assert type(cloned) is SWAState
    assert equal(cloned, state)
    weights = {"layers": Layer(np.float32([9, 9]), np.float64(9)), "n": 3}
    assert equal(
        update(cloned, weights, ALWAYS, EMA(0.9)), update(state, weights, ALWAYS, EMA(0.9))
    )


def test_is_a_jax_pytree(jax_strict, state):
    mapped = jax_strict.tree.map(lambda leaf: leaf, state)
    assert type(mapped) is SWAState
    assert equal(mapped, state)
    flat, structure = jax_strict.tree.flatten(state)
    assert equal(structure.unflatten(flat), state)
    assert len(flat) == 6  # four counters and two leaves; what is not averaged is none
    doubled = jax_strict.tree.map(lambda leaf: leaf * 2, state)
    assert doubled.n_averaged == 2 * state.n_averaged
