"""Opens the pool that a campaign names: a scorer in each of its workers."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import Findings, Plan, make_plan
from evomerge.materialize.sharing import Shared
from evomerge.scorer.scorer import Scorer
from evomerge.workers.inline import InlinePool
from evomerge.workers.pool import Pool
from evomerge.workers.ray_cluster import RayOptions
from evomerge.workers.ray_pool import RayPool


@contextmanager
def open_pool(campaign: Campaign, plan: Plan, notify: Callable[[str], None]) -> Iterator[tuple[Pool, Findings]]:
    """Yield the pool, its workers ready, and what they found out; stop what was started for it.

    notify is told what is being loaded, and later what a person should know of the workers.
    Raises: InputError if a worker cannot open the campaign.
    """
    if isinstance(campaign.workers, RayOptions):
        notify("the first worker")
        with RayPool(partial(_make_scorer, campaign), campaign.workers, notify) as pool:
            yield pool, pool.findings
    else:
        scorer = Scorer(plan, notify)
        yield InlinePool(scorer), scorer.findings


def _make_scorer(campaign: Campaign, findings: Findings | None, buffers: Sequence[Any]) -> Scorer:
    """Make a worker's scorer; with findings, from base and experts as the first worker lends them."""
    return Scorer(make_plan(campaign), shared=Shared(findings.hashes, buffers) if findings else None)
