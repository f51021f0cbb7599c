"""The winner's curse: by how much the best of many must look better than it is."""

import time
from dataclasses import replace

import numpy as np
import pytest

from evomerge.evidence.optimism import expected_optimism, optimism_of_best
from evomerge.evidence.resampling import contributions
from evomerge.evidence.scores import score_of
from evomerge.records import Measurement, Objective

UP = Objective(name="up", task="a", metric="accuracy", direction="max")
DOWN = Objective(name="down", task="b", metric="loss", direction="min")
LARGEST_OF_100 = 2.508  # expected maximum of 100 standard normals (Harter 1961)


def optimism(items_KN: np.ndarray) -> float:
    return expected_optimism(items_KN.mean(axis=1), contributions([items_KN], [range(items_KN.shape[1])])[0])


def measured(up: np.ndarray, down: np.ndarray, sources: dict[str, list[int]]) -> Measurement:
    scores = {
        name: score_of(x.astype(np.float32), np.arange(len(x)), sources[name])
        for name, x in (("up", up), ("down", down))
    }
    return Measurement(split="search", scores=scores, cost=1.0, seconds={})


def test_of_equal_candidates_it_is_the_expected_maximum_of_the_noise() -> None:
    """100 candidates with independent noise, 40 times over: 2.51 standard errors."""
    rng = np.random.default_rng(0)
    found = [optimism(rng.normal(size=(100, 200))) * np.sqrt(200) for _ in range(40)]
    assert np.mean(found) == pytest.approx(LARGEST_OF_100, rel=0.05)


def test_of_equal_hits_and_misses_it_is_what_test_items_take_back() -> None:
    """What the best of 50 loses on fresh items, over many repetitions, is what was expected."""
    rng = np.random.default_rng(1)
    expected, lost = [], []
    for _ in range(150):
        difficulty = rng.random(300) < 0.4  # of the item, the same for all candidates: it cancels
        hits = np.where(difficulty, rng.random((50, 300)) < 0.5, 1.0)
        expected.append(optimism(hits))
        lost.append(hits.mean(axis=1).max() - 0.8)
    spread = np.std(lost) / np.sqrt(len(lost))
    assert np.mean(expected) == pytest.approx(np.mean(lost), abs=3 * spread)


def test_one_that_stands_far_out_was_not_picked_by_luck() -> None:
    items = np.random.default_rng(2).normal(size=(100, 200))
    items[17] += 10 / np.sqrt(200)  # ten standard errors
    assert abs(optimism(items)) * np.sqrt(200) < 0.3


@pytest.mark.parametrize("spread", [1.0, 3.0])
def test_of_unequal_candidates_it_errs_upwards_by_less_than_half(spread: float) -> None:
    """Their true values scatter by so many standard errors; compared with the noise that the picked one really had."""
    rng = np.random.default_rng(3)
    expected, real = [], []
    for _ in range(150):
        truth = spread * rng.normal(size=100) / np.sqrt(200)
        noise = rng.normal(size=(100, 200))
        items = truth[:, None] + noise
        expected.append(optimism(items))
        real.append(noise[items.mean(axis=1).argmax()].mean())
    assert 1.0 < np.mean(expected) / np.mean(real) < 1.5


def test_copies_of_one_model_are_one_candidate() -> None:
    items = np.repeat(np.random.default_rng(4).normal(size=(1, 200)), 50, axis=0)
    assert abs(optimism(items)) * np.sqrt(200) < 0.15  # no choice, no curse; the rest is the resampling's own noise


def test_objectives_share_the_luck_of_the_mean() -> None:
    """Both objectives are equally noisy: half of the mean's luck is each one's; a minimized loss counts upside down."""
    rng = np.random.default_rng(5)
    sources = {"up": list(range(200)), "down": list(range(200, 400))}
    candidates = [measured(rng.normal(size=200), rng.normal(size=200), sources) for _ in range(100)]
    found = optimism_of_best(candidates, [UP, DOWN], sources)
    assert list(found) == ["up", "down"]
    assert np.mean(list(found.values())) == pytest.approx(LARGEST_OF_100 / np.sqrt(2 * 200), rel=0.3)
    assert found["down"] == pytest.approx(found["up"], rel=0.9)
    turned = [replace(c, scores={"up": c.scores["up"], "down": c.scores["up"]}) for c in candidates]
    same = {"up": sources["up"], "down": sources["up"]}
    assert np.mean(list(optimism_of_best(turned, [UP, DOWN], same).values())) == pytest.approx(0.0, abs=1e-9)


def test_the_mean_of_one_objective_is_the_matrix_of_it() -> None:
    items = np.random.default_rng(6).normal(size=(30, 80)).astype(np.float32)
    sources = {"up": np.repeat(range(40), 2).tolist(), "down": [0, 1]}
    candidates = [measured(row, np.zeros(2), sources) for row in items]
    exact = items.astype(np.float64)
    expected = expected_optimism(exact.mean(axis=1), contributions([exact], [sources["up"]])[0])
    assert optimism_of_best(candidates, [UP], sources)["up"] == pytest.approx(expected)


def test_stopped_candidates_are_left_out() -> None:
    rng = np.random.default_rng(7)
    sources = {"up": list(range(50)), "down": list(range(50))}
    whole = [measured(rng.normal(size=50), rng.normal(size=50), sources) for _ in range(10)]
    few = {"up": [0, 1], "down": [0, 1]}
    stopped = replace(measured(np.ones(2), np.zeros(2), few), stopped="dominated")
    assert optimism_of_best([stopped, *whole], [UP, DOWN], sources) == optimism_of_best(whole, [UP, DOWN], sources)


def test_a_thousand_candidates_on_five_thousand_items_take_seconds() -> None:
    sums = np.random.default_rng(8).normal(size=(1000, 5000))
    started = time.process_time()
    expected_optimism(np.zeros(1000), sums - sums.mean(axis=1, keepdims=True))
    assert time.process_time() - started < 4.0  # 0.6 on the machine that this was written on
