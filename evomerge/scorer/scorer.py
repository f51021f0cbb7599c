"""The scorer: owns the resident model; subject -> recipe -> merged model -> measurement."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import numpy as np
import torch

from evomerge.campaign.plan import Findings, Plan, StageSpace
from evomerge.clock import Clock
from evomerge.errors import CandidateError, DataError, EvoMergeError, Kind
from evomerge.evaluators.evaluator import LOSS, Evaluator, ItemScores, companion_of
from evomerge.evidence.scores import score_of
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.memory import fitting_memory, free_memory, lacks_memory
from evomerge.materialize.sharing import Bytes, Shared, buffers_of
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.operator import Operator
from evomerge.operators.passthrough import Passthrough
from evomerge.records import (
    Candidate,
    Items,
    Measurement,
    Objective,
    Recipe,
    Score,
    Split,
    TaskItems,
)
from evomerge.scorer.descend import Descender


class Scorer:
    """Scores candidates and recipes of one plan; ``plan`` has its findings.

    shared: base and experts as another worker of this machine has read them.
    Raises: InputError if the experts do not suit an operator.
    """

    @fitting_memory("base, experts and the merged model")
    def __init__(
        self, plan: Plan, progress: Callable[[str], None] = lambda _: None, shared: Shared | None = None
    ) -> None:
        self.materializer = Materializer(
            plan.base,
            list(plan.experts.values()),
            dtype=plan.dtype,
            place=plan.place,
            progress=progress,
            shared=shared,
        )
        progress("and deciding where the search starts")
        sums = plan.measured_sums(self.materializer.sources)
        self.plan = plan = replace(plan, sums=sums).started()
        self._descender = Descender(plan, self.materializer)
        ours: list[Operator] = [TaskArithmetic(), Passthrough()]  # of reference models, and of paths
        self._operators: dict[str, Operator] = {**{operator.name: operator for operator in ours}, **plan.operators}
        self._num_search_items = sum(len(splits["search"]) for splits in plan.splits.values())
        # Prepared before the first candidate: experts that do not suit an operator are a mistake of the user's.
        for start_D in plan.space.starts:
            recipe = plan.recipe(start_D)
            progress(f"and preparing {recipe.operator}; {self.materializer.residence}, {self.materializer.kernels}")
            with suppress(CandidateError):
                self._build(recipe)
        progress("and rehearsing the evaluation")
        self._rehearse()
        hashes, evaluator = self.materializer.hashes, plan.evaluator
        self.findings = Findings(hashes=hashes, items=evaluator.digest, sums=sums, losses=evaluator.losses)
        self.plan = plan.with_findings(self.findings)

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

    def buffers(self) -> list[Bytes]:
        """Return base and experts for other workers of this machine; nothing if a GPU holds them."""
        return buffers_of(self.materializer.sources)

    def adopt(self, buffers: Sequence[Bytes]) -> None:
        """Read base and experts from memory that workers share, and give up those of its own."""
        self.materializer.adopt(Shared(self.findings.hashes, buffers))

    def configure(self, stage_space: StageSpace) -> None:
        """Read the points of candidates by the space of a stage."""
        self.plan = self._descender.plan = self.plan.within(stage_space)

    def score(self, subject: Candidate | Recipe, split: Split, items: TaskItems | None = None) -> Measurement:
        """Build the merge and score it on items of a split (default: all of them); a descent comes first.

        What does not fit memory is done once more in batches of half the size. The next candidate begins with whole
        ones again: what it scores depends on itself alone, not on what its worker has seen before.
        Raises: CandidateError if the candidate fails, whatever the reason: the campaign goes on.
        """
        if items is None:
            items = {task: splits[split] for task, splits in self.plan.splits.items()}
        for halved in (False, True):
            try:
                return replace(self._score(subject, split, items, halved=halved), halved=halved)
            except CandidateError as error:
                if error.kind != "out of memory":
                    error.halved = halved
                    raise
                reason = str(error)
            free_memory()  # here the error is gone, and with it all that its frames held
        raise CandidateError(f"{reason}; nor did it fit in batches of half the size", "out of memory", halved=True)

    def _score(self, subject: Candidate | Recipe, split: Split, items: TaskItems, *, halved: bool) -> Measurement:
        clock = _Clock()
        arrival, cost = None, 0.0
        if isinstance(subject, Candidate) and subject.descent is not None:
            with _failing("evaluator error"):
                arrival, cost = self._descender.descend(subject, num_parts=2 if halved else 1)
            clock.lap("descend")
        with _failing("merge error"):
            if isinstance(subject, Candidate):
                subject = self.plan.recipe(arrival.point if arrival else subject.point)
            self._build(subject)
        clock.lap("materialize")
        with _failing("evaluator error"):
            scores = self._evaluate(items, self.plan.evaluator.halved() if halved else self.plan.evaluator)
            clock.lap("evaluate")
            weights = self.materializer.weights_hash() if split == "test" else None
        return Measurement(
            split=split,
            scores=scores,
            cost=cost + sum(map(len, items.values())) / self._num_search_items,
            seconds=clock.seconds,
            weights=weights,
            arrival=arrival,
        )

    def _build(self, recipe: Recipe) -> None:
        """Build a recipe; a path is laid through a merge that is there."""
        for merge in recipe.merges:
            self._build(merge)
        self.materializer.build(self._operators[recipe.operator], recipe)

    def _evaluate(self, items: TaskItems, evaluator: Evaluator) -> dict[str, Score]:
        """Score the resident model; every task once, whatever the number of its metrics."""
        model = self.materializer.module
        by_task = {task: evaluator.score(model, task, of_task) for task, of_task in items.items()}
        return {
            objective.name: objective_score(self.plan, objective, by_task[objective.task], items[objective.task])
            for objective in self.plan.measured
        }


def objective_score(plan: Plan, objective: Objective, reported: ItemScores, items: Items) -> Score:
    """Return an objective's score from what the evaluator reported of items of its task.

    Raises: CandidateError if it is not finite.
    """
    of_items, metric = reported[objective.metric], plan.evaluator.metrics(objective.task)[objective.metric]
    companion = companion_of(objective.metric, metric, reported)
    for what, numbers in ((objective.metric, of_items), (LOSS, companion)):
        if numbers is not None and numbers.dtype.kind == "f" and not np.isfinite(numbers).all():
            flawed = int((~np.isfinite(numbers)).sum())
            raise CandidateError(
                f"{objective.name}: {flawed} of {len(numbers)} items have no finite {what}", "not finite"
            )
    sources = [plan.item_sources[objective.task][item] for item in items]
    try:
        score = score_of(of_items, items, sources, aggregate=metric.aggregate, companion=companion)
    except CandidateError as error:
        raise CandidateError(f"{objective.name}: {error}", error.kind) from error
    if not np.isfinite([score.value, score.stderr]).all():
        raise CandidateError(
            f"{objective.name}: {objective.metric} of {len(items)} items is {score.value:g} ± {score.stderr:g}",
            "not finite",
        )
    return score


@contextmanager
def _failing(kind: Kind) -> Iterator[None]:
    """Let what is raised be the candidate's failure, of this kind unless memory ran out; errors of ours stay."""
    try:
        yield
    except EvoMergeError:
        raise
    except Exception as error:  # a user's model, data or evaluator raises whatever it likes
        raise CandidateError(_in_one_line(error), "out of memory" if lacks_memory(error) else kind) from error


def _in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class _Clock(Clock):
    """Waits for the GPU where there is one."""

    def lap(self, part: str) -> None:
        """Count the time since the last lap to a part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        super().lap(part)
