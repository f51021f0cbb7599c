"""What the items say: claims, intervals of every model that is compared, and the items' scores for comparing any two.

Shape letters: S subjects, N items.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.errors import EvoMergeError
from evomerge.evaluators.lines import path_of, read_lines
from evomerge.evidence.intervals import score_intervals, student
from evomerge.evidence.scores import source_codes
from evomerge.records import Measurement, Objective, Split
from evomerge.report.page.arrays import Packed, pack, pack_bits
from evomerge.report.page.overview import reference_models
from evomerge.run.claims import claims
from evomerge.run.run import Run
from evomerge.splits import split_items

MAX_INTERVALS = 400  # models
MAX_TEXT = 300  # characters of an item that are shown


def evidence(run: Run) -> dict[str, Any]:
    """Return the claims, and split -> objective by objective the 95 % intervals of references and members (S, 2)."""
    splits: list[Split] = ["search", "test"]
    return {"claims": claims(run), "intervals": {split: _intervals(run, split) for split in splits}}


def items(run: Run, most_bytes: int) -> dict[str, Any]:
    """Return the items' scores of the references and of as many of the front's members as have room, packed.

    They are those of the test items, or of the search items where the front is not scored on the test items yet.
    """
    split: Split = "test" if run.tested else "search"
    measured = run.tested or run.searched
    held: dict[str, list[Packed]] = {}
    size = 0
    for subject in _in_turn(run, measured):
        packed = [_packed_items(measured[subject], objective) for objective in run.objectives]
        size += sum(len(of_objective["data"]) for of_objective in packed)
        if size > most_bytes and subject.startswith("trial:"):
            break
        held[subject] = packed
    texts = item_texts(run, split)
    return {
        "split": split,
        "objectives": [_frame(run, objective, split, texts) for objective in run.objectives] if held else [],
        "subjects": held,
    }


def _intervals(run: Run, split: Split) -> dict[str, Any]:
    measured = run.tested if split == "test" else run.searched
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


def _packed_items(measurement: Measurement, objective: Objective) -> Packed:
    numbers = measurement.scores[objective.name].items
    if np.isin(numbers, (0.0, 1.0)).all():
        return pack_bits(numbers > 0)
    return pack(numbers)


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
