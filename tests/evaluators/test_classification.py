"""Image classification: heads in the data, or the model's own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluator_contract import EvaluatorContract
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import linear, log_softmax
from transformers import ViTConfig, ViTForImageClassification, ViTModel

from evomerge.errors import DataError
from evomerge.evaluators.classification import ClassificationEvaluator, ClassificationOptions
from evomerge.evaluators.evaluator import Metric

NUM_ITEMS, HIDDEN = 14, 16
SHAPE = (3, 8, 8)
CONFIG = ViTConfig(
    hidden_size=HIDDEN,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=24,
    image_size=8,
    patch_size=4,
    num_labels=4,
    initializer_range=0.3,
)


def tensors_of_a_task(seed: int, num_classes: int, *, head: bool) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        "pixel_values": torch.randn((NUM_ITEMS, *SHAPE), generator=generator),
        "labels": torch.randint(num_classes, (NUM_ITEMS,), generator=generator),
        "sources": torch.arange(NUM_ITEMS) * 10,
    }
    if head:
        tensors["head.weight"] = torch.randn((num_classes, HIDDEN), generator=generator)
        tensors["head.bias"] = torch.randn((num_classes,), generator=generator)
    return tensors


def make(folder: Path, tasks: list[str], batch_size: int = 512) -> ClassificationEvaluator:
    wanted = {task: ["accuracy"] for task in tasks}
    return ClassificationEvaluator(ClassificationOptions(data=str(folder), batch_size=batch_size), wanted)


class TestWithHeadsInTheData(EvaluatorContract):
    tasks = mean_loss_tasks = ("three", "five")
    config = CONFIG

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        save_file(tensors_of_a_task(1, 3, head=True), tmp_path / "three.safetensors")
        save_file(tensors_of_a_task(2, 5, head=True), tmp_path / "five.safetensors")
        return tmp_path

    @pytest.fixture
    def evaluator(self, data: Path) -> ClassificationEvaluator:
        return make(data, list(self.tasks), batch_size=8)

    @pytest.fixture
    def one_at_a_time(self, data: Path) -> ClassificationEvaluator:
        return make(data, list(self.tasks), batch_size=1)

    @pytest.fixture
    def model(self) -> Any:
        torch.manual_seed(0)
        return ViTModel(self.config).eval()

    def logits(self, model: Any, task: dict[str, Tensor]) -> Tensor:
        features = model(pixel_values=task["pixel_values"]).pooler_output
        return linear(features, task["head.weight"], task["head.bias"])

    def test_scores_equal_a_direct_computation(self, evaluator: ClassificationEvaluator, model: Any) -> None:
        for task, tensors in (
            ("three", tensors_of_a_task(1, 3, head=True)),
            ("five", tensors_of_a_task(2, 5, head=True)),
        ):
            with torch.no_grad():
                logp = log_softmax(self.logits(model, tensors).double(), -1)
            scores = evaluator.score(model, task, np.arange(NUM_ITEMS))
            expected_loss = [-float(row[label]) for row, label in zip(logp, tensors["labels"], strict=True)]
            expected_hits = [int(row.argmax()) == label for row, label in zip(logp, tensors["labels"], strict=True)]
            np.testing.assert_allclose(scores["loss"], expected_loss, rtol=1e-4, atol=1e-5)
            assert scores["accuracy"].tolist() == expected_hits
            entropy = float(-(logp.exp() * logp).sum(-1).mean())
            with torch.no_grad():
                ours = evaluator.loss(model, task, np.arange(NUM_ITEMS), "entropy")
            assert float(ours) == pytest.approx(entropy, rel=1e-4)

    def test_logits_that_are_not_finite_are_no_answer(self, evaluator: ClassificationEvaluator, model: Any) -> None:
        """Neither a wrong one nor, by the index that argmax makes of a NaN, a right one."""
        with torch.no_grad():
            model.embeddings.cls_token[..., 0] = torch.nan
        scores = evaluator.score(model, "three", np.arange(NUM_ITEMS))
        assert np.isnan(scores["accuracy"]).all()
        assert np.isnan(scores["loss"]).all()

    def test_which_way_its_metrics_are_better(self, evaluator: ClassificationEvaluator) -> None:
        assert evaluator.metrics("three") == {"accuracy": Metric("max"), "loss": Metric("min")}

    def test_a_head_for_other_features(self, data: Path, model: Any) -> None:
        tensors = tensors_of_a_task(1, 3, head=True)
        tensors["head.weight"] = torch.randn(3, HIDDEN + 8)
        save_file(tensors, data / "three.safetensors")
        with pytest.raises(
            DataError, match=rf"task three: head.weight .*{HIDDEN + 8} features.* has {HIDDEN};"
        ) as caught:
            make(data, ["three"]).score(model, "three", np.arange(3))
        assert "\n" not in str(caught.value)

    def test_the_entropy_needs_no_labels(self, data: Path, model: Any) -> None:
        other = tensors_of_a_task(1, 3, head=True)
        one = make(data, ["three"]).loss(model, "three", np.arange(5), "entropy")
        other["labels"] = (other["labels"] + 1) % 3
        save_file(other, data / "three.safetensors")
        assert torch.equal(make(data, ["three"]).loss(model, "three", np.arange(5), "entropy"), one)

    def test_sources_are_those_of_the_file(self, evaluator: ClassificationEvaluator) -> None:
        assert list(evaluator.sources["three"]) == [10 * i for i in range(NUM_ITEMS)]

    def test_a_head_may_have_no_bias(self, data: Path, model: Any) -> None:
        tensors = tensors_of_a_task(1, 3, head=True)
        tensors["head.bias"].zero_()
        save_file(tensors, data / "three.safetensors")
        with_zero = make(data, ["three"]).score(model, "three", np.arange(NUM_ITEMS))
        del tensors["head.bias"]
        save_file(tensors, data / "three.safetensors")
        without = make(data, ["three"]).score(model, "three", np.arange(NUM_ITEMS))
        assert np.array_equal(with_zero["loss"], without["loss"])

    def test_a_model_without_pooler_shows_its_first_token(self, data: Path, model: Any) -> None:
        bare = ViTModel(CONFIG, add_pooling_layer=False).eval()
        bare.load_state_dict(model.state_dict(), strict=False)
        tensors = tensors_of_a_task(1, 3, head=True)
        with torch.no_grad():
            first = bare(pixel_values=tensors["pixel_values"]).last_hidden_state[:, 0]
            expected = linear(first, tensors["head.weight"], tensors["head.bias"]).argmax(-1) == tensors["labels"]
        assert (
            make(data, ["three"]).score(bare, "three", np.arange(NUM_ITEMS))["accuracy"].tolist() == expected.tolist()
        )


class TestWithTheModelsOwnLogits(EvaluatorContract):
    tasks = mean_loss_tasks = ("own",)

    @pytest.fixture
    def data(self, tmp_path: Path) -> Path:
        save_file(tensors_of_a_task(3, 4, head=False), tmp_path / "own.safetensors")
        return tmp_path

    @pytest.fixture
    def evaluator(self, data: Path) -> ClassificationEvaluator:
        return make(data, ["own"], batch_size=8)

    @pytest.fixture
    def one_at_a_time(self, data: Path) -> ClassificationEvaluator:
        return make(data, ["own"], batch_size=1)

    @pytest.fixture
    def model(self) -> Any:
        torch.manual_seed(0)
        return ViTForImageClassification(CONFIG).eval()

    def test_scores_equal_a_direct_computation(self, evaluator: ClassificationEvaluator, model: Any) -> None:
        tensors = tensors_of_a_task(3, 4, head=False)
        with torch.no_grad():
            logp = log_softmax(model(pixel_values=tensors["pixel_values"]).logits.double(), -1)
        scores = evaluator.score(model, "own", np.arange(NUM_ITEMS))
        expected = [-float(row[label]) for row, label in zip(logp, tensors["labels"], strict=True)]
        np.testing.assert_allclose(scores["loss"], expected, rtol=1e-4, atol=1e-5)
        assert scores["accuracy"].tolist() == (logp.argmax(-1) == tensors["labels"]).tolist()

    def test_neither_head_nor_classifier(self, evaluator: ClassificationEvaluator) -> None:
        with pytest.raises(DataError, match="task own: .*head.weight"):
            evaluator.score(ViTModel(CONFIG).eval(), "own", np.arange(3))

    def test_a_label_that_the_model_does_not_have(self, data: Path, model: Any) -> None:
        tensors = tensors_of_a_task(3, 4, head=False)
        tensors["labels"][5] = 4
        save_file(tensors, data / "own.safetensors")
        with pytest.raises(DataError, match=r"task own: label 4.*4 classes"):
            make(data, ["own"]).score(model, "own", np.arange(NUM_ITEMS))


def put(**changes: Tensor | None) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """A change to the tensors of a file: None takes one away; ``head_weight`` stands for ``head.weight``."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        named = {name.replace("head_", "head."): tensor for name, tensor in changes.items()}
        return {name: tensor for name, tensor in {**tensors, **named}.items() if tensor is not None}

    return change


