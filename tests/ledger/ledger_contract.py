"""What every ledger promises, whatever database holds it; a test class of a ledger inherits ``LedgerContract``."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from evomerge.errors import EvoMergeError
from evomerge.ledger.ledger import Ledger
from evomerge.records import Arrival, Candidate, Descent, Measurement, Score, Slopes, Trial

inherited = settings(
    max_examples=20,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)

numbers = st.floats(allow_nan=False, allow_infinity=False)
vectors = st.lists(numbers, max_size=4).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
names = st.text(min_size=1, max_size=8)
descents = st.builds(
    Descent,
    loss=st.sampled_from(["ce", "entropy"]) | st.dictionaries(names, names, max_size=2),
    steps=st.integers(1, 10**6),
    learning_rate=numbers,
    batch_size=st.integers(1, 512),
    seed=st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple),
    rule=st.sampled_from(["adam", "sigmoid"]),
    period=st.none() | st.integers(1, 100),
    samples=st.none() | st.integers(1, 100),
    clip=st.none() | numbers,
    layers=st.lists(st.integers(0, 100), max_size=3).map(tuple),
    steps_before=st.integers(0, 1000),
    first_moment=vectors,
    second_moment=vectors,
    final_rate=numbers,
    raw=vectors,
    anchors=vectors,
)
candidates = st.builds(
    Candidate,
    point=st.lists(st.floats(0, 1), min_size=1, max_size=5).map(tuple),
    descent=st.none() | descents,
    memo=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
)
scores = st.builds(
    Score,
    value=numbers,
    stderr=numbers,
    items=arrays(np.float32, st.integers(1, 30), elements=st.floats(width=32)),
)
measurements = st.builds(
    Measurement,
    split=st.just("search"),
    scores=st.dictionaries(names, scores, min_size=1, max_size=3),
    cost=numbers,
    seconds=st.dictionaries(names, numbers, max_size=3),
    weights=st.none() | st.text(max_size=64),
    arrival=st.none()
    | st.builds(
        Arrival,
        point=vectors,
        first_moment=vectors,
        second_moment=vectors,
        losses=vectors,
        raw=vectors,
        slopes=st.none() | st.builds(Slopes, points=vectors, losses=vectors, gradients=vectors),
    ),
)
outcomes = measurements | st.text(min_size=1, max_size=40)


def measured(value: float = 0.5, *, num_items: int = 3, split: Any = "search") -> Measurement:
    score = Score(value=value, stderr=0.1, items=np.full(num_items, value, dtype=np.float32))
    return Measurement(split=split, scores={"math": score, "chat": score}, cost=1.0, seconds={"evaluate": 0.25})


def candidate(*point: float) -> Candidate:
    return Candidate(point=point or (0.5,))


def assert_same(one: Measurement | None, other: Measurement | None) -> None:
    """Equal to the last bit; scores' items too, NaN and signed zeros included."""
    if one is None or other is None:
        assert one is other
        return
    assert (one.split, one.cost, one.weights, one.arrival) == (other.split, other.cost, other.weights, other.arrival)
    assert dict(one.seconds) == dict(other.seconds)
    assert one.scores.keys() == other.scores.keys()
    for name, score in one.scores.items():
        read = other.scores[name]
        assert (score.value, score.stderr) == (read.value, read.stderr)
        assert read.items.dtype == np.float32
        assert score.items.tobytes() == read.items.tobytes()


def assert_same_trial(one: Trial, other: Trial) -> None:
    for name in ("number", "stage", "index", "candidate", "known", "order", "failure", "point"):
        assert getattr(one, name) == getattr(other, name), name
    assert_same(one.measurement, other.measurement)


