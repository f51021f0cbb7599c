"""Stages with spaces of their own: what each inherits from the trials before it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evomerge.campaign.campaign import Campaign
from evomerge.campaign.course import Course
from evomerge.campaign.plan import Plan, make_plan
from evomerge.errors import CampaignError
from evomerge.records import Arrival, Candidate, Measurement, Score, Trial
from evomerge.space.regroup import by_tensor

TIES = {"name": "ties", "density": 0.3}
MODEL, LAYER = ({"space": {"groups": groups}} for groups in ("model", "layer"))
FLOW = {"space": {"kind": "data_flow", "repeats": 1}}


@pytest.fixture
def make_course(make_campaign: Callable[..., Campaign]) -> Callable[..., tuple[Course, Plan]]:
    """A course over stages, given by what they change."""

    def make(*stages: dict[str, Any], **changes: Any) -> tuple[Course, Plan]:
        search = [{"proposer": "sobol", "evaluations": 1, **stage} for stage in stages]
        campaign = make_campaign(**{"search": search, "budget": {"evaluations": len(stages)}, **changes})
        plan = make_plan(campaign)
        assert not isinstance(campaign.search, str)
        return Course(campaign, plan, [stage.changes for stage in campaign.search]), plan

    return make


def measured(plan: Plan, value: float, arrival: Arrival | None = None) -> Measurement:
    """The same value of every objective."""
    score = Score(value=value, stderr=0.01, items=np.full(4, value, dtype=np.float32))
    scores = {objective.name: score for objective in plan.objectives}
    return Measurement(split="search", scores=scores, cost=1.0, seconds={}, arrival=arrival)


class Trials(list[Trial]):
    """Trials by hand: issued and finished one after the other."""

    def add(self, plan: Plan, stage: int, point: Any, value: float | None, arrival: Arrival | None = None) -> Trial:
        self.append(
            Trial(
                number=len(self),
                stage=stage,
                index=sum(trial.stage == stage for trial in self),
                candidate=Candidate(point=tuple(float(x) for x in point)),
                known=len(self),
                order=len(self),
                measurement=None if value is None else measured(plan, value, arrival),
                failure="it failed" if value is None else None,
            )
        )
        return self[-1]


def test_the_dimension_ladder_goes_up_exactly(make_course: Callable[..., tuple[Course, Plan]]) -> None:
    course, plan = make_course(MODEL, LAYER, {"space": {"groups": "tensor"}})
    trials, rng = Trials(), np.random.default_rng(0)
    coarse = course.leg(0, trials)
    assert (len(coarse.plan.space), coarse.history, coarse.best, coarse.ancestor) == (3, (), None, None)
    for value in (0.4, 0.7, None, 0.5):
        trials.add(plan, 0, rng.random(3), value)
    finer = course.leg(1, trials)
    assert len(finer.plan.space) == 3 * len(finer.plan.groups) > 3
    assert (finer.ancestor, len(finer.history)) == (1, 4)
    for trial, observation in zip(trials, finer.history, strict=True):
        before, after = course.recipe(trial), finer.plan.recipe(observation.point)
        numbers, others = (by_tensor(recipe, plan.tensors)["coefficient"] for recipe in (before, after))
        np.testing.assert_allclose(numbers, others, rtol=0, atol=1e-12)
    assert finer.history[2].values_M is None
    assert finer.best is not None
    assert finer.best.point.tolist() == finer.history[1].point.tolist()
    trials.add(plan, 1, rng.random(len(finer.plan.space)), 0.9)
    finest = course.leg(2, trials)
    assert (finest.ancestor, len(finest.history), len(finest.plan.space)) == (4, 5, 3 * len(plan.tensors))


def test_the_way_down_starts_at_the_mean_within_the_range_and_tells_nothing_that_is_not_so(
    make_course: Callable[..., tuple[Course, Plan]],
) -> None:
    narrow = {"low": 0.0, "high": 0.5, "start": 0.3}
    course, plan = make_course({}, {"space": {"groups": "model", "coefficient": narrow}})
    fine = course.leg(0, []).plan
    num_groups = len(fine.groups)
    trials = Trials()
    trials.add(
        plan, 0, np.full(3 * num_groups, (0.3 + 0.2) / 1.4), 0.2
    )  # all coefficients 0.3: also of the coarse space
    point = np.zeros((3, num_groups))
    point[1] = np.linspace(0.2, 0.5, num_groups)
    point[2] = 1.0
    trials.add(plan, 0, point.ravel(), 0.8)
    coarse = course.leg(1, trials)
    assert coarse.best is not None
    assert coarse.best.values_M is not None
    sizes = np.array([tensor.num_elements for tensor in plan.tensors])
    means = by_tensor(course.recipe(trials[1]), plan.tensors)["coefficient"] @ sizes / sizes.sum()
    np.testing.assert_allclose(coarse.best.point, np.clip(means / 0.5, 0.0, 1.0), atol=1e-12)
    assert coarse.best.point[0] == 0.0  # a mean of -0.2
    assert coarse.best.point[2] == 1.0  # of 1.2
    assert coarse.best.values_M[0] == pytest.approx(0.8)
    (told,) = coarse.history
    np.testing.assert_allclose(told.point, 0.6)


def test_stages_of_the_campaigns_space_are_told_the_very_points(
    make_course: Callable[..., tuple[Course, Plan]],
) -> None:
    course, plan = make_course({}, LAYER, {})
    trials, rng = Trials(), np.random.default_rng(0)
    arrived = tuple(rng.random(len(plan.space)).tolist())
    arrival = Arrival(point=arrived, first_moment=arrived, second_moment=arrived, losses=(1.0,))
    course.leg(0, trials)
    trials.add(plan, 0, rng.random(len(plan.space)), 0.5, arrival)
    course.leg(1, trials)
    last = course.leg(2, trials)
    assert last.plan is plan
    assert last.history[0].arrival == arrival
    assert tuple(last.history[0].point) == arrived
    moved = course.leg(1, trials).history[0]
    assert moved.arrival is None
    np.testing.assert_allclose(moved.point, arrived, atol=1e-12)


def test_best_keeps_what_the_best_trial_has(make_course: Callable[..., tuple[Course, Plan]]) -> None:
    """First the densities alone, then the coefficients of all but one expert with the densities found."""
    ranged = {"low": 0.0, "high": 1.0}
    course, plan = make_course(
        {"space": {"coefficient": 0.5}, "operator": {"density": {"low": 0.1, "high": 0.9}}},
        {"space": {"groups": "model", "exceptions": {"parity/*": "best"}}, "operator": {"density": "best"}},
        {"space": {"groups": "model", "coefficient": "best"}, "operator": {"density": ranged, "name": "ties"}},
        operator=TIES,
        space={"groups": "layer"},
    )
    trials = Trials()
    assert [dimension.parameter for dimension in course.leg(0, trials).plan.space.dimensions] == ["density"] * 3
    trials.add(plan, 0, [0.1, 0.2, 0.3], 0.5)
    trials.add(plan, 0, [0.25, 0.5, 0.75], 0.6)
    second = course.leg(1, trials)
    assert [dimension.name for dimension in second.plan.space.dimensions] == ["coefficient noise", "coefficient rot90"]
    recipe = second.plan.recipe([0.0, 1.0])
    assert recipe.values["density"] == pytest.approx(np.array([[0.3], [0.5], [0.7]]))
    assert recipe.values["coefficient"][1] == (0.5,)
    assert len(second.history) == 1  # of the two, that with these densities
    assert second.best is not None
    assert second.plan.recipe(second.best.point).values["coefficient"] == pytest.approx(np.full((3, 1), 0.5))
    facts = second.facts()
    assert [(kept["parameter"], kept["expert"]) for kept in facts["kept"]] == [
        ("coefficient", "parity"),
        *(("density", expert) for expert in ("noise", "parity", "rot90")),
    ]
    trials.add(plan, 1, [0.2, 0.4], 0.7)
    third = course.leg(2, trials)
    coefficients = course.recipe(trials[2]).values["coefficient"]
    assert third.plan.recipe(third.plan.space.start).values["coefficient"] == pytest.approx(np.array(coefficients))
    assert len(third.history) == 1


def test_useless_experts_are_dropped(make_course: Callable[..., tuple[Course, Plan]]) -> None:
    """By the mean size over elements: a large coefficient of a small group does not save an expert."""
    course, plan = make_course(
        {"space": {"groups": "tensor"}},
        {"space": {"groups": "layer"}, "keep_experts": 2},
        {},
        space={"coefficient": {"low": -1.0, "high": 1.0, "start": 0.2}},
    )
    trials = Trials()
    numbers = np.full((3, len(plan.tensors)), 0.2)
    numbers[0] = 0.0
    numbers[0, np.argmin([tensor.num_elements for tensor in plan.tensors])] = 1.0
    numbers[2] = -0.5
    trials.add(plan, 0, ((numbers + 1) / 2).ravel(), 0.5)
    leg = course.leg(1, trials)
    assert leg.left_out == ("noise",)
    assert {dimension.expert for dimension in leg.plan.space.dimensions} == {"parity", "rot90"}
    assert leg.best is not None
    recipe = leg.plan.recipe(leg.best.point)
    assert recipe.values["coefficient"][0] == (0.0,) * len(recipe.groups)
    np.testing.assert_allclose(
        recipe.values["coefficient"][1:], np.array([[0.2], [-0.5]]) * np.ones(len(recipe.groups))
    )
    assert leg.history == ()
    trials.add(plan, 1, leg.best.point, 0.9)
    assert course.leg(2, trials).ancestor == 1
    assert {dimension.expert for dimension in course.leg(2, trials).plan.space.dimensions} == set(recipe.experts)


def test_a_stage_does_not_change_when_an_earlier_one_is_extended(
    make_course: Callable[..., tuple[Course, Plan]],
) -> None:
    """A larger budget lengthens the first stage after the second has run: its trials stay what they were."""
    stages = (MODEL, {"space": {"groups": "model", "exceptions": {"noise/*": "best"}}})
    course, plan = make_course(*stages)
    trials = Trials()
    trials.add(plan, 0, [0.1, 0.2, 0.3], 0.5)
    first = course.leg(1, trials)
    trials.add(plan, 1, [0.5, 0.5], 0.6)
    recipe = course.recipe(trials[1])
    trials.add(plan, 0, [0.9, 0.8, 0.7], 0.9)
    resumed, _ = make_course(*stages)
    again = resumed.leg(1, trials)
    assert resumed.recipe(trials[1]) == recipe
    assert again.facts() == first.facts()
    assert [told.index for told in again.history] == [told.index for told in first.history] == [0]


def test_without_a_success_a_stage_starts_where_the_one_before_did(
    make_course: Callable[..., tuple[Course, Plan]],
) -> None:
    course, plan = make_course(MODEL, {"operator": {"density": "best"}, "keep_experts": 1}, operator=TIES, space={})
    trials = Trials()
    trials.add(plan, 0, [0.1, 0.2, 0.3], None)
    leg = course.leg(1, trials)
    assert (leg.best, leg.ancestor, leg.left_out) == (None, None, ("parity", "rot90"))
    assert set(leg.plan.recipe(leg.plan.space.start).values["density"][0]) == {0.3}


@pytest.mark.parametrize(
    ("changes", "num_held"),
    [
        ({}, 4),
        (MODEL, 4),
        ({"space": {"groups": "model", "coefficient": {"low": 0.0, "high": 0.9, "start": 0.3}}}, 1),
        ({"operator": TIES, "space": {"groups": "model"}}, 0),
    ],
)
def test_base_and_experts_are_told_where_the_space_holds_them(
    make_course: Callable[..., tuple[Course, Plan]], changes: dict[str, Any], num_held: int
) -> None:
    """A coefficient of 1 is the expert itself; a range without 1 holds the base alone; TIES trims an expert.

    Before anything is measured, and to a stage of paths, nothing is told.
    """
    course, plan = make_course({}, FLOW, **changes)
    models = ["base", *(f"expert:{name}" for name in plan.experts)]
    searched = {"trial:0": measured(plan, 9.0)} | {name: measured(plan, value) for value, name in enumerate(models)}
    problem = course.leg(0, []).problem((0, 0), searched)
    assert problem.reference_M is not None
    assert set(problem.reference_M) == {0.0}
    assert [told.values_M[0] for told in problem.inputs if told.values_M is not None] == list(range(num_held))
    for told, coefficients_K in zip(problem.inputs, [np.zeros(3), *np.eye(3)], strict=False):
        found = by_tensor(plan.recipe(told.point), plan.tensors)["coefficient"]
        np.testing.assert_allclose(found, np.broadcast_to(coefficients_K[:, None], found.shape), atol=1e-9)
    assert course.leg(0, []).problem((0, 0)).inputs == course.leg(1, []).problem((0, 1), searched).inputs == ()


def test_of_several_operators_best_is_each_ones_own(make_course: Callable[..., tuple[Course, Plan]]) -> None:
    """The best trial chose TIES; DARE's density stays where the stage before started."""
    ranged = {"low": 0.0, "high": 1.0, "start": 0.6}
    operators = [{"name": "ties", "density": ranged}, {"name": "dare_linear", "density": ranged}]
    course, plan = make_course(
        {},
        {"operator": {"name": "ties", "density": "best"}},
        {"operator": {"name": "dare_linear", "density": "best"}},
        operator=operators,
        space={"groups": "model", "coefficient": {"low": 0.0, "high": 1.0, "start": 0.5}},
    )
    trials = Trials()
    trials.add(plan, 0, [0.2, *[0.4] * 3, *[0.25] * 3, *[0.9] * 3], 0.9)
    ties, dare = course.leg(1, trials), course.leg(2, trials)
    assert len(plan.space) == 10
    assert len(ties.plan.space) == len(dare.plan.space) == 7
    assert ties.plan.recipe([0.0, *[0.5] * 6]).values["density"] == ((0.25,),) * 3
    assert dare.plan.recipe([0.9, *[0.5] * 6]).values["density"] == ((0.6,),) * 3
    assert ties.best is not None
    assert ties.plan.recipe(ties.best.point).operator == "ties"
    assert (len(ties.history), len(dare.history)) == (1, 1)
    assert set(ties.facts()["choice"]) == {"ties", "dare_linear"}


