"""LoraHub: few evaluations of signed coefficients, judged by loss and size, by nevergrad's NGOpt.

    c = argmin mean_m L_m(c) + penalty mean_k |c_k|

L_m is an objective's loss, or minus its value where it has none. Of the budgets that it is meant for NGOpt makes COBYLA
(Powell 1994): linear models over a simplex, one candidate after the other, so that one worker is busy. Once it has
converged, or its budget is spent, nevergrad draws at random around the start.
When to use: a pool of adapters for one task, some 40 evaluations and one worker. For more evaluations or workers, or
many numbers, take ``cma_es`` with a ``penalty``; not for a front.
Reference: Huang et al. 2023, LoraHub, arxiv.org/abs/2307.13269: the loss of a few examples, and a penalty of 0.05. The
published search starts at 0 in [-1.5, 1.5]: write ``coefficient: {low: -1.5, high: 1.5, start: 0}`` in the campaign's
space.

Shape letters: D dimensions, M objectives.
"""

import threading
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomerge.errors import CampaignError
from evomerge.proposers.proposer import Problem, not_installed
from evomerge.records import Candidate, Floats, Observation, Options

MAX_PER_DIMENSION = 50  # beyond, NGOpt chooses a metamodel that fails with numpy 2.4 (nevergrad 1.0.12)


class LoraHubOptions(Options):
    """budget: evaluations that NGOpt plans for; penalty: weight of the coefficients' mean absolute value."""

    budget: int = Field(default=40, ge=1)
    penalty: float = Field(default=0.05, ge=0)


class LoraHub:
    """NGOpt on the mean of the objectives' losses, or minus the value where an objective has no loss.

    Raises: CampaignError if nevergrad is missing, or the budget is beyond 50 evaluations a dimension.
    """

    name: ClassVar[str] = "lorahub"
    options_type: ClassVar[type[Options]] = LoraHubOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: LoraHubOptions) -> None:
        if options.budget > (most := MAX_PER_DIMENSION * problem.num_dimensions):
            raise CampaignError(
                f"search: lorahub.budget: expected at most {most}, {MAX_PER_DIMENSION} for each of "
                f"{problem.num_dimensions} dimensions, found {options.budget}; use cma_es for more"
            )
        self.problem, self.options = problem, options
        self._optimizer = self._make()
        self._asked: Any = None
        self._worst = 0.0

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return the next candidate, or nothing while one is under way."""
        if self._asked is not None or n < 1:
            return []
        self._asked = self._next()
        return [Candidate(point=tuple(float(x) for x in np.clip(self._asked.value, 0.0, 1.0)))]

    def tell(self, observation: Observation) -> None:
        """Hand over the penalized loss; a failed candidate is worse by 1 than the worst."""
        loss = self.loss(observation)
        self._worst = self._worst if loss is None else max(self._worst, loss)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._optimizer.tell(self._asked, self._worst + 1.0 if loss is None else loss)
        self._asked = None

    def recall(self, candidate: Candidate) -> None:  # noqa: ARG002
        """NGOpt asks the same again."""
        self.ask(1, [])

    def loss(self, observation: Observation) -> float | None:
        """Return what is minimized, with what floors and ceilings are missed by; None for a failed candidate."""
        if observation.values_M is None:
            return None
        losses_M = -observation.values_M
        if observation.losses_M is not None:
            losses_M = np.where(np.isnan(observation.losses_M), losses_M, observation.losses_M)
        penalty = self.options.penalty * np.abs(self._coefficients(observation.point)).mean()
        return float(losses_M.mean() + penalty) + observation.violation

    def _coefficients(self, point_D: Floats) -> Floats:
        """The experts' coefficients among the numbers, in their own units; 0 if none is searched."""
        is_coefficient_D = [dimension.parameter == "coefficient" for dimension in self.problem.dimensions]
        return self.problem.numbers(point_D)[is_coefficient_D] if any(is_coefficient_D) else np.zeros(1)

    def _make(self) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import nevergrad
        except ImportError as error:
            raise not_installed(self.name, "nevergrad", "lorahub", error) from error
        num_dimensions = self.problem.num_dimensions
        box = nevergrad.p.Array(
            init=self.problem.best_point, lower=np.zeros(num_dimensions), upper=np.ones(num_dimensions)
        )
        seed = np.random.SeedSequence(self.problem.seed).generate_state(1)[0]
        box.random_state = np.random.RandomState(seed)  # before anyone draws a seed from numpy's global generator
        return nevergrad.optimizers.NGOpt(parametrization=box, budget=self.options.budget, num_workers=1)

    def _next(self) -> Any:
        """Ask NGOpt, from a daemon thread.

        COBYLA runs in a thread of its own that nevergrad starts with the first ask, and that would keep a process that
        fails from ending: a thread is a daemon if the one that starts it is.
        """
        asked: list[Any] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            starter = threading.Thread(target=lambda: asked.append(self._optimizer.ask()), daemon=True)
            starter.start()
            starter.join()
        return asked[0]
