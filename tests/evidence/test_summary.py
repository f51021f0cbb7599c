"""Summaries of objectives: the mean and the worst, normalized, with errors that know of shared sources."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import EvoMergeError
from evomerge.evidence.compare import paired_difference
from evomerge.evidence.scores import score_of
from evomerge.evidence.summary import Summarizer, all_sources
from evomerge.records import Measurement, Objective

A = Objective(name="a", task="a", metric="accuracy", direction="max", steers=False)
B = Objective(name="b", task="b", metric="accuracy", direction="max", steers=False)
MEAN = Objective(name="all", direction="max", summary="mean", parts=("a", "b"))
WORST = replace(MEAN, name="least", summary="worst")
NORMALIZED = replace(MEAN, name="share", normalized_by={"a": "one", "b": "two"})


def measured(a: np.ndarray, b: np.ndarray, sources: dict[str, list[int | str]], **more: str) -> Measurement:
    scores = {
        name: score_of(x.astype(np.float32), np.arange(len(x)), sources[name]) for name, x in (("a", a), ("b", b))
    }
    return Measurement(split="search", scores=scores, cost=1.0, seconds={}, **more)


def apart(num_a: int, num_b: int) -> dict[str, list[int | str]]:
    return {"a": [f"a{i}" for i in range(num_a)], "b": [f"b{i}" for i in range(num_b)]}


@given(st.integers(2, 40), st.integers(2, 40), st.integers(0, 2**31))
def test_the_mean_of_two_independent_objectives(num_a: int, num_b: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.random(num_a), rng.random(num_b)
    sources = apart(num_a, num_b)
    of = Summarizer([A, B, MEAN], sources, {}).add(measured(a, b, sources)).scores
    assert of["all"].value == pytest.approx((of["a"].value + of["b"].value) / 2)
    assert of["all"].items.mean(dtype=np.float64) == pytest.approx(of["all"].value, abs=1e-6)
    assert len(of["all"].items) == num_a + num_b
    total = num_a + num_b  # a cluster error over both sides: S / (S - 1) is shared
    one, other = (of[x].stderr ** 2 * (n - 1) / n for x, n in (("a", num_a), ("b", num_b)))
    assert of["all"].stderr == pytest.approx(np.sqrt(total / (total - 1) * (one + other)) / 2, rel=1e-4)


def test_shared_sources_do_not_cancel() -> None:
    """Both tasks ask the same of every source: the mean is no more certain than either."""
    x = np.random.default_rng(0).random(50)
    sources: dict[str, list[int | str]] = {"a": list(range(50)), "b": list(range(50))}
    scores = Summarizer([A, B, MEAN], sources, {}).add(measured(x, x, sources)).scores
    assert scores["all"].stderr == pytest.approx(scores["a"].stderr)


def test_the_worst_is_the_worst_in_the_users_sign() -> None:
    sources = apart(3, 2)
    given_ = measured(np.array([0.2, 0.4, 0.3]), np.array([0.5, 0.9]), sources)
    scores = Summarizer([A, B, WORST], sources, {}).add(given_).scores
    assert scores["least"].value == scores["a"].value
    smaller = [replace(objective, direction="min") for objective in (A, B, WORST)]
    assert Summarizer(smaller, sources, {}).add(given_).scores["least"].value == scores["b"].value


def test_each_part_counts_as_a_share_of_its_experts_own_score() -> None:
    sources = apart(2, 2)
    references = {
        "expert:one": measured(np.array([0.5, 0.5]), np.array([0.1, 0.1]), sources),
        "expert:two": measured(np.array([0.2, 0.2]), np.array([0.8, 0.8]), sources),
    }
    given_ = measured(np.array([0.25, 0.25]), np.array([0.4, 1.2]), sources)
    score = Summarizer([A, B, NORMALIZED], sources, references).add(given_).scores["share"]
    assert score.value == pytest.approx((0.25 / 0.5 + 0.8 / 0.8) / 2)


def test_an_expert_that_scores_nothing_is_no_yardstick() -> None:
    sources = apart(2, 2)
    zero = measured(np.zeros(2), np.zeros(2), sources)
    with pytest.raises(EvoMergeError, match="objective share: expert one scores 0 in a"):
        Summarizer([A, B, NORMALIZED], sources, {"expert:one": zero, "expert:two": zero})


def test_pairs_of_summaries_compare_as_the_summaries_of_pairs() -> None:
    rng = np.random.default_rng(3)
    sources = apart(30, 20)
    by_name = all_sources([A, B, MEAN], sources)
    ours, theirs = (
        Summarizer([A, B, MEAN], sources, {}).add(measured(rng.random(30), rng.random(20), sources)) for _ in range(2)
    )
    as_summary = paired_difference(ours, theirs, [MEAN], by_name)
    as_mean = paired_difference(ours, theirs, [A, B], by_name)
    assert as_summary == pytest.approx(as_mean, rel=1e-5)


def test_of_a_stopped_candidate_values_and_errors_are_taken_as_they_are() -> None:
    """They are estimates of what all items would have given; the items at hand are fewer."""
    sources = apart(30, 20)
    partial = measured(np.full(4, 0.5), np.full(5, 0.5), apart(4, 5), stopped="dominated")
    estimated = {name: replace(score, value=0.7, stderr=0.03) for name, score in partial.scores.items()}
    score = Summarizer([A, B, MEAN], sources, {}).add(replace(partial, scores=estimated)).scores["all"]
    assert score.value == pytest.approx(0.7)
    assert score.stderr == pytest.approx(0.03 / np.sqrt(2))


def test_without_summaries_nothing_is_added() -> None:
    sources = apart(2, 2)
    given_ = measured(np.ones(2), np.zeros(2), sources)
    assert Summarizer([A, B], sources, {}).add(given_) is given_


@given(st.integers(2, 20), st.integers(2, 20), st.integers(0, 2**31))
def test_the_companion_of_a_summary_is_the_mean_of_its_parts_losses(num_a: int, num_b: int, seed: int) -> None:
    """Whatever the metric's summary, and with the error of independent parts: descents follow the same."""
    rng = np.random.default_rng(seed)
    sources = apart(num_a, num_b)
    hits = measured(rng.random(num_a), rng.random(num_b), sources)
    losses = {"a": rng.exponential(1.0, num_a).astype(np.float32), "b": rng.exponential(9.0, num_b).astype(np.float32)}
    smooth = {name: replace(score, companion=losses[name]) for name, score in hits.scores.items()}
    of = Summarizer([A, B, MEAN, WORST], sources, {}).add(replace(hits, scores=smooth)).scores
    for name in ("all", "least"):
        companion = of[name].companion
        assert companion is not None
        assert companion.mean(dtype=np.float64) == pytest.approx(
            (losses["a"].mean() + losses["b"].mean()) / 2, rel=1e-4
        )
        apart_ = sum(losses[x].var() / n for x, n in (("a", num_a), ("b", num_b))) ** 0.5 / 2
        assert companion.std(dtype=np.float64) / len(companion) ** 0.5 == pytest.approx(apart_, rel=1e-3, abs=1e-6)


def test_one_part_without_losses_leaves_the_summary_without() -> None:
    sources = apart(3, 2)
    hits = measured(np.ones(3), np.ones(2), sources)
    smooth = {**hits.scores, "a": replace(hits.scores["a"], companion=np.ones(3, np.float32))}
    of = Summarizer([A, B, MEAN], sources, {}).add(replace(hits, scores=smooth)).scores
    assert of["all"].companion is None
