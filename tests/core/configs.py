"""All valid configurations, and what is wrong with the others."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from swa_core import EMA, ConfigError, LearningRate, Polynomial, SWAConfig, Uniform

rates = st.floats(1e-300, 1e300) | st.integers(1, 10**6)
times = st.one_of(
    st.decimals(0, 100, places=5).map(lambda share: f"{share:f}%"),
    st.decimals(0, 10**6, places=3).map(lambda epochs: f"{epochs:f}ep"),
    st.integers(0, 10**15).map(lambda steps: f"{steps}step"),
    st.sampled_from(["75 %", " 3 epochs ", "1 Step", ".5ep\t", "8.steps\n\x0b"]),
)
positive_times = times.filter(lambda time: any(digit in time for digit in "123456789"))
rules = st.one_of(
    st.just(Uniform()),
    st.floats(0, 1, exclude_min=True, exclude_max=True).map(EMA),
    st.floats(0, exclude_min=True, allow_infinity=False).map(lambda time: EMA(half_life=time)),
    st.floats(0, allow_infinity=False).map(Polynomial),
    st.integers(0, 100).map(Polynomial),
)
annealed = st.builds(
    LearningRate,
    value=rates,
    anneal=st.none() | times,
    shape=st.sampled_from(["cosine", "linear"]),
)
cyclical = st.builds(
    lambda value, share, cycle: LearningRate(value=value, low=value * share or value, cycle=cycle),
    rates,
    st.floats(0.01, 1),
    positive_times,
)
configs = st.builds(
    SWAConfig,
    start=times,
    every=positive_times,
    stop=st.none() | times,
    rule=rules,
    lr=st.none() | annealed | cyclical,
    nonfinite=st.sampled_from(["skip", "keep"]),
)


def faults_of(function, *args, **kwargs):
    """What a ConfigError lists, as (path, message), and nothing else may be raised."""
    with pytest.raises(ConfigError) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == "\n  ".join(
        [str(caught.value).splitlines()[0], *map(str, caught.value.faults)]
    )
    return [tuple(fault) for fault in caught.value.faults]
