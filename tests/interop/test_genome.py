"""A mergekit-evolve configuration becomes a campaign; what it has no place for is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.campaign.campaign import read_campaign
from evomerge.campaign.recipe_file import read_recipe
from evomerge.errors import CampaignError, InputError
from evomerge.interop.convert import convert
from evomerge.interop.genome import read_genome
from evomerge.interop.read import read_mergekit
from evomerge.materialize.inputs import open_checkpoints
from evomerge.space.groups import make_groups

Write = Callable[..., Path]


def evolve(**changes: Any) -> dict[str, Any]:
    genome = {
        "models": ["inputs/v1", "inputs/v2"],
        "merge_method": "ties",
        "base_model": "inputs/base",
        "layer_granularity": 2,
    }
    return {"genome": genome | changes, "tasks": [{"name": "gsm8k", "metric": "exact_match,strict-match"}]}


def translated(write: Write, sections: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The campaign's sections (read strictly, too) and all notes."""
    path = write(sections, "evolve.yaml")
    text, notes = read_genome(path)
    out = path.parent / "campaign.yaml"
    out.write_text(text)
    read_campaign(out)
    comments = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert all(" ".join(note.split()) in comments for note in notes)
    return yaml.safe_load(text), " | ".join(notes)


def test_layers_share_numbers_in_groups(write: Write) -> None:
    campaign, notes = translated(write, evolve())
    assert campaign["name"] == "evolve"
    assert {name: Path(place).name for name, place in campaign["experts"].items()} == {"v1": "v1", "v2": "v2"}
    _, _, tensors = open_checkpoints(campaign["base"], campaign["experts"])
    groups = make_groups(tensors, campaign["space"]["groups"])
    assert list(groups) == ["before", "layers0-1", "layers2-3", "after"]
    assert groups["before"] == ("model.embed_tokens.weight",)
    assert campaign["space"]["coefficient"] == {"low": 0.0, "high": 1.0, "start": 0.5}
    assert campaign["operator"]["density"] == {"low": 0.05, "high": 1.0, "start": 1.0, "per": "group"}
    assert campaign["objectives"] == [{"name": "gsm8k", "task": "gsm8k", "metric": "exact_match,strict-match"}]
    assert campaign["evaluation"] == {
        "kind": "lm_eval",
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "split": {"adapt": 0.0, "search": 0.5, "test": 0.5},
    }
    assert campaign["search"] == [{"proposer": "cma_es", "sigma": 0.1667}]
    assert "evaluation.include_path: where task files of your own lie" in notes


def test_filters_part_the_layers(write: Write) -> None:
    campaign, _ = translated(write, evolve(filters=["self_attn", "mlp"], layer_granularity=4))
    _, _, tensors = open_checkpoints(campaign["base"], campaign["experts"])
    groups = make_groups(tensors, campaign["space"]["groups"])
    assert set(groups) == {"before", "layers0-3.self_attn", "layers0-3.mlp", "layers0-3", "after"}
    assert all("layernorm" in name for name in groups["layers0-3"])


def test_smooth_values_are_knots_over_depth(write: Write) -> None:
    campaign, _ = translated(write, evolve(smooth=True, merge_method="task_arithmetic", allow_negative_weights=True))
    assert campaign["space"] == {"groups": "layer", "coefficient": {"low": -1.0, "high": 1.0, "start": 0.5, "knots": 2}}


def test_options_are_mergekits(write: Write) -> None:
    campaign, notes = translated(write, evolve(normalize=False))
    assert campaign["operator"]["normalize"] is False
    campaign, notes = translated(write, evolve(merge_method="task_arithmetic", normalize=True))
    assert "genome.normalize: task_arithmetic has no such option" in notes


def test_tasks_are_lm_evals(write: Write) -> None:
    tasks = [
        "a",
        {"name": "b-b", "metric": "word_perplexity,none", "weight": -2.0},
        {"name": "a", "metric": "acc_norm,none"},
    ]
    sections = evolve() | {"tasks": tasks, "num_fewshot": 4, "apply_chat_template": False}
    campaign, notes = translated(write, sections)
    assert campaign["objectives"] == [
        {"name": "a", "task": "a", "metric": "acc,none"},
        {"name": "b-b", "task": "b-b", "metric": "word_perplexity,none", "direction": "min"},
        {"name": "a.acc_norm_none", "task": "a", "metric": "acc_norm,none"},
    ]
    assert campaign["evaluation"]["num_fewshot"] == 4
    assert campaign["evaluation"]["apply_chat_template"] is False
    assert "evomerge export RUN --prefer a=1,b-b=2,a.acc_norm_none=1" in notes


def test_what_is_not_carried_over_is_said(write: Write) -> None:
    sections = evolve(models=["inputs/v1", "inputs/v2"], tokenizer_source="union") | {"limit": 100, "shuffle": True}
    _, notes = translated(write, sections)
    for said in ("limit: the share", "shuffle: items are split", "genome.tokenizer_source"):
        assert said in notes


def test_a_base_elsewhere_has_an_unknown_number_of_layers(write: Write) -> None:
    hub = evolve(models=["some/one", "some/two"], base_model="some/base", filters=["mlp"])
    campaign, notes = translated(write, hub)
    assert "layer_granularity: 2 is not carried over, as some/base is no local folder" in notes
    assert campaign["space"]["groups"] == {"mlp": "*.{layer}.*mlp*", "layers": "*.{layer}.*", "rest": "*"}
    assert campaign["experts"] == {"one": "some/one", "two": "some/two"}


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (evolve(layer_granularity=3), "genome.layer_granularity: expected a divisor of the 4 layers, found 3"),
    (evolve(merge_method="tise"), "genome.merge_method: unknown merge method 'tise'; did you mean 'ties'"),
    (evolve(base_model=None), "genome.base_model: missing"),
    (evolve(granularity=3), "genome.granularity: unknown key; did you mean 'layer_granularity'"),
    (evolve() | {"task": []}, "task: unknown key"),
]


@pytest.mark.parametrize(("sections", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_mistakes_are_named(write: Write, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(CampaignError, match=message):
        read_genome(write(sections, "evolve.yaml"))


def test_import_takes_either_kind_of_file(write: Write, tmp_path: Path) -> None:
    kind, notes = convert(write(evolve(), "evolve.yaml"), tmp_path / "campaign.yaml")
    assert kind == "campaign"
    assert notes
    models = [{"model": "inputs/v1", "parameters": {"weight": [0.1, 0.7]}}]
    path = write({"merge_method": "task_arithmetic", "base_model": "inputs/base", "models": models})
    assert convert(path, tmp_path / "recipe.yaml") == ("recipe", [])
    assert read_recipe(tmp_path / "recipe.yaml").recipe == read_mergekit(path).recipe
    assert np.ptp(read_mergekit(path).recipe.values["coefficient"][0]) == pytest.approx(0.6)
    with pytest.raises(InputError, match="recipe.yaml: expected a new file; choose another --out"):
        convert(path, tmp_path / "recipe.yaml")
    with pytest.raises(CampaignError, match="expected a configuration of mergekit .* found name, base"):
        convert(write({"name": "x", "base": "y"}, "ours.yaml"), tmp_path / "other.yaml")
