"""From measurements to values that are maximized, and to the front: the trials that no other trial dominates.

Those of the front keep floors and ceilings, and are scored on all items. One of them is picked by its search values.

Shape letters: N trials, M objectives that steer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from evomerge.errors import RunError, did_you_mean
from evomerge.front.pareto import hypervolume, non_dominated
from evomerge.front.pick import knee, prefer
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
    if trial.measurement is None:
        return Observation(index=trial.index, point=np.array(trial.point), values_M=None)
    return observed(trial.index, np.array(trial.point), trial.measurement, objectives)


def observed(index: int, point_D: Floats, measurement: Measurement, objectives: Sequence[Objective]) -> Observation:
    """Return what a proposer is told of a measurement."""
    steering = [measurement.scores[objective.name] for objective in objectives if objective.steers]
    losses_M2 = np.array([score.loss for score in steering])
    return Observation(
        index=index,
        point=point_D,
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


@dataclass(frozen=True, slots=True, repr=False)
class Front(Sequence[Trial]):
    """The trials that no other trial dominates, best first in the first objective.

    Picking happens on search values, all objectives that steer scaled to [0, 1] over the members.
    """

    members: tuple[Trial, ...]
    objectives: tuple[Objective, ...]

    @overload
    def __getitem__(self, place: int) -> Trial: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Trial, ...]: ...
    def __getitem__(self, place: int | slice) -> Trial | tuple[Trial, ...]:
        return self.members[place]

    def __len__(self) -> int:
        return len(self.members)

    def __repr__(self) -> str:
        return f"Front of {len(self)} trials: {', '.join(str(member.number) for member in self.members)}"

    def knee(self) -> Trial:
        """Return the member with the best balance; the front must not be empty."""
        return self.members[knee(self._values())]

    def prefer(self, preference: Mapping[str, float]) -> Trial:
        """Return the member that serves a preference best: objective -> weight; one that is left out counts 1.

        The front must not be empty. Raises: RunError for an unknown objective, or a weight below 0.
        """
        names = [objective.name for objective in self.objectives if objective.steers]
        for name, weight in preference.items():
            if name not in names:
                raise RunError(f"--prefer: no objective {name!r}{did_you_mean(name, names)}")
            if not (np.isfinite(weight) and weight >= 0):
                raise RunError(f"--prefer: {name}: expected a weight of 0 or more, found {weight:g}")
        weights_M = np.array([preference.get(name, 1.0) for name in names])
        if not weights_M.any():
            raise RunError("--prefer: all weights are 0; give at least one objective a positive weight")
        return self.members[prefer(self._values(), weights_M)]

    def within(self, minimum: Mapping[str, float], maximum: Mapping[str, float]) -> "Front":
        """Return the members whose search values, in the user's sign, keep a least or a largest number an objective.

        Raises: RunError for an unknown objective, or if no member keeps them all.
        """
        kept = list(self.members)
        for option, bounds, sign in (("--min", minimum, 1), ("--max", maximum, -1)):
            for name, bound in bounds.items():
                values = self._values_of(option, name)
                kept = [member for member in kept if sign * values[member.number] >= sign * bound]
                best = max(values.values(), key=lambda value: sign * value)
                if sign * best < sign * bound:
                    raise RunError(
                        f"{option} {name}={bound:g}: expected a model on the front that keeps it, found none: the best "
                        f"of {len(self)} has {best:.4g} on search items; ask for less, or search on"
                    )
        if not kept:
            asked = [
                f"{option} {name}={bound:g}"
                for option, bounds in (("--min", minimum), ("--max", maximum))
                for name, bound in bounds.items()
            ]
            raise RunError(
                f"{' '.join(asked)}: each is kept by some of the {len(self)} models on the front, but no model keeps "
                "them all on search items; loosen one, or search on"
            )
        return replace(self, members=tuple(kept))

    def _values_of(self, option: str, name: str) -> dict[int, float]:
        """Return trial -> its search value in an objective."""
        names = [objective.name for objective in self.objectives]
        if name not in names:
            raise RunError(f"{option}: no objective {name!r}{did_you_mean(name, names)}")
        return {member.number: member.measurement.scores[name].value for member in self.members if member.measurement}

    def _values(self) -> Floats:
        """The search values that steer, (N, M), maximized."""
        return np.array([maximized(trial.measurement, self.objectives) for trial in self.members if trial.measurement])
