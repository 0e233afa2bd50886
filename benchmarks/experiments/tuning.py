"""The rates, chosen on images that neither train nor test: as fair to SGD as to SWA.

Of one seed that is none of the experiment's, in PyTorch, by negative log-likelihood: first the rate
of annealed SGD, then, from that rate on, the constant rate of SWA; one budget each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from experiments.arms import Arm, arms
from experiments.cache import Cache
from experiments.images import Images
from experiments.scores import score
from experiments.settings import Experiment

RATES = (0.02, 0.05, 0.1, 0.2)
# Of the rate at first.
SWA_SHARES = (0.1, 0.25, 0.5, 1.0)
SEED = 1000


def tune(images: Images, cache: Cache, progress: Callable[[str], object]) -> dict[str, Any]:
    """All that was tried, and what is best.

    Returns:
      "rate": likelihoods by rate of annealed SGD; "swa_rate": by constant rate; "best": both.
    """
    experiment = images.experiment
    rates = {
        rate: _likelihood(images, replace(experiment, rate=rate), "annealed", cache, progress)
        for rate in RATES
    }
    best = min(rates, key=rates.__getitem__)
    experiment = replace(experiment, rate=best)
    swa_rates = {}
    for share in SWA_SHARES:
        rate = round(share * best, 6)
        varied = replace(experiment, swa_rate=rate)
        swa_rates[rate] = _likelihood(images, varied, "constant", cache, progress)
    chosen = {"rate": best, "swa_rate": min(swa_rates, key=swa_rates.__getitem__)}
    return {"rate": rates, "swa_rate": swa_rates, "best": chosen}


def _likelihood(
    images: Images,
    experiment: Experiment,
    name: str,
    cache: Cache,
    progress: Callable[[str], object],
) -> float:
    from experiments.torch_training import Training

    key = cache.key({**experiment.to_dict(), "tuning": name})
    if (found := cache.load(key)) is None:
        images = images._replace(experiment=experiment)
        training = Training(images, SEED)
        for arm in _path(arms(experiment), name):
            training.begin(arm)
            for epoch in range(arm.begin, min(arm.end, experiment.epochs)):
                training.epoch(images.epoch(SEED, epoch), epoch)
        average = "swa" if name == "constant" else None
        logits = training.logits(average, bn=average is not None)
        found = score(logits, images.test_y)._asdict()
        cache.store(key, found)
    progress(f"{name}: rate {experiment.rate}, of SWA {experiment.swa_rate}: {found['nll']:.4f}")
    return found["nll"]


def _path(every: list[Arm], name: str) -> list[Arm]:
    """The arms from the initial weights to one."""
    by_name = {arm.name: arm for arm in every}
    path = [by_name[name]]
    while path[0].after is not None:
        path.insert(0, by_name[path[0].after])
    return path
