"""A pool of LoRA adapters of digits4's base, in PEFT's layout: for one task, some of them help and some do not."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import ViTModel

from evomerge.families.digits import TASKS, Digits, Head, split_digits
from evomerge.families.family import FAMILIES, FamilySummary
from evomerge.families.recipes import DigitsRecipe, Schedule
from evomerge.families.training import fit, isolated

RANK, ALPHA = 8, 16
ADAPTED = re.compile(r"\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)$")
SCHEDULE = Schedule(steps=60, learning_rate=2e-3, num_rows=64)


@dataclass(frozen=True, slots=True)
class Lesson:
    """The tasks that an adapter is trained on, in turn, and the share of labels that are drawn at random."""

    tasks: tuple[str, ...]
    wrong: float = 0.0


TARGET = "rot90"
POOL: Mapping[str, Lesson] = {
    "noisy": Lesson((TARGET,), wrong=0.6),
    "mixed": Lesson(("invert", TARGET, "mod5")),
    "invert": Lesson(("invert",)),
    "parity": Lesson(("parity",)),
    "mod5": Lesson(("mod5",)),
    "wrong": Lesson((TARGET,), wrong=1.0),
    "all_wrong": Lesson(("invert", "mod5"), wrong=1.0),
}


class Update(nn.Module):
    """Adds a product of two factors to a weight: A begins at random, B at 0."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.a = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(RANK, columns), a=5**0.5))
        self.b = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the adapted weight."""
        return weight + ALPHA / RANK * self.b @ self.a


def make_pool(family: FamilySummary, folder: Path) -> dict[str, Path]:
    """Train the pool on images that no item shows; return adapter -> its folder, within ``folder``."""
    recipe = FAMILIES[family.name].recipe
    assert isinstance(recipe, DigitsRecipe)
    train, _ = split_digits(recipe)
    for seed, (name, lesson) in enumerate(POOL.items()):
        with isolated(seed):
            _write(_trained(family, lesson, train, seed), folder / name)
    return {name: folder / name for name in POOL}


def _trained(family: FamilySummary, lesson: Lesson, train: Digits, seed: int) -> dict[str, Update]:
    """Return the updates by module."""
    model = ViTModel.from_pretrained(family.path / "base").requires_grad_(False)
    updates = {}
    for name, module in model.named_modules():
        if ADAPTED.search(name):
            updates[name] = Update(*module.weight.shape)
            parametrize.register_parametrization(module, "weight", updates[name])
    files = {task: load_file(family.path / "data" / f"{task}.safetensors") for task in lesson.tasks}
    heads = {task: Head(tensors["head.weight"], tensors["head.bias"]) for task, tensors in files.items()}
    rng, tasks = np.random.default_rng([seed, 1]), cycle(lesson.tasks)

    def loss() -> Tensor:
        task = next(tasks)
        pixel_values, labels = train.draw(SCHEDULE.num_rows, rng).inputs(task, rng)
        drawn = torch.tensor(rng.integers(0, TASKS[task].num_classes, len(labels)))
        labels = torch.where(torch.tensor(rng.random(len(labels)) < lesson.wrong), drawn, labels)
        return nn.functional.cross_entropy(heads[task](model(pixel_values=pixel_values).pooler_output), labels)

    fit([factor for update in updates.values() for factor in update.parameters()], loss, SCHEDULE, lambda: None)
    return updates


def _write(updates: Mapping[str, Update], folder: Path) -> None:
    folder.mkdir(parents=True)
    tensors = {}
    for module, update in updates.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = update.a.detach()
        tensors[f"base_model.model.{module}.lora_B.weight"] = update.b.detach()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
