from __future__ import annotations

import copy
import pickle

import pytest

import swa_core
from swa_core import ConfigError, SWAConfig, SWAError, SWAWarning
from swa_core.errors import Fault

PLAIN = [
    kind
    for kind in vars(swa_core).values()
    if isinstance(kind, type) and issubclass(kind, SWAError) and kind is not ConfigError
]


class MineError(ConfigError):
    """What an adapter outside of this project may derive."""


CLONES = [
    copy.copy,
    copy.deepcopy,
    *(lambda e, p=p: pickle.loads(pickle.dumps(e, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)),
]


@pytest.mark.parametrize("kind", PLAIN)
@pytest.mark.parametrize("hint", [None, "do something"])
@pytest.mark.parametrize("clone", CLONES)
def test_errors_survive_a_pickle(kind, hint, clone):
    error = kind("something is wrong", hint=hint)
    error.add_note("seen in worker 3")
    cloned = clone(error)
    assert type(cloned) is kind
    assert str(cloned) == str(error)
    assert cloned.__notes__ == ["seen in worker 3"]


@pytest.mark.parametrize("kind", [ConfigError, MineError])
@pytest.mark.parametrize("clone", CLONES)
def test_config_errors_survive_with_their_faults(kind, clone):
    error = kind([Fault("swa.every", "is 0."), Fault("", "is empty.")], source="swa.toml")
    error.add_note("seen in worker 3")
    cloned = clone(error)
    assert type(cloned) is kind
    assert str(cloned) == str(error) == "2 faults in swa.toml\n  swa.every: is 0.\n  is empty."
    assert cloned.faults == error.faults
    assert type(cloned.faults[0]) is Fault
    assert cloned.source == "swa.toml"
    assert cloned.__notes__ == ["seen in worker 3"]


def test_an_error_raised_by_a_configuration_survives():
    with pytest.raises(ConfigError) as caught:
        SWAConfig.from_dict({"start": 160})
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_they_are_also_what_python_calls_them():
    assert {kind.__name__ for kind in PLAIN} == {
        "SWAError", "StructureError", "StateError", "NothingAveragedError", "SwappedError",
        "BatchNormError", "GeometryError", "NonFiniteStatisticsError",
    }  # fmt: skip
    for kind in (ConfigError, swa_core.StructureError, swa_core.StateError):
        assert issubclass(kind, ValueError)
    for kind in (swa_core.NothingAveragedError, swa_core.SwappedError):
        assert issubclass(kind, RuntimeError)
    assert issubclass(SWAWarning, UserWarning)
    assert not issubclass(SWAWarning, SWAError)


def test_one_fault_is_no_plural():
    assert (
        str(ConfigError([Fault("swa.every", "is 0.")]))
        == "1 fault in SWAConfig\n  swa.every: is 0."
    )