def test_paths_are_laid_through_the_best_merge(make_course: Callable[..., tuple[Course, Plan]]) -> None:
    """It leads; of the merges before, the space holds it alone, and of the paths those of the same merge."""
    course, plan = make_course({}, FLOW, {"space": {"kind": "data_flow"}, "keep_experts": 2}, space={"groups": "model"})
    trials = Trials()
    for value, point in ((0.4, [0.1, 0.2, 0.3]), (0.6, [0.9, 0.8, 0.7]), (None, [0.5] * 3)):
        trials.add(plan, 0, point, value)
    first = course.leg(1, trials)
    assert (first.merged, first.ancestor, first.plan.merged) == (1, 1, course.recipe(trials[1]))
    assert [dimension.expert for dimension in first.plan.space.dimensions[:2]] == ["merged"] * 2
    assert first.best is not None
    assert first.best.point.tolist() == first.plan.space.starts[0].tolist()
    assert [observation.index for observation in first.history] == [1]
    recipe = first.plan.recipe(first.best.point)
    assert list(recipe.experts) == ["merged", *plan.experts]
    assert recipe.merges == [first.plan.merged]
    point = first.best.point.copy()
    point[3] = 1.0  # a layer of the first expert
    trials.add(plan, 1, point, 0.7)
    second = course.leg(2, trials)
    assert (second.merged, second.ancestor, second.left_out) == (1, 3, ("rot90",))
    assert [observation.index for observation in second.history] == [1, 0]
    assert second.facts().items() >= {"merged": 1, "ancestor": 3, "left_out": ("rot90",)}.items()