class LedgerContract:
    """create and open say which ledger is tested; a folder stands for one run."""

    def create(self, folder: Path, campaign: Mapping[str, Any], facts: Mapping[str, Any]) -> Ledger:
        raise NotImplementedError

    def open(self, folder: Path) -> Ledger:
        raise NotImplementedError

    @contextmanager
    def fresh(self, root: Path) -> Iterator[tuple[Ledger, Path]]:
        """A new run in a folder of its own."""
        folder = root / f"run{len(list(root.iterdir()))}"
        folder.mkdir()
        ledger = self.create(folder, {"name": "one"}, {})
        try:
            yield ledger, folder
        finally:
            ledger.close()

    @pytest.fixture
    def ledger(self, tmp_path: Path) -> Iterator[Ledger]:
        with self.fresh(tmp_path) as (ledger, _):
            yield ledger

    def reopened(self, ledger: Ledger, folder: Path) -> Ledger:
        ledger.close()
        return self.open(folder)

    @given(st.lists(st.tuples(candidates, st.none() | outcomes), min_size=1, max_size=4))
    @inherited
    def test_what_was_recorded_is_read_again(self, tmp_path: Path, run: list[tuple[Candidate, Any]]) -> None:
        """Floats to the last bit, after the ledger was closed and opened again."""
        with self.fresh(tmp_path) as (ledger, folder):
            expected = []
            for index, (proposed, outcome) in enumerate(run):
                issued = ledger.issue(0, index, proposed)
                assert issued.candidate == proposed
                expected.append(issued if outcome is None else ledger.record(issued, outcome, "abc"))
            again = self.reopened(ledger, folder)
            read = again.trials()
            again.close()
        assert len(read) == len(run)
        for trial, other, (_, outcome) in zip(expected, read, run, strict=True):
            assert_same_trial(trial, other)
            assert other.failure == (outcome if isinstance(outcome, str) else None)
            assert_same(outcome if isinstance(outcome, Measurement) else None, other.measurement)

    @given(json_values, json_values)
    @inherited
    def test_campaign_and_facts_are_read_again(self, tmp_path: Path, one: Any, other: Any) -> None:
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        ledger = self.create(folder, {"campaign": one}, {"facts": other})
        ledger = self.reopened(ledger, folder)
        assert ledger.campaign() == {"campaign": one}
        assert ledger.facts() == {"facts": other}
        ledger.update_campaign({"campaign": other})
        ledger = self.reopened(ledger, folder)
        assert (ledger.campaign(), ledger.facts()) == ({"campaign": other}, {"facts": other})
        ledger.close()

    def test_a_stage_is_noted_once_beside_the_other_facts(self, tmp_path: Path) -> None:
        ledger = self.create(tmp_path, {}, {"items": "abc"})
        for number, facts in ((0, {"space": [1]}), (1, {"space": [2]}), (0, {"space": [3]})):
            ledger.begin_stage(number, facts)
        ledger = self.reopened(ledger, tmp_path)
        assert ledger.facts() == {"items": "abc", "stages": [{"space": [1]}, {"space": [2]}]}
        ledger.close()

    def test_the_end_of_the_search_is_noted_beside_the_other_facts(self, tmp_path: Path) -> None:
        ledger = self.create(tmp_path, {}, {"items": "abc"})
        ledger.begin_stage(0, {})
        for num_evaluations in (10, 20):
            ledger.finish(num_evaluations)
        ledger = self.reopened(ledger, tmp_path)
        assert ledger.facts() == {"items": "abc", "stages": [{}], "finished": 20}
        ledger.close()

    def test_an_empty_ledger_holds_nothing(self, ledger: Ledger) -> None:
        assert ledger.trials() == []
        assert ledger.measurements("search") == {}
        assert ledger.num_test_touches() == 0

    def test_numbers_count_trials_and_order_counts_results(self, ledger: Ledger) -> None:
        """known is how many results there were when a trial was issued, in whatever order they arrive."""
        first, second = (ledger.issue(0, index, candidate(0.1 * index)) for index in range(2))
        assert ledger.record(second, measured(), None).order == 0
        third = ledger.issue(1, 0, candidate())
        assert ledger.record(first, "out of memory", None).order == 1
        fourth = ledger.issue(1, 1, candidate())
        assert ledger.record(fourth, measured(), None).order == 2
        assert [trial.number for trial in (first, second, third, fourth)] == [0, 1, 2, 3]
        assert [trial.known for trial in (first, second, third, fourth)] == [0, 0, 1, 2]
        assert [(trial.stage, trial.index) for trial in ledger.trials()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert [trial.order for trial in ledger.trials()] == [1, 0, None, 2]

    def test_the_sequences_go_on_after_reopening(self, tmp_path: Path) -> None:
        with self.fresh(tmp_path) as (ledger, folder):
            ledger.record(ledger.issue(0, 0, candidate()), measured(), None)
            pending = ledger.issue(0, 1, candidate(0.25))
            again = self.reopened(ledger, folder)
            assert_same_trial(again.trials()[1], pending)
            following = again.issue(0, 2, candidate())
            assert (following.number, following.known) == (2, 1)
            assert again.record(again.trials()[1], measured(), None).order == 1
            again.close()

    def test_a_failure_keeps_its_reason_and_has_no_measurement(self, ledger: Ledger) -> None:
        ledger.record(ledger.issue(0, 0, candidate()), "math: 3 of 10 items have no finite loss", None)
        trial = ledger.trials()[0]
        assert trial.failure == "math: 3 of 10 items have no finite loss"
        assert trial.measurement is None
        assert trial.order == 0
        assert ledger.measurements("search") == {}

    def test_references_and_splits_are_kept_apart(self, ledger: Ledger) -> None:
        ledger.record(ledger.issue(0, 0, candidate()), measured(0.5), None)
        ledger.measure("base", measured(0.25))
        ledger.measure("base", measured(0.375, split="test"))
        ledger.measure("trial:0", measured(0.75, split="test"))
        on_search, on_test = ledger.measurements("search"), ledger.measurements("test")
        assert {name: m.scores["math"].value for name, m in on_search.items()} == {"trial:0": 0.5, "base": 0.25}
        assert {name: m.scores["math"].value for name, m in on_test.items()} == {"trial:0": 0.75, "base": 0.375}
        assert ledger.measurements("adapt") == {}
        trial = ledger.trials()[0]
        assert trial.measurement is not None
        assert trial.measurement.scores["math"].value == 0.5, "a trial shows its search measurement"

    def test_a_measurement_is_made_once(self, ledger: Ledger) -> None:
        ledger.measure("base", measured(0.25))
        with pytest.raises(Exception, match="UNIQUE|unique|duplicate"):
            ledger.measure("base", measured(0.5))
        assert_same(ledger.measurements("search")["base"], measured(0.25))

    def test_a_record_that_fails_leaves_nothing_half_written(self, ledger: Ledger) -> None:
        """The scores clash with some that are there, so the trial stays pending and its place in the order free."""
        trial = ledger.issue(0, 0, candidate())
        ledger.measure("trial:0", measured(0.25))
        with pytest.raises(Exception, match="UNIQUE|unique|duplicate"):
            ledger.record(trial, measured(0.5), "fingerprint")
        other = ledger.issue(0, 1, candidate())
        assert other.known == 0
        assert ledger.record(other, "failed", None).order == 0
        read = ledger.trials()[0]
        assert (read.order, read.failure) == (None, None)
        assert_same(ledger.measurements("search")["trial:0"], measured(0.25))

    def test_scores_that_cannot_be_stored_leave_nothing_behind(self, ledger: Ledger) -> None:
        """The measurement is written before its scores, of which the second has no value."""
        trial = ledger.issue(0, 0, candidate())
        good = measured().scores["math"]
        broken = Score(value=float("nan"), stderr=0.0, items=good.items)
        measurement = Measurement(split="search", scores={"math": good, "chat": broken}, cost=1.0, seconds={})
        with pytest.raises(Exception, match="NOT NULL|null"):
            ledger.record(trial, measurement, None)
        assert ledger.measurements("search") == {}
        assert ledger.trials()[0].order is None
        assert ledger.record(trial, measured(), None).order == 0

    def test_a_trial_has_one_fate(self, ledger: Ledger) -> None:
        trial = ledger.issue(0, 0, Candidate(point=(0.5,)))
        ledger.record(trial, "first", None)
        for twice in (trial, replace(trial, number=7)):
            with pytest.raises(EvoMergeError, match="is not pending"):
                ledger.record(twice, "second", None)
        assert [(trial.order, trial.failure) for trial in ledger.trials()] == [(0, "first")]

    def test_a_place_in_a_stage_is_issued_once(self, ledger: Ledger) -> None:
        ledger.issue(0, 0, candidate())
        with pytest.raises(Exception, match="UNIQUE|unique|duplicate"):
            ledger.issue(0, 0, candidate())
        assert [trial.number for trial in ledger.trials()] == [0]
        assert ledger.issue(0, 1, candidate()).number == 1

    def test_using_the_test_items_again_counts_once_there_are_new_results(self, tmp_path: Path) -> None:
        """Going on with the same front after an interruption is the same touch."""
        with self.fresh(tmp_path) as (ledger, folder):
            ledger.touch_test_items()
            ledger.touch_test_items()
            ledger.issue(0, 0, candidate())
            again = self.reopened(ledger, folder)
            again.touch_test_items()
            assert again.num_test_touches() == 1
            again.record(again.trials()[0], measured(), None)
            again.touch_test_items()
            assert again.num_test_touches() == 2
            again.close()

    def test_a_second_ledger_object_sees_what_the_first_committed(self, tmp_path: Path) -> None:
        with self.fresh(tmp_path) as (ledger, folder):
            reader = self.open(folder)
            trial = ledger.issue(0, 0, candidate())
            assert [(read.number, read.order) for read in reader.trials()] == [(0, None)]
            ledger.record(trial, measured(), None)
            assert [(read.number, read.order) for read in reader.trials()] == [(0, 0)]
            reader.close()
