"""Adapters from the outside: a recipe, a campaign, an export."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_cli import evomerge
from tiny_adapters import products, random_factors, write_adapter

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.course import Course
from evomerge.campaign.plan import make_plan
from evomerge.errors import CheckpointError, InputError
from evomerge.families.family import FamilySummary
from evomerge.materialize.adapter import Adapter
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.resident import empty_model
from evomerge.publish.export import export_trial
from evomerge.run.search import search

MODULES = ["layers.0.attention.q_proj", "layers.1.mlp.fc1"]
SCALING = 1.5  # as tiny_adapters writes it
SOBOL = [{"proposer": "sobol"}]


def quiet(_: str) -> None:
    """Nothing to show."""


@pytest.fixture
def adapters(small_digits: FamilySummary, tmp_path: Path) -> dict[str, str]:
    """Two adapters of the small family's base."""
    model = empty_model(open_checkpoint("base", small_digits.path / "base"))
    return {
        name: str(write_adapter(tmp_path / name, random_factors(model, MODULES, seed=seed)))
        for seed, name in enumerate(("first", "second"))
    }


def test_merge_takes_a_recipe_with_an_adapter(
    tmp_path: Path, small_digits: FamilySummary, adapters: dict[str, str]
) -> None:
    full = str(small_digits.path / "experts" / "rot90")
    sections = {
        "base": str(small_digits.path / "base"),
        "experts": {"rot90": full, "lora": adapters["first"]},
        "coefficient": {"rot90": 0.4, "lora": 0.8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    done = evomerge("merge", "recipe.yaml", "--out", "merged", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    base, expert, merged = (
        load_file(Path(folder) / "model.safetensors") for folder in (sections["base"], full, tmp_path / "merged")
    )
    on_disk = {  # as the files name them
        "layers.0.attention.q_proj": "encoder.layer.0.attention.attention.query",
        "layers.1.mlp.fc1": "encoder.layer.1.intermediate.dense",
    }
    factors = load_file(Path(adapters["first"]) / "adapter_model.safetensors")
    deltas = products({name.removeprefix("base_model.model."): t for name, t in factors.items()}, SCALING)
    moved = {f"{on_disk[module]}.weight": delta for module, delta in deltas.items()}
    assert moved.keys() <= merged.keys() == base.keys()
    for name, tensor in merged.items():
        exact = base[name].double() + 0.4 * (expert[name].double() - base[name]) + 0.8 * moved.get(name, 0.0)
        torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_refused_adapter_is_a_mistake_in_one_line(
    tmp_path: Path, small_digits: FamilySummary, adapters: dict[str, str]
) -> None:
    folder = write_adapter(tmp_path / "dora", {}, use_dora=True)
    sections = {"base": str(small_digits.path / "base"), "experts": {"lora": str(folder)}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(sections))
    done = evomerge("merge", "recipe.yaml", "--out", "merged", cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "use_dora: True" in done.stderr


class TestCampaign:
    @pytest.fixture
    def campaign(
        self, make_campaign: Callable[..., Campaign], small_digits: FamilySummary, adapters: dict[str, str]
    ) -> Callable[..., Campaign]:
        full = {"rot90": str(small_digits.path / "experts" / "rot90")}
        return lambda *, mixed=True, **changes: make_campaign(
            experts=adapters | full if mixed else adapters, **{"budget": {"evaluations": 6}, **changes}
        )

    def test_it_is_searched_and_exported(self, campaign: Callable[..., Campaign], tmp_path: Path) -> None:
        """Descents through the factors first; what is exported is what was tested, bit for bit."""
        stages = [{"proposer": "adamerging", "evaluations": 2, "loss": "ce", "steps": 2}, {"proposer": "sobol"}]
        run = search(campaign(search=stages), tmp_path / "run")
        assert not [trial.failure for trial in run.trials if trial.failure]
        assert {"expert:first", "expert:second", "expert:rot90"} <= run.tested.keys()
        export_trial(run, run.front[0], tmp_path / "out", quiet)
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["experts"].keys() == {
            "first",
            "second",
            "rot90",
        }

    def test_ties_and_lora_are_searched(self, campaign: Callable[..., Campaign], tmp_path: Path) -> None:
        for operator, mixed in (("ties", True), ("lora", False)):
            asked = campaign(mixed=mixed, operator={"name": operator}, space={"groups": "model"}, search=SOBOL)
            run = search(asked, tmp_path / operator)
            assert not [trial.failure for trial in run.trials if trial.failure]

    def test_evo_merging_denoises_and_then_scales(self, campaign: Callable[..., Campaign], tmp_path: Path) -> None:
        """First the kept fractions at equal coefficients, then the coefficients at the best fractions."""
        ranged = {"low": 0.0, "high": 1.0, "start": 1.0}
        evolve = {"proposer": "cma_es", "population": 4, "penalty": 0.05}
        stages = [
            {**evolve, "evaluations": 4, "space": {"coefficient": 0.5}, "operator": {"density": ranged}},
            {**evolve, "operator": {"density": "best"}},
        ]
        space = {"groups": "model", "coefficient": {"low": -1.5, "high": 1.5, "start": 0.5}}
        operator = {"name": "lora", "combination": "evo_merging", "density": 1.0}
        asked = campaign(mixed=False, operator=operator, space=space, search=stages, budget={"evaluations": 8})
        run = search(asked, tmp_path / "run")
        assert not [trial.failure for trial in run.trials if trial.failure]
        course = Course(run.campaign, make_plan(run.campaign), run.changes)
        ancestor = run.trials[course.leg(1, run.trials).ancestor or 0]
        assert ancestor.stage == 0
        for trial in run.trials:
            values = course.recipe(trial).values
            if trial.stage == 0:
                assert values["coefficient"] == ((0.5,), (0.5,))
            else:
                assert values["density"] == course.recipe(ancestor).values["density"]
        assert len({course.recipe(trial).values["coefficient"] for trial in run.trials[4:]}) == 4
        export_trial(run, max(run.front, key=lambda trial: trial.stage), tmp_path / "out", quiet)

    def test_lora_takes_adapters_only(self, campaign: Callable[..., Campaign], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="full checkpoint.*task_arithmetic"):
            search(campaign(operator={"name": "lora"}, search=SOBOL), tmp_path / "run")

    @pytest.mark.parametrize("operator", ["task_arithmetic", "ties"])
    def test_the_plan_says_what_memory_adapters_take(self, campaign: Callable[..., Campaign], operator: str) -> None:
        plan = make_plan(campaign(operator={"name": operator}, space={"groups": "model"}))
        factors = [expert.size_bytes for expert in plan.experts.values() if isinstance(expert, Adapter)]
        models = 3 if operator == "task_arithmetic" else 5  # base, merged, rot90; TIES makes one of each adapter
        assert plan.size_bytes == models * 4 * plan.num_parameters + sum(factors)

    def test_an_adapter_that_changed_is_noticed(
        self, campaign: Callable[..., Campaign], adapters: dict[str, str], tmp_path: Path
    ) -> None:
        search(campaign(search=SOBOL), tmp_path / "run")
        config = Path(adapters["first"]) / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 3', '"lora_alpha": 5'))
        longer = campaign(search=SOBOL, budget={"evaluations": 7})
        with pytest.raises(InputError, match="has changed since"):
            search(longer, tmp_path / "run")


def test_an_adapter_of_another_model_is_refused(
    make_campaign: Callable[..., Campaign], small_digits: FamilySummary, tmp_path: Path
) -> None:
    tensors = {f"model.layers.0.mlp.up_proj.lora_{part}.weight": torch.ones(2, 2) for part in "AB"}
    folder = write_adapter(tmp_path / "other", tensors)
    with pytest.raises(CheckpointError, match="expert lora: .*up_proj.* the base has no"):
        make_plan(make_campaign(experts={"lora": str(folder)}))
