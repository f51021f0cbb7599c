"""A real campaign on a small real family: whatever interrupts it, nothing recorded is lost and nothing changes."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import killed_driver
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from silent_watcher import Interrupt, Interrupting, Silent

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.campaign.course import Course
from evomerge.campaign.plan import make_plan
from evomerge.campaign.stages import make_stages
from evomerge.errors import EvoMergeError, RunError
from evomerge.evaluators.classification import ClassificationEvaluator
from evomerge.families.family import FamilySummary
from evomerge.ledger.location import FILE_NAME
from evomerge.publish.export import export_trial
from evomerge.records import Trial
from evomerge.report.front import print_finished, print_front
from evomerge.report.html import write_report
from evomerge.run.replay import replay
from evomerge.run.run import Run, open_run
from evomerge.run.search import search

CHAIN = [
    {"proposer": "sobol", "evaluations": 6},
    {"proposer": "adamerging", "evaluations": 3, "steps": 3},
    {"proposer": "nsga2", "evaluations": 25, "population": 8},
    {"proposer": "tpe", "evaluations": 14, "num_startup": 4},
    {"proposer": "cma_es"},
]


LADDER = [  # each with a space of its own
    {"proposer": "surrogate", "evaluations": 5, "num_startup": 3, "space": {"groups": "model"}},
    {"proposer": "adamerging", "evaluations": 2, "loss": "ce", "steps": 2, "space": {"groups": "tensor"}},
    {"proposer": "cma_es", "population": 4, "keep_experts": 2, "space": {"exceptions": {"*/after": "best"}}},
]


def story(run: Run) -> list[tuple[Any, ...]]:
    """What was proposed, in which order, and what it scored."""
    return [(trial.number, trial.stage, trial.candidate, trial.order, values(trial)) for trial in run.trials]


def values(trial: Trial) -> dict[str, float]:
    assert trial.measurement is not None
    return {name: score.value for name, score in trial.measurement.scores.items()}


@pytest.fixture(scope="module")
def uninterrupted(small_digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    campaign = read_campaign(small_digits.campaign).model_copy(update={"search": chain(), "budget": budget(60)})
    return search(campaign, folder / "run", watcher=Silent())


def chain() -> Any:
    from evomerge.campaign.campaign import _stages
    from evomerge.campaign.sections import StageSection

    return [StageSection.model_validate(stage) for stage in _stages(CHAIN)]


def budget(evaluations: int) -> Any:
    from evomerge.campaign.sections import BudgetSection

    return BudgetSection(evaluations=evaluations)


@pytest.mark.parametrize("after", [1, 7, 30, 41, 59])
def test_an_interrupted_run_resumes_to_the_same_story(
    uninterrupted: Run, small_digits: Any, tmp_path: Path, after: int
) -> None:
    campaign = read_campaign(small_digits.campaign).model_copy(update={"search": chain(), "budget": budget(60)})
    with pytest.raises(Interrupt):
        search(campaign, tmp_path / "run", watcher=Interrupting(after))
    assert sum(trial.order is not None for trial in open_run(tmp_path / "run").trials) == after
    run = search(campaign, tmp_path / "run", watcher=Silent())
    assert story(run) == story(uninterrupted)
    assert run.tested.keys() == uninterrupted.tested.keys()
    assert run.ledger.num_test_touches() == 1


def test_a_ladder_of_spaces_resumes_to_the_same_story_and_exports_every_stage(
    make_campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    """Interrupted within each stage and between two of them; extended; what is exported is what was tested."""
    campaign = make_campaign(search=LADDER, budget={"evaluations": 12})
    whole = search(campaign, tmp_path / "whole", watcher=Silent())
    for further in (3, 2, 1, 3):
        with pytest.raises(Interrupt):
            search(campaign, tmp_path / "run", watcher=Interrupting(further))
    search(campaign, tmp_path / "run", watcher=Silent())
    longer = campaign.model_copy(update={"budget": budget(16)})
    run = search(longer, tmp_path / "run", watcher=Silent())
    assert story(run)[:12] == story(whole)
    assert run.facts["stages"] == whole.facts["stages"]
    num_experts, (coarse, fine, last) = 3, run.facts["stages"]
    assert len(coarse["space"]) == num_experts
    assert len(fine["space"]) > len(last["space"]) > num_experts
    assert f"stage 2 searched {len(fine['space'])} numbers and started from trial {fine['ancestor']}" in run.lineage
    print_front(run)
    write_report(run, tmp_path / "report.html")
    assert f'"dimensions":"{run.dimensions}"' in (tmp_path / "report.html").read_text(encoding="utf-8")
    ledger = sqlite3.connect(run.location.file(FILE_NAME))
    fingerprints = [row[0] for row in ledger.execute("select fingerprint from evomerge_trials order by number")]
    course = Course(run.campaign, make_plan(run.campaign), run.changes)
    course.leg(2, run.trials)
    for stage in range(3):
        trial = next((t for t in run.front if t.stage == stage), None) or next(
            t for t in run.trials if t.stage == stage
        )
        assert course.recipe(trial).fingerprint(run.facts["hashes"]) == fingerprints[trial.number]
        assert len({kept["expert"] for kept, _ in run.numbers_of(trial)}) == (2 if stage == 2 else 3)
    tested = max(run.front, key=lambda trial: trial.stage)
    export_trial(run, tested, tmp_path / "out", lambda _: None)


def test_a_run_from_before_stages_had_spaces_is_shown(uninterrupted: Run) -> None:
    facts = {key: value for key, value in uninterrupted.facts.items() if key != "stages"}
    older = replace(uninterrupted, facts={**facts, "space": uninterrupted.facts["stages"][0]["space"]})
    assert older.changes == uninterrupted.changes
    assert (older.dimensions, older.lineage) == (uninterrupted.dimensions, [])
    assert older.numbers_of(older.trials[-1]) == uninterrupted.numbers_of(uninterrupted.trials[-1])


@pytest.mark.slow
def test_kill_9_at_any_moment_loses_nothing_and_changes_nothing(
    uninterrupted: Run, small_digits: Any, tmp_path: Path
) -> None:
    """Real processes, each killed at a random moment until one comes to the end; what is recorded only grows."""
    campaign = read_campaign(small_digits.campaign).model_copy(update={"search": chain(), "budget": budget(60)})
    (tmp_path / "campaign.json").write_text(campaign.model_dump_json(), encoding="utf-8")
    command = [sys.executable, killed_driver.__file__, str(tmp_path / "campaign.json"), str(tmp_path / "run"), "0"]
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    killed = json.loads(done.stdout)
    assert sum(killed.values()) >= 50
    run = open_run(tmp_path / "run")
    assert story(run) == story(uninterrupted)
    assert run.tested.keys() == uninterrupted.tested.keys()
    assert run.ledger.num_test_touches() == 1
    assert [stage.difference for stage in replay(run)] == [None] * len(CHAIN)


def test_a_finished_campaign_does_nothing(uninterrupted: Run, watcher: Silent) -> None:
    before = uninterrupted.location.file(FILE_NAME).stat().st_mtime_ns
    run = search(uninterrupted.campaign, uninterrupted.location, watcher=watcher)
    assert watcher.phases == []
    assert story(run) == story(uninterrupted)
    assert run.location.file(FILE_NAME).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("stages", "num_trials"),
    [([{"proposer": "grid", "levels": 2}], 2**3), ([{"proposer": "sobol", "evaluations": 4}], 4)],
    ids=["a proposer with nothing left to ask", "stages that leave some of the budget"],
)
def test_a_search_that_ends_before_its_budget_is_finished(
    make_campaign: Callable[..., Campaign],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    stages: list[dict[str, Any]],
    num_trials: int,
) -> None:
    """Until its budget grows: then it looks again whether there is something to ask."""
    campaign = make_campaign(space={"groups": "model"}, search=stages, budget={"evaluations": 12})
    with pytest.raises(Interrupt):
        search(campaign, tmp_path / "run", watcher=Interrupting(after=num_trials))
    assert not open_run(tmp_path / "run").is_finished, "the front has no test scores yet"
    run = search(campaign, tmp_path / "run", watcher=Silent())
    assert len(run.trials) == num_trials
    assert run.is_finished
    again = Silent()
    assert search(campaign, tmp_path / "run", watcher=again).is_finished
    assert again.phases == []
    print_finished(run, Path("campaign.yaml"), was_finished=True)
    printed = capsys.readouterr().out
    assert f"ended after {num_trials} of 12 evaluations: it had nothing left to ask" in printed
    assert "raise budget.evaluations" not in printed
    larger = campaign.model_copy(update={"budget": budget(20)})
    assert search(larger, tmp_path / "run", watcher=again).is_finished
    assert again.phases


def test_a_larger_budget_extends_and_discloses_the_second_touch(
    make_campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    stages = [{"proposer": "sobol", "evaluations": 4}, {"proposer": "nsga2"}]
    first = search(make_campaign(search=stages, budget={"evaluations": 10}), tmp_path / "run", watcher=Silent())
    before, members = story(first), {trial.number for trial in first.front}
    longer = search(make_campaign(search=stages, budget={"evaluations": 40}), tmp_path / "run", watcher=Silent())
    assert story(longer)[:10] == before
    assert len(longer.trials) == 40
    new_members = {trial.number for trial in longer.front} - members
    assert longer.ledger.num_test_touches() == (2 if new_members else 1)
    with pytest.raises(RunError, match="a budget can only grow"):
        search(make_campaign(search=stages, budget={"evaluations": 10}), tmp_path / "run", watcher=Silent())


def test_a_campaign_that_differs_in_meaning_is_refused(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    search(make_campaign(budget={"evaluations": 2}), tmp_path / "run", watcher=Silent())
    with pytest.raises(RunError, match="differs in seed, space"):
        search(
            make_campaign(budget={"evaluations": 2}, seed=5, space={"groups": "model"}),
            tmp_path / "run",
            watcher=Silent(),
        )
    search(make_campaign(name="renamed", budget={"evaluations": 3}), tmp_path / "run", watcher=Silent())


def test_an_interruption_while_the_front_is_tested_is_no_second_touch(
    make_campaign: Callable[..., Campaign], tmp_path: Path
) -> None:
    class InTest(Silent):
        def advance(self, trial: object) -> None:
            if self.phases[-1][0] == "test items":
                raise Interrupt

    campaign = make_campaign(budget={"evaluations": 5})
    with pytest.raises(Interrupt):
        search(campaign, tmp_path / "run", watcher=InTest())
    run = search(campaign, tmp_path / "run", watcher=Silent())
    assert run.is_finished
    assert run.ledger.num_test_touches() == 1


def test_two_drivers_do_not_share_a_run(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    campaign = make_campaign(budget={"evaluations": 2})

    class Second(Silent):
        def advance(self, trial: object) -> None:
            if trial is not None:
                super().advance(trial)
                with pytest.raises(RunError, match="is driving this run"):
                    search(campaign, tmp_path / "run", watcher=Silent())

    second = Second()
    search(campaign, tmp_path / "run", watcher=second)
    assert second.num_advances == 2


def test_a_failed_candidate_is_a_failed_trial_and_the_campaign_goes_on(
    make_campaign: Callable[..., Campaign], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evaluator breaks down on some candidates: it raises on one, and gives NaN for another."""
    score, calls = ClassificationEvaluator.score, iter(range(10**6))

    def flaky(self: Any, model: Any, task: str, items: Any) -> Any:
        scores = score(self, model, task, items)
        call = next(calls)
        if call == 51:
            raise RuntimeError("broken")
        if call == 54:
            scores["accuracy"][:3] = np.nan
        return scores

    monkeypatch.setattr(ClassificationEvaluator, "score", flaky)
    run = search(make_campaign(budget={"evaluations": 12}), tmp_path / "run", watcher=Silent())
    failures = [trial.failure for trial in run.trials if trial.failure]
    assert len(run.trials) == 12
    assert len(failures) == 2
    assert failures[0] == "RuntimeError: broken"
    assert "3 of" in failures[1]
    assert "no finite accuracy" in failures[1]
    assert run.failure_kinds == {"evaluator error": 1, "not finite": 1}
    assert run.is_finished


