"""The rounds of a race: nested, the same for all, each beginning like the whole."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated import ITEMS, NUM_ITEMS, OBJECTIVES, SOURCES, World

from evomerge.fidelity.rounds import difficulty, make_rounds

SHARES = (0.1, 0.2, 0.4, 0.8)


@given(st.integers(4, 120), st.integers(1, 4), st.integers(0, 2**31))
def test_every_item_comes_once_and_sources_stay_together(num_sources: int, repeated: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(num_sources), rng.integers(1, repeated + 1, num_sources))
    items = {"a": np.sort(rng.permutation(10 * len(codes))[: len(codes)])}
    sources = {"a": [f"s{code}" for code in codes]}
    rounds = make_rounds(items, sources, {"a": rng.random(len(codes))}, SHARES, seed)
    scored = np.concatenate([round_["a"] for round_ in rounds.added])
    assert sorted(scored) == list(items["a"])
    assert all((np.diff(round_["a"]) > 0).all() for round_ in rounds.added)
    source_of = dict(zip(items["a"].tolist(), sources["a"], strict=True))
    homes = [{source_of[item] for item in round_["a"].tolist()} for round_ in rounds.added]
    assert sum(map(len, homes)) == num_sources
    assert min(map(len, homes)) >= 2  # a round is scored by itself, and one source has no standard error
    assert (items["a"][rounds.positions["a"]] == scored).all()


def test_the_same_seed_gives_the_same_rounds_and_another_others() -> None:
    hardness = {task: np.random.default_rng(0).random(NUM_ITEMS) for task in ITEMS}
    one, same, other = (make_rounds(ITEMS, SOURCES, hardness, SHARES, seed) for seed in (1, 1, 2))
    assert all((a["a"] == b["a"]).all() for a, b in zip(one.added, same.added, strict=True))
    assert not (one.added[0]["a"] == other.added[0]["a"]).all()


@pytest.mark.parametrize("num_rounds", [1, 2, 3])
def test_a_beginning_tells_more_than_as_many_items_at_random(num_rounds: int) -> None:
    """Over models and seeds: stratifying by how hard items are for the references lowers the error of a mean."""
    world = World(0)
    references = list(world.references().values())
    models = [world.model(*world.rng.normal(0.5, 0.5, 2)) for _ in range(40)]
    stratified, random = [], []
    for seed in range(20):
        rounds = make_rounds(ITEMS, SOURCES, difficulty(references, OBJECTIVES), SHARES, seed)
        for model in models:
            first = rounds.beginning(model, OBJECTIVES, num_rounds).scores["a"]
            drawn = world.rng.choice(model.scores["a"].items, len(first.items), replace=False)
            stratified.append(first.value - model.scores["a"].value)
            random.append(drawn.mean() - model.scores["a"].value)
    assert np.sqrt(np.mean(np.square(stratified))) < 0.9 * np.sqrt(np.mean(np.square(random)))
    assert abs(np.mean(stratified)) < 0.02
