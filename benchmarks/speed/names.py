"""Who is who in the tables of the benchmarks, which name their rows each in its own way."""

from __future__ import annotations

import re

OURS = ("swa_torch", "swa_keras", "swa_optax", "swa average")
# Rows to compare with, which average nothing, and the loop in C.
NO_PEERS = (
    "C loop",
    "plain training",
    "without averaging",
    "training",
    "a callback that does nothing",
    "the bare optimizer's step",
    "an average carried along, untouched",
    "plain copy of the same bytes",
    "cat of the same files",
)
# The same contender under the name that it has beside a snapshot alone.
ALIASES = {
    "swa_keras, every update": 'swa_keras, nonfinite="skip"',
    'swa_keras, every update, nonfinite="keep"': 'swa_keras, nonfinite="keep"',
    "swa_keras.SWAOptimizer, every update": "swa_keras.SWAOptimizer",
    "swa_optax.swa, every update, keep": "swa_optax.swa, keep",
    "swa_optax.swa, every update, skip": "swa_optax.swa, skip",
    "swa_optax.accumulate, every update": "swa_optax.accumulate, skip",
    "optax.incremental_update in the loop": "optax.incremental_update, jitted",
}
# Whose updates that take no snapshot a row stands for.
SKIPPING = {
    "swa_torch": ('swa_torch, nonfinite="keep"', 'swa_torch, nonfinite="skip"'),
    "swa_keras, the hooks of fit": ('swa_keras, nonfinite="keep"', 'swa_keras, nonfinite="skip"'),
    "swa_keras, update()": (),  # of a loop without fit, which the table of all has
    "swa_optax.swa, never due, keep": ("swa_optax.swa, keep",),
    "swa_optax.swa, never due, skip": ("swa_optax.swa, skip",),
}


def is_ours(name: str) -> bool:
    """Whether a row is of this library.

    >>> is_ours("swa_torch, never due"), is_ours("AveragedModel, swa_multi_avg")
    (True, False)
    """
    return name.startswith(OURS)


def is_peer(name: str) -> bool:
    """Whether a row is of somebody else who averages."""
    return not is_ours(name) and name not in NO_PEERS


def how_often(name: str) -> str:
    """How often a row averages in a training: "never", "sometimes" or "always".

    >>> [how_often(n) for n in ("swa_torch, never due", "where, every 10th", "torch-ema")]
    ['never', 'sometimes', 'always']
    """
    if re.search(r"never due|not due|untouched", name) or name in NO_PEERS:
        return "never"
    return "sometimes" if re.search(r"every (10th|epoch)", name) else "always"


def canonical(name: str) -> str:
    """The name of a contender, whatever table it stands in."""
    return ALIASES.get(name, name)
