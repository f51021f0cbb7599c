"""The space: point to values and back."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import CampaignError
from evomerge.records import ParameterSpec
from evomerge.space.space import Range, Searched, Setting, Space

COEFFICIENT = ParameterSpec(name="coefficient", meaning="of a task vector", default=0.3, low=-0.2, high=1.2)
DENSITY = ParameterSpec(name="density", meaning="kept", default=0.2, low=0.1, high=0.9, minimum=0.0, maximum=1.0)
SCALE = ParameterSpec(name="scale", meaning="of all", default=1.0, low=0.3, high=3.0, per_expert=False)
EXPERTS = ("math", "chat", "code")
GROUPS = {"before": ("e",), "layer0": ("a", "b"), "layer1": ("c",), "after": ("h",)}
DEPTHS = {"before": 0.0, "layer0": 0.0, "layer1": 1.0, "after": 1.0}
DEEP = {f"layer{layer}.{kind}": (f"{layer}.{kind}",) for layer in range(7) for kind in ("attn", "mlp")}
DEEP_DEPTHS = {group: int(group[5]) / 6 for group in DEEP}
SEARCHED = Range(low=-0.2, high=1.2, start=0.3)
ONE = replace(SEARCHED, knots=1)


def searched(setting: Setting = SEARCHED, **exceptions: Setting) -> Searched:
    named = {place.replace("__", "/"): given for place, given in exceptions.items()}
    return Searched(spec=COEFFICIENT, setting=setting, exceptions=named)


def space(*parameters: Searched) -> Space:
    return Space(EXPERTS, GROUPS, DEPTHS, parameters)


def deep(*parameters: Searched) -> Space:
    return Space(EXPERTS, DEEP, DEEP_DEPTHS, parameters)


def start_of(held: Space) -> np.ndarray:
    return np.array([dimension.start_coordinate for dimension in held.dimensions])


@st.composite
def ranges(draw: st.DrawFn) -> Range:
    low, start, high = sorted(draw(st.lists(st.floats(-5, 5), min_size=3, max_size=3)))
    return Range(low=low, start=start, high=high if high > low + 1e-3 else low + 1.0)


@st.composite
def spaces(draw: st.DrawFn, most_knots: int = 1) -> Space:
    """Of one per-expert parameter with exceptions, one that may be shared over groups, and one of the whole merge."""
    knots = st.sampled_from([None, *range(1, most_knots + 1)])
    first = Searched(
        spec=COEFFICIENT,
        setting=replace(draw(ranges()), knots=draw(knots)),
        exceptions={"math/*0*": draw(st.one_of(ranges(), st.floats(-3, 3)))} if draw(st.booleans()) else {},
    )
    density = Searched(
        spec=DENSITY,
        setting=draw(st.sampled_from([0.5, Range(low=0.1, high=0.9, start=0.2)])),
        exceptions={"*/*.mlp": Range(low=0.0, high=1.0, start=1.0, knots=draw(knots))} if most_knots > 1 else {},
    )
    scale = Searched(
        spec=SCALE,
        setting=draw(st.sampled_from([1.0, Range(low=0.5, high=2.0, start=1.0, knots=draw(knots))])),
    )
    return (deep if most_knots > 1 else space)(first, density, scale)


@given(spaces(), st.integers(0, 2**31))
def test_values_stay_in_range_and_each_dimension_moves_what_it_names(held: Space, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lowest, highest = held.values(np.zeros(len(held))), held.values(np.ones(len(held)))
    values = held.values(rng.random(len(held)))
    for name, matrix in values.items():
        assert matrix.shape == (1 if name == "scale" else 3, 4)
        assert (matrix >= np.minimum(lowest[name], highest[name]) - 1e-12).all()
        assert (matrix <= np.maximum(lowest[name], highest[name]) + 1e-12).all()
    for d, dimension in enumerate(held.dimensions):
        point = np.zeros(len(held))
        point[d] = 1.0
        moved = held.values(point)
        changed = {name: moved[name] != lowest[name] for name in moved}
        assert {name for name in changed if changed[name].any()} == {dimension.parameter}
        matrix = moved[dimension.parameter]
        assert np.allclose(matrix[changed[dimension.parameter]], dimension.high, rtol=0, atol=1e-12)
        assert np.allclose(lowest[dimension.parameter][changed[dimension.parameter]], dimension.low, rtol=0, atol=1e-12)
        rows = {EXPERTS[k] for k in np.nonzero(changed[dimension.parameter])[0]} if len(matrix) == 3 else {None}
        assert rows == {dimension.expert}


@given(spaces())
def test_the_start_decodes_to_the_starts(held: Space) -> None:
    assert start_of(held).shape == (len(held),)
    assert ((start_of(held) >= 0) & (start_of(held) <= 1)).all()
    values = held.values(start_of(held))
    for d, dimension in enumerate(held.dimensions):
        nudged = start_of(held)
        nudged[d] += 0.25
        moved = held.values(nudged)[dimension.parameter] != values[dimension.parameter]
        assert np.allclose(values[dimension.parameter][moved], dimension.start, rtol=0, atol=1e-12)
        assert moved.any()


@given(spaces(most_knots=4), st.integers(0, 2**31), st.floats(0, 1))
def test_values_are_affine_in_the_point_and_pull_back_is_the_transpose(held: Space, seed: int, mix: float) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.random((2, len(held)))
    between = held.values(mix * one + (1 - mix) * other)
    at_one, at_other, at_zero = held.values(one), held.values(other), held.values(np.zeros(len(held)))
    inner = 0.0
    gradients = {name: rng.normal(size=matrix.shape) for name, matrix in at_one.items()}
    for name, matrix in between.items():
        np.testing.assert_allclose(matrix, mix * at_one[name] + (1 - mix) * at_other[name], rtol=0, atol=1e-9)
        inner += float((gradients[name] * (at_one[name] - at_zero[name])).sum())
    np.testing.assert_allclose(held.pull_back(gradients) @ (one * held.spans_D), inner, rtol=0, atol=1e-9)


@given(spaces(most_knots=4), st.integers(0, 2**31))
def test_pull_back_equals_finite_differences(held: Space, seed: int) -> None:
    """Of f(values) = sum of sines, in the searched numbers' own units."""
    rng = np.random.default_rng(seed)
    point, step = rng.random(len(held)), 1e-5

    def f(at: np.ndarray) -> float:
        return sum(float(np.sin(matrix).sum()) for matrix in held.values(at).values())

    gradient = held.pull_back({name: np.cos(matrix) for name, matrix in held.values(point).items()})
    for d in range(len(held)):
        up, down = point.copy(), point.copy()
        up[d] += step / held.spans_D[d]
        down[d] -= step / held.spans_D[d]
        assert gradient[d] == pytest.approx((f(up) - f(down)) / (2 * step), abs=1e-6)


