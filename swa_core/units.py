"""Times as people write them - "75%", "160ep", "30000step" - and as updates."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Literal, NamedTuple

Unit = Literal["%", "ep", "step"]

_NUMBER = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z%]*)\s*", re.ASCII)
_MEANT: dict[str, Unit] = {
    "%": "%",
    **dict.fromkeys(("ep", "epoch", "epochs"), "ep"),
    **dict.fromkeys(("step", "steps"), "step"),
}
_FORMS = 'Say {0}"160ep" (epochs), "160step" (updates) or a share such as "75%".'


class Missing(ValueError):
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
        if not isinstance(text, str):
            example = f'"{text}ep" (epochs), "{text}step" (updates)'
            if isinstance(text, bool) or not isinstance(text, (int, float)):
                raise ValueError(f"expected a time, got {text!r}. {_FORMS.format('')}")
            raise ValueError(f'{text} has no unit. Say {example} or a share such as "75%".')
        match = _NUMBER.fullmatch(text)
        if match is None:
            raise ValueError(f"cannot read {text!r} as a time. {_FORMS.format('')}")
        number, word = match.groups()
        if not word:
            raise ValueError(
                f'"{number}" has no unit. Say "{number}ep" (epochs), "{number}step" (updates) '
                'or a share such as "75%".'
            )
        unit = _MEANT.get(word.lower())
        if unit is None:
            raise ValueError(f'unknown unit "{word}" in {text!r}. {_FORMS.format("")}')
        value = Fraction(number)
        if unit == "step" and value.denominator != 1:
            raise ValueError(f"{text!r} is not a whole number of updates.")
        if unit == "%" and value > 100:
            raise ValueError(f"{text!r} is more than the whole training.")
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
          Missing: a length that this unit needs is None; the message names it.
        """
        if self.unit == "step":
            return int(self.value)
        if self.unit == "ep":
            if steps_per_epoch is None:
                raise Missing(
                    "is counted in epochs, so steps_per_epoch is needed (updates per epoch: "
                    "len(loader) // accumulation)."
                )
            return math.ceil(self.value * steps_per_epoch)
        if total_steps is None:
            raise Missing(
                "is a share of the training, so total_steps is needed (updates in all: "
                "epochs * steps_per_epoch)."
            )
        exact = self.value * total_steps / 100
        if whole_epochs:
            if steps_per_epoch is None:
                raise Missing(
                    "is rounded up to a whole epoch, because swa.every is counted in epochs, so "
                    "steps_per_epoch is needed (updates per epoch: len(loader) // accumulation)."
                )
            return math.ceil(exact / steps_per_epoch) * steps_per_epoch
        return math.ceil(exact)
