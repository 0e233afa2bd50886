"""What a list of callbacks does to the average: found before the training, or at its end.

Keras calls the callbacks of ``fit`` in the order of the list, and none of them knows the others.
So a callback that gives the model other weights at the end of training undoes the average of one
that is listed before it, and one that saves the model saves the training weights, whatever metric
it goes by.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import keras

from swa_core import SWAError, SWAWarning
from swa_keras.backup import Backup
from swa_keras.checkpoint import AveragedCheckpoint
from swa_keras.model_state import inner_optimizer


class Finding(NamedTuple):
    """Something in a list that does not do what was probably meant.

    Attributes:
      swa: the callback whose average is concerned.
      message: what happens, and what to do.
    """

    swa: Any
    message: str


def check(callbacks: Any, kind: type) -> None:
    """Warns of everything in a list of callbacks that works against the average.

    Args:
      callbacks: as ``fit`` takes them: a callback, a list of them, lists in it, a CallbackList.
      kind: the class of our callbacks.

    Raises:
      SWAError: what cannot be meant at all; see ``findings``.
    """
    for swa, message in findings(_flat(callbacks), kind):
        # Once for each callback, though a list may be checked by the user and again by fit.
        if message not in swa._noticed:
            swa._noticed.add(message)
            warnings.warn(f"SWA: {message}", SWAWarning, stacklevel=3)


def findings(callbacks: Sequence[Any], kind: type) -> Iterator[Finding]:
    """Everything in a list that works against the average.

    Raises:
      SWAError: Keras' own averaging is in the list too, or one of ours twice.
    """
    ours = [c for c in callbacks if isinstance(c, kind)]
    for callback in callbacks:
        if isinstance(callback, (AveragedCheckpoint, Backup)) and all(
            callback.swa is not swa for swa in ours
        ):
            name = "checkpoint" if isinstance(callback, AveragedCheckpoint) else "backup"
            yield Finding(
                callback.swa,
                f"swa.{name}(...) is in the list of callbacks, and the swa that it belongs to is "
                "not, so nothing is averaged for it. Put both into the list.",
            )
    if not ours:
        return
    if len({id(swa) for swa in ours}) < len(ours):
        raise SWAError(
            "the same SWA is listed twice in the callbacks of one fit.",
            hint="list it once; for two averages make two SWA(...), each with its name.",
        )
    if any(isinstance(c, keras.callbacks.SwapEMAWeights) for c in callbacks):
        raise SWAError(
            "SwapEMAWeights is in the list of callbacks: it swaps in the average that Keras' "
            "optimizer keeps with use_ema=True, which overwrites the weights at the end of "
            "training, and with them what SWA averaged.",
            hint="leave it out. SWA validates the average itself (validate=), and "
            'rule = { name = "ema", decay = 0.999 } is an EMA.',
        )
    yield from _about_several(ours)
    for number, callback in enumerate(callbacks):
        before = [c for c in callbacks[:number] if isinstance(c, kind) and c._finalize_at_end]
        yield from _about(callback, ours, before)


def _about(callback: Any, ours: list[Any], before: list[Any]) -> Iterator[Finding]:
    """What one callback does to those of ours in the list, ``before`` of which come before it and
    leave their averages in the model."""
    name = type(callback).__name__
    if before and getattr(callback, "restore_best_weights", False):
        yield Finding(
            before[-1],
            f"{name}(restore_best_weights=True) is listed after SWA: at the end of training it "
            "puts the training weights of its best epoch over the average. List it before SWA, or "
            "leave restore_best_weights out; to keep the best average, add "
            "swa.checkpoint(path, save_best_only=True).",
        )
    if isinstance(callback, keras.callbacks.BackupAndRestore) and not isinstance(callback, Backup):
        yield Finding(
            ours[0],
            f"{name} does not save the average, so after an interruption it would begin anew in "
            "the middle of the training. Take swa.backup(dir) in its place, which saves both.",
        )
    monitor = getattr(callback, "monitor", None)
    if isinstance(monitor, str):
        yield from _about_monitor(callback, monitor, ours)


def _about_monitor(callback: Any, monitor: str, ours: list[Any]) -> Iterator[Finding]:
    """What comes of a callback that goes by a metric."""
    kind = type(callback).__name__
    logging = [s for s in ours if s._validate == "both" and monitor.startswith(s._metrics_prefix)]
    replacing = [s for s in ours if s._validate == "average" and monitor.startswith("val_")]
    names = [f"val_{swa._name}_" for swa in ours]
    if (name := next(filter(monitor.startswith, names), None)) and not logging:
        plain = f"val_{monitor.removeprefix(name)}"
        yield Finding(
            ours[0],
            f"{kind}(monitor={monitor!r}) waits for a metric that no SWA in the list logs. "
            + (
                f'With validate="average", {plain} is the average\'s.'
                if replacing
                else 'Pass SWA(..., validate="both").'
            ),
        )
    elif isinstance(callback, AveragedCheckpoint):
        return
    elif hasattr(callback, "save_best_only"):
        if logging or (replacing and callback.save_best_only):
            yield Finding(
                (logging or replacing)[0],
                f"{kind}(monitor={monitor!r}) goes by a metric of the average, and saves the "
                f"training weights. Take swa.checkpoint(path, monitor={monitor!r}, ...) in its "
                "place, which saves the average.",
            )
    elif logging and getattr(callback, "mode", None) == "auto":
        yield Finding(
            logging[0],
            f"Keras cannot tell whether {monitor} should fall or rise, and will raise at the end "
            f'of the first epoch. Say it: {kind}(monitor={monitor!r}, mode="min").',
        )


def _about_several(ours: list[Any]) -> Iterator[Finding]:
    """What several of our callbacks do to each other."""
    for prefix in dict.fromkeys(swa._metrics_prefix for swa in ours):
        same = [swa for swa in ours if swa._metrics_prefix == prefix]
        if prefix is not None and len(same) > 1:
            yield Finding(
                same[0],
                f"{len(same)} callbacks validate their averages in one fit, and all log {prefix}*; "
                'only one of them is seen. Give the others a name, SWA(..., name="ema"), or '
                'validate="raw".',
            )
    if len(same := [swa for swa in ours if swa._finalize_at_end]) > 1:
        yield Finding(
            same[0],
            f"{len(same)} callbacks leave their averages in the model at the end of training, and "
            "the last one stays. Give the others finalize=False.",
        )


class LastWord(keras.callbacks.Callback):
    """Listed after all others, it tells whether the average is still in the model at the end."""

    def __init__(self, swa: Any) -> None:
        super().__init__()
        self._swa = swa

    def on_train_end(self, logs: Any = None) -> None:
        if self._swa.n_averaged and not self._swa._is_in(self.model):
            warnings.warn(
                "SWA: fit does not end on the average: a callback listed after SWA gave the model "
                "other weights at the end of training, as EarlyStopping(restore_best_weights=True) "
                "does. List it before SWA; swa.finalize(model) puts the average back.",
                SWAWarning,
                stacklevel=2,
            )


def watch(swa: Any, kind: type) -> None:
    """Checks the list that a callback is called from, and has an eye on the end of training.

    To be called in ``on_train_begin``. Where there is no such list (the hooks are called by other
    code) nothing is done.
    """
    found = list_calling(swa)
    if found is None:
        return
    check(found, kind)
    last = [c for c in found.callbacks if isinstance(c, kind) and c._finalize_at_end][-1:]
    watched = any(isinstance(c, LastWord) and c._swa is swa for c in found.callbacks)
    if last == [swa] and not watched:
        # This list is fit's own, made anew for each one, unless the user passes a CallbackList.
        callback = LastWord(swa)
        callback.set_model(swa.model)
        found.callbacks.append(callback)


def list_calling(callback: Any) -> keras.callbacks.CallbackList | None:
    """The CallbackList that has called this callback's hook: a callback is not told its list, but
    the list is at work further up."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, keras.callbacks.CallbackList) and any(
            c is callback for c in found.callbacks
        ):
            return found
        frame = frame.f_back  # type: ignore[assignment]
    return None


def refuse_use_ema(model: Any) -> None:
    """Raises ``SWAError`` where the model's optimizer, or one in it, keeps an average itself."""
    optimizer = inner_optimizer(model)
    for one in (optimizer, *getattr(optimizer, "optimizers", ())):
        if getattr(getattr(one, "inner_optimizer", one), "use_ema", False):
            raise SWAError(
                "the optimizer has use_ema=True: Keras then overwrites the weights with an average "
                "of its own at the end of training, before this callback averages or finalizes.",
                hint='use use_ema=False and, for an EMA, rule = { name = "ema", decay = 0.999 }; '
                "SwapEMAWeights is not needed then.",
            )


def _flat(callbacks: Any) -> list[Any]:
    if isinstance(callbacks, keras.callbacks.CallbackList):
        return list(callbacks.callbacks)
    return keras.tree.flatten(callbacks) if callbacks else []
