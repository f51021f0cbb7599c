"""Starts that are the experts' shares: the rule itself, and which sizes a number's start goes by."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.records import Floats, ParameterSpec
from evomerge.space.choice import Choice
from evomerge.space.shares import Measure, ShareOptions, shares
from evomerge.space.space import Range, Searched, Setting, Space

SPEC = ParameterSpec(name="coefficient", meaning="of a task vector", default=0.3, low=-0.2, high=1.2)
SQUARES_KG = np.array([[1.0, 0.0, 6.0], [3.0, 0.0, 2.0]])
sizes = st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=6)


def space(setting: Setting, **exceptions: Setting) -> Space:
    """Two experts, and three groups that are evenly spaced over depth."""
    groups = {f"layer{layer}": (f"t{layer}",) for layer in range(3)}
    patterns = {pattern.replace("__", "/"): given for pattern, given in exceptions.items()}
    searched = Searched(spec=SPEC, setting=setting, exceptions=patterns)
    return Space(("math", "chat"), groups, {"layer0": 0.0, "layer1": 0.5, "layer2": 1.0}, [searched])


def share(knots: int | None = None, low: float = -0.2, high: float = 1.2, **options: Any) -> Range:
    rule = ShareOptions(**{"by": "mean_square", **options})
    return Range(low=low, high=high, start=0.3, knots=knots, shares=rule)


def measured(measure: Measure) -> Floats:
    return SQUARES_KG if measure == "mean_square" else np.array([[1.0, 2.0, 3.0], [1.0, 6.0, 1.0]])


def starts(held: Space | Choice) -> dict[str, float]:
    return {dimension.name: dimension.start for dimension in held.with_starts(measured).dimensions}


@given(sizes, st.floats(-4, 4), st.floats(0.1, 5))
def test_shares_are_powers_of_the_sizes_normalized(sizes_K: list[float], power: float, total: float) -> None:
    found_K = shares(np.array(sizes_K), ShareOptions(by="mean_square", power=power, total=total))
    assert found_K.sum() == pytest.approx(total)
    powers = np.array([np.longdouble(size) ** np.longdouble(power) for size in sizes_K])
    np.testing.assert_allclose(found_K, (total * powers / powers.sum()).astype(float), rtol=1e-9, atol=1e-300)


@given(sizes, st.floats(-4, 4), st.floats(1e-20, 1e20))
def test_the_unit_of_the_sizes_is_irrelevant(sizes_K: list[float], power: float, unit: float) -> None:
    options = ShareOptions(by="mean_square", power=power)
    one_K, other_K = shares(np.array(sizes_K), options), shares(unit * np.array(sizes_K), options)
    np.testing.assert_allclose(one_K, other_K, rtol=1e-9, atol=1e-300)


@pytest.mark.parametrize(
    ("sizes_K", "power", "expected"),
    [
        ([0.0, 1.0, 3.0], 1.0, [0.0, 0.25, 0.75]),
        ([0.0, 0.0, 3.0], -1.0, [0.5, 0.5, 0.0]),
        ([0.0, 0.0, 0.0], 1.0, [1 / 3, 1 / 3, 1 / 3]),
        ([0.0, 0.0, 0.0], -2.0, [1 / 3, 1 / 3, 1 / 3]),
        ([0.0, 2.0, 5.0], 0.0, [1 / 3, 1 / 3, 1 / 3]),
        ([1e-300, 3e-300], 1.0, [0.25, 0.75]),
        ([1e-300, 1e300], -3.0, [1.0, 0.0]),
    ],
)
def test_sizes_of_zero_and_of_the_ends_of_the_scale(sizes_K: list[float], power: float, expected: list[float]) -> None:
    found_K = shares(np.array(sizes_K), ShareOptions(by="mean_square", power=power))
    np.testing.assert_allclose(found_K, expected, rtol=1e-12, atol=0)


def test_each_group_has_its_own_shares() -> None:
    """Where no expert moves anything, the shares are equal."""
    assert starts(space(share())) == pytest.approx(
        {
            "coefficient math/layer0": 0.25,
            "coefficient math/layer1": 0.5,
            "coefficient math/layer2": 0.75,
            "coefficient chat/layer0": 0.75,
            "coefficient chat/layer1": 0.5,
            "coefficient chat/layer2": 0.25,
        }
    )


def test_a_number_for_several_groups_goes_by_all_their_entries() -> None:
    assert starts(space(share(knots=1))) == pytest.approx({"coefficient math": 7 / 12, "coefficient chat": 5 / 12})
    # Halfway between two knots, a group counts half for each; here the middle one has the sizes 2 and 6.
    found = starts(space(share(knots=2, by="mean_magnitude")))
    assert found["coefficient math/depth 0"] == pytest.approx((1 + 0.5 * 2) / (1 + 1 + 0.5 * 8))
    assert found["coefficient math/depth 1"] == pytest.approx((3 + 0.5 * 2) / (3 + 1 + 0.5 * 8))
    assert found["coefficient math/depth 1"] + found["coefficient chat/depth 1"] == pytest.approx(1.0)


def test_a_share_outside_the_range_starts_at_its_bound() -> None:
    found = starts(space(share(low=0.3, high=0.6)))
    assert sorted(found.values()) == pytest.approx([0.3, 0.3, 0.5, 0.5, 0.6, 0.6])


def test_experts_with_numbers_of_their_own_keep_their_share() -> None:
    """Only what says so starts at a share; the others count as experts all the same."""
    held = space(share(total=2.0), math__layer0=0.9, math__layer2=Range(low=0.0, high=1.0, start=0.1))
    found = starts(held)
    assert "coefficient math/layer0" not in found
    assert found["coefficient math/layer2"] == 0.1
    assert found["coefficient chat/layer0"] == found["coefficient chat/layer2"] + 0.7 == pytest.approx(1.2)


def test_numbers_that_are_given_need_no_sizes() -> None:
    def never(measure: Measure) -> Floats:
        raise AssertionError(measure)

    losses = {"chat": 0.5, "math": 2.0}
    for knots in (None, 1, 2):
        decided = space(share(knots, by=losses, power=-2.0)).with_starts(never)
        found = {dimension.expert: dimension.start for dimension in decided.dimensions}
        assert found == pytest.approx({"math": 1 / 17, "chat": 16 / 17})


def test_until_the_experts_decide_a_space_starts_where_the_range_says() -> None:
    held = space(share())
    assert {dimension.start for dimension in held.dimensions} == {0.3}
    decided = held.with_starts(measured)
    assert {dimension.start for dimension in held.dimensions} == {0.3}
    point = np.linspace(0, 1, 6)
    np.testing.assert_array_equal(decided.values(point)["coefficient"], held.values(point)["coefficient"])
    assert decided.with_starts(measured).dimensions == decided.dimensions


def test_operators_share_the_coordinates_of_a_start() -> None:
    """The start is the first operator's; another range makes another number of it, as of any start."""
    choice = Choice({"wide": space(share(high=1.8)), "narrow": space(share(low=0.0, high=1.0))}).with_starts(measured)
    wide, narrow = choice.starts
    for point_D, low, high in ((wide, -0.2, 1.8), (narrow, 0.0, 1.0)):
        branch = choice.branch(point_D)
        values_KG = branch.space.values(point_D[branch.columns_d])["coefficient"]
        shares_KG = np.array([[0.25, 0.5, 0.75], [0.75, 0.5, 0.25]])
        np.testing.assert_allclose(values_KG, low + (shares_KG + 0.2) / 2.0 * (high - low))
