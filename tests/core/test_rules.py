from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_core import EMA, Polynomial, Uniform
from swa_core.rules import BY_NAME, name_of

RULES = (
    Uniform(),
    EMA(0.5),
    EMA(0.9),
    EMA(0.9999),
    EMA(half_life=3),
    EMA(half_life=5000),
    Polynomial(eta=0),
    Polynomial(eta=1),
    Polynomial(),
    Polynomial(eta=0.5),
    Polynomial(eta=100),
    Polynomial(eta=127.09647428338332),  # 1 + eta and the sum in float32 differ in the last bit
)

any_rule = (
    st.just(Uniform())
    | st.floats(1e-6, 1, exclude_max=True).map(EMA)
    | st.floats(0.01, 1e9).map(lambda half_life: EMA(half_life=half_life))
    | st.floats(0, 1e3).map(Polynomial)
)


def weights_by_definition(rule, n):
    """The weights of snapshots 1 to n as the literature defines the rule, exactly, of sum 1."""
    match rule:
        case Uniform():
            weights = [Fraction(1)] * n
        case EMA(decay=decay, half_life=half_life):
            # Fractions of an irrational decay grow without end; up to a million is near enough.
            exact = Fraction(decay if decay is not None else 2.0 ** (-1 / half_life))
            decay = exact.limit_denominator(10**6)
            assert abs(decay - exact) < 1e-9
            weights = [decay ** (n - k) for k in range(1, n + 1)]
        case Polynomial(eta=eta):
            # Every new one takes (eta + 1) / (k + eta) and leaves the rest to those before it.
            weights = []
            for k in range(1, n + 1):
                share = (Fraction(eta) + 1) / (k + Fraction(eta))
                weights = [weight * (1 - share) for weight in weights] + [share]
    total = sum(weights)
    return [weight / total for weight in weights]


def shares_of_recurrence(rule, n, dtype=float):
    total, shares = dtype(1), [dtype(1)]
    for k in range(1, n):
        total = rule.retain(dtype(k)) * total + dtype(1)
        shares.append(1 / total)
    return shares


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_recurrence_closed_form_and_definition_agree(rule):
    n = 60
    recurrence = shares_of_recurrence(rule, n)
    for k in range(1, n + 1):
        # The mixing weight of snapshot k is its share when it is the newest.
        share = float(weights_by_definition(rule, k)[-1])
        assert rule.mixing_weight(float(k)) == pytest.approx(share, rel=1e-8)
        assert recurrence[k - 1] == pytest.approx(rule.mixing_weight(float(k)), rel=1e-12)


@pytest.mark.parametrize(
    "rule", [Uniform(), EMA(0.5), EMA(0.75), Polynomial(eta=0), Polynomial(eta=2)], ids=repr
)
def test_mixing_gives_each_snapshot_its_weight(rule):
    n = 12
    expected = weights_by_definition(rule, n)
    shares = [
        Fraction(rule.mixing_weight(float(k))).limit_denominator(10**9) for k in range(1, n + 1)
    ]
    for k in range(n):
        rest = math.prod((1 - share for share in shares[k + 1 :]), start=Fraction(1))
        assert shares[k] * rest == pytest.approx(expected[k], rel=1e-9)


@given(any_rule, st.sampled_from([int, float, np.float32, np.float64]))
def test_the_first_mixing_weight_is_exactly_one(rule, kind):
    expm1 = math.expm1 if kind in (int, float) else np.expm1
    assert rule.mixing_weight(kind(1), expm1=expm1) == 1


@pytest.mark.parametrize(
    "rule", [EMA(half_life=1e-300), EMA(half_life=5e-324), EMA(5e-324), Polynomial(1e300)]
)
def test_a_decay_of_nothing_keeps_the_newest_only(rule):
    for kind in (float, np.float32):
        assert rule.mixing_weight(kind(1), expm1=np.expm1) == 1
        assert rule.mixing_weight(kind(7), expm1=np.expm1) == 1
    assert rule.effective_snapshots(7) == 1
    assert rule.mean_age(7) == pytest.approx(0, abs=1e-290)
    assert 0 <= rule.retain(np.float32(1)) <= 1e-30


