"""Descents: gradient steps on the adapt items, done in one worker; a rule says how a step moves the coefficients.

Shape letters: D dimensions of the space, d those of the operator's own, M objectives that steer, T tasks, B parts of
batches.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from evomerge.campaign.plan import Plan
from evomerge.descent_rules import RULES, Anchors
from evomerge.errors import CandidateError
from evomerge.materialize.materializer import Materializer
from evomerge.records import BACKWARD_COST, Arrival, Candidate, Descent, Floats, Items, Slopes, TaskItems
from evomerge.scorer.teachers import Teachers
from evomerge.space.choice import Choice
from evomerge.space.space import Dimension

LABELLED = "ce"  # the loss of the labels
NUM_SLOPES = 12
MAX_NUMBERS = 50_000  # of all gradients that one descent leaves in the record: half a megabyte


class Descender:
    """Does the descents of one plan on the resident model."""

    def __init__(self, plan: Plan, materializer: Materializer) -> None:
        self.plan, self.materializer = plan, materializer
        self._teachers = Teachers(plan, materializer)

    def descend(self, candidate: Candidate, num_parts: int = 1) -> tuple[Arrival, float]:
        """Return where a candidate's descent ends, and its cost in full-evaluation equivalents.

        num_parts: the parts of a batch that go through the model one after the other, to fit memory; a step is the
        same, up to a rounding.
        Raises: CandidateError if the operator has no gradient, or the loss is not finite.
        """
        descent = candidate.descent
        assert descent is not None
        slope = PlanSlope(self.plan, self.materializer, self._teachers, candidate, num_parts)
        rule = (Anchors if descent.anchors else RULES[descent.rule])(descent, slope)
        losses: list[float] = []
        way: list[tuple[Floats, ...]] = []
        for step in range(1, descent.steps + 1):
            rng = np.random.default_rng([*descent.seed, step])
            batches = slope.batches(rng, descent.batch_size)
            numbers_d, weights_T = rule.look(rng)
            loss_T, gradient_Td = slope.task_losses(numbers_d, batches)
            if descent.loss == LABELLED:
                way.append(slope.in_the_box(numbers_d, loss_T, gradient_Td))
            weights_T = np.ones(len(loss_T)) if weights_T is None else weights_T
            losses.append(float(weights_T @ loss_T))
            rule.step(weights_T @ gradient_Td, step)
        point = tuple(slope.point(rule.numbers_d).tolist())
        num_search_items = sum(len(splits["search"]) for splits in self.plan.splits.values())
        arrival = Arrival(point=point, losses=tuple(losses), slopes=_slopes(way) if way else None, **rule.state())
        return arrival, slope.num_forwards / num_search_items


class PlanSlope:
    """The loss of a plan's merges on batches of the adapt items, and its gradient in the numbers of the operator's own.

    The operator stays the one that the candidate chose, and so do the numbers that it does not read. num_forwards
    counts items, those with backward as ``BACKWARD_COST``. Items go through the model in ``num_parts``.
    """

    def __init__(
        self, plan: Plan, materializer: Materializer, teachers: Teachers, candidate: Candidate, num_parts: int = 1
    ) -> None:
        descent = candidate.descent
        assert descent is not None
        self._plan, self._materializer, self._teachers = plan, materializer, teachers
        self._start_D, self._descent, self._num_parts = np.array(candidate.point), descent, num_parts
        assert isinstance(plan.space, Choice)  # a stage by gradients needs operators that have some
        self._branch = plan.space.branch(candidate.point)
        self._operator = plan.operators[self._branch.operator]
        if not self._operator.differentiable:
            raise CandidateError(f"{self._operator.name} has no gradient in its coefficients")
        self._losses = dict.fromkeys(plan.splits, descent.loss) if isinstance(descent.loss, str) else descent.loss
        self.dimensions: Sequence[Dimension] = self._branch.space.dimensions
        self._low_d = np.array([dimension.low for dimension in self.dimensions])
        self.start_d = self._numbers(self._start_D)
        self.anchors = self._numbers(np.array(descent.anchors).reshape(-1, len(self._start_D)))
        self._samples = self._draw_samples(descent)
        self.num_forwards = 0.0
        for task, name in self._losses.items():
            if expert := _teacher(name):
                for part in self._parts(self._samples[task]):
                    teachers.prepare(expert, task, part, descent.layers)
                # Counted with the first leg, so that a run that resumes counts what an uninterrupted one does.
                self.num_forwards += 0 if descent.steps_before else len(self._samples[task])

    @property
    def task_shares(self) -> Floats:
        """How much each task counts for each objective that steers; a summary's parts count equally."""
        by_name = {objective.name: objective for objective in self._plan.objectives}
        rows = []
        for objective in self._plan.steering:
            parts = [by_name[part] for part in objective.parts] or [objective]
            rows.append([sum(part.task == task for part in parts) / len(parts) for task in self._losses])
        return np.array(rows)

    def point(self, numbers_d: Floats) -> Floats:
        """Return the point that has these numbers; rounding must not carry it out of the box."""
        point_D = self._start_D.copy()
        point_D[self._branch.columns_d] = ((numbers_d - self._low_d) / self._branch.space.spans_D).clip(0.0, 1.0)
        return point_D

    def task_gradients(self) -> Floats:
        """Return the gradient of each task's loss at the start, over all of its samples, (T, d)."""
        return self.task_losses(self.start_d, self._samples)[1]

    def batches(self, rng: np.random.Generator, size: int) -> dict[str, Items]:
        """Draw so many samples of every task that has a loss, or all where there are no more."""
        return {task: _drawn(rng, items, size) for task, items in self._samples.items()}

    def task_losses(self, numbers_d: Floats, batches: TaskItems) -> tuple[Floats, Floats]:
        """Return each task's mean loss (T,) and its gradient (T, d)."""
        self.num_forwards += BACKWARD_COST * sum(map(len, batches.values()))
        parts = [(task, part) for task, items in batches.items() for part in self._parts(items)]
        terms = [partial(self._loss, task, part) for task, part in parts]
        found = self._materializer.gradients(self._operator, self._plan.recipe(self.point(numbers_d)), terms)
        loss_B = np.array([loss for loss, _ in found])
        gradient_Bd = np.stack([self._branch.space.pull_back(gradients) for _, gradients in found])
        shares_TB = np.array(
            [[(of == task) * len(part) / len(batches[task]) for of, part in parts] for task in batches]
        )
        return shares_TB @ loss_B, shares_TB @ gradient_Bd

    def in_the_box(self, numbers_d: Floats, loss_T: Floats, gradient_Td: Floats) -> tuple[Floats, Floats, Floats]:
        """Return the point (D,), the loss of each objective that steers (M,), and its gradient in the point (M, D)."""
        shares_MT = self.task_shares
        gradient_MD = np.zeros((len(shares_MT), len(self._start_D)))
        gradient_MD[:, self._branch.columns_d] = shares_MT @ gradient_Td * self._branch.space.spans_D
        return self.point(numbers_d), shares_MT @ loss_T, gradient_MD

    def _loss(self, task: str, items: Items) -> torch.Tensor:
        name, model = self._losses[task], self._materializer.module
        if expert := _teacher(name):
            return self._teachers.loss(expert, task, items, self._descent)
        return self._plan.evaluator.loss(model, task, items, name)

    def _parts(self, items: Items) -> list[Items]:
        """Return what goes through the model at a time."""
        return np.array_split(items, min(self._num_parts, len(items)))

    def _draw_samples(self, descent: Descent) -> dict[str, Items]:
        """Return the adapt items, or so many of each task as the descent says, the same for a whole stage."""
        samples = {task: self._plan.splits[task]["adapt"] for task in self._losses}
        if descent.samples is None:
            return samples
        rng = np.random.default_rng(descent.seed[:-1])
        return {task: _drawn(rng, items, descent.samples) for task, items in samples.items()}

    def _numbers(self, points_D: Floats) -> Floats:
        """Return the operator's own numbers of points."""
        numbers_d: Floats = self._low_d + points_D[..., self._branch.columns_d] * self._branch.space.spans_D
        return numbers_d


def _slopes(way: Sequence[tuple[Floats, ...]]) -> Slopes:
    """Return the means of at most NUM_SLOPES parts of the way, in six digits; of fewer where numbers are many."""
    num_parts = min(NUM_SLOPES, len(way), max(1, MAX_NUMBERS // way[0][2].size))
    parts = np.array_split(np.arange(len(way)), num_parts)
    points, losses, gradients = (
        tuple(float(f"{x:.6g}") for part in parts for x in np.mean([way[step][what] for step in part], axis=0).ravel())
        for what in range(3)
    )
    return Slopes(points=points, losses=losses, gradients=gradients)


def _teacher(loss: str) -> str:
    """Return the expert that a loss ``kl:<expert>`` names; nothing of other losses."""
    return loss.removeprefix("kl:") if loss.startswith("kl:") else ""


def _drawn(rng: np.random.Generator, items: Items, size: int) -> Items:
    return np.sort(rng.choice(items, min(size, len(items)), replace=False))
