"""Two models or two runs side by side, and a model on tasks that its campaign did not have."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from evomerge.errors import RunError
from evomerge.evidence.pairs import Pair
from evomerge.records import Measurement, Objective
from evomerge.report.tables import Column, Row, Shown, estimate_cells, make_table, signed, with_error
from evomerge.run.comparison import ModelComparison, RunComparison, compare_models, compare_runs, subject_of
from evomerge.run.rescore import Rescored
from evomerge.run.run import Run, open_run

FOOTNOTE = "± is one standard error, ranges are 95 % intervals; paired by item and clustered by source"
OBJECTIVE = Column("objective", lambda row: row["objective"] + (" ↓" if row["direction"] == "min" else ""), False)


def comparison(place: str, one: str, other: str | None) -> Shown:
    """Return two models of a run by their names, or two runs by their places. Raises: RunError."""
    run = open_run(place)
    if other is not None:
        return model_comparison(run, compare_models(run, subject_of(run, one), subject_of(run, other)))
    if one == "knee" or one.isdecimal():
        raise RunError(f"compare {place} {one}: expected a second model of that run, such as knee or uniform")
    return run_comparison(compare_runs(run, open_run(one)))


def model_comparison(run: Run, compared: ModelComparison) -> Shown:
    """Return two models of a run, objective by objective."""
    rows = [pair_row(compared.ours, compared.theirs, pair) for pair in compared.pairs]
    ours, theirs = (label(subject) for subject in (compared.ours, compared.theirs))
    columns = [
        OBJECTIVE,
        Column(ours, lambda row: with_error(row["value"], row["stderr"])),
        Column(theirs, lambda row: with_error(row["other_value"], row["other_stderr"])),
        *difference_columns(),
    ]
    table = make_table(f"{run.campaign.name}: {ours} less {theirs}, on {compared.split} items", columns, rows)
    facts = {"run": run.location, "split": compared.split, "model": compared.ours, "other": compared.theirs}
    return Shown(tables={"objectives": rows}, facts=facts, people=[table, FOOTNOTE])


def pair_row(ours: str, theirs: str, pair: Pair) -> dict[str, Any]:
    """Return two models in one objective as a row; the difference is ours less theirs, in the user's own sign."""
    sign = pair.objective.sign
    low, high = sorted(sign * end for end in pair.interval)
    return {
        "model": ours,
        "other": theirs,
        "objective": pair.objective.name,
        "direction": pair.objective.direction,
        "value": pair.ours.value,
        "stderr": pair.ours.stderr,
        "other_value": pair.theirs.value,
        "other_stderr": pair.theirs.stderr,
        "difference": sign * pair.gain.value,
        "difference_stderr": pair.gain.stderr,
        "difference_low": low,
        "difference_high": high,
        "items": pair.num_items,
        "items_gained": pair.num_gained,
        "items_lost": pair.num_lost,
        "verdict": pair.verdict,
    }


def difference_columns() -> list[Column]:
    """Return how people read a difference, where it comes from, and whether it is beyond noise."""
    return [
        Column("difference", lambda row: signed(row["difference"], row["difference_stderr"])),
        Column("95 %", lambda row: f"{row['difference_low']:+z.3f} to {row['difference_high']:+z.3f}"),
        Column("items", _won_and_lost),
        Column("beyond noise", lambda row: "" if row["verdict"] == "alike" else row["verdict"], False),
    ]


def _won_and_lost(row: Row) -> str:
    return "" if row["items_gained"] is None else f"+{row['items_gained']} -{row['items_lost']} of {row['items']}"


def label(subject: str) -> str:
    """How a subject is shown: ``trial 12``, ``expert rot90``, ``uniform``."""
    return subject.replace(":", " ")


