from itertools import product
from math import comb

import numpy as np
import pytest
from proposer_contract import NUM_DIMENSIONS, ProposerContract, box

from evomerge.proposers.nsga3 import Nsga3, Nsga3Options, num_divisions
from evomerge.proposers.proposer import Problem
from evomerge.records import Observation


def sphere(point_D: np.ndarray, num_objectives: int) -> np.ndarray:
    """DTLZ2 (Deb et al. 2002), negated: its front is the unit sphere's corner in which all losses are positive."""
    excess = 1.0 + ((point_D[num_objectives - 1 :] - 0.5) ** 2).sum()
    angles = point_D[: num_objectives - 1] * np.pi / 2
    losses_M = np.full(num_objectives, excess)
    for m in range(num_objectives):
        losses_M[m] *= np.cos(angles[: num_objectives - 1 - m]).prod()
        losses_M[m] *= np.sin(angles[num_objectives - 1 - m]) if m else 1.0
    return -losses_M


class TestNsga3(ProposerContract):
    proposer_type = Nsga3
    options = {"population": 8}

    def test_later_generations_are_nearer_to_the_front(self) -> None:
        points = np.array([candidate.point for candidate in self.run(self.make(), 100)])
        off_front = np.abs(points[:, 2])  # the front lies in the plane of the first two corners
        assert np.median(off_front[-30:]) < 0.5 * np.median(off_front[:30])

    def test_later_generations_are_rebuilt_too(self) -> None:
        """The survivors are drawn at random: a resumed run must draw the same."""
        whole = self.run(self.make(), 60)
        rebuilt = self.make()
        for index, candidate in enumerate(whole[:50]):
            rebuilt.recall(candidate)
            rebuilt.tell(self.observe(index, candidate))
        assert [self._next(rebuilt, 50 + i) for i in range(10)] == whole[50:]

    def test_several_pending_are_rebuilt_too(self) -> None:
        proposer, record = self.make(), []
        for batch in range(12):
            asked = proposer.ask(3, [])
            record.append(asked)
            for offset in (2, 0, 1):
                proposer.tell(self.observe(3 * batch + offset, asked[offset]))
        following = proposer.ask(3, [])
        rebuilt = self.make()
        for batch, asked in enumerate(record):
            for candidate in asked:
                rebuilt.recall(candidate)
            for offset in (2, 0, 1):
                rebuilt.tell(self.observe(3 * batch + offset, asked[offset]))
        assert rebuilt.ask(3, []) == following

    def _next(self, proposer: Nsga3, index: int):
        (candidate,) = proposer.ask(1, [])
        proposer.tell(self.observe(index, candidate))
        return candidate


def problem(num_objectives: int, num_dimensions: int = NUM_DIMENSIONS, seed: int = 0) -> Problem:
    return Problem(dimensions=box(0.5, num_dimensions), num_objectives=num_objectives, seed=(seed, 0))


@pytest.mark.parametrize(
    ("num_objectives", "divisions", "population"),
    [(3, 12, 92), (5, 6, 212), (3, 5, 21), (3, 4, 20), (2, 19, 20), (6, 1, 20), (30, 1, 20)],
)
def test_there_are_as_many_directions_as_the_population_fills(
    num_objectives: int, divisions: int, population: int
) -> None:
    """The first two rows are those of Deb and Jain 2014, table I: 91 and 210 directions."""
    assert num_divisions(num_objectives, population) == divisions
    assert divisions == 1 or comb(num_objectives + divisions - 1, divisions) <= population
    assert comb(num_objectives + divisions, divisions + 1) > population


@pytest.mark.parametrize("shape", ["plane", "sphere"])
@pytest.mark.parametrize("units", [(1.0, 1.0, 1.0), (1.0, 10.0, 0.1)])
def test_survivors_hold_one_reference_direction_each(shape: str, units: tuple[float, ...]) -> None:
    """Of a whole front, those that lie on the directions: 15 for a population of 15, whatever the objectives' units."""
    directions_HM = np.array([d for d in product(range(5), repeat=3) if sum(d) == 4]) / 4
    assert len(directions_HM) == 15
    rng = np.random.default_rng(0)
    front_NM = rng.permutation(np.concatenate([directions_HM, rng.dirichlet(np.ones(3), 60)]))
    losses_NM = front_NM if shape == "plane" else front_NM / np.linalg.norm(front_NM, axis=1, keepdims=True)
    history = tuple(
        Observation(index=n, point=np.full(NUM_DIMENSIONS, n / 100), values_M=7.0 - np.array(units) * losses_M)
        for n, losses_M in enumerate(losses_NM)
    )
    earlier = Problem(dimensions=box(0.5, NUM_DIMENSIONS), num_objectives=3, seed=(0, 0), history=history)
    proposer = Nsga3(earlier, Nsga3Options(population=15))
    parents = proposer.make_sampler(0).get_parent_population(proposer._study, 1)
    survivors = front_NM[[trial.number for trial in parents]]
    assert {tuple(row) for row in survivors.tolist()} == {tuple(row) for row in directions_HM.tolist()}


@pytest.mark.parametrize("num_objectives", [1, 3, 5])
def test_any_number_of_objectives_and_violations(num_objectives: int) -> None:
    """With x0 <= 0.3 asked for, later candidates keep it far more often than chance."""
    proposer = Nsga3(problem(num_objectives, 5), Nsga3Options(population=10))
    kept = []
    for index in range(80):
        (candidate,) = proposer.ask(1, [])
        point_D = np.array(candidate.point)
        kept.append(point_D[0] <= 0.3)
        values_M = sphere(point_D, num_objectives) + point_D[0]
        proposer.tell(Observation(index=index, point=point_D, values_M=values_M, margins_C=0.3 - point_D[:1]))
    assert np.mean(kept[-30:]) > 0.6
