"""swa-core: one weight-averaging engine, the same in every framework. numpy only."""

from swa_core.average_files import AverageFile, load_average, save_average
from swa_core.averaging import SWAState, init, update
from swa_core.config import SWAConfig
from swa_core.errors import (
    BatchNormError,
    ConfigError,
    GeometryError,
    NonFiniteStatisticsError,
    NothingAveragedError,
    StateError,
    StructureError,
    SWAError,
    SwappedError,
    SWAWarning,
)
from swa_core.learning_rate import LearningRate, LRSchedule, learning_rate
from swa_core.rules import EMA, Polynomial, Rule, Uniform
from swa_core.saving import state_from_dict, state_to_dict
from swa_core.schedule import Schedule

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "AverageFile",
    "BatchNormError",
    "ConfigError",
    "GeometryError",
    "LRSchedule",
    "LearningRate",
    "NonFiniteStatisticsError",
    "NothingAveragedError",
    "Polynomial",
    "Rule",
    "SWAConfig",
    "SWAError",
    "SWAState",
    "SWAWarning",
    "Schedule",
    "StateError",
    "StructureError",
    "SwappedError",
    "Uniform",
    "init",
    "learning_rate",
    "load_average",
    "save_average",
    "state_from_dict",
    "state_to_dict",
    "update",
]
