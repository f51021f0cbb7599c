"""The tables behind trims, against sorting: exact for small tensors, within the stated error for large ones."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_contract import Problem, lay_out
from torch import Tensor
from trimmed_contract import draws

from evomerge.kernels.masked import Trims, block_keys, kept_entries
from evomerge.kernels.sources import Sources
from evomerge.kernels.tiles import Vote
from evomerge.operators.masks import (
    ALL_ENTRIES,
    QUANTILES,
    DrawnMass,
    MagnitudeTable,
    l1_gain,
    magnitude_tables,
    num_kept,
    sizes,
    thresholds,
    uniform_draws,
)

LARGE = 200_000
few_magnitudes = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=60)


def sources_of(*vectors: Tensor) -> Sources:
    """Task vectors of one tensor on a base of zero."""
    values = {"coefficient": torch.ones(len(vectors), 1, dtype=torch.float64)}
    return lay_out(Problem({"t": torch.zeros_like(vectors[0])}, [{"t": vector} for vector in vectors], values))


def kept(vector: Tensor, density: float) -> Tensor:
    """Which entries the kernel keeps."""
    sources = sources_of(vector)
    counts_KS = num_kept(torch.tensor([[density]], dtype=torch.float64), sizes(sources))
    trims = Trims("magnitude", torch.ones_like(counts_KS), *thresholds(magnitude_tables(sources), counts_KS))
    [entries] = kept_entries(sources, trims, Vote())
    return entries.buffer_P[: len(vector)] != 0


def normal(size: int, seed: int = 0) -> Tensor:
    return 0.01 * torch.randn(size, generator=torch.Generator().manual_seed(seed))


def rounded_task_vector(size: int, seed: int = 0) -> Tensor:
    """Of bfloat16 weights that moved by a hundredth: many entries tie."""
    base = 2 * normal(size, seed)
    return (base + 0.02 * normal(size, seed + 1)).bfloat16().float() - base.bfloat16().float()


@given(few_magnitudes, st.data())
def test_a_small_table_counts_and_sums_exactly(numbers: list[float], data: st.DataObject) -> None:
    table = MagnitudeTable.of(torch.tensor(numbers))
    descending = sorted(numbers, reverse=True)
    assert table.values_T.tolist() == sorted(set(numbers), reverse=True)
    assert table.counts_T.tolist() == [sum(x >= value for x in numbers) for value in table.values_T]
    asked = data.draw(st.integers(1, len(numbers)))
    assert table.mass(asked) == pytest.approx(sum(descending[:asked]))
    low, high, cut = table.threshold(asked)
    above, between = sum(x >= high for x in numbers), sum(low <= x < high for x in numbers)
    assert above + cut * between == pytest.approx(asked)
    assert len({x for x in numbers if low <= x < high}) <= 1, "only what ties is drawn"


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=30)
def test_exactly_the_largest_are_kept_where_none_tie(size: int, density: float, seed: int) -> None:
    vector = normal(size, seed)
    chosen, asked = kept(vector, density), max(1, int(density * size))
    if len(vector.abs().unique()) < size or not vector.all():
        return
    assert int(chosen.sum()) == asked
    assert asked == size or vector[chosen].abs().min() > vector[~chosen].abs().max()


@pytest.mark.parametrize("size", [5000, LARGE])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.37, 0.5])
def test_of_many_that_tie_the_asked_number_is_kept_on_average(size: int, density: float) -> None:
    """At a density of 0.2 some 17 % tie at the threshold; each of them is kept or not by a draw."""
    errors = []
    for seed in range(5 if size == LARGE else 20):
        vector = rounded_task_vector(size, 2 * seed)
        errors.append(int(kept(vector, density).sum()) - min(int(density * size), int(vector.count_nonzero())))
    deviation = (0.25 * 0.2 * size) ** 0.5  # of a fifth that ties, half kept: the worst case of independent draws
    assert abs(np.mean(errors)) < 4 * deviation / len(errors) ** 0.5
    assert max(map(abs, errors)) < 4 * deviation


@pytest.mark.parametrize("draw", [normal, rounded_task_vector])
@pytest.mark.parametrize("size", [3000, LARGE])
def test_a_larger_density_keeps_what_a_smaller_one_kept(draw: Callable[[int], Tensor], size: int) -> None:
    vector, before = draw(size), torch.zeros(size, dtype=torch.bool)
    for density in (0.05, 0.1, 0.2, 0.21, 0.5, 0.9, 1.0):
        now = kept(vector, density)
        assert not (before & ~now).any()
        before = now
    assert torch.equal(before, vector != 0)


@pytest.mark.parametrize("draw", [normal, rounded_task_vector])
def test_a_large_table_is_right_within_its_error(draw: Callable[[int], Tensor]) -> None:
    magnitudes = draw(LARGE).abs()
    table = MagnitudeTable.of(magnitudes)
    assert len(table.values_T) < 2 * QUANTILES
    assert table.counts_T[-1] == table.num_elements == LARGE
    for value, count in list(zip(table.values_T, table.counts_T, strict=True))[::97]:
        assert int((magnitudes.double() >= value).sum()) == count
    descending = magnitudes.double().sort(descending=True).values
    for density in (0.001, 0.05, 0.2, 0.5, 0.999, 1.0):
        asked = int(density * LARGE)
        assert table.mass(asked) == pytest.approx(float(descending[:asked].sum()), rel=2.0**-12 + 2e-4)
        low, high, cut = table.threshold(asked)
        between = ((magnitudes.double() >= low) & (magnitudes.double() < high)).sum()
        assert int((magnitudes.double() >= high).sum()) + cut * int(between) == pytest.approx(asked)
        off = int(kept(draw(LARGE), density).sum()) - min(asked, int(magnitudes.count_nonzero()))
        assert abs(off) <= 4 * (int(between) / 4) ** 0.5


def test_what_many_share_is_told_from_its_neighbours() -> None:
    """A third of the entries are 1; of the others none may be drawn in their place."""
    vector = normal(LARGE)
    vector[torch.arange(0, LARGE, 3)] = 1.0
    vector[1] = 0.99
    vector[2] = 1.01
    chosen = kept(vector, 0.2)
    assert chosen[2]
    assert not chosen[1]
    assert (vector[chosen] >= 1).all()
    assert abs(int(chosen.sum()) - LARGE / 5) < 4 * (LARGE / 3 / 4) ** 0.5


@pytest.mark.parametrize("size", [ALL_ENTRIES, ALL_ENTRIES + 1])
def test_pieces_count_as_one(size: int) -> None:
    magnitudes = normal(size).abs()
    one, pieces = MagnitudeTable.of(magnitudes), MagnitudeTable.over(iter(magnitudes.split(1000)), size)
    for field in ("values_T", "counts_T", "masses_T"):
        assert np.array_equal(getattr(one, field), getattr(pieces, field))


def test_a_model_is_counted_as_one_expert_by_expert() -> None:
    tensors = {"a": normal(300), "b": 3 * normal(50, 1)}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    halves = {name: tensor / 2 for name, tensor in tensors.items()}
    sources = lay_out(Problem(zeros, [tensors, halves], {}))
    tables = magnitude_tables(sources, "model")
    whole = torch.cat(list(tensors.values())).abs()
    for row, factor in zip(tables, (1.0, 0.5), strict=True):
        assert row[0] is row[1]
        assert row[0].threshold(35)[1] == float(factor * whole.sort(descending=True).values[34])
    assert sizes(sources, "model").tolist() == [350.0, 350.0]


def test_gain_restores_the_sum_of_magnitudes() -> None:
    tables = [[MagnitudeTable.of(torch.tensor([4.0, 2.0, 1.0, 1.0]))]]
    kept_KS = torch.tensor([[2.0]], dtype=torch.float64)
    assert l1_gain(tables, kept_KS).item() == pytest.approx(8 / 6)
    assert l1_gain(tables, kept_KS + 1, torch.ones_like(kept_KS)).item() == pytest.approx(8 / 3)
    nothing = [[MagnitudeTable.of(torch.zeros(4))]]
    assert l1_gain(nothing, kept_KS).item() == 1.0


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 1000))
def test_a_small_sum_of_what_is_drawn_is_exact(size: int, limit: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn, magnitudes = torch.rand(size, generator=generator).double(), torch.rand(size, generator=generator)
    table = DrawnMass.of([(drawn, magnitudes)], size)
    below = float(magnitudes[drawn < limit].double().sum())
    assert table.gain(limit) == pytest.approx(float(magnitudes.double().sum()) / below if below > 1e-7 else 1.0)


@pytest.mark.parametrize("low", [0.0, -0.3])
def test_a_large_sum_of_what_is_drawn_is_right_within_its_error(low: float) -> None:
    drawn, magnitudes = torch.from_numpy(np.random.default_rng(0).uniform(low, 1, LARGE)), normal(LARGE).abs()
    table = DrawnMass.of(zip(drawn.split(9999), magnitudes.split(9999), strict=True), LARGE, low)
    assert len(table.draws_T) == QUANTILES + 1
    for limit in (0.1, 0.33333, 0.5, 1.0):
        gain = float(magnitudes.double().sum() / magnitudes[drawn < limit].double().sum())
        num_drawn = int((drawn < limit).sum())
        assert table.gain(limit) == pytest.approx(gain, rel=4 * (LARGE / QUANTILES) ** 0.5 / num_drawn)


@given(st.text(max_size=8), st.integers(0, 2**31 - 1), st.integers(1, 2500))
def test_draws_are_the_hash_of_their_definition(name: str, seed: int, size: int) -> None:
    """Were they others, a campaign would not find its own masks again."""
    problem = Problem(
        {"first": torch.zeros(5), name: torch.zeros(size)}, [{"first": torch.zeros(5), name: torch.zeros(size)}] * 2, {}
    )
    sources = lay_out(problem)
    s = list(problem.base).index(name)
    keys_KB = block_keys(sources, seed)
    for k in range(2):
        assert torch.equal(
            uniform_draws(keys_KB[k], sources.layout.segments[s]), draws(name, k, len(problem.base[name]), seed)
        )
