import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from proposer_contract import NUM_DIMENSIONS, ProposerContract, box, objectives

from evomerge.campaign.assemble import PROPOSERS
from evomerge.front.pareto import hypervolume
from evomerge.proposers.adamerging import AdaMerging, AdaMergingOptions
from evomerge.proposers.cma_es import CmaEs, CmaEsOptions
from evomerge.proposers.gp import Gp
from evomerge.proposers.gradient_front import GradientFront
from evomerge.proposers.nsga2 import Nsga2
from evomerge.proposers.proposer import Problem
from evomerge.proposers.random import Random
from evomerge.proposers.sobol import Sobol
from evomerge.proposers.surrogate import APART_RADIUS, Surrogate, SurrogateOptions
from evomerge.proposers.tpe import Tpe
from evomerge.records import Arrival, Candidate, Observation, Slopes


class TestSobol(ProposerContract):
    proposer_type = Sobol

    def test_first_is_the_start_then_the_box_is_filled_evenly(self) -> None:
        points = np.array([candidate.point for candidate in self.run(self.make(), 65)])
        assert (points[0] == 0.25).all()
        counts, _ = np.histogramdd(points[1:], bins=[4, 4, 4], range=[(0, 1)] * 3)
        assert (counts == 1).all()  # a net: 64 points, one in each of 4 x 4 x 4 cells

    def test_seeds_differ(self) -> None:
        assert self.run(self.make(0), 5)[1:] != self.run(self.make(1), 5)[1:]


class TestCmaEs(ProposerContract):
    proposer_type = CmaEs

    def test_finds_the_optimum_of_the_mean(self) -> None:
        candidates = self.run(self.make(), 300)
        mean_of_corners = np.eye(NUM_DIMENSIONS)[:2].mean(axis=0)
        assert np.abs(np.array(candidates[-1].point) - mean_of_corners).max() < 0.05

    def test_waits_for_its_generation(self) -> None:
        proposer = self.make()
        asked = proposer.ask(100, [])
        assert 4 <= len(asked) < 100
        assert proposer.ask(1, []) == []
        for index, candidate in enumerate(asked):
            proposer.tell(self.observe(index, candidate))
        assert len(proposer.ask(1, [])) == 1

    def test_never_leaves_the_box_in_many_dimensions(self) -> None:
        """pycma returned points outside its bounds in 64 dimensions."""
        problem = Problem(dimensions=box(0.02, 64), num_objectives=1, seed=(0, 0))
        proposer = CmaEs(problem, CmaEsOptions(sigma=0.5))
        for index in range(100):
            (candidate,) = proposer.ask(1, [])
            point = np.array(candidate.point)
            assert ((point >= 0) & (point <= 1)).all()
            proposer.tell(Observation(index=index, point=point, values_M=np.array([-point.sum()])))

    def test_starts_at_the_best_of_earlier_stages(self) -> None:
        best = np.array([0.8, 0.2, 0.6])
        history = (
            Observation(index=0, point=np.full(3, 0.5), values_M=np.array([0.0, 0.0])),
            Observation(index=1, point=best, values_M=np.array([1.0, 1.0])),
        )
        points = np.array([c.point for c in CmaEs(self.problem(history=history), CmaEsOptions(sigma=1e-3)).ask(4, [])])
        assert np.abs(points - best).max() < 0.02


class TestProblem:
    def observation(self, value: float | None, *point: float) -> Observation:
        values_M = None if value is None else np.array([value, value])
        return Observation(index=0, point=np.array(point), values_M=values_M)

    def problem(self, *history: Observation, best: Observation | None = None) -> Problem:
        return Problem(dimensions=box(0.25, 2), num_objectives=2, seed=(0, 0), history=history, best=best)

    def test_a_first_stage_starts_where_its_space_does(self) -> None:
        first = self.problem()
        assert first.start.tolist() == first.best_point.tolist() == [0.25, 0.25]
        assert not first.best_is_scored
        assert first.startup_point(0) == (0.25, 0.25)

    def test_a_best_recipe_beside_the_space_is_scored_first(self) -> None:
        """The space does not hold it, so that the point nearest to it has no scores of its own."""
        best = self.observation(0.9, 0.5, 0.6)
        later = self.problem(self.observation(0.2, 0.1, 0.1), best=best)
        assert later.start.tolist() == later.best_point.tolist() == [0.5, 0.6]
        assert not later.best_is_scored
        assert later.startup_point(0) == (0.5, 0.6)
        for proposer_type in (Sobol, Random, AdaMerging, Surrogate):
            (candidate,) = proposer_type(later, proposer_type.options_type()).ask(1, [])  # type: ignore[call-arg]
            assert candidate.point == (0.5, 0.6)

    def test_a_best_recipe_of_the_space_is_not_scored_again(self) -> None:
        best = self.observation(0.9, 0.5, 0.6)
        later = self.problem(self.observation(0.2, 0.1, 0.1), best, best=best)
        assert later.best_is_scored
        assert later.best_point.tolist() == [0.5, 0.6]
        for proposer_type in (Sobol, Random, Surrogate):
            (candidate,) = proposer_type(later, proposer_type.options_type()).ask(1, [])  # type: ignore[call-arg]
            assert candidate.point != (0.5, 0.6)

    def test_what_is_found_later_and_better_is_the_best_point(self) -> None:
        later = self.problem(self.observation(0.95, 0.1, 0.1), best=self.observation(0.9, 0.5, 0.6))
        assert later.best_point.tolist() == [0.1, 0.1]
        assert later.start.tolist() == [0.5, 0.6]


