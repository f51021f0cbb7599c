"""One trial: what became of it, what it scores, its numbers, where it came from, what it gains and loses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.table import Table

from evomerge.evidence.intervals import score_intervals
from evomerge.records import Trial
from evomerge.report.console import COMMAND, duration
from evomerge.report.pairs import FOOTNOTE, OBJECTIVE, difference_columns, label, pair_row
from evomerge.report.runs import iso, local
from evomerge.report.tables import Column, Row, Shown, make_table, short
from evomerge.run.comparison import compare_models
from evomerge.run.frames import place_of
from evomerge.run.run import Run

MAX_GROUPS = 40  # rows of coefficients, unless everything is asked for
EXPERTS_ACROSS = 5  # with bars; more experts get a table of their own
BAR = 6  # characters of the largest coefficient
EIGHTHS = "▏▎▍▌▋▊▉█"


def trial(run: Run, shown: Trial, *, everything: bool = False) -> Shown:
    """Return one trial, whatever its fate; of very many groups, the first, unless everything is asked for."""
    scores = _scores(run, shown) if shown.measurement else []
    differences = _differences(run, shown) if shown.state == "scored" else []
    numbers = [
        {"place": place_of(held), "parameter": held["parameter"], "expert": held["expert"], "group": held["group"]}
        | {"value": value}
        for held, value in run.numbers_of(shown)
    ]
    facts = _facts(run, shown)
    people: list[RenderableType] = _about(run, shown, facts)
    if scores:
        people.append(make_table("", _score_columns(), scores))
    if differences:
        people += [_difference_table(run, shown, differences), FOOTNOTE]
    people += _coefficients(numbers, everything=everything)
    if shown.measurement:
        where = run.location.quoted
        people.append(f"next     {COMMAND} export {where} --trial {shown.number} --out merged")
        if shown.state == "scored":
            other = "uniform" if facts["is_knee"] or not run.front else "knee"
            people.append(f"         {COMMAND} compare {where} {shown.number} {other}")
    return Shown(tables={"scores": scores, "differences": differences, "numbers": numbers}, facts=facts, people=people)


def _facts(run: Run, shown: Trial) -> dict[str, Any]:
    issued, finished = run.ledger.times().get(shown.number, (None, None))
    measurement = shown.measurement
    arrival = measurement.arrival if measurement else None
    return {
        "run": run.location,
        "trial": shown.number,
        "state": shown.state,
        "on_front": shown in run.front,
        "is_knee": shown in run.front and run.front.knee().number == shown.number,
        "operator": run.operator_of(shown),
        "stage": shown.stage,
        "index": shown.index,
        "known": shown.known,
        "order": shown.order,
        "issued": iso(issued),
        "finished": iso(finished),
        "cost": measurement.cost if measurement else None,
        "seconds": dict(measurement.seconds) if measurement else {},
        "descent": None if arrival is None else {"first_loss": arrival.losses[0], "last_loss": arrival.losses[-1]},
        "stopped": measurement.stopped if measurement else None,
        "failure": shown.failure,
        "fate": dict(shown.fate),
        "lineage": run.ancestor(shown),
    }


def _about(run: Run, shown: Trial, facts: Mapping[str, Any]) -> list[RenderableType]:
    place = ", the knee of the front" if facts["is_knee"] else ", on the front" if facts["on_front"] else ""
    lines: list[RenderableType] = [f"trial    {shown.number} of {run.campaign.name} ({run.location})"]
    reason = shown.failure or facts["stopped"]
    lines.append(f"state    {shown.state}{place}" + (f": {reason}" if reason else ""))
    ancestor = facts["lineage"]
    parent = "" if ancestor is None else f"; its stage started from trial {ancestor}"
    lines.append(
        f"from     stage {shown.stage + 1} ({run.proposer_of(shown)}), proposal {shown.index + 1}, knowing "
        f"{shown.known} results{parent}"
    )
    lines.append(f"operator {facts['operator']}")
    if descent := facts["descent"]:
        lines.append(f"descent  loss {descent['first_loss']:.4g} to {descent['last_loss']:.4g}")
    if shown.measurement:
        parts = ", ".join(f"{part} {duration(seconds)}" for part, seconds in facts["seconds"].items())
        lines.append(f"cost     {facts['cost']:.3g} full-evaluation equivalents ({parts})")
    if facts["issued"]:
        until = f", finished {local(facts['finished'])}" if facts["finished"] else ""
        lines.append(f"time     issued {local(facts['issued'])}{until}")
    extra = {key: value for key, value in shown.fate.items() if isinstance(value, str | int)}
    if extra:
        lines.append("fate     " + ", ".join(f"{key} {value}" for key, value in extra.items()))
    return lines


def _scores(run: Run, shown: Trial) -> list[dict[str, Any]]:
    """Return an objective a row: values, standard errors and 95 % intervals on both splits."""
    rows = []
    for objective in run.objectives:
        row: dict[str, Any] = {
            "objective": objective.name,
            "measure": objective.measure,
            "direction": objective.direction,
        }
        for split, measured in (("search", run.searched), ("test", run.tested)):
            measurement = measured.get(f"trial:{shown.number}")
            score = measurement.scores[objective.name] if measurement else None
            ends = [None, None]
            if score is not None and shown.state != "stopped":
                sources = run.sources("search" if split == "search" else "test")[objective.name]
                ends = score_intervals(score.items[None].astype(np.float64), sources)[0].tolist()
            row |= {split: score.value if score else None, f"{split}_stderr": score.stderr if score else None}
            row |= {f"{split}_low": ends[0], f"{split}_high": ends[1]}
        rows.append(row)
    return rows


def _score_columns() -> list[Column]:
    def value(split: str) -> Column:
        def text(row: Row) -> str:
            return "" if row[split] is None else f"{row[split]:z.3f} ±{short(row[f'{split}_stderr'])}"

        return Column(f"{split} items", text)

    def interval(split: str) -> Column:
        def text(row: Row) -> str:
            return "" if row[f"{split}_low"] is None else f"{row[f'{split}_low']:z.3f} to {row[f'{split}_high']:z.3f}"

        return Column("95 %", text)

    return [
        OBJECTIVE,
        Column("measure", lambda row: row["measure"], False),
        value("search"),
        interval("search"),
        value("test"),
        interval("test"),
    ]


def _differences(run: Run, shown: Trial) -> list[dict[str, Any]]:
    """Return what the trial gains and loses against each expert, the uniform average, and the best scalar."""
    others = [*(f"expert:{name}" for name in run.campaign.experts), "uniform"]
    others += [run.best_scalar] if run.tested else []
    subject = f"trial:{shown.number}"
    return [pair_row(subject, other, pair) for other in others for pair in compare_models(run, subject, other).pairs]


def _difference_table(run: Run, shown: Trial, differences: Sequence[Row]) -> Table:
    """Show the objectives that steer; the parts of summaries are in the JSON."""
    split = "test" if f"trial:{shown.number}" in run.tested else "search"
    columns = [Column("over", lambda row: label(row["other"]), False), OBJECTIVE, *difference_columns()]
    steering = {objective.name for objective in run.steering}
    rows = [row for row in differences if row["objective"] in steering]
    return make_table(f"less each model that was there before, on {split} items", columns, rows)


def _coefficients(numbers: Sequence[Row], *, everything: bool) -> list[RenderableType]:
    """Return the searched numbers as tables with bars, a parameter each: groups down, experts across."""
    found: list[RenderableType] = []
    for parameter in dict.fromkeys(row["parameter"] for row in numbers):
        of_it = [row for row in numbers if row["parameter"] == parameter]
        values = {(row["group"] or "all", row["expert"] or "all"): row["value"] for row in of_it}
        groups, experts = (list(dict.fromkeys(place)) for place in zip(*values, strict=True))
        largest = max(map(abs, values.values())) or 1.0
        shown = groups if everything else groups[:MAX_GROUPS]
        for start in range(0, len(experts), EXPERTS_ACROSS):
            some = experts[start : start + EXPERTS_ACROSS]
            rows = [{"group": group, **{e: values.get((group, e)) for e in some}} for group in shown]
            columns = [Column("group", lambda row: row["group"], False)]
            columns += [Column(expert, _bar_of(expert, largest), is_number=False) for expert in some]
            found.append(make_table(parameter, columns, rows))
        if len(shown) < len(groups):
            found.append(f"{len(groups) - len(shown)} more groups: --all")
    return found or ["nothing but the operator was searched"]


def _bar_of(expert: str, largest: float) -> Any:
    def text(row: Row) -> str:
        value = row[expert]
        return "" if value is None else f"{value:+z.3f} {_bar(value / largest)}"

    return text


def _bar(share: float) -> str:
    """Return a bar as long as a share of the largest number; of a negative one it is hatched."""
    eighths = round(abs(share) * BAR * 8)
    if share < 0:
        return "░" * max(1, round(eighths / 8))
    whole, rest = divmod(eighths, 8)
    return "█" * whole + (EIGHTHS[rest - 1] if rest else "")
