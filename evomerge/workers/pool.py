"""What a pool is: workers that each own a scorer, subjects that go in, results that come out as they finish."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from evomerge.errors import CandidateError
from evomerge.records import Candidate, Measurement, Recipe, Split, TaskItems

Subject = Candidate | Recipe
Outcome = Measurement | CandidateError

SECONDS = ("queue_s", "busy_s", "idle_s")
"""Of a result's fate: how long no worker had the subject, how long its worker did, and was idle before it."""


class Scorer(Protocol):
    """Owns a resident model and scores what it is given. Raises: CandidateError for a candidate that fails."""

    def configure(self, stage_space: Any) -> None:
        """Read the points of candidates by this from now on."""

    def score(self, subject: Subject, split: Split, items: TaskItems | None = None) -> Measurement:
        """Build the merge and score it on items of a split; None is all of them."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a subject: its outcome, and how it came about (JSON): attempts, worker, kind of failure.

    Seconds (``SECONDS``) are among it. What workers that died have tried counts as queue_s, the way to the worker and
    back as busy_s.
    """

    key: int
    outcome: Outcome
    fate: Mapping[str, Any] = field(default_factory=dict)


def fate_of(outcome: Outcome) -> dict[str, Any]:
    """Return what an outcome says itself of how it came about."""
    kind = {"kind": outcome.kind} if isinstance(outcome, CandidateError) else {}
    return {**kind, "halved": True} if outcome.halved else kind


class Pool(Protocol):
    """Scores subjects on its workers, none of which waits for another."""

    @property
    def num_free(self) -> int:
        """How many subjects can be submitted now and be scored at once; 1 at least while nothing is under way."""

    def configure(self, stage_space: Any) -> None:
        """Begin a stage: the points of candidates are read by this; nothing is under way."""

    def submit(self, key: int, subject: Subject, split: Split, items: TaskItems | None = None) -> None:
        """Hand a subject to a worker, with the items to score (all of the split); ``key`` comes back."""

    def results(self) -> Iterator[Result]:
        """Yield results in the order in which they finish, until nothing is left."""
