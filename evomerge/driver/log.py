"""The log of a run: what happened when, one JSON object a line, beside the run.

    {"time": "2026-11-30T09:15:02.118Z", "event": "finished", "trial": 12, "values": {...}, "seconds": {...}, ...}

Events: ``begin`` or ``resume``, ``load``, ``search`` (the stages), ``phase``, ``stage``, ``issued``; ``finished``,
``stopped`` (by a race) or ``failed``, of a trial, with where its time went (``times.py``); ``scored`` (a model that is
no trial), ``worker`` (the first result of one), ``note``, and ``end`` with how. It is for people and their tools, and a
convenience: what cannot be written is left out, and the run goes on. The record of a run is its ledger.
"""

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.stages import Stage
from evomerge.ledger.location import Location
from evomerge.records import Trial

FILE_NAME = "log.jsonl"
TAIL_BYTES = 1 << 16


def last_events(location: Location, count: int) -> list[dict[str, Any]]:
    """Return the last events of a run's log, at most ``count``, the latest last; none if there is no log.

    location: in a database, with the run's name. Lines that are no events are left out: one may be torn where a disk
    was full.
    """
    lines: list[bytes] = []
    try:
        with location.beside(FILE_NAME).open("rb") as file:
            start = file.seek(0, os.SEEK_END)
            tail = b""
            while start and len(lines) <= count:  # the first of them may be cut
                length = min(start, TAIL_BYTES)
                start = file.seek(start - length)
                tail = file.read(length) + tail
                lines = tail.splitlines()
    except OSError:
        return []
    events = [event for line in lines if (event := _event(line)) is not None]
    return events[-count:]


class Log:
    """A watcher that writes the log of one run; many a session of it append to one file."""

    def __init__(self, location: Location, campaign: Campaign) -> None:
        self._location, self._campaign = location, campaign
        self._path = location.beside(FILE_NAME)
        self._file: int | None = None
        self._is_torn = False  # the line before
        self._is_loading = True
        self._stages: Sequence[Stage] = ()
        self._stage, self._phase = -1, ""
        self._workers = set[str]()

    @contextmanager
    def session(self, *, resumed: bool) -> Iterator[None]:
        """Write who drives the run from now on, and how that ends."""
        campaign = self._campaign
        who = {"host": socket.gethostname(), "pid": os.getpid(), "version": version("evomerge")}
        what = {"campaign": campaign.name, "run": str(self._location), "evaluations": campaign.budget.evaluations}
        self._write("resume" if resumed else "begin", {**what, "workers": campaign.workers.kind, **who})
        try:
            yield
        except BaseException as error:
            is_stop = isinstance(error, KeyboardInterrupt)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._write("end", {"how": "stopped"} if is_stop else {"how": "failed", "reason": reason})
            raise
        else:
            self._write("end", {"how": "finished"})
        finally:
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def begin(self, stages: Sequence[Stage]) -> None:
        """Write what will be searched."""
        self._stages, self._is_loading = stages, False
        shown = [
            {"proposer": stage.proposer, "evaluations": stage.num_evaluations, "dimensions": stage.num_dimensions}
            for stage in stages
        ]
        self._write("search", {"stages": shown})

    def phase(self, title: str, total: int, done: int) -> None:
        """Write what begins, and how much of it is done."""
        self._phase = title
        self._write("phase", {"title": title, "total": total, "done": done})

    def issue(self, trial: Trial) -> None:
        """Write which candidate the workers get; of a new stage, its beginning first."""
        if trial.stage != self._stage:
            self._stage = trial.stage
            self._write("stage", {"stage": trial.stage, "proposer": self._stages[trial.stage].proposer})
        self._write("issued", {"trial": trial.number, "stage": trial.stage, "known": trial.known})

    def advance(self, trial: Trial | None) -> None:
        """Write how a candidate came to its end."""
        if trial is None:
            return self._write("scored", {"phase": self._phase})
        worker = trial.fate.get("worker")
        if worker is not None and worker not in self._workers:
            self._workers.add(worker)
            self._write("worker", {"worker": worker})
        ended = {"trial": trial.number, "order": trial.order}
        if trial.measurement is None:
            return self._write("failed", {**ended, "failure": trial.failure, "fate": trial.fate})
        found = {
            "values": {name: score.value for name, score in trial.measurement.scores.items()},
            "cost": trial.measurement.cost,
            "seconds": trial.measurement.seconds,
            "fate": trial.fate,
        }
        if trial.measurement.stopped:
            return self._write("stopped", {**ended, "stopped": trial.measurement.stopped, **found})
        return self._write("finished", {**ended, **found})

    def note(self, line: str) -> None:
        """Write what is being loaded, or what a person is told."""
        self._write("load" if self._is_loading else "note", {"what" if self._is_loading else "line": line})

    def _write(self, event: str, fields: Mapping[str, Any]) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = (json.dumps({"time": now, "event": event, **fields}, default=str) + "\n").encode()
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
                self._is_torn = os.fstat(self._file).st_size > 0
            line = b"\n" + line if self._is_torn else line
            self._is_torn = True
            self._is_torn = os.write(self._file, line) < len(line)
        except OSError:  # a full disk, a folder that cannot be written: perhaps the next one can be
            return


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
