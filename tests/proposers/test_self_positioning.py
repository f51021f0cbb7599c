"""Self Positioning: shares times a scale, against SGD by automatic differentiation."""

import numpy as np
import pytest
import torch
from proposer_contract import ProposerContract
from toy_slope import Bowl, coefficients, descent

from evomerge.descent_rules import ScaledSoftmax
from evomerge.errors import CampaignError
from evomerge.proposers.proposer import Problem
from evomerge.proposers.self_positioning import SelfPositioning, SelfPositioningOptions


class TestSelfPositioning(ProposerContract):
    proposer_type = SelfPositioning


def test_it_is_sgd_on_shares_and_scales() -> None:
    """Two groups of three experts, numbered expert by expert."""
    optimum, curvature, penalty = np.array([0.7, 0.1, 0.2, 0.6, 0.0, 0.1]), np.linspace(1, 2, 6), 0.1
    bowl = Bowl(coefficients("a", "b", experts=3), optimum_d=optimum, curvature_d=curvature)
    rule = bowl.follow(ScaledSoftmax, descent(steps=30, learning_rate=0.2, penalty=penalty))

    a_KG, s_G = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True), torch.ones(2, dtype=torch.float64)
    s_G.requires_grad_(True)
    sgd = torch.optim.SGD([a_KG, s_G], lr=0.2)
    for _ in range(30):
        sgd.zero_grad()
        numbers = (s_G * a_KG.softmax(0)).flatten()
        data = (torch.tensor(curvature) * (numbers - torch.tensor(optimum)) ** 2).sum() / 2
        (data + penalty * (s_G**2).mean()).backward()
        sgd.step()
    assert rule.numbers_d == pytest.approx((s_G * a_KG.softmax(0)).detach().numpy().ravel())


def test_a_scale_stays_where_no_coefficient_can_leave_its_range() -> None:
    bowl = Bowl(coefficients("a", low=0.0, high=1.0), optimum_d=np.array([3.0, -3.0]), curvature_d=np.ones(2))
    numbers_d = bowl.follow(ScaledSoftmax, descent(steps=200, learning_rate=0.5)).numbers_d
    assert numbers_d == pytest.approx([1, 0], abs=0.01)
    assert (numbers_d <= 1).all()


def test_two_legs_are_one_descent() -> None:
    bowl = Bowl(coefficients("a", "b"))
    whole = bowl.follow(ScaledSoftmax, descent(steps=12))
    first = bowl.follow(ScaledSoftmax, descent(steps=5))
    second = bowl.follow(ScaledSoftmax, descent(steps=7, steps_before=5, **first.state()))
    assert (second.numbers_d == whole.numbers_d).all()


def test_it_begins_at_the_average_of_the_experts() -> None:
    problem = Problem(
        dimensions=coefficients("a", experts=4), num_objectives=1, seed=(0, 0), experts=("e0", "e1", "e2", "e3")
    )
    (candidate,) = SelfPositioning(problem, SelfPositioningOptions()).ask(1, [])
    assert candidate.point == pytest.approx([1.25 / 3] * 4)  # 1/4 of [-1, 2]
    assert Bowl(problem.dimensions).follow(ScaledSoftmax, descent(steps=0)).numbers_d == pytest.approx([0.25] * 4)


def test_a_range_without_0_is_refused() -> None:
    problem = Problem(dimensions=coefficients("a", low=0.1), num_objectives=1, seed=(0, 0), experts=("e0", "e1"))
    with pytest.raises(CampaignError, match="self_positioning needs a range that holds 0"):
        SelfPositioning(problem, SelfPositioningOptions())
