"""States that are not what they should be, and where states are read: each refused with a way out.

A state may be another's, cast, restored without its structure or into a wrong one, donated, only
described (``eval_shape``), an ensemble's, or given in the wrong place.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from swa_core import StateError, StructureError, SWAConfig, SWAState
from swa_optax import (
    accumulate,
    averaged_params,
    finalize,
    load_average,
    n_averaged,
    n_skipped,
    save_average,
    state_from_dict,
    state_to_dict,
    swa,
    wrap,
)

CONFIG = SWAConfig(start="1step", every="1step")
TX = swa(CONFIG)
PARAMS = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
ZERO = jax.tree.map(jnp.zeros_like, PARAMS)
STATE = TX.update(ZERO, TX.init(PARAMS), PARAMS)[1]


def update(state):
    return TX.update(ZERO, state, PARAMS)


def jitted(state):
    return jax.jit(TX.update)(ZERO, state, PARAMS)


def loop(state):
    return accumulate(state, PARAMS)


OTHERS = {
    "parameters": PARAMS,
    "another's": optax.adam(0.1).init(PARAMS)[0],
    "none": optax.EmptyState(),
    "nothing": None,
    "chain's": optax.chain(optax.sgd(0.1), TX).init(PARAMS),
    "transformation": TX,
}


@pytest.mark.parametrize("other", OTHERS)
def test_the_state_of_another(other):
    with pytest.raises(StateError, match=r"no SWAState, but a .*\nHint: call tx.update") as error:
        update(OTHERS[other])
    assert type(OTHERS[other]).__name__ in str(error.value)


def test_the_state_of_another_given_to_a_wrapped_optimizer():
    tx = wrap(optax.adam(0.1), CONFIG)
    plain = [None, STATE._asdict()]  # restored without a target
    for state, hint in (
        (optax.adam(0.1).init(PARAMS), "call tx.update"),
        (STATE, "call tx.update"),
        (plain, "it was restored without its structure"),
    ):
        with pytest.raises(StateError, match=f"is no state of wrap, but a .*\nHint: {hint}"):
            tx.update(ZERO, state, PARAMS)


def test_the_state_of_another_is_refused_when_traced():
    with pytest.raises(StateError, match="no SWAState"):
        jax.eval_shape(update, PARAMS)


@pytest.mark.parametrize("use", [update, lambda state: averaged_params(state, PARAMS), n_averaged])
@pytest.mark.parametrize("nested", [lambda s: s, lambda s: [{"trace": None}, s]])
def test_restored_without_its_structure(use, nested):
    plain = nested(STATE._asdict())  # what Orbax gives without a target
    if use is update and isinstance(plain, list):
        return
    with pytest.raises(StateError, match="restored without its structure") as error:
        use(plain)
    assert "Restore into what tx.init(params) returns" in str(error.value)
    # The other way out that the hint names.
    assert averaged_params(SWAState(**STATE._asdict()), PARAMS)["dense"]["bias"].tolist() == [1] * 3


def test_a_saved_dictionary_is_no_state():
    saved = state_to_dict(STATE)
    with pytest.raises(StateError, match=r"Hint: .*state_from_dict\(saved, tx.init\(params\)\)"):
        averaged_params(saved, PARAMS)
    with pytest.raises(StateError, match=r"Hint: .*state_from_dict\(saved, tx.init\(params\)\)"):
        state_from_dict(STATE, saved)


@pytest.mark.parametrize("use", [update, jitted, loop, n_averaged, n_skipped, state_to_dict])
def test_a_state_that_was_cast_has_lost_its_counts(use):
    cast = optax.tree.cast(STATE, jnp.bfloat16)
    with pytest.raises(StateError, match=r"was cast: \w+ has dtype bfloat16") as error:
        use(cast)
    assert "Hint: a cast of the whole optimizer state (optax.tree.cast)" in str(error.value)


def cast_floats(dtype):
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, STATE
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int32"])
@pytest.mark.parametrize("use", [update, jitted, loop, state_to_dict])
def test_an_average_that_was_cast(use, dtype):
    with pytest.raises(StateError, match=f"leaf 'dense/bias' of the average has dtype {dtype}"):
        use(cast_floats(dtype))


def test_a_cast_average_may_still_be_read():
    assert averaged_params(cast_floats("bfloat16"), PARAMS)["dense"]["bias"].dtype == jnp.float32


@pytest.mark.parametrize("use", [update, jitted])
@pytest.mark.parametrize(
    "make", [int, np.int64, np.array, np.uint8, np.uint32, jnp.uint32], ids=repr
)
def test_counts_of_other_kinds_go_on_in_int32(use, make, x64):
    counts = (make(5), make(2), make(1))
    after = use(SWAState(*counts, 2.0, jax.tree.map(np.asarray, STATE.average)))[1]
    assert [int(leaf) for leaf in after[:4]] == [6, 3, 1, 3]
    assert [leaf.dtype for leaf in after[:4]] == [np.int32] * 3 + [np.float32]
    assert not any(leaf.weak_type for leaf in after[:4])


def test_a_state_of_numpy_goes_on_as_it_is():
    for got, wanted in zip(
        jax.tree.leaves(update(jax.tree.map(np.asarray, STATE))),
        jax.tree.leaves(update(STATE)),
        strict=True,
    ):
        assert (got.dtype, got.tobytes()) == (wanted.dtype, wanted.tobytes())


def ensemble():
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), PARAMS)
    return stacked, jax.vmap(TX.init)(stacked)


def test_an_ensemble_updated_as_one_is_told_of_vmap():
    stacked, states = ensemble()
    with pytest.raises(StateError, match=r"n_updates has shape \(2,\).*\nHint: .*jax.vmap\(tx.up"):
        TX.update(stacked, states, stacked)


# Donated.


def deleted(tree):
    def delete(leaf):
        if isinstance(leaf, jax.Array):
            leaf = jnp.array(leaf, copy=True)
            leaf.delete()
        return leaf

    return jax.tree.map(delete, tree)


USES_OF_A_STATE = {
    "update": update,
    "averaged_params": lambda state: averaged_params(state, PARAMS),
    "finalize": lambda state: finalize(state, PARAMS),
    "n_averaged": n_averaged,
    "n_skipped": n_skipped,
    "state_to_dict": state_to_dict,
    "accumulate": lambda state: accumulate(state, PARAMS),
    "save_average": lambda state: save_average("never-written", state, CONFIG),
}


@pytest.mark.parametrize("use", USES_OF_A_STATE)
def test_a_donated_state(use):
    step = jax.jit(TX.update, donate_argnums=1)
    state = TX.init(PARAMS)
    _, new = step(ZERO, state, PARAMS)
    with pytest.raises(StateError, match=r"buffer of '\S+' is deleted.\nHint: .*donate_argnums"):
        USES_OF_A_STATE[use](state)
    if use != "save_average":
        USES_OF_A_STATE[use](new)


def test_a_state_whose_average_alone_is_donated():
    state = STATE._replace(average=deleted(STATE.average))
    for use in (update, state_to_dict, USES_OF_A_STATE["averaged_params"]):
        with pytest.raises(StateError, match="buffer of 'dense/bias' is deleted"):
            use(state)


def test_donated_parameters():
    with pytest.raises(StateError, match="cannot start an average: the buffer of 'dense/bias'"):
        TX.init(deleted(PARAMS))
    # Their shapes and dtypes are all it takes.
    assert averaged_params(STATE, deleted(PARAMS))["dense"]["bias"].tolist() == [1] * 3
    params = PARAMS | {"step": jnp.array(3)}
    with pytest.raises(StateError, match="cannot read the parameters: the buffer of 'step'"):
        averaged_params(STATE, deleted(params))
    with pytest.raises(StateError, match="cannot read the parameters"):
        averaged_params(TX.init(PARAMS), deleted(PARAMS))


# In the wrong place.


@pytest.mark.parametrize(
    ("use", "order"),
    [
        (lambda: averaged_params(PARAMS, STATE), r"averaged_params\(opt_state, params\)"),
        (lambda: finalize(PARAMS, STATE), r"finalize\(opt_state, params\)"),
        (lambda: averaged_params(STATE, (STATE,)), r"averaged_params\(opt_state, params\)"),
        (lambda: TX.update(ZERO, STATE, STATE), r"tx.update\(grads, state, params\)"),
        (lambda: TX.update(ZERO, PARAMS, STATE), r"call tx.update\(grads, state, params\)"),
        (lambda: TX.init(STATE), r"init\(params\)"),
        (lambda: optax.chain(optax.sgd(0.1), TX).init((STATE,)), r"init\(params\)"),
    ],
)
def test_swapped_arguments_are_told_their_order(use, order):
    with pytest.raises((StructureError, StateError), match=f"Hint: .*{order}"):
        use()


# Where it is read.


def test_what_eval_shape_made_holds_no_numbers():
    described = jax.eval_shape(TX.init, PARAMS)
    for use in USES_OF_A_STATE.values():
        with pytest.raises(StateError, match=r"n_\w+ is a ShapeDtypeStruct.\nHint: jax.eval_shape"):
            use(described)
    read = jax.eval_shape(averaged_params, described, PARAMS)
    assert read["dense"]["kernel"] == jax.ShapeDtypeStruct((2, 3), jnp.float32)


@pytest.mark.parametrize(
    "save", [state_to_dict, lambda state: save_average("never-written", state, CONFIG)]
)
def test_saving_inside_of_jit(save):
    with pytest.raises(
        StateError, match=r"cannot be saved inside of jit.*\nHint: return the state"
    ):
        jax.jit(save)(STATE)


def test_what_can_be_read_inside_of_jit_vmap_and_scan(tmp_path):
    half = jax.tree.map(lambda leaf: leaf / 2, PARAMS)
    for transformed in (jax.jit, jax.checkpoint):
        assert transformed(averaged_params)(STATE, half)["dense"]["bias"].tolist() == [1] * 3
        assert int(transformed(n_averaged)(STATE)) == 1
    # One average beside many parameters, and an ensemble of averages.
    stacked, states = ensemble()
    read = jax.vmap(averaged_params, in_axes=(None, 0))(STATE, stacked)
    assert read["dense"]["bias"].shape == (2, 3)
    assert jax.vmap(n_averaged)(states).tolist() == n_averaged(states).tolist() == [0, 0]
    assert n_skipped(states).tolist() == [0, 0]

    def body(state, _):
        _, state = update(state)
        return state, (n_averaged(state), averaged_params(state, half)["dense"]["bias"])

    _, (counts, biases) = jax.lax.scan(body, TX.init(PARAMS), None, length=3)
    assert counts.tolist() == [1, 2, 3]
    np.testing.assert_array_equal(biases, np.ones((3, 3)))
    # A state may be loaded into a traced one: what is saved lies on the host.
    saved = state_to_dict(STATE)
    save_average(tmp_path / "average", STATE, CONFIG)
    for load in (
        lambda state: state_from_dict(saved, state),
        lambda state: load_average(tmp_path / "average", state),
    ):
        assert int(jax.jit(load)(TX.init(PARAMS)).n_averaged) == 1


@pytest.mark.parametrize("use", ["averaged_params", "finalize", "state_to_dict", "save_average"])
def test_what_reads_one_average_refuses_an_ensembles(use):
    stacked, states = ensemble()
    with pytest.raises(StateError, match="ensemble"):
        USES_OF_A_STATE[use](states._replace(average=STATE.average))
    with pytest.raises(StateError, match=r"inside of jit"):
        jax.vmap(finalize)(states, stacked)