@pytest.mark.parametrize("first_broken", [0, 5])
def test_an_evaluator_that_raises_on_the_base_ends_the_run_with_its_reason(
    make_campaign: Callable[..., Campaign], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first_broken: int
) -> None:
    """What does not work at all is found in the rehearsal of three tasks; what does not work on one item, later."""
    score, calls = ClassificationEvaluator.score, iter(range(10**6))

    def broken(*given: Any) -> Any:
        if next(calls) >= first_broken:
            raise KeyError("pixel_values")
        return score(*given)

    monkeypatch.setattr(ClassificationEvaluator, "score", broken)
    told = (
        "task rot90 cannot be scored: KeyError"
        if first_broken == 0
        else "base cannot be scored on the search items: KeyError"
    )
    with pytest.raises(EvoMergeError, match=told) as caught:
        search(make_campaign(), tmp_path / "run", watcher=Silent())
    assert caught.value.exit_status == (2 if first_broken == 0 else 1)


def test_summaries_steer_are_shown_and_survive_a_resume(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    """The mean of two, normalized by the experts' own scores, and the worst of two others, one of them bounded."""
    plain = [{"name": name, "task": task, "metric": "accuracy"} for name, task in (("r", "rot90"), ("p", "parity"))]
    again = [{**plain[0], "name": "r2"}, {"name": "n", "task": "noise", "metric": "accuracy", "ceiling": 0.9}]
    summaries = [
        {"name": "share", "mean": ["r", "p"], "normalized_by": {"r": "rot90", "p": "parity"}},
        {"name": "least", "worst": ["r2", "n"]},
    ]
    changes = {"objectives": [*plain, *again, *summaries], "search": [{"proposer": "nsga2", "population": 4}]}
    with pytest.raises(Interrupt):
        search(make_campaign(**changes, budget={"evaluations": 12}), tmp_path / "run", watcher=Interrupting(after=6))
    run = search(make_campaign(**changes, budget={"evaluations": 12}), tmp_path / "run", watcher=Silent())
    whole = search(make_campaign(**changes, budget={"evaluations": 12}), tmp_path / "whole", watcher=Silent())
    assert story(run) == story(whole)
    assert [objective.name for objective in run.steering] == ["share", "least"]
    for split in (run.searched, run.tested):
        own = {"r": split["expert:rot90"].scores["r"].value, "p": split["expert:parity"].scores["p"].value}
        for measurement in split.values():
            value = {name: score.value for name, score in measurement.scores.items()}
            assert value["share"] == pytest.approx((value["r"] / own["r"] + value["p"] / own["p"]) / 2)
            assert value["least"] == min(value["r2"], value["n"])
    assert all(run.searched[f"trial:{trial.number}"].scores["n"].value <= 0.9 for trial in run.front)
    gain, error = run.gain("uniform", "base")
    assert np.isfinite([gain, error]).all()
    print_front(run)
    write_report(run, tmp_path / "report.html")


@pytest.mark.parametrize("changed", ["expert/model.safetensors", "data/parity.safetensors"])
def test_changed_inputs_are_noticed(
    make_campaign: Callable[..., Campaign], small_digits: FamilySummary, tmp_path: Path, changed: str
) -> None:
    shutil.copytree(small_digits.path / "experts" / "rot90", tmp_path / "expert")
    shutil.copytree(small_digits.path / "data", tmp_path / "data")
    evaluation = {"kind": "classification", "data": str(tmp_path / "data")}
    campaign = make_campaign(
        experts={"rot90": str(tmp_path / "expert")}, evaluation=evaluation, budget={"evaluations": 2}
    )
    search(campaign, tmp_path / "run", watcher=Silent())
    tensors = load_file(tmp_path / changed)
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).add_(0.5)
    save_file(tensors, tmp_path / changed, metadata={"format": "pt"})
    longer = campaign.model_copy(update={"budget": budget(3)})
    with pytest.raises(RunError, match=f"{changed.split('/', maxsplit=1)[0]} has changed"):
        search(longer, tmp_path / "run", watcher=Silent())


