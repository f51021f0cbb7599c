"""What a surrogate makes of a run's trials: how well it knows them, which numbers matter, where the search goes next.

It is fitted for the page alone, one Gaussian process an objective to its scores; a search may know more than it, such
as losses and gradients. Of a run whose stages search different spaces, the one with the most scored trials is taken.
Shape letters: N trials, P points, D dimensions.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from evomerge.records import Floats, Objective, Trial, in_order
from evomerge.report.page.arrays import pack
from evomerge.run.run import Run
from evomerge.surrogates.gp import GaussianProcess, fit

MAX_TRIALS = 300  # the latest; a fit takes the cube of their number
FEWEST = 8
STEP = 0.01  # of a number's range, for slopes


def surrogate(run: Run) -> dict[str, Any]:
    """Return the surrogates of the objectives that steer, or why there are none (``absent``)."""
    scored = [trial for trial in in_order(run.trials) if trial.measurement and not trial.measurement.stopped]
    stages = Counter(trial.stage for trial in scored).most_common(1)
    told = [trial for trial in scored if trial.stage == stages[0][0]][-MAX_TRIALS:] if stages else []
    what = (
        "paths of layers"
        if told and run.data_flow_of(told[0])
        else "operators"
        if len(run.campaign.operator_names) > 1
        else None
    )
    if what:
        return {"absent": f"Here {what} are searched, and a number does not mean the same in all of them."}
    if len(told) < FEWEST:
        return {"absent": f"A stage needs {FEWEST} scored trials for a surrogate; there are {len(told)}."}
    points_ND = np.array([trial.point for trial in told])
    waiting, points_PD = _next_points(run, told[0].stage)
    models = [_model(points_ND, told, objective) for objective in run.steering]
    names = [[d["parameter"], d["expert"] or "", d["group"] or ""] for d, _ in run.numbers_of(told[0])]
    return {
        "stage": told[0].stage,
        "trials": pack([trial.number for trial in told]),
        "names": names[: points_ND.shape[1]],
        "waiting": waiting,
        "objectives": [_described(model, points_ND, points_PD) for model in models],
    }


def _model(points_ND: Floats, told: Sequence[Trial], objective: Objective) -> GaussianProcess:
    """Fit a process to the scores; their noise is fitted too, since all trials share the items' luck."""
    values_N = np.array([trial.measurement.scores[objective.name].value for trial in told if trial.measurement])
    return fit(points_ND, values_N, np.zeros(len(values_N)))


def _described(model: GaussianProcess, points_ND: Floats, points_PD: Floats) -> dict[str, Any]:
    """Return what is known of each trial without it, how steep the scores are, and what is expected of what waits."""
    left_out_N, variance_N = model.left_out()
    expected = model.predict(points_PD) if len(points_PD) else (np.zeros(0), np.zeros(0))
    return {
        "measured": pack(model.values_N),
        "predicted": pack(left_out_N),
        "deviations": pack(np.sqrt(variance_N).astype(np.float32)),
        "slopes": pack(_slopes(model, points_ND)),
        "expected": pack(expected[0]),
        "expected_deviations": pack(np.sqrt(expected[1])),
    }


def _slopes(model: GaussianProcess, points_ND: Floats) -> Floats:
    """Return the root mean square slope of the expected score at the trials, (D,), by a tenth of a number's range."""
    steps_DD = STEP * np.eye(points_ND.shape[1])
    slopes = [(model.mean(points_ND + step_D) - model.mean(points_ND - step_D)) / (2 * STEP) for step_D in steps_DD]
    return np.array([0.1 * float(np.sqrt((slope_N**2).mean())) for slope_N in slopes])


def _next_points(run: Run, stage: int) -> tuple[list[str], Floats]:
    """Return what will be scored next in a stage: what is under way, and what the proposer has planned then."""
    trials = [trial for trial in run.trials if trial.stage == stage]
    names = [f"trial {trial.number}" for trial in trials if trial.order is None]
    points = [trial.point for trial in trials if trial.order is None]
    planners = [place for place, trial in enumerate(trials) if "then" in trial.candidate.memo]
    if planners and not run.is_finished:
        batch = trials[planners[-1]].candidate.memo["then"][len(trials) - 1 - planners[-1] :]
        names += [f"planned {number + 1}" for number in range(len(batch))]
        points += [tuple(point) for point in batch]
    return names, np.array(points).reshape(len(points), len(trials[0].point))
