"""Descents on real merges: their gradients against dense ones, what teachers say, what they cost, and legs that resume."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evomerge.campaign.assemble import PROPOSERS
from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.stages import Stage, make_stages, stage_cost
from evomerge.errors import CampaignError
from evomerge.evaluators.evaluator import divergence
from evomerge.front.front import observe
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.resident import load_model, merged_tensors
from evomerge.operators.linear import TaskArithmetic
from evomerge.proposers.proposer import Problem, Proposer
from evomerge.records import Candidate, Descent, Measurement, Trial
from evomerge.scorer.descend import PlanSlope, _slopes
from evomerge.scorer.scorer import Scorer
from evomerge.scorer.teachers import Teachers

OPERATORS = {
    "adamerging": {"name": "ties_paper", "normalize": False},
    "atlas": {"name": "partitioned", "classes": 2},
    "expert_merging ++": {"name": "chunked", "chunks": 2, "budget": 1.5},
}
METHODS: dict[str, dict[str, Any]] = {
    "adamerging": {"batch_size": 4},
    "atlas": {"batch_size": 12, "learning_rate": 0.01},
    "fw_merging": {"batch_size": 6, "factor": 0.5},
    "fw_merging soft": {"variant": "soft", "batch_size": 6, "weight_steps": 3, "weight_batch_size": 4},
    "self_positioning": {"batch_size": 4},
    "expert_merging": {"experts": {"rot90": "rot90", "parity": "noise"}, "samples": 3, "batch_size": 2},
    "expert_merging ++": {"experts": {"rot90": "rot90"}, "samples": 3, "batch_size": 2},
    "expert_merging aligned": {"experts": {"rot90": "noise"}, "samples": 3, "batch_size": 2, "layers": [1]},
}
WIDE = {"groups": "layer", "coefficient": {"low": -0.2, "high": 1.2, "start": 0.3}}


def planned(make_campaign: Callable[..., Campaign], method: str) -> tuple[Plan, Stage]:
    stage = {"proposer": method.split(maxsplit=1)[0], **METHODS[method]} | ({} if "soft" in method else {"steps": 3})
    operator = OPERATORS.get(method, {"name": "task_arithmetic"})
    campaign = make_campaign(search=[stage], budget={"evaluations": 2}, space=WIDE, operator=operator)
    plan = make_plan(campaign)
    [made] = make_stages(campaign, plan)
    return plan, made


def proposer_of(plan: Plan, stage: Stage) -> Proposer:
    problem = Problem(
        dimensions=plan.space.dimensions,
        num_objectives=len(plan.steering),
        seed=(0, 0),
        tasks=tuple(plan.splits),
        experts=tuple(plan.experts),
    )
    made: Proposer = PROPOSERS[stage.proposer](problem, stage.options)  # type: ignore[call-arg]
    return made


def tell(proposer: Proposer, plan: Plan, number: int, candidate: Candidate, measurement: Measurement) -> None:
    trial = Trial(
        number=number, stage=0, index=number, candidate=candidate, known=number, order=number, measurement=measurement
    )
    proposer.tell(observe(trial, plan.objectives))


@pytest.mark.parametrize("method", METHODS)
def test_a_leg_goes_on_exactly_in_another_process_and_costs_what_was_announced(
    make_campaign: Callable[..., Campaign], method: str
) -> None:
    plan, stage = planned(make_campaign, method)
    scorer, proposer = Scorer(plan), proposer_of(plan, stage)
    (first,) = proposer.ask(1, [])
    one = scorer.score(first, "search")
    tell(proposer, plan, 0, first, one)
    (second,) = proposer.ask(1, [])
    two = scorer.score(second, "search")
    assert one.arrival is not None
    assert two.arrival is not None
    assert first.point != one.arrival.point != two.arrival.point
    assert one.cost + two.cost == pytest.approx(stage_cost(plan, stage))

    again = proposer_of(plan, stage)
    again.recall(first)
    tell(again, plan, 0, first, one)
    assert again.ask(1, []) == [second]
    resumed = Scorer(plan).score(second, "search")
    assert (resumed.arrival, resumed.cost) == (two.arrival, two.cost)


def tensors_of(checkpoint: Any) -> dict[str, torch.Tensor]:
    assert isinstance(checkpoint, Checkpoint)
    return {name: tensor.detach().clone() for name, tensor in merged_tensors(load_model(checkpoint, "float32")).items()}


def test_the_gradient_is_the_inner_products_with_the_task_vectors(make_campaign: Callable[..., Campaign]) -> None:
    """Of two tasks with weights of their own, against autograd through a model that is merged by hand."""
    plan, _ = planned(make_campaign, "self_positioning")
    descent = Descent(loss="ce", steps=1, learning_rate=1.0, batch_size=8, seed=(0,))
    start = Candidate(point=tuple(plan.space.start.tolist()), descent=descent)
    materializer = Scorer(plan).materializer
    slope = PlanSlope(plan, materializer, Teachers(plan, materializer), start)
    numbers_d = np.random.default_rng(0).uniform(0.0, 0.6, len(plan.space))
    weights = np.array([0.5, 2.0, 0.0])
    batches = slope.batches(np.random.default_rng(1), 8)
    loss_T, gradient_Td = slope.task_losses(numbers_d, batches)
    loss, gradient_d = weights @ loss_T, weights @ gradient_Td

    group_of = {name: group for group, names in plan.groups.items() for name in names}
    base, experts = tensors_of(plan.base), {name: tensors_of(held) for name, held in plan.experts.items()}
    number = {(d.expert, d.group): float(n) for d, n in zip(plan.space.dimensions, numbers_d, strict=True)}
    model = load_model(plan.base, "float32")
    with torch.no_grad():
        for name, tensor in merged_tensors(model).items():
            moved = [number[k, group_of[name]] * (held[name] - base[name]) for k, held in experts.items()]
            tensor.copy_(base[name] + sum(moved))
    model.requires_grad_(True)
    by_task = zip(weights, batches.items(), strict=True)
    expected = sum(weight * plan.evaluator.loss(model, task, items, "ce") for weight, (task, items) in by_task)
    assert isinstance(expected, torch.Tensor)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-4)
    for d, dimension in enumerate(plan.space.dimensions):
        product = sum(
            float((parameter.grad * (experts[dimension.expert or ""][name] - base[name])).sum())
            for name, parameter in model.named_parameters()
            if group_of[name] == dimension.group and parameter.grad is not None
        )
        assert gradient_d[d] == pytest.approx(product, rel=1e-3, abs=1e-5)


def test_an_expert_merged_alone_predicts_what_it_teaches(make_campaign: Callable[..., Campaign]) -> None:
    """Its divergence from itself is 0; another's is what the two checkpoints' own logits give."""
    plan, _ = planned(make_campaign, "expert_merging")
    descent = Descent(
        loss={"rot90": "kl:rot90"}, steps=1, learning_rate=1.0, batch_size=3, seed=(0, 0), samples=4, temperature=2.0
    )
    start = Candidate(point=tuple(plan.space.start.tolist()), descent=descent)
    materializer = Scorer(plan).materializer
    slope = PlanSlope(plan, materializer, Teachers(plan, materializer), start)
    batches = slope.batches(np.random.default_rng(0), 3)
    assert {task: len(items) for task, items in batches.items()} == {"rot90": 3}

    def alone(expert: str) -> float:
        numbers_d = np.array([float(dimension.expert == expert) for dimension in plan.space.dimensions])
        return float(slope.task_losses(numbers_d, batches)[0].sum())

    logits = {
        name: plan.evaluator.logits(load_model(held, "float32"), "rot90", batches["rot90"])  # type: ignore[attr-defined, arg-type]
        for name, held in plan.experts.items()
    }
    assert alone("rot90") == pytest.approx(0, abs=1e-6)
    assert alone("parity") == pytest.approx(
        float(divergence(logits["rot90"], logits["parity"], 2.0).detach()), rel=1e-4
    )
    assert alone("parity") > 0


def test_hidden_states_are_compared_layer_by_layer(make_campaign: Callable[..., Campaign]) -> None:
    """Against what the checkpoints give out when transformers is asked for all hidden states of a batch."""
    plan, _ = planned(make_campaign, "expert_merging")
    descent = Descent(
        loss={"rot90": "kl:rot90"}, steps=1, learning_rate=1.0, batch_size=4, seed=(0, 0), layers=(0, 1), alignment=1e4
    )
    materializer, items = Scorer(plan).materializer, plan.splits["rot90"]["adapt"][:4]
    teachers = Teachers(plan, materializer)
    teachers.prepare("rot90", "rot90", items, descent.layers)

    def loss(expert: str, descent: Descent) -> float:
        recipe = plan.task_arithmetic([float(name == expert) for name in plan.experts])
        materializer.build(TaskArithmetic(), recipe)
        return float(teachers.loss("rot90", "rot90", items, descent))

    def hidden(expert: str) -> torch.Tensor:
        data = load_file(f"{plan.base.folder}/../data/rot90.safetensors")
        model, pixel_values = load_model(plan.experts[expert], "float32"), data["pixel_values"][items]  # type: ignore[arg-type]
        _, *of_blocks = model(pixel_values=pixel_values, output_hidden_states=True).hidden_states
        return torch.stack(list(of_blocks))

    teachers.prepare("rot90", "rot90", items, ())
    predictions_alone = loss("parity", replace(descent, layers=()))
    distance = float((hidden("parity") - hidden("rot90")).square().mean().detach())
    assert 1e4 * distance > predictions_alone
    assert loss("parity", descent) == pytest.approx(predictions_alone + 1e4 * distance, rel=1e-4)
    assert loss("rot90", descent) == pytest.approx(0, abs=1e-6)


def test_the_gradient_follows_the_hidden_states(make_campaign: Callable[..., Campaign]) -> None:
    """Against differences of the loss itself."""
    plan, _ = planned(make_campaign, "expert_merging")
    descent = Descent(
        loss={"rot90": "kl:noise"}, steps=1, learning_rate=1.0, batch_size=4, seed=(0, 0), layers=(1,), alignment=1e4
    )
    start = Candidate(point=tuple(plan.space.start.tolist()), descent=descent)
    materializer = Scorer(plan).materializer
    slope = PlanSlope(plan, materializer, Teachers(plan, materializer), start)
    numbers_d, batches = slope.start_d, slope.batches(np.random.default_rng(0), 4)
    gradient_d = slope.task_losses(numbers_d, batches)[1][0]
    for d in np.abs(gradient_d).argsort()[-3:]:
        ends = [
            slope.task_losses(numbers_d + sign * 0.02 * np.eye(len(numbers_d))[d], batches)[0][0] for sign in (1, -1)
        ]
        assert (ends[0] - ends[1]) / 0.04 == pytest.approx(gradient_d[d], rel=0.02)


def test_a_layer_that_is_not_there_is_refused_before_the_search(make_campaign: Callable[..., Campaign]) -> None:
    stage = {"proposer": "expert_merging", "experts": {"rot90": "rot90"}, "layers": [1, 7]}
    campaign = make_campaign(search=[stage], space=WIDE)
    with pytest.raises(
        CampaignError, match=r"search\[0\].layers: expected transformer blocks of the model, 0 to 1, found 7"
    ):
        make_stages(campaign, make_plan(campaign))


def test_a_loss_that_the_evaluators_do_not_have_is_refused_before_the_search(
    make_campaign: Callable[..., Campaign], monkeypatch: pytest.MonkeyPatch
) -> None:
    from evomerge.evaluators.classification import ClassificationEvaluator

    monkeypatch.setattr(ClassificationEvaluator, "losses", frozenset({"ce"}))
    with pytest.raises(CampaignError, match=r"search\[0\]: expert_merging descends the loss 'kl'.*have ce; take"):
        planned(make_campaign, "expert_merging")


def test_slopes_of_many_numbers_are_few() -> None:
    """Of 60 steps in 20,000 dimensions, two parts are kept: the means of either half, whose points lie in its middle."""
    way = [(np.full(20_000, float(step)), np.array([1.0]), np.ones((1, 20_000))) for step in range(60)]
    slopes = _slopes(way)
    points_BD = np.reshape(slopes.points, (-1, 20_000))
    assert points_BD[:, 0].tolist() == [14.5, 44.5]
    assert (len(slopes.losses), len(slopes.gradients)) == (2, 40_000)
    assert len(_slopes([(point[:4], loss, gradient[:, :4]) for point, loss, gradient in way]).losses) == 12
