"""The parts of a run: each a benchmark in a process of its own."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).parents[1]
BACKENDS = ("tensorflow", "jax", "torch")
FRAMEWORKS = ("torch", *(f"keras-{backend}" for backend in BACKENDS), "optax")
CHECKPOINTS = "checkpoints"
# Keras' three grow alike; the others when they are asked for.
GROWING = ("torch", "keras-jax", "optax")
# Whether all runs can be seen on one backend of Keras.
QUICK = ("torch", "keras-jax", "optax")


@dataclass(frozen=True)
class Part:
    """One benchmark.

    Attributes:
      name: the framework it is of.
      is_growth: whether it measures growth.
      command: its script and options, without those for rounds and JSON.
      environment: what it adds to the environment.
      needs: packages without which it cannot run.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...]
    is_growth: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """What is printed, and the name of its file."""
        return f"growth-{self.name}" if self.is_growth else self.name

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"NOT INSTALLED: {', '.join(absent)}" if absent else None

    def arguments(self, rounds: int, json: Path, *, quick: bool) -> list[str]:
        """The whole command."""
        script, *options = self.command
        size = ["--quick"] if quick else ["--rounds", str(rounds)]
        return [sys.executable, str(FOLDER / script), *options, *size, "--json", str(json)]


def overhead(name: str, *, quick: bool) -> Part:
    """The benchmark of a framework."""
    if name == "torch":
        # The largest set takes 10 GB and minutes; growth has one of its size.
        sets = "resnet50" if quick else "resnet50,2000x1000"
        return Part(name, ("torch_overhead.py", "--sets", sets), ("torch",))
    if name == "optax":
        # As large as the networks that are trained in the others; scans are a matter of their own.
        options = ("--weights", "8.4", "--tables", "steps,constant,snapshots,skipped")
        return Part(name, ("optax_overhead.py", *options), ("jax", "optax"))
    if name == CHECKPOINTS:
        return Part(name, ("checkpoint_average.py", "--slow-rounds", "3"), ("safetensors", "torch"))
    backend = name.removeprefix("keras-")
    # Of a snapshot alone, as in the others; of all it takes minutes.
    memory = ("--memory", "float32")
    return Part(name, ("keras_overhead.py", "--backend", backend, *memory), ("keras", backend))


def growth(name: str) -> Part:
    """The growth of a snapshot in a framework."""
    framework, _, backend = name.partition("-")
    environment = {"KERAS_BACKEND": backend} if backend else {}
    needs = {"torch": ("torch",), "optax": ("jax", "optax"), "keras": ("keras", backend)}[framework]
    return Part(name, ("growth.py", framework), needs, True, environment)


def parts(names: list[str], growing: list[str], *, quick: bool) -> list[Part]:
    """All parts of a run, in the order in which they run.

    Args:
      names: the benchmarks.
      growing: those of which growth is measured, too.
      quick: whether all is tiny.
    """
    out = [overhead(name, quick=quick) for name in names]
    return out + [growth(name) for name in growing]