@pytest.mark.parametrize("rule", [EMA(half_life=1e300), EMA(half_life=1.7e308), EMA(1 - 2**-53)])
def test_a_decay_of_almost_one_is_uniform(rule):
    for n in (1, 2, 7, 1000):
        for kind in (float, np.float32):
            share = rule.mixing_weight(kind(n), expm1=np.expm1)
            assert share == pytest.approx(1 / n, rel=1e-6)
        assert rule.effective_snapshots(n) == pytest.approx(n, rel=1e-12)
        assert rule.mean_age(n) == pytest.approx((n - 1) / 2, rel=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_numpy_float32_stays_float32_and_precise(rule):
    n = np.arange(1, 10_001)
    exact = np.array([rule.mixing_weight(float(k)) for k in n])
    shares = rule.mixing_weight(n.astype(np.float32), expm1=np.expm1)
    assert shares.dtype == np.float32
    assert shares[0] == rule.mixing_weight(np.float32(1), expm1=np.expm1) == 1
    assert np.asarray(rule.retain(np.float32(3)) * np.float32(1)).dtype == np.float32
    np.testing.assert_allclose(shares, exact, rtol=2e-6)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_jax_float32_stays_float32_and_precise_under_strict_promotion(jax_strict, rule):
    jnp = jax_strict.numpy
    n = np.arange(1, 10_001)
    exact = np.array([rule.mixing_weight(float(k)) for k in n])
    share = jax_strict.jit(lambda n: rule.mixing_weight(n, expm1=jnp.expm1))
    shares = share(jnp.asarray(n, jnp.float32))
    assert shares.dtype == jnp.float32
    assert share(jnp.float32(1)) == 1
    np.testing.assert_allclose(np.asarray(shares), exact, rtol=2e-6)
    total = jax_strict.jit(lambda n, total: rule.retain(n) * total + 1)(
        jnp.float32(3), jnp.float32(2)
    )
    assert total.dtype == jnp.float32
    np.testing.assert_allclose(total, rule.retain(3.0) * 2 + 1, rtol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_float32_average_by_mixing_weights_is_precise(rule):
    rng = np.random.default_rng(0)
    average, exact = np.zeros(64, np.float32), np.zeros(64)
    for n in range(1, 10_001):
        new = (5 + 0.001 * n + rng.standard_normal(64)).astype(np.float32)
        average += rule.mixing_weight(np.float32(n), expm1=np.expm1) * (new - average)
        exact += rule.mixing_weight(float(n)) * (new - exact)
    assert np.linalg.norm(average - exact) <= 2e-6 * np.linalg.norm(exact)


@given(any_rule, st.integers(1, 300))
def test_what_a_rule_tells_a_person_is_what_its_weights_say(rule, n):
    shares = shares_of_recurrence(rule, n)
    weights = np.empty(n)
    rest = 1.0
    for k in reversed(range(n)):
        weights[k] = shares[k] * rest
        rest *= 1 - shares[k]
    assert weights.sum() == pytest.approx(1)
    effective = 1 / np.square(weights).sum()
    age = (weights * np.arange(n)[::-1]).sum()
    assert rule.effective_snapshots(n) == pytest.approx(effective, rel=1e-9)
    assert rule.mean_age(n) == pytest.approx(age, rel=1e-9, abs=1e-9)


@given(st.floats(1e-12, 1e3), st.integers(1, 10**7))
def test_the_mean_age_of_an_ema_cancels_nothing(h, n):
    # Between the newest alone and uniform, and continuous where the formula changes.
    rule = EMA(half_life=math.log(2) / h)
    age = rule.mean_age(n)
    assert 0 <= age <= (n - 1) / 2 * (1 + 1e-12)
    assert age <= 1 / math.expm1(min(h, 700)) * (1 + 1e-12)
    if n * h < 0.01:
        assert age == pytest.approx((n - 1) / 2, rel=0.01)


@pytest.mark.parametrize("n", [10, 1000, 10**6])
def test_the_two_forms_of_the_mean_age_meet(n):
    below, above = (EMA(half_life=math.log(2) * n / x).mean_age(n) for x in (0.0999999, 0.1000001))
    assert below == pytest.approx(above, rel=1e-6)
    assert below > above


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_nothing_averaged_has_no_effect_and_no_age(rule):
    assert rule.effective_snapshots(0) == 0
    assert math.isnan(rule.mean_age(0))
    assert rule.effective_snapshots(1) == 1
    assert rule.mean_age(1) == 0


def test_known_numbers():
    # (1 + b) / (1 - b) and b / (1 - b), once n is large; n (2 eta + 1) / (eta + 1)^2.
    assert EMA(0.99).effective_snapshots(10**5) == pytest.approx(199)
    assert EMA(0.99).mean_age(10**5) == pytest.approx(99)
    assert Polynomial(eta=3).effective_snapshots(10**4) == pytest.approx(10**4 * 7 / 16, rel=1e-3)
    assert Polynomial(eta=3).mean_age(10**4) == pytest.approx(10**4 / 5, rel=1e-3)


def test_a_half_life_is_a_decay_said_in_time():
    by_half_life, by_decay = EMA(half_life=10), EMA(2**-0.1)
    assert by_half_life.retain(1.0) == pytest.approx(by_decay.retain(1.0), rel=1e-15)
    assert by_half_life.retain(1.0) ** 10 == pytest.approx(0.5)
    for n in (1, 2, 100):
        assert by_half_life.mixing_weight(n) == pytest.approx(by_decay.mixing_weight(n), rel=1e-12)


@pytest.mark.parametrize("bad", [0, 1, -0.5, 1.5, math.nan, math.inf, 2])
def test_a_decay_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="decay must lie between 0 and 1, got"):
        EMA(bad)


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf, -math.inf])
def test_a_half_life_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="half_life must be a positive number of snapshots, got"):
        EMA(half_life=bad)


