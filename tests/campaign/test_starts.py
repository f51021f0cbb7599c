"""Starts that the experts give, from the outside: real checkpoints and adapters, a plan that begins, a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_adapters import MODULES, SCALING
from tiny_adapters import products, random_factors, write_adapter
from torch import Tensor

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import Plan, make_plan
from evomerge.check import check_campaign
from evomerge.errors import InputError
from evomerge.families.family import FamilySummary
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.resident import empty_model, load_model, merged_tensors
from evomerge.run.run import Run
from evomerge.run.search import search
from evomerge.scorer.scorer import Scorer

SOBOL = [{"proposer": "sobol"}]


def coefficient(**start: Any) -> dict[str, Any]:
    return {"low": -0.2, "high": 1.2, "start": start}


def named_tensors(folder: Path) -> dict[str, Tensor]:
    return {
        name: tensor.detach().double()
        for name, tensor in merged_tensors(load_model(open_checkpoint("x", folder), "float32")).items()
    }


@pytest.fixture(scope="module")
def lora(small_digits: FamilySummary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of two matrices of the small family's base."""
    model = empty_model(open_checkpoint("base", small_digits.path / "base"))
    factors = random_factors(model, MODULES, scale=0.1)
    return write_adapter(tmp_path_factory.mktemp("lora") / "lora", factors)


@pytest.fixture(scope="module")
def task_vectors(small_digits: FamilySummary, lora: Path) -> dict[str, dict[str, Tensor]]:
    """Of two full experts and the adapter, float64."""
    base = named_tensors(small_digits.path / "base")
    found = {
        name: {t: tensor - base[t] for t, tensor in named_tensors(small_digits.path / "experts" / name).items()}
        for name in ("rot90", "parity")
    }
    factors = load_file(lora / "adapter_model.safetensors")
    deltas = products({name.removeprefix("base_model.model."): t for name, t in factors.items()}, SCALING)
    by_tensor = {f"{module}.weight": delta for module, delta in deltas.items()}
    return found | {"lora": {name: by_tensor.get(name, torch.zeros_like(tensor)) for name, tensor in base.items()}}


@pytest.fixture
def mixed(make_campaign: Callable[..., Campaign], small_digits: FamilySummary, lora: Path) -> Callable[..., Campaign]:
    """A campaign of two full experts and the adapter."""
    experts = {name: str(small_digits.path / "experts" / name) for name in ("rot90", "parity")}
    return lambda **changes: make_campaign(
        experts=experts | {"lora": str(lora)}, **{"search": SOBOL, "budget": {"evaluations": 3}, **changes}
    )


def loaded(campaign: Campaign) -> Plan:
    return Scorer(make_plan(campaign)).plan


def expected_shares(
    plan: Plan, task_vectors: Mapping[str, Mapping[str, Tensor]], exponent: int, power: float = 1.0
) -> dict[str, float]:
    """The closed form: of every group the mean of |entry|^exponent over its tensors, to the power, over their sum."""
    found = {}
    for group, names in plan.groups.items():
        means = {
            expert: float(torch.cat([vectors[name].flatten() for name in names]).abs().pow(exponent).mean())
            for expert, vectors in task_vectors.items()
        }
        total = sum(mean**power for mean in means.values())
        found |= {f"coefficient {expert}/{group}": mean**power / total for expert, mean in means.items()}
    return found


@pytest.mark.parametrize(
    ("by", "exponent", "power"), [("mean_square", 2, 1.0), ("mean_magnitude", 1, 1.0), ("mean_magnitude", 1, 0.5)]
)
@pytest.mark.parametrize("groups", ["tensor", "layer"])
def test_shares_of_checkpoints_and_adapters_are_those_of_the_closed_form(
    mixed: Callable[..., Campaign],
    task_vectors: Mapping[str, Mapping[str, Tensor]],
    by: str,
    exponent: int,
    power: float,
    groups: str,
) -> None:
    space = {"groups": groups, "coefficient": coefficient(by=by, power=power)}
    plan = loaded(mixed(space=space))
    found = {dimension.name: dimension.start for dimension in plan.space.dimensions}
    assert found == pytest.approx(expected_shares(plan, task_vectors, exponent, power), rel=1e-5)
    assert min(number for name, number in found.items() if "lora" not in name) > 0.0
    assert any(number > 0.0 for name, number in found.items() if "lora" in name)
    values = plan.recipe(plan.space.start).values["coefficient"]
    assert np.sum(values, axis=0) == pytest.approx(1.0)


def test_every_operator_of_a_choice_starts_at_the_shares(
    mixed: Callable[..., Campaign], task_vectors: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """TIES reads no factors, and task arithmetic does: the sizes are the same."""
    operators = [{"name": "task_arithmetic"}, {"name": "ties"}, {"name": "linear"}]
    space = {"groups": "model", "coefficient": {"low": 0.0, "high": 1.0, "start": {"by": "mean_square"}}}
    plan = loaded(mixed(operator=operators, space=space))
    expected = expected_shares(plan, task_vectors, 2)
    recipes = [plan.recipe(start_D) for start_D in plan.space.starts]
    assert [recipe.operator for recipe in recipes] == ["task_arithmetic", "ties", "linear"]
    for recipe in recipes:
        found = {
            f"coefficient {expert}/model": row[0]
            for expert, row in zip(recipe.experts, recipe.values["coefficient"], strict=True)
        }
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_search_begins_at_the_shares_and_a_resumed_one_goes_on_as_it_would_have(
    mixed: Callable[..., Campaign], task_vectors: Mapping[str, Mapping[str, Tensor]], tmp_path: Path
) -> None:
    """The search draws its candidates around the start, so that the first differing digit would show."""

    def run(evaluations: int, folder: str, **start: Any) -> Run:
        space = {"groups": "layer", "coefficient": coefficient(**start)}
        stages = [{"proposer": "surrogate"}]
        return search(mixed(space=space, search=stages, budget={"evaluations": evaluations}), tmp_path / folder)

    rule = {"by": "mean_square", "total": 0.8}
    whole, short = run(6, "whole", **rule), run(3, "resumed", **rule)
    expected = expected_shares(loaded(short.campaign), task_vectors, 2)
    found = {f"coefficient {d['expert']}/{d['group']}": d["start"] for d in short.facts["stages"][0]["space"]}
    assert found == pytest.approx({name: 0.8 * number for name, number in expected.items()}, rel=1e-5)
    resumed = run(6, "resumed", **rule)
    assert [trial.point for trial in resumed.trials] == [trial.point for trial in whole.trials]
    assert [trial.point for trial in run(3, "other", by="mean_magnitude").trials] != [
        trial.point for trial in short.trials
    ]
    with pytest.raises(InputError, match="differs in space"):
        run(6, "resumed", by="mean_square", total=0.9)


def test_what_check_reports_starts_where_the_search_will(make_campaign: Callable[..., Campaign]) -> None:
    losses = {"rot90": 0.5, "parity": 1.0, "noise": 2.0}
    space = {"groups": "model", "coefficient": coefficient(by=losses, power=-1.0, total=0.7)}
    report = check_campaign(make_campaign(space=space), lambda _: None)
    starts = {dimension.expert: dimension.start for dimension in report.plan.space.dimensions}
    assert starts == pytest.approx({"rot90": 0.4, "parity": 0.2, "noise": 0.1})
