"""A loss whose gradient is known, for rules of descents and the proposers that name them."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evomerge.descent_rules import Rule
from evomerge.records import Descent, Floats
from evomerge.space.space import Dimension

START = 0.3
CURVATURE = np.array([1.0, 3.0, 0.5, 2.0])
OPTIMUM = np.array([0.9, -0.1, 0.4, 1.5])


def descent(**given: Any) -> Descent:
    return Descent(**{"loss": "ce", "steps": 20, "learning_rate": 0.05, "batch_size": 1, "seed": (0,), **given})


def coefficients(*groups: str, experts: int = 2, low: float = -1.0, high: float = 2.0) -> tuple[Dimension, ...]:
    """One coefficient an expert and group, expert by expert."""
    return tuple(
        Dimension(parameter="coefficient", expert=f"e{k}", group=group, low=low, high=high, start=START)
        for k in range(experts)
        for group in groups
    )


@dataclass
class Bowl:
    """sum_d curvature (c - optimum)^2 / 2; of several tasks, each has numbers of its own in ``shares_Td``."""

    dimensions: tuple[Dimension, ...]
    optimum_d: Floats = field(default_factory=lambda: OPTIMUM)
    curvature_d: Floats = field(default_factory=lambda: CURVATURE)
    shares_Td: Floats | None = None

    @property
    def start_d(self) -> Floats:
        return np.array([dimension.start for dimension in self.dimensions])

    def gradient(self, numbers_d: Floats) -> Floats:
        return self.curvature_d * (numbers_d - self.optimum_d)

    def task_gradients(self) -> Floats:
        assert self.shares_Td is not None
        return self.shares_Td * self.gradient(self.start_d)

    def follow(self, rule_type: type[Rule], asked: Descent) -> Rule:
        rule = rule_type(asked, self)  # type: ignore[arg-type]
        for step in range(1, asked.steps + 1):
            numbers_d, _ = rule.look(np.random.default_rng(step))
            rule.step(self.gradient(numbers_d), step)
        return rule