@pytest.mark.parametrize("bad", [-1, -1e-9, math.nan, math.inf])
def test_an_eta_out_of_range_is_refused(bad):
    with pytest.raises(ValueError, match="eta must be a finite number >= 0, got"):
        Polynomial(bad)


def test_a_huge_integer_is_refused():
    with pytest.raises(ValueError, match="eta must be a finite number"):
        Polynomial(10**400)


@pytest.mark.parametrize("bad", ["0.5", True, False, [0.5], 0.5j, np.ones(1), b"1"])
@pytest.mark.parametrize("name", ["decay", "half_life", "eta"])
def test_what_is_no_number_is_refused(name, bad):
    with pytest.raises(ValueError, match=f"{name} must be a number, got"):
        (Polynomial if name == "eta" else EMA)(**{name: bad})


def test_an_eta_of_none_is_refused():
    with pytest.raises(ValueError, match="eta must be a number, got None"):
        Polynomial(None)


@pytest.mark.parametrize("parameters", [{}, {"decay": 0.9, "half_life": 3}])
def test_a_decay_is_said_once(parameters):
    with pytest.raises(ValueError, match="either decay or half_life, and not both"):
        EMA(**parameters)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64])
def test_numpy_numbers_become_plain_ones(kind):
    # A strongly typed scalar would change what a compiler computes, and no file takes one.
    assert type(Polynomial(kind(3)).eta) is float
    assert type(EMA(half_life=kind(3)).half_life) is float
    assert Polynomial(kind(3)) == Polynomial(3)
    assert type(EMA(np.float32(0.5)).decay) is float


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules_are_values(rule):
    assert eval(repr(rule)) == rule
    assert hash(eval(repr(rule))) == hash(rule)
    with pytest.raises(AttributeError):
        rule.eta = 3


def test_names():
    assert {name_of(rule) for rule in RULES} == set(BY_NAME)

    class Mine(EMA):
        pass

    with pytest.raises(TypeError, match=r"expected Uniform\(\), EMA"):
        name_of(Mine(0.5))
