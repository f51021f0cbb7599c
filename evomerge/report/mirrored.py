"""A run as an Optuna study: what was added, and how to look at it."""

from evomerge.ledger.location import locate
from evomerge.report.tables import Shown
from evomerge.run.run import Run


def mirrored(run: Run, url: str, study: str, counts: tuple[int, int]) -> Shown:
    """Return how many trials were added to a study, and how many it holds now; the storage without its password."""
    (num_added, num_held), storage = counts, str(locate(url))
    return Shown(
        facts={"run": run.location, "storage": storage, "study": study, "num_added": num_added, "num_held": num_held},
        people=[
            f"mirrored {num_added} trials added to the study {study}, which holds {num_held}",
            f"next     pip install optuna-dashboard && optuna-dashboard {storage}",
        ],
    )
