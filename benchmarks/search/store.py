"""Finished runs on disk: one JSON file each, named after what defines it, and written whole or not at all."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.search.problem import Problem
from benchmarks.search.trace import Step, Trace
from evomerge.campaign.sections import SpaceChanges
from evomerge.campaign.stages import Stage
from evomerge.records import digest

FORMAT = 1  # of the files; a change makes every run new


@dataclass(frozen=True)
class Task:
    """One run: a searcher's stages on a problem with a seed."""

    problem: Problem
    searcher: str
    stages: Sequence[Stage]
    seed: int
    budget: int

    def path(self, folder: Path) -> Path:
        """Return where the finished run lies.

        The name holds a hash of problem, stages with all their options, seed and budget, but not of any code: after a
        change of a proposer, run it again.
        """
        return folder / f"{self.problem.name.replace(':', '-')}-{self.seed}-{digest(self._identity())[:16]}.json"

    def save(self, folder: Path, trace: Trace) -> None:
        """Write the finished run."""
        folder.mkdir(parents=True, exist_ok=True)
        path = self.path(folder)
        record = {**self._identity(), "references": trace.references, "steps": [asdict(step) for step in trace.steps]}
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.replace(path)

    def load(self, folder: Path) -> Trace | None:
        """Return the finished run, None if there is none."""
        path = self.path(folder)
        if not path.exists():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return Trace([Step(**step) for step in record["steps"]], record["references"])

    def _identity(self) -> dict[str, Any]:
        stages = [
            [stage.proposer, stage.options.model_dump(), stage.num_evaluations]
            + ([stage.changes.model_dump(mode="json")] if stage.changes != SpaceChanges() else [])
            for stage in self.stages
        ]
        return {
            "format": FORMAT,
            "problem": {"name": self.problem.name, **self.problem.identity},
            "stages": stages,
            "seed": self.seed,
            "budget": self.budget,
        }
