"""SCE: keep the entries in which the experts differ most, weigh experts by what they hold there, elect signs.

Shape letters: K experts, S tensors, E entries of a piece, T entries of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from evomerge.kernels.masked import Trims, masked_consensus
from evomerge.kernels.sources import Sources
from evomerge.kernels.tiles import Vote, variance
from evomerge.operators.masks import MagnitudeTable
from evomerge.operators.operator import Values
from evomerge.records import Floats, Options, ParameterSpec


@dataclass(frozen=True, slots=True, eq=False)
class VarianceTable:
    """The sorted variances of a tensor's entries, and the experts' squares in that order, made once.

    squares_KT sums the squared task vectors over the entries that reach each of the table's variances.
    """

    variances: MagnitudeTable
    num_varying: int
    squares_KT: Floats

    @classmethod
    def of(cls, sources: Sources, s: int) -> "VarianceTable":
        """Sort the variances of tensor s; two passes over the sources."""
        pieces = [_variances(sources, s, rows) for rows, _ in sources.chunks(s)]
        variances = MagnitudeTable.of(torch.cat(pieces))
        ascending_T = variances.values_T[::-1]
        squares_KT = np.zeros((sources.num_experts, len(ascending_T)))
        for (rows, _), piece_E in zip(sources.chunks(s), pieces, strict=True):
            places_E = np.searchsorted(ascending_T, piece_E.cpu().numpy(), side="right") - 1
            vectors_KE = sources.task_vectors(s, rows).flatten(1).double().cpu().numpy()
            for k, vector_E in enumerate(vectors_KE):
                squares_KT[k] += np.bincount(places_E, vector_E**2, minlength=len(ascending_T))
        num_varying = sum(int(piece_E.count_nonzero()) for piece_E in pieces)
        return cls(variances, num_varying, squares_KT[:, ::-1].cumsum(1))

    def threshold(self, topk: float) -> tuple[float, float, float]:
        """Return (low, high, cut) as ``MagnitudeTable``; 1 keeps all entries, the constant ones too."""
        if topk == 1.0:
            return 0.0, 0.0, 0.0
        num_kept = int(topk * self.num_varying)
        return self.variances.threshold(num_kept) if num_kept else (np.inf, np.inf, 0.0)

    def squares(self, topk: float) -> Floats:
        """Return each expert's sum of squares over what ``threshold`` keeps, (K,)."""
        if topk == 1.0:
            return self.squares_KT[:, -1]
        counts = np.append(0.0, self.variances.counts_T)
        num_kept = int(topk * self.num_varying)
        return np.array([np.interp(num_kept, counts, np.append(0.0, squares_T)) for squares_T in self.squares_KT])


@dataclass(frozen=True, slots=True, eq=False)
class SceState:
    """The tables, and the trims and weights (K, S) of the present topk."""

    tables: list[VarianceTable]
    trims: Trims
    weights_KS: Tensor


class SceOptions(Options):
    """floor: mean squares that sum to less are not told apart, all experts weigh the same.

    masked: what the choice of entries is for: the merge and its weights, or the weights alone, with all entries merged.
    """

    floor: float = Field(default=0.0, ge=0.0)
    masked: Literal["merge", "weights"] = "merge"


class Sce:
    """SCE: keep the entries in which the experts differ most, weigh experts by what they hold there, elect signs.

        theta = base + sum_{k in A} w_k t_k / sum_{k in A} w_k
        A = the experts with sign(t_k) = sign(sum_j t_j), entry by entry
        w_k = mean(t_k^2) / sum_j mean(t_j^2)

    Select: t_k is tau_k in the ``select_topk`` share of a tensor's entries with the largest variance across experts, of
    those that vary at all, and 0 elsewhere. Calculate: the weights. Erase: what disagrees; zero counts as positive.

    "sce" is not one thing: mergekit's gives all experts the same weight when the mean squares sum to less than 1e-6,
    which is the normal case for small updates (three experts that moved by 6e-4 each): ``floor: 1e-6`` is equal to it,
    the default weighs tensors of any scale as the paper says. FuseAI's own code selects for the weights only: ``masked:
    weights``. mergekit divides by at least 1e-6, we by the weights as they are.
    When to use: weights without a single evaluation, or with a search over one number. Not to steer between abilities:
    experts have no coefficients. Preparing takes long (measured: half a minute for 355 M parameters, three experts).
    Reference: Wan et al. 2024 (FuseChat), arxiv.org/abs/2408.07990; there select_topk = 0.1, in FuseO1 1.
    """

    name: ClassVar[str] = "sce"
    reads_factors: ClassVar[bool] = False
    differentiable: bool = False  # nothing is weighed by a parameter
    local: bool = True

    options_type: ClassVar[type[Options]] = SceOptions

    def __init__(self, options: SceOptions | None = None) -> None:
        self.options = options or SceOptions()
        self.parameters: tuple[ParameterSpec, ...] = (
            ParameterSpec(
                name="select_topk",
                meaning="fraction of the entries that is merged, largest variance across experts first",
                default=0.1,
                low=0.05,
                high=1.0,
                minimum=0.0,
                maximum=1.0,
                per_expert=False,
                structural=True,
            ),
        )

    def prepare(self, sources: Sources, values: Values, earlier: SceState | None) -> SceState:
        """Sort the variances the first time; look thresholds and weights up."""
        num_experts, num_tensors = sources.num_experts, sources.num_tensors
        tables = earlier.tables if earlier else [VarianceTable.of(sources, s) for s in range(num_tensors)]
        thresholds, weights = [], []
        for table, topk in zip(tables, values["select_topk"][0].tolist(), strict=True):
            thresholds.append(table.threshold(topk if self.options.masked == "merge" else 1.0))
            squares_K = table.squares(topk)
            total = float(squares_K.sum())
            equal = total == 0.0 or total / table.variances.num_elements < self.options.floor
            weights.append(np.full(num_experts, 1 / num_experts) if equal else squares_K / total)
        low_KS, high_KS, cut_KS = torch.tensor(thresholds, dtype=torch.float64).T[:, None].expand(-1, num_experts, -1)
        weights_KS = torch.from_numpy(np.stack(weights, axis=1))
        trims = Trims("variance", torch.ones_like(weights_KS), low_KS, high_KS, cut_KS)
        return SceState(tables, trims, weights_KS)

    def weights(self, values: Values, state: SceState) -> Tensor:  # noqa: ARG002
        """The consensus counts once; the experts' weights follow from their task vectors."""
        return torch.cat([torch.ones_like(state.weights_KS[:1]), state.weights_KS])

    def merge(
        self,
        out_P: Tensor,
        sources: Sources,
        weights_KS: Tensor,
        state: SceState,
        changed: Sequence[int] | None = None,
    ) -> None:
        """Launch ``masked_consensus``."""
        vote = Vote(elect="unweighted", divide="weights")
        masked_consensus(out_P, sources, weights_KS, state.trims, vote, changed)


def _variances(sources: Sources, s: int, rows: slice) -> Tensor:
    """Return the variances across experts of so many rows of tensor s, (E,), as the kernel computes them."""
    return variance(sources.task_vectors(s, rows).flatten(1).unbind(0))
