"""The state machine on numpy pytrees: the specification that every adapter is held against."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np

from swa_core import trees
from swa_core.errors import StructureError
from swa_core.rules import Rule
from swa_core.schedule import Schedule
from swa_core.trees import Tree

NonFinite = Literal["skip", "keep"]


class SWAState(NamedTuple):
    """The average and everything needed to go on with it; a pytree without registration.

    Attributes:
      n_updates: completed optimizer updates; ``updates`` reads it too.
      n_averaged: snapshots in the average.
      n_skipped: snapshots left out because they held NaN or Inf.
      total: the sum of the snapshots' weights relative to the newest, float64; see ``rules``.
      average: the running average, of the structure of the weights, float32 or wider; leaves that
        are not averaged (integers, booleans) are None. Before the first snapshot it holds the
        initial weights.
    """

    n_updates: int
    n_averaged: int
    n_skipped: int
    total: float
    average: Tree

    @property
    def updates(self) -> int:
        """``n_updates``. The field cannot be called so: ``optax.tree.get(state, "updates")`` looks
        fields up by name, and has to find the one of optax' own L-BFGS.
        """
        return self.n_updates


def init(weights: Tree) -> SWAState:
    """The state before the first update. Copies: the average shares no memory with the weights.

    Args:
      weights: a tree of arrays of any shape; half precision gets a float32 average.

    Raises:
      StructureError: two leaves have the same path (the keys 1 and "1", for example).

    >>> init({"w": np.zeros(2, np.float16), "steps": np.int32(3)}).average
    {'w': array([0., 0.], dtype=float32), 'steps': None}
    """
    trees.by_path(weights)
    return SWAState(0, 0, 0, 0.0, trees.map_with_path(lambda path, leaf: _copy(leaf), weights))


def update(
    state: SWAState,
    weights: Tree,
    schedule: Schedule,
    rule: Rule,
    *,
    nonfinite: NonFinite = "skip",
) -> SWAState:
    """The state after one more completed optimizer update, which led to ``weights``. Pure.

    On a snapshot ``average <- average + (weights - average) / total`` with
    ``total <- retain(n) * total + 1``; the first snapshot is copied.

    Args:
      state: the state before; it is not changed.
      weights: the weights after the update, of the structure that ``init`` was given.
      schedule: which updates are snapshots.
      rule: how much each snapshot weighs.
      nonfinite: "skip" leaves out a snapshot with NaN or Inf and counts it; "keep" does not look.

    Raises:
      StructureError: structure, shape or dtype differ from what the average holds (looked at on
        snapshots only).
      ValueError: ``nonfinite`` is neither.

    Source:
      Izmailov et al. 2018, arXiv:1803.05407, Alg. 1.

    >>> from swa_core import Schedule, Uniform
    >>> state = init({"w": np.float32([1, 1])})
    >>> for value in (2, 3, 4):
    ...     state = update(state, {"w": np.float32([value, 0])}, Schedule(2, 1), Uniform())
    >>> state.n_averaged, state.average["w"]
    (2, array([3.5, 0. ], dtype=float32))
    """
    if nonfinite not in ("skip", "keep"):
        raise ValueError(f'nonfinite must be "skip" or "keep", got {nonfinite!r}')
    state = state._replace(n_updates=state.n_updates + 1)
    if not schedule.is_snapshot(state.n_updates):
        return state
    new = _matched(state, weights)
    if nonfinite == "skip" and not all(np.isfinite(leaf).all() for leaf in new.values()):
        return state._replace(n_skipped=state.n_skipped + 1)
    if state.n_averaged:
        total = float(rule.retain(float(state.n_averaged)) * state.total + 1.0)
        average = trees.map_with_path(
            lambda path, held: _mixed(held, new[path], 1.0 / total), state.average
        )
    else:
        total = 1.0
        average = trees.map_with_path(lambda path, held: _copy(new[path]), state.average)
    return state._replace(n_averaged=state.n_averaged + 1, total=total, average=average)


def _copy(leaf: Any) -> Any:
    array = np.asarray(leaf)
    if not trees.is_inexact(array.dtype):
        return None
    return array.astype(trees.accumulator_dtype(array.dtype), copy=True)


def _mixed(average: Any, new: Any, share: float) -> Any:
    # An Inf that is kept on request meets itself as NaN, and that is no news.
    with np.errstate(invalid="ignore"):
        step = np.asarray(new.astype(average.dtype, copy=False) - average)
        step *= average.dtype.type(share)
        step += average
    return step


def _matched(state: SWAState, weights: Tree) -> dict[str, Any]:
    """The averaged leaves of ``weights`` by path, if they are those of the average."""
    held = trees.by_path(state.average)
    new = {path: np.asarray(leaf) for path, leaf in trees.by_path(weights).items()}
    check_leaves(
        held,
        new,
        f"cannot add snapshot {state.n_averaged + 1} at update {state.n_updates}",
        "every snapshot needs the same weights. If the model changed on purpose, start a new "
        "average.",
    )
    return {path: new[path] for path in held}


def check_leaves(held: dict[str, Any], new: dict[str, Any], what: str, hint: str) -> None:
    """Refuses leaves that differ from those of an average, naming the first that does.

    Args:
      held: the leaves of the average by path.
      new: the leaves to be matched with it; those that are not averaged (integers, booleans) may
        be among them.
      what: what cannot be done, the beginning of the message.
      hint: what to do about it.

    Raises:
      StructureError: a leaf is missing, unexpected, or of another shape or accumulator dtype.
    """
    for path, average in held.items():
        if path not in new:
            raise StructureError(f"{what}: leaf '{path}' is missing.", hint=hint)
        leaf = new[path]
        if leaf.shape != average.shape:
            raise StructureError(
                f"{what}: leaf '{path}' has shape {leaf.shape}, but the running average holds "
                f"{average.shape}.",
                hint=hint,
            )
        averaged = trees.is_inexact(leaf.dtype)
        if not averaged or trees.accumulator_dtype(leaf.dtype) != average.dtype:
            raise StructureError(
                f"{what}: leaf '{path}' has dtype {leaf.dtype}, but the running average holds "
                f"{average.dtype}.",
                hint=hint,
            )
    for path, leaf in new.items():
        if path not in held and trees.is_inexact(leaf.dtype):
            raise StructureError(
                f"{what}: leaf '{path}' of dtype {leaf.dtype} is not in the running average; it "
                "is new, or was no floating-point array before.",
                hint=hint,
            )
