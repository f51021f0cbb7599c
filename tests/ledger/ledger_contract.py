"""What every ledger promises, whatever database holds it; a test class of a ledger inherits ``LedgerContract``."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from ledger_processes import candidate, measured
from sqlalchemy import update

from evomerge.errors import EvoMergeError, RunError
from evomerge.ledger import lease, tables
from evomerge.ledger.database import Database
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import Location
from evomerge.records import Arrival, Candidate, Descent, Measurement, Score, Slopes, Trial

inherited = settings(
    max_examples=20,
    database=None,
    suppress_health_check=[HealthCheck.differing_executors, HealthCheck.function_scoped_fixture],
)

SCRIPT = Path(__file__).with_name("ledger_processes.py")

numbers = st.floats(allow_nan=False, allow_infinity=False)
vectors = st.lists(numbers, max_size=4).map(tuple)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
letters = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
names = st.text(letters, min_size=1, max_size=8)
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
of_items = arrays(np.float32, st.integers(1, 30), elements=st.floats(width=32))
of_finite_items = arrays(np.float32, st.integers(1, 30), elements=st.floats(-(2.0**40), 2.0**40, width=32))
scores = st.builds(
    Score, value=numbers, stderr=numbers, items=of_items, companion=st.none() | of_finite_items
) | of_finite_items.map(lambda losses: Score(value=0.5, stderr=0.1, items=losses, companion=losses.copy()))
measurements = st.builds(
    Measurement,
    split=st.just("search"),
    scores=st.dictionaries(names, scores, min_size=1, max_size=3),
    cost=numbers,
    seconds=st.dictionaries(names, numbers, max_size=3),
    weights=st.none() | st.text(letters, max_size=64),
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
outcomes = measurements | st.text(letters, min_size=1, max_size=40)


def assert_same(one: Measurement | None, other: Measurement | None) -> None:
    """Equal to the last bit; scores' items too, NaN and signed zeros included."""
    if one is None or other is None:
        assert one is other
        return
    assert (one.split, one.cost, one.weights, one.arrival) == (other.split, other.cost, other.weights, other.arrival)
    assert dict(one.seconds) == dict(other.seconds)
    assert list(one.scores) == list(other.scores)
    for name, score in one.scores.items():
        read = other.scores[name]
        assert (score.value, score.stderr) == (read.value, read.stderr)
        np.testing.assert_array_equal(score.loss, read.loss)  # NaN is NaN
        assert (score.companion is None) == (read.companion is None)
        for numbers_N, read_N in ((score.items, read.items), (score.companion, read.companion)):
            if numbers_N is not None and read_N is not None:
                assert read_N.dtype == np.float32
                assert numbers_N.tobytes() == read_N.tobytes()


def assert_same_trial(one: Trial, other: Trial) -> None:
    for name in ("number", "stage", "index", "candidate", "known", "order", "failure", "fate", "point"):
        assert getattr(one, name) == getattr(other, name), name
    assert_same(one.measurement, other.measurement)


Place = Callable[[], Location]


def begun(location: Location, campaign: Any = None, facts: Any = None) -> Ledger:
    """A new run, driven by this process."""
    ledger = Ledger.drive(location, "one")
    ledger.begin({"name": "one"} if campaign is None else campaign, {} if facts is None else facts)
    return ledger


def reopened(ledger: Ledger) -> Ledger:
    ledger.close()
    return Ledger.drive(ledger.location, "one")


