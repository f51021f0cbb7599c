"""The choice of the operator: bins, shared coefficients, and numbers of one's own."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.records import ParameterSpec
from evomerge.space.choice import Choice, chosen
from evomerge.space.space import Range, Searched, Space

EXPERTS = ("math", "chat")
GROUPS = {"layer0": ("a",), "layer1": ("b",)}
COEFFICIENT = ParameterSpec(name="coefficient", meaning="of a task vector", default=0.3, low=-0.2, high=1.2)
DENSITY = ParameterSpec(name="density", meaning="kept", default=0.2, low=0.1, high=0.9, minimum=0.0, maximum=1.0)
SCALE = ParameterSpec(name="scale", meaning="of all", default=1.0, low=0.3, high=3.0, per_expert=False)


def space(*parameters: Searched) -> Space:
    return Space(EXPERTS, GROUPS, {"layer0": 0.0, "layer1": 1.0}, parameters)


def coefficient(low: float, high: float, start: float) -> Searched:
    return Searched(spec=COEFFICIENT, setting=Range(low=low, high=high, start=start))


def density(low: float = 0.1) -> Searched:
    return Searched(spec=DENSITY, setting=Range(low=low, high=0.9, start=0.5, knots=1))


def three() -> Choice:
    scale = Searched(spec=SCALE, setting=Range(low=0.5, high=2.5, start=1.0, knots=1))
    return Choice(
        {
            "task": space(coefficient(-0.2, 1.2, 0.3)),
            "ties": space(coefficient(0.0, 2.0, 1.0), density(), scale),
            "dare": space(coefficient(0.0, 1.0, 1.0), density(0.2)),
        }
    )


def test_one_space_is_itself() -> None:
    only = space(coefficient(-0.2, 1.2, 0.3), density())
    held = Choice({"ties": only})
    assert held.dimensions == only.dimensions
    assert held.start.tolist() == [dimension.start_coordinate for dimension in only.dimensions]
    branch = held.branch(np.ones(6))
    assert (branch.operator, branch.space, branch.columns_d.tolist()) == ("ties", only, list(range(6)))


def test_coefficients_are_shared_and_the_rest_is_named_after_its_operator() -> None:
    held = three()
    assert [dimension.name for dimension in held.dimensions] == [
        "operator",
        "coefficient math/layer0",
        "coefficient math/layer1",
        "coefficient chat/layer0",
        "coefficient chat/layer1",
        "ties.density math",
        "ties.density chat",
        "ties.scale",
        "dare.density math",
        "dare.density chat",
    ]
    assert len(held) == 10
    np.testing.assert_allclose(held.start, [1 / 6, *[0.5 / 1.4] * 4, 0.5, 0.5, 0.25, 3 / 7, 3 / 7])
    assert held.branch(held.start).operator == "task"


def test_a_coordinate_is_scaled_into_the_range_of_the_operator_that_reads_it() -> None:
    held = three()
    point = np.array([0.0, 0.5, 0.5, 0.5, 0.5, 0.0, 1.0, 0.25, 0.5, 0.0])
    values = {}
    for x, operator in ((0.1, "task"), (0.5, "ties"), (0.9, "dare")):
        point[0] = x
        branch = held.branch(point)
        assert branch.operator == operator
        values[operator] = branch.space.values(point[branch.columns_d])
    assert values["task"]["coefficient"] == pytest.approx(np.full((2, 2), 0.5))
    assert values["ties"]["coefficient"] == pytest.approx(np.full((2, 2), 1.0))
    assert values["dare"]["coefficient"] == pytest.approx(np.full((2, 2), 0.5))
    assert values["ties"]["density"] == pytest.approx(np.array([[0.1, 0.1], [0.9, 0.9]]))
    assert values["dare"]["density"] == pytest.approx(np.array([[0.55, 0.55], [0.2, 0.2]]))
    assert values["ties"]["scale"] == pytest.approx(np.array([[1.0, 1.0]]))
    assert values["task"].keys() == {"coefficient"}


@given(st.integers(0, 2), st.integers(0, 2**31))
def test_the_nearest_point_chooses_the_operator_and_scales_into_its_range(place: int, seed: int) -> None:
    held = three()
    point = np.random.default_rng(seed).random(len(held))
    point[0] = (place + 0.5) / 3
    branch = held.branch(point)
    values = branch.space.values(point[branch.columns_d])
    nearest = held.nearest(branch.operator, values, np.array([3.0, 1.0]))
    others = [d for d in range(1, len(held)) if d not in branch.columns_d]
    np.testing.assert_allclose(nearest[[0, *branch.columns_d]], point[[0, *branch.columns_d]], atol=1e-12)
    assert (nearest[others] == held.start[others]).all()


@given(st.floats(0, 1), st.integers(1, 7))
def test_bins_are_equal(x: float, num_operators: int) -> None:
    found = chosen([x], num_operators)
    assert 0 <= found < num_operators
    assert found / num_operators <= x + 1e-12
    assert x <= (found + 1) / num_operators + 1e-12
    assert chosen([(found + 0.5) / num_operators], num_operators) == found


def test_operators_alone_can_be_searched() -> None:
    fixed = space(Searched(spec=COEFFICIENT, setting=0.3))
    held = Choice({"task": fixed, "linear": fixed})
    assert [dimension.name for dimension in held.dimensions] == ["operator"]
    assert held.branch([1.0]).space.values([])["coefficient"].tolist() == [[0.3, 0.3], [0.3, 0.3]]


def test_every_operator_has_a_start_that_chooses_it() -> None:
    choice = three()
    starts = choice.starts
    assert [choice.branch(start_D).operator for start_D in starts] == ["task", "ties", "dare"]
    assert starts[0].tolist() == choice.start.tolist()
    assert all(start_D[1:].tolist() == choice.start[1:].tolist() for start_D in starts)


def test_the_start_of_one_operator_alone_is_its_own() -> None:
    alone = Choice({"task": space(coefficient(-0.2, 1.2, 0.3))})
    assert [start_D.tolist() for start_D in alone.starts] == [alone.start.tolist()]
