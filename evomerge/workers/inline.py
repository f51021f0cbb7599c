"""The inline pool: one worker, in this process, with nothing to start."""

from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

from evomerge.errors import CandidateError
from evomerge.records import Options, Split, TaskItems
from evomerge.workers.pool import Result, Scorer, Subject


class InlineOptions(Options):
    """Score in this process."""

    kind: Literal["inline"] = "inline"


class InlinePool:
    """Scores one subject at a time, when its result is asked for."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer
        self._queue: deque[tuple[int, Subject, Split, TaskItems | None]] = deque()

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
            try:
                yield Result(key, self.scorer.score(subject, split, items))
            except CandidateError as error:
                yield Result(key, error, {"kind": error.kind})
