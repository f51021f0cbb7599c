"""Intervals: how often they hold the truth, and what they do at the edges."""

import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.evidence.intervals import difference_intervals, score_intervals, student
from evomerge.evidence.resampling import by_source, contributions, resampled_counts

Intervals = Callable[..., np.ndarray]


def coverage(intervals_K2: np.ndarray, truth_K: np.ndarray | float) -> float:
    return float(np.mean((intervals_K2[:, 0] <= truth_K) & (truth_K <= intervals_K2[:, 1])))


@pytest.mark.parametrize("num_items", [30, 120, 500])
@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.98])
def test_hits_and_misses_are_covered_even_near_0_and_1(num_items: int, rate: float) -> None:
    hits = (np.random.default_rng(num_items).random((2000, num_items)) < rate).astype(float)
    found = score_intervals(hits, range(num_items))
    assert 0.93 < coverage(found, rate) < 0.985
    assert (found >= 0).all()
    assert (found <= 1).all()


def test_independent_hits_get_wilsons_interval() -> None:
    """Against the formula in its usual form, of 27 hits in 30, with Student's quantile and 29 for 30."""
    found = score_intervals(np.array([[1.0] * 27 + [0.0] * 3]), range(30))[0]
    t, n, p = student(30, 0.95), 29, 0.9
    half = t * np.sqrt(p * (1 - p) / n + t**2 / (4 * n**2))
    assert found == pytest.approx([(p + t**2 / (2 * n) + sign * half) / (1 + t**2 / n) for sign in (-1, 1)])


@pytest.mark.parametrize("hit", [0.0, 1.0])
def test_a_clean_sweep_is_no_certainty(hit: float) -> None:
    """None of 40 missed: a rate of misses of some 9 % would still have done that in 1 of 40 cases."""
    low, high = score_intervals(np.full((1, 40), hit), range(40))[0]
    assert high - low == pytest.approx(0.09, abs=0.01)
    assert hit in (pytest.approx(low), pytest.approx(high))


def test_a_clean_sweep_counts_sources_not_items() -> None:
    by_items = score_intervals(np.ones((1, 40)), range(40))[0]
    by_sources = score_intervals(np.ones((1, 160)), np.repeat(range(40), 4).tolist())[0]
    assert by_sources == pytest.approx(by_items)


@pytest.mark.parametrize("num_items", [30, 120])
def test_skewed_losses_are_covered_better_than_by_students_interval(num_items: int) -> None:
    losses = np.random.default_rng(num_items).lognormal(0.0, 1.0, (1500, num_items))
    found = score_intervals(losses, range(num_items))
    half = student(num_items, 0.95) * losses.std(axis=1, ddof=1) / np.sqrt(num_items)
    plain = np.stack([losses.mean(axis=1) - half, losses.mean(axis=1) + half], axis=1)
    truth = np.exp(0.5)
    assert coverage(found, truth) > coverage(plain, truth) + 0.01
    assert coverage(found, truth) > 0.9


@pytest.mark.parametrize("rates", [(0.05, 0.05), (0.05, 0.01), (0.2, 0.1)])
@pytest.mark.parametrize("num_items", [60, 300])
def test_paired_wins_and_losses_are_covered(rates: tuple[float, float], num_items: int) -> None:
    chance = np.random.default_rng(0).random((2000, num_items))
    gains = (chance < rates[0]).astype(float) - (chance > 1 - rates[1])
    assert 0.93 < coverage(difference_intervals(gains, range(num_items)), rates[0] - rates[1]) < 0.99


def test_equal_models_are_not_known_to_be_equal() -> None:
    low, high = difference_intervals(np.zeros((1, 100)), range(100))[0]
    assert low == pytest.approx(-high)
    assert 0.005 < high < 0.02


def test_a_paired_difference_of_losses_is_students() -> None:
    gains = np.random.default_rng(1).normal(size=(3, 25))
    half = student(25, 0.95) * gains.std(axis=1, ddof=1) / 5
    expected = np.stack([gains.mean(axis=1) - half, gains.mean(axis=1) + half], axis=1)
    assert difference_intervals(gains, range(25)) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["hits", "losses", "gains"])
