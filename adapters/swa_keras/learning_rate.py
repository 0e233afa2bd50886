"""The learning rate of ``[swa.lr]`` on a Keras optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from swa_core import LRSchedule, SWAError
from swa_core.learning_rate import learning_rate
from swa_keras.backend import current
from swa_keras.rate_guard import RateGuard
from swa_keras.schedule import SWASchedule
from swa_keras.wrapped_optimizers import accumulation, innermost, makers


class Rate:
    """Sets the rate of an optimizer before each update, and only where it changes.

    Attributes:
      base: the optimizer's rate at the start, from which ours departs; None before.
    """

    def __init__(self, lr: LRSchedule, base: float | None = None) -> None:
        self.lr = lr
        self.base = base
        self._set: float | None = None
        self._guard: RateGuard | None = None

    def forget(self) -> None:
        """Sets the rate again at the next update, in case it is not what it was."""
        self._set = None

    def release(self) -> None:
        """Lets others set the rate again."""
        if self._guard is not None:
            self._guard.remove()
            self._guard = None

    def prepare(self, update: int, model_of: Callable[[], Any], *, guarded: bool = False) -> None:
        """Sets the rate that makes an update.

        Args:
          update: the update to be made; up to the start the rate is left alone.
          model_of: gives the model, synced; not called where there is nothing to set.
          guarded: whether from now on, while ``fit`` runs, what other callbacks set is dropped.
        """
        if update <= self.lr.start:
            return
        if self.base is None:
            self.base = _number(model_of().optimizer.learning_rate)
        rate = float(learning_rate(update, self.base, self.lr))
        if self._guard is not None and not self._guard.stands:
            self._guard = self._set = None
        if rate == self._set:
            return
        model = model_of()
        if guarded and self._guard is None:
            self._guard = RateGuard(model, innermost(model.optimizer)._learning_rate)
        if self._guard is None:
            model.optimizer.learning_rate = rate
        else:
            self._guard.set(rate)
        self._set = rate


def schedule_of(optimizer: Any) -> SWASchedule | None:
    """The schedule by which an optimizer's rate is ours already, in its compiled step."""
    rates = [getattr(maker, "_learning_rate", None) for maker in makers(optimizer)]
    ours = [rate for rate in rates if isinstance(rate, SWASchedule)]
    return ours[0] if ours and len(ours) == len(rates) else None


def check_settable(model: Any) -> None:
    """Refuses optimizers whose rate cannot be set, and is no ``SWASchedule``.

    Raises:
      SWAError: no optimizer, several, or one with a schedule or function as its rate.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None:
        raise SWAError(
            "[swa.lr] sets the learning rate, but the model has no optimizer.",
            hint="compile the model, or leave out [swa.lr] and set the rate yourself.",
        )
    if schedule_of(optimizer) is not None:
        return
    for maker in makers(optimizer):
        rate = getattr(maker, "_learning_rate", None)
        if not isinstance(rate, keras.Variable) or len(makers(optimizer)) > 1:
            kind = "several" if len(makers(optimizer)) > 1 else f"a {type(rate).__name__}"
            raise SWAError(
                f"[swa.lr] sets the learning rate, but the optimizer's is {kind}, which cannot be "
                "set.",
                hint="give the optimizer learning_rate=swa_keras.SWASchedule(the_rate_you_have, "
                "config, steps_per_epoch=..., total_steps=...), or a float; or leave out [swa.lr].",
            )


def check_same(optimizer: Any, lr: LRSchedule, counts_epochs: bool = False) -> None:
    """Refuses a ``SWASchedule`` that is not of this ``[swa.lr]``.

    Args:
      optimizer: its rates are looked at, as far as they are ``SWASchedule``s.
      lr: the rate as it is resolved for this training.
      counts_epochs: whether it is resolved in epochs, which a schedule cannot count.

    Raises:
      SWAError: saying what differs.
    """
    for maker in makers(optimizer):
        rate = getattr(maker, "_learning_rate", None)
        if not isinstance(rate, SWASchedule):
            continue
        if counts_epochs:
            raise SWAError(
                "the optimizer's SWASchedule counts updates, but this training counts epochs, "
                "because its steps per epoch are not known.",
                hint="give fit steps_per_epoch.",
            )
        if rate.lr is None:
            raise SWAError(
                "the optimizer's SWASchedule was made of a configuration without [swa.lr], and "
                "this one has it.",
                hint="make both of the same configuration.",
            )
        differing = [
            f"{name} is {theirs!r} there and {ours!r} here"
            for name, theirs, ours in zip(lr._fields, rate.lr, lr, strict=True)
            if theirs != ours
        ]
        if differing:
            raise SWAError(
                f"the optimizer's SWASchedule is not of this [swa.lr]: {', '.join(differing)} "
                "(times in updates).",
                hint="make both of the same configuration, steps_per_epoch and total_steps.",
            )
        batches = accumulation(optimizer)
        if (rate.gradient_accumulation_steps or 1) != batches:
            raise SWAError(
                f"the optimizer makes an update of {batches} batches, and its SWASchedule was "
                f"told gradient_accumulation_steps={rate.gradient_accumulation_steps}.",
                hint=f"make it SWASchedule(..., gradient_accumulation_steps={batches}).",
            )


def check_scheduled(optimizer: Any, lr: LRSchedule | None) -> None:
    """Refuses an optimizer to be wrapped whose rate is not that of ``[swa.lr]``.

    Raises:
      SWAError: it is no ``SWASchedule``, or another one.
    """
    if lr is None:
        return
    if makers(optimizer) and schedule_of(optimizer) is None:
        raise SWAError(
            "[swa.lr] sets the learning rate, and a SWAOptimizer leaves that to the optimizer it "
            "wraps, whose rate knows nothing of it.",
            hint="give that optimizer learning_rate=swa_keras.SWASchedule(the_rate_you_have, "
            "config, steps_per_epoch=..., total_steps=...), or leave out [swa.lr].",
        )
    check_same(optimizer, lr)


def _number(rate: Any) -> float:
    return float(current().to_numpy(keras.ops.convert_to_tensor(rate)))
