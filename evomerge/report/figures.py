"""A run in pictures, for notebooks: Plotly figures to show, change or write to HTML.

    evomerge.figures.front(run).show()

Search values steered the choice; where the front is scored on the test items, those are what is drawn.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evomerge.errors import RunError
from evomerge.front.front import front_hypervolume
from evomerge.records import Measurement, Objective, Trial, in_order
from evomerge.run.run import Run

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

FRONT, FAINT, DARK = "#0072B2", "#9AA5B1", "#1b2733"  # Okabe and Ito: apart for the colour-blind
SYMBOLS = {"base": "x", "expert": "diamond", "uniform": "square", "scalar": "triangle-up"}
NUM_STEPS = 100  # of the hypervolume's curve


def front(run: Run) -> "Figure":
    """Return the front of two or three objectives with the reference models; of more, parallel coordinates.

    Of one objective, the trials in their order. Bars are one standard error. Raises: RunError if nothing is scored.
    """
    _require_scores(run)
    if len(run.steering) == 1:
        return _one_objective(run)
    if len(run.steering) > 3:
        return parallel_coordinates(run)
    import plotly.graph_objects as go

    measured = {**run.searched, **run.tested}  # what has no test values yet has its search values
    members = _subjects(run.front)
    others = _subjects([t for t in run.trials if t.state == "scored" and f"trial:{t.number}" not in members])
    drawn = [_points(run, run.searched, others, "others (search values)", {"color": FAINT, "size": 5, "opacity": 0.5})]
    drawn.append(_points(run, measured, members, "front", {"color": FRONT, "size": 8}, with_errors=True))
    for kind, symbol in SYMBOLS.items():
        subjects = [name for name in run.references if name.split(":")[0] == kind]
        marker = {"color": DARK, "size": 9, "symbol": symbol if len(run.steering) == 2 else "diamond"}
        drawn.append(_points(run, measured, subjects, "best scalar" if kind == "scalar" else kind, marker))
    figure = go.Figure(drawn)
    titles = [_title(objective) for objective in run.steering]
    if len(titles) == 2:
        return _styled(figure).update_layout(xaxis_title=titles[0], yaxis_title=titles[1])
    axes = {f"{axis}axis_title": title for axis, title in zip("xyz", titles, strict=True)}
    return _styled(figure).update_layout(scene=axes)


def hypervolume(run: Run) -> "Figure":
    """Return the hypervolume above the base, on search items, over the cost in full-evaluation equivalents."""
    import plotly.graph_objects as go

    _require_scores(run)
    results = in_order(run.trials)
    costs = np.cumsum([trial.measurement.cost if trial.measurement else 0.0 for trial in results])
    steps = sorted({int(step) for step in np.linspace(1, len(results), NUM_STEPS)})
    volumes = [front_hypervolume(results[:step], run.objectives, run.searched["base"]) for step in steps]
    line = {"shape": "hv", "color": FRONT, "width": 3}
    figure = go.Figure(go.Scatter(x=[costs[step - 1] for step in steps], y=volumes, mode="lines", line=line))
    return _styled(figure).update_layout(
        xaxis_title="cost in full-evaluation equivalents", yaxis_title="hypervolume above the base (search items)"
    )


def coefficients(run: Run, trial: Trial | int) -> "Figure":
    """Return the numbers that were searched for one trial: experts down, groups across."""
    import plotly.graph_objects as go

    shown = run.trial(trial) if isinstance(trial, int) else trial
    cells = {
        (f"{dimension['parameter']} {dimension['expert'] or ''}".strip(), dimension["group"] or "all"): number
        for dimension, number in run.numbers_of(shown)
    }
    rows, columns = (list(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1))
    matrix = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])
    limit = float(np.nanmax(np.abs(matrix), initial=0.0)) or 1.0
    heat = go.Heatmap(
        z=matrix,
        x=columns,
        y=rows,
        zmin=-limit,
        zmax=limit,
        colorscale="RdBu_r",
        texttemplate="%{z:.2f}" if matrix.size <= 200 else None,
        hovertemplate="%{y}, %{x}: %{z:.4f}<extra></extra>",
    )
    figure = _styled(go.Figure(heat)).update_layout(title=run.label(shown), height=140 + 44 * len(rows))
    return figure.update_yaxes(autorange="reversed")


def parallel_coordinates(run: Run) -> "Figure":
    """Return a line a trial through its search values in every objective, the front's in colour."""
    import plotly.graph_objects as go

    _require_scores(run)
    scored = [trial for trial in run.trials if trial.state == "scored"]
    members = {trial.number for trial in run.front}
    scored.sort(key=lambda trial: trial.number in members)  # the front lies on top
    axes = [
        {"label": _title(objective), "values": _values(run.searched, _subjects(scored), objective)}
        for objective in run.steering
    ]
    line = {"color": [float(trial.number in members) for trial in scored], "colorscale": [[0, FAINT], [1, FRONT]]}
    figure = _styled(go.Figure(go.Parcoords(dimensions=axes, line={**line, "cmin": 0, "cmax": 1})))
    return figure.update_layout(margin_t=60)