@contextmanager
def started(*words: object) -> Iterator[subprocess.Popen[str]]:
    """A process that does with a ledger what the words say; killed in the end."""
    command = [sys.executable, "-W", "error", str(SCRIPT), *map(str, words)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        assert process.stderr is not None
        raise AssertionError(process.stderr.read())
    return line.strip()


def outlast(location: Location, **changes: Any) -> None:
    """Let the lease end, as if its holder had not been heard of for a minute."""
    with closing(Database(location)) as database, database.writing() as connection:
        connection.execute(update(tables.leases).values(expires=database.now - 1, **changes))


class LedgerContract:
    """place says where the tested runs live: each call is another run."""

    @pytest.fixture
    def place(self) -> Place:
        raise NotImplementedError

    @pytest.fixture
    def ledger(self, place: Place) -> Iterator[Ledger]:
        with closing(begun(place())) as ledger:
            yield ledger

    @given(st.lists(st.tuples(candidates, st.none() | outcomes), min_size=1, max_size=4))
    @inherited
    def test_what_was_recorded_is_read_again(self, place: Place, run: list[tuple[Candidate, Any]]) -> None:
        """Floats to the last bit, after the ledger was closed and opened again."""
        ledger, expected = begun(place()), []
        for index, (proposed, outcome) in enumerate(run):
            issued = ledger.issue(0, index, proposed)
            assert issued.candidate == proposed
            expected.append(issued if outcome is None else ledger.record(issued, outcome, "abc", {"attempts": index}))
        ledger.close()
        read = Ledger.open(ledger.location).trials()
        assert len(read) == len(run)
        for trial, other, (_, outcome) in zip(expected, read, run, strict=True):
            assert_same_trial(trial, other)
            assert other.failure == (outcome if isinstance(outcome, str) else None)
            assert_same(outcome if isinstance(outcome, Measurement) else None, other.measurement)

    @given(json_values, json_values)
    @inherited
    def test_campaign_and_facts_are_read_again(self, place: Place, one: Any, other: Any) -> None:
        ledger = reopened(begun(place(), {"campaign": one}, {"facts": other}))
        assert ledger.campaign() == {"campaign": one}
        assert ledger.facts() == {"facts": other}
        ledger.update_campaign({"campaign": other})
        ledger = reopened(ledger)
        assert (ledger.campaign(), ledger.facts()) == ({"campaign": other}, {"facts": other})
        ledger.close()

    def test_a_stage_is_noted_once_beside_the_other_facts(self, place: Place) -> None:
        ledger = begun(place(), {}, {"items": "abc"})
        for number, facts in ((0, {"space": [1]}), (1, {"space": [2]}), (0, {"space": [3]})):
            ledger.begin_stage(number, facts)
        ledger = reopened(ledger)
        assert ledger.facts() == {"items": "abc", "stages": [{"space": [1]}, {"space": [2]}]}
        ledger.close()

    def test_the_end_of_the_search_is_noted_beside_the_other_facts(self, place: Place) -> None:
        ledger = begun(place(), {}, {"items": "abc"})
        ledger.begin_stage(0, {})
        for num_evaluations in (10, 20):
            ledger.finish(num_evaluations)
        ledger = reopened(ledger)
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

    def test_the_sequences_go_on_after_reopening(self, ledger: Ledger) -> None:
        ledger.record(ledger.issue(0, 0, candidate()), measured(), None)
        pending = ledger.issue(0, 1, candidate(0.25))
        again = reopened(ledger)
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

    def test_measurements_and_scores_keep_their_order(self, ledger: Ledger) -> None:
        subjects = ["uniform", "base", "expert:b", "expert:a"]
        score = measured().scores["math"]
        scores = dict.fromkeys(("z", "a", "m"), score)
        for subject in subjects:
            ledger.measure(subject, replace(measured(), scores=scores))
        found = reopened(ledger).measurements("search")
        assert list(found) == subjects
        assert all(list(measurement.scores) == ["z", "a", "m"] for measurement in found.values())

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
        broken = Score(value=None, stderr=0.0, items=good.items)  # type: ignore[arg-type]
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

    def test_using_the_test_items_again_counts_once_there_are_new_results(self, ledger: Ledger) -> None:
        """Going on with the same front after an interruption is the same touch."""
        ledger.touch_test_items()
        ledger.touch_test_items()
        ledger.issue(0, 0, candidate())
        again = reopened(ledger)
        again.touch_test_items()
        assert again.num_test_touches() == 1
        again.record(again.trials()[0], measured(), None)
        again.touch_test_items()
        assert again.num_test_touches() == 2
        again.close()

    def test_its_stamp_changes_with_every_write_and_with_nothing_else(self, ledger: Ledger) -> None:
        with closing(Ledger.open(ledger.location)) as reader:
            seen = [reader.stamp()]

            def note() -> None:
                seen.append(reader.stamp())
                assert reader.stamp() == seen[-1]

            trial = ledger.issue(0, 0, candidate(0))
            note()
            ledger.record(trial, measured(0), None)
            note()
            ledger.measure("base", measured(1))
            note()
            ledger.begin_stage(0, {"space": []})
            note()
            ledger.finish(10)
            note()
            ledger.finish(20)
            note()
            ledger.touch_test_items()
            note()
            ledger.update_campaign({"name": "another"})
            note()
        assert len(set(seen)) == len(seen)

    def test_a_reader_sees_what_the_driver_committed(self, ledger: Ledger) -> None:
        reader = Ledger.open(ledger.location)
        trial = ledger.issue(0, 0, candidate())
        assert [(read.number, read.order) for read in reader.trials()] == [(0, None)]
        ledger.record(trial, measured(), None)
        assert [(read.number, read.order) for read in reader.trials()] == [(0, 0)]
        reader.close()

    def test_a_reason_with_a_null_character_is_recorded(self, ledger: Ledger) -> None:
        ledger.record(ledger.issue(0, 0, candidate()), "broken\0 text", None)
        assert ledger.trials()[0].failure == "broken\\0 text"

    def test_a_run_that_never_began_leaves_nothing(self, place: Place) -> None:
        location = place()
        assert not Ledger.exists(location)
        ledger = Ledger.drive(location, "one")
        assert not ledger.has_begun
        assert not Ledger.exists(location)
        ledger.close()
        with pytest.raises(RunError, match="found none; runs start with evomerge search"):
            Ledger.open(location)
        with closing(begun(location)) as ledger:
            assert ledger.has_begun
            assert Ledger.exists(location)

    def test_runs_of_one_database_are_kept_apart(self, place: Place) -> None:
        """In a folder each has a file of its own, in a database each its rows."""
        one, other = begun(place(), {"name": "a"}), begun(place(), {"name": "b"})
        first = one.record(one.issue(0, 0, candidate(0.25)), measured(0.25), None)
        one.measure("base", measured(0.125))
        second = other.record(other.issue(0, 0, candidate(0.75)), measured(0.75), None)
        assert (first.number, second.number, second.order) == (0, 0, 0)
        assert [ledger.campaign()["name"] for ledger in (one, other)] == ["a", "b"]
        for ledger, trial in ((one, first), (other, second)):
            assert_same_trial(ledger.trials()[0], trial)
            ledger.close()
        assert other.measurements("search").keys() == {"trial:0"}

    def test_a_run_has_one_driver(self, ledger: Ledger) -> None:
        with pytest.raises(
            RunError, match="process [0-9]+ on .* is driving this run; its lease ends at .*: wait for"
        ) as told:
            Ledger.drive(ledger.location, "one")
        assert told.value.exit_status == 2
        reader = Ledger.open(ledger.location)
        assert reader.holder() == ledger.holder() is not None
        ledger.close()
        assert reader.holder() is None
        Ledger.drive(ledger.location, "one").close()

    def test_of_many_that_come_at_once_one_drives(self, place: Place) -> None:
        location = place()
        with (
            started("drive", location) as a,
            started("drive", location) as b,
            started("drive", location) as c,
        ):
            told = [line_of(process) for process in (a, b, c)]
        assert told.count("driving") == 1
        assert sum("is driving this run" in line for line in told) == 2

    def test_the_lease_of_a_dead_process_is_taken_at_once(self, ledger: Ledger) -> None:
        ledger.close()
        with started("write", ledger.location) as writer:
            line_of(writer)
            with pytest.raises(RunError, match=f"process {writer.pid} on"):
                Ledger.drive(ledger.location, "one")
            writer.kill()
            writer.wait()
        Ledger.drive(ledger.location, "one").close()

    def test_a_lease_that_ended_is_taken_and_its_holder_writes_no_more(self, ledger: Ledger) -> None:
        """The holder is on another machine, so that nobody knows whether it lives."""
        trial = ledger.issue(0, 0, candidate())
        outlast(ledger.location, machine="another", host="elsewhere")
        successor = Ledger.drive(ledger.location, "one")
        for write in (
            lambda: ledger.record(trial, measured(), None),
            lambda: ledger.issue(0, 1, candidate()),
            lambda: ledger.measure("base", measured()),
            lambda: ledger.begin_stage(0, {}),
            lambda: ledger.update_campaign({}),
            ledger.touch_test_items,
        ):
            with pytest.raises(EvoMergeError, match="process [0-9]+ on .* has taken this run over.*this one stops"):
                write()
        assert successor.record(successor.trials()[0], measured(), None).order == 0
        ledger.close()
        assert successor.issue(0, 1, candidate()).number == 1, "the lease is still the successor's"
        successor.close()

    def test_a_holder_that_nobody_followed_goes_on(self, ledger: Ledger) -> None:
        """A laptop slept for an hour."""
        outlast(ledger.location)
        assert ledger.issue(0, 0, candidate()).number == 0
        with pytest.raises(RunError, match="is driving this run"):
            Ledger.drive(ledger.location, "one")

    def test_a_lease_is_renewed_while_nothing_is_written(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lease, "RENEWAL_S", 0.02)
        with closing(begun(place())) as ledger:
            outlast(ledger.location)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and Ledger.open(ledger.location).holder() is None:
                time.sleep(0.02)
            assert Ledger.open(ledger.location).holder() is not None

    def test_a_process_that_was_stopped_and_followed_ends_with_the_reason(self, ledger: Ledger) -> None:
        """Stopped between two trials, it wakes up after another has gone on; nothing stands there twice."""
        ledger.close()
        with started("write", ledger.location, 2) as writer:
            assert [line_of(writer) for _ in range(3)] == ["0", "1", "2"]
            writer.send_signal(signal.SIGSTOP)
            outlast(ledger.location, machine="another")
            with closing(Ledger.drive(ledger.location, "one")) as successor:
                ours = successor.record(successor.issue(0, 3, candidate(0.999)), measured(), None)
            writer.send_signal(signal.SIGCONT)
            told, errors = writer.communicate("go on\n", timeout=120)
        assert (writer.returncode, told) == (1, "")
        assert "another process has taken this run over" in errors
        *others, last = Ledger.open(ledger.location).trials()
        assert [trial.order for trial in others] == [0, 1, 2]
        assert_same_trial(last, ours)

    def test_another_process_looks_on(self, ledger: Ledger) -> None:
        """It sees every trial whole, with its place and all its scores, or still pending."""
        num_trials = 80
        with started("read", ledger.location, num_trials) as reader:
            assert line_of(reader) == "reading"
            for index in range(num_trials):
                trial = ledger.issue(0, index, candidate())
                ledger.record(trial, measured(num_items=2000), None)
            assert int(line_of(reader)) > 3, "the reader saw the run grow"

    def test_killed_at_any_moment_it_holds_every_record_that_returned(self, ledger: Ledger) -> None:
        """SIGKILL three times, each a while after the first new record; every writer goes on where the last stopped."""
        ledger.close()
        rng = np.random.default_rng()
        returned: list[int] = []
        for _ in range(3):
            with started("write", ledger.location) as writer:
                first = line_of(writer)
                time.sleep(rng.uniform(0, 0.1))
                writer.kill()
                assert writer.stdout is not None
                returned += map(int, [first, *writer.stdout.read().split()])
            trials = Ledger.open(ledger.location).trials()
            assert [trial.number for trial in trials] == list(range(len(trials)))
            finished = {trial.number: trial for trial in trials if trial.order is not None}
            assert finished.keys() >= set(returned)
            for number, trial in finished.items():
                assert_same(trial.measurement, measured(1 / (number + 1), num_items=200))
                assert trial.point == (1 / (number + 1),)
            pending = [trial for trial in trials if trial.order is None]
            assert all(trial.measurement is None and trial.failure is None for trial in pending)
        assert len(returned) >= 3
