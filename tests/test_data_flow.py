"""Campaigns in the data-flow space, on a small real language family: layers are chosen, repeated and scaled."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_adapters
import yaml
from silent_watcher import Interrupt, Interrupting

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.recipe_file import read_recipe, write_recipe
from evomerge.errors import CampaignError, CheckpointError, InputError
from evomerge.families.family import FamilySummary
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.resident import load_model
from evomerge.publish.export import export_trial, merge_recipe, verify_export
from evomerge.records import Trial
from evomerge.report.front import print_front
from evomerge.report.html import write_report
from evomerge.run.run import Run, open_run
from evomerge.run.search import search
from evomerge.scorer.scorer import Scorer
from evomerge.space.data_flow import DataFlow, PathLayer

BUDGET = 12
Write = Callable[..., Campaign]


@pytest.fixture(scope="module")
def write(small_text: FamilySummary, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """Write and read a campaign with some keys changed."""

    def written(**changes: Any) -> Campaign:
        path = tmp_path_factory.mktemp("campaign") / "campaign.yaml"
        sections = yaml.safe_load(small_text.campaign.read_text())
        sections |= {
            "base": str(small_text.path / "base"),
            "experts": {name: str(small_text.path / "experts" / name) for name in ("python", "sort")},
            "operator": None,
            "space": {"kind": "data_flow", "max_layers": 3},
            "objectives": [{"name": name, "task": name, "metric": "loss"} for name in ("python", "sort")],
            "search": [{"proposer": "random"}],
            "budget": {"evaluations": BUDGET},
        }
        sections["evaluation"] |= {
            "data": str(small_text.path / "data"),
            "split": {"adapt": 0.0, "search": 0.5, "test": 0.5},
        }
        sections |= changes
        path.write_text(yaml.safe_dump({key: value for key, value in sections.items() if value is not None}))
        return read_campaign(path)

    return written


@pytest.fixture(scope="module")
def run(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return search(write(), tmp_path_factory.mktemp("whole") / "run")


def path_of(plan: Plan, trial: Trial) -> tuple[PathLayer, ...]:
    assert isinstance(plan.space, DataFlow)
    return plan.space.path(trial.point)


def values(run: Run) -> list[dict[str, float]]:
    found = []
    for trial in run.trials:
        assert trial.measurement is not None, trial.failure
        found.append({name: score.value for name, score in trial.measurement.scores.items()})
    return found


def quiet(_: str) -> None:
    """Nothing to show."""


def test_it_starts_at_the_first_expert_and_goes_elsewhere(run: Run) -> None:
    scores = values(run)
    of_expert = run.searched["expert:python"].scores
    assert scores[0] == {name: score.value for name, score in of_expert.items()}
    assert len({score["python"] for score in scores}) == BUDGET
    depths = {len(path_of(make_plan(run.campaign), trial)) for trial in run.trials}
    assert max(depths) == 3


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Interrupt):
        search(run.campaign, tmp_path / "run", watcher=Interrupting(5))
    resumed = search(run.campaign, tmp_path / "run")
    assert [trial.candidate for trial in resumed.trials] == [trial.candidate for trial in run.trials]
    assert values(resumed) == values(run)
    assert {name: of.weights for name, of in resumed.tested.items()} == {
        name: of.weights for name, of in run.tested.items()
    }


def test_an_export_is_an_ordinary_checkpoint_that_scores_what_was_recorded(run: Run, tmp_path: Path) -> None:
    """The best of those whose first layer is the second expert's, with the first expert's embeddings before it."""
    plan = make_plan(run.campaign)
    found = [trial for trial in run.front if f"trial:{trial.number}" in run.tested] + run.trials
    trial = next(trial for trial in found if path_of(plan, trial)[0].expert == 1)
    export_trial(run, trial, tmp_path / "out", quiet)
    rows = verify_export(run, trial, tmp_path / "out", quiet)
    assert rows
    assert all(row.rescored == row.recorded for row in rows)
    model: Any = load_model(open_checkpoint("out", tmp_path / "out"), "float32")
    assert model.config.num_hidden_layers == len(path_of(plan, trial))
    recipe = plan.recipe(trial.point)
    assert read_recipe(tmp_path / "out" / "recipe.yaml").recipe == recipe
    digest = merge_recipe(tmp_path / "out" / "recipe.yaml", tmp_path / "again", "cpu", quiet).weights
    if tested := run.tested.get(f"trial:{trial.number}"):
        assert digest == tested.weights
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"by passthrough in {len(path_of(plan, trial))} layers" in card
    assert "mergekit cannot make this merge: embeddings or head are taken from another expert" in card


def test_it_is_shown(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_front(run)
    assert "models on the front" in capsys.readouterr().out
    write_report(run, tmp_path / "report.html")
    assert '["on","python","' in (tmp_path / "report.html").read_text(encoding="utf-8")
    path = path_of(make_plan(run.campaign), run.trials[3])
    numbers = run.numbers_of(run.trials[3])
    assert [number for dimension, number in numbers if dimension["parameter"] == "on"].count(1.0) == len(path)
    scales = [number for dimension, number in numbers if dimension["parameter"] == "scale"]
    np.testing.assert_allclose(1 / np.cumprod(scales), [step.gain for step in path])
    assert open_run(run.location).campaign == run.campaign


def test_a_product_is_an_expert_of_the_next_campaign(run: Run, write: Write, tmp_path: Path) -> None:
    """Merge first, then lay paths: any checkpoint of the base's shape is an expert."""
    plan = make_plan(run.campaign)
    path = tmp_path / "recipe.yaml"
    write_recipe(plan.task_arithmetic([0.5, 0.5]), path)
    merge_recipe(path, tmp_path / "merged", "cpu", quiet)
    experts = {"merged": str(tmp_path / "merged"), "sort": run.campaign.experts["sort"]}
    scorer = Scorer(make_plan(write(experts=experts)))
    [start] = scorer.plan.space.starts
    scored, reference = (
        scorer.score(recipe, "search").scores
        for recipe in (scorer.plan.recipe(start), scorer.plan.task_arithmetic([1.0, 0.0]))
    )
    assert {name: score.value for name, score in scored.items()} == {
        name: score.value for name, score in reference.items()
    }


class TestRefusals:
    def test_adapters(self, write: Write, small_text: FamilySummary, tmp_path: Path) -> None:
        base = load_model(open_checkpoint("base", small_text.path / "base"), "float32")
        factors = tiny_adapters.random_factors(base, ["model.layers.0.self_attn.q_proj"])
        folder = tiny_adapters.write_adapter(tmp_path / "adapter", factors)
        with pytest.raises(CampaignError, match="expert lora: an adapter has no layers of its own"):
            make_plan(write(experts={"lora": str(folder)}))

    def test_task_vectors_in_8_bits(self, write: Write) -> None:
        with pytest.raises(InputError, match="residence: int8: paths run on the experts' own tensors"):
            Scorer(make_plan(write(residence="int8")))

    def test_another_depth(self, run: Run, write: Write, tmp_path: Path) -> None:
        plan = make_plan(run.campaign)
        trial = next(trial for trial in run.trials if len(path_of(plan, trial)) == 3)
        export_trial(run, trial, tmp_path / "out", quiet)
        with pytest.raises(CheckpointError, match=r"expert deep adds \d+ tensors against the base"):
            make_plan(write(experts={"deep": str(tmp_path / "out")}))
