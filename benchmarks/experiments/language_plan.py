"""What the language model experiment runs, as its toml says it."""

from __future__ import annotations

import copy
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from swa_core import SWAConfig

FILE = Path(__file__).with_name("language.toml")

Schedule = Literal["constant", "linear", "schedule-free"]


@dataclass(frozen=True)
class Plan:
    """The tables of the toml, those of ``[quick]`` put over them if asked for."""

    text: dict[str, Any]
    network: dict[str, Any]
    training: dict[str, Any]
    curves: dict[str, Any]
    sweep: dict[str, Any]
    averages: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: Path = FILE, *, quick: bool = False) -> Plan:
        """Reads the toml.

        Raises:
          ConfigError: an ``[swa]`` table of an average is faulty.
        """
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
        for name, changed in tables.pop("quick").items():
            if quick:
                tables[name] |= changed
        tables["averages"] = {name: table["swa"] for name, table in tables["averages"].items()}
        plan = cls(**tables)
        plan.configs()  # so that a fault is seen before hours of training
        return plan

    @property
    def budgets(self) -> list[int]:
        """The budgets in updates, the longest one last."""
        return [round(share * self.training["updates"]) for share in self.training["budgets"]]

    def cooldown(self, budget: int) -> int:
        """How many of a budget's updates bring a constant rate to zero."""
        return round(self.training["cooldown"] * budget)

    def configs(self) -> dict[str, SWAConfig]:
        """The averages by name."""
        return {
            name: SWAConfig.from_dict(table, source=FILE.name, path=f'averages."{name}".swa')
            for name, table in self.averages.items()
        }


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
      schedule: of the learning rate: "constant" and "schedule-free" serve every budget up to
        their length, "linear" the one that it decays over.
      rate: the peak.
      seed: of the initialisation and of the order of the text.
      updates: how long.
      part: what it is evaluated on, "validation" or "test".
      budgets: where it is evaluated [updates].
      cooldown: whether, at each budget, a copy of a constant training is also brought to zero.
      curves: whether it is evaluated on its way, too.
    """

    schedule: Schedule
    rate: float
    seed: int
    updates: int
    part: Literal["validation", "test"]
    budgets: tuple[int, ...]
    cooldown: bool = False
    curves: bool = False

    def configuration(self, plan: Plan, text_hash: str, versions: dict[str, str]) -> dict[str, Any]:
        """All that its result depends on, for the cache."""
        said = asdict(self) | {"budgets": list(self.budgets)}
        tables = copy.deepcopy(asdict(plan))
        del tables["sweep"]  # of which this is one, or was chosen by one
        return {"experiment": "language model", "run": said, "plan": tables} | {
            "text": text_hash,
            "versions": versions,
        }
