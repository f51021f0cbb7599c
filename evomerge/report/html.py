"""A run as one HTML file that works offline: pictures by Plotly, whose script lies inside."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.claims import claims
from evomerge.evidence.intervals import score_intervals
from evomerge.front.front import front_hypervolume
from evomerge.records import Floats, Measurement, Objective, Trial, in_order
from evomerge.run import Run

FRONT, FAINT, MARK, GRID = "#0072B2", "#9AA5B1", "#D55E00", "#E5E8EC"  # Okabe and Ito: apart for the colour-blind
REFERENCE_SYMBOLS = {"base": "x", "expert": "diamond", "uniform": "square", "scalar": "triangle-up"}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b2733; background: #fff; max-width: 72rem; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.lead { color: #51606f; margin-top: .3rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .2rem .8rem; border-bottom: 1px solid #e5e8ec; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
td small { display: block; color: #66727f; font-size: .72rem; line-height: 1.1; }
tr.reference td { color: #66727f; } tr.knee td { font-weight: 600; }
code { background: #f3f5f7; padding: .15rem .4rem; border-radius: .25rem; }
.scroll { overflow-x: auto; }
"""


@dataclass(frozen=True, slots=True)
class Style:
    """How a kind of model looks in a scatter: its name in the legend, its marker, and whether it has error bars."""

    name: str
    marker: dict[str, Any]
    bars: bool = False


