"""Two models of one run, or two runs, side by side.

Shape letters: N trials, M objectives.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from evomerge.errors import RunError, did_you_mean
from evomerge.evidence.functions import Estimate, Resampled
from evomerge.evidence.pairs import Pair, paired
from evomerge.front.front import front_of, maximized, worst_of_inputs
from evomerge.records import Floats, Measurement, Objective, Split, Trial, in_order
from evomerge.run.run import Run
from evomerge.run.volume import above_0, resampled_volume


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelComparison:
    """Two subjects of a run on the items of one split: test items where both are scored on them."""

    ours: str
    theirs: str
    split: Split
    pairs: list[Pair]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSide:
    """One of two runs, in their common objectives.

    cost: of all its trials, in full-evaluation equivalents. coverage: which share of the other run's front is matched
    or surpassed in every objective by a model of this one, on search values.
    """

    run: Run
    num_trials: int
    num_on_front: int
    cost: float
    coverage: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Volumes:
    """Two fronts' hypervolumes on items of one split, and the first less the second.

    The errors are those of the items: what is on the fronts, and the reference point, are taken as given.
    """

    sides: tuple[Estimate, Estimate]
    difference: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Two runs.

    reference: objective -> the reference point in the user's sign. has_same_items: of both splits; then the differences
    are paired, else the runs are taken as independent. hypervolume: of the fronts by search values; at_equal_cost: of
    those of the results up to the smaller of both costs; on_test: of the fronts' test values, None where one of the
    runs has none.
    """

    objectives: list[Objective]
    reference: Mapping[str, float]
    equal_cost: float
    has_same_items: bool
    sides: tuple[RunSide, RunSide]
    hypervolume: Volumes
    at_equal_cost: Volumes
    on_test: Volumes | None


def trial_of(run: Run, word: str) -> Trial:
    """Return the trial that a word names, by its number or as the front's ``knee``. Raises: RunError."""
    if word == "knee":
        return run.pick(at_knee=True)
    if not word.isdecimal():
        raise RunError(f"{word}: expected the number of a trial, or knee")
    return run.trial(int(word))


def subject_of(run: Run, word: str) -> str:
    """Return the subject that a word names: a trial's number, ``knee``, or a reference model such as ``expert:maths``.

    Raises: RunError if there is none, or it has no scores.
    """
    if word == "knee" or word.isdecimal():
        return f"trial:{run.pick(trial=trial_of(run, word).number).number}"
    references = [subject for subject in run.searched if not subject.startswith("trial:")]
    if word not in references:
        raise RunError(
            f"{word}: expected the number of a trial, knee, or a reference model of the run"
            f"{did_you_mean(word, references)}"
        )
    return word


def shared_split(run: Run, subjects: Sequence[str]) -> tuple[Split, Mapping[str, Measurement]]:
    """Return the split on which models can be compared, and its measurements: test where all are scored on it.

    Raises: RunError if one was stopped early: it is not scored on all search items.
    """
    if all(subject in run.tested for subject in subjects):
        return "test", run.tested
    for subject in subjects:
        if run.searched[subject].stopped:
            raise RunError(
                f"{subject.replace(':', ' ')} was stopped early, on some of the search items; compare trials that were "
                "scored on all of them"
            )
    return "search", run.searched


def compare_models(run: Run, ours: str, theirs: str) -> ModelComparison:
    """Compare two subjects of a run, in all objectives. Raises: RunError."""
    split, measured = shared_split(run, [ours, theirs])
    pairs = paired(measured[ours], measured[theirs], run.objectives, run.sources(split))
    return ModelComparison(ours=ours, theirs=theirs, split=split, pairs=pairs)


