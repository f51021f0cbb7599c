"""The ledger: the durable record of a run, in an SQLite file of its own or in a database of many.

A trial is committed twice: when it is issued, before a worker sees it, and when it has finished, in one transaction
with its scores, per-item scores and fate, before the proposer is told. Proposers are folds over this record (see
``proposers/proposer.py``), so it holds their state too: each trial says which results were known when it was proposed,
and carries its proposer's memo. Only the driver that holds the run's lease writes; any number of readers may look on.
What items scored is read when somebody asks for it.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Connection, bindparam, delete, func, insert, select, update

from evomerge.errors import EvoMergeError, RunError
from evomerge.ledger import tables
from evomerge.ledger.database import Database
from evomerge.ledger.lease import Holder, Lease, held
from evomerge.ledger.location import Location
from evomerge.ledger.migration import make_tables, schema_version, upgrade_from_2
from evomerge.ledger.rows import ItemNumbers, LazyItems, StoredScore, item_numbers_of, measurement_of, rows_of, trial_of
from evomerge.records import Candidate, Measurement, Score, Split, Trial, digest

Parameters = ParamSpec("Parameters")
Returned = TypeVar("Returned")

OF_ONE_MEASUREMENT = select(tables.items).where(  # made once: it is asked for thousands of times
    tables.items.c.run == bindparam("of_run"),
    tables.items.c.split == bindparam("of_split"),
    tables.items.c.subject == bindparam("of_subject"),
)


def _next(column: Any) -> Any:
    """The next free number of a dense sequence of a run, which starts at 0."""
    return select(func.coalesce(func.max(column), -1) + 1).where(column.table.c.run == bindparam("of_run"))


def _following(column: Any) -> Any:
    return _next(column).scalar_subquery()


# What every trial needs is made once, too.
ISSUE = (
    insert(tables.trials)
    .values(number=_following(tables.trials.c.number), known=_following(tables.trials.c.finish_order))
    .returning(tables.trials.c.number, tables.trials.c.known)
)
END = (
    update(tables.trials)
    .where(
        tables.trials.c.run == bindparam("of_run"),
        tables.trials.c.number == bindparam("of_number"),
        tables.trials.c.finish_order.is_(None),
    )
    .values(finish_order=_following(tables.trials.c.finish_order))
    .returning(tables.trials.c.finish_order)
)
MEASURE = insert(tables.measurements).values(place=_following(tables.measurements.c.place))
SCORES, ITEMS = insert(tables.scores), insert(tables.items)


def _patient(
    transaction: "Callable[Concatenate[Ledger, Parameters], Returned]",
) -> "Callable[Concatenate[Ledger, Parameters], Returned]":
    """Let a method that is one transaction be tried until the database has room and is there, if the ledger waits."""

    @wraps(transaction)
    def outlasting(ledger: "Ledger", /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Returned:
        return ledger._database.outlast(lambda: transaction(ledger, *args, **kwargs), ledger._notify)

    return outlasting


class Ledger:
    """One run's record, opened for reading (``open``) or held by its driver (``drive``)."""

    def __init__(self, location: Location, database: Database, run: int, lease: Lease | None = None) -> None:
        self.location = location
        self._database, self._run, self._lease = database, run, lease
        self._notify: Callable[[str], None] | None = None

    @classmethod
    def drive(cls, location: Location, name: str, notify: Callable[[str], None] | None = None) -> "Ledger":
        """Take the lease on a run, which need not be there yet; ``close`` gives it back.

        name: of the run where the location does not say. notify: with it, the ledger that is returned waits where the
        disk is full or the server away, and says so; without it, it raises RunError.
        Raises: RunError if another process drives it, or the location cannot hold a ledger of this version.
        """
        database = Database(location)
        database.make_folder()
        with database.writing(alone=True) as connection:
            _bring_up_to_date(location, connection)
            run = _find(location, connection)
            if run is None:
                row = {"name": location.name or name, "created": time.time(), "test_touches": "[]"}
                run = int(connection.execute(insert(tables.runs).values(row).returning(tables.runs.c.id)).scalar_one())
            lease = Lease(database, run, location)
            lease.take(connection)
        lease.keep()
        ledger = cls(location, database, run, lease)
        ledger._notify = notify
        return ledger

    @classmethod
    def open(cls, location: Location) -> "Ledger":
        """Open a run for reading. Raises: RunError if none has begun there, or it is of another schema."""
        ledger = cls._begun(location)
        if ledger is None:
            what = "a run folder with a ledger" if location.folder else "a run"
            raise RunError(f"{location}: expected {what}, found none; runs start with evomerge search")
        return ledger

    @classmethod
    def exists(cls, location: Location) -> bool:
        """Whether a run has begun there. Raises: RunError for what is no ledger, or one of another schema."""
        return cls._begun(location) is not None

    @classmethod
    def _begun(cls, location: Location) -> "Ledger | None":
        if location.is_missing:
            return None
        database = Database(location)
        with database.reading() as connection:
            run = _find(location, connection) if _is_ours(location, connection) else None
        ledger = None if run is None else cls(location, database, run)
        return ledger if ledger and ledger.has_begun else None

    @staticmethod
    def upgrade(location: Location) -> None:
        """Bring what an earlier version has written up to date, in one transaction; else do nothing."""
        if location.is_missing:
            return
        with closing(Database(location)) as database:
            with database.reading() as connection:
                is_older = schema_version(connection) == 2
            if is_older:
                with database.writing(alone=True) as connection:
                    _bring_up_to_date(location, connection)

    @staticmethod
    def names(location: Location) -> list[str]:
        """Return the names of the runs that have begun in a location's database. Raises: RunError."""
        if location.is_missing:
            return []
        begun = select(tables.runs.c.name).where(tables.runs.c.campaign.is_not(None)).order_by(tables.runs.c.id)
        with closing(Database(location)) as database, database.reading() as connection:
            return list(connection.execute(begun).scalars()) if _is_ours(location, connection) else []

    def close(self) -> None:
        """Give the lease back, if there is one, and close the connections; a run that has not begun goes."""
        if self._lease is not None:
            self._lease.stop()
            with suppress(EvoMergeError), self._database.writing() as connection:  # it ends by itself anyway
                runs = tables.runs
                if self._lease.release(connection):
                    connection.execute(delete(runs).where(runs.c.id == self._run, runs.c.campaign.is_(None)))
            self._lease = None
        self._database.close()

    @property
    def has_begun(self) -> bool:
        """Whether a driver has written what the run is."""
        with self._database.reading() as connection:
            return self._column(connection, tables.runs.c.campaign) is not None

    @_patient
    def begin(self, campaign: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Commit a campaign, and the facts that readers need (both JSON)."""
        with self._writing() as connection:
            self._update_run(connection, campaign=json.dumps(campaign), facts=json.dumps(facts))

    def campaign(self) -> dict[str, Any]:
        """Return the campaign as last run."""
        campaign: dict[str, Any] = self._json(tables.runs.c.campaign)
        return campaign

    def facts(self) -> dict[str, Any]:
        """Return the facts that the run was created with, and what was noted since.

        ``stages``: of each that has begun; ``finished``: the budget within which the search came to its end.
        """
        facts: dict[str, Any] = self._json(tables.runs.c.facts)
        return facts

    def holder(self) -> Holder | None:
        """Return the process that drives the run, if any does."""
        with self._database.reading() as connection:
            found = held(self._database, connection, self._run)
        return found[0] if found else None

    def created(self) -> float:
        """Return when the run was created, in Unix seconds: what tells it from others of its name."""
        with self._database.reading() as connection:
            return float(self._column(connection, tables.runs.c.created))

    def last_written(self) -> float:
        """Return when a trial was last issued or finished, or the run begun, in Unix seconds."""
        latest = select(func.max(tables.trials.c.issued), func.max(tables.trials.c.finished))
        with self._database.reading() as connection:
            times = [*connection.execute(latest.where(self._own(tables.trials))).one()]
            times.append(self._column(connection, tables.runs.c.created))
        return max(float(time) for time in times if time is not None)

    def stamp(self) -> str:
        """Return a text that changes whenever something is written, by which a reader knows whether to look again."""
        trials, places, runs = tables.trials.c, tables.measurements.c.place, tables.runs.c
        counts = select(func.max(trials.number), func.max(trials.finish_order)).where(self._own(tables.trials))
        texts = select(runs.campaign, runs.facts, runs.test_touches).where(runs.id == self._run)
        with self._database.reading() as connection:
            place = connection.execute(select(func.max(places)).where(self._own(tables.measurements))).scalar()
            return digest([*connection.execute(counts).one(), place, *connection.execute(texts).one()])[:16]

    @_patient
    def update_campaign(self, campaign: Mapping[str, Any]) -> None:
        """Note a campaign that differs in its budget or workers."""
        with self._writing() as connection:
            self._update_run(connection, campaign=json.dumps(campaign))

    @_patient
    def begin_stage(self, number: int, facts: Mapping[str, Any]) -> None:
        """Commit what readers need to know of a stage (JSON) before its first trial is issued; once is enough."""
        with self._writing() as connection:
            noted = json.loads(self._column(connection, tables.runs.c.facts))
            stages = noted.setdefault("stages", [])
            if len(stages) <= number:
                stages.append(facts)
                self._update_run(connection, facts=json.dumps(noted))

    @_patient
    def finish(self, num_evaluations: int) -> None:
        """Note that the search has come to its end within a budget of so many, and the front's test scores are here."""
        with self._writing() as connection:
            noted = json.loads(self._column(connection, tables.runs.c.facts))
            self._update_run(connection, facts=json.dumps({**noted, "finished": num_evaluations}))

    def issue(self, stage: int, index: int, candidate: Candidate) -> Trial:
        """Commit a candidate before it is submitted, with the number of results known by now."""
        return self.issue_all(stage, index, [candidate])[0]

    @_patient
    def issue_all(self, stage: int, first: int, candidates: Sequence[Candidate]) -> list[Trial]:
        """Commit candidates together before they are submitted; ``first`` is the index of the first in its stage."""
        trials = []
        with self._writing() as connection:
            for index, candidate in enumerate(candidates, start=first):
                row = {
                    "run": self._run,
                    "stage": stage,
                    "stage_index": index,
                    "candidate": json.dumps(asdict(candidate)),
                }
                number, known = connection.execute(ISSUE, {"of_run": self._run, **row, "issued": time.time()}).one()
                trials.append(Trial(number=number, stage=stage, index=index, candidate=candidate, known=known))
        return trials

    @_patient
    def record(
        self,
        trial: Trial,
        outcome: Measurement | str,
        fingerprint: str | None,
        fate: Mapping[str, Any] | None = None,
    ) -> Trial:
        """Commit a trial's end, a measurement or the reason for failing, in one transaction; return it finished.

        fate: how it came to that end (JSON).
        """
        measurement = outcome if isinstance(outcome, Measurement) else None
        failure = outcome.replace("\0", "\\0") if isinstance(outcome, str) else None  # which PostgreSQL cannot hold
        with self._writing() as connection:
            ending = {"finished": time.time(), "fingerprint": fingerprint, "failure": failure}
            ending |= {"of_run": self._run, "of_number": trial.number, "fate": json.dumps(fate) if fate else None}
            order = connection.execute(END, ending).scalar_one_or_none()
            if order is None:
                raise EvoMergeError(
                    f"trial {trial.number} is not pending: it was never issued, or has its result already"
                )
            if measurement is not None:
                self._insert(connection, f"trial:{trial.number}", measurement)
        return replace(trial, order=order, measurement=measurement, failure=failure, fate=fate or {})

    @_patient
    def trials(self) -> list[Trial]:
        """Return all trials in the order of issue, with their search measurements."""
        query = select(tables.trials).where(self._own(tables.trials)).order_by(tables.trials.c.number)
        with self._database.reading() as connection:
            measured = self._read(connection, "search")
            return [trial_of(row, measured.get(f"trial:{row.number}")) for row in connection.execute(query)]

    def times(self) -> dict[int, tuple[float, float | None]]:
        """Return trial -> when it was issued and when it finished (None: not yet), in Unix seconds."""
        columns = tables.trials.c
        query = select(columns.number, columns.issued, columns.finished).where(self._own(tables.trials))
        with self._database.reading() as connection:
            return {row.number: (row.issued, row.finished) for row in connection.execute(query).all()}

    @_patient
    def measure(self, subject: str, measurement: Measurement) -> None:
        """Commit a measurement that is no trial: a reference model's, or test scores."""
        with self._writing() as connection:
            self._insert(connection, subject, measurement)

    @_patient
    def measurements(self, split: Split) -> dict[str, Measurement]:
        """Return subject -> measurement on a split, trials and references alike."""
        with self._database.reading() as connection:
            return self._read(connection, split)

    @_patient
    def touch_test_items(self) -> None:
        """Note that the front of the trials finished by now is about to be scored on the test items.

        Going on with the same front after an interruption is the same touch.
        """
        with self._writing() as connection:
            num_finished = connection.execute(_next(tables.trials.c.finish_order), {"of_run": self._run}).scalar_one()
            touches = json.loads(self._column(connection, tables.runs.c.test_touches))
            if num_finished not in touches:
                self._update_run(connection, test_touches=json.dumps([*touches, num_finished]))

    def num_test_touches(self) -> int:
        """How many fronts were scored on the test items; more than one is disclosed."""
        return len(self._json(tables.runs.c.test_touches))

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """Commit what the block does, or nothing. Raises: EvoMergeError if it cannot be, or the lease is lost."""
        assert self._lease is not None, "opened for reading"
        with self._database.writing() as connection:
            self._lease.renew(connection)
            yield connection

    def _own(self, table: Any) -> Any:
        """The rows of this run."""
        return table.c.run == self._run

    @_patient
    def _json(self, column: Any) -> Any:
        with self._database.reading() as connection:
            return json.loads(self._column(connection, column))

    def _column(self, connection: Connection, column: Any) -> Any:
        return connection.execute(select(column).where(tables.runs.c.id == self._run)).scalar_one()

    def _update_run(self, connection: Connection, **values: str) -> None:
        connection.execute(update(tables.runs).where(tables.runs.c.id == self._run).values(values))

    def _insert(self, connection: Connection, subject: str, measurement: Measurement) -> None:
        of_measurement, of_scores, of_items = rows_of({"run": self._run, "subject": subject}, measurement)
        connection.execute(MEASURE, {"of_run": self._run, **of_measurement})
        connection.execute(SCORES, of_scores)
        connection.execute(ITEMS, of_items)

    def _read(self, connection: Connection, split: Split) -> dict[str, Measurement]:
        """Read measurements with their scores, but not their items."""
        columns = tables.scores.c
        query = select(
            columns.subject, columns.objective, columns.value, columns.stderr, columns.loss, columns.loss_stderr
        )
        read = partial(self._items, split)
        scores: dict[str, dict[str, Score]] = {}
        items: dict[str, LazyItems] = {}
        for subject, objective, *numbers in connection.execute(self._on(query, tables.scores, split)):
            if subject not in scores:
                scores[subject], items[subject] = {}, LazyItems(read, subject)
            scores[subject][objective] = StoredScore(objective, numbers, items[subject])
        rows = connection.execute(self._on(select(tables.measurements), tables.measurements, split))
        return {row.subject: measurement_of(row, split, scores.get(row.subject, {})) for row in rows}

    def _on(self, query: Any, table: Any, split: Split) -> Any:
        return query.where(self._own(table), table.c.split == split).order_by(table.c.place)

    @_patient
    def _items(self, split: Split, subject: str) -> dict[str, ItemNumbers]:
        """Read what the items of one measurement scored, by objective."""
        key = {"of_run": self._run, "of_split": split, "of_subject": subject}
        with self._database.reading() as connection:
            rows = connection.execute(OF_ONE_MEASUREMENT, key).all()
        return {row.objective: item_numbers_of(row) for row in rows}


def _find(location: Location, connection: Connection) -> int | None:
    """Return the run of a location. Raises: RunError if it names none of several."""
    query = select(tables.runs.c.id, tables.runs.c.name).order_by(tables.runs.c.id)
    if location.name is not None:
        query = query.where(tables.runs.c.name == location.name)
    rows = connection.execute(query).all()
    if len(rows) > 1:
        names = ", ".join(row.name for row in rows)
        raise RunError(f"{location} holds {len(rows)} runs; name one, such as {location}#{rows[0].name}: {names}")
    return int(rows[0].id) if rows else None


def _is_ours(location: Location, connection: Connection) -> bool:
    """Whether the database has the tables of a ledger. Raises: RunError if they are of another version."""
    version = schema_version(connection)
    if version == 2:
        raise RunError(
            f"{location} was written by an earlier evomerge (schema 2): evomerge search with its campaign file brings "
            "it up to date and loses nothing"
        )
    if version not in (None, tables.SCHEMA_VERSION):
        raise RunError(
            f"{location}: expected schema {tables.SCHEMA_VERSION}, found {version}; use the evomerge that wrote it"
        )
    return version is not None


def _bring_up_to_date(location: Location, connection: Connection) -> None:
    """Make the tables, or those of schema 2 into today's. Raises: RunError if they are of another version."""
    if schema_version(connection) == 2:
        upgrade_from_2(connection)
    elif not _is_ours(location, connection):
        make_tables(connection)
