import numpy as np
import pytest
from proposer_contract import ProposerContract, box
from pydantic import ValidationError

from evomerge.errors import CampaignError
from evomerge.proposers.model_swarms import ModelSwarms, ModelSwarmsOptions
from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Observation
from evomerge.space.space import Dimension


def dimension(
    parameter: str, expert: str | None, group: str | None = None, low: float = 0.0, high: float = 1.0
) -> Dimension:
    return Dimension(parameter=parameter, expert=expert, group=group, low=low, high=high, start=0.5 * (low + high))


def problem(
    *dimensions: Dimension, seed: int = 0, history: tuple[Observation, ...] = (), num_objectives: int = 1
) -> Problem:
    return Problem(dimensions=dimensions, num_objectives=num_objectives, seed=(seed, 0), history=history)


def observed(index: int, candidate: Candidate, value: float | None) -> Observation:
    return Observation(
        index=index, point=np.array(candidate.point), values_M=None if value is None else np.array([value])
    )


def positions(proposer: ModelSwarms, values: list[float | None]) -> np.ndarray:
    """The candidates (N, D) of as many rounds of one candidate each, scored with ``values`` in turn."""
    points = []
    for index, value in enumerate(values):
        (candidate,) = proposer.ask(1, [])
        points.append(candidate.point)
        proposer.tell(observed(index, candidate, value))
    return np.array(points)


TWO = (dimension("coefficient", "a"), dimension("coefficient", "b"))


class TestModelSwarms(ProposerContract):
    proposer_type = ModelSwarms
    num_asks = 34  # eight particles: four rounds

    def test_starts_at_base_and_experts_then_between_two_of_them(self) -> None:
        points = np.array([candidate.point for candidate in self.run(self.make(), 8)])
        corners = np.concatenate([np.zeros((1, 3)), np.eye(3)])
        assert (points[:4] == corners).all()
        for point in points[4:]:
            gaps = [
                np.linalg.norm(point - a) + np.linalg.norm(point - b) - np.linalg.norm(a - b)
                for i, a in enumerate(corners)
                for b in corners[i + 1 :]
            ]
            assert min(gaps) < 1e-12  # on the straight line between two
        assert len({tuple(point) for point in points}) == 8

    def test_finds_the_optimum_of_the_mean(self) -> None:
        candidates = self.run(self.make(), 240)
        values = [self.observe(0, candidate).values_M.mean() for candidate in candidates]
        assert max(values) > -0.51  # at (1/2, 1/2, 0), half way between two experts: -0.5
        assert np.mean(values[-40:]) > np.mean(values[8:48])

    def test_a_particle_moves_as_soon_as_its_own_result_is_there(self) -> None:
        proposer = self.make()
        asked = proposer.ask(100, [])
        assert len(asked) == 8
        assert proposer.ask(1, []) == []
        proposer.tell(self.observe(5, asked[5]))
        (moved,) = proposer.ask(3, [])
        assert moved.point != asked[5].point
        assert proposer.ask(1, []) == []


def test_coordinates_follow_the_ranges_and_other_numbers_stay_at_their_start() -> None:
    dimensions = (
        dimension("coefficient", "a", "layer0", low=-1.0, high=1.5),
        dimension("coefficient", "a", "layer1", low=0.2, high=0.8),
        dimension("coefficient", "b", low=-0.5, high=1.5),
        dimension("density", "a", low=0.1, high=0.9),
        dimension("scale", None, low=0.5, high=1.5),
    )
    base, a, b = (c.point for c in ModelSwarms(problem(*dimensions), ModelSwarmsOptions(between=0)).ask(9, []))
    np.testing.assert_allclose(base, [0.4, 0.0, 0.25, 0.5, 0.5])  # 0 is below 0.2..0.8: clipped
    np.testing.assert_allclose(a, [0.8, 1.0, 0.25, 0.5, 0.5])  # 1 is above it
    np.testing.assert_allclose(b, [0.4, 0.0, 0.75, 0.5, 0.5])


def test_without_a_searched_coefficient_there_is_nowhere_to_start() -> None:
    with pytest.raises(CampaignError, match="no expert's coefficient is searched"):
        ModelSwarms(problem(dimension("density", "a"), dimension("scale", None)), ModelSwarmsOptions())