def test_clusters_of_unequal_size_are_covered_where_independent_items_are_not(kind: str) -> None:
    """Sources of 1 to 5 items, alike within a source; the truth is the mean over all items of many sources."""
    rng = np.random.default_rng(7)
    sizes = rng.integers(1, 6, 20_000)
    level = rng.normal(size=20_000)
    drawn = [rng.choice(20_000, 60, replace=False) for _ in range(200)]

    def items(sources: np.ndarray) -> np.ndarray:
        x = np.repeat(level[sources], sizes[sources])
        return {"hits": (x < 0.8).astype(float), "losses": np.exp(x), "gains": np.sign(np.trunc(x))}[kind]

    intervals = difference_intervals if kind == "gains" else score_intervals
    truth, held, naively = items(np.arange(20_000)).mean(), [], []
    for sources in drawn:
        x = items(sources)[None]
        held.append(coverage(intervals(x, np.repeat(sources, sizes[sources]).tolist()), truth))
        naively.append(coverage(intervals(x, range(x.shape[1])), truth))
    assert 0.91 < np.mean(held) < 0.98
    assert np.mean(naively) < np.mean(held) - 0.05


@pytest.mark.parametrize("kind", ["hits", "losses", "gains"])
def test_of_a_finite_pool_a_large_share_leaves_little_open(kind: str) -> None:
    """Half of a pool of 300 sources: without the correction, intervals are too wide."""
    rng = np.random.default_rng(8)
    chance = rng.random(300)
    pool = {
        "hits": (chance < 0.85).astype(float),
        "losses": rng.gamma(2.0, 1.0, 300),
        "gains": (chance < 0.1).astype(float) - (chance > 0.95),
    }[kind]
    samples = np.stack([rng.choice(pool, 150, replace=False) for _ in range(1500)])
    intervals = difference_intervals if kind == "gains" else score_intervals
    assert coverage(intervals(samples, range(150), drawn=0.5), pool.mean()) == pytest.approx(0.95, abs=0.02)
    assert coverage(intervals(samples, range(150)), pool.mean()) > 0.985


@pytest.mark.parametrize("intervals", [score_intervals, difference_intervals])
def test_one_source_leaves_everything_open(intervals: Intervals) -> None:
    assert intervals(np.array([[0.2, 0.4], [1.0, 0.0]]), ["a", "a"]).tolist() == [[-np.inf, np.inf]] * 2


@pytest.mark.parametrize("items", [np.full((1, 30), 2.5), np.r_[np.zeros(29), 0.4][None]])
def test_scores_that_hardly_vary_get_finite_intervals(items: np.ndarray) -> None:
    low, high = score_intervals(items, range(30))[0]
    assert low <= items.mean() <= high
    assert high - low < 0.2


@pytest.mark.parametrize("intervals", [score_intervals, difference_intervals])
def test_a_higher_level_is_wider_and_nothing_is_left_to_chance(intervals: Intervals) -> None:
    items = np.random.default_rng(0).normal(size=(4, 50))
    found = intervals(items, range(50))
    wider = intervals(items, range(50), level=0.99)
    assert (wider[:, 0] < found[:, 0]).all()
    assert (wider[:, 1] > found[:, 1]).all()
    assert np.array_equal(found, intervals(items, range(50)))
    assert found[2:3] == pytest.approx(intervals(items[2:3], range(50)))  # of each model by itself


def test_twenty_models_on_a_thousand_items_take_no_time() -> None:
    items = np.random.default_rng(0).random((20, 1000))
    score_intervals(items[:1], range(1000))  # scipy is loaded
    seconds = []
    for _ in range(3):
        started = time.process_time()
        score_intervals(items, range(1000))
        seconds.append(time.process_time() - started)
    assert min(seconds) < 0.3  # 0.07 on the machine that this was written on


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_contributions_sum_to_nothing_and_resamples_of_all_sources_move_nothing(num_items: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources = [rng.integers(0, 9, num_items).tolist(), rng.integers(5, 14, 7).tolist()]
    items = [rng.normal(size=(3, num_items)), rng.normal(size=(3, 7))]
    sums_MKS = contributions(items, sources)
    assert sums_MKS.shape == (2, 3, len({*sources[0], *sources[1]}))
    assert sums_MKS.sum(axis=2) == pytest.approx(np.zeros((2, 3)), abs=1e-12)


def test_sources_without_items_contribute_nothing() -> None:
    assert by_source(np.array([[1.0, 2.0, 4.0]]), np.array([2, 0, 2]), 4).tolist() == [[2.0, 0.0, 5.0, 0.0]]


@pytest.mark.parametrize(("num_sources", "num_resamples"), [(3, 10), (5000, 1000)])
def test_a_resample_draws_as_many_as_there_are(num_sources: int, num_resamples: int) -> None:
    blocks = list(resampled_counts(num_sources, num_resamples))
    counts = np.concatenate(blocks)
    assert counts.shape == (num_resamples, num_sources)
    assert (counts.sum(axis=1) == num_sources).all()
    assert counts.var() == pytest.approx(1 - 1 / num_sources, rel=0.3)
    assert max(block.nbytes for block in blocks) <= 2**24
