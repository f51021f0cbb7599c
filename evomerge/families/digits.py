"""Digits: a ViT of 0.5M parameters on scikit-learn's 8x8 digits, and one expert for each distortion of the image.

The base learns the mixture of distortions with one generic head that is thrown away. Each task then gets a frozen
prototype head from a few images of base features, the stand-in for CLIP's zero-shot heads: a base trained together
with the heads hardly gains from merging. Heads stay outside the checkpoints, in the data files; what a head sees is
``pooler_output`` of the encoder.

Shapes: B images, C classes, H hidden size.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel

from evomerge.families.built import Built, Scores
from evomerge.families.recipes import DigitsRecipe
from evomerge.families.training import Meter, Progress, State, copy_state, fit, isolated, uniform_average

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
Generator = np.random.Generator

PIXEL_MEAN, PIXEL_STD = 0.305, 0.375  # of the whole data set, in [0, 1]
JITTER_STD = 0.03
SHUFFLE = np.random.default_rng(5).permutation(64)  # one fixed permutation: it defines the task, not the run


@dataclass(frozen=True, slots=True)
class DigitTask:
    """A distortion of the image, and the number of classes: the label is the digit modulo that number."""

    num_classes: int
    distort: Callable[[Images, Generator], Images]


def _occlude(images: Images, _: Generator) -> Images:
    upper_half = images.copy()
    upper_half[:, 4:] = 0.0
    return upper_half


def _add_noise(images: Images, rng: Generator) -> Images:
    return np.clip(images + rng.normal(0.0, 0.28, images.shape), -0.5, 1.5).astype(np.float32)


TASKS: Mapping[str, DigitTask] = {
    "plain": DigitTask(10, lambda images, _: images),
    "rot90": DigitTask(10, lambda images, _: np.rot90(images, 1, (1, 2))),
    "invert": DigitTask(10, lambda images, _: 1.0 - images),
    "occlude": DigitTask(10, _occlude),
    "parity": DigitTask(2, lambda images, _: images.transpose(0, 2, 1)),
    "shuffle": DigitTask(10, lambda images, _: images.reshape(-1, 64)[:, SHUFFLE].reshape(-1, 8, 8)),
    "noise": DigitTask(10, _add_noise),
    "mod5": DigitTask(5, lambda images, _: images[:, :, ::-1]),
}


@dataclass(frozen=True, slots=True)
class Digits:
    """Images in [0, 1], their digits, and where they stand in scikit-learn's data set."""

    images: Images
    digits: Labels
    sources: Labels

    def draw(self, num: int, rng: Generator) -> "Digits":
        """Return ``num`` images drawn with replacement, each shifted by at most a pixel and slightly noisy."""
        picked = rng.integers(0, len(self.digits), num)
        rows, columns = rng.integers(-1, 2, (2, num))
        shifted = [np.roll(self.images[i], (r, c), (0, 1)) for i, r, c in zip(picked, rows, columns, strict=True)]
        noisy = np.stack(shifted) + rng.normal(0.0, JITTER_STD, (num, 8, 8))
        return Digits(noisy.astype(np.float32), self.digits[picked], self.sources[picked])

    def inputs(self, task: str, rng: Generator) -> tuple[Tensor, Tensor]:
        """Return the task's pixel values (B, 1, 8, 8) and labels (B,)."""
        distorted = np.ascontiguousarray(TASKS[task].distort(self.images, rng))
        pixel_values = torch.tensor((distorted - PIXEL_MEAN) / PIXEL_STD, dtype=torch.float32)
        return pixel_values[:, None], torch.tensor(self.digits % TASKS[task].num_classes)


@dataclass(frozen=True, slots=True)
class Head:
    """A frozen linear classifier: weight (C, H), bias (C,)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits (B, C) of features (B, H)."""
        return features @ self.weight.T + self.bias


def split_digits(recipe: DigitsRecipe) -> tuple[Digits, Digits]:
    """Return the images that train and the images that are held out; no image is in both, for any task."""
    bunch = load_digits()
    order = np.random.default_rng([recipe.seed, 1]).permutation(len(bunch.target))

    def take(sources: Labels) -> Digits:
        images = (bunch.images[sources] / 16.0).astype(np.float32)
        return Digits(images, bunch.target[sources].astype(np.int64), sources.astype(np.int64))

    return take(order[recipe.num_held_out :]), take(np.sort(order[: recipe.num_held_out]))


