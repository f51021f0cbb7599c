"""Real campaigns on really trained experts: what is claimed of the families and of the search holds."""

from pathlib import Path

import numpy as np
import pytest

from evomerge.campaign.campaign import read_campaign
from evomerge.campaign.sections import BudgetSection, CoefficientSection, SpaceSection, StageSection
from evomerge.families.family import FamilySummary
from evomerge.publish.export import export_trial, verify_export
from evomerge.records import Measurement
from evomerge.report.front import print_front
from evomerge.report.html import write_report
from evomerge.run.run import Run
from evomerge.run.search import search


def means(measurement: Measurement) -> float:
    return float(np.mean([score.value for score in measurement.scores.values()]))


@pytest.fixture(scope="module")
def run(digits4: FamilySummary, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Labelled descents, then CMA-ES around where they ended: four tasks, one coefficient an expert and layer."""
    stages = [
        StageSection(proposer="adamerging", evaluations=8, options={"loss": "ce", "steps": 25, "learning_rate": 0.01}),
        StageSection(proposer="cma_es", options={"sigma": 0.08}),
    ]
    update = {"search": stages, "budget": BudgetSection(evaluations=80)}
    campaign = read_campaign(digits4.campaign).model_copy(update=update)
    return search(campaign, tmp_path_factory.mktemp("end") / "run")


def test_experts_are_clearly_better_than_the_base_and_than_the_uniform_average(run: Run) -> None:
    for objective in run.objectives:
        expert = run.tested[f"expert:{objective.name}"].scores[objective.name]
        for other in ("base", "uniform"):
            rival = run.tested[other].scores[objective.name]
            assert expert.value - rival.value > 2 * np.hypot(expert.stderr, rival.stderr)


def test_the_searched_model_beats_average_and_best_scalar_by_two_standard_errors(run: Run) -> None:
    """Chosen by its mean on search items; compared on test items, paired, clustered by image."""
    best = max(run.front, key=lambda trial: means(run.searched[f"trial:{trial.number}"]))
    for reference in ("uniform", run.best_scalar):
        gain, error = run.gain(f"trial:{best.number}", reference)
        assert gain > 2 * error, f"{gain:+.4f} ± {error:.4f} over {reference}"


def test_descents_improve_on_the_start(run: Run) -> None:
    legs = [trial.measurement for trial in run.trials if trial.stage == 0 and trial.measurement]
    losses = [loss for leg in legs if leg.arrival for loss in leg.arrival.losses]
    assert np.mean(losses[-25:]) < np.mean(losses[:5])
    assert means(legs[-1]) > means(run.searched["scalar:0.3"])


def test_test_items_were_used_once_and_only_for_front_and_references(run: Run) -> None:
    members = {f"trial:{trial.number}" for trial in run.front}
    assert run.ledger.num_test_touches() == 1
    assert {subject for subject in run.tested if subject.startswith("trial:")} == members
    assert {subject.split(":")[0] for subject in run.references} == {"base", "expert", "uniform", "scalar"}


def test_one_expert_alone_is_that_expert_and_zero_is_the_base(run: Run, digits4: FamilySummary) -> None:
    """The references are merges too: their scores are those of the checkpoints themselves."""
    from evomerge.campaign.plan import make_plan
    from evomerge.materialize.checkpoint import open_checkpoint
    from evomerge.materialize.resident import load_model

    plan = make_plan(run.campaign)
    for subject, folder in (("base", Path("base")), ("expert:mod5", Path("experts/mod5"))):
        model = load_model(open_checkpoint(subject, digits4.path / folder), "float32")
        for objective in run.objectives:
            items = plan.splits[objective.task]["search"]
            scores = plan.evaluator.score(model, objective.task, items)[objective.metric]
            assert (scores == run.searched[subject].scores[objective.name].items).all()


def test_a_language_campaign_runs_on_all_three_forms(small_text: FamilySummary, tmp_path: Path) -> None:
    campaign = read_campaign(small_text.campaign)
    evaluation = campaign.evaluation | {"split": {"adapt": 0.0, "search": 0.5, "test": 0.5}}
    # a seed by which the few files of every corpus come into both splits
    update = {"budget": BudgetSection(evaluations=6), "evaluation": evaluation, "seed": 1}
    campaign = campaign.model_copy(update=update)
    run = search(campaign, tmp_path / "run")
    assert not [trial.failure for trial in run.trials if trial.failure]
    assert {objective.metric for objective in run.objectives} == {"loss", "exact_match", "accuracy"}
    assert run.is_finished


def test_a_choice_of_operators_is_searched_shown_and_exported(digits4: FamilySummary, tmp_path: Path) -> None:
    """Three operators, shared coefficients over depth: every one is tried, and what is exported scores the same."""
    operators = [
        {"name": "task_arithmetic"},
        {"name": "ties", "density": {"low": 0.1, "high": 0.9}},
        {"name": "linear"},
    ]
    update = {
        "operator": operators,
        "space": SpaceSection(coefficient=CoefficientSection(knots=2)),
        "search": [StageSection(proposer="sobol")],
        "budget": BudgetSection(evaluations=8),
    }
    campaign = read_campaign(digits4.campaign)
    campaign = campaign.model_copy(update=update | {"objectives": campaign.objectives[:2]})
    run = search(campaign, tmp_path / "run")
    assert {run.operator_of(trial) for trial in run.trials} == {"task_arithmetic", "ties", "linear"}
    assert not [trial.failure for trial in run.trials if trial.failure]
    for trial in run.trials:
        plain, own = len(run.campaign.experts) * 2, len(run.campaign.experts)
        assert len(run.numbers_of(trial)) == plain + (own if run.operator_of(trial) == "ties" else 0)
    print_front(run)
    write_report(run, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '"dimensions":"13","operators":["task_arithmetic","ties","linear"]' in page
    by_ties = next(trial for trial in run.trials if run.operator_of(trial) == "ties")
    export_trial(run, by_ties, tmp_path / "out", lambda _: None)
    assert all(row.rescored == row.recorded for row in verify_export(run, by_ties, tmp_path / "out", lambda _: None))


def test_a_choice_of_operators_with_gradients_descends_within_the_chosen_one(
    digits4: FamilySummary, tmp_path: Path
) -> None:
    update = {
        "operator": [{"name": "linear", "normalize": False}, {"name": "task_arithmetic"}],
        "search": [StageSection(proposer="adamerging", options={"loss": "ce", "steps": 4, "learning_rate": 0.01})],
        "budget": BudgetSection(evaluations=2),
    }
    campaign = read_campaign(digits4.campaign)
    campaign = campaign.model_copy(update=update | {"objectives": campaign.objectives[:1]})
    run = search(campaign, tmp_path / "run")
    first, second = run.trials
    assert first.point[0] == second.point[0] == 0.25
    assert first.point[1:] != first.candidate.point[1:]
    assert second.candidate.point == first.point
