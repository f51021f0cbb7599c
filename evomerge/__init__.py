"""evomerge finds the coefficients with which fine-tuned checkpoints of one base model should be merged.

    import evomerge

    campaign = evomerge.read_campaign("campaign.yaml")
    run = evomerge.search(campaign, "runs/mine")
    run = evomerge.open_run("runs/mine")
    best = run.pick(preference={"math": 2, "chat": 1})

Importing the package loads nothing heavy; the names below are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.campaign import Campaign, read_campaign
    from evomerge.errors import EvoMergeError, InputError
    from evomerge.run import Run, open_run, search

__all__ = ["Campaign", "EvoMergeError", "InputError", "Run", "open_run", "read_campaign", "search"]

_HOMES = {
    "Campaign": "campaign",
    "read_campaign": "campaign",
    "EvoMergeError": "errors",
    "InputError": "errors",
    "Run": "run",
    "open_run": "run",
    "search": "run",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'evomerge' has no attribute {name!r}")
    return getattr(import_module(f"evomerge.{_HOMES[name]}"), name)
