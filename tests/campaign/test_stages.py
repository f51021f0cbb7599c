"""The searches that ``auto`` chooses, and what they cost."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import make_plan
from evomerge.campaign.stages import make_stages, stage_cost

OBJECTIVES = [{"name": name, "task": name, "metric": "accuracy"} for name in ("rot90", "parity")]


@pytest.mark.parametrize(("number", "most"), [(2, 5.0), (1, 20.0)], ids=["a front", "one objective"])
@pytest.mark.parametrize("share", [0.4, 0.1, 0.02])
def test_a_descent_costs_little_however_few_items_an_evaluation_has(
    make_campaign: Callable[..., Campaign], number: int, most: float, share: float
) -> None:
    split = {"adapt": 0.2, "search": share, "test": 0.8 - share}
    campaign = make_campaign(objectives=OBJECTIVES[:number], search="auto")
    campaign = campaign.model_copy(update={"evaluation": campaign.evaluation | {"split": split}})
    plan = make_plan(campaign)
    first, _ = make_stages(campaign, plan)
    size = first.options.batch_size
    assert stage_cost(plan, first) - first.num_evaluations <= most or size == 1
    larger = first.options.model_copy(update={"batch_size": size + 1})
    is_default = size == type(first.options)().batch_size
    assert is_default or stage_cost(plan, replace(first, options=larger)) - first.num_evaluations > most


def test_a_larger_budget_leaves_the_descent_as_it_was(make_campaign: Callable[..., Campaign]) -> None:
    for objectives in (OBJECTIVES, OBJECTIVES[:1]):
        campaigns = [make_campaign(objectives=objectives, budget={"evaluations": n}, search="auto") for n in (2, 60)]
        first, again = (make_stages(campaign, make_plan(campaign))[0] for campaign in campaigns)
        assert first.options == again.options
