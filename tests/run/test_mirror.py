"""A run as an Optuna study: everything that Optuna can hold of it, once each."""

from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from silent_watcher import Silent
from typer.testing import CliRunner

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.sections import BudgetSection
from evomerge.cli import app
from evomerge.errors import RunError
from evomerge.run.mirror import NUMBER, mirror
from evomerge.run.run import open_run
from evomerge.run.search import search


@pytest.fixture
def campaign(make_campaign: Callable[..., Campaign]) -> Campaign:
    return make_campaign(search=[{"proposer": "sobol"}], budget={"evaluations": 6}, fidelity={})


def test_every_finished_trial_is_there_once_with_its_numbers(campaign: Campaign, tmp_path: Path) -> None:
    run, url = search(campaign, tmp_path / "run", watcher=Silent()), f"sqlite:///{tmp_path}/study.db"
    assert mirror(run, url, "digits") == (6, 6)
    assert mirror(run, url, "digits") == (0, 6)
    longer = campaign.model_copy(update={"budget": BudgetSection(evaluations=9)})
    assert mirror(search(longer, tmp_path / "run", watcher=Silent()), url, "digits") == (3, 9)
    run, study = open_run(tmp_path / "run"), optuna.load_study(study_name="digits", storage=url)
    assert study.metric_names == [objective.name for objective in run.steering]
    mirrored = {trial.user_attrs[NUMBER]: trial for trial in study.trials}
    assert sorted(mirrored) == list(range(9))
    for trial in run.trials:
        other, scores = mirrored[trial.number], trial.measurement.scores
        values = [scores[objective.name].value for objective in run.steering]
        if trial.measurement.stopped:
            assert other.state is TrialState.PRUNED
            assert other.user_attrs[f"estimate {run.steering[0].name}"] == values[0]
        else:
            assert other.state is TrialState.COMPLETE
            assert other.values == values
        for (dimension, number), (name, param) in zip(run.numbers_of(trial), other.params.items(), strict=True):
            assert name == f"coefficient {dimension['expert']}/{dimension['group']}"
            assert param == number
    assert study.best_trials


def test_another_study_of_the_name_is_refused(campaign: Campaign, tmp_path: Path) -> None:
    run, url = search(campaign, tmp_path / "run", watcher=Silent()), f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="taken", storage=url, directions=["minimize"])
    with pytest.raises(RunError, match="--study: taken holds another study"):
        mirror(run, url, "taken")
    with pytest.raises(RunError, match="--optuna: expected an Optuna storage"):
        mirror(run, "sqlite:////nowhere/at/all.db", "digits")


def test_the_command_names_the_study_after_the_campaign(campaign: Campaign, tmp_path: Path) -> None:
    search(campaign, tmp_path / "run", watcher=Silent())
    url = f"sqlite:///{tmp_path}/study.db"
    done = CliRunner().invoke(app, ["mirror", str(tmp_path / "run"), "--optuna", url])
    assert done.exit_code == 0, done.output
    assert f"6 trials added to the study {campaign.name}, which holds 6" in done.output
    assert f"optuna-dashboard {url}" in done.output
