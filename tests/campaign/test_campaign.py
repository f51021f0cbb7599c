"""Every mistake in a campaign file is named with its path, in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evomerge.campaign.assemble import OPERATORS
from evomerge.campaign.campaign import Campaign, presets_folder, read_campaign
from evomerge.campaign.plan import make_plan
from evomerge.campaign.stages import make_stages
from evomerge.errors import CampaignError, CheckpointError, DataError, InputError
from evomerge.families.family import FamilySummary
from evomerge.operators.linear import TaskArithmetic
from evomerge.records import Options, ParameterSpec

OBJECTIVE = {"name": "rot90", "task": "rot90", "metric": "accuracy"}
PARITY = {"name": "parity", "task": "parity", "metric": "accuracy"}
ALL = {"name": "all", "mean": ["rot90", "parity"]}
EVALUATION = {"kind": "classification", "data": "data"}


def several(*sections: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "several", "evaluators": [EVALUATION | section for section in sections]}


def two(second: dict[str, Any], first: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A campaign of two stages."""
    stages = [{"proposer": "sobol", "evaluations": 1, **(first or {})}, {"proposer": "sobol", **second}]
    return {"search": stages, **changes}


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"nmae": "x"}, r"nmae: unknown key; did you mean 'name'\?"),
    ({"folder": "x"}, "folder: unknown key"),
    ({"name": None}, "name: missing"),
    ({"name": "../x"}, r"name: .*found '\.\./x'"),
    ({"base": 3}, "base: expected a valid string, found 3"),
    ({"experts": {}}, "experts: .*at least 1"),
    ({"operator": {"name": "tys"}}, r"operator.name: unknown operator 'tys'; did you mean 'ties'\?"),
    ({"operator": {"name": "ties", "normalise": True}}, r"operator.normalise: unknown key; did you mean 'normalize'\?"),
    ({"operator": {"name": "ties", "normalize": "yes"}}, "operator.normalize: expected a valid boolean, found 'yes'"),
    ({"operator": {"name": "ties", "density": "half"}}, "operator.density: expected a number or .*found 'half'"),
    ({"operator": {"name": "ties", "density": {"low": 0.1, "hihg": 0.9}}}, "operator.density.hihg: unknown key.*'high'"),
    ({"operator": {"name": "ties", "density": 1.5}, "space": {}}, r"density: expected a number in \[0, 1\], found 1.5"),
    ({"operator": {"name": "task_arithmetic", "coefficient": 1}}, "given under space.coefficient"),
    ({"operator": {"name": "ties", "density": []}}, r"operator.density: expected a number or a list .*found \[\]"),
    ({"operator": {"name": "ties", "density": [0.1, True]}}, r"operator.density: .*found \[0.1, True\]"),
    ({"operator": {"name": "ties", "density": {"knots": 0}}}, "operator.density.knots: .*greater than or equal to 1, found 0"),
    ({"operator": {"name": "ties", "density": {"knots": 2, "per": "group"}}}, "operator.density: give per or knots, not both"),
    ({"operator": {"name": "ties", "density": {"exceptions": {"rot91/*": 1.0}}}, "space": {}}, "density: no expert/group matches 'rot91/"),
    ({"operator": {"name": "ties", "density": {"exceptions": {"*": {"lwo": 0}}}}}, r"operator.density.exceptions.\*.lwo: unknown key.*'low'"),
    ({"operator": {"name": "ties", "density": [0.1, 1.5]}, "space": {}}, r"density: expected a number in \[0, 1\], found 1.5"),
    ({"operator": None, "space": {"kind": "dataflow"}}, "space.kind: expected 'parameter' or 'data_flow', found 'dataflow'"),
    ({"operator": None, "space": {"kind": "data_flow", "repeat": 1}}, r"space.repeat: unknown key; did you mean 'repeats'\?"),
    ({"operator": None, "space": {"kind": "data_flow", "repeats": 0}}, "space.repeats: .*greater than or equal to 1, found 0"),
    ({"operator": None, "space": {"kind": "data_flow", "scale": 0.0}}, r"space.scale: expected a number in \[0.001, 1000\], found 0"),
    ({"operator": None, "space": {"kind": "data_flow", "scale": {"low": 0.5, "hihg": 1}}}, "space.scale.hihg: unknown key.*'high'"),
    ({"operator": None, "space": {"kind": "data_flow", "scale": {"low": 2.0}}}, "expected low <= start <= high, found low 2"),
    ({"operator": {"name": "ties"}, "space": {"kind": "data_flow"}}, "operator: a data-flow space takes layers as they are"),
    ({"operator": None, "space": {"kind": "data_flow"}, "search": [{"proposer": "adamerging"}]}, "adamerging needs gradients, which a data-flow space"),
    ({"operator": []}, "operator: .*at least 1 item"),
    ({"operator": 3}, "operator: expected a valid dictionary, found 3"),
    ({"operator": [{"name": "ties"}, "linear"]}, r"operator\[1\]: expected a valid dictionary, found 'linear'"),
    ({"operator": [{"name": "ties"}, {"name": "liner"}]}, r"operator\[1\].name: unknown operator 'liner'; did you mean 'linear'\?"),
    ({"operator": [{"name": "ties"}, {}]}, r"operator\[1\].name: unknown operator None"),
    ({"operator": [{"name": "ties", "normalize": False}, {"name": "ties"}]}, "operator: ties is listed twice"),
    ({"operator": [{"name": "linear"}, {"name": "ties", "densty": 1}]}, r"operator\[1\].densty: unknown key; did you mean 'density'\?"),
    ({"operator": [{"name": "linear"}, {"name": "ties", "density": {"low": 0.1, "hgih": 1}}]}, r"operator\[1\].density.hgih: unknown key"),
    ({"operator": [{"name": "linear"}, {"name": "ties", "density": 2}], "space": {}}, r"operator\[1\]: space: density: expected .*found 2"),
    ({"operator": [{"name": "linear"}, {"name": "ties"}], "space": {"coefficient": {"low": -1.0}}}, r"operator\[1\]: space: coefficient: .*found -1"),
    ({"operator": [{"name": "linear"}, {"name": "ties"}], "space": {}, "search": [{"proposer": "adamerging"}]}, "adamerging needs gradients, which ties"),
    ({"space": {"coefficient": []}}, "space.coefficient: .*at least 1"),
    ({"space": {"coefficient": [0.1, "x"]}}, r"space.coefficient\[1\]: expected a valid number, found 'x'"),
    ({"space": {"groups": "model", "coefficient": {"knots": 2}}}, "coefficient: group 'model' is not at one depth.*groups: layer"),
    ({"space": {"groups": "model", "exceptions": {"rot90/*": [0, 1]}}}, "coefficient: group 'model' is not at one depth"),
    ({"space": {"coefficient": {"knots": 5}}}, "coefficient: no group lies near the knot 'coefficient noise/depth 0.25'; use fewer"),
    ({"space": {"gruops": "layer"}}, r"space.gruops: unknown key; did you mean 'groups'\?"),
    ({"space": {"groups": "layers"}}, "space.groups: expected 'model', 'layer', 'module' or 'tensor', found 'layers'"),
    ({"space": {"coefficient": {"low": 0, "hi": 1}}}, "space.coefficient.hi: unknown key.*'high'"),
    ({"space": {"coefficient": {"start": "high"}}}, "space.coefficient.start: expected a valid number, found 'high'"),
    ({"space": {"coefficient": {"start": {"by": "variance"}}}}, "space.coefficient.start.by: expected 'mean_square' or 'mean_magnitude', found 'variance'"),
    ({"space": {"coefficient": {"start": {"by": "mean_square", "pwoer": 2.0}}}}, r"space.coefficient.start.pwoer: unknown key; did you mean 'power'\?"),
    ({"space": {"coefficient": {"start": {"by": "mean_square", "total": 0.0}}}}, "space.coefficient.start.total: .*greater than 0, found 0"),
    ({"space": {"coefficient": {"start": {"by": {"rot90": 0.3, "noise": 0.0}}}}}, "space.coefficient.start.by.noise: .*greater than 0, found 0"),
    ({"space": {"exceptions": {"*": {"start": {"by": {"rot91": 0.3}}}}}}, r"space.exceptions.\*.start.by: unknown expert 'rot91'; did you mean 'rot90'\?"),
    ({"space": {"coefficient": {"start": {"by": {"rot90": 0.3, "noise": 1.0}}}}}, "space.coefficient.start.by: .* found none for 'parity'"),
    ({"operator": {"name": "ties", "density": {"start": {"by": "mean_square"}}}, "space": {}}, "operator.density.start: expected a valid number"),
    ({"space": {"coefficient": {"low": 2.0, "high": 1.0}}}, "coefficient: expected low <= start <= high"),
    ({"space": {"coefficient": 0.3}}, "nothing is searched"),
    ({"space": {"preset": "decoders"}}, r"space.preset: unknown preset 'decoders'; did you mean 'decoder'\?"),
    ({"space": {"exceptions": {"rot91/*": 0.0}}}, "no expert/group matches 'rot91/"),
    ({"objectives": []}, "objectives: .*at least 1"),
    ({"objectives": [{**OBJECTIVE, "metrik": "x"}]}, r"objectives\[0\].metrik: unknown key; did you mean 'metric'\?"),
    ({"objectives": [{**OBJECTIVE, "direction": "up"}]}, r"objectives\[0\].direction: expected 'max' or 'min', found 'up'"),
    ({"objectives": [{**OBJECTIVE, "direction": "min"}]}, r"objectives\[0\].direction: accuracy is better larger"),
    ({"objectives": [{**OBJECTIVE, "metric": "acuracy"}]}, r"objectives\[0\].metric.*did you mean 'accuracy'\?"),
    ({"objectives": [OBJECTIVE, OBJECTIVE]}, "objectives: the name 'rot90' is given twice"),
    ({"objectives": [{"name": "a", "task": "rot90"}]}, r"objectives\[0\]: .*expected task and metric .*found task"),
    ({"objectives": [{**OBJECTIVE, "mean": ["a", "b"]}]}, r"objectives\[0\]: .*found task, metric, mean"),
    ({"objectives": [{**OBJECTIVE, "normalized_by": {"a": "b"}}]}, r"objectives\[0\]: .*normalized_by goes with mean or worst"),
    ({"objectives": [OBJECTIVE, PARITY, {"name": "all", "mean": ["rot90"]}]}, r"objectives\[2\].mean: .*at least 2"),
    ({"objectives": [OBJECTIVE, PARITY, {"name": "all", "mean": ["rot90", "partiy"]}]}, r"objectives\[2\]: .*found 'partiy'; did you mean 'parity'\?"),
    ({"objectives": [OBJECTIVE, PARITY, {"name": "all", "worst": ["rot90", "rot90"]}]}, r"objectives\[2\]: rot90 is listed twice"),
    ({"objectives": [OBJECTIVE, PARITY, {**ALL, "normalized_by": {"noise": "rot90"}}]}, r"objectives\[2\].normalized_by: 'noise' is none of rot90, parity"),
    ({"objectives": [OBJECTIVE, PARITY, {**ALL, "normalized_by": {"rot90": "rot"}}]}, r"objectives\[2\].normalized_by.rot90: unknown expert 'rot'; did you mean 'rot90'\?"),
    ({"objectives": [OBJECTIVE, {**PARITY, "metric": "loss"}, ALL]}, r"objectives\[2\]: expected objectives that are all better larger or all smaller, found rot90 \(max\), parity \(min\)"),
    ({"evaluation": {"kind": "several", "evaluators": []}}, "evaluation.evaluators: .*at least 1"),
    ({"evaluation": {"kind": "several", "evaluators": [EVALUATION]}}, r"evaluation.evaluators\[0\].tasks: expected a list of the tasks"),
    ({"evaluation": several({"tasks": ["rot90", "pairty"]})}, r"evaluators\[0\].tasks: no objective is of task 'pairty'; did you mean 'parity'\?"),
    ({"evaluation": several({"tasks": ["rot90"]}, {"tasks": ["rot90"]})}, r"evaluators\[1\].tasks: rot90 is scored by evaluation.evaluators\[0\] already"),
    ({"evaluation": several({"tasks": ["rot90"]})}, "evaluation.evaluators: none of them lists task 'parity'"),
    ({"evaluation": several({"tasks": ["rot90"], "kind": "several"})}, r"evaluators\[0\].kind: several evaluators are listed once"),
    ({"evaluation": several({"tasks": ["rot90"], "batch": 1})}, r"evaluators\[0\].batch: unknown key; did you mean 'batch_size'\?"),
    ({"evaluation": {"kind": "clasification", "data": "x"}}, "evaluation.kind: unknown evaluator.*'classification'"),
    ({"evaluation": {"kind": "classification"}}, "evaluation.data: missing"),
    ({"evaluation": {**EVALUATION, "batch": 3}}, r"evaluation.batch: unknown key; did you mean 'batch_size'\?"),
    ({"evaluation": {**EVALUATION, "split": {"adapt": 0.5, "search": 0.5, "test": 0.5}}}, "evaluation.split: .*sum to 1"),
    ({"evaluation": {**EVALUATION, "split": {"serach": 0.5}}}, "evaluation.split.serach: unknown key"),
    ({"operator": {"name": "ties"}, "space": {"coefficient": {"low": -0.2}}}, r"coefficient: expected .* \[0, inf\], found -0.2"),
    ({"search": "atuo"}, "search: .*found 'atuo'"),
    ({"search": [{"proposer": "cma_es", "weights": [0.0, 0.0, 0.0]}]}, r"cma_es.weights: expected one number for each"),
    ({"search": [{"proposer": "cmaes"}]}, r"search\[0\].proposer: unknown proposer 'cmaes'; did you mean 'cma_es'\?"),
    ({"search": [{"proposer": "cma_es", "sigmma": 1}]}, r"search\[0\].sigmma: unknown key; did you mean 'sigma'\?"),
    ({"search": [{"proposer": "cma_es", "sigma": -1.0}]}, r"search\[0\].sigma: .*greater than 0, found -1"),
    ({"search": [{"proposer": "tpe"}, {"proposer": "tpe"}]}, r"search\[1\]: only one stage may go without evaluations"),
    ({"search": [{"proposer": "tpe", "evaluations": 99}]}, "search: the stages take 99 evaluations"),
    ({"search": [{"proposer": "adamerging"}], "operator": {"name": "ties"}, "space": {}}, "adamerging needs gradients, which ties"),
    ({"space": {"coefficient": "best"}}, "space.coefficient: best is what earlier stages have found, and there are none"),
    ({"space": {"exceptions": {"*/after": "best"}}}, r"space.exceptions.\*/after: best is what earlier stages"),
    ({"space": {"coefficient": "bset"}}, "space.coefficient: .*found 'bset'"),
    ({"operator": {"name": "ties", "density": "best"}, "space": {}}, "operator.density: best is what earlier stages"),
    ({"operator": {"name": "ties", "density": {"exceptions": {"*": "best"}}}, "space": {}}, r"operator.density.exceptions.\*: best is what"),
    (two({"space": {"gruops": "model"}}), r"search\[1\].space.gruops: unknown key; did you mean 'groups'\?"),
    (two({"space": {"coefficient": {"hihg": 1}}}), r"search\[1\].space.coefficient.hihg: unknown key; did you mean 'high'\?"),
    (two({"space": {"coefficient": 0.3}}), r"search\[1\]: space: nothing is searched"),
    (two({"space": {"coefficient": {"low": 2.0, "high": 1.0}}}), r"search\[1\]: space: coefficient: expected low <= start <= high"),
    (two({"space": {"groups": "model"}}, space={"groups": "module", "exceptions": {"*/*.mlp": 0.3}}), r"search\[1\]: space: coefficient: no expert/group matches '\*/\*.mlp'"),
    (two({}, first={"space": {"coefficient": "best"}}), r"search\[0\]: space.coefficient: best is what earlier stages"),
    (two({"operator": {"density": 0.5}}), r"search\[1\]: operator.density: unknown key"),
    (two({"operator": {"densty": 0.5}}, operator={"name": "ties"}, space={}), r"search\[1\]: operator.densty: unknown key; did you mean 'density'\?"),
    (two({"operator": {"normalize": False}}, operator={"name": "ties"}, space={}), r"search\[1\]: operator.normalize: an option is the same in all stages"),
    (two({"operator": {"density": 0.5}}, operator=[{"name": "ties"}, {"name": "linear"}], space={}), r"search\[1\]: operator.name: expected one of ties, linear.*found None"),
    (two({"operator": {"name": "tys", "density": 0.5}}, operator={"name": "ties"}, space={}), r"search\[1\]: operator.name: expected one of ties, .*found 'tys'"),
    (two({"keep_experts": 0}), r"search\[1\].keep_experts: .*greater than or equal to 1, found 0"),
    (two({"keep_experts": 3}), r"search\[1\]: keep_experts: expected fewer than the 3 experts, found 3"),
    (two({}, first={"keep_experts": 1}), r"search\[0\]: keep_experts: earlier stages say which experts matter, and there are none"),
    (two({"keep_experts": 1}, operator=[{"name": "linear"}, {"name": "model_stock"}], space={"groups": "model"}), r"search\[1\]: keep_experts: .*model_stock has none"),
    (two({"proposer": "adamerging", "operator": {"scale": {}}}, operator={"name": "ties"}, space={}), r"search\[1\].proposer: adamerging needs gradients"),
    (two({"space": {"kind": "dataflow"}}), r"search\[1\].space.kind: expected 'parameter' or 'data_flow', found 'dataflow'"),
    (two({"space": {"kind": "data_flow", "groups": "model"}}), r"search\[1\].space.groups: unknown key"),
    (two({"space": {"kind": "data_flow", "scale": 0.0}}), r"search\[1\]: space.scale: expected a number in \[0.001, 1000\], found 0"),
    (two({}, first={"space": {"kind": "data_flow"}}), r"search\[1\]: it merges weights after search\[0\] has laid paths"),
    ({"search": [{"proposer": "tpe", "space": {"kind": "data_flow"}}]}, r"search\[0\].space: a data-flow stage lays paths through the best merge of the stages before"),
    (two({"space": {"kind": "data_flow"}, "operator": {"density": 1.0}}, operator={"name": "ties"}, space={}), r"search\[1\].operator: a data-flow space takes layers as they are"),
    (two({"space": {"kind": "data_flow"}, "keep_experts": 3}), r"search\[1\]: keep_experts: expected fewer than the 3 experts"),
    (two({"space": {"kind": "data_flow"}, "proposer": "adamerging"}), r"search\[1\].proposer: adamerging needs gradients, which a data-flow space"),
    (two({"space": {"kind": "data_flow"}}, operator=None, space={"kind": "data_flow"}), r"search\[1\]: space: a data-flow space is the same in all stages"),
    ({"experts": {"merged": "x"}, **two({"space": {"kind": "data_flow"}})}, r"experts.merged: so the best merge is called in search\[1\]"),
    (two({"proposer": "lorahub", "budget": 151, "space": {"groups": "model"}}), "search: lorahub.budget: expected at most 150"),
    ({"budget": {"evaluations": 0}}, "budget.evaluations: .*found 0"),
    ({"budget": {"evaluations": "many"}}, "budget.evaluations: expected a valid integer, found 'many'"),
    ({"workers": "rya"}, "workers: unknown kind 'rya'; did you mean 'ray'?"),
    ({"workers": {"kind": "rya"}}, "workers: unknown kind 'rya'; did you mean 'ray'?"),
    ({"workers": "ray:many"}, "workers.count: expected 'auto', found 'many'"),
    ({"workers": "ray:0"}, "workers.count: expected greater than 0, found 0"),
    ({"workers": {"kind": "ray", "gpu": 1}}, "workers.gpu: unknown key; did you mean 'gpus'?"),
    ({"workers": {"kind": "inline", "count": 2}}, "workers.count: unknown key"),
    ({"device": "warp"}, "device: 'warp' cannot be used here"),
    ({"seed": -1}, "seed: .*found -1"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(campaign_file: Callable[..., Path], changes: dict[str, Any], message: str) -> None:
    path = campaign_file(**changes)
    with pytest.raises(InputError, match=message) as caught:
        campaign = read_campaign(path)
        make_stages(campaign, make_plan(campaign))
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_files_that_are_no_campaigns(tmp_path: Path) -> None:
    path = tmp_path / "campaign.yaml"
    with pytest.raises(CampaignError, match="no such file"):
        read_campaign(path)
    for text, message in (
        ("a: [1", "not YAML"),
        ("- a", "expected a mapping of keys, found list"),
        ("name: a\nname: b", "the key 'name' is given twice"),
    ):
        path.write_text(text)
        with pytest.raises(CampaignError, match=message):
            read_campaign(path)


def test_summaries_steer_and_their_parts_do_not(make_campaign: Callable[..., Campaign]) -> None:
    noise = {"name": "noise", "task": "noise", "metric": "accuracy", "floor": 0.2}
    share = {**ALL, "normalized_by": {"rot90": "rot90"}, "floor": 0.5}
    plan = make_plan(make_campaign(objectives=[OBJECTIVE, PARITY, noise, share]))
    assert [(objective.name, objective.steers) for objective in plan.objectives] == [
        ("rot90", False),
        ("parity", False),
        ("noise", True),
        ("all", True),
    ]
    assert plan.objectives[3].summary == "mean"
    assert plan.objectives[3].direction == "max"
    assert plan.objectives[3].floor == 0.5
    assert [objective.name for objective in plan.measured] == ["rot90", "parity", "noise"]


def test_several_evaluators_share_the_tasks(
    make_campaign: Callable[..., Campaign], small_digits: FamilySummary
) -> None:
    data = {"kind": "classification", "data": str(small_digits.path / "data")}
    first, second = ({**data, "tasks": tasks} for tasks in (["parity", "noise"], ["rot90"]))
    split = {"adapt": 0.2, "search": 0.4, "test": 0.4}
    evaluation = {"kind": "several", "evaluators": [first, {**second, "batch_size": 7}], "split": split}
    plan, alone = make_plan(make_campaign(evaluation=evaluation)), make_plan(make_campaign())
    assert {task: list(splits["test"]) for task, splits in plan.splits.items()} == {
        task: list(splits["test"]) for task, splits in alone.splits.items()
    }
    assert plan.evaluator.metrics("rot90") == alone.evaluator.metrics("rot90")


def test_numbers_in_exponent_form_are_numbers(campaign_file: Callable[..., Path]) -> None:
    path = campaign_file()
    path.write_text(
        path.read_text() + "search: [{proposer: adamerging, learning_rate: 1e-3}]\n".replace("search", "searches")
    )
    path.write_text(path.read_text().replace("searches", "search").replace("search: auto\n", ""))
    options = read_campaign(path).stage_options(0)
    assert options.model_dump()["learning_rate"] == 1e-3


def test_missing_checkpoints_and_data(make_campaign: Callable[..., Campaign], small_digits: FamilySummary) -> None:
    with pytest.raises(
        CheckpointError, match="base: expected a checkpoint folder or a Hugging Face id, found no folder"
    ):
        make_plan(make_campaign(base="nowhere"))
    with pytest.raises(CheckpointError, match="expert a: .*'who/knows' cannot be had from the hub"):
        make_plan(make_campaign(experts={"a": "who/knows"}))
    with pytest.raises(DataError, match="task nine: expected the file .*tasks there: noise, parity, rot90"):
        make_plan(make_campaign(objectives=[{**OBJECTIVE, "task": "nine"}]))


def test_a_preset_is_a_space_that_can_be_overridden(make_campaign: Callable[..., Campaign]) -> None:
    space = make_campaign(space={"preset": "per-tensor", "coefficient": {"low": -1.0}}).space
    assert space.groups == "tensor"
    assert space.coefficient.low == -1.0  # type: ignore[union-attr]


@pytest.mark.parametrize("preset", sorted(path.stem for path in presets_folder().glob("*.yaml")))
def test_presets_are_readable(make_campaign: Callable[..., Campaign], preset: str) -> None:
    assert make_campaign(space={"preset": preset}).space.preset == preset


def test_ranges_and_exceptions_reach_the_space(make_campaign: Callable[..., Campaign]) -> None:
    plan = make_plan(
        make_campaign(
            operator={
                "name": "ties",
                "density": {"low": 0.1, "high": 0.9, "per": "group"},
                "scale": {"low": 0.5, "high": 2.0},
            },
            space={
                "groups": "layer",
                "coefficient": {"low": 0.0, "high": 2.0, "start": 0.5},
                "exceptions": {"rot90/before": 0.0, "*/after": {"low": 0.25, "high": 0.75}},
            },
        )
    )
    names = [dimension.name for dimension in plan.space.dimensions]
    num_groups = len(plan.groups)
    assert len(names) == (3 * num_groups - 1) + 3 * num_groups + 1
    assert "coefficient rot90/before" not in names
    after = next(dimension for dimension in plan.space.dimensions if dimension.name == "coefficient parity/after")
    assert (after.low, after.high, after.start) == (0.25, 0.75, 0.75)
    assert names[-1] == "scale"


def test_numbers_over_depth_reach_the_space(make_campaign: Callable[..., Campaign]) -> None:
    plan = make_plan(
        make_campaign(
            operator={
                "name": "ties",
                "density": {
                    "low": 0.1,
                    "high": 0.9,
                    "knots": 2,
                    "exceptions": {"*/*.norm": 1.0, "*/*.mlp": [0.2, 0.4]},
                },
                "scale": [1.0, 2.0],
            },
            space={
                "groups": "module",
                "coefficient": {"low": 0.0, "high": 1.0, "start": 0.5, "knots": 2},
                "exceptions": {"rot90/*.attn": {"low": 0.0, "high": 2.0, "knots": 1}, "*/before.*": [0.25]},
            },
        )
    )
    names = [dimension.name for dimension in plan.space.dimensions]
    assert names[4:7] == ["coefficient rot90/*.attn", "coefficient rot90/depth 0", "coefficient rot90/depth 1"]
    assert len(names) == (3 * 2 + 1) + 3 * 2
    recipe = plan.recipe([0.5, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0, *[0.5] * 6])
    rot90 = dict(zip(recipe.groups, recipe.values["coefficient"][2], strict=True))
    assert (rot90["before.embed"], rot90["layer0.mlp"], rot90["layer1.mlp"], rot90["layer0.attn"]) == (
        0.25,
        0.0,
        1.0,
        1.0,
    )
    density = dict(zip(recipe.groups, recipe.values["density"][0], strict=True))
    assert (density["layer0.mlp"], density["layer1.mlp"], density["layer1.norm"]) == (0.2, 0.4, 1.0)
    assert density["layer1.attn"] == pytest.approx(0.5)
    scale = dict(zip(recipe.groups, recipe.values["scale"][0], strict=True))
    assert (scale["before.embed"], scale["layer0.attn"], scale["layer1.attn"]) == (1.0, 1.0, 2.0)


def test_a_list_of_operators_is_a_choice(make_campaign: Callable[..., Campaign]) -> None:
    operators = [
        {"name": "task_arithmetic"},
        {"name": "ties", "density": {"low": 0.1, "high": 0.9}},
        {"name": "linear"},
    ]
    plan = make_plan(make_campaign(operator=operators, space={"groups": "model", "coefficient": {"high": 0.8}}))
    names = [dimension.name for dimension in plan.space.dimensions]
    experts = ["noise", "parity", "rot90"]
    assert names == [
        "operator",
        *(f"coefficient {name}" for name in experts),
        *(f"ties.density {name}" for name in experts),
    ]
    assert list(plan.operators) == ["task_arithmetic", "ties", "linear"]
    assert plan.rigid == "ties"
    point = plan.space.start.copy()
    assert plan.recipe(point).operator == "task_arithmetic"
    assert plan.recipe(point).values["coefficient"] == pytest.approx(np.array([[0.3]] * 3))
    point[:2] = 0.5, 0.0
    ties = plan.recipe(point)
    assert (ties.operator, ties.options["normalize"]) == ("ties", True)
    assert ties.values["coefficient"][0] == (0.0,)
    assert ties.values.keys() == {"coefficient", "density", "scale"}
    point[:2] = 0.9, 1.0
    linear = plan.recipe(point)
    assert (linear.operator, linear.values["coefficient"][0]) == ("linear", (0.8,))
    assert make_plan(make_campaign(operator=[operators[0], operators[2]])).rigid is None


def test_gradients_are_of_no_use_where_only_structural_numbers_are_searched(
    make_campaign: Callable[..., Campaign],
) -> None:
    assert make_plan(make_campaign(operator={"name": "iso_c"})).rigid == "iso_c"
    scaled = make_campaign(operator={"name": "iso_c", "scale": {}}, space={"groups": "model", "coefficient": 1.0})
    assert make_plan(scaled).rigid is None


def test_a_list_of_one_operator_is_that_operator(make_campaign: Callable[..., Campaign]) -> None:
    one, other = (make_plan(make_campaign(operator=given)) for given in ({"name": "linear"}, [{"name": "linear"}]))
    assert one.space.dimensions == other.space.dimensions
    assert one.recipe(one.space.start) == other.recipe(other.space.start)


class Coefficientless(TaskArithmetic):
    """A rule with a parameter of its own and no coefficients, as Model Stock is."""

    name = "coefficientless"

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(options)
        self.parameters = (ParameterSpec(name="t", meaning="reach", default=0.5, low=0.0, high=1.0, per_expert=False),)


def test_operators_without_coefficients(
    make_campaign: Callable[..., Campaign], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPERATORS, "coefficientless", Coefficientless)
    alone = {"name": "coefficientless", "t": {"low": 0.1, "high": 0.9, "per": "group"}}
    plan = make_plan(make_campaign(operator=alone, space={"groups": "layer"}))
    assert [dimension.name for dimension in plan.space.dimensions] == [f"t {group}" for group in plan.groups]
    assert make_plan(make_campaign(operator=alone, space={"preset": "per-layer"})).space.dimensions
    silent = make_campaign(operator=alone, space={"groups": "layer"})  # as a run's ledger gives it back
    assert make_plan(Campaign.model_validate(silent.model_dump(mode="json"), strict=False)).space.dimensions
    with pytest.raises(CampaignError, match="space.coefficient: there is no coefficient in coefficientless; give"):
        make_plan(make_campaign(operator=alone))
    plan = make_plan(
        make_campaign(operator=[{"name": "linear"}, {"name": "coefficientless"}], space={"groups": "model"})
    )
    assert [dimension.parameter for dimension in plan.space.dimensions] == ["operator", *["coefficient"] * 3]
    assert plan.recipe([1.0, 0.0, 0.0, 0.0]).values == {"t": ((0.5,),)}
