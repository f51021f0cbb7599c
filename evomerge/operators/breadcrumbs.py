"""Model Breadcrumbs: of each task vector neither the largest nor the smallest entries are merged.

Shape letters: K experts, S tensors.
"""

from typing import ClassVar

import torch
from torch import Tensor

from evomerge.kernels.masked import Trims
from evomerge.kernels.sources import Sources
from evomerge.operators.masks import Tables, l1_gain, magnitude_tables, num_kept, sizes, thresholds
from evomerge.operators.operator import Values
from evomerge.operators.trimmed import (
    SCALE,
    Trimmed,
    TrimmedOptions,
    TrimmedSum,
    TrimState,
    coefficient,
    density,
)
from evomerge.records import Options, ParameterSpec

BreadcrumbsState = TrimState[Tables]


class BreadcrumbsOptions(TrimmedOptions):
    """rescale: multiply each trimmed task vector so that its magnitudes sum to what they did before."""

    rescale: bool = False


class _Window(Trimmed):
    """The parameters, and which entries are kept."""

    options_type: ClassVar[type[Options]] = BreadcrumbsOptions

    def __init__(self, options: BreadcrumbsOptions | None = None) -> None:
        self.options: BreadcrumbsOptions = options or BreadcrumbsOptions()
        self.parameters: tuple[ParameterSpec, ...] = (
            coefficient(0.2, 0.1, 1.0, self.vote),
            density("largest magnitudes first, after those that gamma drops", 0.15, 0.05),
            ParameterSpec(
                name="gamma",
                meaning="fraction of each task vector that is dropped as outliers, largest magnitudes first",
                default=0.01,
                low=0.0,
                high=0.05,
                minimum=0.0,
                maximum=1.0,
                structural=True,
            ),
            SCALE,
        )

    def prepare(self, sources: Sources, values: Values, earlier: BreadcrumbsState | None) -> BreadcrumbsState:
        """Count the magnitudes the first time; look the thresholds up."""
        tables = earlier.cache if earlier else magnitude_tables(sources)
        kept_KS, dropped_KS = window(values, sizes(sources))
        reached_KS = dropped_KS + kept_KS
        gain_KS = l1_gain(tables, reached_KS, dropped_KS) if self.options.rescale else torch.ones_like(kept_KS)
        trims = Trims("window", gain_KS, *thresholds(tables, reached_KS), *thresholds(tables, dropped_KS))
        return TrimState(tables, trims)


def window(values: Values, sizes_S: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many entries are kept, and how many larger ones are dropped, (K, S) each.

    Kept are int(density E), at least one; dropped int(gamma E), but no more than leave so many: with density 1 none, as
    in mergekit. None either of a tensor of fewer than 1 / gamma elements, where mergekit loses the whole task vector
    (its slice "all but the last 0" is empty).
    """
    kept_KS = num_kept(values["density"], sizes_S)
    return kept_KS, (values["gamma"] * sizes_S).floor().minimum(sizes_S - kept_KS)


class Breadcrumbs(TrimmedSum, _Window):
    """Model Breadcrumbs: of each task vector neither the largest nor the smallest entries are merged.

        theta = base + scale * sum_k c_k t_k
        t_k = tau_k where |tau_k| is in the next density after the largest gamma, else 0

    The paper trims every row of a matrix by itself, we trim whole tensors, as mergekit does. The defaults are the
    official example's, gamma is mergekit's.
    When to use: task vectors with outliers, which plain sums are suspected to suffer from. It has gradients in the
    coefficients; fix gamma and density at first, as every new one trims again, and takes 2 to 3 times as long as
    ``task_arithmetic`` (measured: 355 M parameters, three experts).
    Reference: Davari and Belilovsky 2024, arxiv.org/abs/2312.06795.
    """

    name: ClassVar[str] = "breadcrumbs"


class BreadcrumbsTies(_Window):
    """Breadcrumbs with TIES' vote: of what is left of the task vectors, what agrees with the elected sign is summed.

        theta = base + scale * sum_{k in A} c_k t_k
        t_k as in breadcrumbs
        A = the experts with sign(c_k t_k) = sign(sum_j c_j t_j), entry by entry

    When to use: ``breadcrumbs`` of experts that contradict each other. It has no gradients.
    Reference: mergekit's ``breadcrumbs_ties``; Davari and Belilovsky 2024, arxiv.org/abs/2312.06795, and Yadav et al.
    2023, arxiv.org/abs/2306.01708, for its parts.
    """

    name: ClassVar[str] = "breadcrumbs_ties"