def build(folder: Path, recipe: DigitsRecipe, progress: Progress | None) -> Built:
    """Train the family, write base, experts and data under ``folder``, and return what was measured."""
    work = recipe.base.steps * recipe.base.num_rows + len(recipe.tasks) * recipe.expert.steps * recipe.expert.num_rows
    meter = Meter(work, progress)
    train, held_out = split_digits(recipe)
    with isolated(recipe.seed):
        model = _encoder(recipe)
        with meter.part("base"):
            _train_base(model, train, recipe, meter)
            base = copy_state(model)
            model.save_pretrained(folder / "base")
            heads = _prototype_heads(model, train, recipe)
        states: dict[str, State] = {"base": base}
        for task in recipe.tasks:
            with meter.part(task):
                model.load_state_dict(base)
                _train_expert(model, task, heads[task], train, recipe, meter)
                states[task] = copy_state(model)
                model.save_pretrained(folder / "experts" / task)
        with meter.part("held-out items"):
            states["uniform"] = uniform_average(states[task] for task in recipe.tasks)
            data = _write_data(folder / "data", held_out, heads, recipe)
            scores = _accuracies(model, states, data, heads)
    return Built(
        experts=recipe.tasks,
        metrics=dict.fromkeys(recipe.tasks, "accuracy"),
        objectives=recipe.tasks,
        evaluation="classification",
        scores=scores,
        num_items=dict.fromkeys(recipe.tasks, recipe.num_held_out),
        num_parameters=sum(tensor.numel() for tensor in base.values()),
        seconds=meter.seconds,
    )


def _encoder(recipe: DigitsRecipe) -> ViTModel:
    config = ViTConfig(
        hidden_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.mlp,
        image_size=8,
        patch_size=recipe.patch,
        num_channels=1,
        initializer_range=recipe.initializer_range,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return ViTModel(config)


def _features(model: nn.Module, pixel_values: Tensor) -> Tensor:
    features: Tensor = model(pixel_values=pixel_values).pooler_output
    return features


def _train_base(model: nn.Module, train: Digits, recipe: DigitsRecipe, meter: Meter) -> None:
    """Train the encoder to name the digit under every distortion of the mixture."""
    rng = np.random.default_rng([recipe.seed, 2])
    generic_head = nn.Linear(recipe.hidden, 10)
    rows_each = max(1, recipe.base.num_rows // len(recipe.mixture))

    def loss() -> Tensor:
        drawn = [(task, train.draw(rows_each, rng)) for task in recipe.mixture]
        pixel_values = torch.cat([batch.inputs(task, rng)[0] for task, batch in drawn])
        digits = torch.tensor(np.concatenate([batch.digits for _, batch in drawn]))
        return nn.functional.cross_entropy(generic_head(_features(model, pixel_values)), digits)

    parameters = [*model.parameters(), *generic_head.parameters()]
    fit(parameters, loss, recipe.base, lambda: meter.advance("base", recipe.base.num_rows))


def _train_expert(model: nn.Module, task: str, head: Head, train: Digits, recipe: DigitsRecipe, meter: Meter) -> None:
    """Train the encoder, and only the encoder, on one task through its frozen head."""
    rng = np.random.default_rng([recipe.seed, 3, recipe.mixture.index(task)])

    def loss() -> Tensor:
        pixel_values, labels = train.draw(recipe.expert.num_rows, rng).inputs(task, rng)
        return nn.functional.cross_entropy(head(_features(model, pixel_values)), labels)

    fit(model.parameters(), loss, recipe.expert, lambda: meter.advance(task, recipe.expert.num_rows))


def _prototype_heads(model: nn.Module, train: Digits, recipe: DigitsRecipe) -> dict[str, Head]:
    """Return a head a task that scores by distance to the mean feature of a few training images of each class."""
    rng = np.random.default_rng([recipe.seed, 4])
    heads = {}
    for task in recipe.tasks:
        pixel_values, labels = train.inputs(task, rng)
        with torch.inference_mode():
            features = _features(model, pixel_values)
        picked = [
            rng.choice(np.flatnonzero(labels.numpy() == label), recipe.shots, replace=False)
            for label in range(TASKS[task].num_classes)
        ]
        mean = features.mean(0)
        prototypes = torch.stack([features[torch.tensor(rows)].mean(0) for rows in picked]) - mean
        norms = prototypes.square().sum(1)
        scale = recipe.head_scale / norms.mean()
        # -|f - mean - p|^2 / 2 without the term that all classes share is linear in f
        heads[task] = Head((scale * prototypes).clone(), (-scale * (prototypes @ mean) - scale / 2 * norms).clone())
    return heads


def _write_data(folder: Path, held_out: Digits, heads: Mapping[str, Head], recipe: DigitsRecipe) -> dict[str, State]:
    """Write one file a task, the same images in the same order, with the task's frozen head; return the contents."""
    folder.mkdir(parents=True)
    data = {}
    for task in recipe.tasks:
        pixel_values, labels = held_out.inputs(task, np.random.default_rng([recipe.seed, 5]))
        head = heads[task]
        data[task] = {
            "pixel_values": pixel_values.contiguous(),
            "labels": labels,
            "sources": torch.tensor(held_out.sources),
            "head.weight": head.weight,
            "head.bias": head.bias,
        }
        save_file(data[task], folder / f"{task}.safetensors")
    return data


def _accuracies(
    model: nn.Module, states: Mapping[str, State], data: Mapping[str, State], heads: Mapping[str, Head]
) -> Scores:
    scores: Scores = {}
    for name, state in states.items():
        model.load_state_dict(state)
        scores[name] = {}
        for task, tensors in data.items():
            with torch.inference_mode():
                predicted = heads[task](_features(model, tensors["pixel_values"])).argmax(-1)
            scores[name][task] = round((predicted == tensors["labels"]).float().mean().item(), 4)
    return scores