class TestTpe(ProposerContract):
    proposer_type = Tpe
    options = {"num_startup": 5}


class TestNsga2(ProposerContract):
    proposer_type = Nsga2
    options = {"population": 8}

    def test_later_generations_are_nearer_to_the_front(self) -> None:
        points = np.array([candidate.point for candidate in self.run(self.make(), 160)])
        off_front = np.abs(points[:, 2])  # the front lies in the plane of the first two corners
        assert np.median(off_front[-40:]) < 0.5 * np.median(off_front[:40])


class TestGp(ProposerContract):
    proposer_type = Gp
    options = {"num_startup": 4}
    num_asks = 8


class TestAdaMerging(ProposerContract):
    proposer_type = AdaMerging
    options = {"steps": 1}

    def test_each_leg_continues_the_one_before(self) -> None:
        proposer = AdaMerging(self.problem(), AdaMergingOptions(steps=2))
        (first,) = proposer.ask(1, [])
        assert proposer.ask(1, []) == []
        arrival = Arrival(point=(0.5,) * 3, first_moment=(1.0,) * 3, second_moment=(2.0,) * 3, losses=(3.0, 2.0))
        proposer.tell(Observation(index=0, point=np.full(3, 0.5), values_M=np.zeros(2), arrival=arrival))
        (second,) = proposer.ask(1, [])
        assert first.descent is not None
        assert second.descent is not None
        assert second.point == arrival.point
        assert second.descent.first_moment == arrival.first_moment
        assert second.descent.steps_before == 2
        assert second.descent.seed != first.descent.seed


