"""How well similarities rank: Spearman's correlation, and what is found among the k most similar.

Shape letters: N items, B queries, C passages of a corpus, P positives of a query (padded).
"""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

RANK_METRIC = re.compile(r"(?:(?P<at_k>recall|ndcg)@(?P<k>[1-9]\d*)|mrr)")


def spearman(x_N: npt.NDArray[Any], y_N: npt.NDArray[Any]) -> float:
    """Return Spearman's rank correlation, equal values sharing their mean rank; NaN where it is not defined.

    It is not where a value is not finite or all of x or of y are the same.
    """
    if not (np.isfinite(x_N).all() and np.isfinite(y_N).all()):
        return float("nan")
    x_N, y_N = _centred_ranks(x_N), _centred_ranks(y_N)
    scale = float(x_N @ x_N) * float(y_N @ y_N)
    return float(x_N @ y_N) / scale**0.5 if scale > 0 else float("nan")


def _centred_ranks(values_N: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return ranks less their mean; quicker than with np.unique, since a jackknife asks a hundred times."""
    order_N = values_N.argsort()
    ascending_N = values_N[order_N]
    edges = np.flatnonzero(np.concatenate(([True], ascending_N[1:] != ascending_N[:-1], [True])))
    ranks_N = np.empty(len(values_N))
    ranks_N[order_N] = np.repeat((edges[1:] + edges[:-1] - len(values_N)) / 2, np.diff(edges))
    return ranks_N


def positive_ranks(similarity_BC: Tensor, positives_BP: Tensor, num_B: Tensor) -> Tensor:
    """Return the (B, P) float32 ranks of the queries' positives among all passages, ascending from 1, then infinities.

    positives_BP: passages, filled up with one of the row's own; num_B: how many of them count. A passage that is as
    similar as a positive ranks before it, so that a model to which all is alike finds nothing. A row in which
    a similarity is not finite is NaN.
    """
    others_BC = similarity_BC.scatter(1, positives_BP, -torch.inf)
    of_positives_BP = similarity_BC.gather(1, positives_BP)
    ahead_BP = torch.stack([(others_BC >= column[:, None]).sum(1) for column in of_positives_BP.unbind(1)], 1).float()
    place_P = torch.arange(positives_BP.shape[1], device=similarity_BC.device)
    ahead_BP = ahead_BP.masked_fill(place_P >= num_B[:, None], torch.inf)
    ranks_BP = ahead_BP.sort(1).values + place_P + 1
    return ranks_BP.masked_fill(~similarity_BC.isfinite().all(1)[:, None], torch.nan)


def rank_metric(name: str, ranks_BP: Tensor, num_B: Tensor) -> Tensor:
    """Return (B,) values in [0, 1] of ``recall@k``, ``ndcg@k`` or ``mrr``, each query's own; NaN where a rank is.

    recall@k is the share of the positives among the first k; mrr the reciprocal rank of the first positive; ndcg@k the
    discounted gain of the first k, 1 / log2(1 + rank) a positive, over the best one (Järvelin and Kekäläinen 2002).
    """
    match = RANK_METRIC.fullmatch(name)
    assert match, name
    if name == "mrr":
        return 1 / ranks_BP[:, 0]
    k = int(match["k"])
    found_BP = ranks_BP <= k
    if match["at_k"] == "recall":
        values_B = found_BP.sum(1) / num_B
    else:
        best_k = torch.arange(2, k + 2, device=ranks_BP.device).log2().reciprocal().cumsum(0)
        values_B = (found_BP / (1 + ranks_BP).log2()).sum(1) / best_k[num_B.clamp(max=k) - 1]
    return values_B.masked_fill(ranks_BP[:, 0].isnan(), torch.nan)
