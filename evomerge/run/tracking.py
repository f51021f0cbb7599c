"""The watcher that tells trackers what a search finds, in a thread of its own: a slow server keeps no worker waiting.

A tracker that fails is noted once and told nothing more; the run goes on.
"""

import json
import threading
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType

from evomerge.campaign.campaign import Campaign
from evomerge.driver.watcher import Unwatched
from evomerge.front.so_far import SoFar
from evomerge.ledger.location import Location
from evomerge.records import Trial
from evomerge.run.run import Run, open_run
from evomerge.trackers import Tracked, Tracker, open_tracker

PATIENCE_S = 60.0  # at the end of a session, for what is still to be told


class Tracking(Unwatched):
    """Tells the campaign's trackers of each trial, and at the end of the front; entered before the run begins.

    identity: of the run, the same in all its sessions. note is told of trackers that fail.
    """

    def __init__(self, campaign: Campaign, location: Location, identity: str, note: Callable[[str], None]) -> None:
        self._campaign, self._location, self._note = campaign, location, note
        dumped = {key: json.dumps(value) for key, value in campaign.model_dump(mode="json").items()}
        name = location.name or campaign.name
        self._told = Tracked(name=name, identity=identity, campaign=dumped, folder=location.beside("trackers"))
        self._tasks = SimpleQueue[Callable[[Tracker], None] | None]()
        self._thread = threading.Thread(target=self._tell, name=f"trackers of {location}", daemon=True)
        self._so_far: SoFar | None = None
        self._total_cost = 0.0

    def __enter__(self) -> "Tracking":
        if self._campaign.trackers:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._thread.is_alive():
            return
        if error is None:
            columns, rows = front_table(open_run(self._location))
            self._tasks.put(lambda tracker: tracker.table("front", columns, rows))
        self._tasks.put(lambda tracker: tracker.close(finished=error is None))
        self._tasks.put(None)
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive():
            self._note(f"the trackers did not take everything within {PATIENCE_S:.0f} s; the rest is not tracked")

    def phase(self, title: str, total: int, done: int) -> None:  # noqa: ARG002
        """As the search begins, catch up with the trials of before, which have been tracked."""
        if title == "search" and self._campaign.trackers:
            run = open_run(self._location)
            self._so_far = SoFar(run.objectives, run.searched["base"])
            for trial in run.trials:
                if trial.order is not None:
                    self._add(trial)

    def advance(self, trial: Trial | None) -> None:
        """Track a trial's numbers and what they add up to."""
        if trial is None or self._so_far is None:
            return
        self._add(trial)
        numbers = self._numbers(trial, self._so_far)
        step = trial.order or 0
        self._tasks.put(lambda tracker: tracker.log(step, numbers))

    def _add(self, trial: Trial) -> None:
        assert self._so_far is not None
        self._so_far.add(trial)
        self._total_cost += trial.measurement.cost if trial.measurement else 0.0

    def _numbers(self, trial: Trial, so_far: SoFar) -> dict[str, float]:
        numbers = {"hypervolume": so_far.volume, "front": float(so_far.num_on_front), "total_cost": self._total_cost}
        numbers |= {f"{how}_trials": float(count) for how, count in so_far.counts.items()}
        if so_far.counts["scored"]:
            numbers |= {f"best/{name}": value for name, value in so_far.best.items()}
        if trial.measurement is not None:
            numbers["cost"] = trial.measurement.cost
            for name, score in trial.measurement.scores.items():
                numbers |= {f"value/{name}": score.value, f"stderr/{name}": score.stderr}
        return numbers

    def _tell(self) -> None:
        """Open the trackers and do what is to be done with each, until there is nothing more."""
        trackers: dict[str, Tracker] = {}
        for number, options in enumerate(self._campaign.trackers):
            where = f"trackers[{number}] ({options.kind})"
            try:
                trackers[where] = open_tracker(options, self._told)
            except Exception as error:  # their clients raise whatever they like
                self._switch_off(where, error)
        while (task := self._tasks.get()) is not None:
            for where, tracker in list(trackers.items()):
                try:
                    task(tracker)
                except Exception as error:
                    del trackers[where]
                    self._switch_off(where, error)

    def _switch_off(self, where: str, error: Exception) -> None:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        self._note(f"{where} failed and is switched off; the run goes on: {reason}")


def front_table(run: Run) -> tuple[list[str], list[list[str | float]]]:
    """Return columns and rows of the front and the reference models: search values, and test values with errors."""
    names = [objective.name for objective in run.objectives]
    columns = ["model", *names, *(f"{kind} {name}" for name in names for kind in ("test", "test stderr"))]
    rows: list[list[str | float]] = []
    for subject in (*run.references, *(f"trial:{trial.number}" for trial in run.front)):
        searched, tested = run.searched[subject].scores, run.tested[subject].scores
        values = [searched[name].value for name in names]
        rows.append([subject, *values, *(n for name in names for n in (tested[name].value, tested[name].stderr))])
    return columns, rows
