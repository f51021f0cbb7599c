"""A score and its standard error: of means against formulas, of other metrics against a bootstrap."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import CandidateError
from evomerge.evidence.scores import MAX_GROUPS, cluster_error, grouped, score_of, source_codes

Aggregate = Callable[[np.ndarray, np.ndarray], float]


def mean(reported: np.ndarray, items: np.ndarray) -> float:
    return float(reported.mean(dtype=np.float64))


def spearman(reported: np.ndarray, items: np.ndarray) -> float:
    """Of (N, 2) pairs of prediction and truth."""
    ranks = reported.argsort(axis=0).argsort(axis=0)
    return float(np.corrcoef(ranks.T)[0, 1])


def word_perplexity(reported: np.ndarray, items: np.ndarray) -> float:
    """Of objects, as lm-eval's tasks report: (summed loss, number of words)."""
    losses, words = np.array(list(reported)).T
    return float(np.exp(losses.sum() / words.sum()))


def f1(reported: np.ndarray, items: np.ndarray) -> float:
    """Of (N, 2) booleans: predicted, true."""
    predicted, true = reported.T
    return float(2 * (predicted & true).sum() / (predicted.sum() + true.sum()))


def pairs(rng: np.random.Generator, num: int) -> np.ndarray:
    truth = rng.normal(size=num)
    return np.stack([truth + rng.normal(size=num), truth], axis=1)


def perplexities(rng: np.random.Generator, num: int) -> np.ndarray:
    words = rng.integers(5, 60, num)
    reported = np.empty(num, dtype=object)
    reported[:] = [(words * rate, words) for words, rate in zip(words, rng.gamma(4, 0.5, num), strict=True)]
    return reported


def decisions(rng: np.random.Generator, num: int) -> np.ndarray:
    true = rng.random(num) < 0.3
    return np.stack([np.where(rng.random(num) < 0.8, true, ~true), true], axis=1)


METRICS = {"spearman": (spearman, pairs), "word_perplexity": (word_perplexity, perplexities), "f1": (f1, decisions)}


def by_bootstrap(aggregate: Aggregate, reported: np.ndarray, sources: np.ndarray, num_resamples: int = 1500) -> float:
    """Draw whole sources with replacement, and see how the metric scatters."""
    rng = np.random.default_rng(99)
    of_source = [np.flatnonzero(sources == source) for source in np.unique(sources)]
    found = []
    for _ in range(num_resamples):
        drawn = np.concatenate([of_source[i] for i in rng.integers(0, len(of_source), len(of_source))])
        found.append(aggregate(reported[drawn], drawn))
    return float(np.std(found, ddof=1))


