"""A database that holds runs: all that SQLite and PostgreSQL do differently stands here.

A driver outlasts what may pass: a full disk, a server that is away. Its results are in memory meanwhile.
"""

import os
import shutil
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sqlalchemy import ColumnElement, Connection, Float, bindparam, cast, create_engine, event, extract, func, select
from sqlalchemy.engine import URL
from sqlalchemy.exc import DatabaseError, IntegrityError, OperationalError

from evomerge.errors import RunError
from evomerge.ledger.location import Location

LOCK = 0x65766F6D65726765  # "evomerge": the number of PostgreSQL's lock that drivers take when they come and go
PATIENCE_S = 10
RETRY_S = 1.0
IMMEDIATE = "BEGIN IMMEDIATE"
ROOM_MB = 10  # for SQLite's write-ahead log, and for some hundred trials
FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)  # the second: a quota
PASSING_STATES = ("53100", "53300", "57P01", "57P02", "57P03")  # disk full, no free connection, going down, starting

T = TypeVar("T")


class _PassingError(RunError):
    """The database cannot be used, but perhaps in a while; ``what`` is its message without what to do."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; {REMEDY}")
        self.what = what


REMEDY = "make room or give access: what is recorded is safe, and the same command goes on"


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
            if self._may_pass(error):
                raise _PassingError(f"{self._shown} cannot be read ({_reason(error)})") from error
            raise RunError(f"{self._shown} is not a readable ledger ({_reason(error)})") from error

    @contextmanager
    def writing(self, *, alone: bool = False) -> Iterator[Connection]:
        """Commit what the block does, or nothing. Raises: RunError if the database cannot be written.

        alone: while no other driver comes or goes. What contradicts the tables' keys is a mistake of ours, and stays
        SQLAlchemy's IntegrityError.
        """
        is_committing = False
        try:
            with self._writers.begin() as connection:
                if alone and not self._is_sqlite:  # in SQLite every writer is alone
                    connection.execute(select(func.pg_advisory_xact_lock(LOCK)))
                yield connection
                is_committing = True
        except IntegrityError:
            raise
        except DatabaseError as error:
            what = f"{self._shown} cannot be written ({_reason(error)}{self._room(error)})"
            # Of a connection lost while it commits, nobody knows whether it did: doing it again might do it twice.
            if self._may_pass(error) and not (is_committing and error.connection_invalidated):
                raise _PassingError(what) from error
            raise RunError(f"{what}; {REMEDY}") from error

    def outlast(self, work: Callable[[], T], notify: Callable[[str], None] | None) -> T:
        """Return what a transaction returns, trying it until the disk has room and the server is there.

        notify is told once that this takes a while, and why, and when it is over; without it, nothing is waited for.
        """
        if notify is None:
            return work()
        is_waiting = False
        while True:
            try:
                result = work()
            except _PassingError as error:
                if not is_waiting:
                    notify(
                        f"{error.what}; the search waits with its results in memory, and goes on by itself when it can "
                        "be used again; Ctrl-C twice stops"
                    )
                is_waiting = True
            else:
                if is_waiting:
                    notify(f"{self._shown} can be used again; the search goes on")
                return result
            time.sleep(RETRY_S)

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

    def _may_pass(self, error: DatabaseError) -> bool:
        if self._is_sqlite:
            return getattr(error.orig, "sqlite_errorcode", None) in FULL
        state = getattr(error.orig, "sqlstate", None)  # None: what was said is not the server's
        return state in PASSING_STATES or (state is None and isinstance(error, OperationalError))

    def _room(self, error: DatabaseError) -> str:
        """Say how much room there is, if that is what is missing, and how much should be."""
        if self._path is None or not self._may_pass(error):
            return ""
        return f"; expected {ROOM_MB} MB of room, found {shutil.disk_usage(self._path.parent).free / 1e6:.1f} MB"

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()


def _engine(url: URL) -> Any:
    if url.get_backend_name() == "sqlite":
        return create_engine(_as_it_lies(url))
    try:
        engine = create_engine(url, pool_pre_ping=True)
    except ImportError as error:
        raise RunError("a PostgreSQL database needs psycopg: pip install 'evomerge[postgresql]'") from error
    event.listen(engine, "connect", _limit)
    return engine


def _as_it_lies(url: URL) -> URL:
    """Let a file on a read-only medium be read: SQLite cannot lay its shared memory beside it, and need not."""
    path = Path(str(url.database))
    if not path.is_file() or os.access(path.parent, os.W_OK) or Path(f"{path}-wal").exists():
        return url
    return url.set(database=f"file:{quote(str(path))}", query={"mode": "ro", "immutable": "1", "uri": "true"})


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
