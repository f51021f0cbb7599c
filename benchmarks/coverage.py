"""How often 95 % intervals hold what they should: the score over all items of a family.

    make bench-coverage

Base, experts, uniform average and some merges are scored once on every item. Then, a thousand times, a share of the
sources is drawn as a split would draw them, and intervals are made of what their items say, with the correction for a
finite pool. Coverage is the share of intervals that hold the score over the whole pool: of the models' scores, and of
their paired differences to the uniform average. Beside it stands the naive interval: the percentiles of a bootstrap
over items, as if no two came from one source.

Shape letters: K models, N items, R resamples, S sources.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from evomerge.campaign.campaign import read_campaign
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.references import reference_recipes
from evomerge.evidence.intervals import difference_intervals, score_intervals
from evomerge.evidence.resampling import resampled_counts
from evomerge.evidence.scores import source_codes
from evomerge.families.family import make
from evomerge.records import Floats, Items, Recipe
from evomerge.scorer.scorer import Scorer

FAMILIES = ("digits4", "text")
SHARES = (0.1, 0.2, 0.4)
NUM_SPLITS = 1000
NUM_MERGES = 6  # beside the reference models
NUM_NAIVE = 500  # resamples
AIM = (0.93, 0.97)


@dataclass(frozen=True)
class Pool:
    """What K models score on all items of a task, or gain over the uniform average, and the items' sources."""

    name: str
    metric: str
    items_KN: Floats
    codes_N: Items
    is_difference: bool = False


def main() -> None:
    """Print coverage and width of every family, task, metric and share; * marks what misses the aim."""
    table = Table(
        title=f"coverage of 95 % intervals over {NUM_SPLITS} splits: mean over models (lowest), mean width; naive",
        box=SIMPLE_HEAD,
    )
    columns = ("pool", "metric", "of", "share", "sources", "items", "coverage", "lowest", "width", "naive", "width")
    for column in columns:
        table.add_column(column, justify="left" if column in ("pool", "metric", "of") else "right")
    hits = []
    for name in FAMILIES:
        for pool in _pools(name):
            for share in SHARES:
                cells, coverage = _measure(pool, share)
                hits.append(AIM[0] <= coverage <= AIM[1])
                table.add_row(*cells)
            table.add_section()
            print(f"measured {pool.name} {pool.metric}", file=sys.stderr)
    Console(width=120).print(table)
    print(f"{sum(hits)} of {len(hits)} rows are covered between {AIM[0]:.0%} and {AIM[1]:.0%} of the time")


def _measure(pool: Pool, share: float) -> tuple[list[str], float]:
    """Draw splits of one size, and count how often the intervals hold the mean over the pool."""
    num_pool = int(pool.codes_N.max()) + 1
    num_sources = round(share * num_pool)
    truth_K = pool.items_KN.mean(axis=1)
    rng = np.random.default_rng([num_sources, num_pool])
    intervals = difference_intervals if pool.is_difference else score_intervals
    found, naive, num_items = [], [], []
    for _ in range(NUM_SPLITS):
        drawn = np.isin(pool.codes_N, rng.choice(num_pool, num_sources, replace=False))
        items_KN, sources = pool.items_KN[:, drawn], pool.codes_N[drawn].tolist()
        found.append(intervals(items_KN, sources, drawn=num_sources / num_pool))
        naive.append(_naive(items_KN, num_sources / num_pool))
        num_items.append(len(sources))
    held_K, width = _coverage(np.stack(found), truth_K)
    naive_K, naive_width = _coverage(np.stack(naive), truth_K)
    coverage = float(held_K.mean())
    cells = [
        pool.name,
        pool.metric,
        "difference" if pool.is_difference else "score",
        f"{share:.0%}",
        str(num_sources),
        f"{np.mean(num_items):.0f}",
        f"{coverage:.3f}" + (" " if AIM[0] <= coverage <= AIM[1] else "*"),
        f"{held_K.min():.2f}",
        f"{width:.3f}",
        f"{naive_K.mean():.3f}",
        f"{naive_width:.3f}",
    ]
    return cells, coverage


