"""The parts of a page, by name, as JSON: what a run's page shows at once, and what it asks for when it is looked at."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from evomerge.report.page.evidence import evidence, items
from evomerge.report.page.overview import overview
from evomerge.report.page.surrogate import surrogate
from evomerge.run import Run

PARTS: Mapping[str, Callable[[Run], Any]] = {
    "overview": overview,
    "evidence": evidence,
    "items": items,
    "surrogate": surrogate,
}


def part_json(run: Run, part: str) -> str:
    """Return a part of a run's page as JSON, in which no number is NaN."""
    return json.dumps(PARTS[part](run), allow_nan=False, separators=(",", ":"))
