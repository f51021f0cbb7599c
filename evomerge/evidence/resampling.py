"""Drawing the sources anew: what might have been scored instead.

Whatever is resampled here is a sum of what single sources contribute, so that resamples are one product of matrices:
how often each source is drawn, times what it contributes.
Shape letters: K models, M objectives, N items, R resamples, S sources.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from evomerge.evidence.scores import source_codes
from evomerge.records import Floats, Items

BLOCK = 1 << 21  # counts at a time, 16 MB


def by_source(residuals_KN: Floats, codes_N: Items, num_sources: int) -> Floats:
    """Sum what items contribute by their sources, (K, S); a source without items contributes 0."""
    return np.stack([np.bincount(codes_N, residuals_N, num_sources) for residuals_N in residuals_KN])


def contributions(items: Sequence[Floats], sources: Sequence[Sequence[int | str]]) -> Floats:
    """Return what each source adds to the means over items, (M, K, S); the sum over sources is 0.

    items and sources: of each objective a matrix (K, N) and the N items' sources; objectives may share sources.
    """
    codes_N = source_codes([source for of_objective in sources for source in of_objective])
    num_sources = int(codes_N.max()) + 1
    codes = np.split(codes_N, np.cumsum([len(of_objective) for of_objective in sources])[:-1])
    return np.stack(
        [
            by_source((items_KN - items_KN.mean(axis=1, keepdims=True)) / items_KN.shape[1], codes_N, num_sources)
            for items_KN, codes_N in zip(items, codes, strict=True)
        ]
    )


def resampled_counts(num_sources: int, num_resamples: int) -> Iterator[Floats]:
    """Yield how often each source is drawn, S with replacement, in blocks (R, S); every call yields the same."""
    rng = np.random.default_rng([0xB007, num_sources])
    per_block = max(1, BLOCK // num_sources)
    for start in range(0, num_resamples, per_block):
        num_rows = min(per_block, num_resamples - start)
        drawn = rng.integers(0, num_sources, (num_rows, num_sources)) + num_sources * np.arange(num_rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=num_rows * num_sources)
        yield counts.reshape(num_rows, num_sources).astype(np.float64)