class TestGradientFront(ProposerContract):
    proposer_type = GradientFront

    def test_waits_for_its_descent_then_shows_the_ends_of_the_front_first(self) -> None:
        proposer = self.make()
        (descent,) = proposer.ask(3, [])
        assert descent.descent is not None
        assert len(descent.descent.anchors) == 2 * NUM_DIMENSIONS
        assert proposer.ask(1, []) == []
        anchors = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.5))
        proposer.tell(
            Observation(
                index=0,
                point=np.full(3, 0.5),
                values_M=np.zeros(2),
                arrival=Arrival(
                    point=(0.5, 0.5, 0.25), first_moment=(), second_moment=(), losses=(), anchors=sum(anchors, ())
                ),
            )
        )
        points = [candidate.point for candidate in proposer.ask(12, [])]
        assert set(points[:2]) == set(anchors)
        shares = sorted(point[0] for point in points)
        assert all(point == pytest.approx((x, 1 - x, 0.5 * (1 - x))) for point in points for x in [point[0]])
        assert max(np.diff([*shares[: len(shares) // 2], 0.5, *shares[len(shares) // 2 :]])) < 0.2  # no gap between

    def test_a_descent_that_fails_is_tried_again_with_other_batches(self) -> None:
        proposer = self.make()
        (first,) = proposer.ask(1, [])
        proposer.tell(Observation(index=0, point=np.array(first.point), values_M=None))
        (second,) = proposer.ask(1, [])
        assert first.descent is not None
        assert second.descent is not None
        assert first.descent.seed != second.descent.seed


class TestSurrogate(ProposerContract):
    proposer_type = Surrogate
    options = {"num_startup": 5}

    def test_finds_the_front_with_a_tenth_of_what_nsga2_needs(self) -> None:
        def volume(candidates: list[Candidate]) -> float:
            values = np.array([objectives(np.array(candidate.point), 2) for candidate in candidates])
            return hypervolume(values, np.full(2, -2.0))

        few = np.mean([volume(self.run(self.make(seed), 30)) for seed in range(3)])
        many = np.mean([volume(self.run(Nsga2(self.problem(seed), Nsga2.options_type()), 300)) for seed in range(3)])
        assert few > many

    def test_pending_candidates_are_not_proposed_again(self) -> None:
        proposer = self.make()
        self.run(proposer, 12)
        points = np.array([candidate.point for candidate in proposer.ask(6, [])])
        distances = np.linalg.norm(points[:, None] - points, axis=2)[~np.eye(6, dtype=bool)]
        assert distances.min() > 0.01

    def test_floors_are_kept(self) -> None:
        """With x0 <= 0.3 asked for and x0 wanted, later candidates come close to the bound and mostly keep it."""
        shares = []
        for seed in range(6):
            proposer = Surrogate(Problem(dimensions=box(0.5, 3), num_objectives=1, seed=(seed, 0)), SurrogateOptions())
            told = []
            for index in range(40):
                (candidate,) = proposer.ask(1, [])
                point = np.array(candidate.point)
                told.append(point[0])
                proposer.tell(Observation(index=index, point=point, values_M=point[:1], margins_C=0.3 - point[:1]))
            shares.append(np.mean(np.array(told[-15:]) <= 0.3))
            assert max(x for x in told if x <= 0.3) > 0.25
        assert np.mean(shares) > 0.5

    def test_the_numbers_of_an_expert_begin_equal_and_leave_each_other_by_small_steps(self) -> None:
        """Two experts with four numbers each; the second number of each is wanted far above the others."""
        (first, second), groups = box(0.3, 2), ("a", "b", "c", "d")
        dimensions = tuple(replace(of_expert, group=group) for of_expert in (first, second) for group in groups)
        wanted = np.tile([0.2, 0.9, 0.2, 0.2], 2)
        proposer = Surrogate(Problem(dimensions=dimensions, num_objectives=1, seed=(2, 0)), SurrogateOptions())
        told: list[np.ndarray] = []
        for index in range(50):
            (candidate,) = proposer.ask(1, [])
            point = np.array(candidate.point)
            apart = [(p.reshape(2, 4) - p.reshape(2, 4).mean(axis=1, keepdims=True)).ravel() for p in (*told, point)]
            steps = [np.abs(apart[-1] - earlier).max() for earlier in apart[:-1]]
            assert np.ptp(point.reshape(2, 4), axis=1).max() == 0 if index < 10 else min(steps) < 2 * APART_RADIUS
            told.append(point)
            proposer.tell(Observation(index=index, point=point, values_M=-((point - wanted) ** 2).mean(keepdims=True)))
        away = [float(((point - wanted) ** 2).mean()) for point in told]
        assert min(away[:10]) > 0.09
        assert min(away) < 0.001

    def test_lengths_of_other_kernels_are_fitted_anew(self) -> None:
        """A run of an earlier version, which knew of one kernel less, is gone on with."""
        asked = self.run(self.make(), 8)
        older = [
            replace(candidate, memo=memo | {"logs": [[logs[:-1] for logs in objective] for objective in memo["logs"]]})
            if "logs" in (memo := candidate.memo)
            else candidate
            for candidate in asked
        ]
        assert older != asked
        proposer = self.make()
        for index, candidate in enumerate(older):
            proposer.recall(candidate)
            proposer.tell(self.observe(index, candidate))
        assert len(proposer.ask(3, [])) == 3

    def test_slopes_of_an_earlier_descent_are_made_use_of(self) -> None:
        """In 24 dimensions, five proposals after four candidates; with the gradients at eight points, and without."""
        centers_MD = np.stack([np.full(24, 0.3), np.tile([0.3, 0.7], 12)])

        def values(points: np.ndarray) -> np.ndarray:
            return np.asarray(-((points[..., None, :] - centers_MD) ** 2).mean(axis=-1))

        def volume(seed: int, *, has_slopes: bool) -> float:
            rng = np.random.default_rng(seed)
            way = rng.random((8, 24))
            slopes = Slopes(
                points=tuple(way.ravel()),
                losses=tuple(-values(way).ravel()),
                gradients=tuple((2 / 24 * (way[:, None] - centers_MD)).ravel()),
            )
            arrival = Arrival(
                point=(), first_moment=(), second_moment=(), losses=(), slopes=slopes if has_slopes else None
            )
            history = [
                Observation(index=i, point=point, values_M=values(point), losses_M=-values(point), arrival=arrival)
                for i, point in enumerate(rng.random((4, 24)))
            ]
            problem = Problem(dimensions=box(0.5, 24), num_objectives=2, seed=(seed, 0), history=tuple(history))
            proposer = Surrogate(problem, SurrogateOptions(num_startup=4))
            found = []
            for index in range(5):
                (candidate,) = proposer.ask(1, [])
                found.append(values(np.array(candidate.point)))
                proposer.tell(
                    Observation(index=index, point=np.array(candidate.point), values_M=found[-1], losses_M=-found[-1])
                )
            return hypervolume(np.array(found), np.full(2, -0.15))

        with_slopes, without = (np.mean([volume(seed, has_slopes=has) for seed in range(2)]) for has in (True, False))
        assert with_slopes > 1.5 * without

    def test_base_and_experts_tell_curvatures_apart_from_noise(self) -> None:
        """Fronts of two noisy bowls in four dimensions, by their true values; mean of five seeds, 25 candidates."""
        centers_MD = np.array([[0.75, 0.15, 0.15, 0.15], [0.15, 0.75, 0.15, 0.15]])

        def values(points: np.ndarray) -> np.ndarray:
            return np.asarray(1 - 1.5 * ((points[..., None, :] - centers_MD) ** 2).sum(axis=-1))

        def observation(index: int, point: np.ndarray, rng: np.random.Generator) -> Observation:
            noisy = values(point) + 0.03 * rng.standard_normal(2)
            return Observation(index=index, point=point, values_M=noisy, stderr_M=np.full(2, 0.03))

        def volume(seed: int, *, has_inputs: bool) -> float:
            rng = np.random.default_rng(seed)
            inputs = tuple(observation(k, point, rng) for k, point in enumerate([np.zeros(4), *np.eye(4)]))
            problem = Problem(
                dimensions=box(0.3, 4),
                num_objectives=2,
                seed=(seed, 0),
                reference_M=np.zeros(2),
                inputs=inputs if has_inputs else (),
            )
            proposer, found = Surrogate(problem, SurrogateOptions()), []
            for index in range(25):
                (candidate,) = proposer.ask(1, [])
                found.append(np.array(candidate.point))
                proposer.tell(observation(index, found[-1], rng))
            return hypervolume(values(np.array(found)), np.zeros(2))

        told, without = (np.mean([volume(seed, has_inputs=has) for seed in range(5)]) for has in (True, False))
        assert told > 1.005 * without

    @pytest.mark.parametrize("num_objectives", [1, 3, 6])
    def test_any_number_of_objectives_even_many(self, num_objectives: int) -> None:
        problem = Problem(dimensions=box(0.5, 8), num_objectives=num_objectives, seed=(0, 0))
        proposer = Surrogate(problem, SurrogateOptions(num_startup=6))
        for index in range(14):
            (candidate,) = proposer.ask(1, [])
            point = np.array(candidate.point)
            values = -((point - np.eye(8)[:num_objectives]) ** 2).sum(axis=1)
            proposer.tell(Observation(index=index, point=point, values_M=values))


class TestSurrogateWithoutCompanions(ProposerContract):
    proposer_type = Surrogate
    options = {"num_startup": 5}
    has_losses = False


def test_the_contract_covers_every_proposer() -> None:
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(path.stem)
    tested = {subclass.proposer_type for subclass in ProposerContract.__subclasses__()}
    assert tested == set(PROPOSERS.values())


@pytest.mark.parametrize("num_objectives", [1, 3])
@pytest.mark.parametrize("name", ["cma_es", "tpe", "nsga2", "sobol"])
def test_any_number_of_objectives(name: str, num_objectives: int) -> None:
    proposer_type = PROPOSERS[name]
    problem = Problem(dimensions=box(0.5, 3), num_objectives=num_objectives, seed=(0, 0))
    proposer = proposer_type(problem, proposer_type.options_type())
    for index in range(30):
        (candidate,) = proposer.ask(1, [])
        point = np.array(candidate.point)
        values = objectives(point, num_objectives)
        proposer.tell(Observation(index=index, point=point, values_M=values, margins_C=np.array([0.5 - point[0]])))


def test_tpe_and_nsga2_heed_violations() -> None:
    """With x0 <= 0.3 asked for, later candidates keep it far more often than chance."""
    for name in ("tpe", "nsga2"):
        proposer_type = PROPOSERS[name]
        proposer = proposer_type(
            Problem(dimensions=box(0.5, 3), num_objectives=1, seed=(1, 0)), proposer_type.options_type()
        )
        kept = []
        for index in range(120):
            (candidate,) = proposer.ask(1, [])
            point = np.array(candidate.point)
            kept.append(point[0] <= 0.3)
            margins = 0.3 - point[:1]
            proposer.tell(Observation(index=index, point=point, values_M=np.array([point[0]]), margins_C=margins))
        assert np.mean(kept[-40:]) > 0.6, name
