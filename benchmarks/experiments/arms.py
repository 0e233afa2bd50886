"""The trainings of one seed: a trunk that all share, and what branches off it.

Every arm has the paper's schedule (Izmailov et al. 2018; the authors' train.py): over its horizon,
the rate is constant for a half, falls linearly until 90 %, and stays. With averaging the horizon
is the start of averaging, and the rate falls to the constant one; without, it is the whole budget,
and it falls to 1 % of the first. As long as two arms have the same rate they are the same training,
which is made once::

    epochs 0      6             11       16        20      (16 are one budget, averaging from 12)
           trunk -+- annealed -----------+
                  +- annealed 1.25 ----------------+
                  +- approach --+- constant -------+
                                +- cyclical -+
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.settings import Experiment
from swa_core import EMA, SWAConfig
from swa_core.learning_rate import LearningRate


@dataclass(frozen=True)
class Arm:
    """One stretch of training.

    Attributes:
      name: of the arm; its last state is known by it.
      after: the arm from whose last state it goes on, or None: from the initial weights.
      begin, end: epochs that are over before and after it.
      first_rate, last_rate, horizon: its schedule [-, -, epochs].
      averages: what is averaged: for each a configuration, whose times count from ``begin``.
      looks: after which epochs its scores are taken.
    """

    name: str
    after: str | None
    begin: int
    end: int
    first_rate: float
    last_rate: float
    horizon: int
    averages: tuple[tuple[str, SWAConfig], ...] = ()
    looks: tuple[int, ...] = ()

    def rate(self, epoch: int) -> float:
        """The learning rate in an epoch, of which the first is 0.

        >>> arm = Arm("x", None, 0, 10, first_rate=1.0, last_rate=0.2, horizon=10)
        >>> [round(arm.rate(epoch), 2) for epoch in range(11)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]
        """
        share = epoch / self.horizon
        if share <= 0.5:
            return self.first_rate
        if share >= 0.9:
            return self.last_rate
        return self.first_rate + (self.last_rate - self.first_rate) * (share - 0.5) / 0.4


def arms(experiment: Experiment) -> list[Arm]:
    """All arms of a seed, each after the one that it goes on from."""
    budget, start = experiment.epochs, experiment.start
    longer = budget + budget // 4
    # The first snapshot is an update of the arm that averages: it begins an epoch before.
    shared, before = start // 2, start - 1
    swa = replace(experiment.config, start="1ep", lr=None)
    ema = replace(experiment.config, start="1ep", every="1step", rule=EMA(experiment.ema_decay))
    cyclical = replace(
        swa,
        lr=LearningRate(value=experiment.cycle_high, low=experiment.cycle_low, cycle="1ep"),
    )
    falling = {"first_rate": experiment.rate, "last_rate": experiment.rate / 100}
    to_swa = {"first_rate": experiment.rate, "last_rate": experiment.swa_rate, "horizon": start}
    return [
        Arm("trunk", None, 0, shared, **to_swa),
        Arm(
            "annealed", "trunk", shared, budget, **falling,
            horizon=budget, averages=(("ema", ema),), looks=(budget,),
        ),
        Arm("annealed 1.25", "trunk", shared, longer, **falling, horizon=longer, looks=(longer,)),
        Arm("approach", "trunk", shared, before, **to_swa),
        Arm(
            "constant", "approach", before, longer, **to_swa,
            averages=(("swa", swa), ("ema", ema)), looks=(budget, longer),
        ),
        Arm(
            "cyclical", "approach", before, budget, **to_swa,
            averages=(("swa", cyclical),), looks=(budget,),
        ),
    ]  # fmt: skip
