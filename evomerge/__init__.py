"""evomerge finds the coefficients with which fine-tuned checkpoints of one base model should be merged.

    import evomerge

    campaign = evomerge.read_campaign("campaign.yaml")
    run = evomerge.search(campaign, "runs/mine")     # starts, resumes, or finds it finished
    run = evomerge.open("runs/mine")                 # looks on; evomerge.open("postgresql://host/merges#mine") too
    run.front_frame()                                # pandas: scores, errors, coefficients, a row a model
    evomerge.figures.front(run).show()               # Plotly
    best = run.pick(preference={"math": 2, "chat": 1}, minimum={"chat": 0.7})
    model, tokenizer = run.materialize(best)         # a live transformers model

Importing the package loads nothing heavy; the names below are imported when they are first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evomerge.campaign.campaign import Campaign, read_campaign
    from evomerge.errors import EvoMergeError, InputError
    from evomerge.front.front import Front
    from evomerge.report import figures
    from evomerge.run.run import Run
    from evomerge.run.run import open_run as open  # noqa: A004  (within the package, open is Python's own)
    from evomerge.run.search import search

__all__ = ["Campaign", "EvoMergeError", "Front", "InputError", "Run", "figures", "open", "read_campaign", "search"]

_HOMES = {
    "Campaign": "campaign.campaign:Campaign",
    "read_campaign": "campaign.campaign:read_campaign",
    "EvoMergeError": "errors:EvoMergeError",
    "Front": "front.front:Front",
    "InputError": "errors:InputError",
    "Run": "run.run:Run",
    "figures": "report.figures:",
    "open": "run.run:open_run",
    "search": "run.search:search",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'evomerge' has no attribute {name!r}")
    module, _, held = _HOMES[name].partition(":")
    found = import_module(f"evomerge.{module}")
    return getattr(found, held) if held else found


def __dir__() -> list[str]:
    return __all__
