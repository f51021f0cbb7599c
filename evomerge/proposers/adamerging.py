"""AdaMerging: gradient steps on the coefficients that lower the entropy of the merged model's predictions.

Reference: Yang et al. 2024, AdaMerging, arxiv.org/abs/2310.02575, eq. 3; Adam with rate 1e-3 and batches of 16 a task.
Task-wise with ``groups: model``; what the paper calls layer-wise is ``groups: tensor``. Departures: it trains on adapt
items that are never scored (the paper adapts and evaluates on the same), and coefficients are projected into their
range after each step (the official clamp in the forward has no gradient outside, and coefficients die there).

Each trial continues the descent of the one before by ``steps`` steps and scores where it ends. Entropy rewards
confidence, not being right; ``loss: ce`` descends the cross-entropy of the adapt items' labels instead.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from evomerge.proposers.proposer import Problem
from evomerge.records import Arrival, Candidate, Descent, Observation, Options


class AdaMergingOptions(Options):
    """loss: what descends; steps: a trial's; learning_rate: in units of the coefficients; batch_size: items a task."""

    loss: Literal["entropy", "ce"] = "entropy"
    steps: int = Field(default=50, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch_size: int = Field(default=16, ge=1)


class AdaMerging:
    """One descent, cut into trials; it waits for the trial that is under way."""

    name: ClassVar[str] = "adamerging"
    options_type: ClassVar[type[Options]] = AdaMergingOptions
    needs_gradients: ClassVar[bool] = True

    def __init__(self, problem: Problem, options: AdaMergingOptions) -> None:
        self.problem, self.options = problem, options
        self._arrival = Arrival(
            point=tuple(float(x) for x in problem.start), first_moment=(), second_moment=(), losses=()
        )
        self._num_asked, self._num_steps = 0, 0
        self._waiting = False

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return the next leg of the descent, or nothing while one is under way."""
        if self._waiting or n < 1:
            return []
        descent = Descent(
            loss=self.options.loss,
            steps=self.options.steps,
            learning_rate=self.options.learning_rate,
            batch_size=self.options.batch_size,
            seed=(*self.problem.seed, self._num_asked),
            steps_before=self._num_steps,
            first_moment=self._arrival.first_moment,
            second_moment=self._arrival.second_moment,
        )
        candidate = Candidate(point=self._arrival.point, descent=descent)
        self.recall(candidate)
        return [candidate]

    def tell(self, observation: Observation) -> None:
        """Go on from where the descent ended; a failed leg is tried again with other batches."""
        self._waiting = False
        if observation.arrival is not None:
            self._arrival = observation.arrival
            self._num_steps += len(observation.arrival.losses)

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """A leg is under way."""
        self._num_asked += 1
        self._waiting = True