def test_paths_of_the_same_merge_are_told_to_a_wider_space(make_course: Callable[..., tuple[Course, Plan]]) -> None:
    course, plan = make_course({}, FLOW, {"space": {"kind": "data_flow", "scale": {"low": 0.4, "high": 1.6}}})
    trials, rng = Trials(), np.random.default_rng(0)
    trials.add(plan, 0, rng.random(len(plan.space)), 0.5)
    first = course.leg(1, trials)
    for value in (0.4, 0.9):
        trials.add(plan, 1, rng.random(len(first.plan.space)), value)
    second = course.leg(2, trials)
    assert second.ancestor == 2
    assert len(second.history) == 3
    for trial, observation in zip(trials[1:], second.history[1:], strict=True):
        before, after = course.recipe(trial), second.plan.recipe(observation.point)
        assert before.layers == after.layers
        np.testing.assert_allclose(before.values["scale"], after.values["scale"])


def test_without_a_success_paths_are_laid_through_the_merge_at_the_start(
    make_course: Callable[..., tuple[Course, Plan]],
) -> None:
    course, plan = make_course({}, FLOW)
    leg = course.leg(1, [])
    assert leg.plan.merged == plan.recipe(plan.space.starts[0])
    assert (leg.merged, leg.best, leg.history) == (None, None, ())


