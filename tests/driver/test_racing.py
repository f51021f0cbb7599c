"""Campaigns that race: what is stopped never enters the front, what is finished scores as it does without a race."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from silent_watcher import Interrupt, Interrupting, Silent

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.campaign.plan import make_plan
from evomerge.errors import CampaignError
from evomerge.families.family import FamilySummary
from evomerge.report.front import print_front
from evomerge.report.html import write_report
from evomerge.run.run import Run
from evomerge.run.search import search

SEARCH = [{"proposer": "sobol", "evaluations": 24}, {"proposer": "nsga2", "population": 8}]


@pytest.fixture(scope="module")
def campaign(digits4: FamilySummary) -> Callable[..., Campaign]:
    """Two objectives of the real family, with or without a race."""
    from evomerge.campaign.campaign import _stages
    from evomerge.campaign.sections import BudgetSection, StageSection

    def make(fidelity: dict[str, Any] | None = None, evaluations: int = 60) -> Campaign:
        read = read_campaign(digits4.campaign)
        update = {
            "objectives": read.objectives[:2],
            "search": [StageSection.model_validate(stage) for stage in _stages(SEARCH)],
            "budget": BudgetSection(evaluations=evaluations),
        }
        if fidelity is not None:
            update["fidelity"] = Campaign.model_fields["fidelity"].annotation.__args__[0](**fidelity)
        return read.model_copy(update=update)

    return make


@pytest.fixture(scope="module")
def raced(campaign: Callable[..., Campaign], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return search(campaign({}), tmp_path_factory.mktemp("raced") / "run", watcher=Silent())


def test_some_are_stopped_and_none_of_them_is_on_the_front(raced: Run) -> None:
    assert len(raced.stopped) > 5
    assert not {trial.number for trial in raced.stopped} & {trial.number for trial in raced.front}
    assert raced.cost < 0.8 * len(raced.trials)
    for trial in raced.stopped:
        assert trial.measurement is not None
        assert "of the hypervolume" in str(trial.measurement.stopped)
        assert trial.measurement.cost < 1
    everything = {len(raced.sources("search")[objective.name]) for objective in raced.objectives}
    for trial in raced.front:
        assert trial.measurement is not None
        assert {len(score.items) for score in trial.measurement.scores.values()} == everything
        assert trial.measurement.cost == pytest.approx(1.0)


def test_what_is_finished_scores_as_without_a_race(
    raced: Run, campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    """Sobol's candidates are the same in both: the finished ones have the same items, in the same order."""
    whole = search(campaign(evaluations=24 + 1), tmp_path / "run", watcher=Silent())
    same = [trial for trial in raced.trials[:24] if trial.measurement and not trial.measurement.stopped]
    assert same
    for trial in same:
        assert trial.candidate == whole.trials[trial.number].candidate
        for name, score in whole.searched[f"trial:{trial.number}"].scores.items():
            ours = raced.searched[f"trial:{trial.number}"].scores[name]
            assert (ours.items == score.items).all()
            assert ours.value == score.value
            assert ours.companion is not None
            np.testing.assert_allclose(ours.companion, score.companion, rtol=1e-4, atol=1e-5)


def test_an_estimate_is_near_what_all_items_give(raced: Run, campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    whole = search(campaign(evaluations=24 + 1), tmp_path / "run", watcher=Silent())
    off = [
        (score.value - whole.searched[f"trial:{trial.number}"].scores[name].value) / score.stderr
        for trial in raced.stopped
        if trial.number < 24 and trial.measurement
        for name, score in trial.measurement.scores.items()
    ]
    assert len(off) > 5
    assert np.sqrt(np.mean(np.square(off))) < 2


def test_an_interrupted_race_resumes_to_the_same_story(
    raced: Run, campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    with pytest.raises(Interrupt):
        search(campaign({}), tmp_path / "run", watcher=Interrupting(after=30))
    run = search(campaign({}), tmp_path / "run", watcher=Silent())
    for ours, theirs in zip(run.trials, raced.trials, strict=True):
        assert ours.candidate == theirs.candidate
        assert ours.measurement is not None
        assert theirs.measurement is not None
        assert ours.measurement.stopped == theirs.measurement.stopped
        assert {name: score.value for name, score in ours.measurement.scores.items()} == {
            name: score.value for name, score in theirs.measurement.scores.items()
        }


def test_a_race_is_shown(raced: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_front(raced)
    assert f"{len(raced.stopped)} of 60 trials were stopped early" in capsys.readouterr().out
    write_report(raced, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = json.loads(re.findall(r'id="part-overview">(.*?)</script>', page)[0])
    reasons = dict.fromkeys(trial.measurement.stopped or "" for trial in raced.trials if trial.measurement)
    assert shown["trials"]["stopped"]["texts"] == list(reasons)


def test_descents_race_from_where_they_end(campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    from evomerge.campaign.sections import BudgetSection, StageSection

    stage = StageSection(proposer="adamerging", options={"loss": "ce", "steps": 3, "learning_rate": 0.01})
    given = campaign({"start": 0.3}).model_copy(update={"search": [stage], "budget": BudgetSection(evaluations=3)})
    run = search(given, tmp_path / "run", watcher=Silent())
    for before, after in zip(run.trials, run.trials[1:], strict=False):
        assert before.measurement is not None
        assert before.measurement.arrival is not None
        assert after.candidate.point == before.measurement.arrival.point
        assert len(before.measurement.arrival.losses) == 3
    assert not run.stopped  # each is better than the one before


def test_only_means_over_items_can_be_raced(
    make_campaign: Callable[..., Campaign], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge.evaluators.classification import ClassificationEvaluator
    from evomerge.evaluators.evaluator import Metric

    median = {"accuracy": Metric("max", lambda scores, _: float(np.median(scores)))}
    monkeypatch.setattr(ClassificationEvaluator, "metrics", lambda *_: median)
    make_plan(make_campaign())
    with pytest.raises(CampaignError, match="fidelity: objective .*: accuracy is no mean over items"):
        make_plan(make_campaign(fidelity={"start": 0.2}))
