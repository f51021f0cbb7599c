import sys
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
from proposer_contract import NUM_DIMENSIONS, ProposerContract, box

from evomerge.errors import CampaignError
from evomerge.proposers.catcma import CatCma, CatCmaOptions
from evomerge.proposers.cma_es import CmaEs, CmaEsOptions
from evomerge.proposers.proposer import Problem, Proposer
from evomerge.records import Observation
from evomerge.space.space import Dimension

needs_cmaes = pytest.mark.skipif(find_spec("cmaes") is None, reason="catcma needs the cmaes package")
NUM_BINARY = 16


def switches(number: int, start: float) -> tuple[Dimension, ...]:
    return tuple(replace(dimension, is_binary=True, parameter="on") for dimension in box(start, number))


def problem(seed: int = 0, history: tuple[Observation, ...] = ()) -> Problem:
    """Switches, of which the first four are on, and a scale for each."""
    dimensions = (*switches(4, 0.75), *switches(NUM_BINARY - 4, 0.25), *box(0.5, NUM_BINARY))
    return Problem(dimensions=dimensions, num_objectives=1, seed=(seed, 0), history=history)


def loss(point: np.ndarray, seed: int) -> float:
    """Switches that are wrong, alone and in pairs, and scales that are off where theirs is on."""
    rng = np.random.default_rng(seed)
    target, best = rng.random(NUM_BINARY) < 0.3, rng.uniform(0.2, 0.8, NUM_BINARY)
    pairs = 0.15 * rng.standard_normal((NUM_BINARY, NUM_BINARY))
    on = point[:NUM_BINARY] > 0.5
    wrong = (on != target).astype(float)
    return float(wrong.sum() + abs(wrong @ pairs @ wrong) + 2 * (on * (point[NUM_BINARY:] - best) ** 2).sum())


def best_of(proposer: Proposer, num_asks: int, seed: int) -> float:
    losses = []
    for index in range(num_asks):
        (candidate,) = proposer.ask(1, [])
        point_D = np.array(candidate.point)
        losses.append(loss(point_D, seed))
        proposer.tell(Observation(index=index, point=point_D, values_M=np.array([-losses[-1]])))
    return min(losses)


@needs_cmaes
class TestContinuous(ProposerContract):
    proposer_type = CatCma
    options = {"population": 5}

    def test_without_switches_it_finds_the_optimum(self) -> None:
        proposer = CatCma(Problem(dimensions=box(0.3, 3), num_objectives=1, seed=(0, 0)), CatCmaOptions())
        for index in range(500):
            (candidate,) = proposer.ask(1, [])
            point_D = np.array(candidate.point)
            proposer.tell(Observation(index=index, point=point_D, values_M=np.array([-((point_D - 0.6) ** 2).sum()])))
        np.testing.assert_allclose(candidate.point, 0.6, atol=1e-2)


@needs_cmaes
class TestBinary(ProposerContract):
    proposer_type = CatCma
    options = {"population": 5}

    def problem(self, seed: int = 0, history: tuple[Observation, ...] = ()) -> Problem:
        dimensions = switches(NUM_DIMENSIONS, 0.25)
        return Problem(dimensions=dimensions, num_objectives=self.num_objectives, seed=(seed, 0), history=history)

    def test_coordinates_are_ends(self) -> None:
        found = {x for candidate in self.run(self.make(), self.num_asks) for x in candidate.point}
        assert found == {0.0, 1.0}


@needs_cmaes
class TestMixed(ProposerContract):
    proposer_type = CatCma
    options = {"population": 5}

    def problem(self, seed: int = 0, history: tuple[Observation, ...] = ()) -> Problem:
        dimensions = (*box(0.4, 1), *switches(1, 0.75), *box(0.6, 1))
        return Problem(dimensions=dimensions, num_objectives=self.num_objectives, seed=(seed, 0), history=history)

    def test_only_switches_are_at_the_ends(self) -> None:
        points_ND = np.array([candidate.point for candidate in self.run(self.make(), self.num_asks)])
        assert set(points_ND[:, 1]) == {0.0, 1.0}
        assert len(set(points_ND[:, 0])) > 20

    def test_first_candidates_have_two_switches_other_than_the_start(self) -> None:
        asked = CatCma(problem(), CatCmaOptions(population=200)).ask(200, [])
        on_NB = np.array([candidate.point[:NUM_BINARY] for candidate in asked])
        num_flips_N = (on_NB != (np.arange(NUM_BINARY) < 4)).sum(axis=1)
        assert num_flips_N.mean() == pytest.approx(2, abs=0.3)

    def test_or_than_the_best_of_an_earlier_stage(self) -> None:
        known = (Observation(index=0, point=np.full(2 * NUM_BINARY, 0.6), values_M=np.array([1.0])),)
        asked = CatCma(problem(history=known), CatCmaOptions(population=200)).ask(200, [])
        on_NB = np.array([candidate.point[:NUM_BINARY] for candidate in asked])
        assert (1 - on_NB).sum(axis=1).mean() == pytest.approx(2, abs=0.3)

    def test_switches_and_scales_are_found_in_less_time_than_by_a_gaussian(self) -> None:
        ours, plain = (
            [best_of(make(problem(seed)), 160, seed) for seed in range(4)]
            for make in (lambda p: CatCma(p, CatCmaOptions()), lambda p: CmaEs(p, CmaEsOptions()))
        )
        assert np.mean(ours) < 0.5 * np.mean(plain)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)
    with pytest.raises(CampaignError, match=r"catcma needs the cmaes package.*pip install 'evomerge\[cmaes\]'"):
        CatCma(problem(), CatCmaOptions())