def write_report(run: Run, path: Path) -> None:
    """Write the report. Raises: RunError if the run has no front yet."""
    from plotly.offline import get_plotlyjs

    knee = f"trial:{run.pick(at_knee=True).number}"
    split = "test" if run.tested else "search"
    title = f"The front, on {split} items" if len(run.steering) > 1 else "Candidates, on search items"
    sections = [
        f"<h1>{html.escape(run.campaign.name)}</h1>",
        f'<p class="lead">{_lead(run)}</p>',
        f"<h2>{title}</h2>",
        _picture(_front_figure(run, knee)),
        *_claims(run),
        "<h2>Models</h2>",
        f'<div class="scroll">{_table(run, knee)}</div>',
        _coefficients(run, knee),
        "<h2>Hypervolume over cost</h2>",
        _picture(_hypervolume_figure(run)),
        "<h2>Take a model</h2>",
        _commands(run, knee),
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{html.escape(run.campaign.name)}: evomerge</title><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>{''.join(sections)}</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _lead(run: Run) -> str:
    num_failed = sum(trial.failure is not None for trial in run.trials)
    failed = f", {num_failed} of them failed" if num_failed else ""
    failed += f", {len(run.stopped)} of them stopped early" if run.stopped else ""
    experts = html.escape(", ".join(run.campaign.experts))
    return (
        f"{len(run.campaign.experts)} experts ({experts}) merged by "
        f"{html.escape(' or '.join(run.campaign.operator_names))} in "
        f"{run.dimensions} dimensions. {len(run.trials)} candidates{failed}, {run.cost:.0f} full-evaluation "
        f"equivalents, {len(run.front)} models on the front. Candidates were chosen on search items; {_touches(run)}. "
        "± and bars are one standard error, small ranges 95 % intervals."
    )


def _claims(run: Run) -> list[str]:
    sentences = [
        f"<li>{html.escape(sentence[0].upper() + sentence[1:])}.</li>" for sentence in (*run.lineage, *claims(run))
    ]
    return ["<h2>What the items say</h2>", f"<ul>{''.join(sentences)}</ul>"] if sentences else []


def _touches(run: Run) -> str:
    touches = run.ledger.num_test_touches()
    if touches < 2:
        return "test items were used once, for the numbers below" if touches else "test items have not been used yet"
    return f"test items were used {touches} times, so that later fronts were chosen knowing more than the search items"


def _front_figure(run: Run, knee: str) -> Any:
    """Two objectives: a scatter with error bars. More: a scatter of every pair."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = [objective.name for objective in run.steering]
    if len(names) == 1:
        return _single_objective_figure(run, knee)
    pairs = [(row, column) for row in range(1, len(names)) for column in range(row)]
    size = len(names) - 1
    figure = make_subplots(
        rows=size, cols=size, shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.02, vertical_spacing=0.03
    )
    for y, x in pairs:
        for trace in _pair_traces(run, knee, x, y, with_legend=(x, y) == (0, 1)):
            figure.add_trace(trace, row=y, col=x + 1)
        figure.update_xaxes(title_text=_axis(run.steering[x]) if y == size else None, row=y, col=x + 1)
        figure.update_yaxes(title_text=_axis(run.steering[y]) if x == 0 else None, row=y, col=x + 1)
    for row in range(1, size + 1):
        for column in range(row + 1, size + 1):
            figure.update_xaxes(visible=False, row=row, col=column)
            figure.update_yaxes(visible=False, row=row, col=column)
    legend = {"x": 1, "xanchor": "right", "y": 1} if size > 1 else {"orientation": "h", "y": -0.15}
    return _styled(go.Figure(figure), height=560 if size == 1 else 240 * size + 120).update_layout(legend=legend)


def _pair_traces(run: Run, knee: str, x: int, y: int, *, with_legend: bool) -> list[Any]:
    """Stopped and dominated trials (search values, faint), references, the front with error bars, and the knee."""
    measured = run.tested or run.searched
    on_front = [f"trial:{trial.number}" for trial in run.front]
    stopped = [f"trial:{trial.number}" for trial in run.stopped]
    dominated = [
        subject
        for subject in (f"trial:{trial.number}" for trial in run.trials if trial.measurement)
        if subject not in (*on_front, *stopped)
    ]
    bars = len(run.steering) == 2
    faint = Style("dominated (search values)", {"color": FAINT, "size": 5, "opacity": 0.5})
    open_ = {"color": FAINT, "size": 5, "opacity": 0.5, "symbol": "circle-open"}
    early = [_points(run, run.searched, stopped, (x, y), Style("stopped early (estimates)", open_))] if stopped else []
    traces = [
        *early,
        _points(run, run.searched, dominated, (x, y), faint),
        _points(run, measured, on_front, (x, y), Style("front", {"color": FRONT, "size": 8}, bars)),
    ]
    for kind, symbol in REFERENCE_SYMBOLS.items():
        subjects = [name for name in run.references if name.split(":")[0] == kind]
        name = "best scalar" if kind == "scalar" else kind
        style = Style(name, {"color": "#1b2733", "size": 9, "symbol": symbol}, bars)
        traces.append(_points(run, measured, subjects, (x, y), style))
    ring = Style("knee", {"color": MARK, "size": 14, "symbol": "diamond-open", "line": {"width": 3}})
    traces.append(_points(run, measured, [knee], (x, y), ring))
    for trace in traces:
        trace.showlegend = with_legend
        trace.legendgroup = trace.name
    return traces


def _points(
    run: Run, measured: dict[str, Measurement], subjects: list[str], axes: tuple[int, int], style: Style
) -> Any:
    import plotly.graph_objects as go

    first, second = (run.steering[axis].name for axis in axes)
    scores = [measured[subject].scores for subject in subjects]
    errors = {}
    for axis, objective in (("error_x", first), ("error_y", second)) if style.bars else ():
        errors[axis] = {"array": [score[objective].stderr for score in scores], "thickness": 1, "width": 0}
    return go.Scatter(
        x=[score[first].value for score in scores],
        y=[score[second].value for score in scores],
        text=[subject.replace(":", " ") for subject in subjects],
        mode="markers",
        name=style.name,
        marker=style.marker,
        hovertemplate=f"%{{text}}<br>{first} %{{x:.3f}}<br>{second} %{{y:.3f}}<extra>{style.name}</extra>",
        **errors,
    )


def _single_objective_figure(run: Run, knee: str) -> Any:
    """One objective: every candidate's search value in the order of trials, and the references as lines."""
    import plotly.graph_objects as go

    objective = run.steering[0]
    finished = [trial for trial in run.trials if trial.measurement]
    values = [run.searched[f"trial:{trial.number}"].scores[objective.name].value for trial in finished]
    figure = go.Figure(
        go.Scatter(
            x=[trial.number for trial in finished], y=values, mode="markers", name="trials", marker={"color": FRONT}
        )
    )
    for subject in run.references:
        value = run.searched[subject].scores[objective.name].value
        figure.add_hline(y=value, line={"dash": "dot", "color": FAINT}, annotation_text=subject)
    number = int(knee.split(":")[1])
    value = run.searched[knee].scores[objective.name].value
    ring = {"color": MARK, "size": 14, "symbol": "diamond-open", "line": {"width": 3}}
    figure.add_trace(go.Scatter(x=[number], y=[value], name="best", mode="markers", marker=ring))
    figure.update_xaxes(title_text="trial")
    figure.update_yaxes(title_text=f"{_axis(objective)} on search items")
    return _styled(figure, height=480)


def _coefficients(run: Run, knee: str) -> str:
    """Heat map of the numbers that were searched for one model: experts down, groups across."""
    import plotly.graph_objects as go

    trial = _trial(run, knee)
    cells = {
        (f"{dimension['parameter']} {dimension['expert'] or ''}".strip(), dimension["group"] or "all"): number
        for dimension, number in run.numbers_of(trial)
    }
    title = f"<h2>Coefficients of the knee: {html.escape(run.label(trial))}</h2>"
    if not cells:
        return f"{title}<p>Nothing but the operator was searched.</p>"
    rows, columns = (list(dict.fromkeys(place)) for place in zip(*cells, strict=True))
    matrix = np.array([[cells.get((row, column), np.nan) for column in columns] for row in rows])
    limit = float(np.nanmax(np.abs(matrix)))
    figure = go.Figure(
        go.Heatmap(
            z=matrix,
            x=columns,
            y=rows,
            zmin=-limit,
            zmax=limit,
            colorscale="RdBu_r",
            texttemplate="%{z:.2f}" if matrix.size <= 200 else None,
            hovertemplate="%{y}, %{x}: %{z:.4f}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed")
    return title + _picture(_styled(figure, height=90 + 44 * len(rows)))


def _hypervolume_figure(run: Run) -> Any:
    import plotly.graph_objects as go

    finished = in_order(run.trials)
    costs = np.cumsum([trial.measurement.cost if trial.measurement else 0.0 for trial in finished])
    steps = sorted({int(step) for step in np.linspace(1, len(finished), 60)})
    volumes = [front_hypervolume(finished[:step], run.objectives, run.searched["base"]) for step in steps]
    line = {"shape": "hv", "color": FRONT, "width": 3}
    figure = go.Figure(go.Scatter(x=[costs[step - 1] for step in steps], y=volumes, mode="lines", line=line))
    figure.update_xaxes(title_text="cost in full-evaluation equivalents")
    figure.update_yaxes(title_text="hypervolume above the base (search items)")
    return _styled(figure, height=360)


def _table(run: Run, knee: str) -> str:
    measured = run.tested or run.searched
    head = "".join(f"<th>{html.escape(_axis(objective))}</th>" for objective in run.objectives)
    with_gain = bool(run.tested) and run.has_one_metric
    gain_head = "<th>over best scalar</th>" if with_gain else ""
    lines = [f"<tr><th>model</th>{head}{gain_head}</tr>"]
    subjects = [*run.references, *(f"trial:{trial.number}" for trial in run.front)]
    intervals = _intervals(run, measured, subjects)
    for subject in subjects:
        scores = [measured[subject].scores[objective.name] for objective in run.objectives]
        cells = "".join(
            f"<td>{score.value:.3f} ± {score.stderr:.3f}<small>{low:.3f} to {high:.3f}</small></td>"
            for score, (low, high) in zip(scores, intervals[subject], strict=True)
        )
        if with_gain:
            gain, error = run.gain(subject, run.best_scalar)
            cells += "<td></td>" if subject == run.best_scalar else f"<td>{gain:+.3f} ± {error:.3f}</td>"
        kind = "knee" if subject == knee else "front" if subject.startswith("trial:") else "reference"
        label = subject.replace(":", " ") if kind == "reference" else run.label(_trial(run, subject))
        label += " (knee)" if kind == "knee" else ""
        lines.append(f'<tr class="{kind}"><td>{html.escape(label)}</td>{cells}</tr>')
    return f"<table>{''.join(lines)}</table>"


def _intervals(run: Run, measured: dict[str, Measurement], subjects: list[str]) -> dict[str, Floats]:
    """Return subject -> the 95 % intervals of its objectives, (M, 2)."""
    sources = run.sources("test" if run.tested else "search")
    by_objective = [
        score_intervals(
            np.stack([measured[subject].scores[objective.name].items for subject in subjects]), sources[objective.name]
        )
        for objective in run.objectives
    ]
    return dict(zip(subjects, np.stack(by_objective, axis=1), strict=True))


def _commands(run: Run, knee: str) -> str:
    location = html.escape(run.location.quoted)
    number = knee.split(":")[1]
    wish = f"{html.escape(run.steering[0].name)}=2"
    commands = (f"--trial {number} --out merged", f"--prefer {wish} --out merged", "--knee --out merged --verify")
    return "".join(f"<p><code>evomerge export {location} {command}</code></p>" for command in commands)


def _trial(run: Run, subject: str) -> Trial:
    return run.trials[int(subject.split(":")[1])]


def _axis(objective: Objective) -> str:
    return objective.name + (" (lower is better)" if objective.direction == "min" else "")


def _styled(figure: Any, height: int) -> Any:
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 60, "r": 20, "t": 20, "b": 50}, font={"size": 13}
    )
    return figure.update_xaxes(gridcolor=GRID).update_yaxes(gridcolor=GRID)


def _picture(figure: Any) -> str:
    picture: str = figure.to_html(
        full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True}
    )
    return picture
