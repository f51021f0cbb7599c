"""What every pool must do; the inline pool does it in this process."""

from typing import Any

import numpy as np
import pytest

from evomerge.errors import CandidateError, EvoMergeError
from evomerge.records import Candidate, Measurement, Split, TaskItems
from evomerge.workers.inline import InlinePool, Scorer


class Echo:
    """A real scorer of nothing: its measurement's cost says which candidate it saw, its seconds which items."""

    def score(self, subject: Any, split: Split, items: TaskItems | None = None) -> Measurement:
        if subject.point[0] < 0:
            raise CandidateError("negative")
        if subject.point[0] > 100:
            raise EvoMergeError("ours")
        seconds = {task: float(len(of_task)) for task, of_task in (items or {}).items()}
        return Measurement(split=split, scores={}, cost=subject.point[0], seconds=seconds)


class PoolContract:
    def make(self, scorer: Scorer) -> Any:
        raise NotImplementedError

    def test_every_subject_comes_back_once_under_its_key(self) -> None:
        pool = self.make(Echo())
        for key in range(5):
            pool.submit(key, Candidate(point=(float(key),)), "search")
        outcomes = dict(pool.results())
        assert {key: outcome.cost for key, outcome in outcomes.items()} == {key: float(key) for key in range(5)}
        assert all(outcome.split == "search" for outcome in outcomes.values())

    def test_the_items_asked_for_reach_the_scorer(self) -> None:
        pool = self.make(Echo())
        pool.submit(0, Candidate(point=(1.0,)), "search", {"a": np.arange(3)})
        pool.submit(1, Candidate(point=(1.0,)), "search")
        outcomes = dict(pool.results())
        assert outcomes[0].seconds == {"a": 3.0}
        assert outcomes[1].seconds == {}

    def test_a_failed_candidate_is_an_outcome_and_the_others_go_on(self) -> None:
        pool = self.make(Echo())
        for key, x in enumerate((1.0, -1.0, 2.0)):
            pool.submit(key, Candidate(point=(x,)), "search")
        outcomes = dict(pool.results())
        assert isinstance(outcomes[1], CandidateError)
        assert outcomes[2].cost == 2.0

    def test_a_failure_of_ours_is_not_hidden(self) -> None:
        pool = self.make(Echo())
        pool.submit(0, Candidate(point=(101.0,)), "search")
        with pytest.raises(EvoMergeError, match="ours"):
            list(pool.results())

    def test_free_slots_are_counted(self) -> None:
        pool = self.make(Echo())
        free = pool.num_free
        assert free >= 1
        pool.submit(0, Candidate(point=(1.0,)), "search")
        assert pool.num_free == free - 1
        next(iter(pool.results()))
        assert pool.num_free == free


class TestInlinePool(PoolContract):
    def make(self, scorer: Scorer) -> InlinePool:
        return InlinePool(scorer)
