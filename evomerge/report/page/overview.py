"""What the page shows of a run at once: its trials in columns, its front, the references, hypervolume over cost.

Shape letters: N trials, M objectives, S subjects.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from evomerge.front.front import maximized, violation
from evomerge.front.so_far import SoFar
from evomerge.records import Descent, Floats, Measurement, Objective, Trial, in_order
from evomerge.report.page.arrays import Packed, pack, pack_columns
from evomerge.run.claims import use_of_test_items
from evomerge.run.run import Run
from evomerge.run.times import times_of

STATES = ("waiting", "failed", "stopped", "out of bounds", "dominated", "front")
NUM_STEPS = 80  # of the curve


def overview(run: Run) -> dict[str, Any]:
    """Return the run as JSON."""
    holder = run.ledger.holder()
    references = reference_models(run)
    return {
        "name": run.campaign.name,
        "command": run.location.quoted,
        "state": "running" if holder else "finished" if run.is_finished else "stopped",
        "holder": str(holder) if holder else None,
        "written": run.ledger.last_written(),
        "budget": run.campaign.budget.evaluations,
        "cost": run.cost,
        "dimensions": run.dimensions,
        "operators": run.operator_names,
        "experts": list(run.campaign.experts),
        "objectives": [_objective(objective) for objective in run.objectives],
        "use_of_test_items": use_of_test_items(run),
        "lineage": run.lineage,
        "stages": _stages(run),
        "states": STATES,
        "trials": _trials(run),
        "numbers": _numbers(run),
        "front": [trial.number for trial in run.front],
        "references": references,
        "search": scores(run.searched, references, run.objectives),
        "test": scores(run.tested, [*references, *_members(run)], run.objectives),
        "hypervolume": _hypervolume(run),
        "seconds": run.seconds,
        "times": asdict(times_of(run.trials)),
    }


def reference_models(run: Run) -> list[str]:
    """Return the names of base, experts, uniform average and the best single coefficient, by search items."""
    scalars = [subject for subject in run.searched if subject.startswith("scalar:")]
    others = [subject for subject in run.searched if not subject.startswith(("scalar:", "trial:"))]
    best = sorted(scalars, key=lambda subject: -float(maximized(run.searched[subject], run.objectives).mean()))
    return [*others, *best[:1]]


def _members(run: Run) -> list[str]:
    return [f"trial:{trial.number}" for trial in run.front]


def scores(
    measured: Mapping[str, Measurement], subjects: Iterable[str], objectives: Sequence[Objective]
) -> dict[str, Any]:
    """Return those of the subjects that are measured, with values and standard errors (S, M) in the user's sign."""
    found = [subject for subject in subjects if subject in measured]
    rows = [[measured[subject].scores[objective.name] for objective in objectives] for subject in found]
    return {
        "subjects": found,
        "values": pack(np.array([score.value for row in rows for score in row], dtype=np.float64)),
        "errors": pack(np.array([score.stderr for row in rows for score in row], dtype=np.float32)),
    }


def _objective(objective: Objective) -> dict[str, Any]:
    return {
        "name": objective.name,
        "measure": objective.measure,
        "sign": objective.sign,
        "steers": objective.steers,
        "floor": objective.floor,
        "ceiling": objective.ceiling,
    }


def _stages(run: Run) -> list[str]:
    """Name each stage that has begun: by its proposer where the file says it, else by what its trials did."""
    search, titles = run.campaign.search, []
    for number in range(len(run.changes)):
        if not isinstance(search, str):
            titles.append(search[number].proposer)
        else:
            descends = any(trial.candidate.descent for trial in run.trials if trial.stage == number)
            titles.append("auto: descent" if descends else "auto: surrogate")
    return titles


