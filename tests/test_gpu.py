"""The same merges and scores on a CUDA device as on the CPU."""

from typing import Any

import numpy as np
import pytest
import torch

from evomerge.campaign.campaign import read_campaign
from evomerge.campaign.plan import make_plan
from evomerge.families.family import FamilySummary
from evomerge.scorer.scorer import Scorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; this machine has none"),
]

OPERATORS: list[dict[str, Any]] = [{"name": "task_arithmetic"}, {"name": "linear"}, {"name": "ties", "density": 0.3}]


def scorer(family: FamilySummary, device: str, operator: dict[str, Any]) -> Scorer:
    campaign = read_campaign(family.campaign)
    space = campaign.space.model_copy(update={"coefficient": type(campaign.space.coefficient)(low=0.1, high=1.0)})
    return Scorer(make_plan(campaign.model_copy(update={"device": device, "operator": operator, "space": space})))


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator["name"])
def test_merges_agree(small_digits: FamilySummary, operator: dict[str, Any]) -> None:
    buffers = []
    for device in ("cpu", "cuda"):
        held = scorer(small_digits, device, operator)
        point = np.random.default_rng(0).random(len(held.plan.space))
        recipe = held.plan.recipe(point)
        held.materializer.build(held.plan.operators[recipe.operator], recipe)
        buffers.append(held.materializer.out_P.cpu())
    torch.testing.assert_close(buffers[1], buffers[0], rtol=1e-6, atol=1e-7)


def test_gradients_agree(small_digits: FamilySummary) -> None:
    gradients = []
    for device in ("cpu", "cuda"):
        held = scorer(small_digits, device, OPERATORS[0])
        model, evaluator = held.materializer.resident.module, held.plan.evaluator
        items = held.plan.splits["rot90"]["adapt"]
        recipe = held.plan.recipe(held.plan.space.start)
        [(_, gradient)] = held.materializer.gradients(
            held.plan.operators[recipe.operator],
            recipe,
            [lambda m=model, e=evaluator, i=items: e.loss(m, "rot90", i, "ce")],
        )
        gradients.append(gradient["coefficient"])
    np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-2, atol=1e-4)
