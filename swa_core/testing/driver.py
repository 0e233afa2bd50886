"""What the conformance kit asks of an adapter: a few dozen lines that drive it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import numpy.typing as npt

from swa_core.config import SWAConfig

Weights = dict[str, npt.NDArray[Any]]


class Driver(Protocol):
    """One training run in one framework, moved by script.

    The kit chooses the weights that each update leads to; the driver makes the framework's real
    training reach them (an optimizer that copies given values will do) and lets the adapter see
    the update as it would in a user's loop. Any class with these methods will do; it need not
    inherit. The errors and the warning that are named here are those of ``swa_core``, and the
    adapter raises them, not the driver.

    Weights are flat dicts of numpy arrays by name. Integer and boolean arrays among them are what
    a model holds beside its trainable weights (a torch buffer, a Keras seed, a leaf of a JAX tree).

    Attributes:
      expected_failures: names of checks that this adapter cannot pass, each with the reason. They
        are still run, and one that passes after all is an error.
    """

    expected_failures: ClassVar[Mapping[str, str]] = {}

    def start(
        self,
        weights: Weights,
        config: SWAConfig,
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        frozen: Collection[str] = (),
        tied: Mapping[str, str] | None = None,
    ) -> None:
        """Begins a training from ``weights``; called once, before everything else.

        Args:
          weights: the initial weights; the driver copies them.
          config: what to average.
          steps_per_epoch: updates per epoch, where the configuration needs it.
          total_steps: updates in all, likewise.
          frozen: names of weights that the optimizer must not train.
          tied: second names of weights: {alias: name}; ``weights`` holds both, with equal values.
        """

    def train(self, weights: Weights) -> None:
        """Makes one completed optimizer update, after which the training weights are ``weights``.

        Frozen and integer leaves may change too; the driver sets those by hand. Weights of another
        structure, shape or dtype stand for a model that was changed during the training.

        Raises:
          SwappedError: inside ``averaged``; the weights are then what they were.
          StructureError: the structure, shapes or dtypes changed; the training need not go on.
        """

    def weights(self) -> Weights:
        """Copies of what the model would compute with now (also inside ``averaged``)."""

    def average(self) -> Weights:
        """Copies of the averaged weights, by name, in the dtype the average is kept in.

        Tied weights stand under both names. Integers are left out once there is an average, and
        frozen weights may be. Before the first snapshot these are the live weights, and the adapter
        gives an ``SWAWarning`` once. Reads as a user would: warnings pass through.
        """

    def n_averaged(self) -> int:
        """The number of snapshots in the average."""

    def n_skipped(self) -> int:
        """The number of snapshots left out because they held NaN or Inf."""

    def averaged(self) -> AbstractContextManager[Any]:
        """The adapter's context in which the model computes with the averaged weights.

        Before the first snapshot the model keeps its live weights; the same single warning.
        """

    def finalize(self) -> None:
        """Makes the average the model's weights for good.

        Raises:
          NothingAveragedError: before the first snapshot.
        """

    def save(self) -> Any:
        """All that a user's checkpoint holds: the model's weights as they are now, then the
        adapter's state, in a form that shares nothing with the running training."""

    def load(self, saved: Any) -> None:
        """Restores a checkpoint in a fresh training (after ``start``): the model first."""