def _trials(run: Run) -> dict[str, Any]:
    """Return the trials column by column; what only few have by number."""
    trials, measurements = run.trials, [trial.measurement for trial in run.trials]
    fates = [str(trial.fate.get("worker", "")) for trial in trials]
    return {
        "count": len(trials),
        "stage": pack([trial.stage for trial in trials]),
        "index": pack([trial.index for trial in trials]),
        "known": pack([trial.known for trial in trials]),
        "order": pack([-1 if trial.order is None else trial.order for trial in trials]),
        "state": pack(_states(run)),
        "cost": pack(np.array([m.cost if m else np.nan for m in measurements], dtype=np.float32)),
        "seconds": pack(np.array([sum(m.seconds.values()) if m else np.nan for m in measurements], dtype=np.float32)),
        "operator": pack([run.operator_names.index(run.operator_of(trial)) for trial in trials]),
        "values": [pack(_column(measurements, objective.name, "value")) for objective in run.objectives],
        "errors": [
            pack(_column(measurements, objective.name, "stderr").astype(np.float32)) for objective in run.objectives
        ],
        "worker": _coded(fates),
        "failure": _coded([trial.failure or "" for trial in trials]),
        "stopped": _coded([(m.stopped or "") if m else "" for m in measurements]),
        "descents": {
            str(trial.number): _descended(trial.candidate.descent, trial.measurement)
            for trial in trials
            if trial.candidate.descent
        },
    }


def _states(run: Run) -> list[int]:
    """Return the place of each trial's state among STATES."""
    members = {trial.number for trial in run.front}
    return [STATES.index(_state(trial, run.objectives, trial.number in members)) for trial in run.trials]


def _state(trial: Trial, objectives: Sequence[Objective], is_member: bool) -> str:
    if trial.failure is not None:
        return "failed"
    if trial.measurement is None:
        return "waiting"
    if trial.measurement.stopped:
        return "stopped"
    if violation(trial.measurement, objectives):
        return "out of bounds"
    return "front" if is_member else "dominated"


def _column(measurements: Sequence[Measurement | None], objective: str, what: str) -> Floats:
    return np.array([getattr(m.scores[objective], what) if m else np.nan for m in measurements], dtype=np.float64)


def _coded(texts: Sequence[str]) -> dict[str, Any]:
    """Return each text once, and which one each trial has."""
    known = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    return {"texts": list(known), "codes": pack([known[text] for text in texts])}


def _descended(descent: Descent | None, measurement: Measurement | None) -> str:
    """Say what a descent did."""
    assert descent is not None
    loss = descent.loss if isinstance(descent.loss, str) else ", ".join(sorted(set(descent.loss.values())))
    losses = measurement.arrival.losses if measurement and measurement.arrival else ()
    goes_one_way = losses and not descent.anchors  # of a whole front, each step has a preference of its own
    ends = f", {losses[0]:.4g} to {losses[-1]:.4g}" if goes_one_way else ""
    return f"{descent.steps} steps of {descent.rule} down the loss {loss}{ends}"


def _numbers(run: Run) -> dict[str, Any]:
    """Return the numbers of every trial, trials of the same dimensions together.

    names: parameter, expert and group of every dimension that there is; of: for each layout its dimensions, the
    trials that have it, and their numbers.
    """
    names: dict[tuple[str, str, str], int] = {}
    layouts: dict[tuple[int, ...], tuple[list[int], list[list[float]]]] = {}
    for trial in run.trials:
        found = run.numbers_of(trial)
        keys = [(dimension["parameter"], dimension["expert"] or "", dimension["group"] or "") for dimension, _ in found]
        places = tuple(names.setdefault(key, len(names)) for key in keys)
        trials, rows = layouts.setdefault(places, ([], []))
        trials.append(trial.number)
        rows.append([number for _, number in found])
    return {"names": list(names), "of": [_layout(places, *held) for places, held in layouts.items()]}


def _layout(places: tuple[int, ...], trials: list[int], rows: list[list[float]]) -> dict[str, Any]:
    numbers_ND = np.array(rows, dtype=np.float64).reshape(len(rows), len(places))
    return {"dimensions": pack(places), "trials": pack(trials), "numbers": pack_columns(numbers_ND)}


def _hypervolume(run: Run) -> dict[str, Packed] | None:
    """Return the cost and the hypervolume above the base at some steps of the search; None without the base."""
    finished = in_order(run.trials)
    if "base" not in run.searched or not finished:
        return None
    costs = np.cumsum([trial.measurement.cost if trial.measurement else 0.0 for trial in finished])
    steps = sorted({int(step) for step in np.linspace(1, len(finished), NUM_STEPS)})
    so_far, volumes, before = SoFar(run.objectives, run.searched["base"]), [], 0
    for step in steps:
        for trial in finished[before:step]:
            so_far.add(trial)
        volumes.append(so_far.volume)
        before = step
    return {"cost": pack(costs[np.array(steps) - 1]), "volume": pack(np.array(volumes, dtype=np.float64))}
