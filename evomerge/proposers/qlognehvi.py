"""qLogNEHVI through BoTorch: Gaussian processes, and the logarithm of the noisy expected hypervolume improvement.

    x = argmax log E[HV(front and f(x)) - HV(front)]
    f_m ~ GP of objective m, the front drawn from it too

With one objective it is the noisy expected improvement (qLogNEI). Standard errors of the values are the noise of the
processes; floors and ceilings are processes of their own, and an improvement counts by its probability to keep them.
Candidates that are under way count with what they may yet bring.
When to use: evaluations of minutes, noisy scores, no gradients, at most some 20 dimensions and four objectives. An ask
takes seconds; ``surrogate`` takes a fraction of one and is what to try first. It needs the extra ``botorch``.
References: Daulton, Balandat and Bakshy 2021, parallel Bayesian optimization of multiple noisy objectives,
arxiv.org/abs/2105.08195; Ament et al. 2023, unexpected improvements to expected improvement, arxiv.org/abs/2310.20708.

Shape letters: N results, D dimensions, M objectives, C floors and ceilings.
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from evomerge.proposers.proposer import Point, Problem, not_installed
from evomerge.records import Candidate, Floats, Observation, Options

MIN_NOISE = 1e-6  # variance beside that of the values: a standard error of 0 (every item right) is no certainty


class QLogNehviOptions(Options):
    """num_startup: candidates around the start before the first model.

    num_samples: draws of the posterior; num_raw: points at which the search of the acquisition begins, of which
    num_restarts are climbed from.
    """

    num_startup: int = Field(default=8, ge=2)
    num_samples: int = Field(default=128, ge=1)
    num_raw: int = Field(default=512, ge=1)
    num_restarts: int = Field(default=10, ge=1)


class QLogNehvi:
    """Bayesian optimization of a front; results of earlier stages are data like its own.

    Raises: CampaignError if BoTorch is missing.
    """

    name: ClassVar[str] = "qlognehvi"
    options_type: ClassVar[type[Options]] = QLogNehviOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: QLogNehviOptions) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                import botorch  # noqa: F401
        except ImportError as error:
            raise not_installed(self.name, "botorch", "botorch", error) from error
        self.problem, self.options = problem, options
        self._results = [observation for observation in problem.history if observation.values_M is not None]
        self._num_earlier = len(self._results)
        self._pending: dict[int, tuple[float, ...]] = {}
        self._num_asked = 0
        self._model: Any = None

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return ``n`` candidates, each chosen with those before it as under way."""
        candidates = []
        for _ in range(n):
            point = self.problem.startup_point(self._num_asked) if self._is_startup else self._improve()
            candidates.append(Candidate(point=point))
            self.recall(candidates[-1])
        return candidates

    def tell(self, observation: Observation) -> None:
        """Take a result; a failed candidate is forgotten."""
        del self._pending[observation.index]
        if observation.values_M is not None:
            self._results.append(observation)
            self._model = None

    def recall(self, candidate: Candidate) -> None:
        """The candidate is under way."""
        self._pending[self._num_asked] = candidate.point
        self._num_asked += 1

    @property
    def _is_startup(self) -> bool:
        return self._num_asked + self._num_earlier < self.options.num_startup or len(self._results) < 2

    def _improve(self) -> Point:
        """Return the point that improves most."""
        import torch
        from botorch.optim import optimize_acqf

        seed = int(self.problem.rng(self._num_asked).integers(2**31))
        box_2D = torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(1, self.problem.num_dimensions)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of restarts that found nothing; others did
            if self._model is None:
                torch.manual_seed(len(self._results))  # in a resumed run another ask may be the one that fits
                self._model = self._fit()
            torch.manual_seed(seed)
            points_1D, _ = optimize_acqf(
                self._acquisition(seed),
                bounds=box_2D,
                q=1,
                num_restarts=self.options.num_restarts,
                raw_samples=self.options.num_raw,
            )
        return tuple(np.clip(points_1D[0].detach().numpy(), 0.0, 1.0).tolist())

    def _acquisition(self, seed: int) -> Any:
        import torch
        from botorch.acquisition.logei import qLogNoisyExpectedImprovement
        from botorch.acquisition.multi_objective.logei import qLogNoisyExpectedHypervolumeImprovement
        from botorch.acquisition.multi_objective.objective import IdentityMCMultiOutputObjective
        from botorch.acquisition.objective import GenericMCObjective
        from botorch.sampling.normal import SobolQMCNormalSampler

        num_objectives = self.problem.num_objectives
        outcomes = range(num_objectives, num_objectives + len(self._results[0].margins_C))
        pending = torch.tensor(list(self._pending.values()), dtype=torch.float64)
        common: dict[str, Any] = {
            "model": self._model,
            "X_baseline": torch.tensor(np.array([result.point for result in self._results])),
            "sampler": SobolQMCNormalSampler(torch.Size([self.options.num_samples]), seed=seed),
            "constraints": [lambda z, c=c: -z[..., c] for c in outcomes] or None,
            "X_pending": pending if len(pending) else None,
            "prune_baseline": True,
        }
        if num_objectives == 1:
            first = GenericMCObjective(lambda z, X=None: z[..., 0])  # noqa: ARG005
            return qLogNoisyExpectedImprovement(**common, objective=first)
        objective = IdentityMCMultiOutputObjective(outcomes=list(range(num_objectives)), num_outcomes=outcomes.stop)
        reference_M = self.problem.reference_M
        reference_M = reference_point(self._results) if reference_M is None else reference_M
        return qLogNoisyExpectedHypervolumeImprovement(**common, objective=objective, ref_point=reference_M.tolist())

    def _fit(self) -> Any:
        """Return one process for each objective, with its noise, and one for each floor and ceiling."""
        import torch
        from botorch import fit_gpytorch_mll
        from botorch.models import ModelListGP, SingleTaskGP
        from gpytorch.mlls import SumMarginalLogLikelihood

        points_ND = torch.tensor(np.array([result.point for result in self._results]))
        values_NM = np.array([result.values_M for result in self._results])
        columns = [(column_N, self._noise(m, column_N)) for m, column_N in enumerate(values_NM.T)]
        columns += [(column_N, None) for column_N in np.array([result.margins_C for result in self._results]).T]
        model = ModelListGP(
            *(
                SingleTaskGP(
                    points_ND,
                    torch.tensor(column_N)[:, None],
                    None if noise_N is None else torch.tensor(noise_N)[:, None],
                )
                for column_N, noise_N in columns
            )
        )
        fit_gpytorch_mll(SumMarginalLogLikelihood(model.likelihood, model))
        return model

    def _noise(self, objective: int, values_N: Floats) -> Floats | None:
        """The variances (N,) of an objective's values; None, to be estimated, where one has no standard error."""
        stderr_N = np.array([np.nan if r.stderr_M is None else r.stderr_M[objective] for r in self._results])
        if not np.isfinite(stderr_N).all():
            return None
        noise_N: Floats = np.maximum(stderr_N**2, MIN_NOISE * max(values_N.var(), MIN_NOISE))
        return noise_N


def reference_point(results: Sequence[Observation]) -> Floats:
    """Return a point (M,) from which hypervolume counts, where none is given: a tenth of the values' range below them.

    Of all values, not of the front alone: seen from a point close to a small front, nothing beyond its ends counts.
    """
    values_NM = np.array([result.values_M for result in results])
    span_M = np.ptp(values_NM, axis=0)
    below_M: Floats = values_NM.min(axis=0) - 0.1 * np.where(span_M > 0, span_M, 1.0)
    return below_M