def _coverage(intervals_TK2: Floats, truth_K: Floats) -> tuple[Floats, float]:
    """Return the share of splits whose interval holds the truth (to a rounding), by model, and the mean width."""
    low_TK, high_TK = intervals_TK2[..., 0], intervals_TK2[..., 1]
    held_TK = (low_TK <= truth_K + 1e-9) & (truth_K - 1e-9 <= high_TK)
    return held_TK.mean(axis=0), float((high_TK - low_TK).mean())


def _naive(items_KN: Floats, drawn: float) -> Floats:
    """Percentiles of a bootstrap over items, (K, 2)."""
    values_K = items_KN.mean(axis=1)
    counts_RN = _counts(items_KN.shape[1])
    moved_RK = counts_RN @ (items_KN - values_K[:, None]).T / items_KN.shape[1]
    return (values_K + np.sqrt(1 - drawn) * np.quantile(moved_RK, [0.025, 0.975], axis=0)).T


@cache
def _counts(num_items: int) -> Floats:
    return np.concatenate(list(resampled_counts(num_items, NUM_NAIVE)))


def _pools(name: str) -> Iterator[Pool]:
    """Yield the family's pools: every task by every metric, and the mean accuracy of tasks that share images."""
    scored, sources = _scored(name)
    pools = [
        Pool(f"{name} {task}", metric, items_KN, source_codes(sources[task]))
        for (task, metric), items_KN in scored.items()
    ]
    if name == "digits4":
        of_tasks = [pool for pool in pools if pool.metric == "accuracy"]
        items_KN, codes_N = (
            np.concatenate([getattr(pool, part) for pool in of_tasks], axis=-1) for part in ("items_KN", "codes_N")
        )
        pools.append(Pool(f"{name} all four", "accuracy", items_KN, codes_N))
    for pool in pools:
        yield pool
        yield replace(pool, items_KN=pool.items_KN[1:] - pool.items_KN[:1], is_difference=True)


def _scored(name: str) -> tuple[dict[tuple[str, str], Floats], dict[str, list[str]]]:
    """Return (task, metric) -> scores of all items (K, N), uniform first, and task -> sources; kept on disk."""
    family = make(name, Path(".cache/families") / name)
    plan = make_plan(read_campaign(family.campaign))
    sources = {task: [str(source) for source in of_task] for task, of_task in plan.evaluator.sources.items()}
    kept = Path(f".cache/coverage/{name}-{family.recipe_hash[:12]}.npz")
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, **{f"{task} {metric}": items_KN for (task, metric), items_KN in _score(plan, name).items()})
    with np.load(kept) as held:
        return {(task, metric): held[key] for key in held for task, metric in [key.split()]}, sources


def _score(plan: Plan, name: str) -> dict[tuple[str, str], Floats]:
    scorer = Scorer(plan)
    every = {task: np.arange(len(sources)) for task, sources in plan.evaluator.sources.items()}
    found: dict[tuple[str, str], list[Floats]] = {}
    for subject, recipe in _recipes(plan).items():
        scores = scorer.score(recipe, "test", every).scores
        for objective in plan.objectives:
            score = scores[objective.name]
            found.setdefault((objective.task, objective.metric), []).append(score.items.astype(np.float64))
            if score.companion is not None and objective.metric != "loss":
                found.setdefault((objective.task, "loss"), []).append(score.companion.astype(np.float64))
        print(f"{name}: scored {subject}", file=sys.stderr)
    return {key: np.stack(items) for key, items in found.items()}


def _recipes(plan: Plan) -> dict[str, Recipe]:
    """The uniform average, base, experts, and merges with coefficients around the start."""
    recipes = {name: recipe for name, recipe in reference_recipes(plan).items() if not name.startswith("scalar:")}
    rng = np.random.default_rng(0)
    for number in range(NUM_MERGES):
        around = plan.space.start + rng.normal(0.0, 0.15, len(plan.space.start))
        recipes[f"merge {number}"] = plan.recipe(np.clip(around, 0.0, 1.0))
    return {"uniform": recipes.pop("uniform"), **recipes}


if __name__ == "__main__":
    main()
