"""Small plots in characters: the front of two objectives, or how the best of one came about."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Group
from rich.text import Text

from evomerge.records import Floats, Objective
from evomerge.report.console import console
from evomerge.run.run import Run

HEIGHT = 16
MAX_WIDTH = 100
MARGIN = 9  # left of the frame, for the numbers of the vertical axis
DASHES = 24  # a reference model's line has a character for so many halves of a column
NUM_TICKS = 5  # about so many numbers an axis
FRONT, DOMINATED, REFERENCE, KNEE = "bold blue", "dim", "magenta", "bold yellow"


@dataclass(frozen=True, slots=True)
class Marks:
    """Points (N, 2) that are drawn alike, by one character; later ones lie over earlier ones."""

    name: str
    sign: str
    style: str
    points_N2: Floats


def front_plot(run: Run, knee: int | None) -> Group | None:
    """Return the front of two objectives, or the way to the best of one; nothing for more, and before any trial."""
    if not any(trial.state == "scored" for trial in run.trials):
        return None
    if len(run.steering) == 1:
        return _progress_plot(run)
    return _pair_plot(run, knee) if len(run.steering) == 2 else None


def _pair_plot(run: Run, knee: int | None) -> Group:
    """Dominated trials by search values; front and reference models by test values, where they have some."""
    measured = {**run.searched, **run.tested}  # what has no test values yet has its search values
    x, y = run.steering

    def points(subjects: Sequence[str], *, tested: bool = True) -> Floats:
        scores = [(measured if tested else run.searched)[subject].scores for subject in subjects]
        return np.array([(of[x.name].value, of[y.name].value) for of in scores]).reshape(-1, 2)

    members = [trial.number for trial in run.front]
    others = [t.number for t in run.trials if t.state == "scored" and t.number not in members]
    dominated = "others, by search items" if run.tested else "others"
    marks = [Marks(dominated, "·", DOMINATED, points([f"trial:{n}" for n in others], tested=False))]
    marks.append(Marks("front", "●", FRONT, points([f"trial:{n}" for n in members])))
    marks += [Marks(name, sign, REFERENCE, points([subject])) for subject, name, sign in _reference_signs(run)]
    marks += [Marks("knee", "◆", KNEE, points([f"trial:{knee}"]))] if knee is not None else []
    return scatter(marks, _axis(x), _axis(y))


def _progress_plot(run: Run) -> Group:
    """Search values in the order of results, the best so far, and the reference models as lines."""
    (objective,) = run.steering
    results = sorted((t for t in run.trials if t.state == "scored"), key=lambda trial: trial.order or 0)
    values = np.array([t.measurement.scores[objective.name].value for t in results if t.measurement])
    place = np.arange(1, len(values) + 1, dtype=np.float64)
    best = objective.sign * np.maximum.accumulate(objective.sign * values)
    everywhere = np.linspace(place[0], place[-1], 2 * MAX_WIDTH)
    marks = []
    for number, (subject, name, sign) in enumerate(_reference_signs(run)):
        places = everywhere[4 * number :: DASHES]  # so that of two lines in one row either is seen
        values_N = np.full(len(places), run.searched[subject].scores[objective.name].value)
        marks.append(Marks(name, sign, REFERENCE, np.stack([places, values_N], axis=1)))
    steps = np.clip(np.searchsorted(place, everywhere, side="right") - 1, 0, None)
    marks.append(Marks("trials", "·", DOMINATED, np.stack([place, values], axis=1)))
    marks.append(Marks("best so far", "●", FRONT, np.stack([everywhere, best[steps]], axis=1)))
    return scatter(marks, "results", _axis(objective) + ", search items")


def _reference_signs(run: Run) -> list[tuple[str, str, str]]:
    """Return subject, name and character of each reference model that stands beside the front."""
    found = [("base", "base", "B"), ("uniform", "uniform", "U")]
    found += [(f"expert:{name}", name, str(k)) for k, name in enumerate(run.campaign.experts, start=1) if k < 10]
    found += [(run.best_scalar, "best scalar", "S")] if run.tested else []
    measured = run.tested or run.searched
    return [reference for reference in found if reference[0] in measured]


def scatter(marks: Sequence[Marks], x_title: str, y_title: str) -> Group:
    """Return marks in a frame with numbers along both axes, titles and a legend; as wide as the terminal, up to 100."""
    marks = [of_kind for of_kind in marks if len(of_kind.points_N2)]
    everything_N2 = np.concatenate([of_kind.points_N2 for of_kind in marks])
    width = min(console.width, MAX_WIDTH) - MARGIN - 2
    (x_low, y_low), (x_high, y_high) = (_widened(everything_N2) for _widened in (_low, _high))
    signs = [[" "] * width for _ in range(HEIGHT)]
    styles = [[""] * width for _ in range(HEIGHT)]
    for of_kind in marks:
        columns = np.rint((of_kind.points_N2[:, 0] - x_low) / (x_high - x_low) * (width - 1)).astype(int)
        rows = np.rint((y_high - of_kind.points_N2[:, 1]) / (y_high - y_low) * (HEIGHT - 1)).astype(int)
        for row, column in zip(rows, columns, strict=True):
            signs[row][column], styles[row][column] = of_kind.sign, of_kind.style
    y_ticks = {round((y_high - tick) / (y_high - y_low) * (HEIGHT - 1)): tick for tick in _ticks(y_low, y_high)}
    picture = Text(f"{'':{MARGIN}}{y_title}\n", no_wrap=True)
    for row in range(HEIGHT):
        label = f"{y_ticks[row]:.4g}" if row in y_ticks else ""
        picture.append(f"{label:>{MARGIN - 2}} {'┤' if row in y_ticks else '│'}")
        for sign, style in zip(signs[row], styles[row], strict=True):
            picture.append(sign, style)
        picture.append("\n")
    axis, labels = ["─"] * width, [" "] * (width + MARGIN)
    for tick in _ticks(x_low, x_high):
        column, text = round((tick - x_low) / (x_high - x_low) * (width - 1)), f"{tick:.4g}"
        axis[column] = "┬"
        start = min(max(0, column - len(text) // 2), len(labels) - len(text))
        labels[start : start + len(text)] = text
    picture.append(f"{'':{MARGIN - 1}}└{''.join(axis)}\n{'':{MARGIN}}{''.join(labels).rstrip()}  {x_title}")
    return Group(picture, _legend(marks, width))


def _legend(marks: Sequence[Marks], width: int) -> Text:
    """Return what the characters mean, in lines that do not part a character from its name."""
    legend, room = Text(" " * MARGIN, no_wrap=True), width
    for of_kind in marks:
        length = len(of_kind.name) + 4
        if length > room:
            legend.append("\n" + " " * MARGIN)
            room = width
        legend.append(of_kind.sign, of_kind.style)
        legend.append(f" {of_kind.name}  ")
        room -= length
    return legend


def _low(points_N2: Floats) -> Floats:
    return np.asarray(points_N2.min(axis=0) - _margin(points_N2))


def _high(points_N2: Floats) -> Floats:
    return np.asarray(points_N2.max(axis=0) + _margin(points_N2))


def _margin(points_N2: Floats) -> Floats:
    """A little room around the points; where all are equal, enough to draw them."""
    span_2 = np.ptp(points_N2, axis=0)
    room_2: Floats = np.where(span_2 > 0, 0.03 * span_2, np.maximum(0.05 * np.abs(points_N2[0]), 0.01))
    return room_2


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two ends, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / NUM_TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axis(objective: Objective) -> str:
    return objective.name + (" ↓" if objective.direction == "min" else "")
