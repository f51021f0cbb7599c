"""What a builder hands back, and the two files that describe a finished family: family.json and campaign.yaml."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from evomerge.families.recipes import RECIPE_VERSION, Recipe, library_versions, recipe_hash

Scores = dict[str, dict[str, float]]
"""Model (base, every expert, uniform) -> task -> score on all held-out items."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A family whose checkpoints and data lie on disk, before it is described."""

    experts: tuple[str, ...]
    metrics: dict[str, str]  # every task that was scored -> its metric
    objectives: tuple[str, ...]  # the tasks that the campaign searches
    evaluation: str  # kind of evaluator: classification or language
    scores: Scores
    num_items: dict[str, int]
    num_parameters: int
    seconds: dict[str, float]  # CPU seconds by part
    notes: tuple[str, ...] = ()


def write_campaign(folder: Path, name: str, built: Built) -> None:
    """Write a campaign that runs as it stands; its paths are relative to the file."""
    campaign = {
        "name": name,
        "base": "base",
        "experts": {expert: f"experts/{expert}" for expert in built.experts},
        "operator": {"name": "task_arithmetic"},
        "space": {"groups": "layer", "coefficient": {"low": -0.2, "high": 1.2, "start": 0.3}},
        "objectives": [{"name": task, "task": task, "metric": built.metrics[task]} for task in built.objectives],
        "evaluation": {
            "kind": built.evaluation,
            "data": "data",
            "split": {"adapt": 0.2, "search": 0.4, "test": 0.4},
        },
        "search": "auto",
        "budget": {"evaluations": 60},
        "seed": 0,
    }
    text = yaml.safe_dump(campaign, sort_keys=False, default_flow_style=None, width=120)
    (folder / "campaign.yaml").write_text(text, encoding="utf-8")


def write_description(folder: Path, name: str, recipe: Recipe, built: Built, wall_s: float) -> None:
    """Write family.json, the last file of a build: what was built, from what, at what cost, and how it scores."""
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    description = {
        "name": name,
        "hash": recipe_hash(name, recipe),
        "recipe": asdict(recipe),
        "recipe_version": RECIPE_VERSION,
        "libraries": library_versions(),
        "num_parameters": built.num_parameters,
        "experts": built.experts,
        "objectives": built.objectives,
        "metrics": built.metrics,
        "scores": built.scores,
        "num_items": built.num_items,
        "notes": built.notes,
        "cpu_seconds": {**built.seconds, "total": round(sum(built.seconds.values()), 2)},
        "wall_s": round(wall_s, 2),
        "files": files,
    }
    (folder / "family.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def write_items(path: Path, items: Iterable[Mapping[str, object]]) -> int:
    """Write one JSON object a line and return how many there were."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(item, ensure_ascii=True) for item in items]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)
