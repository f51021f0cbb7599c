"""Digits: what lies on disk is what was scored, and held-out images never train."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_families import SMALL
from transformers import AutoModel

from evomerge.families.digits import TASKS, split_digits
from evomerge.families.family import FAMILIES, FamilySummary

RECIPES = [SMALL["digits"], FAMILIES["digits"].recipe, FAMILIES["digits4"].recipe]


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_held_out_image_is_trained_on(recipe) -> None:
    train, held_out = split_digits(recipe)
    assert len(held_out.sources) == recipe.num_held_out >= 900
    assert np.intersect1d(train.sources, held_out.sources).size == 0
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in held_out.images}
    drawn = train.draw(500, np.random.default_rng(0))
    assert set(drawn.sources) <= set(train.sources)


def test_every_task_shows_the_held_out_images(families: dict[str, FamilySummary]) -> None:
    _, held_out = split_digits(SMALL["digits"])
    for task in families["digits"].experts:
        data = load_file(families["digits"].path / "data" / f"{task}.safetensors")
        num, num_classes = len(held_out.sources), TASKS[task].num_classes
        assert data["pixel_values"].shape == (num, 1, 8, 8)
        assert data["pixel_values"].dtype == data["head.weight"].dtype == data["head.bias"].dtype == torch.float32
        assert data["labels"].dtype == data["sources"].dtype == torch.int64
        assert data["sources"].tolist() == held_out.sources.tolist()
        assert data["labels"].tolist() == (held_out.digits % num_classes).tolist()
        assert data["head.weight"].shape == (num_classes, SMALL["digits"].hidden)
        assert data["head.bias"].shape == (num_classes,)


@pytest.mark.parametrize("model_name", ["base", "rot90"])
def test_saved_checkpoints_score_as_family_json_says(families: dict[str, FamilySummary], model_name: str) -> None:
    summary = families["digits"]
    place = summary.path / ("base" if model_name == "base" else f"experts/{model_name}")
    model, info = AutoModel.from_pretrained(place, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    for task, accuracy in summary.scores[model_name].items():
        data = load_file(summary.path / "data" / f"{task}.safetensors")
        with torch.inference_mode():
            features = model(pixel_values=data["pixel_values"]).pooler_output
        predicted = torch.nn.functional.linear(features, data["head.weight"], data["head.bias"]).argmax(-1)
        assert (predicted == data["labels"]).float().mean().item() == pytest.approx(accuracy, abs=2e-3)
