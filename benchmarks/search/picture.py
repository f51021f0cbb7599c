"""Hypervolume against cost as one HTML file that works offline: one panel a problem, median and 10 to 90 % a searcher.

Shape letters: S seeds, G costs.
"""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.search.comparison import COSTS, Comparison
from benchmarks.search.tables import REFERENCES

# Okabe and Ito: apart for the colour-blind; its yellow is left out, which is faint on white.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("solid", "dash", "dot")
GRID, FAINT = "#E5E8EC", "#66727F"
FIRST_COST = 5  # what is before is the start alone
MAX_COLUMNS = 2
PANEL_HEIGHT, BETWEEN_ROWS = 460, 120  # pixels
LABEL_GAP = 0.045  # of a panel's height, between two labels
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1b2733; background: #fff; max-width: 84rem; margin: 1.5rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.4rem; margin-bottom: 0; } p { color: #51606f; margin-top: .3rem; max-width: 60rem; }
"""


def write_picture(found: Sequence[Comparison], path: Path) -> None:
    """Write the page."""
    from plotly.offline import get_plotlyjs

    picture = _figure(found).to_html(full_html=False, include_plotlyjs=False, config={"displayModeBar": False})
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>Searchers at equal cost</title><style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<h1>Searchers at equal cost</h1><p>{html.escape(_lead(found))}</p>{picture}</body></html>\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _lead(found: Sequence[Comparison]) -> str:
    seeds = f"Lines are medians of {found[0].num_seeds} seeds, bands hold 10 to 90 % of them."
    return (
        "Hypervolume of the test values of the front that was chosen on search values, against cost in full-evaluation "
        f"equivalents (a forward over all search items = 1). {seeds if found[0].num_seeds > 1 else 'One seed.'}"
    )


def _figure(found: Sequence[Comparison]) -> Any:
    from plotly.subplots import make_subplots

    num_columns = min(len(found), MAX_COLUMNS)
    num_rows = -(-len(found) // num_columns)
    figure = make_subplots(
        rows=num_rows,
        cols=num_columns,
        subplot_titles=[_title(one) for one in found],
        horizontal_spacing=0.2,
        vertical_spacing=BETWEEN_ROWS / (PANEL_HEIGHT * num_rows),
    )
    for number, one in enumerate(found):
        where = {"row": number // num_columns + 1, "col": number % num_columns + 1}
        low, high = _limits(one)
        labels = _apart(
            [float(np.median(one.volumes[name][:, -1])) for name in one.searchers], LABEL_GAP * (high - low)
        )
        for place, (name, label) in enumerate(zip(one.searchers, labels, strict=True)):
            for trace in _lines(one, name, place, label):
                figure.add_trace(trace, **where)
        budget = float(one.costs_G[-1])
        if one.ceiling is not None:
            figure.add_hline(
                y=one.ceiling, line={"color": FAINT, "width": 1, "dash": "dot"}, annotation_text="true front",
                annotation_position="top left", annotation_font={"color": FAINT, "size": 12}, **where,
            )  # fmt: skip
        ticks = [cost for cost in (FIRST_COST, *COSTS) if cost <= budget]
        reach = [np.log10(FIRST_COST), np.log10(budget)]
        figure.update_xaxes(type="log", range=reach, tickvals=ticks, title_text="cost", title_standoff=8, **where)
        figure.update_yaxes(range=[low, high], **where)
    figure.update_layout(
        template="plotly_white",
        height=PANEL_HEIGHT * num_rows + 60,
        margin={"l": 60, "r": 130, "t": 60, "b": 50},
        font={"size": 13},
        showlegend=False,
        hovermode="x unified",
    )
    return figure.update_xaxes(gridcolor=GRID).update_yaxes(gridcolor=GRID)


def _lines(found: Comparison, name: str, place: int, label: float) -> Iterator[Any]:
    """Yield the band, the median, and the label at its end."""
    import plotly.graph_objects as go

    color = COLORS[place % len(COLORS)]
    low_G, median_G, high_G = np.quantile(found.volumes[name], [0.1, 0.5, 0.9], axis=0)
    shared = {"x": found.costs_G, "mode": "lines", "line_shape": "hv"}
    edge = {"line": {"width": 0}, "hoverinfo": "skip"}
    if found.num_seeds > 1:
        yield go.Scatter(y=low_G, **shared, **edge)
        faint = "rgba({}, {}, {}, 0.13)".format(*(int(color[i : i + 2], 16) for i in (1, 3, 5)))
        yield go.Scatter(y=high_G, fill="tonexty", fillcolor=faint, **shared, **edge)
    width = 3 if name == found.focus else 2
    line = {"color": color, "width": width, "dash": DASHES[place // len(COLORS) % len(DASHES)]}
    yield go.Scatter(y=median_G, name=name, line=line, hovertemplate="%{y:.4f}", **shared)
    yield go.Scatter(
        x=[found.costs_G[-1]], y=[label], mode="text", text=[f" {html.escape(name)}"], textposition="middle right",
        textfont={"color": color, "size": 13}, hoverinfo="skip", cliponaxis=False,
    )  # fmt: skip


def _title(found: Comparison) -> str:
    above = REFERENCES[found.reference]
    return (
        f"<b>{html.escape(found.problem)}</b>: {found.num_objectives} objectives, {found.num_dimensions} dimensions<br>"
        f"<span style='font-size: 12px; color: {FAINT}'>hypervolume above {html.escape(above)}</span>"
    )


def _limits(found: Comparison) -> tuple[float, float]:
    """Return the lowest and highest number to show from FIRST_COST on, with some room."""
    shown_G = found.costs_G >= min(FIRST_COST, found.costs_G[-1])
    bands = [np.quantile(volumes[:, shown_G], [0.1, 0.9], axis=0) for volumes in found.volumes.values()]
    low, high = min(float(band.min()) for band in bands), max(float(band.max()) for band in bands)
    high = max(high, found.ceiling or high)
    room = 0.04 * (high - low) or 0.01
    return low - room, high + room


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Return the heights, pushed apart until any two are a gap apart, around where they were."""
    order = np.argsort(heights)
    placed: list[list[float]] = []  # runs of labels that touch: their heights before they were pushed
    for height in (heights[place] for place in order):
        placed.append([height])
        while len(placed) > 1 and _top(placed[-2], gap) + gap > _bottom(placed[-1], gap):
            touching = placed.pop()
            placed[-1].extend(touching)
    spread = [_bottom(run, gap) + gap * n for run in placed for n in range(len(run))]
    result = np.empty(len(heights))
    result[order] = spread
    return [float(height) for height in result]


def _bottom(run: Sequence[float], gap: float) -> float:
    return float(np.mean(run)) - gap * (len(run) - 1) / 2


def _top(run: Sequence[float], gap: float) -> float:
    return float(np.mean(run)) + gap * (len(run) - 1) / 2