@given(spaces(most_knots=4), st.integers(0, 2**31))
def test_the_nearest_point_to_values_of_the_space_has_these_values(held: Space, seed: int) -> None:
    values = held.values(np.random.default_rng(seed).random(len(held)))
    sizes = np.random.default_rng(seed).integers(1, 100, len(held.groups)).astype(float)
    again = held.values(held.nearest(values, sizes))
    for name, matrix in values.items():
        np.testing.assert_allclose(again[name], matrix, rtol=0, atol=1e-9)


def test_the_nearest_point_is_the_mean_over_elements_within_the_range() -> None:
    held = space(Searched(spec=COEFFICIENT, setting=replace(ONE, low=0.0, high=1.0)))
    wanted = np.array([[0.1, 0.2, 0.3, 0.4], [0.0, 2.0, 2.0, 2.0], [-1.0, 0.0, 0.0, 0.0]])
    point = held.nearest({"coefficient": wanted}, np.array([1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(point, [0.3, 1.0, 0.0], atol=1e-12)


def test_the_nearest_line_over_depth_is_the_least_squares_line() -> None:
    knots = deep(searched(replace(SEARCHED, low=-9.0, high=9.0, knots=2)))
    rng = np.random.default_rng(0)
    wanted, sizes = rng.normal(size=(3, 14)), rng.integers(1, 9, 14).astype(float)
    held = knots.values(knots.nearest({"coefficient": wanted}, sizes))["coefficient"]
    depths = np.array(list(DEEP_DEPTHS.values()))
    for line, row in zip(held, wanted, strict=True):
        slope, offset = np.polyfit(depths, row, 1, w=np.sqrt(sizes))
        np.testing.assert_allclose(line, offset + slope * depths, atol=1e-9)


def test_numbers_that_values_do_not_determine_move_as_little_as_possible() -> None:
    """Three knots over two groups at a quarter and three quarters of the depth."""
    groups = {"early": ("a",), "late": ("b",)}
    held = Space(EXPERTS[:1], groups, {"early": 0.25, "late": 0.75}, [searched(replace(SEARCHED, start=0.5, knots=3))])
    point = held.nearest({"coefficient": np.full((1, 2), 0.5)}, np.ones(2))
    np.testing.assert_allclose(point, start_of(held), atol=1e-12)
    moved = held.values(held.nearest({"coefficient": np.array([[0.4, 0.7]])}, np.ones(2)))
    np.testing.assert_allclose(moved["coefficient"], [[0.4, 0.7]], atol=1e-12)


def test_numbers_of_an_earlier_stage_are_kept_where_they_are_asked_for() -> None:
    found = np.arange(12.0).reshape(3, 4) / 10
    held = space(searched(found, chat__layer1=SEARCHED))
    assert [dimension.name for dimension in held.dimensions] == ["coefficient chat/layer1"]
    expected = found.copy()
    expected[1, 2] = 1.2
    assert (held.values([1.0])["coefficient"] == expected).all()
    assert len(held.kept) == 11
    assert [kept.number for kept in held.kept if (kept.expert, kept.group) == ("chat", "layer0")] == [0.5]


def test_experts_that_are_left_out_have_their_number_whatever_else_is_said() -> None:
    parameter = replace(searched(SEARCHED, chat__layer1=0.7, math__before=0.5), left_out={"chat": 0.0})
    held = space(parameter)
    assert {dimension.expert for dimension in held.dimensions} == {"math", "code"}
    assert (held.values(np.ones(len(held)))["coefficient"][1] == 0.0).all()


def test_one_number_a_group_for_every_expert() -> None:
    held = space(searched())
    assert [dimension.name for dimension in held.dimensions] == [
        f"coefficient {expert}/{group}" for expert in EXPERTS for group in GROUPS
    ]
    point = np.arange(12) / 12
    np.testing.assert_allclose(held.values(point)["coefficient"], -0.2 + 1.4 * point.reshape(3, 4), atol=1e-15)
    np.testing.assert_allclose(held.spans_D, np.full(12, 1.4))


def test_one_number_for_the_whole_model() -> None:
    held = space(searched(ONE))
    assert [dimension.name for dimension in held.dimensions] == [
        "coefficient math",
        "coefficient chat",
        "coefficient code",
    ]
    assert held.values([0.0, 0.5, 1.0])["coefficient"] == pytest.approx(np.repeat([[-0.2], [0.5], [1.2]], 4, axis=1))


def test_a_parameter_of_the_whole_merge_has_one_row() -> None:
    one = space(Searched(spec=SCALE, setting=Range(low=0.5, high=2.5, start=1.0, knots=1)))
    assert [dimension.name for dimension in one.dimensions] == ["scale"]
    assert one.values([0.5])["scale"].tolist() == [[1.5, 1.5, 1.5, 1.5]]
    by_group = space(Searched(spec=SCALE, setting=Range(low=0.5, high=2.5, start=1.0)))
    assert [dimension.name for dimension in by_group.dimensions] == [f"scale {group}" for group in GROUPS]


def test_fixed_numbers_take_no_dimension() -> None:
    held = space(searched(ONE), Searched(spec=DENSITY, setting=0.4))
    assert len(held) == 3
    for point in (np.zeros(3), np.ones(3)):
        assert (held.values(point)["density"] == 0.4).all()


def test_groups_of_one_are_left_out_of_the_names() -> None:
    held = Space(EXPERTS, {"model": ("a", "b")}, {}, [searched()])
    assert [dimension.name for dimension in held.dimensions] == [
        "coefficient math",
        "coefficient chat",
        "coefficient code",
    ]


def test_the_first_exception_that_matches_wins() -> None:
    held = space(searched(0.0, math__layer0=0.9, **{"math__*": 0.5, "*__layer0": Range(low=1.0, high=2.0, start=1.5)}))
    assert [dimension.name for dimension in held.dimensions] == ["coefficient chat/layer0", "coefficient code/layer0"]
    assert held.values([0.0, 1.0])["coefficient"].tolist() == [[0.5, 0.9, 0.5, 0.5], [0, 1, 0, 0], [0, 2, 0, 0]]


def test_exceptions_to_a_number_shared_over_groups() -> None:
    """What is no exception still shares one number an expert."""
    held = space(searched(ONE, **{"chat__layer0": Range(low=0.0, high=0.1, start=0.0), "code__*": 0.25}))
    assert len(held) == 3
    values = held.values([0.0, 1.0, 1.0])["coefficient"]
    assert values == pytest.approx(np.array([[-0.2] * 4, [1.2, 0.1, 1.2, 1.2], [0.25] * 4]))


@pytest.mark.parametrize(
    ("exceptions", "words"),
    [
        ({"maths/*": 0.5}, ["coefficient", "'maths/*'", "math/"]),
        ({"*/*": 0.5, "math/layer0": Range(low=0.0, high=1.0, start=0.5)}, ["'math/layer0'"]),
    ],
)
def test_an_exception_that_matches_nothing_is_an_error(exceptions: Mapping[str, Setting], words: list[str]) -> None:
    with pytest.raises(CampaignError) as caught:
        space(Searched(spec=COEFFICIENT, setting=SEARCHED, exceptions=exceptions))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (Range(low=-0.1, high=0.5, start=0.2), ["density", "[0, 1]", "-0.1"]),
        (Range(low=0.1, high=1.5, start=0.2), ["density", "[0, 1]", "1.5"]),
        (1.01, ["density", "1.01"]),
        (float("nan"), ["density", "nan"]),
        (Range(low=0.5, high=0.2, start=0.3), ["low <= start <= high"]),
        (Range(low=0.1, high=0.5, start=0.7), ["low <= start <= high", "start 0.7"]),
        (Range(low=0.5, high=0.5, start=0.5), ["both 0.5", "fix it"]),
    ],
)
def test_ranges_that_cannot_be_are_errors(setting: Setting, words: list[str]) -> None:
    with pytest.raises(CampaignError) as caught:
        space(searched(), Searched(spec=DENSITY, setting=setting))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("shape", [(1,), (), (11,), (13,), (3, 4)])
def test_a_point_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected 12 coordinates"):
        space(searched()).values(np.zeros(shape))


@given(st.integers(2, 7), st.integers(0, 2**31))
def test_knots_are_interpolated_as_numpy_does(num_knots: int, seed: int) -> None:
    held = deep(searched(replace(SEARCHED, knots=num_knots)))
    knots = np.linspace(0, 1, num_knots)
    assert [dimension.name for dimension in held.dimensions[:num_knots]] == [
        f"coefficient math/depth {knot:.3g}" for knot in knots
    ]
    point = np.random.default_rng(seed).random(len(held))
    numbers = -0.2 + 1.4 * point.reshape(3, num_knots)
    expected = [[np.interp(depth, knots, row) for depth in DEEP_DEPTHS.values()] for row in numbers]
    np.testing.assert_allclose(held.values(point)["coefficient"], expected, rtol=0, atol=1e-12)


def test_what_lies_outside_the_blocks_takes_the_end_of_the_knots() -> None:
    held = space(searched(replace(SEARCHED, knots=2)))
    assert len(held) == 6
    values = held.values([0.0, 1.0] * 3)["coefficient"]
    assert values == pytest.approx(np.tile([-0.2, -0.2, 1.2, 1.2], (3, 1)))


def test_kinds_of_modules_have_knots_of_their_own() -> None:
    two = Range(low=0.0, high=1.0, start=0.5, knots=2)
    held = deep(searched(0.3, **{"math__*.attn": two, "code__*": ONE, "*__*.mlp": replace(two, knots=1)}))
    assert [dimension.name for dimension in held.dimensions] == [
        "coefficient math/*.attn depth 0",
        "coefficient math/*.attn depth 1",
        "coefficient math/*.mlp",
        "coefficient chat/*.mlp",
        "coefficient code/*",
    ]
    math, chat, code = held.values([0.0, 0.6, 0.25, 0.75, 1.0])["coefficient"]
    np.testing.assert_allclose(math[::2], np.linspace(0.0, 0.6, 7))
    assert set(math[1::2]) == {0.25}
    assert set(chat[::2]) == {0.3}
    assert set(chat[1::2]) == {0.75}
    assert code == pytest.approx(np.full(14, 1.2))


def test_fixed_numbers_over_depth() -> None:
    held = deep(searched(), Searched(spec=DENSITY, setting=(0.1, 0.5, 0.9), exceptions={"*/layer0.*": (1.0,)}))
    expected = np.interp(list(DEEP_DEPTHS.values()), [0.0, 0.5, 1.0], [0.1, 0.5, 0.9])
    expected[:2] = 1.0
    np.testing.assert_allclose(held.values(np.zeros(len(held)))["density"], [expected] * 3, rtol=0, atol=1e-12)


def test_rounding_leaves_no_operator_range() -> None:
    whole = Range(low=0.0, high=1.0, start=0.5, knots=3)
    held = deep(searched(0.3), Searched(spec=DENSITY, setting=whole), Searched(spec=SCALE, setting=(0.7, 0.7, 0.7)))
    values = held.values(np.ones(len(held)))
    assert values["density"].max() <= 1.0
    assert values["scale"].tolist() == [[0.7] * 14]


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        (
            replace(SEARCHED, knots=2),
            ["coefficient", "group 'model' is not at one depth", "groups: layer, module or tensor"],
        ),
        ((0.1, 0.9), ["coefficient", "group 'model' is not at one depth", "lists over depth"]),
    ],
)
def test_depth_needs_groups_that_have_one(setting: Setting, words: list[str]) -> None:
    with pytest.raises(CampaignError) as caught:
        Space(EXPERTS, {"model": ("a", "b")}, {}, [searched(setting)])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "parameter",
    [searched(replace(SEARCHED, knots=14)), searched(0.3, **{"*__layer3.*": replace(SEARCHED, knots=3)})],
)
def test_a_knot_that_moves_nothing_is_refused(parameter: Searched) -> None:
    with pytest.raises(
        CampaignError, match=r"coefficient: no group lies near the knot 'coefficient math/.*depth 0.*fewer"
    ):
        deep(parameter)
