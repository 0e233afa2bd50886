"""Times as people write them - "75%", "160ep", "30000step" - and as updates."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Literal, NamedTuple

from swa_core.numeric import number

Unit = Literal["%", "ep", "step"]

_TIME = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)\s*", re.ASCII)
_MEANT: dict[str, Unit] = {
    "%": "%",
    **dict.fromkeys(("ep", "epoch", "epochs"), "ep"),
    **dict.fromkeys(("step", "steps"), "step"),
}
_FORMS = 'Say "160ep" (epochs), "160step" (updates) or a share such as "75%".'
_LONGEST = 10**15


class MissingLengthError(ValueError):
    """A time could not be resolved because a length of the training is not known."""


class Time(NamedTuple):
    """A point or a stretch of the training: an exact number and its unit.

    >>> Time.parse("7%").updates(total_steps=100)
    7
    >>> Time.parse("0.5ep").updates(steps_per_epoch=391)
    196
    """

    value: Fraction
    unit: Unit

    @classmethod
    def parse(cls, text: object) -> Time:
        """Reads a time.

        Args:
          text: "75%", "160ep" or "30000step"; also "epoch", "epochs" and "steps" in full.

        Raises:
          ValueError: anything else, with what to write instead.
        """
        bare = number(text)
        if bare is None and not isinstance(text, str):
            raise ValueError(f"expected a time, got {text!r}. {_FORMS}")
        # Python neither reads nor prints integers of several thousand digits.
        if bare is not None and abs(bare) > _LONGEST:
            raise ValueError(f"{bare:g} is longer than any training.")
        match = _TIME.fullmatch(str(text))
        if match is None:
            raise ValueError(f"cannot read {text!r} as a time. {_FORMS}")
        digits, word = match.groups()
        if len(digits) > 100 or Fraction(digits) > _LONGEST:
            raise ValueError(f"{digits[:20]}... is longer than any training.")
        value = Fraction(digits)
        if not word:
            said = f'"{digits}"' if isinstance(text, str) else digits
            steps = f', "{digits}step" (updates)' if value.denominator == 1 else ""
            raise ValueError(
                f'{said} has no unit. Say "{digits}ep" (epochs){steps} or a share such as "75%".'
            )
        unit = _MEANT.get(word.lower())
        if unit is None:
            raise ValueError(f'unknown unit "{word}" in {text!r}. {_FORMS}')
        if unit == "step" and value.denominator != 1:
            raise ValueError(f"{text!r} is not a whole number of updates. Round it.")
        if unit == "%" and value > 100:
            raise ValueError(f'{text!r} is more than the whole training. Say "100%" or less.')
        return cls(value, unit)

    def updates(
        self,
        *,
        steps_per_epoch: int | None = None,
        total_steps: int | None = None,
        whole_epochs: bool = False,
    ) -> int:
        """The time in updates, rounded up.

        Args:
          steps_per_epoch: updates of one epoch.
          total_steps: updates of the whole training.
          whole_epochs: round a share of the training up to a whole epoch.

        Raises:
          MissingLengthError: a length that this unit needs is None; the message names it.
        """
        if self.unit == "step":
            return int(self.value)
        if self.unit == "ep":
            if steps_per_epoch is None:
                raise MissingLengthError(
                    "is counted in epochs, so steps_per_epoch is needed (updates per epoch: "
                    "len(loader) // accumulation)."
                )
            return math.ceil(self.value * steps_per_epoch)
        if total_steps is None:
            raise MissingLengthError(
                "is a share of the training, so total_steps is needed (updates in all: "
                "epochs * steps_per_epoch)."
            )
        exact = self.value * total_steps / 100
        if not whole_epochs:
            return math.ceil(exact)
        if steps_per_epoch is None:
            raise MissingLengthError(
                "is rounded up to a whole epoch, because swa.every is counted in epochs, so "
                "steps_per_epoch is needed (updates per epoch: len(loader) // accumulation)."
            )
        return math.ceil(exact / steps_per_epoch) * steps_per_epoch
