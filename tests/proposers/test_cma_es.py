import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from proposer_contract import ProposerContract, box
from pydantic import ValidationError

from evomerge.errors import CampaignError
from evomerge.proposers.cma_es import CmaEs, CmaEsOptions
from evomerge.proposers.proposer import Problem, rank
from evomerge.records import Observation

TARGET = 0.6
needs_cmaes = pytest.mark.skipif(find_spec("cmaes") is None, reason="learning-rate adaptation needs the cmaes package")


def problem(num_dimensions: int, num_objectives: int = 1, seed: int = 0) -> Problem:
    return Problem(dimensions=box(0.3, num_dimensions), num_objectives=num_objectives, seed=(seed, 0))


def search(proposer: CmaEs, num_asks: int, curvature_D: np.ndarray, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """Distances (N,), squared and weighted, of the candidates from TARGET; the noise is on what the search is told."""
    rng = np.random.default_rng(seed)
    losses = []
    for index in range(num_asks):
        (candidate,) = proposer.ask(1, [])
        point_D = np.array(candidate.point)
        losses.append(float(curvature_D @ (point_D - TARGET) ** 2))
        value = -losses[-1] - noise * rng.standard_normal()
        proposer.tell(Observation(index=index, point=point_D, values_M=np.array([value])))
    return np.array(losses)


class TestSeparable(ProposerContract):
    proposer_type = CmaEs
    options = {"separable": True}

    def test_it_learns_scales_faster_than_the_full_covariance(self) -> None:
        """On an ellipsoid along the axes (Ros and Hansen 2008): fewer parameters of the distribution to learn."""
        curvature_D = np.logspace(0, 4, 12)
        separable, full = (
            np.mean(
                [
                    np.log10(
                        search(CmaEs(problem(12, seed=seed), CmaEsOptions(separable=separable)), 700, curvature_D)[
                            -20:
                        ].min()
                    )
                    for seed in range(2)
                ]
            )
            for separable in (True, False)
        )
        assert separable < full - 0.5

    @pytest.mark.parametrize(
        ("num_dimensions", "option", "is_diagonal"),
        [(20, None, False), (101, None, True), (101, False, False), (20, True, True)],
    )
    def test_the_covariance_is_diagonal_where_it_should_be(
        self, num_dimensions: int, option: bool | None, is_diagonal: bool
    ) -> None:
        proposer = CmaEs(problem(num_dimensions), CmaEsOptions(separable=option, population=8))
        search(proposer, 8 * 25, np.ones(num_dimensions))  # pycma updates the full matrix only now and then
        covariance_DD = np.asarray(proposer.distribution.es.C)
        off_diagonal = covariance_DD - np.diag(np.diag(covariance_DD)) if covariance_DD.ndim == 2 else 0.0
        assert (not np.any(off_diagonal)) == is_diagonal


@needs_cmaes
class TestLearningRateAdaptation(ProposerContract):
    proposer_type = CmaEs
    options = {"lr_adapt": True, "population": 5}

    def test_under_noise_its_mean_comes_nearer_than_plain_cma_es(self) -> None:
        """Nomura et al. 2023: the sphere with noise far above the values that matter."""
        adapted, plain = [], []
        for seed in range(3):
            with_rates = CmaEs(problem(8, seed=seed), CmaEsOptions(lr_adapt=True, population=10))
            adapted.append(search(with_rates, 11 * 100, np.ones(8), 1.0, seed)[11 * 90 :: 11].mean())
            without = CmaEs(problem(8, seed=seed), CmaEsOptions(population=10))
            search(without, 11 * 100, np.ones(8), 1.0, seed)
            plain.append(((without.distribution.es.result.xfavorite - TARGET) ** 2).sum())
        assert np.mean(adapted) < 0.5 * np.mean(plain)

    def test_without_noise_it_finds_the_optimum(self) -> None:
        proposer = CmaEs(problem(4), CmaEsOptions(lr_adapt=True))
        assert search(proposer, 9 * 90, np.ones(4))[9 * 89] < 1e-3

    def test_it_starts_at_the_start(self) -> None:
        (first,) = CmaEs(problem(4), CmaEsOptions(lr_adapt=True)).ask(1, [])
        np.testing.assert_allclose(first.point, 0.3)

    def test_it_reaches_the_bounds(self) -> None:
        proposer = CmaEs(problem(3), CmaEsOptions(lr_adapt=True))
        for index in range(320):
            (candidate,) = proposer.ask(1, [])
            point_D = np.array(candidate.point)
            proposer.tell(Observation(index=index, point=point_D, values_M=np.array([-point_D.sum()])))
        assert proposer._points[0].max() < 0.02


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(CampaignError, match=r"lr_adapt needs the cmaes package.*pip install 'evomerge\[cmaes\]'"):
        CmaEs(problem(3), CmaEsOptions(lr_adapt=True))


def test_adapted_rates_need_a_full_covariance() -> None:
    with pytest.raises(ValidationError, match="lr_adapt needs a full covariance"):
        CmaEsOptions(lr_adapt=True, separable=True)


def test_the_penalty_is_on_the_mean_size_of_the_numbers_in_their_own_units() -> None:
    """Of -sum (x - t)^2 - p mean |x| each number is best at t - sign(t) p / 2D, or at 0 where that changes its sign."""
    dimensions = tuple(replace(dimension, low=-1.5, high=1.5) for dimension in box(0.3, 3))
    target_D = np.array([0.8, -0.6, 0.05])
    signed = Problem(dimensions=dimensions, num_objectives=1, seed=(0, 0))
    proposer = CmaEs(signed, CmaEsOptions(penalty=0.6))
    for index in range(7 * 60):
        (candidate,) = proposer.ask(1, [])
        point_D = np.array(candidate.point)
        value = -(((3 * point_D - 1.5) - target_D) ** 2).sum()
        proposer.tell(Observation(index=index, point=point_D, values_M=np.array([value])))
    np.testing.assert_allclose(signed.numbers(point_D), [0.7, -0.5, 0.0], atol=0.01)


class TestWeights:
    def observation(self, values: list[float] | None, margin: float = 1.0) -> Observation:
        values_M = None if values is None else np.array(values)
        return Observation(index=0, point=np.zeros(1), values_M=values_M, margins_C=np.array([margin]))

    def test_the_mean_is_weighted_and_violations_count(self) -> None:
        assert rank(self.observation([1.0, 3.0]), np.array([0.75, 0.25])) == 1.5
        assert rank(self.observation([1.0, 3.0], margin=-0.5), np.array([0.75, 0.25])) == 1.0
        assert rank(self.observation(None), np.array([0.75, 0.25])) == -np.inf
        assert rank(self.observation([1.0, 3.0])) == 2.0

    def test_the_search_goes_where_the_weight_is(self) -> None:
        """The weighted mean of squared distances to two corners is best at the corners' weighted mean."""
        proposer = CmaEs(problem(2, num_objectives=2), CmaEsOptions(weights=[3, 1]))
        for index in range(240):
            (candidate,) = proposer.ask(1, [])
            point_D = np.array(candidate.point)
            values_M = -((point_D - np.eye(2)) ** 2).sum(axis=1)
            proposer.tell(Observation(index=index, point=point_D, values_M=values_M))
        np.testing.assert_allclose(candidate.point, [0.75, 0.25], atol=0.05)

    @pytest.mark.parametrize("weights", [[1.0], [1.0, 1.0, 1.0], [0.0, 0.0]])
    def test_weights_that_do_not_fit_are_named(self, weights: list[float]) -> None:
        with pytest.raises(CampaignError, match="cma_es.weights: expected one number for each"):
            CmaEs(problem(2, num_objectives=2), CmaEsOptions(weights=weights))

    def test_negative_weights_are_named(self) -> None:
        with pytest.raises(ValidationError, match="greater than or equal to 0"):
            CmaEsOptions(weights=[1.0, -1.0])
