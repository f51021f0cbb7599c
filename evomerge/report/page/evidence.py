"""What the items say: claims, intervals of every model that is compared, and the items' scores for comparing any two.

Shape letters: S subjects, N items, M objectives.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.errors import EvoMergeError
from evomerge.evaluators.lines import path_of, read_lines
from evomerge.evidence.intervals import score_intervals, student
from evomerge.evidence.scores import source_codes
from evomerge.front.front import maximized
from evomerge.front.pick import balance
from evomerge.records import Measurement, Objective, Split
from evomerge.report.page.arrays import Packed, pack, pack_bits
from evomerge.report.page.overview import reference_models
from evomerge.run.claims import claims
from evomerge.run.run import Run
from evomerge.run.volume import front_volume
from evomerge.splits import split_items

MAX_INTERVALS = 400  # models
MAX_TEXT = 300  # characters of an item that are shown
SPLITS: tuple[Split, ...] = ("search", "test")


def evidence(run: Run) -> dict[str, Any]:
    """Return what the items say of the front and the references.

    intervals: split -> objective by objective the 95 % intervals of references and members (S, 2); hypervolume: the
    front's with its error and the ends of its interval (4,), None without the base.
    """
    volume = front_volume(run) if "base" in run.searched else None
    return {
        "claims": claims(run),
        "intervals": {split: _intervals(run, split) for split in SPLITS},
        "hypervolume": volume and pack([volume.value, volume.stderr, *volume.interval]),
    }


def items(run: Run, most_bytes: int) -> dict[str, Any]:
    """Return what is the same for all models of a split, and the items' scores of references and of some trials.

    As many trials have them as fit in most_bytes of JSON: first the front's on the test items, then the best of all on
    the search items. References have room in any case.
    """
    held: dict[Split, dict[str, list[Packed]]] = {split: {} for split in SPLITS}
    for subject in reference_models(run):
        for split, packed in subject_items(run, subject).items():
            held[split][subject] = packed
    for split, subject in _trials_in_turn(run):
        packed = _packed_items(run, split, subject)
        most_bytes -= len(json.dumps(packed))
        if most_bytes < 0:
            break
        held[split][subject] = packed
    return {"frames": {split: _frames(run, split) if held[split] else [] for split in SPLITS}, "held": held}


def subject_items(run: Run, subject: str) -> dict[Split, list[Packed]]:
    """Return split -> the items' scores of a subject, objective by objective; of splits of which it saw all items."""
    return {
        split: _packed_items(run, split, subject)
        for split in SPLITS
        if (measurement := _measured(run, split).get(subject)) and not measurement.stopped
    }


def _trials_in_turn(run: Run) -> Iterator[tuple[Split, str]]:
    """Yield the front's members on test items, then all trials that saw every search item, the best balance first."""
    yield from (("test", subject) for subject in _in_turn(run, run.tested) if subject.startswith("trial:"))
    scored = [trial for trial in run.trials if trial.state == "scored"]
    if scored:
        values_NM = np.array([maximized(trial.measurement, run.objectives) for trial in scored if trial.measurement])
        yield from (("search", f"trial:{scored[n].number}") for n in np.argsort(-balance(values_NM), kind="stable"))


def _measured(run: Run, split: Split) -> dict[str, Measurement]:
    return run.tested if split == "test" else run.searched


def _intervals(run: Run, split: Split) -> dict[str, Any]:
    measured = _measured(run, split)
    subjects = list(_in_turn(run, measured))[:MAX_INTERVALS]
    sources = run.sources(split)
    found = [
        score_intervals(
            np.stack([measured[subject].scores[objective.name].items for subject in subjects]).astype(np.float64),
            sources[objective.name],
        )
        for objective in (run.objectives if subjects else ())
    ]
    return {"subjects": subjects, "ends": [pack(ends_S2.astype(np.float32)) for ends_S2 in found]}


def _in_turn(run: Run, measured: dict[str, Measurement]) -> Iterator[str]:
    """Yield the references, then the front's members: its knee, and the others spread from end to end."""
    members = [f"trial:{trial.number}" for trial in run.front]
    if members:
        members.insert(0, members.pop(run.front.index(run.pick(at_knee=True))))
    spread = np.argsort([_reversed_bits(place) for place in range(len(members))], kind="stable")
    for subject in (*reference_models(run), *(members[place] for place in spread)):
        if subject in measured:
            yield subject


def _reversed_bits(number: int) -> float:
    """Return van der Corput's number: places in the order of these are spread however many are taken."""
    return sum((number >> place & 1) * 0.5 ** (place + 1) for place in range(number.bit_length()))


def _packed_items(run: Run, split: Split, subject: str) -> list[Packed]:
    """Return a subject's scores item by item, an array an objective: bits where they are right or wrong."""
    scores = _measured(run, split)[subject].scores
    items_MN = [scores[objective.name].items for objective in run.objectives]
    return [pack_bits(items_N > 0) if np.isin(items_N, (0.0, 1.0)).all() else pack(items_N) for items_N in items_MN]


def _frames(run: Run, split: Split) -> list[dict[str, Any]]:
    texts = item_texts(run, split)
    return [_frame(run, objective, split, texts) for objective in run.objectives]


def _frame(run: Run, objective: Objective, split: Split, texts: dict[str, list[str]]) -> dict[str, Any]:
    """Return what is the same for all models: which source each item has, and what it is called."""
    sources = run.sources(split)[objective.name]
    codes_N = source_codes(sources)
    num_sources = int(codes_N.max()) + 1
    return {
        "codes": pack(codes_N),
        "factor": student(num_sources, 0.95) if num_sources > 1 else None,
        "sources": [str(source) for source in sources],
        "texts": texts.get(objective.task),
    }


def item_texts(run: Run, split: Split) -> dict[str, list[str]]:
    """Return task -> the text of each item of a split, where the evaluator's lines are at hand and still the same."""
    evaluation = run.campaign.evaluation
    measured = [objective for objective in run.objectives if not objective.summary]
    if evaluation.get("kind") not in ("language", "generation"):
        return {}
    try:
        lines = {
            task: read_lines(path_of(Path(evaluation["data"]), task), task, lambda _: None)
            for task in dict.fromkeys(objective.task for objective in measured)
        }
        sources = {task: [line["source"] for line in of_task] for task, of_task in lines.items()}
        splits = split_items(sources, run.campaign.split.shares(), run.campaign.seed)
    except (EvoMergeError, KeyError):
        return {}  # they have moved; the items' sources have to do
    chosen = {task: splits[task][split].tolist() for task in lines}
    expected = run.sources(split)
    if any([sources[o.task][item] for item in chosen[o.task]] != list(expected[o.name]) for o in measured):
        return {}
    return {task: [_text(lines[task][item]) for item in chosen[task]] for task in lines}


def _text(line: dict[str, Any]) -> str:
    """Return a line as it is read: prompt, then what is right."""
    parts: Sequence[Any] = (line.get("text") or line.get("prompt", ""), line.get("answer", ""))
    if "choices" in line:
        parts = (line["prompt"], line["choices"][line["gold"]])
    shown = " → ".join(str(part) for part in parts if part != "")
    return shown if len(shown) <= MAX_TEXT else shown[:MAX_TEXT] + " …"
