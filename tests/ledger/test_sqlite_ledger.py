"""Ledgers in SQLite: the contract, files that are no ledgers, and files of earlier versions."""

import json
import sqlite3
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger_contract import LedgerContract, Place, assert_same, begun, reopened
from ledger_processes import candidate, measured
from sqlalchemy import Engine, event

from evomerge.errors import RunError
from evomerge.ledger import database
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import FILE_NAME, locate


class TestSqliteLedger(LedgerContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        numbers = count()
        return lambda: locate(tmp_path / f"run{next(numbers)}")


def test_one_file_holds_many_runs(tmp_path: Path) -> None:
    numbers = count()
    LedgerContract().test_runs_of_one_database_are_kept_apart(
        lambda: locate(f"sqlite:///{tmp_path}/all.sqlite#run{next(numbers)}")
    )
    assert Ledger.names(locate(f"sqlite:///{tmp_path}/all.sqlite")) == ["run0", "run1"]


def test_no_ledger_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a run folder with a ledger.*evomerge search"):
        Ledger.open(locate(tmp_path))
    assert not list(tmp_path.iterdir()), "looking must not make a file"


@pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\0" + bytes(4080)])
def test_a_file_that_is_no_ledger(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(RunError, match="not a readable ledger") as caught:
        Ledger.open(locate(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_tables_is_no_ledger_yet(tmp_path: Path) -> None:
    """A process that dies while it creates the ledger leaves one; the next search may begin there."""
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    assert (tmp_path / FILE_NAME).stat().st_size > 0
    assert not Ledger.exists(locate(tmp_path))
    begun(locate(tmp_path)).close()
    assert Ledger.exists(locate(tmp_path))


def test_a_database_of_something_else(tmp_path: Path) -> None:
    """Other tables stay as they are; a run of ours may stand beside them."""
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("CREATE TABLE trials (title TEXT)")
    with pytest.raises(RunError, match="found none"):
        Ledger.open(locate(tmp_path))
    begun(locate(tmp_path)).close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        assert connection.execute("SELECT * FROM trials").description[0][0] == "title"


def test_a_newer_schema_is_neither_read_nor_driven(tmp_path: Path) -> None:
    begun(locate(tmp_path)).close()
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("UPDATE evomerge_schema SET version = 99")
        connection.commit()
    for use in (Ledger.open, Ledger.exists, lambda location: Ledger.drive(location, "one")):
        with pytest.raises(RunError, match="expected schema 3, found 99; use the evomerge that wrote it"):
            use(locate(tmp_path))


def test_a_folder_with_several_runs_does_not_guess(tmp_path: Path) -> None:
    for name in ("one", "two"):
        begun(locate(f"sqlite:///{tmp_path}/{FILE_NAME}#{name}")).close()
    with pytest.raises(RunError, match="holds 2 runs; name one, such as .*: one, two"):
        Ledger.open(locate(tmp_path))


def test_descents_recorded_before_there_were_rules_are_read(tmp_path: Path) -> None:
    """Adam was the only one, and a front's descent was told by its anchors."""
    with closing(begun(locate(tmp_path))) as ledger:
        ledger.issue(0, 0, candidate())
        before = {
            "loss": "ce", "steps": 5, "learning_rate": 0.01, "batch_size": 8, "seed": [0, 0, 1], "steps_before": 5,
            "first_moment": [0.5], "second_moment": [0.25], "final_rate": 1.0, "anchors": [],
        }  # fmt: skip
        with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
            held = json.dumps({"point": [0.5], "descent": before, "memo": {}})
            connection.execute("UPDATE evomerge_trials SET candidate = ?", (held,))
            connection.commit()
        descent = ledger.trials()[0].candidate.descent
    assert descent is not None
    assert (descent.rule, descent.first_moment, descent.raw, descent.weight_decay) == ("adam", (0.5,), (), 0.0)


def test_a_driver_that_dies_before_it_begins_leaves_room_for_the_next(tmp_path: Path) -> None:
    """What begins halfway has no campaign, and is no run."""
    with closing(Ledger.drive(locate(tmp_path), "one")) as ledger, pytest.raises(TypeError, match="JSON"):
        ledger.begin({"not JSON": object()}, {})
    assert not Ledger.exists(locate(tmp_path))
    begun(locate(tmp_path), {"name": "again"}).close()
    assert Ledger.open(locate(tmp_path)).campaign() == {"name": "again"}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write a run there .*choose another place with --run"):
        Ledger.drive(locate(tmp_path / "file" / "run"), "one")


SCHEMA_2 = """
CREATE TABLE run (id INTEGER NOT NULL, schema_version INTEGER NOT NULL, created FLOAT NOT NULL,
    campaign VARCHAR NOT NULL, facts VARCHAR NOT NULL, test_touches VARCHAR NOT NULL, PRIMARY KEY (id));
CREATE TABLE trials (number INTEGER NOT NULL, stage INTEGER NOT NULL, stage_index INTEGER NOT NULL,
    candidate VARCHAR NOT NULL, known INTEGER NOT NULL, issued FLOAT NOT NULL, finish_order INTEGER, finished FLOAT,
    fingerprint VARCHAR, failure VARCHAR, PRIMARY KEY (number), UNIQUE (stage, stage_index), UNIQUE (finish_order));
CREATE TABLE measurements (subject VARCHAR NOT NULL, split VARCHAR NOT NULL, cost FLOAT NOT NULL,
    seconds VARCHAR NOT NULL, weights VARCHAR, arrival VARCHAR, stopped VARCHAR, PRIMARY KEY (subject, split));
CREATE TABLE scores (subject VARCHAR NOT NULL, split VARCHAR NOT NULL, objective VARCHAR NOT NULL,
    value FLOAT NOT NULL, stderr FLOAT NOT NULL, items BLOB NOT NULL, companion BLOB,
    PRIMARY KEY (subject, split, objective));
"""
LOSSES = np.array([0.5, 2.0, 0.25], dtype="<f4")


@pytest.fixture
def older(tmp_path: Path) -> Path:
    """A run as schema 2 held it: a finished, a failed and a pending trial, the base on both splits."""
    candidate = json.dumps({"point": [0.5], "descent": None, "memo": {"note": 1}})
    trials = [
        (0, 0, 0, candidate, 0, 10.0, 1, 13.0, "abc", None),
        (1, 0, 1, candidate, 0, 11.0, 0, 12.0, None, "out of memory"),
        (2, 1, 0, candidate, 2, 14.0, None, None, None, None),
    ]
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.executescript("PRAGMA journal_mode=WAL;" + SCHEMA_2)
        connection.execute("INSERT INTO run VALUES (1, 2, 9.0, ?, ?, '[2]')", ('{"name": "old"}', '{"items": "x"}'))
        connection.executemany(f"INSERT INTO trials VALUES ({', '.join('?' * 10)})", trials)
        for subject, split in (("uniform", "search"), ("trial:0", "search"), ("base", "search"), ("base", "test")):
            row = (subject, split, 1.0, '{"evaluate": 0.25}', None, None, None)
            connection.execute("INSERT INTO measurements VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            items = zlib.compress(np.full(3, 0.5, dtype="<f4").tobytes())
            for objective, companion in (("math", None), ("chat", zlib.compress(LOSSES.tobytes()))):
                scores = (subject, split, objective, 0.5, 0.1, items, companion)
                connection.execute("INSERT INTO scores VALUES (?, ?, ?, ?, ?, ?, ?)", scores)
        connection.commit()
    return tmp_path


def test_an_older_schema_is_brought_up_to_date_by_its_driver(older: Path) -> None:
    with pytest.raises(
        RunError, match=r"earlier evomerge \(schema 2\): evomerge search .* up to date and loses nothing"
    ):
        Ledger.open(locate(older))
    Ledger.upgrade(locate(older))
    ledger = Ledger.open(locate(older))
    assert (ledger.campaign(), ledger.facts(), ledger.num_test_touches()) == ({"name": "old"}, {"items": "x"}, 1)
    first, second, third = ledger.trials()
    assert first.measurement is not None
    assert (first.order, second.order, third.order, third.known) == (1, 0, None, 2)
    assert (second.failure, third.stage, first.candidate.memo, first.fate) == ("out of memory", 1, {"note": 1}, {})
    assert list(ledger.measurements("search")) == ["uniform", "trial:0", "base"]
    assert list(first.measurement.scores) == ["math", "chat"]
    assert ledger.measurements("test").keys() == {"base"}
    score = first.measurement.scores["chat"]
    assert score.companion is not None
    assert score.companion.tobytes() == LOSSES.tobytes()
    assert score.loss == (LOSSES.mean(dtype=float), LOSSES.std(dtype=float) / 3**0.5)
    assert first.measurement.scores["math"].companion is None
    assert first.measurement.scores["math"].items.tolist() == [0.5] * 3
    with closing(Ledger.drive(locate(older), "another")) as driver:
        assert driver.record(driver.trials()[2], measured(), None).order == 2
    assert Ledger.names(locate(older)) == ["old"]
    assert_same(ledger.trials()[2].measurement, measured())


def test_an_upgrade_that_fails_leaves_the_older_schema(older: Path) -> None:
    with closing(sqlite3.connect(older / FILE_NAME)) as connection:
        connection.execute("UPDATE scores SET items = x'00' WHERE subject = 'base'")
        connection.commit()
    with pytest.raises(zlib.error):
        Ledger.drive(locate(older), "one")
    with pytest.raises(RunError, match="schema 2"):
        Ledger.open(locate(older))


class Disk:
    """SQLite's own page limit stands in for the disk's end."""

    is_full = True

    def __call__(self, connection: Any) -> None:
        pages = connection.exec_driver_sql("pragma page_count").scalar() if self.is_full else 2**31
        connection.exec_driver_sql(f"pragma max_page_count = {pages}")


@pytest.fixture
def disk() -> Iterator[Disk]:
    held = Disk()
    event.listen(Engine, "begin", held)
    yield held
    event.remove(Engine, "begin", held)


def fill(ledger: Ledger) -> None:
    for index in range(100):
        ledger.record(ledger.issue(0, index, candidate()), measured(num_items=4000), None)


def test_a_full_disk_is_said_in_one_line_and_nothing_is_lost(tmp_path: Path, disk: Disk) -> None:
    disk.is_full = False
    ledger = begun(locate(tmp_path))
    disk.is_full = True
    with pytest.raises(RunError, match="cannot be written .*full; expected 10 MB.*the same command goes on"):
        fill(ledger)
    disk.is_full = False
    recorded = ledger.trials()
    with closing(reopened(ledger)) as again:
        assert again.record(again.issue(0, len(recorded), candidate()), measured(), None).number == len(recorded)


def test_a_ledger_that_is_told_to_waits_for_room(tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The note that it waits makes room a while later; each of its lines comes once, and each trial."""
    monkeypatch.setattr(database, "RETRY_S", 0.02)
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        if "waits" in line:
            threading.Timer(0.1, lambda: setattr(disk, "is_full", False)).start()

    disk.is_full = False
    with closing(Ledger.drive(locate(tmp_path), "one", note)) as ledger:
        ledger.begin({}, {})
        disk.is_full = True
        fill(ledger)
        assert [trial.order for trial in ledger.trials()] == list(range(100))
    assert ["the search waits" in line for line in notes] == [True, False]
    assert notes[1].endswith("can be used again; the search goes on")
