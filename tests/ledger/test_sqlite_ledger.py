"""The SQLite ledger: the contract, files that are no ledgers, and processes that look on or die."""

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger_contract import LedgerContract, assert_same, candidate, measured

from evomerge.errors import RunError
from evomerge.ledger.ledger import FILE_NAME, Ledger

SCRIPT = Path(__file__).with_name("ledger_processes.py")


class TestSqliteLedger(LedgerContract):
    def create(self, folder: Path, campaign: Mapping[str, Any], facts: Mapping[str, Any]) -> Ledger:
        return Ledger.create(folder, campaign, facts)

    def open(self, folder: Path) -> Ledger:
        return Ledger.open(folder)


def test_no_ledger_in_the_folder(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"{FILE_NAME}.*evomerge search"):
        Ledger.open(tmp_path)
    assert not list(tmp_path.iterdir()), "looking must not make a file"


@pytest.mark.parametrize("content", [b"not a database", b"SQLite format 3\0" + bytes(4080)])
def test_a_file_that_is_no_ledger(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(RunError, match="not a readable ledger") as caught:
        Ledger.open(tmp_path)
    assert str(tmp_path / FILE_NAME) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_tables_is_no_ledger_yet(tmp_path: Path) -> None:
    """A process that dies while it creates the ledger leaves one; the next search may begin there."""
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    assert (tmp_path / FILE_NAME).stat().st_size > 0
    assert not Ledger.exists(tmp_path)
    with pytest.raises(RunError, match="found none"):
        Ledger.open(tmp_path)
    Ledger.create(tmp_path, {}, {}).close()
    assert Ledger.exists(tmp_path)


def test_a_database_of_something_else(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("CREATE TABLE songs (title TEXT)")
    connection.close()
    with pytest.raises(RunError, match="not a readable ledger"):
        Ledger.open(tmp_path)


def test_a_newer_schema_is_not_read(tmp_path: Path) -> None:
    Ledger.create(tmp_path, {}, {}).close()
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("UPDATE run SET schema_version = 99")
    connection.close()
    with pytest.raises(RunError, match="schema.*99"):
        Ledger.open(tmp_path)


def test_descents_recorded_before_there_were_rules_are_read(tmp_path: Path) -> None:
    """Adam was the only one, and a front's descent was told by its anchors."""
    with closing(Ledger.create(tmp_path, {}, {})) as ledger:
        ledger.issue(0, 0, candidate())
        before = {
            "loss": "ce", "steps": 5, "learning_rate": 0.01, "batch_size": 8, "seed": [0, 0, 1], "steps_before": 5,
            "first_moment": [0.5], "second_moment": [0.25], "final_rate": 1.0, "anchors": [],
        }  # fmt: skip
        with sqlite3.connect(tmp_path / FILE_NAME) as connection:
            held = json.dumps({"point": [0.5], "descent": before, "memo": {}})
            connection.execute("UPDATE trials SET candidate = ?", (held,))
        connection.close()
        descent = ledger.trials()[0].candidate.descent
    assert descent is not None
    assert (descent.rule, descent.first_moment, descent.raw, descent.weight_decay) == ("adam", (0.5,), (), 0.0)


def test_a_ledger_is_created_whole_or_not_at_all(tmp_path: Path) -> None:
    """Where creating stops halfway there are no tables without the row that says what run this is."""
    with pytest.raises(TypeError, match="JSON"):
        Ledger.create(tmp_path, {"not JSON": object()}, {})
    with pytest.raises(RunError, match="found none"):
        Ledger.open(tmp_path)
    Ledger.create(tmp_path, {"name": "again"}, {}).close()
    ledger = Ledger.open(tmp_path)
    assert ledger.campaign() == {"name": "again"}
    ledger.close()


def test_another_process_looks_on(tmp_path: Path) -> None:
    """It sees every trial whole, with its place and all its scores, or still pending."""
    num_trials = 150
    ledger = Ledger.create(tmp_path, {}, {})
    with subprocess.Popen(
        [sys.executable, SCRIPT, "read", tmp_path, str(num_trials)], stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reading\n"
        for index in range(num_trials):
            trial = ledger.issue(0, index, candidate())
            ledger.record(trial, measured(num_items=2000), None)
        told = reader.stdout.read()
        assert reader.wait(timeout=30) == 0
    ledger.close()
    assert int(told) > 3, "the reader saw the run grow"


def test_killed_at_any_moment_it_holds_every_record_that_returned(tmp_path: Path) -> None:
    """SIGKILL four times, each time a while after the first new record; every writer goes on where the last stopped."""
    Ledger.create(tmp_path, {}, {}).close()
    rng = np.random.default_rng()
    returned: list[int] = []
    for _ in range(4):
        with subprocess.Popen([sys.executable, SCRIPT, "write", tmp_path], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            first = writer.stdout.readline()
            time.sleep(rng.uniform(0, 0.1))
            writer.kill()
            returned += map(int, (first + writer.stdout.read()).split())
        ledger = Ledger.open(tmp_path)
        trials = ledger.trials()
        ledger.close()
        assert [trial.number for trial in trials] == list(range(len(trials)))
        finished = {trial.number: trial for trial in trials if trial.order is not None}
        assert finished.keys() >= set(returned)
        for number, trial in finished.items():
            assert_same(trial.measurement, measured(1 / (number + 1), num_items=200))
            assert trial.point == (1 / (number + 1),)
        pending = [trial for trial in trials if trial.order is None]
        assert all(trial.measurement is None and trial.failure is None for trial in pending)
    assert len(returned) >= 4
