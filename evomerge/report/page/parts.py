"""The parts of a page, by name, as JSON: what a run's page shows at once, and what it asks for when it is looked at."""

import json
from typing import Any

from evomerge.driver.log import last_events
from evomerge.report.page.evidence import evidence, items
from evomerge.report.page.overview import overview
from evomerge.report.page.surrogate import surrogate
from evomerge.run.run import Run

PARTS = ("overview", "evidence", "items", "surrogate", "log")
NUM_EVENTS = 200  # of the log, the latest


def part_json(run: Run, part: str, *, item_bytes: int) -> str:
    """Return a part of a run's page as JSON, in which no number is NaN.

    item_bytes: how much the items' scores may take; references have room in any case.
    """
    return json.dumps(_part(run, part, item_bytes), allow_nan=False, separators=(",", ":"))


def _part(run: Run, part: str, item_bytes: int) -> Any:
    if part == "items":
        return items(run, item_bytes)
    if part == "log":
        return last_events(run.location.called(run.campaign.name), NUM_EVENTS)
    return {"overview": overview, "evidence": evidence, "surrogate": surrogate}[part](run)
