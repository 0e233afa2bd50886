"""One training of the language model, and what is read from it at its budgets."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import schedulefree
import torch
from torch.nn import functional as F

from experiments import language_rates
from experiments.language_network import Transformer, groups, mean_loss
from experiments.language_plan import Plan, Run
from experiments.language_text import CHARACTERS, Text, sequences, starts
from swa_torch import SWA

# The names of what is read besides the averages.
LAST, COOLDOWN = "last weights", "cooldown"


class Learner:
    """A network, its optimizer and its way through the text."""

    def __init__(self, plan: Plan, run: Run, text: Text) -> None:
        self.plan, self.run, self.text = plan, run, text
        torch.manual_seed(run.seed)
        self.model = Transformer(len(CHARACTERS), **plan.network)
        self.optimizer = self._optimizer()
        self.updates = 0
        self.begin = starts(
            len(text.training),
            plan.network["context"],
            # Of the longest budget, also where this training is shorter: the same order for all.
            plan.training["updates"],
            plan.training["batch"],
            run.seed,
        )

    def _optimizer(self) -> torch.optim.Optimizer:
        training = self.plan.training
        parameters = groups(self.model, training["weight_decay"])
        shared = {"lr": self.run.rate, "betas": tuple(training["betas"])}
        if self.run.schedule == "schedule-free":
            optimizer = schedulefree.AdamWScheduleFree(
                parameters, warmup_steps=training["warmup"], **shared
            )
            optimizer.train()
            return optimizer
        return torch.optim.AdamW(parameters, fused=True, **shared)

    def update(self, share: float) -> None:
        """One update, at this share of the peak rate."""
        read, said = sequences(
            self.text.training, self.begin[self.updates], self.plan.network["context"]
        )
        # Schedule-free warms up by itself, and never decays: its share is always 1.
        for group in self.optimizer.param_groups:
            group["lr"] = share * self.run.rate
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(read).flatten(0, 1), said.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.plan.training["clip"])
        self.optimizer.step()
        self.updates += 1

    def copy(self) -> Learner:
        """One that goes on from here on its own, with the same text to come; no averages."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        other.optimizer = other._optimizer()
        # Which shares its tensors, where the state has been loaded before.
        other.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        return other

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Puts in place what a schedule-free optimizer would be used with."""
        if self.run.schedule != "schedule-free":
            yield
            return
        self.optimizer.eval()
        try:
            yield
        finally:
            self.optimizer.train()

    def loss(self, share: float = 1.0) -> float | None:
        """The loss of the weights in place [nats per character]; None if it is no number."""
        with self.evaluating():
            part = getattr(self.text, self.run.part)
            loss = mean_loss(self.model, part, self.plan.network["context"], share)
        return loss if math.isfinite(loss) else None


def train(plan: Plan, run: Run, text: Text, progress: Callable[[], None]) -> dict[str, Any]:
    """Trains, and evaluates at each budget.

    Args:
      progress: called after every update.

    Returns:
      What JSON can hold: "updates" behind each of the "losses" by budget and by the name of what
      was read, "snapshots" likewise, the "curve" as [update, loss of the last weights, loss of an
      average], "seconds" in all.
    """
    begun = time.perf_counter()
    learner = Learner(plan, run, text)
    # Schedule-free averages by itself; what it trains at is no sequence of weights to average.
    averaging = {} if run.schedule == "schedule-free" else _averages(plan, run, learner)
    share = _shares(plan, run)
    cool: dict[int, Learner] = {}
    parameters = sum(p.numel() for p in learner.model.parameters())
    result: dict[str, Any] = {"parameters": parameters, "losses": {}, "updates": {}}
    result |= {"snapshots": {}, "curve": []}
    points = plan.curves["points"]
    on_curve = {round(plan.training["updates"] * i / points) for i in range(1, points + 1)}

    for update in range(1, run.updates + 1):
        learner.update(share(update))
        progress()
        for budget in run.budgets:
            if run.cooldown and update == budget - plan.cooldown(budget):
                cool[budget] = learner.copy()
        if run.curves and update in on_curve:
            curve = plan.curves
            average = averaging.get(run.budgets[-1], {}).get(curve["average"])
            averaged = _of(average, learner, curve["share"]) if average else None
            result["curve"].append([update, learner.loss(curve["share"]), averaged])
        if update not in run.budgets:
            continue
        losses = {LAST: learner.loss()}
        updates = {LAST: learner.updates}
        for name, average in averaging.get(update, {}).items():
            losses[name] = _of(average, learner)
            updates[name] = average.updates
        if update in cool:
            cooled = _cool_down(cool.pop(update), plan, update, progress)
            losses[COOLDOWN], updates[COOLDOWN] = cooled.loss(), cooled.updates
        result["losses"][str(update)] = losses
        result["updates"][str(update)] = updates
        result["snapshots"][str(update)] = {
            name: average.n_averaged for name, average in averaging.get(update, {}).items()
        }
    return result | {"seconds": time.perf_counter() - begun}


def _averages(plan: Plan, run: Run, learner: Learner) -> dict[int, dict[str, SWA]]:
    """An average for each table and budget; one for all budgets if they would be the same."""
    kept: dict[Any, SWA] = {}
    found: dict[int, dict[str, SWA]] = {}
    for budget in run.budgets:
        for name, config in plan.configs().items():
            same = (name, config.schedule(total_steps=budget))
            if same not in kept:
                kept[same] = SWA(learner.optimizer, config, total_steps=budget)
            found.setdefault(budget, {})[name] = kept[same]
    return found


def _shares(plan: Plan, run: Run) -> Callable[[int], float]:
    """The share of the peak rate that makes an update."""
    warmup = plan.training["warmup"]
    if run.schedule == "schedule-free":
        return lambda update: 1.0
    if run.schedule == "linear":
        return language_rates.linear(run.updates, warmup)
    return lambda update: language_rates.constant(update, warmup=warmup)


def _cool_down(learner: Learner, plan: Plan, budget: int, progress: Callable[[], None]) -> Learner:
    """Brings the rate to zero over the rest of the budget."""
    first = learner.updates + 1
    for update in range(first, budget + 1):
        warmup = plan.training["warmup"]
        learner.update(language_rates.decayed(update, warmup=warmup, first=first, last=budget))
        progress()
    return learner


def _of(average: SWA, learner: Learner, share: float = 1.0) -> float | None:
    """The loss of an average; None where the training diverged before its first snapshot."""
    if not average.n_averaged:
        return None
    with average.averaged():
        return learner.loss(share)