def labels(*first: float) -> Tensor:
    """Labels of class 0 after the first few."""
    return torch.tensor([*first, *[0] * (NUM_ITEMS - len(first))])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put(labels=None), ["misses labels", "pixel_values"]),
        (put(sources=None, pixel_values=None), ["misses pixel_values, sources"]),
        (put(sources=torch.arange(3)), ["'sources': 3", "as many labels and sources as images"]),
        (put(labels=labels(0, 3)), ["label 3", "3 classes"]),
        (put(labels=labels(0, -1)), ["label -1"]),
        (put(labels=labels(0.0, 1.0)), ["labels", "whole numbers"]),
        (put(labels=torch.zeros(NUM_ITEMS, 2, dtype=torch.int64)), ["labels", "whole numbers"]),
        (put(pixel_values=torch.full((NUM_ITEMS, *SHAPE), float("nan"))), ["pixel_values", "NaN"]),
        (put(head_weight=torch.zeros(HIDDEN)), ["head.weight (classes, features)", f"found ({HIDDEN},) and (3,)"]),
        (put(head_bias=torch.zeros(4)), ["head.bias (classes)", f"found (3, {HIDDEN}) and (4,)"]),
        (
            put(
                pixel_values=torch.zeros(0, *SHAPE),
                labels=torch.zeros(0, dtype=torch.int64),
                sources=torch.zeros(0, dtype=torch.int64),
            ),
            ["no images"],
        ),
    ],
)
def test_a_malformed_file_is_named(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: list[str]
) -> None:
    path = tmp_path / "three.safetensors"
    save_file(change(tensors_of_a_task(1, 3, head=True)), path)
    with pytest.raises(DataError) as caught:
        make(tmp_path, ["three"])
    for word in ["task three", str(path), *words]:
        assert word in str(caught.value)


def test_large_images_in_half_precision_are_read(tmp_path: Path) -> None:
    """Their sum is beyond the largest number of the type; none of them is."""
    tensors = tensors_of_a_task(1, 3, head=True)
    tensors["pixel_values"] = torch.full((NUM_ITEMS, *SHAPE), 1000.0, dtype=torch.float16)
    save_file(tensors, tmp_path / "three.safetensors")
    assert len(make(tmp_path, ["three"]).sources["three"]) == NUM_ITEMS


def test_no_such_task(tmp_path: Path) -> None:
    save_file(tensors_of_a_task(1, 3, head=True), tmp_path / "three.safetensors")
    with pytest.raises(DataError, match=r"task four: expected the file .*four\.safetensors.*tasks there: three"):
        make(tmp_path, ["three", "four"])


@pytest.mark.parametrize("content", [b"", b"no tensors at all", bytes(100)])
def test_a_file_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "three.safetensors").write_bytes(content)
    with pytest.raises(DataError, match=r"task three: .*three\.safetensors cannot be read"):
        make(tmp_path, ["three"])
