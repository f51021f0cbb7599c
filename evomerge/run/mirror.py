"""Mirrors a run into an Optuna study, for what reads one: optuna-dashboard, Optuna's own plots."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from evomerge.errors import RunError
from evomerge.records import Trial
from evomerge.run.run import Run
from evomerge.space.space import Dimension

NUMBER = "evomerge trial"
"""User attribute of a mirrored trial: which of the run's it is."""


def mirror(
    run: Run, url: str, name: str, progress: Callable[[int, int], None] = lambda _done, _total: None
) -> tuple[int, int]:
    """Add to a study the finished trials that it lacks; return how many were added, and how many it holds now.

    url: of an Optuna storage, which takes a tenth of a second for a trial of a hundred numbers. Values have the user's
    sign. A parameter is a searched number, under its name; a trial that a race stopped is a pruned one, with its
    estimates as attributes. progress is told how many of how many are done. The mirror is not read back.
    Raises: RunError if the storage cannot be opened, or holds another study of that name.
    """
    import optuna
    from optuna.study import StudyDirection

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    directions = [
        StudyDirection.MAXIMIZE if objective.sign > 0 else StudyDirection.MINIMIZE for objective in run.steering
    ]
    try:
        study = optuna.create_study(study_name=name, storage=url, directions=directions, load_if_exists=True)
    except Exception as error:  # Optuna and the database's driver raise what they like
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"--optuna: expected an Optuna storage, such as sqlite:///study.db; found none ({reason})"
        ) from error
    if study.directions != directions:
        raise RunError(f"--study: {name} holds another study, of other objectives; give this one a name of its own")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([objective.name for objective in run.steering])
    held = {trial.user_attrs.get(NUMBER) for trial in study.get_trials(deepcopy=False)}
    missing = [trial for trial in run.trials if trial.order is not None and trial.number not in held]
    for number, trial in enumerate(missing):
        progress(number, len(missing))
        study.add_trial(_mirrored(run, trial))
    progress(len(missing), len(missing))
    return len(missing), len(held) + len(missing)


def _mirrored(run: Run, trial: Trial) -> Any:
    from optuna.distributions import FloatDistribution
    from optuna.trial import TrialState, create_trial

    searched = [(Dimension(**held), number) for held, number in run.numbers_of(trial) if "low" in held]
    attributes: dict[str, Any] = {NUMBER: trial.number, "stage": trial.stage}
    values = None
    if trial.failure:
        state, attributes["failure"] = TrialState.FAIL, trial.failure
    else:
        assert trial.measurement is not None
        scores = trial.measurement.scores
        means = [scores[objective.name].value for objective in run.steering]
        attributes |= {f"stderr {objective.name}": scores[objective.name].stderr for objective in run.steering}
        attributes["cost"] = trial.measurement.cost
        if trial.measurement.stopped:
            state, attributes["stopped"] = TrialState.PRUNED, trial.measurement.stopped
            attributes |= {f"estimate {o.name}": value for o, value in zip(run.steering, means, strict=True)}
        else:
            state, values = TrialState.COMPLETE, means
    made = create_trial(
        state=state,
        values=values,
        params={dimension.name: number for dimension, number in searched},
        distributions={dimension.name: FloatDistribution(dimension.low, dimension.high) for dimension, _ in searched},
        user_attrs=attributes,
    )
    if trial.measurement and made.datetime_complete:  # how long it took; when it began is not known
        made.datetime_start = made.datetime_complete - timedelta(seconds=sum(trial.measurement.seconds.values()))
    return made
