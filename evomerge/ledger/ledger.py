"""The ledger: the durable record of a run, an SQLite file in WAL mode.

A trial is committed twice: when it is issued, before a worker sees it, and when it has finished, in one transaction
with its scores, per-item scores and fate, before the proposer is told. Proposers are folds over this record (see
``proposers/proposer.py``), so it holds their state too: each trial says which results were known when it was proposed,
and carries its proposer's memo. Only the driver writes; any number of readers may look on.
"""

import json
import sqlite3
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import Connection, create_engine, event, func, insert, select, update
from sqlalchemy.exc import DatabaseError, OperationalError

from evomerge.errors import EvoMergeError, RunError
from evomerge.ledger import tables
from evomerge.records import Arrival, Candidate, Descent, Measurement, Score, Slopes, Split, Trial

FILE_NAME = "ledger.sqlite"


class Ledger:
    """One run's record. Raises: RunError for a file that is no ledger, or of another schema."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        self._engine = create_engine(f"sqlite:///{self.path}")
        event.listen(self._engine, "connect", _configure)
        event.listen(self._engine, "begin", _begin)

    @classmethod
    def create(cls, folder: Path, campaign: Mapping[str, Any], facts: Mapping[str, Any]) -> "Ledger":
        """Start an empty ledger for a campaign, with the facts that readers need (both JSON)."""
        ledger = cls(folder)
        with ledger._transaction() as connection:
            tables.metadata.create_all(connection)
            connection.execute(
                insert(tables.run).values(
                    id=1,
                    schema_version=tables.SCHEMA_VERSION,
                    created=time.time(),
                    campaign=json.dumps(campaign),
                    facts=json.dumps(facts),
                    test_touches="[]",
                )
            )
        return ledger

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a ledger was started here; a process that dies while it creates one leaves a file without tables."""
        path = folder / FILE_NAME
        if not path.is_file():
            return False
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            try:
                return bool(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
            except sqlite3.DatabaseError:
                return True  # something else lies here; ``open`` says so

    @classmethod
    def open(cls, folder: Path) -> "Ledger":
        """Open an existing ledger."""
        ledger = cls(folder)
        if not cls.exists(folder):
            raise RunError(
                f"{folder}: expected a run folder with {FILE_NAME}, found none; runs start with evomerge search"
            )
        try:
            with ledger._engine.connect() as connection:
                version = connection.execute(select(tables.run.c.schema_version)).scalar_one()
        except DatabaseError as error:
            raise RunError(f"{ledger.path} is not a readable ledger ({error.orig})") from error
        if version != tables.SCHEMA_VERSION:
            raise RunError(
                f"{ledger.path}: expected schema {tables.SCHEMA_VERSION}, found {version}; "
                "use the evomerge that wrote it"
            )
        return ledger

    def close(self) -> None:
        """Release the file."""
        self._engine.dispose()

    def campaign(self) -> dict[str, Any]:
        """Return the campaign as last run."""
        campaign: dict[str, Any] = self._json(tables.run.c.campaign)
        return campaign

    def facts(self) -> dict[str, Any]:
        """Return the facts that the run was created with, and what was noted since.

        ``stages``: of each that has begun; ``finished``: the budget within which the search came to its end.
        """
        facts: dict[str, Any] = self._json(tables.run.c.facts)
        return facts

    def update_campaign(self, campaign: Mapping[str, Any]) -> None:
        """Note a campaign that differs in its budget or workers."""
        with self._transaction() as connection:
            connection.execute(update(tables.run).values(campaign=json.dumps(campaign)))

    def begin_stage(self, number: int, facts: Mapping[str, Any]) -> None:
        """Commit what readers need to know of a stage (JSON) before its first trial is issued; once is enough."""
        with self._transaction() as connection:
            held = json.loads(connection.execute(select(tables.run.c.facts)).scalar_one())
            stages = held.setdefault("stages", [])
            if len(stages) <= number:
                stages.append(facts)
                connection.execute(update(tables.run).values(facts=json.dumps(held)))

    def finish(self, num_evaluations: int) -> None:
        """Note that the search has come to its end within a budget of so many, and the front's test scores are here."""
        with self._transaction() as connection:
            held = json.loads(connection.execute(select(tables.run.c.facts)).scalar_one())
            facts = json.dumps({**held, "finished": num_evaluations})
            connection.execute(update(tables.run).values(facts=facts))

    def issue(self, stage: int, index: int, candidate: Candidate) -> Trial:
        """Commit a candidate before it is submitted, with the number of results known by now."""
        with self._transaction() as connection:
            number = _next(connection, tables.trials.c.number)
            known = _next(connection, tables.trials.c.finish_order)
            connection.execute(
                insert(tables.trials).values(
                    number=number,
                    stage=stage,
                    stage_index=index,
                    candidate=json.dumps(asdict(candidate)),
                    known=known,
                    issued=time.time(),
                )
            )
        return Trial(number=number, stage=stage, index=index, candidate=candidate, known=known)

    def record(self, trial: Trial, outcome: Measurement | str, fingerprint: str | None) -> Trial:
        """Commit a trial's fate, a measurement or the reason for failing, in one transaction; return it finished."""
        measurement = outcome if isinstance(outcome, Measurement) else None
        failure = outcome if isinstance(outcome, str) else None
        with self._transaction() as connection:
            order = _next(connection, tables.trials.c.finish_order)
            pending = (tables.trials.c.number == trial.number) & tables.trials.c.finish_order.is_(None)
            fate = {"finish_order": order, "finished": time.time(), "fingerprint": fingerprint, "failure": failure}
            if connection.execute(update(tables.trials).where(pending).values(fate)).rowcount != 1:
                raise EvoMergeError(
                    f"trial {trial.number} is not pending: it was never issued, or has its result already"
                )
            if measurement is not None:
                _insert(connection, f"trial:{trial.number}", measurement)
        return replace(trial, order=order, measurement=measurement, failure=failure)

    def trials(self) -> list[Trial]:
        """Return all trials in the order of issue, with their search measurements."""
        with self._engine.connect() as connection:
            rows = connection.execute(select(tables.trials).order_by(tables.trials.c.number)).all()
            measured = _read(connection, "search")
        return [
            Trial(
                number=row.number,
                stage=row.stage,
                index=row.stage_index,
                candidate=_candidate(json.loads(row.candidate)),
                known=row.known,
                order=row.finish_order,
                measurement=measured.get(f"trial:{row.number}"),
                failure=row.failure,
            )
            for row in rows
        ]

    def measure(self, subject: str, measurement: Measurement) -> None:
        """Commit a measurement that is no trial: a reference model's, or test scores."""
        with self._transaction() as connection:
            _insert(connection, subject, measurement)

    def measurements(self, split: Split) -> dict[str, Measurement]:
        """Return subject -> measurement on a split, trials and references alike."""
        with self._engine.connect() as connection:
            return _read(connection, split)

    def touch_test_items(self) -> None:
        """Note that the front of the trials finished by now is about to be scored on the test items.

        Going on with the same front after an interruption is the same touch.
        """
        with self._transaction() as connection:
            num_finished = _next(connection, tables.trials.c.finish_order)
            touches = json.loads(connection.execute(select(tables.run.c.test_touches)).scalar_one())
            if num_finished not in touches:
                connection.execute(update(tables.run).values(test_touches=json.dumps([*touches, num_finished])))

    def num_test_touches(self) -> int:
        """How many fronts were scored on the test items; more than one is disclosed."""
        return len(self._json(tables.run.c.test_touches))

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """Commit what the block does, or nothing. Raises: EvoMergeError if the file cannot be written."""
        try:
            with self._engine.begin() as connection:
                yield connection
        except OperationalError as error:
            raise EvoMergeError(
                f"{self.path} cannot be written ({error.orig}); make room or give access: what is recorded is safe, "
                "and the same command goes on"
            ) from error

    def _json(self, column: Any) -> Any:
        with self._engine.connect() as connection:
            return json.loads(connection.execute(select(column)).scalar_one())


def _configure(connection: Any, _: object) -> None:
    """WAL lets readers look on; FULL makes a commit survive a power cut."""
    connection.isolation_level = None  # the driver itself begins no transaction for reads and for making tables
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    """Make every transaction one: tables appear with their first row, and all that a reader reads is of one moment."""
    connection.exec_driver_sql("BEGIN")


def _next(connection: Connection, column: Any) -> int:
    """Return the next free number of a dense sequence that starts at 0."""
    highest = connection.execute(select(func.max(column))).scalar()
    return 0 if highest is None else int(highest) + 1


def _insert(connection: Connection, subject: str, measurement: Measurement) -> None:
    connection.execute(
        insert(tables.measurements).values(
            subject=subject,
            split=measurement.split,
            cost=measurement.cost,
            seconds=json.dumps(dict(measurement.seconds)),
            weights=measurement.weights,
            arrival=json.dumps(asdict(measurement.arrival)) if measurement.arrival else None,
            stopped=measurement.stopped,
        )
    )
    connection.execute(
        insert(tables.scores),
        [
            {
                "subject": subject,
                "split": measurement.split,
                "objective": objective,
                "value": score.value,
                "stderr": score.stderr,
                "items": _packed(score.items),
                "companion": None if score.companion is None else _packed(score.companion),
            }
            for objective, score in measurement.scores.items()
        ],
    )


def _read(connection: Connection, split: Split) -> dict[str, Measurement]:
    rows = connection.execute(select(tables.scores).where(tables.scores.c.split == split)).all()
    scores: dict[str, dict[str, Score]] = {}
    for row in rows:
        scores.setdefault(row.subject, {})[row.objective] = Score(
            value=row.value,
            stderr=row.stderr,
            items=_unpacked(row.items),
            companion=None if row.companion is None else _unpacked(row.companion),
        )
    rows = connection.execute(select(tables.measurements).where(tables.measurements.c.split == split)).all()
    return {
        row.subject: Measurement(
            split=split,
            scores=scores.get(row.subject, {}),
            cost=row.cost,
            seconds=json.loads(row.seconds),
            weights=row.weights,
            arrival=_arrival(json.loads(row.arrival)) if row.arrival else None,
            stopped=row.stopped,
        )
        for row in rows
    }


def _packed(numbers: npt.NDArray[np.float32]) -> bytes:
    return zlib.compress(numbers.astype("<f4").tobytes())


def _unpacked(packed: bytes) -> npt.NDArray[np.float32]:
    numbers: npt.NDArray[np.float32] = np.frombuffer(zlib.decompress(packed), dtype="<f4")
    return numbers


def _candidate(data: dict[str, Any]) -> Candidate:
    descent = data["descent"]
    return Candidate(
        point=tuple(data["point"]),
        descent=None if descent is None else Descent(**{key: _frozen(value) for key, value in descent.items()}),
        memo=data["memo"],
    )


def _arrival(data: dict[str, Any]) -> Arrival:
    slopes = data.pop("slopes", None)
    frozen = {key: _frozen(value) for key, value in data.items()}
    return Arrival(**frozen, slopes=slopes and Slopes(**{key: _frozen(value) for key, value in slopes.items()}))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
