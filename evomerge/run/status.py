"""One run in detail: how far it is, how fast it goes, what went wrong, and what happened last."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from evomerge.errors import RunError
from evomerge.evidence.functions import Estimate
from evomerge.ledger.location import Location
from evomerge.records import Trial, TrialState, in_order
from evomerge.run.run import Run, open_run
from evomerge.run.runs import RunSummary, run_locations, summary_of
from evomerge.run.volume import front_volume

NUM_FOR_RATE = 30  # results that say how fast the run goes
NUM_LATEST = 6


@dataclass(frozen=True)
class RunStatus:
    """What ``evomerge status`` says of a run beyond its summary; now: in Unix seconds."""

    run: Run
    summary: RunSummary
    now: float

    @cached_property
    def counts(self) -> dict[TrialState, int]:
        """State -> how many trials are in it."""
        counted = Counter(trial.state for trial in self.run.trials)
        return {state: counted[state] for state in ("scored", "stopped", "failed", "pending")}

    @cached_property
    def failure_reasons(self) -> dict[str, int]:
        """Reason -> how many trials failed for it, the most frequent first."""
        return dict(Counter(trial.failure for trial in self.run.trials if trial.failure).most_common())

    @cached_property
    def volume(self) -> Estimate | None:
        """The summary's hypervolume with its error; None where that has none."""
        return None if self.summary.hypervolume is None else front_volume(self.run)

    @property
    def stage(self) -> int | None:
        """Number of the stage that issued the last trial, from 0; None before any."""
        return self.run.trials[-1].stage if self.run.trials else None

    @cached_property
    def _times(self) -> Mapping[int, tuple[float, float | None]]:
        return self.run.ledger.times()

    @property
    def rate(self) -> float | None:
        """Results a second, over the last of them, of a run that is driven; None before three."""
        finished = [self.finished_at(trial) or 0.0 for trial in in_order(self.run.trials)][-NUM_FOR_RATE:]
        if self.summary.state != "running" or len(finished) < 3 or finished[-1] <= finished[0]:
            return None
        return (len(finished) - 1) / (finished[-1] - finished[0])

    @property
    def seconds_left(self) -> float | None:
        """How long the search may take at this rate, at most; the front's test scores come on top."""
        if self.rate is None:
            return None
        return (self.run.campaign.budget.evaluations - self.summary.num_finished) / self.rate

    @property
    def latest(self) -> list[Trial]:
        """The last results, the newest last."""
        return in_order(self.run.trials)[-NUM_LATEST:]

    def finished_at(self, trial: Trial) -> float | None:
        """When a trial had its result."""
        return self._times.get(trial.number, (0.0, None))[1]

    def issued_at(self, trial: Trial) -> float | None:
        """When a trial was issued."""
        return self._times[trial.number][0] if trial.number in self._times else None

    @property
    def best(self) -> dict[str, float]:
        """Objective -> the best search value of any trial scored on all items, in the user's sign."""
        scored = [trial.measurement for trial in self.run.trials if trial.state == "scored" and trial.measurement]
        return {
            objective.name: objective.sign * max(objective.sign * of.scores[objective.name].value for of in scored)
            for objective in self.run.steering
            if scored
        }

    @property
    def begun(self) -> float | None:
        """When the first trial was issued."""
        return min((issued for issued, _ in self._times.values()), default=None)


def current_status(place: Location) -> list[RunStatus]:
    """Return the status of the runs of a place that are driven at the moment; else of the one that was written last.

    Raises: RunError if there is no run.
    """
    found, problems = [], []
    for location in run_locations(place):
        try:
            run = open_run(location)
            found.append(RunStatus(run, summary_of(run), time.time()))
        except RunError as error:
            problems.append(error)
    if not found:
        raise problems[0] if problems else RunError(f"{place}: no run has begun; runs start with evomerge search")
    driven = [status for status in found if status.summary.holder]
    return driven or [max(found, key=lambda status: status.summary.written or 0.0)]
