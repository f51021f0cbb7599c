"""The head of a model card: what Hugging Face's hub reads of it, and nothing that is not known.

https://github.com/huggingface/hub-docs/blob/main/modelcard.md
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evomerge.campaign.campaign import HUB_ID
from evomerge.evidence.intervals import score_intervals
from evomerge.materialize.checkpoint import hub_id
from evomerge.records import Objective, Score, Split, Trial
from evomerge.run.run import Run

PIPELINES = {  # ending of an architecture's name -> the hub's name of what the model does
    "ForCausalLM": "text-generation",
    "ForImageClassification": "image-classification",
    "ForMaskedLM": "fill-mask",
    "ForQuestionAnswering": "question-answering",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ViTModel": "image-feature-extraction",
}
LICENSE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True, slots=True)
class Input:
    """A checkpoint that was merged: where the campaign says it is, and the folder it was read from."""

    location: str
    folder: Path

    @property
    def hub_id(self) -> str | None:
        """Its id on the hub, if it came from there; the hub refuses a card that names a folder as a base model."""
        is_id = HUB_ID.fullmatch(self.location) and not Path(self.location).is_dir()
        return self.location if is_id else hub_id(self.folder)

    @property
    def license(self) -> dict[str, str]:
        """What the head of its own card says of its licence; empty if that is not known."""
        try:
            text = (self.folder / "README.md").read_text(encoding="utf-8")
            head = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else {}
        except (OSError, UnicodeError, yaml.YAMLError, IndexError):
            return {}
        found = head if isinstance(head, Mapping) and head.get("license") else {}
        return {key: str(found[key]) for key in LICENSE_KEYS if found.get(key)}


def public_names(inputs: Mapping[str, Input]) -> dict[str, str]:
    """Return how others may know each input: by its id on the hub, or by the name of its folder alone.

    Where two folders have the same name, such as checkpoint-500, all of them are called as the campaign calls them.
    """
    folders = {name: model.folder.name for name, model in inputs.items() if not model.hub_id}
    is_clear = len(set(folders.values())) == len(folders)
    return {name: model.hub_id or (folders[name] if is_clear else name) for name, model in inputs.items()}


def pipeline_tag(architecture: str) -> str | None:
    """Return what a model of this architecture does, in the hub's words."""
    return next((tag for ending, tag in PIPELINES.items() if architecture.endswith(ending)), None)


def metadata(
    run: Run, trial: Trial, inputs: Mapping[str, Input], architecture: str, *, is_adapter: bool
) -> dict[str, Any]:
    """Return the head's keys; inputs by name, the base first.

    base_model lists the inputs that the hub has, an adapter's the base alone. A licence is stated if all inputs state
    the same. Results are those of the test items, with the item count, standard error and 95 % interval as arguments
    of the metric; of a trial that was not scored on them, those of the search items, and the metric's name says so.
    """
    models = list(inputs.values())[:1] if is_adapter else list(inputs.values())
    ids = [model.hub_id for model in models if model.hub_id]
    licenses = [model.license for model in inputs.values()]
    tag = pipeline_tag(architecture)
    return {
        **(licenses[0] if all(found == licenses[0] for found in licenses) else {}),
        **({"base_model": ids, "base_model_relation": "adapter" if is_adapter else "merge"} if ids else {}),
        "library_name": "peft" if is_adapter else "transformers",
        **({"pipeline_tag": tag} if tag else {}),
        "tags": ["merge", "evomerge", *run.campaign.operator_names],
        "model-index": [{"name": f"{run.campaign.name}-trial-{trial.number}", "results": _results(run, trial, tag)}],
    }


def interval(run: Run, split: Split, objective: Objective, score: Score) -> tuple[float, float] | None:
    """Return the 95 % interval of a score; None where the items are of one source, which says nothing of others."""
    items_KN = np.asarray(score.items, dtype=np.float64)[None]
    low, high = map(float, score_intervals(items_KN, run.sources(split)[objective.name])[0])
    return (low, high) if math.isfinite(low) and math.isfinite(high) else None


def _results(run: Run, trial: Trial, tag: str | None) -> list[dict[str, Any]]:
    """Return one result a task, with every metric that the campaign had of it; summaries are no metrics of a task."""
    subject = f"trial:{trial.number}"
    split: Split = "test" if subject in run.tested else "search"
    measurement = (run.tested if split == "test" else run.searched)[subject]
    tasks: dict[str, list[dict[str, Any]]] = {}
    for objective in run.objectives:
        if objective.summary:
            continue
        score = measurement.scores[objective.name]
        arguments: dict[str, Any] = {"num_items": len(score.items), "direction": objective.direction}
        if math.isfinite(score.stderr):
            arguments["stderr"] = score.stderr
        # A race leaves items out, and its estimate has no interval.
        ends = None if measurement.stopped else interval(run, split, objective, score)
        if ends:
            arguments["interval_95"] = list(ends)
        name = f"{objective.metric}, held-out test items" if split == "test" else f"{objective.metric}, search items"
        name += "" if split == "test" else " (optimistic: they steered the choice)"
        tasks.setdefault(objective.task, []).append(
            {"type": objective.metric, "name": name, "value": score.value, "args": arguments}
        )
    return [
        {
            "task": {"type": tag or "other", "name": task},
            "dataset": {"type": task, "name": task, "split": split},
            "metrics": metrics,
        }
        for task, metrics in tasks.items()
    ]
