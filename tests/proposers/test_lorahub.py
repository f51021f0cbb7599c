import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from proposer_contract import ProposerContract

from evomerge.errors import CampaignError
from evomerge.proposers.lorahub import LoraHub, LoraHubOptions
from evomerge.proposers.proposer import Problem
from evomerge.records import Observation
from evomerge.space.space import Dimension

needs_nevergrad = pytest.mark.skipif(find_spec("nevergrad") is None, reason="LoraHub needs the nevergrad package")


def signed(num_dimensions: int, parameter: str = "coefficient") -> tuple[Dimension, ...]:
    """The published range and start."""
    return tuple(
        Dimension(parameter=parameter, expert=f"expert{d}", group=None, low=-1.5, high=1.5, start=0.0)
        for d in range(num_dimensions)
    )


def problem(num_dimensions: int = 3, num_objectives: int = 1, seed: int = 0) -> Problem:
    return Problem(dimensions=signed(num_dimensions), num_objectives=num_objectives, seed=(seed, 0))


@needs_nevergrad
class TestLoraHub(ProposerContract):
    proposer_type = LoraHub

    def test_waits_for_its_result(self) -> None:
        proposer = self.make()
        (asked,) = proposer.ask(4, [])
        assert proposer.ask(1, []) == []
        proposer.tell(self.observe(0, asked))
        assert len(proposer.ask(4, [])) == 1

    @pytest.mark.parametrize(("pull", "expected"), [(0.4, 0.39), (-1.0, -0.99), (0.005, 0.0)])
    def test_finds_the_penalized_optimum(self, pull: float, expected: float) -> None:
        """The loss is mean (w - pull)^2: with 0.02 mean |w| added, its minimum is soft-thresholded by 0.01."""
        proposer = LoraHub(problem(2), LoraHubOptions(budget=90, penalty=0.02))
        best = (np.inf, None)
        for index in range(90):
            (candidate,) = proposer.ask(1, [])
            w_D = 3.0 * np.array(candidate.point) - 1.5
            loss = np.mean((w_D - pull) ** 2)
            observation = Observation(
                index=index,
                point=np.array(candidate.point),
                values_M=np.array([0.5]),  # says nothing: the loss steers
                losses_M=np.array([loss]),
            )
            best = min(best, (proposer.loss(observation), tuple(w_D)))
            proposer.tell(observation)
        np.testing.assert_allclose(best[1], [expected] * 2, atol=4e-3)

    def test_begins_at_zero(self) -> None:
        (first,) = LoraHub(problem(), LoraHubOptions()).ask(1, [])
        assert first.point == (0.5, 0.5, 0.5)

    def test_begins_at_the_best_of_earlier_stages(self) -> None:
        history = (Observation(index=0, point=np.array([0.8, 0.0, 1.0]), values_M=np.zeros(1)),)
        earlier = Problem(dimensions=signed(3), num_objectives=1, seed=(0, 0), history=history)
        (first,) = LoraHub(earlier, LoraHubOptions()).ask(1, [])
        np.testing.assert_allclose(first.point, [0.8, 0.0, 1.0], atol=0.01)

    def test_goes_on_beyond_its_budget(self) -> None:
        proposer = LoraHub(self.problem(), LoraHubOptions(budget=6))
        assert len(self.run(proposer, 20)) == 20

    def test_the_loss_is_the_mean_of_losses_with_the_penalty_in_the_coefficients_units(self) -> None:
        dimensions = (*signed(2), *signed(1, parameter="scale"))
        proposer = LoraHub(Problem(dimensions=dimensions, num_objectives=2, seed=(0, 0)), LoraHubOptions())
        told = {"index": 0, "point": np.array([0.0, 0.75, 1.0]), "values_M": np.array([0.25, 0.5])}
        penalty = 0.05 * (1.5 + 0.75) / 2  # coefficients -1.5 and 0.75; the scale is none
        nan = float("nan")
        for losses, mean in ((None, -0.375), ([2.0, 1.0], 1.5), ([nan, nan], -0.375), ([2.0, nan], 0.75)):
            losses_M = None if losses is None else np.array(losses)
            observation = Observation(**told, losses_M=losses_M, margins_C=np.array([0.1, -0.2]))
            assert proposer.loss(observation) == pytest.approx(mean + penalty + 0.2)
        assert proposer.loss(Observation(index=0, point=np.zeros(3), values_M=None)) is None

    def test_a_budget_beyond_what_works_is_named(self) -> None:
        with pytest.raises(CampaignError, match=r"lorahub.budget: expected at most 150.*found 151"):
            LoraHub(problem(3), LoraHubOptions(budget=151))

    @pytest.mark.parametrize(("num_dimensions", "budget"), [(1, 50), (3, 150), (40, 60)])
    def test_every_allowed_budget_works(self, num_dimensions: int, budget: int) -> None:
        proposer = LoraHub(problem(num_dimensions), LoraHubOptions(budget=budget))
        for index in range(min(budget, 60) + 5):
            (candidate,) = proposer.ask(1, [])
            point_D = np.array(candidate.point)
            assert ((point_D >= 0) & (point_D <= 1)).all()
            proposer.tell(Observation(index=index, point=point_D, values_M=-np.array([((point_D - 0.7) ** 2).sum()])))

    def test_a_process_that_fails_while_a_candidate_is_under_way_ends(self) -> None:
        program = (
            "from test_lorahub import *\n"
            "proposer = LoraHub(problem(), LoraHubOptions())\n"
            "proposer.ask(1, [])\n"
            "raise SystemExit(3)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], check=False, cwd=Path(__file__).parent, capture_output=True, timeout=60
        )
        assert done.returncode == 3, done.stderr.decode()


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nevergrad", None)
    with pytest.raises(CampaignError, match=r"lorahub needs the nevergrad package.*pip install 'evomerge\[lorahub\]'"):
        LoraHub(problem(), LoraHubOptions())
