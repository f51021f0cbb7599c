"""Links between a bounded score and an unbounded predictor, on which a polynomial may be fitted.

A score is ``forward(predictor)``. All functions work elementwise on arrays of any shape.
Reference: McCullagh and Nelder 1989, Generalized Linear Models, section 2.2.3; MAP (arxiv.org/abs/2406.07529) takes
the sigmoid for accuracies and the softplus for losses.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from evomerge.records import Floats


class Link(Protocol):
    """A strictly increasing function from the real line to the range of a score."""

    def forward(self, predictor: Floats) -> Floats:
        """Return the scores."""

    def inverse(self, score: Floats) -> Floats:
        """Return the predictors, always finite. Raises: ValueError for scores outside the link's range."""

    def derivative(self, predictor: Floats) -> Floats:
        """Return d score / d predictor, never negative."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A score without bounds is its own predictor."""

    def forward(self, predictor: Floats) -> Floats:
        """Return the predictors."""
        return predictor

    def inverse(self, score: Floats) -> Floats:
        """Return the scores."""
        return score

    def derivative(self, predictor: Floats) -> Floats:
        """Return ones."""
        return np.ones_like(predictor)


@dataclass(frozen=True, slots=True)
class Sigmoid:
    """Scores in [0, 1], such as accuracies: 1 / (1 + exp(-predictor)).

    epsilon: a score nearer than this to 0 or 1 counts as that near, for the predictor of 0 and 1 is infinite. A share
    of n items moves in steps of 1/n, so that half a step, ``1 / (2 n)``, is the least that can be told from 0. The
    default is right for 500 items.
    """

    epsilon: float = 1e-3

    def forward(self, predictor: Floats) -> Floats:
        """Return scores in [0, 1]."""
        return 0.5 + 0.5 * np.tanh(0.5 * predictor)  # exp would overflow

    def inverse(self, score: Floats) -> Floats:
        """Return the log-odds, of absolute value log(1/epsilon - 1) at most."""
        _check(score, 0.0, 1.0)
        clipped = np.clip(score, self.epsilon, 1.0 - self.epsilon)
        return np.log(clipped) - np.log1p(-clipped)

    def derivative(self, predictor: Floats) -> Floats:
        """Return score (1 - score)."""
        score = self.forward(predictor)
        return score * (1.0 - score)


@dataclass(frozen=True, slots=True)
class Softplus:
    """Scores in [0, inf), such as losses: log(1 + exp(predictor)).

    epsilon: a score below it counts as it, for the predictor of 0 is minus infinity. A thousandth of a nat is below
    the standard error of any loss that is a mean over some thousand items.
    """

    epsilon: float = 1e-3

    def forward(self, predictor: Floats) -> Floats:
        """Return scores above 0."""
        return np.logaddexp(0.0, predictor)

    def inverse(self, score: Floats) -> Floats:
        """Return log(exp(score) - 1)."""
        _check(score, 0.0, np.inf)
        clipped = np.maximum(score, self.epsilon)
        return clipped + np.log(-np.expm1(-clipped))  # exp(score) would overflow

    def derivative(self, predictor: Floats) -> Floats:
        """Return 1 / (1 + exp(-predictor))."""
        return 0.5 + 0.5 * np.tanh(0.5 * predictor)


def _check(score: Floats, low: float, high: float) -> None:
    if not ((score >= low) & (score <= high)).all():
        raise ValueError(f"score: expected numbers in [{low:g}, {high:g}], got {np.min(score):g} to {np.max(score):g}")
