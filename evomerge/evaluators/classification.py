"""Image classification on local data: one safetensors file a task.

    <task>.safetensors   pixel_values (N, channels, height, width), labels (N,), sources (N,)
                         and optionally head.weight (C, H), head.bias (C,): a frozen head outside the merge

With a head, the model is an encoder and its pooled output is the feature that the head sees; without one, the model's
own logits count.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from evomerge.errors import DataError
from evomerge.evaluators.evaluator import LOSS, ItemScores, Metric, Wanted, digest_of, half
from evomerge.records import Items, Options


class ClassificationOptions(Options):
    """data: the folder of the task files; batch_size: images a forward."""

    data: str
    batch_size: int = Field(default=512, ge=1)


class ClassificationEvaluator:
    """Accuracy and cross-entropy (nats) of image classifiers that share an encoder.

    Raises: DataError for a missing or malformed file, or a head that does not fit the labels or the model's features.
    """

    losses = frozenset({"ce", "entropy", "kl"})

    def __init__(self, options: ClassificationOptions, wanted: Wanted) -> None:
        self.batch_size = options.batch_size
        self._data = {task: _read_task(Path(options.data), task) for task in wanted}
        self.digest = digest_of(Path(options.data) / f"{task}.safetensors" for task in wanted)
        self.sources: Mapping[str, Sequence[int | str]] = {
            task: tensors["sources"].tolist() for task, tensors in self._data.items()
        }

    def metrics(self, task: str) -> Mapping[str, Metric]:  # noqa: ARG002
        """Every task reports the same."""
        return {"accuracy": Metric("max"), LOSS: Metric("min")}

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Accuracy (0 or 1; NaN where a logit is not finite) and cross-entropy of each item."""
        hits, losses = [], []
        with torch.inference_mode():
            for batch in torch.from_numpy(items).split(self.batch_size):
                labels = self._data[task]["labels"][batch]
                logits = self._logits(model, task, batch).float().cpu()
                hits.append((logits.argmax(-1) == labels).float().where(logits.isfinite().all(-1), torch.nan))
                losses.append(cross_entropy(logits, labels, reduction="none"))
        return {"accuracy": torch.cat(hits).numpy(), LOSS: torch.cat(losses).numpy()}

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Mean cross-entropy with the labels, or mean entropy of the prediction (no labels needed)."""
        batch = torch.from_numpy(items)
        logits = self._logits(model, task, batch).float()
        if name == "ce":
            return cross_entropy(logits, self._data[task]["labels"][batch].to(logits.device))
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(-1).mean()

    def halved(self) -> "ClassificationEvaluator":
        """Take half as many images a forward."""
        twin = copy(self)
        twin.batch_size = half(self.batch_size)
        return twin

    def logits(self, model: nn.Module, task: str, items: Items) -> list[Tensor]:
        """One row an item: a logit a class."""
        return list(self._logits(model, task, torch.from_numpy(items)).float()[:, None].unbind(0))

    def _logits(self, model: nn.Module, task: str, batch: Tensor) -> Tensor:
        tensors = self._data[task]
        parameter = next(model.parameters())
        output = model(pixel_values=tensors["pixel_values"][batch].to(parameter.device, parameter.dtype))
        if "head.weight" not in tensors:
            if getattr(output, "logits", None) is None:
                raise DataError(
                    f"task {task}: the model has no classifier and the data no head.weight; give one of them"
                )
            logits: Tensor = output.logits
            _require_classes(f"task {task}", tensors["labels"], logits.shape[-1], "the model")
            return logits
        features = getattr(output, "pooler_output", None)
        if features is None:
            features = output.last_hidden_state[:, 0]
        weight, bias = tensors["head.weight"].to(features), tensors["head.bias"].to(features)
        if weight.shape[1] != features.shape[-1]:
            raise DataError(
                f"task {task}: head.weight is for {weight.shape[1]} features, but the model has {features.shape[-1]}; "
                "make the head from features of this base"
            )
        return linear(features, weight, bias)


def _read_task(folder: Path, task: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = folder / f"{task}.safetensors"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none"
        raise DataError(f"task {task}: expected the file {path}, found none; tasks there: {known}")
    try:
        tensors = load_file(path)
    except Exception as error:  # the reader's own exception class is not exported
        raise DataError(f"task {task}: {path} cannot be read ({error})") from error
    if missing := {"pixel_values", "labels", "sources"} - tensors.keys():
        raise DataError(f"task {task}: {path} misses {', '.join(sorted(missing))}; found {', '.join(sorted(tensors))}")
    counts = {name: len(tensors[name]) for name in ("pixel_values", "labels", "sources")}
    if len(set(counts.values())) != 1:
        raise DataError(f"task {task}: {path}: expected as many labels and sources as images, found {counts}")
    labels = tensors["labels"]
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise DataError(f"task {task}: {path}: expected labels to be whole numbers, one an image")
    if not len(labels):
        raise DataError(f"task {task}: {path} holds no images")
    if "head.weight" in tensors:
        weight = tensors["head.weight"]
        bias = tensors.setdefault("head.bias", torch.zeros(weight.shape[:1]))
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise DataError(
                f"task {task}: {path}: expected head.weight (classes, features) and head.bias (classes), found "
                f"{tuple(weight.shape)} and {tuple(bias.shape)}"
            )
        _require_classes(f"task {task}: {path}", labels, len(weight), "the head")
    if not all(part.isfinite().all() for part in tensors["pixel_values"].split(1024)):
        raise DataError(f"task {task}: {path}: pixel_values hold a NaN or an infinity")
    return tensors


def _require_classes(where: str, labels: Tensor, num_classes: int, owner: str) -> None:
    for label in (int(labels.min()), int(labels.max())):
        if not 0 <= label < num_classes:
            raise DataError(f"{where}: label {label}, but {owner} has {num_classes} classes, counted from 0")