def run_comparison(compared: RunComparison) -> Shown:
    """Return two runs: how much of each other's front they cover, and their hypervolumes above one reference point."""
    volumes = {
        "hypervolume_at_equal_cost": compared.at_equal_cost,
        "hypervolume": compared.hypervolume,
        "hypervolume_on_test": compared.on_test,
    }
    rows = [
        {
            "run": str(side.run.location),
            "campaign": side.run.campaign.name,
            "trials": side.num_trials,
            "cost": side.cost,
            "on_front": side.num_on_front,
            "coverage": side.coverage,
            **{
                key: value
                for name, of_both in volumes.items()
                for key, value in estimate_cells(name, of_both.sides[i] if of_both else None).items()
            },
        }
        for i, side in enumerate(compared.sides)
    ]
    differences = [
        {"of": name, **estimate_cells("difference", of_both.difference), "verdict": of_both.difference.verdict}
        for name, of_both in volumes.items()
        if of_both
    ]
    columns = [
        Column("run", lambda row: row["run"], False),
        Column("trials", lambda row: str(row["trials"])),
        Column("cost", lambda row: f"{row['cost']:.0f}"),
        Column("front", lambda row: str(row["on_front"])),
        Column("covers", lambda row: "" if row["coverage"] != row["coverage"] else f"{row['coverage']:.0%}"),
    ]
    names = ", ".join(objective.name for objective in compared.objectives)
    point = ", ".join(f"{name} {value:.4g}" for name, value in compared.reference.items())
    together = "paired over items, which both runs were scored on"
    apart = "of independent runs, which were scored on other items or other splits of them: small ones say nothing"
    notes = [
        "covers: how much of the other run's front a model of this one matches or surpasses in every objective",
        f"hypervolumes above {point}; equivalents: what both runs can afford, in full evaluations",
        "± is one standard error, ranges are 95 % intervals: sources of items are drawn anew, the fronts stay; noise "
        "makes a hypervolume larger, so its interval lies lower; on search items, which picked the fronts, all flatter",
        f"differences are {together if compared.has_same_items else apart}",
    ]
    facts = {
        "objectives": [objective.name for objective in compared.objectives],
        "reference": compared.reference,
        "equal_cost": compared.equal_cost,
        "same_items": compared.has_same_items,
    }
    table = make_table(f"two runs in {names}", columns, rows)
    return Shown(
        tables={"runs": rows, "differences": differences},
        facts=facts,
        people=[table, _volume_table(compared), *map(Text, notes)],
    )


def _volume_table(compared: RunComparison) -> Table:
    """Return the hypervolumes as people read them: each run's, and the first less the second."""
    titles = {
        f"search, {compared.equal_cost:.0f} equivalents": compared.at_equal_cost,
        "search, whole run": compared.hypervolume,
        "test": compared.on_test,
    }
    names = [str(side.run.location) for side in compared.sides]
    rows = []
    for title, of_both in titles.items():
        if of_both:
            rows += [
                {"title": title, "of": names[0], "estimate": of_both.sides[0]},
                {"title": "", "of": names[1], "estimate": of_both.sides[1]},
                {
                    "title": "",
                    "of": "difference",
                    "estimate": of_both.difference,
                    "verdict": of_both.difference.verdict,
                },
            ]

    def ends(row: Row) -> str:
        low, high = row["estimate"].interval
        return f"{low:.3g} to {high:.3g}"

    columns = [
        Column("hypervolume", lambda row: row["title"], False),
        Column("of", lambda row: row["of"], False),
        Column("value", lambda row: f"{row['estimate'].value:.4g} ±{row['estimate'].stderr:.2g}"),
        Column("95 %", ends),
        Column("beyond noise", lambda row: "" if row.get("verdict", "alike") == "alike" else row["verdict"], False),
    ]
    return make_table("", columns, rows)


def rescored(run: Run, found: Rescored) -> Shown:
    """Return a model beside base, experts, uniform average and best scalar on further tasks."""
    subject = f"trial:{found.trial.number}"
    models = [_model_row(name, measured, found.objectives) for name, measured in found.measured.items()]
    rows = [pair_row(subject, found.best_experts[pair.objective.name], pair) for pair in found.pairs]
    columns = [Column("model", lambda row: label(row["model"]), False)]
    columns += [_score_column(objective) for objective in found.objectives]
    scores = make_table(
        f"{run.campaign.name}: {label(subject)} on tasks that its campaign did not have",
        columns,
        models,
        faint=lambda row: row["model"] != subject,
    )
    beside = [
        OBJECTIVE,
        Column("best expert", lambda row: label(row["other"]).removeprefix("expert "), False),
        *difference_columns(),
    ]
    counts = ", ".join(f"{count} of {task}" for task, count in found.num_items.items())
    notes = [
        FOOTNOTE,
        f"every item was scored ({counts}): nothing was picked by these numbers, and none of them enters the record",
    ]
    return Shown(
        tables={"models": models, "objectives": rows},
        facts={"run": run.location, "model": subject, "items": found.num_items},
        people=[scores, make_table(f"{label(subject)} less the best expert", beside, rows), *map(Text, notes)],
    )


def _model_row(subject: str, measured: Measurement, objectives: Sequence[Objective]) -> Mapping[str, Any]:
    cells: dict[str, Any] = {"model": subject}
    for objective in objectives:
        score = measured.scores[objective.name]
        cells |= {f"value/{objective.name}": score.value, f"stderr/{objective.name}": score.stderr}
    return cells


def _score_column(objective: Objective) -> Column:
    name = objective.name
    head = name + (" ↓" if objective.direction == "min" else "")
    return Column(head, lambda row: with_error(row[f"value/{name}"], row[f"stderr/{name}"]))
