"""The runs of a folder or a database, each in a few numbers."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from evomerge.errors import RunError
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import Location, locate
from evomerge.run.run import Run, open_run


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How far a run is and what it has found, on search items; problem: why it cannot be read.

    state: running (holder drives it), finished, or stopped before its end. best: of a single objective, in the user's
    sign; hypervolume: of several, above the base. written: when it was last written, in Unix seconds.
    """

    location: Location
    name: str = ""
    state: str = ""
    holder: str | None = None
    num_finished: int = 0
    num_evaluations: int = 0
    num_on_front: int = 0
    best: float | None = None
    hypervolume: float | None = None
    written: float | None = None
    problem: str | None = None


def summarize_runs(place: Location) -> list[RunSummary]:
    """Return the runs in a folder, or of a database, sorted by their names. Raises: RunError if there is no such place.

    A folder that is a run is listed alone, as is a run that is named.
    """
    return [summarize_run(location) for location in run_locations(place)]


def run_locations(place: Location) -> Iterator[Location]:
    """Yield where the runs of a folder or a database are. Raises: RunError if there is no such place."""
    if place.folder is None:
        names = [place.name] if place.name else sorted(Ledger.names(place))
        yield from (replace(place, name=name) for name in names)
    elif place.is_missing:
        if not place.folder.is_dir():
            raise RunError(f"{place}: expected a folder with runs, found none; runs start with evomerge search")
        inside = [locate(folder) for folder in sorted(place.folder.iterdir())]
        yield from (location for location in inside if not location.is_missing)
    else:
        yield place


def summarize_run(location: Location) -> RunSummary:
    """Return a run in a few numbers, or why it cannot be read."""
    try:
        return summary_of(open_run(location))
    except RunError as error:
        return RunSummary(location=location, problem=str(error))


def summary_of(run: Run) -> RunSummary:
    """Return an open run in a few numbers."""
    holder = run.ledger.holder()
    state = "running" if holder else "finished" if run.is_finished else "stopped"
    finished = [trial for trial in run.trials if trial.order is not None]
    best = hypervolume = None
    if run.front and len(run.steering) == 1:
        (objective,) = run.steering
        best = run.searched[f"trial:{run.front[0].number}"].scores[objective.name].value
    elif "base" in run.searched:
        hypervolume = run.hypervolume()
    return RunSummary(
        location=run.location,
        name=run.campaign.name,
        state=state,
        holder=str(holder) if holder else None,
        num_finished=len(finished),
        num_evaluations=run.campaign.budget.evaluations,
        num_on_front=len(run.front),
        best=best,
        hypervolume=hypervolume,
        written=run.ledger.last_written(),
    )
