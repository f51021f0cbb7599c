"""What the proposers that wrap optuna's samplers share: an in-memory study that is replayed from the ledger.

Every ask makes a fresh sampler, seeded by the index of the ask, so that nothing but the study's trials matters; what a
sampler notes on a trial (NSGA-II's generation) travels in the candidate's memo. The first ask is the space's start.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Observation


class OptunaProposer:
    """A study, and the translation to and from it; a subclass makes the sampler."""

    needs_gradients: ClassVar[bool] = False
    num_startup: int
    """How many candidates come before the sampler has something to learn from; a subclass sets it."""

    def __init__(self, problem: Problem) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.problem = problem
        self._study = optuna.create_study(directions=["maximize"] * problem.num_objectives)
        self._box: dict[str, optuna.distributions.BaseDistribution] = {
            f"x{d}": optuna.distributions.FloatDistribution(0.0, 1.0) for d in range(problem.num_dimensions)
        }
        for observation in problem.history:
            if observation.values_M is not None:
                self._add_earlier(observation)
        self._num_earlier = len(self._study.trials)
        self._num_asked = 0

    def make_sampler(self, seed: int) -> Any:
        """Return optuna's sampler for one ask."""
        raise NotImplementedError

    def earlier_attributes(self) -> dict[str, Any]:
        """What a sampler wants noted on the results of earlier stages."""
        return {}

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Ask the sampler ``n`` times; optuna knows its own running trials."""
        return [self._ask_one() for _ in range(n)]

    def tell(self, observation: Observation) -> None:
        """Finish the trial of that ask, with its constraint violation if there is one."""
        from optuna.trial import Trial, TrialState

        number = self._num_earlier + observation.index
        if observation.values_M is None:
            self._study.tell(number, state=TrialState.FAIL)
            return
        Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id).set_constraint(
            "campaign", observation.violation
        )
        self._study.tell(number, observation.values_M.tolist())

    def recall(self, candidate: Candidate) -> None:
        """Put a candidate of before back into the study, as running."""
        from optuna.trial import TrialState

        self._add(candidate.point, TrialState.RUNNING, dict(candidate.memo))
        self._num_asked += 1

    def _ask_one(self) -> Candidate:
        index = self._num_asked
        self._num_asked += 1
        if index + self._num_earlier < self.num_startup:
            self._study.enqueue_trial(dict(zip(self._box, self.problem.startup_point(index), strict=True)))
        self._study.sampler = self.make_sampler(
            int(np.random.SeedSequence([*self.problem.seed, index]).generate_state(1)[0])
        )
        trial = self._study.ask(self._box)
        point = tuple(float(trial.params[name]) for name in self._box)
        return Candidate(point=point, memo=dict(self._study.get_trials(deepcopy=False)[trial.number].system_attrs))

    def _add_earlier(self, observation: Observation) -> None:
        from optuna.trial import TrialState

        assert observation.values_M is not None
        point = tuple(float(x) for x in observation.point)
        self._add(
            point, TrialState.COMPLETE, self.earlier_attributes(), observation.values_M.tolist(), observation.violation
        )

    def _add(
        self,
        point: tuple[float, ...],
        state: Any,
        attributes: dict[str, Any],
        values: list[float] | None = None,
        violation: float | None = None,
    ) -> None:
        from optuna.trial import create_trial

        self._study.add_trial(
            create_trial(
                state=state,
                values=values,
                params=dict(zip(self._box, point, strict=True)),
                distributions=self._box,
                system_attrs=attributes,
                constraints=None if violation is None else {"campaign": violation},
            )
        )
