"""Expert Merging: sigmoids by AdamW, teachers by name, and the divergence from real experts."""

from typing import Any

import numpy as np
import pytest
import torch
from proposer_contract import ProposerContract
from toy_slope import START, Bowl, coefficients, descent

from evomerge.descent_rules import Sigmoid
from evomerge.errors import CampaignError
from evomerge.proposers.expert_merging import ExpertMerging, ExpertMergingOptions
from evomerge.proposers.proposer import Problem


class TestExpertMerging(ProposerContract):
    proposer_type = ExpertMerging
    options = {"experts": {"task0": "expert2"}}


def test_it_is_adamw_on_sigmoids_with_a_penalty_on_leaving_the_start() -> None:
    bowl, penalty = Bowl(coefficients("a", "b", low=0.0, high=2.0)), 0.3
    asked = descent(steps=25, learning_rate=0.3, penalty=penalty, weight_decay=0.05, clip=0.2)
    rule = bowl.follow(Sigmoid, asked)

    raw = torch.full((4,), float(np.log(START / (2 - START))), dtype=torch.float64, requires_grad=True)
    adamw = torch.optim.AdamW([raw], lr=0.3, weight_decay=0.05)
    for _ in range(25):
        adamw.zero_grad()
        numbers = 2 * raw.sigmoid()
        data = (torch.tensor(bowl.curvature_d) * (numbers - torch.tensor(bowl.optimum_d)) ** 2).sum() / 2
        away = torch.where((numbers - START).abs() < 1e-12, 0.0, (numbers - START).abs())  # no slope at the start
        (data + penalty * away.mean()).backward()
        torch.nn.utils.clip_grad_norm_([raw], 0.2)
        adamw.step()
    np.testing.assert_allclose(rule.numbers_d, 2 * raw.sigmoid().detach().numpy(), rtol=1e-4)


def test_numbers_come_near_the_ends_of_their_range_and_legs_go_on_from_there() -> None:
    bowl = Bowl(coefficients("a", "b", low=0.0, high=1.0), optimum_d=np.array([9.0, -9.0, 9.0, -9.0]))
    whole = bowl.follow(Sigmoid, descent(steps=200, learning_rate=1.0))
    assert whole.numbers_d == pytest.approx([1, 0, 1, 0], abs=1e-3)
    first = bowl.follow(Sigmoid, descent(steps=150, learning_rate=1.0))
    second = bowl.follow(Sigmoid, descent(steps=50, steps_before=150, learning_rate=1.0, **first.state()))
    assert (second.numbers_d == whole.numbers_d).all()


def proposer(experts: dict[str, str], **given: Any) -> ExpertMerging:
    problem = Problem(
        dimensions=coefficients("a", **given),
        num_objectives=1,
        seed=(0, 0),
        tasks=("math", "chat"),
        experts=("e0", "e1"),
    )
    return ExpertMerging(problem, ExpertMergingOptions(experts=experts))


def test_each_task_has_the_teacher_that_it_was_given() -> None:
    (candidate,) = proposer({"math": "e1", "chat": "e1"}).ask(1, [])
    assert candidate.descent is not None
    assert candidate.descent.loss == {"math": "kl:e1", "chat": "kl:e1"}


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        ({"maths": "e0"}, "expert_merging.experts: unknown task 'maths'; did you mean 'math'"),
        ({"math": "e3"}, "expert_merging.experts: unknown expert 'e3'"),
    ],
)
def test_names_that_are_not_there_are_refused(experts: dict[str, str], message: str) -> None:
    with pytest.raises(CampaignError, match=message):
        proposer(experts)


def test_a_start_at_an_end_of_its_range_is_refused() -> None:
    with pytest.raises(CampaignError, match="coefficient e0/a starts at 0.3 of 0.3 to 2"):
        proposer({"math": "e0"}, low=0.3)
