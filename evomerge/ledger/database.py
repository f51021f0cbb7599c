"""A database that holds runs: all that SQLite and PostgreSQL do differently stands here."""

import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import ColumnElement, Connection, Float, bindparam, cast, create_engine, event, extract, func, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, IntegrityError

from evomerge.errors import EvoMergeError, RunError
from evomerge.ledger.location import Location

LOCK = 0x65766F6D65726765  # "evomerge": the number of PostgreSQL's lock that drivers take when they come and go
PATIENCE_S = 10
IMMEDIATE = "BEGIN IMMEDIATE"


class Database:
    """Transactions on a location's database. Raises: RunError if the driver that the URL needs is not installed."""

    def __init__(self, location: Location) -> None:
        self._shown = str(location)
        self._path = location.path
        self._is_sqlite = location.path is not None
        self._engine = _engine(location.url)
        weakref.finalize(self, self._engine.dispose)  # who only reads need not close it
        if self._is_sqlite:
            event.listen(self._engine, "connect", _configure)
            event.listen(self._engine, "begin", _begin)
            self._readers = self._engine
            self._writers = self._engine.execution_options(begin=IMMEDIATE)
        else:
            self._readers = self._engine.execution_options(isolation_level="REPEATABLE READ")
            self._writers = self._engine

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Read; all of it is of one moment, and no writer waits. Raises: RunError if there is no database."""
        try:
            with self._readers.begin() as connection:
                yield connection
        except DatabaseError as error:
            raise RunError(f"{self._shown} is not a readable ledger ({_reason(error)})") from error

    @contextmanager
    def writing(self, *, alone: bool = False) -> Iterator[Connection]:
        """Commit what the block does, or nothing. Raises: EvoMergeError if the database cannot be written.

        alone: while no other driver comes or goes. What contradicts the tables' keys is a mistake of ours, and stays
        SQLAlchemy's IntegrityError.
        """
        try:
            with self._writers.begin() as connection:
                if alone and not self._is_sqlite:  # in SQLite every writer is alone
                    connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
                yield connection
        except IntegrityError:
            raise
        except DatabaseError as error:
            raise EvoMergeError(
                f"{self._shown} cannot be written ({_reason(error)}); make room or give access: what is recorded is "
                "safe, and the same command goes on"
            ) from error

    def make_folder(self) -> None:
        """Make the folder in which the file will lie. Raises: RunError."""
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"{self._shown}: cannot write a run there ({error.strerror}); choose another place with --run"
            ) from error

    @property
    def now(self) -> ColumnElement[float]:
        """Unix seconds, by a clock that all drivers of the database share."""
        if self._is_sqlite:
            return bindparam(None, type_=Float(), callable_=time.time)  # when it is used
        return cast(extract("epoch", func.clock_timestamp()), Float)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _engine(url: URL) -> Any:
    if url.get_backend_name() == "sqlite":
        return create_engine(url)
    try:
        engine = create_engine(url, pool_pre_ping=True)
    except ImportError as error:
        raise RunError("a PostgreSQL database needs psycopg: pip install 'evomerge[postgresql]'") from error
    event.listen(engine, "connect", _limit)
    return engine


def _limit(connection: Any, _: object) -> None:
    """Let nobody wait for a driver that was stopped, or cut off, in the midst of a transaction."""
    connection.execute(f"SET idle_in_transaction_session_timeout = '{PATIENCE_S}s'")
    connection.execute(f"SET lock_timeout = '{2 * PATIENCE_S}s'")
    connection.commit()


def _reason(error: DatabaseError) -> str:
    return " ".join(str(error.orig).split())


def _configure(connection: Any, _: object) -> None:
    """WAL lets readers look on; FULL makes a commit survive a power cut."""
    connection.isolation_level = None  # the driver itself begins no transaction for reads and for making tables
    cursor = connection.cursor()
    for pragma in (f"busy_timeout={1000 * PATIENCE_S}", "journal_mode=WAL", "synchronous=FULL"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    """Make every transaction one: tables appear with their first row, and all that a reader reads is of one moment.

    A writer begins as one: a reader that turned into one would fail if another had written meanwhile.
    """
    connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))
