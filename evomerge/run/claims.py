"""What a finished run's items allow to be claimed, in sentences.

Is the front better than what was there before, and how much of its best score is luck?
"""

import numpy as np

from evomerge.evidence.compare import search_test_gap
from evomerge.evidence.optimism import optimism_of_best
from evomerge.evidence.verdict import luck_text, verdict
from evomerge.front.front import maximized
from evomerge.records import Measurement, Objective, Trial
from evomerge.run.run import Run


def claims(run: Run) -> list[str]:
    """Return the sentences, without full stops; none before the front is scored on the test items.

    The front is compared with the uniform average and with the best single coefficient on test items. The luck is that
    of the front's best mean or, where objectives are of several metrics, of its best model in each of them.
    """
    members = [trial for trial in run.front if f"trial:{trial.number}" in run.tested]
    if not members:
        return []
    tested = {run.label(trial): run.tested[f"trial:{trial.number}"] for trial in members}
    sources = run.sources("test")
    rivals = {"uniform": "the uniform average", run.best_scalar: "the best single coefficient"}
    sentences = [
        verdict(tested, run.tested[subject], name, run.steering, sources).text for subject, name in rivals.items()
    ]
    groups = [run.steering] if run.has_one_metric else [[objective] for objective in run.steering]
    sentences += [_luck(run, members, group) for group in groups]
    return [*sentences, _guessed(run)] if run.stopped else sentences


def use_of_test_items(run: Run) -> str:
    """Say how often the test items were used, without a full stop."""
    touches = run.ledger.num_test_touches()
    if touches == 0:
        return "the test items have not been used yet"
    if touches == 1:
        return "the test items were used once, for the front that is shown"
    return f"the test items were used {touches} times: later fronts were chosen knowing more than the search items"


def _guessed(run: Run) -> str:
    """Say by how much the estimates of stopped trials may be off: the median of their standard errors."""
    scores = [trial.measurement.scores for trial in run.stopped if trial.measurement]
    errors = {
        objective.name: float(np.median([of[objective.name].stderr for of in scores])) for objective in run.steering
    }
    assert run.campaign.fidelity is not None
    shown = ", ".join(f"{error:.2g} in {name}" for name, error in errors.items())
    return (
        f"the scores of the {len(scores)} stopped trials are estimates ({run.campaign.fidelity.estimator}), "
        f"whose standard error is {shown}"
    )


def _luck(run: Run, members: list[Trial], objectives: list[Objective]) -> str:
    """Say how far the best of the front, by its search score in some objectives, flatters."""

    def mean(measurement: Measurement) -> float:
        return float(maximized(measurement, objectives).mean())

    subjects = [f"trial:{trial.number}" for trial in members]
    best = max(subjects, key=lambda subject: mean(run.searched[subject]))
    complete = [
        trial.measurement for trial in run.trials if trial.measurement is not None and not trial.measurement.stopped
    ]
    optimism = optimism_of_best(complete, objectives, run.sources("search"))
    gap = search_test_gap(run.searched[best], run.tested[best], objectives, run.sources("search"), run.sources("test"))
    what = "mean" if len(objectives) > 1 else objectives[0].name
    return luck_text(what, len(complete), float(np.mean(list(optimism.values()))), gap)