def test_descents_lower_the_loss_they_descend(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    stages = [{"proposer": "adamerging", "loss": "ce", "steps": 40, "learning_rate": 0.02, "batch_size": 10**6}]
    run = search(make_campaign(search=stages, budget={"evaluations": 2}), tmp_path / "run", watcher=Silent())
    arrivals = [trial.measurement.arrival for trial in run.trials if trial.measurement and trial.measurement.arrival]
    losses = [loss for arrival in arrivals for loss in arrival.losses]
    assert len(losses) == 80
    assert losses[-1] < losses[0]
    assert run.trials[1].candidate.point == arrivals[0].point
    assert all(trial.measurement.cost > 1 for trial in run.trials if trial.measurement)


def test_a_descent_moves_the_numbers_of_its_own_stage(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    descent = {"proposer": "adamerging", "loss": "ce", "steps": 5, "learning_rate": 0.02}
    stages = [{**descent, "evaluations": 1, "space": {"groups": "model"}}, descent]
    run = search(make_campaign(search=stages, budget={"evaluations": 2}), tmp_path / "run", watcher=Silent())
    assert [trial.failure for trial in run.trials] == [None, None]
    coarse, fine = run.trials
    num_experts = len(run.campaign.experts)
    assert (len(coarse.point), len(fine.point)) == (num_experts, len(run.facts["stages"][1]["space"]))
    assert len(fine.point) > num_experts
    assert set(fine.candidate.point) == set(coarse.point)  # it begins where the stage before has ended
    assert fine.point != fine.candidate.point


def test_slopes_on_a_descents_way_are_those_of_the_loss(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    """All adapt items in every step, so that the slopes between two points foretell what the losses differ by."""
    stages = [{"proposer": "gradient_front", "steps": 12, "learning_rate": 0.01, "batch_size": 10**6}]
    run = search(make_campaign(search=stages, budget={"evaluations": 1}), tmp_path / "run", watcher=Silent())
    arrival = run.trials[0].measurement and run.trials[0].measurement.arrival
    assert arrival
    assert arrival.slopes
    points_BD = np.reshape(arrival.slopes.points, (12, -1))
    losses_BM = np.reshape(arrival.slopes.losses, (12, -1))
    gradients_BMD = np.reshape(arrival.slopes.gradients, (12, len(run.steering), -1))
    steps_BD, middle_BMD = np.diff(points_BD, axis=0), (gradients_BMD[1:] + gradients_BMD[:-1]) / 2
    foretold_BM = np.einsum("bmd,bd->bm", middle_BMD, steps_BD)
    np.testing.assert_allclose(np.diff(losses_BM, axis=0), foretold_BM, rtol=0.05, atol=2e-4)


def test_a_front_descends_at_once(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    """Each anchor comes to be better at its own objective's loss than the anchors are on average."""
    stages = [{"proposer": "gradient_front", "steps": 60, "batch_size": 64}]
    run = search(make_campaign(search=stages, budget={"evaluations": 4}), tmp_path / "run", watcher=Silent())
    first, *ends = run.trials
    assert first.measurement is not None
    assert first.measurement.arrival is not None
    num_objectives = len(run.steering)
    anchors = np.array(first.measurement.arrival.anchors).reshape(num_objectives, -1)
    assert first.point == pytest.approx(tuple(anchors.mean(axis=0)))
    assert first.measurement.cost > 1
    losses = np.full((num_objectives, num_objectives), np.nan)
    for trial in ends[:num_objectives]:
        (place,) = np.flatnonzero((np.abs(anchors - trial.point) < 1e-12).all(axis=1))
        assert trial.measurement is not None
        assert trial.measurement.cost == 1
        losses[place] = [trial.measurement.scores[objective.name].companion.mean() for objective in run.steering]
    assert (np.diag(losses) < losses.mean(axis=0)).all()


def test_auto_takes_the_gradient_front_where_losses_have_gradients(
    make_campaign: Callable[..., Campaign], small_digits: FamilySummary
) -> None:
    campaign = make_campaign(search="auto", budget={"evaluations": 30})
    stages = make_stages(campaign, make_plan(campaign))
    assert [stage.proposer for stage in stages] == ["gradient_front", "surrogate"]
    assert sum(stage.num_evaluations for stage in stages) == 30
    longer = make_stages(campaign.model_copy(update={"budget": budget(300)}), make_plan(campaign))
    assert longer[0] == stages[0]
    split = {"adapt": 0.0, "search": 0.5, "test": 0.5}
    evaluation = {"kind": "classification", "data": str(small_digits.path / "data"), "split": split}
    without_adapt_items = make_campaign(search="auto", evaluation=evaluation, budget={"evaluations": 30})
    (only,) = make_stages(without_adapt_items, make_plan(without_adapt_items))
    assert (only.proposer, only.num_evaluations) == ("surrogate", 30)


def test_a_run_whose_ledger_was_never_begun_starts_anew(make_campaign: Callable[..., Campaign], tmp_path: Path) -> None:
    """A process killed while it creates the ledger leaves an empty file."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE_NAME).touch()
    assert search(make_campaign(budget={"evaluations": 2}), tmp_path / "run", watcher=Silent()).is_finished
