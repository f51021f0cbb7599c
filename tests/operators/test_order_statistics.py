"""Order statistics against sorting."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.operators.order_statistics import order_statistics

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(rows=st.integers(1, 3).flatmap(lambda num: st.lists(st.lists(floats, min_size=num, max_size=num), min_size=1)))
@settings(max_examples=50)
def test_every_rank_of_any_floats(rows: list[list[float]]) -> None:
    numbers = torch.tensor(rows).T
    found = order_statistics(lambda: numbers.split(7, dim=1), range(numbers.shape[1]))
    assert torch.equal(found, numbers.sort(dim=1).values)


def test_numbers_of_one_part_of_the_number_line_are_told_apart() -> None:
    """Neighbouring floats, which share their upper 16 bits, and both signs."""
    ones = 1 + torch.arange(20_000) * 2.0**-23
    numbers = torch.cat([ones, -ones])[torch.randperm(40_000, generator=torch.Generator().manual_seed(0))][None]
    ranks = [0, 10_000, 19_999, 20_000, 30_000, 39_999]
    found = order_statistics(lambda: numbers.split(9_000, dim=1), ranks)
    assert torch.equal(found, numbers.sort(dim=1).values[:, ranks])


def test_equal_numbers_have_several_ranks() -> None:
    numbers = torch.tensor([[3.0, 0.0, 3.0, 3.0, -1.0]])
    assert order_statistics(lambda: [numbers], [0, 1, 2, 3, 4]).tolist() == [[-1.0, 0.0, 3.0, 3.0, 3.0]]