def compare_runs(one: Run, other: Run) -> RunComparison:
    """Compare two runs in the objectives that steer both. Raises: RunError if there are none, or nothing is scored.

    The reference point is the base's scores, or the worse of both bases' where their items differ; if no model of
    either run is above it, the worst of base and experts.
    """
    for run in (one, other):
        if "base" not in run.searched:
            raise RunError(f"{run.location}: nothing has been scored yet; look again in a moment")
    objectives = [objective for objective in one.steering if _meaning(objective) in map(_meaning, other.steering)]
    if not objectives:
        raise RunError(
            f"expected runs that share an objective, found {_named(one)} in {one.location} and {_named(other)} in "
            f"{other.location}"
        )
    runs, equal_cost = (one, other), min(one.cost, other.cost)
    finished = [front_of(run.trials, objectives) for run in runs]
    fronts = [_values(trials, objectives) for trials in finished]
    reference_M = np.min([maximized(run.searched["base"], objectives) for run in runs], axis=0)
    if not any((front_NM > reference_M).all(axis=1).any() for front_NM in fronts):
        reference_M = np.min([worst_of_inputs(run.searched, objectives) for run in runs], axis=0)
    has_same_items = one.facts["items"] == other.facts["items"] and one.facts["sources"] == other.facts["sources"]

    @cache  # all that the cheaper run has found is also what it has found at equal cost
    def drawn(side: int, split: Split, numbers: tuple[int, ...]) -> Resampled:
        return resampled_volume(runs[side], split, numbers, objectives, reference_M)

    def volumes(split: Split, trials: Sequence[Sequence[Trial]]) -> Volumes:
        ours, theirs = (drawn(i, split, tuple(trial.number for trial in trials[i])) for i in (0, 1))
        difference = ours.less(theirs, is_paired=has_same_items)
        return Volumes(sides=(above_0(ours.estimate), above_0(theirs.estimate)), difference=difference)

    is_tested = all(_is_tested(run, trials) for run, trials in zip(runs, finished, strict=True))
    sides = [
        RunSide(
            run=run,
            num_trials=sum(trial.order is not None for trial in run.trials),
            num_on_front=len(finished[i]),
            cost=run.cost,
            coverage=_coverage(fronts[i], fronts[1 - i]),
        )
        for i, run in enumerate(runs)
    ]
    signs = [objective.sign * float(r) for objective, r in zip(objectives, reference_M, strict=True)]
    return RunComparison(
        objectives=objectives,
        reference=dict(zip((objective.name for objective in objectives), signs, strict=True)),
        equal_cost=equal_cost,
        has_same_items=has_same_items,
        sides=(sides[0], sides[1]),
        hypervolume=volumes("search", finished),
        at_equal_cost=volumes("search", [front_of(_within_cost(run, equal_cost), objectives) for run in runs]),
        on_test=volumes("test", finished) if is_tested else None,
    )


def _meaning(objective: Objective) -> tuple[str, str, str, str]:
    return objective.name, objective.task, objective.measure, objective.direction


def _named(run: Run) -> str:
    return ", ".join(f"{objective.name} ({objective.measure})" for objective in run.steering)


def _within_cost(run: Run, cost: float) -> list[Trial]:
    """Return the results, in their order, that so many full-evaluation equivalents paid for."""
    results = in_order(run.trials)
    spent_N = np.cumsum([trial.measurement.cost if trial.measurement else 0.0 for trial in results])
    return [trial for trial, spent in zip(results, spent_N, strict=True) if spent <= cost + 1e-9]


def _values(trials: Sequence[Trial], objectives: Sequence[Objective]) -> Floats:
    values = [maximized(trial.measurement, objectives) for trial in trials if trial.measurement]
    return np.array(values).reshape(-1, len(objectives))


def _is_tested(run: Run, trials: Sequence[Trial]) -> bool:
    """Whether there is a front, and all of it has test values."""
    return bool(trials) and all(f"trial:{trial.number}" in run.tested for trial in trials)


def _coverage(ours_NM: Floats, theirs_NM: Floats) -> float:
    """Return which share of their rows one of ours matches or surpasses in every objective; NaN of none."""
    if not len(theirs_NM):
        return float("nan")
    return float((ours_NM[:, None] >= theirs_NM[None]).all(axis=2).any(axis=0).mean())
