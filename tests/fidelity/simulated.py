"""Models and items by a logistic law: hits and misses of which the truth is known."""

from collections.abc import Mapping

import numpy as np

from evomerge.evidence.scores import score_of
from evomerge.records import Measurement, Objective

TASKS = ("a", "b")
OBJECTIVES = [Objective(name=task, task=task, metric="accuracy", direction="max") for task in TASKS]
NUM_ITEMS = 200
ITEMS = {task: np.arange(NUM_ITEMS) for task in TASKS}
SOURCES = {task: [f"{task}{item}" for item in range(NUM_ITEMS)] for task in TASKS}


class World:
    """Items of two tasks, and models that hit them by their abilities, one a task."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.slopes = {task: self.rng.uniform(0.5, 3.0, NUM_ITEMS) for task in TASKS}
        self.offsets = {task: self.rng.normal(0, 2, NUM_ITEMS) for task in TASKS}

    def model(self, a: float, b: float) -> Measurement:
        hits = {
            task: (self.rng.random(NUM_ITEMS) < 1 / (1 + np.exp(self.offsets[task] - self.slopes[task] * ability)))
            for task, ability in (("a", a), ("b", b))
        }
        return measured({task: of.astype(np.float32) for task, of in hits.items()})

    def references(self) -> dict[str, Measurement]:
        experts = {"expert:a": self.model(1.5, -1), "expert:b": self.model(-1, 1.5)}
        between = {f"scalar:{x:g}": self.model(x, x) for x in np.linspace(-0.5, 1.0, 9)}
        return {"base": self.model(-0.5, -0.5), **experts, **between}


def measured(items: Mapping[str, np.ndarray]) -> Measurement:
    scores = {task: score_of(of, ITEMS[task], SOURCES[task]) for task, of in items.items()}
    return Measurement(split="search", scores=scores, cost=1.0, seconds={"evaluate": 1.0})
