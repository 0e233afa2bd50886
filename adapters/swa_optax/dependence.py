"""How the running statistics that a forward returns depend on those that it was given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# For one value: by the places of the arguments that it depends on, how many multiplications (or
# divisions) are in the longest chain between; None if it is that very argument.
Chains = dict[int, "int | None"]

# What makes another thing of a running average than a multiple of it, as batch renormalisation
# does: a chain through one of these counts below zero.
_CURVED = frozenset(
    ["sqrt", "rsqrt", "square", "pow", "integer_pow", "exp", "log", "abs", "dot_general"]
)
_THROUGH_A_CURVE = -(10**9)

# How often something happens in a loop of which only the data tell when it ends.
UNKNOWN = 10**6


def chains(jaxpr: Any, inputs: Sequence[Chains], counted: str = "mul") -> list[Chains]:
    """How each result of a traced function depends on its arguments.

    A running average that a forward updates once is multiplied once on its way, by its momentum,
    or its difference to the batch is divided once; one that no forward updates comes out as it
    went in.

    Args:
      jaxpr: of ``jax.make_jaxpr``.
      inputs: for each argument, what it depends on itself.
      counted: what is counted, "mul" or "div".

    >>> import jax
    >>> def forward(mean, frozen, x):
    ...     for part in x:
    ...         mean = 0.9 * mean + 0.1 * part
    ...     return mean, frozen
    >>> traced = jax.make_jaxpr(forward)(1.0, 1.0, (2.0, 3.0))
    >>> chains(traced.jaxpr, [{0: None}, {1: None}, {}, {}])
    [{0: 2}, {1: None}]
    """
    known: dict[Any, Chains] = {}

    def of(atom: Any) -> Chains:
        return {} if hasattr(atom, "val") else known.get(atom, {})

    known.update(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        arguments = [of(atom) for atom in equation.invars]
        if any(arguments):
            known.update(zip(equation.outvars, _through(equation, arguments, counted), strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _through(equation: Any, inputs: list[Chains], counted: str) -> list[Chains]:
    name, params = equation.primitive.name, equation.params
    if name == "cond":
        branches = [chains(branch.jaxpr, inputs[1:], counted) for branch in params["branches"]]
        return [_longest(results) for results in zip(*branches, strict=True)]
    if name == "while":
        body, consts = params["body_jaxpr"].jaxpr, params["body_nconsts"]
        results = chains(body, inputs[params["cond_nconsts"] :], counted)
        return _repeated(body, results, consts, len(results), UNKNOWN, counted)
    inner = [_opened(value) for value in params.values() if hasattr(_opened(value), "eqns")]
    same = [
        jaxpr
        for jaxpr in inner
        if len(jaxpr.invars) == len(inputs) and len(jaxpr.outvars) == len(equation.outvars)
    ]
    if len(inner) == 1 and same:  # jit, checkpoint, scan, shard_map, custom derivatives
        results = chains(same[0], inputs, counted)
        if name != "scan":
            return results
        consts, carried = params["num_consts"], params["num_carry"]
        return _repeated(same[0], results, consts, carried, params["length"], counted)
    step = _THROUGH_A_CURVE if name in _CURVED else int(name == counted)
    longest = _longest(inputs)
    return [{place: (count or 0) + step for place, count in longest.items()}] * len(
        equation.outvars
    )


def _repeated(
    jaxpr: Any, results: list[Chains], consts: int, carried: int, times: int, counted: str
) -> list[Chains]:
    """What a loop carries from step to step is multiplied in each of them."""
    steps = chains(jaxpr, [{place: None} for place in range(len(jaxpr.invars))], counted)
    for place, chain in enumerate(steps[:carried]):
        if chain.get(consts + place):  # by itself, before the step
            results[place] = {
                source: count and count * times for source, count in results[place].items()
            }
    return results


def _opened(value: Any) -> Any:
    return getattr(value, "jaxpr", value)


def _longest(several: Sequence[Chains]) -> Chains:
    found: Chains = {}
    for chain in several:
        for place, count in chain.items():
            found[place] = max(found[place] or 0, count or 0) if place in found else count
    return found
