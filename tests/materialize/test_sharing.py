"""Merges from memory that another process lends are the same bits, whatever form the experts have."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import make_plan
from evomerge.materialize.sharing import Shared
from evomerge.records import Candidate
from evomerge.scorer.scorer import Scorer


def lent(scorer: Scorer) -> list[np.ndarray]:
    """What arrives elsewhere: other memory, which cannot be written to."""
    buffers = [buffer.copy() for buffer in scorer.buffers()]
    for buffer in buffers:
        buffer.flags.writeable = False
    return buffers


@pytest.mark.parametrize(
    "changes",
    [{}, {"residence": "int8"}, {"dtype": "bfloat16"}, {"operator": {"name": "ties"}, "space": {"groups": "layer"}}],
)
def test_a_worker_that_reads_shared_memory_scores_the_same(
    make_campaign: Callable[..., Campaign], changes: dict[str, Any]
) -> None:
    plan = make_plan(make_campaign(**changes))
    candidate = Candidate(point=tuple(np.random.default_rng(0).uniform(size=len(plan.space.dimensions))))
    first = Scorer(plan)
    expected = first.score(candidate, "test")
    buffers = lent(first)
    other = Scorer(make_plan(make_campaign(**changes)), shared=Shared(first.findings.hashes, buffers))
    assert other.findings.agrees(first.findings)
    assert other.score(candidate, "test").weights == expected.weights
    first.adopt(buffers)
    fresh = Candidate(point=tuple(1 - x for x in candidate.point))
    assert first.score(fresh, "test").weights == other.score(fresh, "test").weights
    held = {tensor.data_ptr() for tensor in (first.materializer.base_P, other.materializer.base_P)}
    assert held == {buffers[0].ctypes.data}  # none has a copy of its own
