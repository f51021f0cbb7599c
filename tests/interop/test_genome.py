"""A mergekit-evolve configuration becomes a campaign; what it has no place for is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.campaign import read_campaign
from evomerge.errors import CampaignError, InputError
from evomerge.interop.convert import convert
from evomerge.interop.genome import read_genome
from evomerge.interop.read import read_mergekit
from evomerge.plan import make_groups, open_checkpoints
from evomerge.recipe_file import read_recipe

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
    assert campaign["objectives"] == [{"name": "gsm8k", "task": "gsm8k", "metric": "exact_match"}]
    assert campaign["search"] == [{"proposer": "cma_es", "sigma": 0.1667}]
    assert "tasks of the lm-eval harness (gsm8k) cannot be scored yet" in notes


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


def test_what_is_not_carried_over_is_said(write: Write) -> None:
    sections = evolve(models=["inputs/v1", "inputs/v2"], tokenizer_source="union")
    sections |= {"num_fewshot": 4, "limit": 100}
    sections["tasks"] = [{"name": "a", "weight": 2.0}, {"name": "b-b", "metric": "bleu,none"}]
    campaign, notes = translated(write, sections)
    assert [objective["metric"] for objective in campaign["objectives"]] == ["accuracy", "loss"]
    for said in (
        "num_fewshot: put the examples",
        "limit: the share",
        "genome.tokenizer_source",
        "tasks[1].metric: bleu,none is unknown here",
        "evomerge export RUN --prefer a=2,b-b=1",
    ):
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
