"""The inline pool: one worker, in this process, with nothing to start.

A pool runs any scorer: an object with ``score(subject, split, items) -> Measurement``.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from evomerge.errors import CandidateError
from evomerge.records import Candidate, Measurement, Recipe, Split, TaskItems

Subject = Candidate | Recipe
Outcome = Measurement | CandidateError


class Scorer(Protocol):
    """Owns a resident model and scores what it is given. Raises: CandidateError for a candidate that fails."""

    def configure(self, plan: Any) -> None:
        """Read the points of candidates by the space of this plan from now on."""

    def score(self, subject: Subject, split: Split, items: TaskItems | None = None) -> Measurement:
        """Build the merge and score it on items of a split; None is all of them."""


class InlinePool:
    """Scores one subject at a time, when its result is asked for."""

    num_slots = 1

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._queue: deque[tuple[int, Subject, Split, TaskItems | None]] = deque()

    @property
    def num_free(self) -> int:
        """How many subjects can be submitted without waiting for a result."""
        return self.num_slots - len(self._queue)

    def configure(self, plan: Any) -> None:
        """Begin a stage: the points of candidates are of this plan's space; nothing is under way."""
        self.scorer.configure(plan)

    def submit(self, key: int, subject: Subject, split: Split, items: TaskItems | None = None) -> None:
        """Hand a subject to the worker, with the items to score (all of the split); ``key`` comes back."""
        self._queue.append((key, subject, split, items))

    def results(self) -> Iterator[tuple[int, Outcome]]:
        """Yield (key, outcome) in the order in which they finish, until nothing is left."""
        while self._queue:
            key, subject, split, items = self._queue.popleft()
            try:
                yield key, self.scorer.score(subject, split, items)
            except CandidateError as error:
                yield key, error