def _one_objective(run: Run) -> "Figure":
    import plotly.graph_objects as go

    (objective,) = run.steering
    results = [trial for trial in in_order(run.trials) if trial.state == "scored"]
    values = _values(run.searched, _subjects(results), objective)
    best = objective.sign * np.maximum.accumulate(objective.sign * np.array(values))
    place = list(range(1, len(values) + 1))
    figure = go.Figure(
        [
            go.Scatter(x=place, y=values, mode="markers", name="trials", marker={"color": FAINT}),
            go.Scatter(x=place, y=best, name="best so far", line={"shape": "hv", "color": FRONT, "width": 3}),
        ]
    )
    for subject in run.references:
        value = run.searched[subject].scores[objective.name].value
        figure.add_hline(y=value, line={"dash": "dot", "color": FAINT}, annotation_text=subject)
    return _styled(figure).update_layout(xaxis_title="results", yaxis_title=f"{_title(objective)} on search items")


def _points(
    run: Run,
    measured: dict[str, Measurement],
    subjects: Sequence[str],
    name: str,
    marker: dict[str, Any],
    *,
    with_errors: bool = False,
) -> Any:
    """Return a trace of models: a scatter of two objectives, or of three."""
    import plotly.graph_objects as go

    trace: dict[str, Any] = {"name": name, "mode": "markers", "marker": marker}
    for axis, objective in zip("xyz", run.steering, strict=False):
        trace[axis] = _values(measured, subjects, objective)
        errors = [measured[subject].scores[objective.name].stderr for subject in subjects]
        trace |= {f"error_{axis}": {"array": errors, "thickness": 1, "width": 0}} if with_errors else {}
    trace["text"] = [subject.replace(":", " ") for subject in subjects]
    return (go.Scatter if len(run.steering) == 2 else go.Scatter3d)(**trace)


def _values(measured: dict[str, Measurement], subjects: Sequence[str], objective: Objective) -> list[float]:
    return [measured[subject].scores[objective.name].value for subject in subjects]


def _subjects(trials: Sequence[Trial]) -> list[str]:
    return [f"trial:{trial.number}" for trial in trials]


def _title(objective: Objective) -> str:
    return objective.name + (" (lower is better)" if objective.direction == "min" else "")


def _require_scores(run: Run) -> None:
    if not any(trial.state == "scored" for trial in run.trials):
        raise RunError(f"{run.location}: no trial has been scored yet; there is nothing to draw")


def _styled(figure: Any) -> Any:
    return figure.update_layout(template="plotly_white", font={"size": 13}, margin={"l": 60, "r": 20, "t": 40, "b": 50})
