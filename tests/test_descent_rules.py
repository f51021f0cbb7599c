"""The rules of descents on losses whose gradients are known, against torch's optimizers and by hand."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_slope import OPTIMUM, Bowl, coefficients, descent

from evomerge.descent_rules import Rule, rate
from evomerge.records import Descent, Floats


def by_torch(
    bowl: Bowl, asked: Descent, numbers_of: Callable[[Tensor], Tensor], start: Floats, make: Callable[..., Any]
) -> Floats:
    """Follow the same loss with one of torch's optimizers; return the numbers that the raw ones end at."""
    raw = torch.tensor(start, requires_grad=True)
    optimizer = make([raw], lr=asked.learning_rate)
    optimum, curvature = torch.tensor(bowl.optimum_d), torch.tensor(bowl.curvature_d)
    for _ in range(asked.steps):
        optimizer.zero_grad()
        (curvature * (numbers_of(raw) - optimum) ** 2 / 2).sum().backward()
        if asked.clip is not None:
            torch.nn.utils.clip_grad_norm_([raw], asked.clip)
        optimizer.step()
    return numbers_of(raw).detach().numpy()


def test_adam_is_torchs() -> None:
    bowl, asked = Bowl(coefficients("a", "b")), descent()
    expected = by_torch(bowl, asked, lambda raw: raw, bowl.start_d, torch.optim.Adam)
    np.testing.assert_allclose(bowl.follow(Rule, asked).numbers_d, expected, rtol=1e-9)


def test_adamw_with_clipped_gradients_is_torchs() -> None:
    bowl, asked = Bowl(coefficients("a", "b")), descent(weight_decay=0.1, clip=0.4)

    def adamw(parameters: Any, lr: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1)

    expected = by_torch(bowl, asked, lambda raw: raw, bowl.start_d, adamw)
    np.testing.assert_allclose(bowl.follow(Rule, asked).numbers_d, expected, rtol=1e-5)  # torch divides by norm + 1e-6


def test_numbers_stay_in_their_box_and_come_back_from_its_edge() -> None:
    """AdaMerging's clamp has no gradient outside, and coefficients die there."""
    bowl = Bowl(coefficients("a", "b", low=0.0, high=1.0))
    at_edge = bowl.follow(Rule, descent(steps=200, learning_rate=0.1))
    np.testing.assert_allclose(at_edge.numbers_d, OPTIMUM.clip(0, 1), atol=1e-2)
    again = Bowl(bowl.dimensions, optimum_d=np.full(4, 0.5))
    for step in range(201, 401):
        at_edge.step(again.gradient(at_edge.numbers_d), step)
    np.testing.assert_allclose(at_edge.numbers_d, 0.5, atol=0.05)


def assert_legs_equal_one_descent(rule_type: type[Rule], bowl: Bowl, **given: Any) -> None:
    """Cut in two, with only what the record holds between them."""
    whole = bowl.follow(rule_type, descent(steps=12, final_rate=1.0, **given))
    first = bowl.follow(rule_type, descent(steps=5, **given))
    again = replace(bowl, dimensions=tuple(
        replace(dimension, start=float(number))
        for dimension, number in zip(bowl.dimensions, first.numbers_d, strict=True)
    ))  # fmt: skip
    second = again.follow(rule_type, descent(steps=7, steps_before=5, **given, **first.state()))
    np.testing.assert_allclose(second.numbers_d, whole.numbers_d, rtol=1e-12)


def test_a_descent_in_two_legs_is_the_descent_in_one() -> None:
    assert_legs_equal_one_descent(Rule, Bowl(coefficients("a", "b")), weight_decay=0.1)


def test_the_rate_falls_as_it_says() -> None:
    linear = [rate(descent(steps=4, learning_rate=1.0, final_rate=0.2), step) for step in (1, 2, 3, 4)]
    assert linear == pytest.approx([1.0, 0.8, 0.6, 0.4])
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=4, T_mult=2, eta_min=0.05)
    for step in range(1, 15):
        ours = rate(descent(steps=7, steps_before=(step - 1) // 7 * 7, learning_rate=0.5, final_rate=0.1, period=4),
                    (step - 1) % 7 + 1)  # fmt: skip
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
