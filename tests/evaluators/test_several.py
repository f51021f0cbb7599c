"""Several evaluators as one: image tasks with heads in their data, and a user's own object on the same encoder."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluator_contract import EvaluatorContract, assert_same_scores
from safetensors.torch import save_file
from transformers import ViTConfig, ViTModel

from evomerge.evaluators.callable import CallableEvaluator, CallableOptions
from evomerge.evaluators.classification import ClassificationEvaluator, ClassificationOptions
from evomerge.evaluators.evaluator import Evaluator, Metric
from evomerge.evaluators.several import SeveralEvaluators

NUM_ITEMS, HIDDEN = 12, 16
CONFIG = ViTConfig(
    hidden_size=HIDDEN,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
    initializer_range=0.3,
)
MODULE = """
import torch


class Brightness:
    '''How well the first feature follows the mean of an image.'''

    def __init__(self, seed, companion=True):
        self.images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.companion = companion

    def num_items(self, task):
        return len(self.images)

    def score(self, model, task, items):
        images = self.images[items]
        parameter = next(model.parameters())
        features = model(pixel_values=images.to(parameter.device, parameter.dtype)).pooler_output[:, 0].float()
        distance = (features - images.mean((1, 2, 3)).to(features)) ** 2
        return {"near": -distance, **({"loss": distance} if self.companion else {})}
"""


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for seed, task in enumerate(("three", "five")):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            "pixel_values": torch.randn((NUM_ITEMS, 3, 8, 8), generator=generator),
            "labels": torch.randint(3, (NUM_ITEMS,), generator=generator),
            "sources": torch.arange(NUM_ITEMS),
            "head.weight": torch.randn((3 + 2 * seed, HIDDEN), generator=generator),
        }
        save_file(tensors, tmp_path / f"{task}.safetensors")
    return tmp_path


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "several_own.py").write_text(MODULE)
    return "several_own:Brightness"


def make(images: Path, own: str, batch_size: int = 5, **options: Any) -> tuple[Evaluator, Evaluator]:
    heads = {"three": ["accuracy"], "five": ["accuracy", "loss"]}
    return (
        ClassificationEvaluator(ClassificationOptions(data=str(images), batch_size=batch_size), heads),
        CallableEvaluator(CallableOptions(factory=own, options={"seed": 0, **options}), {"bright": ["near"]}),
    )


def together(classification: Evaluator, brightness: Evaluator) -> SeveralEvaluators:
    return SeveralEvaluators({"three": classification, "bright": brightness, "five": classification})


class TestSeveral(EvaluatorContract):
    tasks = mean_loss_tasks = ("three", "bright", "five")

    @pytest.fixture
    def evaluator(self, images: Path, own: str) -> SeveralEvaluators:
        return together(*make(images, own))

    @pytest.fixture
    def one_at_a_time(self, images: Path, own: str) -> SeveralEvaluators:
        return together(*make(images, own, batch_size=1))

    @pytest.fixture
    def model(self) -> Any:
        torch.manual_seed(0)
        return ViTModel(CONFIG).eval()

    def test_each_task_is_its_own_evaluators(self, images: Path, own: str, model: Any) -> None:
        classification, brightness = make(images, own)
        evaluator = together(classification, brightness)
        items = np.array([4, 0, 7])
        for task, part in (("three", classification), ("bright", brightness), ("five", classification)):
            assert evaluator.sources[task] == part.sources[task]
            assert evaluator.metrics(task) == part.metrics(task)
            assert_same_scores(evaluator.score(model, task, items), part.score(model, task, items))
            assert torch.equal(evaluator.loss(model, task, items, "ce"), part.loss(model, task, items, "ce"))
        assert evaluator.metrics("bright") == {"near": Metric(None)}

    def test_losses_are_those_that_all_of_them_have(self, images: Path, own: str, model: Any) -> None:
        classification, brightness = make(images, own)
        assert together(classification, brightness).losses == {"ce"}
        assert SeveralEvaluators({"three": classification, "five": classification}).losses == classification.losses
        evaluator = together(*make(images, own, companion=False))
        evaluator.score(model, "bright", np.arange(2))
        assert not evaluator.losses  # found out by scoring

    def test_the_digest_is_of_all_of_them(self, images: Path, own: str) -> None:
        digest = together(*make(images, own)).digest
        assert together(*make(images, own, batch_size=1)).digest == digest
        assert together(*make(images, own, companion=False)).digest != digest
        (images / "five.safetensors").write_bytes((images / "three.safetensors").read_bytes())
        assert together(*make(images, own)).digest != digest
