"""Campaigns in the data-flow space, on a small real language family: layers are chosen, repeated and scaled."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_adapters
import yaml
from silent_watcher import Interrupt, Interrupting

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.campaign.course import Course
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.recipe_file import read_recipe, write_recipe
from evomerge.campaign.stages import make_stages
from evomerge.check import check_campaign
from evomerge.errors import CampaignError, CheckpointError, InputError
from evomerge.families.family import FamilySummary
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.resident import load_model
from evomerge.publish.export import Form, export_trial, merge_recipe, verify_export
from evomerge.records import Candidate, Measurement, Trial
from evomerge.report.front import print_front
from evomerge.report.html import write_report
from evomerge.report.trial import trial as show_trial
from evomerge.run.rebuild import recipe_of
from evomerge.run.replay import replay
from evomerge.run.run import Run, open_run
from evomerge.run.search import search
from evomerge.scorer.scorer import Scorer
from evomerge.space.data_flow import DataFlow, PathLayer

BUDGET = 12
HYBRID = [  # weights first, then layers, then layers with fewer experts
    {"proposer": "cma_es", "evaluations": 4, "population": 4},
    {"proposer": "catcma", "evaluations": 6, "population": 4, "space": {"kind": "data_flow", "max_layers": 4}},
    {"proposer": "random", "space": {"kind": "data_flow", "repeats": 1, "scale": 1.0}, "keep_experts": 1},
]
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
        merging = write(experts={"lora": str(folder)}, space={}, search=HYBRID)
        with pytest.raises(CampaignError, match=r"search\[1\]: expert lora: an adapter has no layers of its own"):
            make_stages(merging, make_plan(merging))

    def test_task_vectors_in_8_bits(self, write: Write) -> None:
        with pytest.raises(InputError, match="residence: int8: paths run on the experts' own tensors"):
            Scorer(make_plan(write(residence="int8")))

    def test_another_depth(self, run: Run, write: Write, tmp_path: Path) -> None:
        plan = make_plan(run.campaign)
        trial = next(trial for trial in run.trials if len(path_of(plan, trial)) == 3)
        export_trial(run, trial, tmp_path / "out", quiet)
        with pytest.raises(CheckpointError, match=r"expert deep adds \d+ tensors against the base"):
            make_plan(write(experts={"deep": str(tmp_path / "out")}))


@pytest.fixture(scope="module")
def hybrid(write: Write) -> Campaign:
    return write(space={"groups": "layer"}, search=HYBRID, budget={"evaluations": 12})


@pytest.fixture(scope="module")
def mixed(hybrid: Campaign, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return search(hybrid, tmp_path_factory.mktemp("mixed") / "run")


def course_of(run: Run) -> Course:
    course = Course(run.campaign, make_plan(run.campaign), run.changes)
    course.leg(len(run.changes) - 1, run.trials)
    return course


def value_of(measured: Measurement | None) -> dict[str, float]:
    assert measured is not None
    return {name: score.value for name, score in measured.scores.items()}


class TestPathsThroughMerges:
    """A campaign that merges weights, and then lays paths through the layers of the best merge and of the experts."""

    def test_a_stage_starts_at_the_best_merge(self, mixed: Run) -> None:
        """The identity path scores what the merge did, and its proposer knows; on a worker as it is sent there."""
        leg = course_of(mixed).leg(1, mixed.trials)
        means = [sum(value_of(trial.measurement).values()) for trial in mixed.trials[:4]]
        assert leg.merged == leg.ancestor == means.index(min(means))  # losses
        problem = leg.problem((0,))
        assert problem.best_is_scored
        assert len(problem.history) == 1  # no path is another merge
        scorer = Scorer(make_plan(mixed.campaign))
        scorer.configure(pickle.loads(pickle.dumps(leg.plan.stage_space)))
        scored = scorer.score(Candidate(point=tuple(problem.start)), "search")
        assert value_of(scored) == value_of(mixed.trials[leg.merged].measurement)
        recipe = course_of(mixed).recipe(mixed.trials[leg.merged])
        merge, path = (scorer.score(one, "test").weights for one in (recipe, leg.plan.recipe(problem.start)))
        assert merge == path
        scorer.adopt(scorer.buffers())  # as workers of one machine do
        again = Candidate(point=mixed.trials[7].point)
        assert value_of(scorer.score(again, "search")) == value_of(mixed.trials[7].measurement)

    def test_the_next_such_stage_starts_at_the_best_path(self, mixed: Run) -> None:
        first, second = (course_of(mixed).leg(number, mixed.trials) for number in (1, 2))
        assert second.plan.merged == first.plan.merged
        assert second.left_out in (("python",), ("sort",))
        assert {dimension.expert for dimension in second.plan.space.dimensions} == {
            "merged", "python", "sort",
        } - set(second.left_out)  # fmt: skip
        best = min(mixed.trials[:10], key=lambda trial: sum(value_of(trial.measurement).values()))
        assert second.ancestor == best.number

    def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
        self, hybrid: Campaign, mixed: Run, tmp_path: Path
    ) -> None:
        """Within each stage and between two of them; and as far as a larger budget goes."""
        for further in (2, 2, 3, 3, 1):
            with pytest.raises(Interrupt):
                search(hybrid, tmp_path / "run", watcher=Interrupting(further))
        search(hybrid, tmp_path / "run")
        budget = hybrid.budget.model_copy(update={"evaluations": 13})
        run = search(hybrid.model_copy(update={"budget": budget}), tmp_path / "run")
        assert [trial.candidate for trial in run.trials[:12]] == [trial.candidate for trial in mixed.trials]
        assert values(run)[:12] == values(mixed)
        assert run.facts["stages"] == mixed.facts["stages"]
        assert [of.difference for of in replay(run)] == [None, None, None]

    def test_an_export_rebuilds_the_merge_and_the_path(self, mixed: Run, tmp_path: Path) -> None:
        plan = make_plan(mixed.campaign)
        recipes = {trial.number: recipe_of(mixed, trial, plan) for trial in mixed.trials if trial.stage > 0}
        sources = {number: np.argmax(recipe.values["coefficient"], axis=0) for number, recipe in recipes.items()}
        found = [number for number, of in sources.items() if 0 in of and of.max() > 0]
        number = next((number for number in found if f"trial:{number}" in mixed.tested), found[0])
        out = tmp_path / "out"
        export_trial(mixed, mixed.trials[number], out, quiet)
        rows = verify_export(mixed, mixed.trials[number], out, quiet)
        assert rows
        assert all(row.rescored == row.recorded for row in rows)
        assert read_recipe(out / "recipe.yaml").recipe == recipes[number]
        digest = merge_recipe(out / "recipe.yaml", tmp_path / "again", "cpu", quiet).weights
        card = (out / "README.md").read_text()
        assert digest in card
        if tested := mixed.tested.get(f"trial:{number}"):
            assert digest == tested.weights
        assert "A merge of merged (python, sort by task_arithmetic), python, sort by passthrough in" in card
        assert "mergekit cannot make this merge: one of its experts is a merge itself" in card
        export_trial(mixed, mixed.trials[number], tmp_path / "public", quiet, Form(is_public=True))
        handed_on = (tmp_path / "public" / "recipe.yaml").read_text()
        assert "experts: python: python sort: sort" in " ".join(handed_on.split())
        assert not any(place in handed_on for place in (mixed.campaign.base, *mixed.campaign.experts.values()))
        assert not (out / "mergekit.yaml").exists()

    def test_a_merge_is_exported_as_without_paths(self, mixed: Run, tmp_path: Path) -> None:
        export_trial(mixed, mixed.trials[1], tmp_path / "out", quiet)
        rows = verify_export(mixed, mixed.trials[1], tmp_path / "out", quiet)
        assert all(row.rescored == row.recorded for row in rows)

    def test_it_is_shown(self, mixed: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        print_front(mixed)
        assert "along paths through the layers of trial" in capsys.readouterr().out
        write_report(mixed, tmp_path / "report.html")
        text = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert '"operators":["task_arithmetic","passthrough"]' in text
        assert '["on","merged","layer0 pass 2"]' in text
        for number, operator, parameters in (
            (1, "task_arithmetic", {"coefficient"}),
            (5, "passthrough", {"on", "scale"}),
        ):
            shown = show_trial(mixed, mixed.trials[number])
            assert shown.facts["operator"] == operator
            assert {row["parameter"] for row in shown.tables["numbers"]} == parameters
        frame = mixed.trials_frame()
        assert frame["operator"].tolist() == ["task_arithmetic"] * 4 + ["passthrough"] * 8

    def test_what_it_takes_is_known_before(self, hybrid: Campaign) -> None:
        """Room for what paths scale, beside the merge that they are laid through."""
        report = check_campaign(hybrid, quiet)
        assert report.plan.size_bytes == 5 * 4 * report.plan.num_parameters
        assert [stage.num_dimensions for stage in report.stages] == [8, 24, 4]