def clustered(rng: np.random.Generator, num_sources: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of sources with 1 to 6 items, which resemble each other; larger sources score lower."""
    sizes = rng.integers(1, 7, num_sources)
    sources = np.repeat(np.arange(num_sources), sizes)
    level = rng.normal(size=num_sources) - 0.3 * sizes
    return level[sources] + 0.5 * rng.normal(size=len(sources)), sources


@given(st.integers(2, 60), st.integers(0, 2**31))
def test_a_mean_over_independent_items_has_the_textbook_error(num_items: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(3.0, 2.0, num_items).astype(np.float32)
    score = score_of(x, np.arange(num_items), range(num_items))
    assert score.value == pytest.approx(x.astype(np.float64).mean())
    assert score.stderr == pytest.approx(x.astype(np.float64).std(ddof=1) / np.sqrt(num_items))
    assert np.array_equal(score.items, x)


def test_an_accuracy_has_the_binomials_error() -> None:
    hits = np.array([1, 1, 0, 1, 0, 1, 1, 1], np.float32)
    score = score_of(hits, np.arange(8), list("abcdefgh"))
    assert score.value == 0.75
    assert score.stderr == pytest.approx(np.sqrt(0.75 * 0.25 / 7))


@given(st.integers(2, 12), st.integers(0, 2**31))
def test_a_clustered_error_is_that_of_a_ratio_of_source_totals(num_sources: int, seed: int) -> None:
    """The linearized ratio estimator, written out source by source."""
    rng = np.random.default_rng(seed)
    x, sources = clustered(rng, num_sources)
    shuffled = rng.permutation(len(x))
    score = score_of(x[shuffled], shuffled, [f"source {s}" for s in sources[shuffled]])
    ratio = x.sum() / len(x)
    residuals = [x[sources == s].sum() - ratio * (sources == s).sum() for s in range(num_sources)]
    expected = np.sqrt(num_sources / (num_sources - 1) * np.sum(np.square(residuals))) / len(x)
    assert score.stderr == pytest.approx(expected)


def test_unequal_clusters_against_a_cluster_bootstrap() -> None:
    x, sources = clustered(np.random.default_rng(1), 120)
    score = score_of(x, np.arange(len(x)), sources.tolist())
    bootstrapped = by_bootstrap(mean, x, sources)
    assert score.stderr == pytest.approx(bootstrapped, rel=0.08)
    assert score_of(x, np.arange(len(x)), range(len(x))).stderr < 0.7 * bootstrapped  # as if independent: too small


@given(st.integers(2, 30), st.booleans(), st.integers(0, 2**31))
def test_the_jackknife_of_a_mean_is_the_mean(num_sources: int, in_clusters: bool, seed: int) -> None:
    """Any aggregate that is a mean gets the same score, error and contributions by source as the mean itself."""
    rng = np.random.default_rng(seed)
    x, sources = clustered(rng, num_sources) if in_clusters else (rng.random(num_sources), np.arange(num_sources))
    items = np.arange(len(x))
    direct, jackknifed = (score_of(x, items, sources.tolist(), aggregate=aggregate) for aggregate in (None, mean))
    assert jackknifed.value == direct.value
    assert jackknifed.stderr == pytest.approx(direct.stderr, rel=1e-6)
    by_source = [np.bincount(sources, score.items) for score in (direct, jackknifed)]
    assert by_source[1] == pytest.approx(by_source[0], rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_other_metrics_against_a_bootstrap(metric: str, seed: int) -> None:
    aggregate, draw = METRICS[metric]
    reported = draw(np.random.default_rng(seed), 150)
    score = score_of(reported, np.arange(150), range(150), aggregate=aggregate)
    assert score.value == aggregate(reported, np.arange(150))
    assert score.items.mean(dtype=np.float64) == pytest.approx(score.value, rel=1e-6)
    assert score.stderr == pytest.approx(by_bootstrap(aggregate, reported, np.arange(150)), rel=0.15)


@pytest.mark.parametrize("metric", METRICS)
def test_other_metrics_over_unequal_clusters_against_a_cluster_bootstrap(metric: str) -> None:
    """Every item occurs as often as its source is large."""
    aggregate, draw = METRICS[metric]
    rng = np.random.default_rng(4)
    sources = np.repeat(np.arange(120), rng.integers(1, 6, 120))
    reported = draw(rng, 120)[sources]
    score = score_of(reported, np.arange(len(sources)), sources.tolist(), aggregate=aggregate)
    assert score.items.mean(dtype=np.float64) == pytest.approx(score.value, rel=1e-6)
    assert score.stderr == pytest.approx(by_bootstrap(aggregate, reported, sources), rel=0.15)


@pytest.mark.parametrize("metric", METRICS)
def test_groups_of_many_sources_give_nearly_the_same_error_for_less(metric: str) -> None:
    aggregate, draw = METRICS[metric]
    reported, calls = draw(np.random.default_rng(5), 600), []

    def counted(reported: np.ndarray, items: np.ndarray) -> float:
        calls.append(len(items))
        return aggregate(reported, items)

    sources = [f"page {i}" for i in range(600)]
    in_groups = grouped({"task": sources})["task"]
    score = score_of(reported, np.arange(600), in_groups, aggregate=counted)
    assert len(calls) <= MAX_GROUPS + 1
    assert score.items.mean(dtype=np.float64) == pytest.approx(score.value, rel=1e-6)
    every = score_of(reported, np.arange(600), sources, aggregate=aggregate)
    assert score.stderr == pytest.approx(every.stderr, rel=0.2)  # two of its standard errors are 14 %


def test_groups_keep_items_of_a_source_together_over_all_tasks() -> None:
    tasks: dict[str, Any] = {"a": [*range(150), 3, 3], "b": [*range(100, 300)]}
    groups = grouped(tasks)
    group_of = {}
    for task, sources in tasks.items():
        for source, group in zip(sources, groups[task], strict=True):
            assert group_of.setdefault(str(source), group) == group
    assert 80 < len(set(group_of.values())) <= MAX_GROUPS
    assert grouped({"b": tasks["b"]})["b"] == groups["b"]


def test_few_sources_are_not_grouped() -> None:
    assert grouped({"a": [1, 2, 2], "b": range(MAX_GROUPS)}) == {"a": [1, 2, 2], "b": list(range(MAX_GROUPS))}


def test_an_aggregate_is_handed_the_items_that_belong_to_what_was_reported() -> None:
    items = np.array([7, 3, 9, 4])

    def checked(reported: np.ndarray, items: np.ndarray) -> float:
        assert np.array_equal(reported, items * 10.0)
        return float(reported.sum() / len(items))

    assert score_of(items * 10.0, items, [0, 1, 1, 2], aggregate=checked).value == pytest.approx(57.5)


def test_two_items_of_two_sources_are_the_least_that_has_an_error() -> None:
    two = np.array([0.25, 0.75], np.float32)
    assert score_of(two, np.arange(2), ["a", "b"]).stderr == pytest.approx(0.25)
    assert score_of(two, np.arange(2), ["a", "b"], aggregate=mean).stderr == pytest.approx(0.25)


@pytest.mark.parametrize("aggregate", [None, mean])
def test_one_source_says_nothing_about_others(aggregate: Aggregate | None) -> None:
    score = score_of(np.array([0.25, 0.75], np.float32), np.arange(2), ["a", "a"], aggregate=aggregate)
    assert (score.value, score.stderr) == (0.5, np.inf)


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e60])
@pytest.mark.parametrize("aggregate", [None, mean])
def test_what_is_not_finite_in_float32_has_no_error(broken: float, aggregate: Aggregate | None) -> None:
    """A broken model's loss, or a perplexity beyond all bounds; warnings would fail this test."""
    reported = np.array([1.0, 2.0, broken, 4.0])
    score = score_of(reported, np.arange(4), range(4), aggregate=aggregate)
    assert np.isnan(score.stderr)
    assert not np.isfinite(score.items).all()


def test_a_metric_that_hangs_on_one_item_fails_the_candidate() -> None:
    """All predictions are equal but one: without that item there is no correlation."""

    def correlation(reported: np.ndarray, items: np.ndarray) -> float:
        return float("nan") if np.ptp(reported[:, 0]) == 0 else float(np.corrcoef(reported.T)[0, 1])

    reported = np.stack([np.eye(6)[2], np.arange(6.0)], axis=1)
    with pytest.raises(CandidateError, match=r"without 1 of 6 items the score is nan"):
        score_of(reported, np.arange(6), range(6), aggregate=correlation)


def test_large_losses_keep_their_small_differences() -> None:
    """Items are kept in float32; the score and its error are not."""
    x = 1e5 + np.random.default_rng(0).random(200)
    score = score_of(x, np.arange(200), range(200))
    assert score.value == x.mean()
    assert score.stderr == pytest.approx(x.std(ddof=1) / np.sqrt(200), rel=1e-9)


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["a", "b", 1, "1", 10, 2]), min_size=1, max_size=20))
def test_codes_count_the_distinct_names(sources: list[int | str]) -> None:
    codes = source_codes(sources)
    names = [str(source) for source in sources]
    assert set(codes) == set(range(len(set(names))))
    assert [names[list(codes).index(code)] for code in codes] == names


def test_numbers_of_sources_that_are_not_there_do_not_count() -> None:
    residuals = np.array([0.3, -0.1, -0.2])
    assert cluster_error(residuals, np.array([7, 2, 4])) == cluster_error(residuals, np.array([0, 1, 2]))
    assert cluster_error(residuals, np.array([7, 7, 7])) == np.inf


def test_residuals_of_one_source_add_up() -> None:
    assert cluster_error(np.array([0.1, -0.1, 0.2, -0.2]), np.array([0, 0, 1, 1])) == pytest.approx(0.0)
    assert cluster_error(np.array([0.1, 0.2, -0.1, -0.2]), np.array([0, 0, 1, 1])) == pytest.approx(np.sqrt(2 * 0.18))


def test_the_items_of_a_mean_are_kept_to_the_last_bit() -> None:
    """Hits and misses stay 1 and 0: residuals added to their mean would not give them back."""
    hits = (np.random.default_rng(0).random(30) < 0.3).astype(np.float32)
    assert (score_of(hits, np.arange(30), range(30)).items == hits).all()
