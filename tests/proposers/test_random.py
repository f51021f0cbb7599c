import numpy as np
from proposer_contract import ProposerContract, box
from scipy.stats import kstest

from evomerge.proposers.proposer import Problem
from evomerge.proposers.random import Random
from evomerge.records import Options


class TestRandom(ProposerContract):
    proposer_type = Random

    def test_first_is_the_start_then_every_coordinate_is_uniform_and_independent(self) -> None:
        problem = Problem(dimensions=box(0.25, 3), num_objectives=1, seed=(0, 0))
        points_ND = np.array([candidate.point for candidate in Random(problem, Options()).ask(2001, [])])
        assert (points_ND[0] == 0.25).all()
        for coordinate_N in points_ND[1:].T:
            assert kstest(coordinate_N, "uniform").pvalue > 1e-3
        correlations = np.corrcoef(points_ND[1:].T)[np.triu_indices(3, 1)]
        assert np.abs(correlations).max() < 4 / np.sqrt(2000)  # four standard errors of independent coordinates

    def test_seeds_and_stages_differ(self) -> None:
        assert self.run(self.make(0), 5)[1:] != self.run(self.make(1), 5)[1:]

    def test_how_many_are_asked_at_once_does_not_matter(self) -> None:
        assert [candidate for _ in range(4) for candidate in self.make().ask(0, [])] == []
        one_by_one = self.make()
        assert self.make().ask(8, []) == [candidate for _ in range(8) for candidate in one_by_one.ask(1, [])]
