"""Every average of a sweep, kept along one training.

Averaging never touches the training, so one training feeds all of them: they differ in which of
its weights they hold, and in nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from swa_core import Schedule, SWAState, Uniform, init, update


class Averages:
    """The averages of several schedules, each kept by ``swa_core.update``.

    Schedules of the same snapshots share one average.

    >>> averages = Averages([Schedule(1, 1), Schedule(2, 2), Schedule(2, 3)], np.zeros(1, "f"), 3)
    >>> for value in (1, 2, 3):
    ...     averages.update(np.full(1, value, np.float32))
    >>> {tuple(taken): state.average["weights"].item() for taken, state in averages.states.items()}
    {(1, 2, 3): 2.0, (2,): 2.0}

    Attributes:
      states: by the updates of the snapshots.
    """

    def __init__(self, schedules: Iterable[Schedule], weights: np.ndarray, total_steps: int):
        self._schedules = {schedule.snapshots(total_steps): schedule for schedule in schedules}
        self.states: dict[range, SWAState] = {
            taken: init({"weights": weights}) for taken in self._schedules
        }

    def update(self, weights: np.ndarray) -> None:
        """Takes the weights after one more update.

        Args:
          weights: all of them in one vector [n], float32; copied where they are needed.
        """
        for taken, schedule in self._schedules.items():
            self.states[taken] = update(
                self.states[taken], {"weights": weights}, schedule, Uniform()
            )
