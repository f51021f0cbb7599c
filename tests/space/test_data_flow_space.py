"""The data-flow space: which point is which path."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.space.data_flow import DataFlow, PathLayer, gains
from evomerge.space.space import Range

DEPTH = 3
SCALE = Range(low=0.5, high=1.5, start=1.0)


def make(**changes: Any) -> DataFlow:
    options = {"repeats": 2, "max_layers": None, "scale": SCALE, **changes}
    return DataFlow(["a", "b"], DEPTH, **options)


def point(space: DataFlow, on: set[int], scales: dict[int, float] | None = None) -> list[float]:
    """Coordinates with positions on, and scales in their own unit (otherwise 1)."""
    num = sum(dimension.is_binary for dimension in space.dimensions)
    return [float(t in on) for t in range(num)] + [(scales or {}).get(t, 1.0) - 0.5 for t in range(num)]


def layers(space: DataFlow, at: Any) -> list[tuple[int, int]]:
    return [(step.expert, step.layer) for step in space.path(at)]


def test_all_layers_of_all_experts_stand_in_a_row_and_again() -> None:
    space = make()
    num = 2 * 2 * DEPTH
    row = [(expert, layer) for expert in (0, 1) for layer in range(DEPTH)]
    assert layers(space, point(space, set(range(num)))) == row * 2
    assert layers(space, point(space, {1, 5, 7})) == [(0, 1), (1, 2), (0, 1)]
    assert len(space) == 2 * num
    names = [dimension.name for dimension in space.dimensions]
    assert [names[0], names[5], names[7], names[num + 7]] == [
        "on a/layer0 pass 1", "on b/layer2 pass 1", "on a/layer1 pass 2", "scale a/layer1 pass 2",
    ]  # fmt: skip
    assert make(repeats=1).dimensions[4].name == "on b/layer1"


def test_the_start_is_the_first_experts_own_layers() -> None:
    for space in (make(), make(scale=1.0), make(repeats=1)):
        [start] = space.starts
        assert space.path(start) == tuple(PathLayer(0, layer, 1.0) for layer in range(DEPTH))


def test_a_fixed_scale_is_no_dimension() -> None:
    space = make(scale=0.5)
    assert len(space) == 12
    assert all(dimension.is_binary for dimension in space.dimensions)
    assert [step.gain for step in space.path(space.starts[0])] == [2.0, 4.0, 8.0]


def test_only_scales_of_layers_that_are_on_count() -> None:
    space = make()
    on = {0, 4, 8}
    scales = {0: 0.5, 4: 1.25, 8: 0.8}
    others = dict.fromkeys(set(range(12)) - on, 0.7)
    assert space.path(point(space, on, scales)) == space.path(point(space, on, scales | others))
    assert [step.gain for step in space.path(point(space, on, scales))] == pytest.approx([2.0, 1.6, 2.0])


def test_gains_undo_scales() -> None:
    """h <- W h + f, every f as it is, against the sum of gains times f, up to the product of all scales."""
    rng = np.random.default_rng(0)
    scales, written = rng.uniform(0.5, 1.5, 7), rng.standard_normal((7, 4))
    embeddings = rng.standard_normal(4)
    stream = embeddings
    for scale, f in zip(scales, written, strict=True):
        stream = scale * stream + f
    np.testing.assert_allclose(stream / scales.prod(), embeddings + gains(scales) @ written)


def test_experts_that_are_left_out_have_no_positions() -> None:
    space = DataFlow(["a", "b", "c"], DEPTH, repeats=2, max_layers=None, scale=1.0, left_out=["b"])
    assert {dimension.expert for dimension in space.dimensions} == {"a", "c"}
    row = [(expert, layer) for expert in (0, 2) for layer in range(DEPTH)]
    assert layers(space, [1.0] * len(space)) == row * 2


coordinates = st.lists(st.floats(0, 1), min_size=24, max_size=24)


@given(coordinates, st.integers(1, 12))
def test_as_many_layers_as_are_on_between_one_and_the_bound(at: list[float], bound: int) -> None:
    on = [t for t in range(12) if at[t] > 0.5]
    found = layers(make(max_layers=bound), at)
    assert len(found) == min(max(1, len(on)), bound)
    if 1 <= len(on) <= bound:
        row = [(expert, layer) for expert in (0, 1) for layer in range(DEPTH)] * 2
        assert found == [row[t] for t in on]


@given(coordinates, st.integers(0, 11), st.floats(0, 1), st.integers(1, 12))
def test_a_larger_coordinate_never_takes_a_layer_out(at: list[float], t: int, higher: float, bound: int) -> None:
    """Experts of one layer each: a layer's name is its position."""
    space = DataFlow([f"e{n}" for n in range(12)], 1, repeats=1, max_layers=bound, scale=SCALE)
    before = (t, 0) in layers(space, at)
    raised = [*at[:t], max(at[t], higher), *at[t + 1 :]]
    assert not before or (t, 0) in layers(space, raised)


@given(coordinates, st.booleans())
def test_the_point_of_a_path_has_that_path(at: list[float], is_scaled: bool) -> None:
    space = make() if is_scaled else make(scale=0.8)
    path = space.path(at[: len(space)])
    again = space.path(space.nearest(path))
    assert [(step.expert, step.layer) for step in again] == [(step.expert, step.layer) for step in path]
    np.testing.assert_allclose([step.gain for step in again], [step.gain for step in path], rtol=1e-9)


def test_the_first_experts_own_layers_lie_at_the_start() -> None:
    space = make()
    assert space.nearest(space.own_layers).tolist() == space.starts[0].tolist()


def test_what_a_space_has_no_position_for_is_left_out() -> None:
    """One row holds no layer behind itself; scales are moved to the bounds."""
    space = make(repeats=1)
    path = (PathLayer(0, 1, 1 / 3.0), PathLayer(0, 0, 1.0), PathLayer(1, 2, 1.0))
    assert space.path(space.nearest(path)) == (PathLayer(0, 1, 1 / 1.5), PathLayer(1, 2, 1 / 1.5 / 0.5))


def test_beyond_the_bound_the_largest_stay_and_of_equal_ones_the_earlier() -> None:
    space = make(max_layers=2)
    at = point(space, {0, 3, 5})
    at[3] = 0.9
    assert layers(space, at) == [(0, 0), (1, 2)]
    assert layers(space, point(space, set(range(12)))) == [(0, 0), (0, 1)]


def test_a_point_of_another_length_is_no_point() -> None:
    with pytest.raises(ValueError, match="expected 24 coordinates"):
        make().path([0.5])
