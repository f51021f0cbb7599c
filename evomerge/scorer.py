"""The scorer: owns the resident model; subject -> recipe -> merged model -> measurement.

Shape letters: D dimensions of the space.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import numpy as np
import torch

from evomerge.errors import CandidateError, DataError, EvoMergeError
from evomerge.evaluators.evaluator import LOSS, ItemScores, companion_of
from evomerge.evidence.scores import score_of
from evomerge.materialize.materializer import Materializer
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.operator import Operator
from evomerge.plan import Plan
from evomerge.records import (
    Arrival,
    Candidate,
    Floats,
    Items,
    Measurement,
    Objective,
    Recipe,
    Score,
    Slopes,
    Split,
    TaskItems,
)
from evomerge.space.choice import Choice

LABELLED = "ce"  # the loss of the labels
NUM_SLOPES = 12
BACKWARD_COST = 3.0  # forward + backward, in forwards
ADAM = (0.9, 0.999, 1e-8)


class Scorer:
    """Scores candidates and recipes of one plan, whose starts it decides where the experts do.

    Raises: InputError if the experts do not suit an operator.
    """

    def __init__(self, plan: Plan, progress: Callable[[str], None] = lambda _: None) -> None:
        self.materializer = Materializer(
            plan.base, list(plan.experts.values()), dtype=plan.dtype, place=plan.place, progress=progress
        )
        progress("and deciding where the search starts")
        self.plan = plan = plan.with_starts(self.materializer.sources)
        self._operators: dict[str, Operator] = {TaskArithmetic.name: TaskArithmetic(), **plan.operators}
        self._num_search_items = sum(len(splits["search"]) for splits in plan.splits.values())
        # Prepared before the first candidate: experts that do not suit an operator are a mistake of the user's.
        for start_D in plan.space.starts:
            recipe = plan.recipe(start_D)
            progress(f"and preparing {recipe.operator}; {self.materializer.residence}, {self.materializer.kernels}")
            with suppress(CandidateError):
                self.materializer.build(self._operators[recipe.operator], recipe)
        progress("and rehearsing the evaluation")
        self._rehearse()

    def _rehearse(self) -> None:
        """Score two items of every task: what does not fit the model is found now, not as a failure of candidates."""
        model = self.materializer.module
        for task, splits in self.plan.splits.items():
            try:
                self.plan.evaluator.score(model, task, splits["search"][:2])
            except EvoMergeError:
                raise
            except Exception as error:  # a user's evaluator, data or judge raises whatever it likes
                raise DataError(f"task {task} cannot be scored: {_in_one_line(error)}") from error

    def score(self, subject: Candidate | Recipe, split: Split, items: TaskItems | None = None) -> Measurement:
        """Build the merge and score it on items of a split (default: all of them); a descent comes first.

        Raises: CandidateError if the candidate fails, whatever the reason: the campaign goes on.
        """
        if items is None:
            items = {task: splits[split] for task, splits in self.plan.splits.items()}
        try:
            return self._score(subject, split, items)
        except EvoMergeError:
            raise
        except Exception as error:  # a user's model or data can raise anything; it is one candidate's fate
            raise CandidateError(_in_one_line(error)) from error

    def _score(self, subject: Candidate | Recipe, split: Split, items: TaskItems) -> Measurement:
        clock = _Clock()
        arrival, cost = None, 0.0
        if isinstance(subject, Candidate) and subject.descent is not None:
            arrival, cost = self._descend(subject)
            clock.lap("descend")
        if isinstance(subject, Candidate):
            subject = self.plan.recipe(arrival.point if arrival else subject.point)
        self.materializer.build(self._operators[subject.operator], subject)
        clock.lap("materialize")
        scores = self._evaluate(items)
        clock.lap("evaluate")
        return Measurement(
            split=split,
            scores=scores,
            cost=cost + sum(map(len, items.values())) / self._num_search_items,
            seconds=clock.seconds,
            weights=self.materializer.weights_hash() if split == "test" else None,
            arrival=arrival,
        )

    def _evaluate(self, items: TaskItems) -> dict[str, Score]:
        """Score the resident model; every task once, whatever the number of its metrics."""
        evaluator, model = self.plan.evaluator, self.materializer.module
        by_task = {task: evaluator.score(model, task, of_task) for task, of_task in items.items()}
        return {
            objective.name: objective_score(self.plan, objective, by_task[objective.task], items[objective.task])
            for objective in self.plan.measured
        }

    def _descend(self, candidate: Candidate) -> tuple[Arrival, float]:
        """Follow Adam on minibatches of the adapt items; return where it ended, and its cost.

        The loss is the sum over tasks, or over objectives by a preference that each step draws from a flat Dirichlet
        (the sampling loop of PaMaL, Dimitriadis et al. 2023, arxiv.org/abs/2210.09759, over coefficients instead of
        weights). Points are projected into their box after every step. The operator stays the one that the candidate
        chose, and so do the numbers that it does not read.
        """
        descent = candidate.descent
        assert descent is not None
        plan, model = self.plan, self.materializer.module
        assert isinstance(plan.space, Choice)  # a stage by gradients needs operators that have some
        branch = plan.space.branch(candidate.point)
        operator = plan.operators[branch.operator]
        if not operator.differentiable:
            raise CandidateError(f"{operator.name} has no gradient in its coefficients")
        anchors_MD = np.array(descent.anchors or candidate.point).reshape(-1, len(candidate.point))
        spans_D = np.ones(anchors_MD.shape[1])
        spans_D[branch.columns_d] = branch.space.spans_D
        moments: list[Floats] = [
            np.array(moment) if moment else np.zeros(anchors_MD.size)
            for moment in (descent.first_moment, descent.second_moment)
        ]
        share_MT = self._task_shares()
        losses: list[float] = []
        way: list[tuple[Floats, Floats, Floats]] = []
        num_items = 0
        for step in range(1, descent.steps + 1):
            rng = np.random.default_rng([*descent.seed, step])
            batches = {
                task: np.sort(rng.choice(splits["adapt"], min(descent.batch_size, len(splits["adapt"])), replace=False))
                for task, splits in plan.splits.items()
            }
            num_items += sum(map(len, batches.values()))
            preference_M = rng.dirichlet(np.ones(len(anchors_MD)))
            terms = [partial(plan.evaluator.loss, model, task, items, descent.loss) for task, items in batches.items()]
            point_D = preference_M @ anchors_MD
            found = self.materializer.gradients(operator, plan.recipe(point_D), terms)
            loss_T = np.array([loss for loss, _ in found])
            slopes_TD = np.zeros((len(found), len(point_D)))
            slopes_TD[:, branch.columns_d] = [branch.space.pull_back(gradients) for _, gradients in found]
            way.append((point_D, share_MT @ loss_T, (share_MT @ slopes_TD) * spans_D))
            weight_T = preference_M @ share_MT if descent.anchors else np.ones(len(found))
            losses.append(float(weight_T @ loss_T))
            gradient_MD = np.outer(preference_M, weight_T @ slopes_TD)
            step_MD = _adam(gradient_MD.ravel(), moments, descent.steps_before + step).reshape(anchors_MD.shape)
            rate = descent.learning_rate * (1 - (1 - descent.final_rate) * (step - 1) / descent.steps)
            anchors_MD = np.clip(anchors_MD - rate * step_MD / spans_D, 0.0, 1.0)
        arrival = Arrival(
            point=tuple(anchors_MD.mean(axis=0).tolist()),
            first_moment=tuple(moments[0].tolist()),
            second_moment=tuple(moments[1].tolist()),
            losses=tuple(losses),
            anchors=tuple(anchors_MD.ravel().tolist()) if descent.anchors else (),
            slopes=_slopes(way) if descent.loss == LABELLED else None,
        )
        return arrival, BACKWARD_COST * num_items / self._num_search_items

    def _task_shares(self) -> Floats:
        """Return how much each task counts for each objective that steers, (M, T); a summary's parts count equally."""
        by_name = {objective.name: objective for objective in self.plan.objectives}
        tasks = list(self.plan.splits)
        rows = []
        for objective in self.plan.steering:
            parts = [by_name[part] for part in objective.parts] or [objective]
            rows.append([sum(part.task == task for part in parts) / len(parts) for task in tasks])
        return np.array(rows)


