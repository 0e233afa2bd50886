"""A configuration from a mapping and back, with every fault found at once."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from swa_core.errors import Fault
from swa_core.learning_rate import LearningRate
from swa_core.rules import BY_NAME, Rule, name_of
from swa_core.units import Time

if TYPE_CHECKING:
    from swa_core.config import SWAConfig

KEYS = ("start", "every", "stop", "rule", "lr", "nonfinite")
_RULE_FORMS = 'expected "uniform" or a table such as { name = "ema", decay = 0.999 }'
_LR_KEYS = tuple(field.name for field in fields(LearningRate))


def read(mapping: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[Fault]]:
    """The fields of a ``SWAConfig`` in a mapping, and everything wrong with them."""
    if not isinstance(mapping, Mapping):
        return {}, [Fault(path, f"expected a table, got {mapping!r}.")]
    faults = _unknown(mapping, KEYS, path)
    found = {key: mapping[key] for key in KEYS if key in mapping}
    for key, reader in (("rule", _read_rule), ("lr", _read_lr)):
        if isinstance(found.get(key), (Mapping, str)):
            value, wrong = reader(found.pop(key), f"{path}.{key}")
            faults += wrong
            if value is not None:
                found[key] = value
    faults += _faults(found, path)
    # In the order of the file, so that they are found where they are read.
    order = {f"{path}.{key}": place for place, key in enumerate(mapping)}
    faults.sort(key=lambda fault: next(order[key] for key in order if _below(fault.path, key)))
    return found, faults


def faults_of(config: SWAConfig) -> list[Fault]:
    """Everything wrong with the fields of a configuration, however they were set."""
    return _faults({key: getattr(config, key) for key in KEYS}, "swa")


def write(config: SWAConfig) -> dict[str, Any]:
    """The form of a configuration that ``read`` reads back."""
    written: dict[str, Any] = {"start": config.start, "every": config.every}
    if config.stop is not None:
        written["stop"] = config.stop
    written["rule"] = write_rule(config.rule)
    written["nonfinite"] = config.nonfinite
    if config.lr is not None:
        written["lr"] = {
            key: value for key in _LR_KEYS if (value := getattr(config.lr, key)) is not None
        }
    return written


def write_rule(rule: Rule) -> str | dict[str, Any]:
    """A rule as a configuration writes it: its name, or a table with its name and numbers.

    >>> from swa_core.rules import EMA, Uniform
    >>> write_rule(Uniform()), write_rule(EMA(0.9))
    ('uniform', {'name': 'ema', 'decay': 0.9})
    """
    parameters = {
        field.name: value
        for field in fields(rule)
        if (value := getattr(rule, field.name)) is not None
    }
    name = name_of(rule)
    return {"name": name, **parameters} if parameters else name


def _below(path: str, key: str) -> bool:
    return path == key or path.startswith(f"{key}.")


def _unknown(mapping: Mapping[str, Any], known: Iterable[str], path: str) -> list[Fault]:
    known = list(known)
    return [
        Fault(f"{path}.{key}", f"unknown key. {_meant(str(key), known)}")
        for key in mapping
        if key not in known
    ]


def _meant(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f'Did you mean "{close[0]}"?' if close else f"Known are {', '.join(known)}."


def _read_rule(value: Mapping[str, Any] | str, path: str) -> tuple[Rule | None, list[Fault]]:
    table: Mapping[str, Any] = {"name": value} if isinstance(value, str) else value
    name = table.get("name")
    if not isinstance(name, str):
        return None, [Fault(path, f"{_RULE_FORMS}, got {value!r}.")]
    kind = BY_NAME.get(name)
    if kind is None:
        return None, [Fault(path, f'unknown rule "{name}". {_meant(name, BY_NAME)}')]
    known = [field.name for field in fields(kind)]
    numbers = {key: table[key] for key in known if table.get(key) is not None}
    faults = _unknown(table, ["name", *known], path)
    faults += [
        Fault(f"{path}.{key}", wrong)
        for key, number in numbers.items()
        if (wrong := _not_a_number(number))
    ]
    if faults:
        return None, faults
    try:
        return kind(**numbers), []
    except ValueError as error:
        return None, [Fault(path, f"{error}.")]


def _read_lr(value: Mapping[str, Any] | str, path: str) -> tuple[LearningRate | None, list[Fault]]:
    if not isinstance(value, Mapping):
        return None, [Fault(path, f"expected a table such as {{ value = 0.05 }}, got {value!r}.")]
    faults = _unknown(value, _LR_KEYS, path)
    faults += _lr_faults(value, path)
    return (None, faults) if faults else (LearningRate(**value), [])


def _faults(found: Mapping[str, Any], path: str) -> list[Fault]:
    """What is wrong with the values of the fields that are there."""
    faults: list[Fault] = []
    for key in ("start", "every", "stop"):
        if key in found and not (key == "stop" and found[key] is None):
            faults += _time_faults(found[key], f"{path}.{key}", positive=key == "every")
    if "rule" in found and not isinstance(found["rule"], Rule):
        faults.append(Fault(f"{path}.rule", f"{_RULE_FORMS}, got {found['rule']!r}."))
    lr = found.get("lr")
    if isinstance(lr, LearningRate):
        faults += _lr_faults(vars(lr), f"{path}.lr")
    elif lr is not None:
        faults.append(Fault(f"{path}.lr", f"expected a LearningRate, got {lr!r}."))
    if "nonfinite" in found and found["nonfinite"] not in ("skip", "keep"):
        faults.append(
            Fault(f"{path}.nonfinite", f'expected "skip" or "keep", got {found["nonfinite"]!r}.')
        )
    return faults


def _lr_faults(lr: Mapping[str, Any], path: str) -> list[Fault]:
    wrong: dict[str, str] = {}
    said = {key for key in _LR_KEYS if lr.get(key) is not None}
    if "value" not in said:
        wrong["value"] = "is missing: the rate to reach, a number > 0."
    for key in {"value", "low"} & said:
        if fault := _not_a_number(lr[key]) or ("" if lr[key] > 0 else "must be > 0."):
            wrong[key] = fault
    if "shape" in said and lr["shape"] not in ("cosine", "linear"):
        wrong["shape"] = f'expected "cosine" or "linear", got {lr["shape"]!r}.'
    if {"cycle", "anneal"} <= said:
        wrong["cycle"] = "say either anneal or cycle, and not both."
    elif "cycle" in said and "low" not in said:
        wrong["low"] = "is missing: the rate at the end of each cycle."
    elif "low" in said and "cycle" not in said:
        wrong["low"] = "is for cyclical rates: say cycle too, or leave it out."
    elif {"value", "low"} <= said - wrong.keys() and lr["low"] > lr["value"]:
        wrong["low"] = f"must not lie above value ({lr['value']!r})."
    times = [
        fault
        for key in ("anneal", "cycle")
        if key in said and key not in wrong
        for fault in _time_faults(lr[key], f"{path}.{key}", positive=key == "cycle")
    ]
    return [Fault(f"{path}.{key}", wrong[key]) for key in _LR_KEYS if key in wrong] + times


def _time_faults(value: Any, path: str, *, positive: bool) -> list[Fault]:
    try:
        time = Time.parse(value)
    except ValueError as error:
        return [Fault(path, str(error))]
    if positive and not time.value:
        return [Fault(path, f'{value!r} must be more than 0, for example "1ep" or "1step".')]
    return []


def _not_a_number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"expected a number, got {value!r}."
    return "" if math.isfinite(value) else f"expected a finite number, got {value!r}."
