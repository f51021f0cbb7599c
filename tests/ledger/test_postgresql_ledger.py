"""Ledgers in PostgreSQL: the contract, on a real server, and what only a server can do."""

from collections.abc import Iterator
from contextlib import closing
from itertools import count
from typing import Any

import pytest
from ledger_contract import LedgerContract, Place, begun
from ledger_processes import candidate, measured
from postgres_server import served
from sqlalchemy import create_engine, text

from evomerge.errors import EvoMergeError, RunError
from evomerge.ledger import database
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import Location, locate

numbers = count()


class TestPostgresqlLedger(LedgerContract):
    @pytest.fixture
    def place(self, postgresql: str) -> Place:
        return lambda: locate(f"{postgresql}#run{next(numbers)}")


@pytest.fixture
def location(postgresql: str) -> Location:
    return locate(f"{postgresql}#run{next(numbers)}")


@pytest.fixture
def administrator(location: Location) -> Iterator[Any]:
    engine = create_engine(location.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def test_a_driver_whose_connections_were_cut_goes_on(location: Location, administrator: Any) -> None:
    with closing(begun(location)) as ledger:
        ledger.issue(0, 0, candidate())
        administrator.execute(
            text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        )
        assert ledger.record(ledger.trials()[0], measured(), None).order == 0


def test_a_driver_outlasts_a_server_that_is_started_again(monkeypatch: pytest.MonkeyPatch, postgresql: str) -> None:
    """Stopped and not there for a while, for reads and writes alike; nothing is recorded twice."""
    monkeypatch.setattr(database, "RETRY_S", 0.05)
    notes: list[str] = []
    with served() as server:  # one of its own

        def note(line: str) -> None:
            notes.append(line)
            if "the search waits" in line:
                server.start()

        with closing(Ledger.drive(locate(f"{server.url}#run"), "run", note)) as ledger:
            ledger.begin({}, {})
            server.stop()
            trial = ledger.issue(0, 0, candidate())
            server.stop()
            assert [read.order for read in ledger.trials()] == [None]
            server.stop()
            assert ledger.record(trial, measured(), None).order == 0
            assert len(ledger.trials()) == 1
    assert ["the search waits" in line for line in notes] == [True, False] * 3
    assert "cannot be written" in notes[0]
    assert "cannot be read" in notes[2]


def test_a_reader_in_the_midst_of_reading_keeps_nobody_waiting(location: Location) -> None:
    with closing(begun(location)) as ledger:
        reader = Ledger.open(location)
        with reader._database.reading() as connection:
            connection.execute(text("SELECT count(*) FROM evomerge_leases")).scalar()
            ledger.issue(0, 0, candidate())
            assert (
                connection.execute(
                    text("SELECT count(*) FROM evomerge_trials WHERE run = :run"), {"run": reader._run}
                ).scalar()
                == 0
            )
        assert len(reader.trials()) == 1


def test_a_server_that_is_not_there_is_one_line() -> None:
    location = locate("postgresql://me:secret@localhost:1/db#one")
    for use in (Ledger.open, Ledger.upgrade, lambda location: Ledger.drive(location, "one")):
        with pytest.raises(
            EvoMergeError, match=r"postgresql://me:\*\*\*@localhost:1/db#one .*(refused|failed)"
        ) as caught:
            use(location)
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_database_that_is_not_there_is_one_line(location: Location) -> None:
    missing = Location(location.url.set(database="nowhere"), name="one")
    with pytest.raises(RunError, match='database "nowhere" does not exist'):
        Ledger.open(missing)


def test_a_user_without_rights_is_told_what_is_denied(location: Location, administrator: Any) -> None:
    administrator.execute(text("CREATE ROLE guest LOGIN"))
    administrator.execute(text("CREATE DATABASE closed"))
    closed = Location(location.url.set(username="guest", database="closed"), name="one")
    with pytest.raises(EvoMergeError, match="closed.*#one cannot be written .*permission denied.*give access"):
        Ledger.drive(closed, "one")
    with pytest.raises(RunError, match="expected a run, found none"):
        Ledger.open(closed)
