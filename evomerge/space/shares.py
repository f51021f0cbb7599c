"""Starts that the experts give: each coefficient begins at its expert's share among all experts.

Shape letters: K experts.
"""

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from evomerge.records import Floats, Options

Measure = Literal["mean_square", "mean_magnitude"]
"""Of the task vectors' entries, over the tensors that a coefficient is for."""

EXPONENTS: dict[Measure, int] = {"mean_square": 2, "mean_magnitude": 1}

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ShareOptions(Options):
    """Start at the experts' shares of ``total``, which are proportional to a size of each, raised to ``power``.

    by: that size. mean_square is VaRM's (FuseChat, arxiv.org/abs/2402.16107, per matrix: groups: tensor);
    mean_magnitude is linear in the task vector. Or a number for each expert, such as a loss with a negative power, an
    accuracy or a training step with a positive one (metrics-weighted averaging, arxiv.org/abs/2504.18580).
    """

    by: Measure | dict[str, Positive]
    power: float = Field(default=1.0, allow_inf_nan=False)
    total: Positive = 1.0


def shares(sizes_K: Floats, options: ShareOptions) -> Floats:
    """Return every expert's share (K,) of ``total``; where all sizes are zero, equal ones.

    sizes_K are 0 or more, in any unit. With a negative power, experts of size zero share everything: that is the limit.
    """
    # In ratios of at most 1: their powers do not overflow, and sizes may be as small as they like.
    dominant = sizes_K.max() if options.power >= 0.0 else sizes_K.min()
    if dominant == 0.0:
        ratios_K = (sizes_K == 0.0).astype(np.float64)
    else:
        ratios_K = sizes_K / dominant if options.power >= 0.0 else dominant / sizes_K
    powers_K = ratios_K ** abs(options.power)
    shares_K: Floats = options.total * powers_K / powers_K.sum()
    return shares_K
