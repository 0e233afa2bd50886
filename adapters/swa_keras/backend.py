"""What an average asks of the framework under Keras; one small class for each, see below."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import keras
import numpy as np
import numpy.typing as npt

Tensor = Any
Variable = Any  # keras.Variable is another class on every backend


class Loan(Protocol):
    """Averages in the place of the values of variables, which wait meanwhile.

    Attributes:
      live: the variables' own values.
      averages: the averages, wherever they are now.
    """

    @property
    def live(self) -> list[Tensor]: ...

    @property
    def averages(self) -> list[Tensor]: ...

    def undo(self) -> bool:
        """Gives the variables their own values back. Whether an average was overwritten."""

    def keep(self) -> bool:
        """Leaves the averages in the variables for good, and gives the averages memory of their
        own. Whether one was overwritten before."""


class Backend(Protocol):
    """The operations on whole lists of variables; nothing here passes through the host.

    Averages are float32 or wider (see ``wide``), of a kind of tensor that the backend chooses.
    """

    def copies(self, variables: Sequence[Variable]) -> list[Tensor]:
        """New averages with the values of the variables."""

    def lerp(
        self, averages: list[Tensor], variables: Sequence[Variable], weight: float
    ) -> list[Tensor]:
        """``average + weight * (variable - average)``; the averages given are used up."""

    def all_finite(self, variables: Sequence[Variable]) -> bool:
        """Whether no variable holds a NaN or an infinity."""

    def copy_state(self, variables: Sequence[Variable]) -> list[Tensor]:
        """Copies that also survive a backend which takes the variables' memory away."""

    def assign(self, variables: Sequence[Variable], values: Sequence[Tensor]) -> None:
        """Copies values into the variables, in their own dtype."""

    def keep_in_evaluation(self, model: Any) -> None:
        """Makes a model that evaluates or predicts leave its variables' memory alone."""

    def lend(self, variables: Sequence[Variable], averages: list[Tensor]) -> Loan:
        """Puts the averages in the place of the variables' values, which wait to return."""

    def from_numpy(
        self, arrays: Sequence[npt.NDArray[Any]], variables: Sequence[Variable]
    ) -> list[Tensor]:
        """New averages with these values, where the variables are."""

    def to_numpy(self, tensor: Tensor) -> npt.NDArray[Any]:
        """A copy on the host (Keras' own conversion warns with numpy 2 on two backends).

        Of what is spread over several processes, all of them have to ask for it.
        """

    def batch(self, array: npt.NDArray[Any] | Tensor) -> Tensor:
        """Data of this process, spread over the devices as ``fit`` spreads it.

        Raises:
          BatchNormError: it cannot be cut for the devices of several processes.
        """

    def forked_random(self) -> AbstractContextManager[Any]:
        """A context after which the framework's own random numbers go on as before it."""

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, compiled where the backend does so, without gradients."""


def current() -> Backend:
    """The backend that Keras runs on in this process."""
    name = keras.backend.backend()
    if name not in ("tensorflow", "jax", "torch"):
        raise ImportError(f"swa_keras averages on tensorflow, jax and torch; Keras runs on {name}")
    backend: Backend = importlib.import_module(f"swa_keras.backend_{name}").make()
    return backend


def is_floating(variable: Variable) -> bool:
    """Whether the variable is averaged: floating point of any width, and not an integer."""
    return bool(keras.backend.is_float_dtype(variable.dtype))


def wide(dtype: str) -> str:
    """The dtype of the average of variables of this dtype: float32 or wider.

    >>> wide("bfloat16"), wide("float64")
    ('float32', 'float64')
    """
    return "float64" if dtype == "float64" else "float32"


def wide_dtype(variable: Variable) -> np.dtype[Any]:
    """``wide`` as numpy's dtype."""
    return np.dtype(wide(variable.dtype))
