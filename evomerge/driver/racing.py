"""A pool that races: candidates go through the rounds of a race on another pool, and come back stopped or complete."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from evomerge.campaign.plan import Plan
from evomerge.evidence.summary import Summarizer
from evomerge.fidelity.race import Race, RaceOptions
from evomerge.records import Candidate, Measurement, Split, TaskItems, Trial, in_order
from evomerge.workers.pool import SECONDS, Pool, Result, Subject, fate_of


def make_race(plan: Plan, options: RaceOptions, references: Mapping[str, Measurement], seed: int) -> Race:
    """Return the race over the plan's search items. Raises: CampaignError if its estimator does not suit them."""
    items = {task: splits["search"] for task, splits in plan.splits.items()}
    return Race(options, plan.objectives, items, plan.sources("search"), references, seed)


def finished_models(
    measured: Mapping[str, Measurement], trials: Iterable[Trial], references: Iterable[str]
) -> dict[str, Measurement]:
    """Return the models that are scored on all search items: the references, then trials in the order of results."""
    complete = {
        f"trial:{trial.number}": trial.measurement
        for trial in in_order(trials)
        if trial.measurement and not trial.measurement.stopped
    }
    return {name: measured[name] for name in references} | complete


@dataclass(frozen=True, slots=True)
class _Runner:
    """A candidate on its way, with what its rounds up to now have shown, and their seconds (``Result.fate``)."""

    subject: Subject
    measurement: Measurement | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class RacingPool:
    """Scores candidates in rounds over search items.

    finished: the reference models and the trials that are scored on all items, with the summaries' scores, in the order
    in which they came; what completes the race joins them under ``trial:<key>``.
    """

    def __init__(self, pool: Pool, race: Race, summarizer: Summarizer, finished: Mapping[str, Measurement]) -> None:
        self._pool, self._race, self._summarizer = pool, race, summarizer
        self._finished = dict(finished)
        self._running: dict[int, _Runner] = {}

    @property
    def num_free(self) -> int:
        """How many candidates can be submitted without waiting for a result."""
        return self._pool.num_free

    def configure(self, stage_space: Any) -> None:
        """Begin a stage."""
        self._pool.configure(stage_space)

    def submit(self, key: int, subject: Subject, split: Split, items: TaskItems | None = None) -> None:
        """Send a candidate into the first round; its items are the race's."""
        assert items is None
        self._running[key] = _Runner(subject)
        self._pool.submit(key, subject, split, self._race.next_items())

    def results(self) -> Iterator[Result]:
        """Yield results of candidates that failed, were stopped or have run all rounds, until none is left."""
        for last in self._pool.results():
            key, outcome = last.key, last.outcome
            runner = self._running.pop(key)
            seconds = {part: runner.seconds.get(part, 0.0) + last.fate.get(part, 0.0) for part in SECONDS}
            result = replace(last, fate={**last.fate, **seconds})
            if not isinstance(outcome, Measurement):
                yield result
                continue
            measurement = self._race.joined(runner.measurement, outcome) if runner.measurement else outcome
            items = self._race.next_items(measurement)
            if items is None:
                self._finished[f"trial:{key}"] = self._summarizer.add(measurement)
                yield _complete(result, measurement)
                continue
            estimate = self._race.estimate(measurement, self._finished)
            reason = self._race.verdict(self._summarizer.add(estimate), self._finished)
            if reason is not None:
                yield _complete(result, replace(estimate, stopped=reason))
                continue
            # A descent is done once: the later rounds score where it ended.
            subject = Candidate(point=measurement.arrival.point) if measurement.arrival else runner.subject
            self._running[key] = _Runner(subject, measurement, seconds)
            self._pool.submit(key, subject, measurement.split, items)


def _complete(result: Result, measurement: Measurement) -> Result:
    """Return the result of the last round as that of all rounds."""
    return replace(result, outcome=measurement, fate={**result.fate, **fate_of(measurement)})
