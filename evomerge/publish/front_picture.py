"""The front as a PNG for a model card: one panel for each pair of objectives, and the card's own model marked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from evomerge.publish.scatter import Panel, Series, draw
from evomerge.records import Measurement, Objective, Trial
from evomerge.run.run import Run

FRONT, FAINT, MARK, INK = "#0072b2", "#b4bdc7", "#d55e00", "#1b2733"  # Okabe and Ito: apart for the colour-blind
LOOKS = {  # of each kind of model, its name in the legend and its marker
    "dominated": Series(name="dominated (search items)", points=(), color=FAINT, size=2.6),
    "front": Series(name="front", points=(), color=FRONT),
    "base": Series(name="base", points=(), color=INK, shape="cross"),
    "expert": Series(name="experts", points=(), color=INK, shape="diamond"),
    "uniform": Series(name="uniform average", points=(), color=INK, shape="square"),
    "scalar": Series(name="best single coefficient", points=(), color=INK, shape="triangle"),
    "this": Series(name="this model", points=(), color=MARK, shape="ring", size=8),
}
MOST_OBJECTIVES = 4  # of which every pair is drawn; of more, each with the first


def draw_front(run: Run, trial: Trial, path: Path) -> str:
    """Draw a run's front with a trial of it marked; return in words what the picture shows."""
    objectives = run.steering
    if len(objectives) == 1:
        draw([_over_trials(run, objectives[0], trial)], path)
        return f"{objectives[0].name} of every candidate on search items, this model marked"
    is_tested = f"trial:{trial.number}" in run.tested
    measured = run.tested if is_tested else run.searched
    pairs = list(combinations(objectives, 2))
    pairs = pairs if len(objectives) <= MOST_OBJECTIVES else pairs[: len(objectives) - 1]
    draw([_pair(run, measured, trial, pair) for pair in pairs], path)
    split = "test" if is_tested else "search"
    return f"The front on {split} items with bars of one standard error, dominated candidates faint, this model marked"


def _pair(run: Run, measured: Mapping[str, Measurement], trial: Trial, pair: Sequence[Objective]) -> Panel:
    x, y = pair
    on_front = [f"trial:{member.number}" for member in run.front]
    this = f"trial:{trial.number}"
    complete = [f"trial:{one.number}" for one in run.trials if one.measurement and not one.measurement.stopped]
    dominated = [run.searched[subject] for subject in complete if subject not in (*on_front, this)]
    front = [measured[subject] for subject in on_front if subject in measured]
    series = [_series("dominated", dominated, pair), _series("front", front, pair, bars=True)]
    for kind in ("base", "expert", "uniform", "scalar"):
        found = [of for subject, of in measured.items() if subject.split(":")[0] == kind and _is_shown(run, subject)]
        series.append(_series(kind, found, pair))
    series.append(_series("this", [measured[this]], pair))
    return Panel(x_label=_label(x), y_label=_label(y), series=series)


def _is_shown(run: Run, subject: str) -> bool:
    """Of the single coefficients that were tried, only the best is a reference, once the search has chosen it."""
    return not subject.startswith("scalar:") or (bool(run.tested) and subject == run.best_scalar)


def _series(kind: str, models: Sequence[Measurement], pair: Sequence[Objective], *, bars: bool = False) -> Series:
    scores = [[model.scores[objective.name] for objective in pair] for model in models]
    errors = [(_known(x.stderr), _known(y.stderr)) for x, y in scores] if bars else ()
    return replace(LOOKS[kind], points=[(x.value, y.value) for x, y in scores], errors=errors)


def _known(stderr: float) -> float:
    """Of items of one source nothing is known: no bar."""
    return stderr if math.isfinite(stderr) else 0.0


def _over_trials(run: Run, objective: Objective, trial: Trial) -> Panel:
    """One objective: every candidate's search value in the order of trials, and the references as lines."""
    complete = [one for one in run.trials if one.measurement and (not one.measurement.stopped or one is trial)]
    value_of = {one.number: _value(run, f"trial:{one.number}", objective) for one in complete}
    experts = [subject for subject in run.references if subject.startswith("expert:")]
    best = max(experts, key=lambda subject: objective.sign * _value(run, subject, objective), default=None)
    shown = [subject for subject in run.references if subject not in experts or subject == best]
    levels = {subject.replace(":", " "): _value(run, subject, objective) for subject in shown}
    this = replace(LOOKS["this"], points=[(trial.number, value_of[trial.number])])
    candidates = replace(LOOKS["front"], name="candidates", points=list(value_of.items()))
    return Panel(
        x_label="trial", y_label=f"{_label(objective)}, search items", series=[candidates, this], levels=levels
    )


def _value(run: Run, subject: str, objective: Objective) -> float:
    return run.searched[subject].scores[objective.name].value


def _label(objective: Objective) -> str:
    return objective.name + (" (lower is better)" if objective.direction == "min" else "")
