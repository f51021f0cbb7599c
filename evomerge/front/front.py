"""From measurements to values that are maximized, and to the front: the trials that no other trial dominates.

Those of the front keep floors and ceilings, and are scored on all items.

Shape letters: N trials, M objectives that steer.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.front.pareto import hypervolume, non_dominated
from evomerge.records import Floats, Measurement, Objective, Observation, Trial


def maximized(measurement: Measurement, objectives: Sequence[Objective]) -> Floats:
    """Return the values (M,) of the objectives that steer, larger is better."""
    return np.array(
        [objective.sign * measurement.scores[objective.name].value for objective in objectives if objective.steers]
    )


def worst_of_inputs(measurements: Mapping[str, Measurement], objectives: Sequence[Objective]) -> Floats:
    """Return the worst that base and experts have in each objective, maximized, (M,); other models do not count."""
    inputs = [name for name in measurements if name == "base" or name.startswith("expert:")]
    return np.asarray(np.min([maximized(measurements[name], objectives) for name in inputs], axis=0))


def margins(measurement: Measurement, objectives: Sequence[Objective]) -> Floats:
    """Return by how much each floor and ceiling is kept (negative: missed), objective by objective, shape (C,)."""
    return np.array(
        [m for objective in objectives for m in objective.margins(measurement.scores[objective.name].value)]
    )


def violation(measurement: Measurement, objectives: Sequence[Objective]) -> float:
    """Return by how much floors and ceilings are missed, summed; 0 if all are kept."""
    return float(-margins(measurement, objectives).clip(max=0).sum())


def observe(trial: Trial, objectives: Sequence[Objective]) -> Observation:
    """Return what a proposer is told of a finished trial."""
    measurement = trial.measurement
    if measurement is None:
        return Observation(index=trial.index, point=np.array(trial.point), values_M=None)
    steering = [measurement.scores[objective.name] for objective in objectives if objective.steers]
    losses_M2 = np.array([score.loss for score in steering])
    return Observation(
        index=trial.index,
        point=np.array(trial.point),
        values_M=maximized(measurement, objectives),
        stderr_M=np.array([score.stderr for score in steering]),
        losses_M=losses_M2[:, 0],
        loss_stderr_M=losses_M2[:, 1],
        margins_C=margins(measurement, objectives),
        arrival=measurement.arrival,
        is_estimate=measurement.stopped is not None,
    )


def front_of(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Return the non-dominated trials among those that keep every floor and ceiling, best first in the first objective.

    The values are those of the search items: picking happens on them.
    """
    measured = [
        trial
        for trial in trials
        if trial.measurement and not trial.measurement.stopped and not violation(trial.measurement, objectives)
    ]
    if not measured:
        return []
    values_NM = np.array([maximized(trial.measurement, objectives) for trial in measured if trial.measurement])
    members = np.flatnonzero(non_dominated(values_NM))
    return [measured[i] for i in sorted(members, key=lambda i: tuple(-values_NM[i]))]


def front_hypervolume(trials: Sequence[Trial], objectives: Sequence[Objective], reference: Measurement) -> float:
    """Return the hypervolume of the trials' front above a reference model's values."""
    members = front_of(trials, objectives)
    if not members:
        return 0.0
    values_NM = np.array([maximized(trial.measurement, objectives) for trial in members if trial.measurement])
    return hypervolume(values_NM, maximized(reference, objectives))
