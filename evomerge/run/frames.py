"""A run's trials and models as rows of plain values, and as pandas frames.

Keys that stay: ``search/NAME`` and ``test/NAME`` are an objective's values in the user's own sign,
``search_stderr/NAME`` and ``test_stderr/NAME`` their standard errors; ``coefficient/EXPERT/GROUP`` is a number that was
searched, as is any other parameter in its place. What is not known is None.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError
from evomerge.records import Measurement, Trial

if TYPE_CHECKING:
    import pandas as pd

    from evomerge.run.run import Run

NUM_SHOWN = 12  # rows of a notebook's table


def trial_rows(run: "Run", trials: Iterable[Trial] | None = None) -> list[dict[str, Any]]:
    """Return a row a trial (default: all of the run, in the order of issue), with scores and searched numbers."""
    members = {trial.number for trial in run.front}
    return [
        {
            "trial": trial.number,
            "stage": trial.stage,
            "state": trial.state,
            "on_front": trial.number in members,
            **({"operator": run.operator_of(trial)} if run.has_choice else {}),
            "cost": trial.measurement.cost if trial.measurement else None,
            "failure": trial.failure,
            **score_cells(run, f"trial:{trial.number}"),
            **{place_of(dimension): number for dimension, number in run.numbers_of(trial)},
        }
        for trial in (run.trials if trials is None else trials)
    ]


def model_rows(run: "Run", subjects: Iterable[str]) -> list[dict[str, Any]]:
    """Return a row a model, by subject: its scores, and its paired gain in the mean over the best single scalar."""
    members = {trial.number for trial in run.front}
    rows = []
    for subject in subjects:
        number = int(subject.removeprefix("trial:")) if subject.startswith("trial:") else None
        row = {"model": subject, "trial": number, "on_front": number in members, **score_cells(run, subject)}
        if run.tested and run.has_one_metric:
            gain, error = run.gain(subject, run.best_scalar) if subject in run.tested else (None, None)
            row |= {"over_scalar": gain, "over_scalar_stderr": error}
        rows.append(row)
    return rows


def score_cells(run: "Run", subject: str) -> dict[str, float | None]:
    """Return a model's values and standard errors on both splits."""
    cells: dict[str, float | None] = {}
    for split, measured in (("search", run.searched), ("test", run.tested)):
        cells |= _cells(run, split, measured.get(subject))
    return cells


def _cells(run: "Run", split: str, measurement: Measurement | None) -> dict[str, float | None]:
    cells: dict[str, float | None] = {}
    for objective in run.objectives:
        score = measurement.scores[objective.name] if measurement else None
        cells[f"{split}/{objective.name}"] = score.value if score else None
        cells[f"{split}_stderr/{objective.name}"] = score.stderr if score else None
    return cells


def place_of(dimension: Mapping[str, Any]) -> str:
    """Return the key of a searched number, such as ``coefficient/rot90/layer3``; what shares it is left out."""
    return "/".join(part for part in (dimension["parameter"], dimension["expert"], dimension["group"]) if part)


def frame_of(rows: Sequence[Mapping[str, Any]]) -> "pd.DataFrame":
    """Return rows as a pandas frame; what is None among numbers is NaN. Raises: InputError without pandas."""
    try:
        import pandas as pd
    except ImportError as error:
        raise InputError("frames: expected pandas, found none; pip install 'evomerge[notebook]'") from error
    return pd.DataFrame.from_records(rows)


def as_html(run: "Run") -> str:
    """Return what a notebook shows of a run: its front, beside the reference models."""
    split = "test" if run.tested else "search"
    subjects = [*run.references, *(f"trial:{trial.number}" for trial in run.front[:NUM_SHOWN])]
    head = "".join(f"<th>{html.escape(objective.name)}</th>" for objective in run.objectives)
    lines = []
    for subject in subjects:
        cells = score_cells(run, subject)
        numbers = [(cells[f"{split}/{o.name}"], cells[f"{split}_stderr/{o.name}"]) for o in run.objectives]
        scores = "".join(
            "<td></td>" if value is None or stderr is None else f"<td>{value:.3f} ± {stderr:.3f}</td>"
            for value, stderr in numbers
        )
        lines.append(f"<tr><td>{html.escape(subject.replace(':', ' '))}</td>{scores}</tr>")
    hidden = len(run.front) - NUM_SHOWN
    more = f"<p>{hidden} more on the front: front_frame() has all.</p>" if hidden > 0 else ""
    return (
        f"<p><b>{html.escape(run.campaign.name)}</b> in {html.escape(str(run.location))}: {len(run.trials)} of "
        f"{run.campaign.budget.evaluations} trials, {len(run.front)} models on the front; scores on {split} items, "
        f"± one standard error</p><table><tr><th>model</th>{head}</tr>{''.join(lines)}</table>{more}"
    )
