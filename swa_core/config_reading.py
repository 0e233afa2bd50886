"""A configuration from a mapping and back, with every fault found at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from swa_core.errors import Fault
from swa_core.learning_rate import LearningRate
from swa_core.numeric import number
from swa_core.rules import BY_NAME, Rule, name_of
from swa_core.units import Time

# A reader takes a value and its path, notes what is wrong with it, and returns what it means.
Reader = Callable[[Any, str, list[Fault]], Any]


def read(table: Any, path: str) -> tuple[dict[str, Any], list[Fault]]:
    """The fields of a ``SWAConfig`` in a table, and everything wrong with them.

    Args:
      table: what stands there; a rule or learning rate in it may be the object itself.
      path: what to put before its keys in a fault.

    Returns:
      The fields, and the faults in the order of the table, after which come those that concern
      several keys of ``lr`` together.
    """
    faults: list[Fault] = []
    if not isinstance(table, Mapping):
        return {}, [Fault(path, f"expected a table, got {table!r}.")]
    return _read_table(table, _READERS, path, faults), faults


def faults_of(settings: Mapping[str, Any]) -> list[Fault]:
    """Everything wrong with the fields of a ``SWAConfig``, however they were set."""
    meant, faults = read(settings, "swa")
    for key, expected in (
        ("rule", "Uniform(), EMA(...) or Polynomial(...)"),
        ("lr", "LearningRate(...) or None"),
    ):
        given = settings[key]
        if isinstance(given, (str, Mapping)) and meant[key] is not None:
            message = f"expected {expected}, got {given!r}. SWAConfig.from_dict reads such."
            faults.append(Fault(f"swa.{key}", message))
    return faults


def write(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The form of the fields of a ``SWAConfig`` that ``read`` reads back."""
    written = _said(settings)
    written["rule"] = write_rule(written["rule"])
    if "lr" in written:
        # A table in TOML takes all keys that follow, so it comes last.
        written["lr"] = _said(vars(written.pop("lr")))
    return written


def write_rule(rule: Rule) -> str | dict[str, Any]:
    """A rule as a configuration writes it: its name, or a table with its name and numbers.

    >>> from swa_core.rules import EMA, Uniform
    >>> write_rule(Uniform()), write_rule(EMA(0.9))
    ('uniform', {'name': 'ema', 'decay': 0.9})
    """
    name, numbers = name_of(rule), _said(vars(rule))
    return {"name": name, **numbers} if numbers else name


def _said(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without those that are None."""
    return {name: value for name, value in settings.items() if value is not None}


def _read_table(
    table: Mapping[str, Any], readers: Mapping[str, Reader], path: str, faults: list[Fault]
) -> dict[str, Any]:
    return {
        key: readers[key](value, f"{path}.{key}", faults)
        for key, value in _known_items(table, readers, path, faults)
    }


def _known_items(
    table: Mapping[str, Any], known: Iterable[str], path: str, faults: list[Fault]
) -> Iterator[tuple[str, Any]]:
    known = list(known)
    for key in table:
        if key in known:
            yield key, table[key]
        else:
            faults.append(Fault(f"{path}.{key}", f"unknown key. {_meant(str(key), known)}"))


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f'Did you mean "{close[0]}"?' if close else f"Known are {', '.join(known)}."


def _time(value: Any, path: str, faults: list[Fault], *, positive: bool = False) -> Any:
    try:
        time = Time.parse(value)
    except ValueError as error:
        faults.append(Fault(path, str(error)))
    else:
        if positive and not time.value:
            message = f'{value!r} must be more than 0, for example "1ep" or "1step".'
            faults.append(Fault(path, message))
    return value


def _rate(value: Any, path: str, faults: list[Fault]) -> Any:
    """A learning rate; None in place of one that is wrong."""
    rate = number(value)
    if rate is not None and 0 < rate < math.inf:
        return value
    faults.append(Fault(path, f"expected a number > 0, got {value!r}."))
    return None


def _choice(value: Any, path: str, faults: list[Fault], *, of: tuple[str, str]) -> Any:
    if not (isinstance(value, str) and value in of):
        faults.append(Fault(path, f'expected "{of[0]}" or "{of[1]}", got {value!r}.'))
    return value


def _optional(reader: Reader) -> Reader:
    def read_unless_none(value: Any, path: str, faults: list[Fault]) -> Any:
        return None if value is None else reader(value, path, faults)

    return read_unless_none


def _rule(value: Any, path: str, faults: list[Fault]) -> Rule | None:
    if type(value) in BY_NAME.values():
        rule: Rule = value
        return rule
    table = {"name": value} if isinstance(value, str) else value
    name = table["name"] if isinstance(table, Mapping) and "name" in table else None
    if not isinstance(name, str):
        forms = 'expected "uniform" or a table such as { name = "ema", decay = 0.999 }'
        faults.append(Fault(path, f"{forms}, got {value!r}."))
        return None
    if name not in BY_NAME:
        faults.append(Fault(path, f'unknown rule "{name}". {_meant(name, BY_NAME)}'))
        return None
    defaults = {field.name: field.default for field in fields(BY_NAME[name])}
    so_far = len(faults)
    numbers = {}
    for key, given in _known_items(table, ("name", *defaults), path, faults):
        if key == "name" or (given is None and defaults[key] is None):
            continue
        if number(given) is None:
            faults.append(Fault(f"{path}.{key}", f"expected a number, got {given!r}."))
        numbers[key] = given
    if len(faults) == so_far:
        try:
            return BY_NAME[name](**numbers)
        except ValueError as error:
            faults.append(Fault(path, f"{error}."))
    return None


def _lr(value: Any, path: str, faults: list[Fault]) -> LearningRate | None:
    table = vars(value) if isinstance(value, LearningRate) else value
    if not isinstance(table, Mapping):
        message = f"expected a table such as {{ value = 0.05 }}, got {value!r}."
        faults.append(Fault(path, message))
        return None
    so_far = len(faults)
    read = _read_table(table, _LR_READERS, path, faults)
    rate, low = read.get("value"), read.get("low")
    cyclical = read.get("cycle") is not None
    if "value" not in read:
        faults.append(Fault(f"{path}.value", "is missing: the rate to reach, a number > 0."))
    if cyclical and read.get("anneal") is not None:
        faults.append(Fault(f"{path}.cycle", "say either anneal or cycle, and not both."))
    elif cyclical and ("low" not in table or table["low"] is None):
        faults.append(Fault(f"{path}.low", "is missing: the rate at the end of each cycle."))
    elif low is not None and not cyclical:
        message = "is for cyclical rates: say cycle too, or leave it out."
        faults.append(Fault(f"{path}.low", message))
    elif low is not None and rate is not None and low > rate:
        faults.append(Fault(f"{path}.low", f"must not lie above value ({rate!r})."))
    return LearningRate(**read) if len(faults) == so_far else None


_READERS: dict[str, Reader] = {
    "start": _time,
    "every": partial(_time, positive=True),
    "stop": _optional(_time),
    "rule": _rule,
    "lr": _optional(_lr),
    "nonfinite": partial(_choice, of=("skip", "keep")),
}
_LR_READERS: dict[str, Reader] = {
    "value": _rate,
    "anneal": _optional(_time),
    "shape": partial(_choice, of=("cosine", "linear")),
    "cycle": _optional(partial(_time, positive=True)),
    "low": _optional(_rate),
}
