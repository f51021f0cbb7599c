"""The inline pool: one worker, in this process, with nothing to start."""

from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

from evomerge.clock import Clock
from evomerge.errors import CandidateError
from evomerge.records import Options, Split, TaskItems
from evomerge.workers.pool import Outcome, Result, Scorer, Subject, fate_of

HERE = "inline"


class InlineOptions(Options):
    """Score in this process."""

    kind: Literal["inline"] = "inline"


class InlinePool:
    """Scores one subject at a time, when its result is asked for."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._queue: deque[tuple[int, Subject, Split, TaskItems | None]] = deque()
        self._clock = Clock()

    @property
    def num_free(self) -> int:
        """One, or none if a subject waits."""
        return 0 if self._queue else 1

    def configure(self, stage_space: Any) -> None:
        """Begin a stage."""
        self.scorer.configure(stage_space)

    def submit(self, key: int, subject: Subject, split: Split, items: TaskItems | None = None) -> None:
        """Keep a subject until its result is asked for."""
        self._queue.append((key, subject, split, items))

    def results(self) -> Iterator[Result]:
        """Score and yield, until nothing is left."""
        while self._queue:
            key, subject, split, items = self._queue.popleft()
            self._clock.lap("idle_s")
            outcome: Outcome
            try:
                outcome = self.scorer.score(subject, split, items)
            except CandidateError as error:
                error.__cause__ = error.__context__ = error.__traceback__ = None  # their frames hold tensors
                outcome = error
            self._clock.lap("busy_s")
            yield Result(key, outcome, {"worker": HERE, **self._clock.take(), **fate_of(outcome)})
