"""What every pool must do, with a scorer that says what it was asked."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from evomerge.errors import CandidateError, EvoMergeError
from evomerge.records import Candidate, Measurement, Split, TaskItems
from evomerge.workers.pool import Pool


class EchoFindings:
    def agrees(self, other: Any) -> bool:
        return isinstance(other, EchoFindings)


class Echo:
    """A real scorer of nothing: its measurement's cost says which candidate it saw, its seconds which items.

    Its stage adds to the cost. It halves the batch for one number and for its negative, which fails, as all do.
    """

    HALVED = -50.0

    def __init__(self) -> None:
        self.findings, self.stage = EchoFindings(), 0.0

    def buffers(self) -> Sequence[Any]:
        return []

    def adopt(self, buffers: Sequence[Any]) -> None:
        raise AssertionError("nothing was lent")

    def configure(self, stage_space: Any) -> None:
        self.stage = stage_space

    def score(self, subject: Any, split: Split, items: TaskItems | None = None) -> Measurement:
        if subject.point[0] < 0:
            raise CandidateError("negative", "not finite", halved=subject.point[0] == self.HALVED)
        if subject.point[0] > 100:
            raise EvoMergeError("ours")
        seconds = {task: float(len(of_task)) for task, of_task in (items or {}).items()}
        cost, halved = subject.point[0] + self.stage, abs(subject.point[0]) == -self.HALVED
        return Measurement(split=split, scores={}, cost=cost, seconds=seconds, halved=halved)


class PoolContract:
    def make(self) -> Pool:
        """A pool whose workers echo."""
        raise NotImplementedError

    def test_every_subject_comes_back_once_under_its_key(self) -> None:
        pool = self.make()
        for key in range(5):
            pool.submit(key, Candidate(point=(float(key),)), "search")
        results = list(pool.results())
        assert {result.key: result.outcome.cost for result in results} == {key: float(key) for key in range(5)}
        assert all(result.outcome.split == "search" for result in results)
        assert not list(pool.results())

    def test_the_items_asked_for_reach_the_scorer(self) -> None:
        pool = self.make()
        pool.submit(0, Candidate(point=(1.0,)), "search", {"a": np.arange(3)})
        pool.submit(1, Candidate(point=(1.0,)), "search")
        outcomes = {result.key: result.outcome for result in pool.results()}
        assert outcomes[0].seconds == {"a": 3.0}
        assert outcomes[1].seconds == {}

    def test_a_stage_reaches_every_worker(self) -> None:
        pool = self.make()
        for stage in (10.0, 20.0):
            pool.configure(stage)
            for key in range(6):
                pool.submit(key, Candidate(point=(float(key),)), "search")
            assert {result.key: result.outcome.cost for result in pool.results()} == {k: k + stage for k in range(6)}

    def test_a_failed_candidate_is_an_outcome_and_the_others_go_on(self) -> None:
        pool = self.make()
        for key, x in enumerate((1.0, -1.0, 2.0, Echo.HALVED, -Echo.HALVED)):
            pool.submit(key, Candidate(point=(x,)), "search")
        results = {result.key: result for result in pool.results()}
        assert isinstance(results[1].outcome, CandidateError)
        assert [result.fate.get("kind") for _, result in sorted(results.items())] == [
            None, "not finite", None, "not finite", None,
        ]  # fmt: skip
        assert [key for key, result in results.items() if result.fate.get("halved")] == [3, 4]
        assert results[2].outcome.cost == 2.0

    def test_each_result_says_who_brought_it_and_where_the_time_went(self) -> None:
        pool = self.make()
        for key, x in enumerate((1.0, -1.0, 2.0)):
            pool.submit(key, Candidate(point=(x,)), "search")
        for result in pool.results():
            assert result.fate["worker"]
            assert result.fate["busy_s"] > 0
            assert result.fate["idle_s"] >= 0
            assert result.fate.get("queue_s", 0.0) >= 0

    def test_a_failure_of_ours_is_not_hidden(self) -> None:
        pool = self.make()
        pool.submit(0, Candidate(point=(101.0,)), "search")
        with pytest.raises(EvoMergeError, match="ours"):
            list(pool.results())

    def test_free_slots_are_counted(self) -> None:
        pool = self.make()
        free = pool.num_free
        assert free >= 1
        pool.submit(0, Candidate(point=(1.0,)), "search")
        assert pool.num_free == free - 1
        next(iter(pool.results()))
        assert pool.num_free == free

    def test_what_waits_beyond_the_slots_leaves_none_free(self) -> None:
        """A run that was interrupted on many workers may go on with few."""
        pool = self.make()
        for key in range(pool.num_free + 2):
            pool.submit(key, Candidate(point=(1.0,)), "search")
        assert pool.num_free == 0
        list(pool.results())
