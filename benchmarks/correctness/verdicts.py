"""From what was observed to what it is called: pure functions, tested on wrong averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from correctness.cells import Cell, number
from correctness.scripts import Array

# Float32 keeps a mean of 10 000 snapshots to 2e-6, and an EMA of decay .9999, whose complement a
# float32 holds to 6e-8 / 1e-4, to about 1e-3 of its way. Half precision is a thousand times worse.
ACCURATE = 1e-5
# What pooling in float32 loses; weighing batches wrongly costs per cents.
STATISTICS = 1e-5
Tree = Mapping[str, Array]


def relative_error(found: Tree, expected: Tree) -> float:
    """The norm of the difference over the norm of what is expected, over all leaves."""
    difference = sum(np.sum((found[name] - expected[name]) ** 2) for name in expected)
    return float(np.sqrt(difference / sum(np.sum(value**2) for value in expected.values())))


def same(found: Tree, expected: Tree) -> bool:
    """Whether all leaves are equal bit for bit (values of one dtype, in float64)."""
    return all(np.array_equal(found[name], expected[name]) for name in expected)


def accuracy(found: Tree, expected: Tree) -> Cell:
    """How far an average is from its rule's in float64."""
    error = relative_error(found, expected)
    return Cell(number(error), bool(error < ACCURATE), error)


def integers(held: float, counts: Sequence[int], averaged: float) -> Cell:
    """What became of an integer buffer.

    Args:
      held: its value in the model that is evaluated.
      counts: its values in the training, the initial one first.
      averaged: their average by the peer's rule, in float64.
    """
    if held == counts[-1]:
        return Cell("the model's", right=True)
    if held == counts[0]:
        return Cell(f"stays at its first value ({held:.0f})", right=False)
    # Cut anew at every snapshot, which takes up to 1 each.
    if abs(held - averaged) <= len(counts) / 2:
        return Cell(f"averaged ({held:.0f}, not {counts[-1]})", right=False)
    return Cell(f"corrupted ({held:.0f}, not {counts[-1]})", right=False)


def tied(
    found: Mapping[str, Tree | Array], once: Array, twice: Array, *, still_tied: bool | None
) -> Cell:
    """How often weights with two names were averaged, and whether they stay one.

    Args:
      found: the average under each name.
      once: the average by the peer's rule.
      twice: the same if each snapshot was mixed in twice.
      still_tied: whether both names are one array in the model that is evaluated.
    """
    values = list(found.values())
    if all(np.allclose(value, once, rtol=1e-5, atol=1e-6) for value in values):
        text, right = "averaged once", True
    elif all(np.allclose(value, twice, rtol=1e-5, atol=1e-6) for value in values):
        text, right = "averaged twice", False
    else:
        text, right = "neither average", False
    if still_tied is None:
        return Cell(text, right)
    return Cell(f"{text}, {'stay' if still_tied else 'no longer'} tied", right and still_tied)


def statistics(found: Tree, mean: Array, var: Array, how: str, training: Tree | None) -> Cell:
    """How far batch-norm statistics are from those of the pooled data.

    Args:
      found: "mean" and "var" in the model that is evaluated.
      mean: of the pooled data.
      var: of the pooled data, by the convention of the framework.
      how: what recomputed them, or "" for nothing.
      training: the statistics of the model in training, None where they are not at hand.
    """
    off_mean = np.max(np.abs(found["mean"] - mean) / np.sqrt(var))
    error = float(max(off_mean, np.max(np.abs(found["var"] - var) / var)))
    if how:
        return Cell(number(error), bool(error < STATISTICS), error)
    theirs = training is not None and same(found, training)
    where = "the training's" if theirs else "averaged over the training"
    return Cell(f"none recomputed: {where}, {number(error)} off", right=False, value=error)


def resumed(found: Tree, uninterrupted: Tree) -> Cell:
    """Whether an interrupted run ends on the average of the one that was not."""
    if same(found, uninterrupted):
        return Cell("bit-equal", right=True)
    error = relative_error(found, uninterrupted)
    return Cell(f"differs, {number(error)}", right=False, value=error)


def back(before: Tree, after: Tree, average: Tree) -> Cell:
    """Which weights are in the model once the average is no longer lent."""
    if same(after, before):
        return Cell("training weights", right=True)
    if relative_error(after, average) < 1e-2 * relative_error(before, average):
        return Cell("the average is left in", right=False)
    error = relative_error(after, before)
    return Cell(f"training weights, {number(error)} off", right=False, value=error)


def nonfinite(found: Tree, without: Tree) -> Cell:
    """What one NaN did to an average.

    Args:
      found: the average at the end, many finite snapshots later.
      without: the average by the peer's rule of the snapshots that are finite.
    """
    if not all(np.isfinite(value).all() for value in found.values()):
        return Cell("NaN for ever", right=False)
    if relative_error(found, without) < ACCURATE:
        return Cell("left out", right=True)
    return Cell("finite, but another average", right=False)


def counted(average: Array, intended: Sequence[int]) -> Cell:
    """Which updates an average of one-hot weights holds.

    Args:
      average: the share of each update, initial weights first.
      intended: the updates that should be in it.
    """
    held = [int(update) for update in np.flatnonzero(np.abs(average) > 1e-9)]
    return Cell(runs(held), right=held == list(intended))


def runs(updates: Sequence[int]) -> str:
    """Numbers in short.

    >>> runs([0, 3, 4, 5, 9, 13])
    '0, 3-5, 9, 13'
    """
    groups: list[list[int]] = []
    for update in updates:
        if groups and update == groups[-1][-1] + 1:
            groups[-1].append(update)
        else:
            groups.append([update])
    parts: list[str] = []
    for group in groups:
        if len(group) > 2:
            parts.append(f"{group[0]}-{group[-1]}")
        else:
            parts.extend(str(update) for update in group)
    return ", ".join(parts) or "none"


def beginning(found: Tree, initial: Tree, live: Tree) -> Cell:
    """What is read before there is any snapshot, some updates into the training."""
    if all((value == 0).all() for value in found.values()):
        return Cell("zeros", right=False)
    if same(found, live):
        return Cell("the live weights", right=True)
    if same(found, initial):
        return Cell("the initial weights", right=False)
    return Cell("other weights", right=False)


def moved(found: Tree, expected: Tree, initial: Tree) -> Cell:
    """Whether an average took in what a wrapped model handed it."""
    if relative_error(found, expected) < ACCURATE:
        return Cell("averaged", right=True)
    if same(found, initial):
        return Cell("stands still", right=False)
    return Cell(f"another average, {number(relative_error(found, expected))} off", right=False)


def memory(shared: Mapping[str, bool]) -> Cell:
    """Where an average shares memory with the weights.

    Args:
      shared: for each moment, in order, whether it does.
    """
    moments = [moment for moment, sharing in shared.items() if sharing]
    return Cell(f"shared {' and '.join(moments)}" if moments else "its own", right=not moments)


def copied(outcomes: Mapping[str, Tree | BaseException], uninterrupted: Tree) -> Cell:
    """Whether copies of a running averager go on.

    Args:
      outcomes: for each way of copying, the average at the end or what was raised.
    """
    words = {}
    for way, found in outcomes.items():
        if isinstance(found, BaseException):
            words[way] = f"raises {type(found).__name__}"
        else:
            words[way] = "goes on" if same(found, uninterrupted) else "another average"
    text = "; ".join(f"{way} {word}" for way, word in words.items())
    right = all(word == "goes on" for word in words.values())
    return Cell("both go on" if right else text, right)
