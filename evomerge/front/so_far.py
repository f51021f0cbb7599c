"""What a search has found so far, followed trial by trial.

Shape letters: N members of the front, M objectives that steer.
"""

from collections.abc import Sequence

import numpy as np

from evomerge.front.front import maximized, violation
from evomerge.front.pareto import hypervolume
from evomerge.records import Measurement, Objective, Trial


class SoFar:
    """Counts, the best of each objective, and the hypervolume of the front above a reference model.

    Of the trials before only the front's values are kept, so that the next one costs little, however many there were.
    counts: finished trials by how they ended, ``scored``, ``stopped`` or ``failed``.
    """

    def __init__(self, objectives: Sequence[Objective], reference: Measurement) -> None:
        self._objectives = objectives
        self._reference_M = maximized(reference, objectives)
        self._best_M = np.full(len(self._reference_M), -np.inf)
        self._front_NM = np.zeros((0, len(self._reference_M)))
        self._volume: float | None = 0.0
        self.counts = {"scored": 0, "stopped": 0, "failed": 0}

    def add(self, trial: Trial) -> None:
        """Take a finished trial."""
        measurement = trial.measurement
        if measurement is None or measurement.stopped:
            self.counts["stopped" if measurement else "failed"] += 1
            return
        self.counts["scored"] += 1
        value_M = maximized(measurement, self._objectives)
        self._best_M = np.maximum(self._best_M, value_M)
        if violation(measurement, self._objectives) or (self._front_NM >= value_M).all(axis=1).any():
            return
        beaten_N = (self._front_NM <= value_M).all(axis=1)
        self._front_NM = np.vstack([self._front_NM[~beaten_N], value_M])
        self._volume = None

    @property
    def best(self) -> dict[str, float]:
        """The best value of each objective that steers, in the user's sign; infinite before there is one."""
        steering = [objective for objective in self._objectives if objective.steers]
        return {one.name: one.sign * float(value) for one, value in zip(steering, self._best_M, strict=True)}

    @property
    def num_on_front(self) -> int:
        """How many different values the front has."""
        return len(self._front_NM)

    @property
    def volume(self) -> float:
        """Hypervolume of the front above the reference model."""
        if self._volume is None:
            self._volume = hypervolume(self._front_NM, self._reference_M)
        return self._volume
