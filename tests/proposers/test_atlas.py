"""aTLAS: where it begins, and that its descent is AdamW's."""

from dataclasses import replace

import pytest
from proposer_contract import ProposerContract
from toy_slope import coefficients

from evomerge.errors import CampaignError
from evomerge.proposers.atlas import Atlas, AtlasOptions
from evomerge.proposers.proposer import Problem
from evomerge.space.space import Dimension


class TestAtlas(ProposerContract):
    proposer_type = Atlas


def problem(*dimensions: Dimension) -> Problem:
    return Problem(dimensions=dimensions, num_objectives=1, seed=(0, 0), tasks=("a", "b", "c"))


def test_coefficients_begin_at_0_and_other_numbers_where_the_space_does() -> None:
    classes = [*coefficients("a"), *(replace(d, parameter="coefficient2") for d in coefficients("a"))]
    scale = Dimension(parameter="scale", expert=None, group=None, low=0.0, high=2.0, start=1.5)
    (candidate,) = Atlas(problem(*classes, scale), AtlasOptions()).ask(1, [])
    assert candidate.point == pytest.approx([1 / 3] * 4 + [0.75])


def test_the_batch_is_that_of_all_tasks_together() -> None:
    (candidate,) = Atlas(problem(*coefficients("a")), AtlasOptions()).ask(1, [])
    assert candidate.descent is not None
    assert candidate.descent.batch_size == 128 // 3
    assert (candidate.descent.weight_decay, candidate.descent.clip) == (0.1, 1.0)


def test_a_range_without_0_is_refused() -> None:
    with pytest.raises(CampaignError, match="atlas needs a range that holds 0; coefficient e0/a is searched from 0.1"):
        Atlas(problem(*coefficients("a", low=0.1)), AtlasOptions())
