"""Splits: by source, over all tasks, from the seed alone."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import DataError
from evomerge.splits import SPLITS, split_items

SHARES = {"adapt": 0.2, "search": 0.4, "test": 0.4}


@st.composite
def tasks(draw: st.DrawFn) -> dict[str, list[int | str]]:
    """Several tasks over partly the same sources, some with many items of one source."""
    num_sources = draw(st.integers(40, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    shuffled = {f"task{i}": rng.permutation(num_sources) for i in range(draw(st.integers(1, 3)))}
    return {
        task: [f"file{source}" if draw_names else int(source) for source in np.repeat(order, rng.integers(1, 3))]
        for (task, order), draw_names in zip(shuffled.items(), [draw(st.booleans())] * 3, strict=False)
    }


@given(tasks(), st.integers(0, 2**31))
def test_every_item_is_in_one_split_and_no_source_in_two(sources: Mapping[str, Sequence[int | str]], seed: int) -> None:
    splits = split_items(sources, SHARES, seed)
    home: dict[int | str, str] = {}
    for task, of_items in sources.items():
        everything = np.concatenate([splits[task][split] for split in SPLITS])
        assert sorted(everything.tolist()) == list(range(len(of_items)))
        for split in SPLITS:
            assert splits[task][split].tolist() == sorted(splits[task][split].tolist())
            for item in splits[task][split]:
                assert home.setdefault(of_items[item], split) == split


@given(
    st.integers(50, 400),
    st.sampled_from([(0.2, 0.4, 0.4), (0.0, 0.5, 0.5), (0.1, 0.8, 0.1), (1 / 3, 1 / 3, 1 / 3)]),
    st.integers(0, 100),
)
def test_the_shares_of_sources_are_met_to_one(num_sources: int, shares: tuple[float, ...], seed: int) -> None:
    splits = split_items({"task": range(num_sources)}, dict(zip(SPLITS, shares, strict=True)), seed)["task"]
    for split, share in zip(SPLITS, shares, strict=True):
        assert abs(len(splits[split]) - share * num_sources) <= 1.0


def test_the_seed_decides_and_nothing_else() -> None:
    sources = {"a": [f"s{i // 2}" for i in range(100)], "b": [f"s{i}" for i in range(50)]}
    once, again, other = (split_items(sources, SHARES, seed) for seed in (3, 3, 4))
    for task in sources:
        for split in SPLITS:
            assert np.array_equal(once[task][split], again[task][split])
    assert not np.array_equal(once["a"]["search"], other["a"]["search"])


def test_the_order_of_items_and_tasks_does_not_move_a_source() -> None:
    forward = split_items({"a": range(60), "b": range(60)}, SHARES, 0)
    backward = split_items({"b": range(60), "a": range(59, -1, -1)}, SHARES, 0)
    for split in SPLITS:
        assert np.array_equal(forward["b"][split], backward["b"][split])
        assert sorted(59 - backward["a"][split]) == forward["a"][split].tolist()


@pytest.mark.parametrize(
    ("sources", "shares", "words"),
    [
        ({"math": range(3)}, SHARES, ["math", "adapt split holds 1 of 3", "at least 2", "larger share"]),
        ({"math": ["one"] * 50}, {"adapt": 0.0, "search": 0.5, "test": 0.5}, ["math", "of 50 items"]),
        ({"chat": range(100), "math": range(2)}, SHARES, ["task math", "of 2 items"]),
    ],
)
def test_a_task_without_two_items_in_a_split_is_an_error(
    sources: Mapping[str, Sequence[int | str]], shares: Mapping[str, float], words: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        split_items(sources, shares, 0)
    for word in words:
        assert word in str(caught.value)


def test_no_share_is_no_error() -> None:
    splits = split_items({"math": range(10)}, {"adapt": 0.0, "search": 0.5, "test": 0.5}, 0)["math"]
    assert [len(splits[split]) for split in SPLITS] == [0, 5, 5]
