"""Frank-Wolfe's steps on losses whose gradients are known: by hand, against a slow twin, and with experts in excess."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from proposer_contract import ProposerContract
from scipy.optimize import minimize
from toy_slope import Bowl, coefficients, descent

from evomerge.descent_rules import FrankWolfe, VertexWeights, hulls, into_simplex
from evomerge.errors import CampaignError
from evomerge.proposers.fw_merging import FwMerging, FwMergingOptions
from evomerge.proposers.proposer import Problem
from evomerge.records import Floats


class TestHard(ProposerContract):
    proposer_type = FwMerging


class TestSoft(ProposerContract):
    proposer_type = FwMerging
    options = {"variant": "soft"}


def proposer(**given: Any) -> FwMerging:
    dimensions = given.pop("dimensions", coefficients("a", "b"))
    return FwMerging(Problem(dimensions=dimensions, num_objectives=1, seed=(0, 0)), FwMergingOptions(**given))


def test_hard_begins_at_the_start_and_soft_at_the_base() -> None:
    (hard,), (soft,) = proposer().ask(1, []), proposer(variant="soft").ask(1, [])
    assert hard.point == pytest.approx([1.3 / 3] * 4)  # 0.3 of [-1, 2]
    assert soft.point == pytest.approx([1 / 3] * 4)


@pytest.mark.parametrize(("low", "high", "needed"), [(0.1, 1.0, "0"), (0.0, 0.9, "1")])
def test_a_range_without_the_vertices_is_refused(low: float, high: float, needed: str) -> None:
    with pytest.raises(CampaignError, match=f"fw_merging needs a range that holds {needed}; coefficient e0/a"):
        proposer(dimensions=coefficients("a", low=low, high=high))


def test_without_coefficients_there_is_nothing_to_move() -> None:
    scale = tuple(replace(dimension, parameter="scale") for dimension in coefficients("a"))
    with pytest.raises(CampaignError, match="none is searched"):
        proposer(dimensions=scale)


def test_a_hull_is_the_experts_of_a_group() -> None:
    assert [hull.tolist() for hull in hulls(coefficients("a", "b", experts=3))] == [[0, 2, 4], [1, 3, 5]]


def test_the_first_step_by_hand() -> None:
    """In group a, e0 (-1) beats e1 (2) and the start (.3 - .6); in b the start (.9) beats e0 (1) and e1 (2)."""

    class Fixed(Bowl):
        def gradient(self, numbers_d: Floats) -> Floats:
            return np.array([-1.0, 1.0, 2.0, 2.0])

    rule = Fixed(coefficients("a", "b")).follow(FrankWolfe, descent(steps=1, learning_rate=0.5))
    # t = 0: half of the way to (1, 0) in a; in b the vertices have 1, 2 and 0.9: the start itself, so it stays.
    assert rule.numbers_d == pytest.approx([0.65, 0.3, 0.15, 0.3])


def test_a_group_in_which_no_vertex_descends_is_left_alone() -> None:
    """The official code pulls it towards zero. Here all task vectors ascend, and the base is no vertex."""
    bowl = Bowl(coefficients("a", experts=3), optimum_d=np.full(3, -5.0), curvature_d=np.ones(3))
    at_start = bowl.follow(FrankWolfe, descent(steps=10, learning_rate=1.0))
    assert (at_start.numbers_d == bowl.start_d).all()


def test_it_comes_to_the_best_point_of_the_hull() -> None:
    """Against a general solver, over the weights of the vertices."""
    bowl = Bowl(
        coefficients("a", experts=4), optimum_d=np.array([0.7, 0.6, -0.4, 0.1]), curvature_d=np.array([1.0, 2, 1, 0.5])
    )
    vertices = np.vstack([np.eye(4), bowl.start_d])

    def loss(weights: Floats) -> float:
        return float((bowl.curvature_d * (weights @ vertices - bowl.optimum_d) ** 2).sum())

    best = minimize(
        loss, np.full(5, 0.2), bounds=[(0, 1)] * 5, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}
    )
    rule = bowl.follow(FrankWolfe, descent(steps=2000, learning_rate=1.0))
    assert rule.numbers_d == pytest.approx(best.x @ vertices, abs=0.02)


@pytest.mark.parametrize("rule_type", [FrankWolfe, VertexWeights])
def test_experts_that_help_no_task_are_never_stepped_towards(rule_type: Any) -> None:
    """Two experts that help and fourteen whose task vectors ascend: the loss is what it is without the fourteen."""

    def reached(num_useless: int) -> float:
        num, away = 2 + num_useless, np.full(num_useless, -1.0)
        dimensions = tuple(
            replace(dimension, start=0.3 if d < 2 else 0.0)
            for d, dimension in enumerate(coefficients("a", experts=num))
        )
        shares = np.array([[1.0] + [0.0] * (num - 1), [0.0, 1.0] + [0.0] * (num - 2)])
        bowl = Bowl(dimensions, optimum_d=np.array([0.5, 0.4, *away]), curvature_d=np.ones(num), shares_Td=shares)
        rule = bowl.follow(rule_type, descent(steps=300, learning_rate=0.5 if rule_type is FrankWolfe else 0.02))
        assert (rule.numbers_d[2:] == 0).all()
        return float(np.abs(rule.numbers_d[:2] - [0.5, 0.4]).max())

    assert reached(14) == pytest.approx(reached(0)) == pytest.approx(0, abs=0.02)


def test_soft_picks_the_best_expert_not_yet_picked_of_each_task() -> None:
    """Task 0 prefers e0; so does task 1, which has to take its second, e2; the third comes last."""
    dimensions = coefficients("a", "b", experts=3)

    class Fixed(Bowl):
        def task_gradients(self) -> Floats:
            return np.array([[-3.0, -2, 1, 0, -1, -1], [-9.0, -2, 1, 0, -4, -4]])

    bowl = Fixed(dimensions, optimum_d=np.zeros(6), curvature_d=np.ones(6))
    rule = VertexWeights(descent(), bowl)  # type: ignore[arg-type]
    assert rule.numbers_d == pytest.approx([0.42, 0.42, 0.12, 0.12, 0.42, 0.42])  # .4 of .3, and .3 for each picked


def test_soft_gradients_equal_finite_differences_and_stay_in_the_simplex() -> None:
    bowl = Bowl(coefficients("a", "b"), shares_Td=np.eye(2, 4) + np.eye(2, 4, 2))
    rule = VertexWeights(descent(steps_before=7), bowl)  # type: ignore[arg-type]
    rule.raw_R = np.array([0.2, 0.1, 0.3, 0.6])

    def loss() -> float:
        return float((bowl.curvature_d * (rule.numbers_d - bowl.optimum_d) ** 2).sum() / 2)

    ours = rule.pull_back(bowl.gradient(rule.numbers_d))
    for place in range(4):
        at = rule.raw_R[place]
        rule.raw_R[place] = at + 1e-5
        above = loss()
        rule.raw_R[place] = at - 1e-5
        assert ours[place] == pytest.approx((above - loss()) / 2e-5, rel=1e-6)
        rule.raw_R[place] = at
    for hull in hulls(bowl.dimensions):
        projected = rule.project(np.full(4, 0.9))
        assert projected[hull].sum() == pytest.approx(1.0)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=5))
def test_the_projection_is_the_nearest_point_of_the_simplex(weights: list[float]) -> None:
    """By its optimality: nothing in the simplex lies on the far side, no corner and not 0."""
    weights_N = np.array(weights)
    nearest_N = into_simplex(weights_N)
    assert (nearest_N >= 0).all()
    assert nearest_N.sum() <= 1 + 1e-9
    for corner_N in [*np.eye(len(weights)), np.zeros(len(weights))]:
        assert (weights_N - nearest_N) @ (corner_N - nearest_N) <= 1e-9
