"""Per-layer search on the harder four digit tasks, against the uniform average and the best single coefficient.

    make bench-digits

For every searcher and seed (the seed also splits the items anew): the candidate with the best mean on search items,
its mean on test items, and its paired difference to both reference models with the standard error, clustered by image.
All searchers get about the same cost in full-evaluation equivalents; every searcher is shown.
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.families.family import make
from evomerge.records import Trial
from evomerge.run.run import Run
from evomerge.run.search import search

SEEDS = (0, 1, 2)
DESCENT = {"loss": "ce", "steps": 25, "learning_rate": 1e-2}
SEARCHERS: dict[str, list[dict[str, Any]] | int] = {  # stages, or for ``search: auto`` the number of evaluations
    "sobol": [{"proposer": "sobol", "evaluations": 240}],
    "tpe": [{"proposer": "tpe", "evaluations": 240}],
    "nsga2": [{"proposer": "nsga2", "evaluations": 240}],
    "cma_es": [{"proposer": "cma_es", "evaluations": 240}],
    "adamerging (entropy)": [{"proposer": "adamerging", "evaluations": 31, "options": {"steps": 50}}],
    "adamerging (ce), then cma_es": [
        {"proposer": "adamerging", "evaluations": 8, "options": DESCENT},
        {"proposer": "cma_es", "evaluations": 205, "options": {"sigma": 0.08}},
    ],
    "auto": 220,
}


def main() -> None:
    """Run every searcher with every seed and print the table."""
    family = make("digits4", Path(".cache/families/digits4"))
    table = Table(
        title="digits4, 32 coefficients: the best candidate on search items, scored on test items", box=SIMPLE_HEAD
    )
    columns = (
        "searcher",
        "seed",
        "cost",
        "wall s",
        "search",
        "test",
        "scalar",
        "over scalar",
        "SEs",
        "over uniform",
        "SEs",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "searcher" else "right")
    for name, stages in SEARCHERS.items():
        for seed in SEEDS:
            table.add_row(name, str(seed), *_measure(family.campaign, stages, seed))
            print(f"measured {name}, seed {seed}", file=sys.stderr)
    Console(width=130).print(table)


def _measure(campaign_file: Path, stages: list[dict[str, Any]] | int, seed: int) -> list[str]:
    sections = read_campaign(campaign_file).model_dump()
    if isinstance(stages, int):
        sections |= {"search": "auto", "budget": {"evaluations": stages}, "seed": seed}
    else:
        budget = {"evaluations": sum(stage["evaluations"] for stage in stages)}
        sections |= {"search": stages, "budget": budget, "seed": seed}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        run = search(Campaign.model_validate(sections), Path(folder) / "run")
        wall_s = time.perf_counter() - started
        measured = [trial for trial in run.front if trial.measurement]
        best = f"trial:{max(measured, key=_mean).number}"
        cost = sum(trial.measurement.cost for trial in run.trials if trial.measurement)
        means = [
            _mean_of(run, kind, subject)
            for kind, subject in (("search", best), ("test", best), ("test", run.best_scalar))
        ]
        cells = [f"{cost:.0f}", f"{wall_s:.0f}", *(f"{mean:.3f}" for mean in means)]
        for reference in (run.best_scalar, "uniform"):
            gain, error = run.gain(best, reference)
            cells += [f"{gain:+.4f} ±{error:.4f}", f"{gain / error:.1f}"]
        run.ledger.close()
    return cells


def _mean(trial: Trial) -> float:
    assert trial.measurement is not None
    return float(np.mean([score.value for score in trial.measurement.scores.values()]))


def _mean_of(run: Run, split: str, subject: str) -> float:
    measured = run.searched if split == "search" else run.tested
    return float(np.mean([score.value for score in measured[subject].scores.values()]))


if __name__ == "__main__":
    main()
