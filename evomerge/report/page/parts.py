"""The parts of a page, by name, as JSON: what a run's page shows at once, and what it asks for when it is looked at."""

import json
from typing import Any

from evomerge.driver.log import last_events
from evomerge.report.page.evidence import evidence, items, subject_items
from evomerge.report.page.overview import overview
from evomerge.report.page.surrogate import surrogate
from evomerge.run.run import Run

PARTS = ("overview", "evidence", "items", "surrogate", "log")
NUM_EVENTS = 200  # of the log, the latest


def part_json(run: Run, part: str, *, item_bytes: int = 0) -> str:
    """Return a part of a run's page as JSON.

    item_bytes: how much the scores of trials item by item may take; a page that can ask for them one by one needs none.
    """
    return _as_json(_part(run, part, item_bytes))


def trial_items_json(run: Run, number: int) -> str:
    """Return the scores of one trial item by item, in the form of the part ``items``. Raises: RunError without any."""
    subject = f"trial:{run.pick(trial=number).number}"
    return _as_json({"held": {split: {subject: packed} for split, packed in subject_items(run, subject).items()}})


def _as_json(content: Any) -> str:
    """No number in it is NaN: browsers would not read it."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def _part(run: Run, part: str, item_bytes: int) -> Any:
    if part == "items":
        return items(run, item_bytes)
    if part == "log":
        return last_events(run.location.called(run.campaign.name), NUM_EVENTS)
    return {"overview": overview, "evidence": evidence, "surrogate": surrogate}[part](run)
