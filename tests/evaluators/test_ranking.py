"""Rank correlation and retrieval metrics against scipy, scikit-learn and slow obvious twins."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import ndcg_score

from evomerge.evaluators.ranking import positive_ranks, rank_metric, spearman

VALUES = st.integers(-3, 3) | st.floats(-1e3, 1e3, width=32)


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=40))
def test_spearman_is_scipys(pairs: list[tuple[float, float]]) -> None:
    x_N, y_N = np.array(pairs, dtype=np.float32).T
    ours = spearman(x_N, y_N)
    if len(set(x_N)) == 1 or len(set(y_N)) == 1:
        assert math.isnan(ours)
    else:
        assert ours == pytest.approx(spearmanr(x_N, y_N).statistic, abs=1e-12)


@pytest.mark.parametrize("flaw", [np.nan, np.inf, -np.inf])
def test_spearman_of_what_is_not_finite(flaw: float) -> None:
    assert math.isnan(spearman(np.array([1.0, flaw, 2.0]), np.array([1.0, 2.0, 3.0])))


def naive_ranks(similarity: list[float], positives: list[int]) -> list[int]:
    """Sort the passages; of equal ones those that answer nothing come first."""
    order = sorted(range(len(similarity)), key=lambda passage: (-similarity[passage], passage in positives))
    return sorted(order.index(passage) + 1 for passage in positives)


@st.composite
def retrievals(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]]]:
    num_passages = draw(st.integers(1, 8))
    similarities = st.lists(
        st.integers(0, 3) | st.floats(-1, 1, width=32), min_size=num_passages, max_size=num_passages
    )
    positives = st.lists(st.integers(0, num_passages - 1), min_size=1, unique=True)
    rows = draw(st.lists(st.tuples(similarities, positives), min_size=1, max_size=4))
    return [row[0] for row in rows], [row[1] for row in rows]


@given(retrievals(), st.integers(1, 9))
def test_rank_metrics_are_what_their_definitions_say(
    retrieval: tuple[list[list[float]], list[list[int]]], k: int
) -> None:
    similarity, positives = retrieval
    width = max(map(len, positives))
    filled = torch.tensor([[*row, *row[:1] * (width - len(row))] for row in positives])
    num_B = torch.tensor([len(row) for row in positives])
    ranks_BP = positive_ranks(torch.tensor(similarity, dtype=torch.float32), filled, num_B)
    values = {name: rank_metric(name, ranks_BP, num_B) for name in (f"recall@{k}", f"ndcg@{k}", "mrr")}
    for b, (row, of_query) in enumerate(zip(similarity, positives, strict=True)):
        ranks = naive_ranks(row, of_query)
        assert ranks_BP[b].tolist() == [*ranks, *[math.inf] * (width - len(ranks))]
        best = sum(1 / math.log2(1 + place) for place in range(1, min(k, len(ranks)) + 1))
        gain = sum(1 / math.log2(1 + rank) for rank in ranks if rank <= k)
        expected = {
            f"recall@{k}": sum(rank <= k for rank in ranks) / len(ranks),
            f"ndcg@{k}": gain / best,
            "mrr": 1 / ranks[0],
        }
        assert {name: float(of_queries[b]) for name, of_queries in values.items()} == pytest.approx(expected, rel=1e-5)


def test_ndcg_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    similarity, relevant = rng.normal(size=(20, 30)), rng.random((20, 30)) < 0.2
    relevant[:, 0] = True
    for row, answers in zip(similarity, relevant, strict=True):
        positives = torch.from_numpy(np.flatnonzero(answers))[None]
        num_B = torch.tensor([answers.sum()])
        ours = rank_metric("ndcg@10", positive_ranks(torch.from_numpy(row[None]), positives, num_B), num_B)
        assert float(ours) == pytest.approx(ndcg_score([answers], [row], k=10), rel=1e-5)


def test_a_model_to_which_all_is_alike_finds_nothing() -> None:
    num_B = torch.tensor([1])
    ranks_BP = positive_ranks(torch.ones(1, 50), torch.tensor([[7]]), num_B)
    assert float(rank_metric("recall@10", ranks_BP, num_B)) == 0
    assert ranks_BP.tolist() == [[50]]


@pytest.mark.parametrize("flaw", [math.nan, math.inf])
def test_a_similarity_that_is_not_finite_spoils_its_query_alone(flaw: float) -> None:
    similarity = torch.tensor([[0.1, 0.2, 0.3], [0.1, flaw, 0.3]])
    num_B = torch.tensor([1, 1])
    ranks_BP = positive_ranks(similarity, torch.tensor([[2], [2]]), num_B)
    for name in ("recall@1", "ndcg@2", "mrr"):
        one, other = rank_metric(name, ranks_BP, num_B).tolist()
        assert one == 1
        assert math.isnan(other)
