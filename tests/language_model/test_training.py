"""The arms do what their names say, in as many updates as they say."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from experiments import language_rates
from experiments.language_network import mean_loss
from experiments.language_plan import Run
from experiments.language_training import COOLDOWN, LAST, Learner, train


def nothing(*_):
    pass


def a_run(plan, schedule="constant", **changes):
    longest = plan.budgets[-1]
    run = Run(schedule, 0.01, 3, longest, "test", tuple(plan.budgets), cooldown=False)
    return dataclasses.replace(run, **changes)


def trained_by_hand(plan, run, text, share):
    """Weights after each update, float64; the learner."""
    learner, weights = Learner(plan, run, text), []
    for update in range(1, run.updates + 1):
        learner.update(share(update))
        parameters = learner.model.parameters()
        weights.append(torch.nn.utils.parameters_to_vector(parameters).detach().double())
    return learner, weights


@pytest.mark.parametrize("schedule", ["constant", "linear", "schedule-free"])
def test_everything_read_at_a_budget_has_spent_it(plan, text, schedule):
    budgets = (plan.budgets[-1],) if schedule == "linear" else tuple(plan.budgets)
    run = a_run(plan, schedule, budgets=budgets, cooldown=schedule == "constant")
    spent = []
    result = train(plan, run, text, lambda: spent.append(1))
    assert list(result["losses"]) == list(map(str, budgets))
    for budget in budgets:
        updates = result["updates"][str(budget)]
        assert updates.keys() == result["losses"][str(budget)].keys()
        assert set(updates.values()) == {budget}
    cooled = sum(map(plan.cooldown, budgets)) if run.cooldown else 0
    assert len(spent) == run.updates + cooled


def test_a_budget_on_the_way_is_a_training_of_that_length(plan, text):
    first = str(plan.budgets[0])
    long = train(plan, a_run(plan, cooldown=True), text, nothing)
    alone = a_run(plan, updates=plan.budgets[0], budgets=(plan.budgets[0],), cooldown=True)
    short = train(plan, alone, text, nothing)
    assert long["losses"][first] == short["losses"][first]
    assert long["snapshots"][first] == short["snapshots"][first]


# A schedule-free optimizer computes the weights that it trains from those that it is evaluated
# with, so looking rounds them.
@pytest.mark.parametrize(("schedule", "rounding"), [("constant", 0), ("schedule-free", 1e-5)])
def test_looking_does_not_disturb(plan, text, schedule, rounding):
    last = str(plan.budgets[-1])
    few = train(plan, a_run(plan, schedule, budgets=(plan.budgets[-1],)), text, nothing)
    looked = a_run(plan, schedule, cooldown=schedule == "constant", curves=True)
    many = train(plan, looked, text, nothing)
    assert len(many["curve"]) == plan.curves["points"]
    assert not few["curve"]
    for name, loss in few["losses"][last].items():
        assert many["losses"][last][name] == pytest.approx(loss, rel=rounding, abs=0)


def test_linear_decay_is_trained_at_its_rates(plan, text):
    run = a_run(plan, "linear", budgets=(plan.budgets[-1],))
    warmup, total = plan.training["warmup"], run.updates

    def share(update):
        return update / warmup if update <= warmup else (total + 1 - update) / (total - warmup)

    learner, _ = trained_by_hand(plan, run, text, share)
    result = train(plan, run, text, nothing)
    assert result["losses"][str(total)][LAST] == pytest.approx(learner.loss(), abs=1e-6)


def test_cooling_is_a_training_whose_rate_falls_at_its_end(plan, text):
    run = a_run(plan, cooldown=True)
    budget, cooldown = plan.budgets[-1], plan.cooldown(plan.budgets[-1])
    assert cooldown == 8
    warmup = plan.training["warmup"]

    def share(update):
        left = budget + 1 - update
        return min(1, update / warmup, left / cooldown)

    learner, _ = trained_by_hand(plan, run, text, share)
    result = train(plan, run, text, nothing)
    found = result["losses"][str(budget)]
    assert found[COOLDOWN] == learner.loss()
    assert found[COOLDOWN] != found[LAST]


def test_rates_reach_the_optimizer_and_end_above_zero(plan, text):
    learner = Learner(plan, a_run(plan, "linear"), text)
    rate = language_rates.linear(40, 4)
    learner.update(rate(1))
    assert {group["lr"] for group in learner.optimizer.param_groups} == {0.01 / 4}
    shares = [rate(update) for update in range(1, 42)]
    assert max(shares) == shares[3] == shares[4] == 1
    assert shares[4:] == sorted(shares[4:], reverse=True)
    assert shares[39] == pytest.approx(1 / 36)
    assert shares[40] == 0


def test_averages_are_the_means_that_their_tables_say(plan, text):
    run = a_run(plan)
    learner, weights = trained_by_hand(plan, run, text, lambda update: min(1, update / 4))
    found = train(plan, run, text, nothing)
    context = plan.network["context"]
    windows = {
        ("uniform, last 25 %", 40): [30, 40],
        ("uniform, last 50 %", 40): [20, 30, 40],
        ("uniform, last 50 %", 20): [10, 20],
    }
    for (name, budget), snapshots in windows.items():
        mean = torch.stack([weights[update - 1] for update in snapshots]).mean(0).float()
        torch.nn.utils.vector_to_parameters(mean, learner.model.parameters())
        loss = mean_loss(learner.model, text.test, context)
        assert found["snapshots"][str(budget)][name] == len(snapshots)
        assert found["losses"][str(budget)][name] == pytest.approx(loss, abs=1e-6)

    # A half-life of 10 snapshots: each weighs 2^(1/10) as much as the one before it.
    shares = torch.tensor([2 ** (number / 10) for number in range(4)], dtype=torch.float64)
    picked = torch.stack([weights[update - 1] for update in (10, 20, 30, 40)])
    mean = (shares[:, None] * picked).sum(0) / shares.sum()
    torch.nn.utils.vector_to_parameters(mean.float(), learner.model.parameters())
    loss = mean_loss(learner.model, text.test, context)
    assert found["losses"]["40"]["EMA, half-life 100"] == pytest.approx(loss, abs=1e-6)


def test_the_loss_is_of_every_character_once(plan, text):
    learner = Learner(plan, a_run(plan), text)
    part, context = text.test[:50], plan.network["context"]
    losses = []
    with torch.no_grad():
        for place in range(48):  # three contexts of 16; the 49th has none to itself
            begin = place // context * context
            logits = learner.model(part[None, begin : place + 1])[0, -1]
            losses.append(-torch.log_softmax(logits, 0)[part[place + 1]].item())
    assert mean_loss(learner.model, part, context) == pytest.approx(sum(losses) / 48, abs=1e-5)


def test_the_network_does_not_see_what_is_to_come(plan, text):
    model = Learner(plan, a_run(plan), text).model
    one = text.test[None, :16].clone()
    other = one.clone()
    other[0, 8:] = (other[0, 8:] + 1) % 90
    with torch.no_grad():
        assert torch.equal(model(one)[0, :8], model(other)[0, :8])
        assert not torch.equal(model(one)[0, 8:], model(other)[0, 8:])


def test_a_training_that_diverges_has_no_loss(plan, text):
    result = train(plan, a_run(plan, rate=1e30), text, nothing)
    assert result["losses"][str(plan.budgets[-1])][LAST] is None