def test_what_the_file_says_is_kept_as_a_stage_says_it(make_course: Callable[..., tuple[Course, Plan]]) -> None:
    """A stage's keys replace the campaign's, which stand for the stages that have none."""
    course, plan = make_course(
        {"space": {"exceptions": {}}},
        {},
        space={"groups": "model", "exceptions": {"noise/*": 0.1}, "coefficient": {"low": 0.0, "high": 1.0}},
    )
    assert (len(course.leg(0, []).plan.space), len(course.leg(1, []).plan.space)) == (3, 2)
    assert course.leg(1, []).plan is plan


def test_nothing_to_search_is_said_of_the_stage_alone(make_course: Callable[..., tuple[Course, Plan]]) -> None:
    course, plan = make_course(
        {"space": {"coefficient": {"low": 0.0, "high": 1.0}}}, {}, space={"groups": "model", "coefficient": 0.3}
    )
    assert len(plan.space) == 0
    assert plan.recipe(plan.space.start).values["coefficient"] == ((0.3,),) * 3
    assert len(course.leg(0, []).plan.space) == 3
    with pytest.raises(CampaignError, match="nothing is searched"):
        course.leg(1, [])


def test_a_failed_or_pending_trial_is_no_best(make_course: Callable[..., tuple[Course, Plan]]) -> None:
    course, plan = make_course(MODEL, LAYER)
    trials = Trials()
    trials.add(plan, 0, [0.1, 0.2, 0.3], None)
    trials.add(plan, 0, [0.4, 0.5, 0.6], -0.5)
    trials.append(replace(trials[1], number=2, index=2, order=None, measurement=None))
    leg = course.leg(1, trials)
    assert (leg.ancestor, len(leg.history)) == (1, 2)
