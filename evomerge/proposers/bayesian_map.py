"""Bayesian MAP: MAP that samples where its surrogates err most, before it evaluates the front that they predict.

    P(bin b) = exp(score_b / (0.07 max score)) / sum over bins
    score_b = mean squared error in b + standard error of that mean / 2

A direction in which the experts are mixed is a bin of hyperspherical angles; the next point lies in a bin that is
drawn, at a radius that is drawn uniformly. So the errors of the surrogates are learned from, not the height of the
objectives.
When to use: as ``map``, with few experts (up to six) and one number each, where a quadratic fits in some mixtures and
not in others. Its startup alone differs from ``map``; it has not been compared with it here.
Reference: Li et al. 2024, arxiv.org/abs/2406.07529.
Departures:
- An error is that of a surrogate which is fitted to all other results, of all results told so far: at the points that
  it is fitted to, a surrogate with as many unknowns as points has none.
- Every bin is taken to hold one point more, with the mean error of all. So a bin without points is as bad as the mean,
  and the least certain, instead of being left out.
- The standard error has a closed form, from the variance over all points, in place of a mean over resamples.
- The temperature is relative to the largest score: errors of scores in [0, 1] are far below the paper's 0.07.
- The errors of the objectives are averaged: one candidate is evaluated on all of them at once.
- Beyond six experts the first angles alone are cut into bins (the paper stops there).

Shape letters: N points, D dimensions, K experts, J = K - 1 angles, B bins.
"""

from typing import ClassVar

import numpy as np
from pydantic import Field

from evomerge.proposers.map import Map, MapOptions
from evomerge.proposers.proposer import Problem
from evomerge.records import Floats, Items, Options

MAX_CUT_ANGLES = 5
TEMPERATURE = 0.07
RADII = (0.2, 0.8)


class BayesianMapOptions(MapOptions):
    """num_initial: how many of the num_startup points follow the sampling law, by default half of them."""

    num_initial: int | None = Field(default=None, ge=1)


class BayesianMap(Map):
    """MAP whose startup learns from the surrogates' errors where to sample."""

    name: ClassVar[str] = "bayesian_map"
    options_type: ClassVar[type[Options]] = BayesianMapOptions

    def __init__(self, problem: Problem, options: BayesianMapOptions) -> None:
        super().__init__(problem, options)
        self.num_initial = options.num_initial or (self.num_startup + 1) // 2

    def explore(self, index: int) -> Floats:
        """Return a point of the law at first, and then one where the surrogates err, (D,)."""
        is_initial = index + self._num_earlier < self.num_initial or 2 * len(self._told) < self.num_initial
        if is_initial or self.law.num_experts < 2:
            return self.law.point(index)
        rng = self.problem.rng(index + 1)
        bins = Bins(self.law.num_experts)
        told_N = bins.of(self.law.levels(self.merits.points_ND))
        asked_N = bins.of(self.law.levels(np.array(self._asked)))
        probability_B = bins.probabilities(self.merits.squared_errors(), told_N, asked_N)
        angles_J = bins.draw(int(rng.choice(len(probability_B), p=probability_B)), rng)
        return self.law.place(rng.uniform(*RADII) * direction(angles_J), index)


class Bins:
    """Directions of the positive orthant, cut into equal parts of their hyperspherical angles in [0, pi/2].

    An angle is cut into 4 with up to three experts, else into 2; beyond the first MAX_CUT_ANGLES it is whole.
    """

    def __init__(self, num_experts: int) -> None:
        parts = 4 if num_experts < 4 else 2
        self.parts_J = tuple(parts if angle < MAX_CUT_ANGLES else 1 for angle in range(num_experts - 1))

    def of(self, levels_NK: Floats) -> Items:
        """Return the bin of each mix of experts, (N,); a level below 0 counts as 0."""
        parts_NJ = angles(np.clip(levels_NK, 0.0, None)) / (np.pi / 2) * self.parts_J
        within_NJ = np.minimum(parts_NJ.astype(np.int64), np.array(self.parts_J) - 1)
        return np.asarray(np.ravel_multi_index(tuple(within_NJ.T), self.parts_J))

    def probabilities(self, errors_N: Floats, told_N: Items, asked_N: Items) -> Floats:
        """Return with which probability each bin is next, (B,); what is asked but not told makes a bin more certain."""
        num_bins = int(np.prod(self.parts_J))
        mean_B = np.bincount(told_N, errors_N, num_bins) + errors_N.mean()
        mean_B /= np.bincount(told_N, minlength=num_bins) + 1
        stderr_B = errors_N.std() / np.sqrt(np.bincount(asked_N, minlength=num_bins) + 1)
        score_B = mean_B + 0.5 * stderr_B
        weight_B = np.exp((score_B / max(score_B.max(), 1e-300) - 1.0) / TEMPERATURE)
        return np.asarray(weight_B / weight_B.sum())

    def draw(self, chosen: int, rng: np.random.Generator) -> Floats:
        """Return angles (J,), uniform in a bin."""
        begin_J = np.array(np.unravel_index(chosen, self.parts_J))
        return np.asarray((begin_J + rng.random(len(begin_J))) / self.parts_J * (np.pi / 2))


def angles(levels_NK: Floats) -> Floats:
    """Return the hyperspherical angles (N, K-1) of vectors; the j-th lies between axis j and all axes after it."""
    after = [np.linalg.norm(levels_NK[:, j + 1 :], axis=1) for j in range(levels_NK.shape[1] - 1)]
    return np.asarray(np.arctan2(np.stack(after, axis=1), levels_NK[:, :-1]))


def direction(angles_J: Floats) -> Floats:
    """Return the unit vector (K,) of hyperspherical angles (K-1,)."""
    sines_J, cosines_J = np.sin(angles_J), np.cos(angles_J)
    return np.asarray(np.concatenate([[1.0], sines_J]).cumprod() * np.concatenate([cosines_J, [1.0]]))
