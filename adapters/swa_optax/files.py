"""The average as a file that any framework reads: see ``swa_core.save_average``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import swa_core
from swa_core import Schedule, SWAConfig, SWAState
from swa_core.averaging import check_leaves
from swa_optax.finding import find_state
from swa_optax.paths import Tree
from swa_optax.reading import refuse_ensemble
from swa_optax.resolving import Config
from swa_optax.saving import named, restored, state_to_dict


def save_average(
    path: str | os.PathLike[str],
    opt_state: Tree,
    config: Config,
    *,
    schedule: Schedule | None = None,
) -> None:
    """Writes the average of an optimizer state into one safetensors file.

    The file outlives this framework: ``swa_core.load_average`` reads it in any, and every reader
    of safetensors finds the averages under the paths of the parameters (``dense/kernel``).

    Args:
      path: the file, by custom ``*.safetensors``; replaced if it is there.
      opt_state: the state of an optimizer with ``swa`` in it, of any nesting. Arrays on the devices
        of several processes are gathered: all of them have to call this, and each writes the file.
      config: what it was made with: a ``SWAConfig``, a mapping, or the path of a file.
      schedule: of the training (``config.schedule(...)``); who goes on is held to it.

    Raises:
      StateError: the state holds no average, or several; or two leaves have the same path.
      ConfigError: faults in the configuration.
      OSError: the file cannot be written; an older one is still there.

    >>> import tempfile
    >>> import jax.numpy as jnp
    >>> file = tempfile.mkdtemp() + "/average.safetensors"
    >>> save_average(file, SWAState(7, 2, 0, 2.0, {"w": jnp.zeros(1)}), SWAConfig())
    >>> load_average(file, SWAState(0, 0, 0, 0.0, {"w": jnp.ones(1)})).average
    {'w': Array([0.], dtype=float32)}
    """
    config = SWAConfig.of(config)
    saved = state_to_dict(opt_state)
    # Before the first snapshot the state holds the initial weights, which are no average.
    average = saved["average"] if saved["n_averaged"] else {}
    counters = {name: saved[name] for name in swa_core.saving.COUNTERS}
    state = SWAState(**counters, average=average)
    swa_core.save_average(path, state, config, schedule=schedule, framework="optax")


def load_average(
    path: str | os.PathLike[str],
    opt_state: Tree,
    *,
    config: Config | None = None,
    schedule: Schedule | None = None,
    names: Mapping[str, str] | None = None,
    transform: Mapping[str, Callable[[Any], Any]] | None = None,
) -> Tree:
    """An optimizer state that goes on from the average in a file, whoever saved it.

    Args:
      path: the file.
      opt_state: of the training that goes on (of ``tx.init(params)``).
      config: of this training, whose rule is then checked.
      schedule: of this training, checked if the file tells its own.
      names: for every averaged parameter, by path, the name in the file; by default the same.
      transform: for parameters that lie otherwise in the file, by path, a function that makes the
        one numpy array out of the other (``numpy.transpose`` for the weight of a torch ``Linear``).

    Returns:
      The optimizer state; arrays lie on the devices where those of ``opt_state`` lie.

    Raises:
      StateError: no saved average, damaged, newer, or of another schedule or rule.
      StructureError: of other parameters.
    """
    found = swa_core.load_average(path)
    found.check(schedule, None if config is None else SWAConfig.of(config).rule)
    if names is not None or transform is not None:
        same = {name: name for name in found.state.average}
        found = found.renamed(same if names is None else names, transform)
    found.refuse_counts()
    now = find_state(opt_state)
    refuse_ensemble(now)
    own = named(now.average)
    state = found.state
    if state.n_averaged:
        what = "cannot load the saved average"
        hint = "pass names={...} if parameters are named otherwise in the file."
        check_leaves(state.average, own, what, hint)
    else:
        state = state._replace(average=own)
    return restored(opt_state, now, state)