def test_each_move_is_the_equation_of_the_paper() -> None:
    """Algorithm 1 written out for one round: base, two experts, values 1, 0 and 2."""
    options = ModelSwarmsOptions(between=0, step=0.5, decay=0.8)
    points = positions(ModelSwarms(problem(*TWO), options), [1.0, 0.0, 2.0, 1.5, 0.0, 0.0, 0.0])
    base, worst, best = points[:3]
    velocity = {}
    for particle, (start, own) in enumerate([(base, base), (worst, worst), (best, best)]):
        draws = problem(*TWO).rng(3 + particle).random(4) * [0.4, 0.3, 0.3, 0.3]
        first = []
        for other in points[:3]:  # the first velocity leads to another particle: one of two
            if not (other == start).all():
                new = (
                    draws[0] * (other - start)
                    + draws[1] * (own - start)
                    + draws[2] * (best - start)
                    - draws[3] * (worst - start)
                ) / draws.sum()
                first.append(new)
        matches = [
            new for new in first if np.allclose(np.clip(start + 0.5 * new, 0, 1), points[3 + particle], atol=1e-12)
        ]
        assert matches
        velocity[particle] = matches[0]
    # The base's second move: its best is now its last position, worth 1.5; the step has shrunk to 0.4.
    draws = problem(*TWO).rng(6).random(4) * [0.4, 0.3, 0.3, 0.3]
    here = points[3]
    new = (draws[0] * velocity[0] + draws[2] * (best - here) - draws[3] * (worst - here)) / draws.sum()
    np.testing.assert_allclose(points[6], np.clip(here + 0.4 * new, 0, 1), atol=1e-12)


def test_the_step_shrinks_to_its_minimum_and_no_further() -> None:
    """With nothing but the pull of the best (at the base), each move goes the step's share of the way there."""
    options = ModelSwarmsOptions(
        between=0, inertia=0, cognitive=0, repel=0, social=1, step=0.5, decay=0.5, minimum_step=0.1, patience=100
    )
    points = positions(ModelSwarms(problem(*TWO), options), [1.0, *[0.0] * 17])
    way = points[1::3][:, 0]  # of expert a
    np.testing.assert_allclose(way[1:] / way[:-1], 1 - np.array([0.5, 0.25, 0.125, 0.1, 0.1]))


def test_a_particle_out_of_luck_returns_to_its_best_at_rest() -> None:
    """With inertia alone a particle flies on; after two results without a better one it is back, and stays."""
    options = ModelSwarmsOptions(
        between=0, inertia=1, cognitive=0, social=1e-12, repel=0, step=0.1, decay=1.0, patience=2
    )
    points = positions(ModelSwarms(problem(*TWO), options), [1.0, *[0.0] * 17])
    base = points[0::3]
    assert (np.linalg.norm(np.diff(base[:3], axis=0), axis=1) > 0.05).all()
    np.testing.assert_allclose(base[3:], 0.0, atol=1e-9)


def test_earlier_stages_say_what_is_best_and_worst() -> None:
    options = ModelSwarmsOptions(between=0, inertia=0, cognitive=0, repel=0, social=1)
    history = (
        Observation(index=0, point=np.array([0.3, 0.9]), values_M=np.array([5.0])),
        Observation(index=1, point=np.array([0.6, 0.6]), values_M=np.array([-5.0])),
        Observation(index=2, point=np.array([0.7, 0.7]), values_M=None),
    )
    points = positions(ModelSwarms(problem(*TWO, history=history), options), [0.0] * 6)
    np.testing.assert_allclose(points[3:], [[0.3, 0.9]] * 3)  # a step of 1 lands on the best
    repelled = ModelSwarmsOptions(between=0, inertia=0, cognitive=0, social=1e-12, repel=1)
    points = positions(ModelSwarms(problem(*TWO, history=history), repelled), [0.0] * 6)
    np.testing.assert_allclose(points[3:], np.clip(2 * points[:3] - 0.6, 0, 1), atol=1e-9)


def test_weights_turn_the_search_to_one_objective() -> None:
    ends = {}
    for weights in ([9.0, 1.0], [1.0, 9.0]):
        swarm = ModelSwarms(
            Problem(dimensions=box(0.3, 2), num_objectives=2, seed=(0, 0)), ModelSwarmsOptions(weights=weights)
        )
        best = (-np.inf, None)
        for index in range(120):
            (candidate,) = swarm.ask(1, [])
            point_D = np.array(candidate.point)
            values_M = -((point_D - np.eye(2)) ** 2).sum(axis=1)
            best = max(best, (float(values_M @ weights), tuple(candidate.point)))
            swarm.tell(Observation(index=index, point=point_D, values_M=values_M))
        ends[weights[0]] = best[1]
    np.testing.assert_allclose(ends[9.0], [0.9, 0.1], atol=0.12)
    np.testing.assert_allclose(ends[1.0], [0.1, 0.9], atol=0.12)


def test_weights_that_do_not_fit_are_named() -> None:
    with pytest.raises(CampaignError, match="model_swarms.weights: expected one number for each"):
        ModelSwarms(problem(*TWO), ModelSwarmsOptions(weights=[1.0, 2.0]))


def test_something_must_pull() -> None:
    with pytest.raises(ValidationError, match="social"):
        ModelSwarmsOptions(social=0.0)