def objective_score(plan: Plan, objective: Objective, reported: ItemScores, items: Items) -> Score:
    """Return an objective's score from what the evaluator reported of items of its task.

    Raises: CandidateError if it is not finite.
    """
    of_items, metric = reported[objective.metric], plan.evaluator.metrics(objective.task)[objective.metric]
    companion = companion_of(objective.metric, metric, reported)
    for what, numbers in ((objective.metric, of_items), (LOSS, companion)):
        if numbers is not None and numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            flawed = int((~np.isfinite(numbers)).sum())
            raise CandidateError(f"{objective.name}: {flawed} of {len(numbers)} items have no finite {what}")
    sources = [plan.item_sources[objective.task][item] for item in items]
    try:
        score = score_of(of_items, items, sources, aggregate=metric.aggregate, companion=companion)
    except CandidateError as error:
        raise CandidateError(f"{objective.name}: {error}") from error
    if not np.isfinite([score.value, score.stderr]).all():
        raise CandidateError(
            f"{objective.name}: {objective.metric} of {len(items)} items is {score.value:g} ± {score.stderr:g}"
        )
    return score


def _slopes(way: Sequence[tuple[Floats, Floats, Floats]]) -> Slopes:
    """Return the means of at most NUM_SLOPES parts of the way, in six digits."""
    parts = np.array_split(np.arange(len(way)), min(NUM_SLOPES, len(way)))
    points, losses, gradients = (
        tuple(float(f"{x:.6g}") for part in parts for x in np.mean([way[step][what] for step in part], axis=0).ravel())
        for what in range(3)
    )
    return Slopes(points=points, losses=losses, gradients=gradients)


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _adam(gradient_D: Floats, moments: list[Floats], step: int) -> Floats:
    """Update the moments in place and return Adam's unit step (Kingma and Ba 2015, algorithm 1)."""
    first, second, epsilon = ADAM
    moments[0] = first * moments[0] + (1 - first) * gradient_D
    moments[1] = second * moments[1] + (1 - second) * gradient_D**2
    return moments[0] / (1 - first**step) / (np.sqrt(moments[1] / (1 - second**step)) + epsilon)


class _Clock:
    """Seconds by part; waits for the GPU where there is one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] = now - self._last
        self._last = now
