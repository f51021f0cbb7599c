"""The gradient front: a whole front of candidates for the price of a few evaluations, where losses have gradients.

    c(w) = sum_m w_m c_m
    c_m <- Adam step down sum_m w_m L_m(c(w)), w ~ Dirichlet(1) anew each step

One descent moves M anchors c_m, one for each objective, on minibatches of the adapt items. The model of a preference w
over the objectives is the mean of the anchors, weighted by w: a map from preferences to coefficients that every step's
gradient teaches at a preference of its own. Then models of preferences far from each other are scored.
When to use: two objectives and more, labels, and an operator with gradients: ``auto`` begins with it. Its price does
not grow with the number of coefficients (measured on digits4: 4 evaluations; at 12 it was where ``tpe``, ``nsga2`` and
``cma_es`` ended at 200). Not alone: weighted sums find only the ends of a front that is not convex, so go on with
``surrogate``, which is told its gradients.
Reference: the sampling loop is PaMaL's (Dimitriadis et al. 2023, arxiv.org/abs/2210.09759), which trains M sets of
weights; here the gradient in the coefficients of existing experts is enough.

Shape letters: D dimensions, M objectives.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from evomerge.proposers.legs import DescentOptions
from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Descent, Floats, Observation, Options

NUM_PREFERENCES = 1024  # among which those far from each other are chosen
FINAL_RATE = 0.1


class GradientFrontOptions(DescentOptions):
    """steps: of the descent; learning_rate: at first, in units of the coefficients; batch_size: items a task."""

    steps: int = Field(default=60, ge=1)
    learning_rate: float = Field(default=0.08, gt=0)
    batch_size: int = Field(default=8, ge=1)

    def num_forwards(self, num_adapt: Mapping[str, int], num_trials: int) -> float:  # noqa: ARG002
        """One descent, whatever the number of trials."""
        return super().num_forwards(num_adapt, 1)


class GradientFront:
    """A descent, whose candidate is that of equal preferences; then the anchors, then preferences between them."""

    name: ClassVar[str] = "gradient_front"
    options_type: ClassVar[type[Options]] = GradientFrontOptions
    needs_gradients: ClassVar[bool] = True

    def __init__(self, problem: Problem, options: GradientFrontOptions) -> None:
        self.problem, self.options = problem, options
        self._anchors_MD: Floats | None = None
        self._preferences = _spread_preferences(problem.num_objectives, problem.rng(0))
        self._num_descents, self._num_points = 0, 0
        self._waiting = False

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return the descent; nothing while it is under way; then points of its front."""
        if self._anchors_MD is None:
            if self._waiting or n < 1:
                return []
            candidates = [self._descent()]
        else:
            candidates = [
                Candidate(point=tuple((self._preference(self._num_points + i) @ self._anchors_MD).tolist()))
                for i in range(n)
            ]
        for candidate in candidates:
            self.recall(candidate)
        return candidates

    def tell(self, observation: Observation) -> None:
        """Take the descent's anchors; a failed descent is tried again with other batches."""
        if observation.arrival is not None and observation.arrival.anchors:
            self._anchors_MD = np.array(observation.arrival.anchors).reshape(-1, self.problem.num_dimensions)
        self._waiting = False

    def recall(self, candidate: Candidate) -> None:
        """Count what was asked."""
        if candidate.descent is not None:
            self._num_descents += 1
            self._waiting = True
        else:
            self._num_points += 1

    def _descent(self) -> Candidate:
        point = tuple(float(x) for x in self.problem.best_point)
        descent = Descent(
            loss="ce",
            steps=self.options.steps,
            learning_rate=self.options.learning_rate,
            batch_size=self.options.batch_size,
            seed=(*self.problem.seed, self._num_descents),
            final_rate=FINAL_RATE,
            anchors=point * self.problem.num_objectives,
        )
        return Candidate(point=point, descent=descent)

    def _preference(self, number: int) -> Floats:
        preference_M: Floats = self._preferences[number % len(self._preferences)]
        return preference_M


def _spread_preferences(num_objectives: int, rng: np.random.Generator) -> Floats:
    """Return preferences (1024, M) in an order of which every beginning is spread out: the ends first.

    Each is the farthest from equal preferences, which the descent's own candidate has, and from all before it.
    """
    ends_MM = np.eye(num_objectives)
    drawn = rng.dirichlet(np.ones(num_objectives), NUM_PREFERENCES - num_objectives)
    left = np.vstack([ends_MM, drawn])
    chosen = []
    nearest = ((left - 1 / num_objectives) ** 2).sum(axis=1)
    for _ in range(NUM_PREFERENCES):
        farthest = int(nearest.argmax())
        chosen.append(left[farthest])
        nearest = np.minimum(nearest, ((left - left[farthest]) ** 2).sum(axis=1))
        nearest[farthest] = -1.0
    return np.array(chosen)
