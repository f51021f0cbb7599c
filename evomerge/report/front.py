"""The front of a run beside the reference models, and what to type next."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from evomerge.errors import RunError
from evomerge.evidence.functions import Estimate
from evomerge.records import Objective, Trial
from evomerge.report.console import COMMAND, say
from evomerge.report.plot import front_plot
from evomerge.report.tables import (
    Column,
    Row,
    Shown,
    estimate_cells,
    estimated,
    make_table,
    show,
    signed,
    with_error,
)
from evomerge.run.claims import claims, use_of_test_items
from evomerge.run.frames import model_rows
from evomerge.run.run import Run
from evomerge.run.times import times_of
from evomerge.run.volume import front_volume

NUM_ROWS = 12


def front(run: Run, *, everything: bool = False) -> Shown:
    """Return the front beside the reference models: test values with standard errors where the search has ended.

    People see so many models only, unless they want everything. Raises: RunError if nothing has been scored yet.
    """
    if "base" not in run.searched:
        raise RunError(f"{run.location}: nothing has been scored yet; look again in a moment")
    members = sorted(run.front, key=lambda trial: -_mean(run, trial))
    references = run.references or [name for name in ("base", "uniform") if name in run.searched]
    rows = model_rows(run, [*references, *(f"trial:{trial.number}" for trial in members)])
    knee = run.front.knee().number if run.front else None
    shown = rows[: len(references) + (len(members) if everything else NUM_ROWS)]
    if knee is not None and knee not in [row["trial"] for row in shown]:
        shown = [*shown[:-1], next(row for row in rows if row["trial"] == knee)]
    split = "test" if run.tested else "search"
    table = make_table(
        f"{run.campaign.name}: {len(members)} models on the front, scores on {split} items",
        _columns(run, split, knee),
        shown,
        faint=lambda row: row["trial"] is None,
    )
    picture = front_plot(run, knee)
    sentences = [*run.lineage, *claims(run)]
    volume = front_volume(run)
    facts = {
        "run": run.location,
        "campaign": run.campaign.name,
        "objectives": [_described(objective) for objective in run.objectives],
        **estimate_cells("hypervolume", volume),
        "knee": knee,
        "test_touches": run.ledger.num_test_touches(),
        "sentences": sentences,
    }
    people: list[RenderableType] = [picture, ""] if picture else []
    people += [table, *_notes(run, volume, sentences, num_hidden=len(rows) - len(shown))]
    return Shown(tables={"models": rows}, facts=facts, people=people)


def print_front(run: Run) -> None:
    """Print the front for people."""
    show(front(run))


def print_finished(run: Run, file: Path, *, was_finished: bool) -> None:
    """Print the result of a search, what was decided about its experts, and what to type next."""
    print_front(run)
    for decision in run.facts.get("decisions", ()):
        say(f"decided  {decision}")
    num_trials, budget = len(run.trials), run.campaign.budget.evaluations
    if num_trials < budget:
        say(f"search   ended after {num_trials} of {budget} evaluations: it had nothing left to ask")
    if was_finished:
        remedy = f"; raise budget.evaluations in {file} to extend it" if num_trials == budget else ""
        say(f"this campaign had finished: nothing was done{remedy}")
    say(f"workers  {_shares(run.seconds)}")
    times = times_of(run.trials)
    if times.workers:
        each = sorted(worker.utilisation for worker in times.workers)
        spread = f", each {each[0]:.1%} to {each[-1]:.1%}" if len(each) > 1 else ""
        say(f"         {len(each)} of them, busy {times.utilisation:.1%} of the search{spread}")
        say(f"driver   {_shares(times.driver)}")
    say(f"run      {run.location}")
    if not run.front:
        return
    report = "report {}" if run.location.folder else "report {} --out report.html"
    for number, command in enumerate((report, "export {} --knee --out merged --verify", "front {} --all")):
        say(("next     " if number == 0 else "         ") + f"{COMMAND} " + command.format(run.location.quoted))


def _shares(seconds: Mapping[str, float]) -> str:
    """A time and where it went, by part."""
    whole = sum(seconds.values())
    return f"{whole:.0f} s: " + ", ".join(f"{part} {spent / max(whole, 1e-9):.0%}" for part, spent in seconds.items())


def _columns(run: Run, split: str, knee: int | None) -> list[Column]:
    compact = _is_compact(run)

    def model(row: Row) -> str:
        if row["trial"] is None:
            return str(row["model"])
        return run.label(run.trials[row["trial"]]) + (" ◆ knee" if row["trial"] == knee else "")

    def score(name: str) -> Column:
        head = name + (" ↓" if directions[name] == "min" else "")
        error = f"{split}_stderr/{name}"
        return Column(head, lambda row: with_error(row[f"{split}/{name}"], None if compact else row[error]))

    directions = {objective.name: objective.direction for objective in run.objectives}
    columns = [Column("model", model, is_number=False), *(score(objective.name) for objective in run.objectives)]
    if run.has_one_metric:
        names = [objective.name for objective in run.steering]
        columns.append(Column("mean", lambda row: _mean_of([row[f"{split}/{name}"] for name in names])))
        if run.tested:
            columns.append(Column("over scalar", lambda row: _over(row, run.best_scalar)))
    return columns


def _over(row: Row, best_scalar: str) -> str:
    if row["model"] == best_scalar or row["over_scalar"] is None:
        return ""
    return signed(row["over_scalar"], row["over_scalar_stderr"])


def _mean_of(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f}" if known else ""


def _is_compact(run: Run) -> bool:
    """Whether there is no room for the standard errors; the names of operators take theirs."""
    return len(run.objectives) > (3 if run.has_choice else 5)


def _described(objective: Objective) -> Row:
    return {key: getattr(objective, key) for key in ("name", "measure", "direction", "steers", "floor", "ceiling")}


def _notes(run: Run, volume: Estimate, sentences: Sequence[str], *, num_hidden: int) -> list[RenderableType]:
    notes: list[RenderableType] = []
    if not run.front:
        notes.append("no candidate has succeeded and kept every floor and ceiling: loosen them, or raise the budget")
    if num_hidden:
        notes.append(f"{num_hidden} more on the front: {COMMAND} front {run.location.quoted} --all")
    notes.append(
        Text(
            f"hypervolume {estimated(volume)} above the base, on search items, by which the table is sorted; noise "
            "makes it larger, and its interval is lower by that much"
        )
    )
    notes += [Text(f"· {sentence}") for sentence in sentences]
    if run.tested and run.has_one_metric:
        notes.append(f"over scalar: paired difference of the mean to {run.best_scalar}, the best single coefficient")
    if run.failure_kinds:
        kinds = ", ".join(f"{count} {kind}" for kind, count in run.failure_kinds.items())
        last = [trial for trial in run.trials if trial.failure][-1]
        notes.append(f"{sum(run.failure_kinds.values())} of {len(run.trials)} trials failed ({kinds})")
        notes.append(f"the last of them, trial {last.number}: {last.failure}")
    if run.halved:
        notes.append(
            f"{len(run.halved)} of {len(run.trials)} trials had to be tried again in batches of half the size to fit "
            "memory: with a smaller batch_size they would not be scored twice"
        )
    if run.stopped:
        notes.append(
            f"{len(run.stopped)} of {len(run.trials)} trials were stopped early: all trials together cost "
            f"{run.cost:.0f} full evaluations"
        )
    if run.tested and not all(f"trial:{trial.number}" in run.tested for trial in run.front):
        notes.append("models without numbers are new: they are scored on the test items when the search has ended")
    if _is_compact(run) and run.tested:
        worst = max(score.stderr for measurement in run.tested.values() for score in measurement.scores.values())
        notes.append(f"standard errors of single scores are at most {worst:.3f}")
    if run.ledger.num_test_touches() > 1:
        notes.append(use_of_test_items(run))
    return notes


def _mean(run: Run, trial: Trial) -> float:
    """The order of the table: by search values, so that test values choose nothing."""
    scores = run.searched[f"trial:{trial.number}"].scores
    return float(np.mean([objective.sign * scores[objective.name].value for objective in run.steering]))
