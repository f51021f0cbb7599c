"""Numbers made of many models' scores: their errors, how often their intervals hold the truth, and their differences."""

from collections.abc import Callable

import numpy as np
import pytest

from evomerge.evidence import functions
from evomerge.evidence.compare import paired_difference
from evomerge.evidence.functions import Estimate, Resampled, resampled
from evomerge.evidence.intervals import student
from evomerge.evidence.scores import score_of
from evomerge.front.pareto import hypervolume
from evomerge.records import Floats, Measurement, Objective

OBJECTIVES = [
    Objective(name="up", task="a", metric="accuracy", direction="max"),
    Objective(name="down", task="b", metric="error", direction="min"),
]
NUM_ITEMS = 120
SOURCES = {"up": list(range(NUM_ITEMS)), "down": list(range(NUM_ITEMS))}  # both tasks show the same things
REFERENCE = np.array([0.5, -0.5])


def measured(items_KMN: Floats, sources: dict[str, list[int]] = SOURCES) -> list[Measurement]:
    """Return K models with these hits; of the second objective, which is minimized, they are misses."""
    return [
        Measurement(
            split="test",
            scores={
                "up": score_of(up_N.astype(np.float32), np.arange(len(up_N)), sources["up"]),
                "down": score_of(1 - down_N.astype(np.float32), np.arange(len(down_N)), sources["down"]),
            },
            cost=1.0,
            seconds={},
        )
        for up_N, down_N in items_KMN
    ]


def volume(values_KM: Floats) -> float:
    return hypervolume(values_KM, REFERENCE)


def of(items_KMN: Floats, function: Callable[[Floats], float] = volume) -> Resampled:
    return resampled(function, measured(items_KMN), OBJECTIVES, SOURCES)


class World:
    """Two fronts of 6 models, one a little better, on items that are as hard for all: draws of known chances."""

    def __init__(self) -> None:
        angles_K = np.linspace(0.15, np.pi / 2 - 0.15, 6)
        self.chances_KM = 0.5 + 0.35 * np.stack([np.cos(angles_K), np.sin(angles_K)], axis=1)
        self.rng = np.random.default_rng(0)

    def truth(self, shift: float) -> float:
        return volume(self.chances_KM - shift - np.array([0.0, 1.0]))

    def draw(self, *shifts: float) -> list[Floats]:
        chances = [self.chances_KM - shift for shift in shifts]
        shared_MN = self.rng.random((2, NUM_ITEMS)) < 0.7
        easy_MN = self.rng.random((2, NUM_ITEMS))  # where it is shared, one draw decides for all models
        own = [self.rng.random((*of.shape, NUM_ITEMS)) for of in chances]
        return [
            np.where(shared_MN, easy_MN, own_KMN) < of[:, :, None] for own_KMN, of in zip(own, chances, strict=True)
        ]


def test_intervals_hold_the_truth_and_errors_are_those_of_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over 100 draws of the items: a hypervolume, and how much it is above another front's, paired and not."""
    monkeypatch.setattr(functions, "NUM_RESAMPLES", 100)  # for speed: errors to 7 %
    world, (first, second) = World(), (0.0, 0.04)
    truths = {"one": world.truth(first), "paired": world.truth(first) - world.truth(second)}
    truths["apart"] = truths["paired"]
    found: dict[str, list[Estimate]] = {name: [] for name in truths}
    for _ in range(100):
        ours, theirs = map(of, world.draw(first, second))
        (others,) = map(of, world.draw(second))
        found["one"].append(ours.estimate)
        found["paired"].append(ours.less(theirs, is_paired=True))
        found["apart"].append(ours.less(others, is_paired=False))
    for name, truth in truths.items():
        ends = np.array([one.interval for one in found[name]])
        values = np.array([one.value for one in found[name]])
        errors = np.array([one.stderr for one in found[name]])
        assert np.mean((ends[:, 0] <= truth) & (truth <= ends[:, 1])) >= 0.88, name
        assert errors.mean() == pytest.approx(values.std(), rel=0.2), name
    spreads = {name: np.mean([one.stderr for one in found[name]]) for name in truths}
    assert spreads["paired"] < 0.8 * spreads["apart"]


def test_what_noise_adds_to_a_front_of_many_is_taken_off_the_interval() -> None:
    """Of 40 equal models with noise of their own, the best is called better than any is."""
    rng = np.random.default_rng(1)
    values, middles = [], []
    for _ in range(25):
        estimate = of(rng.random((40, 2, NUM_ITEMS)) < 0.7).estimate
        values.append(estimate.value)
        middles.append(np.mean(estimate.interval))
    truth = volume(np.array([[0.7, -0.3]]))
    assert np.mean(values) > 1.5 * truth
    assert abs(np.mean(middles) - truth) < 0.7 * abs(np.mean(values) - truth)


def test_of_a_mean_they_are_what_is_known_without_drawing() -> None:
    """Against the clustered error of a paired difference; three items a source, shared by both objectives."""
    rng = np.random.default_rng(2)
    sources = {"up": np.repeat(range(40), 3).tolist(), "down": np.repeat(range(20, 60), 3).tolist()}
    ours, theirs = measured(rng.random((2, 2, NUM_ITEMS)), sources)
    drawn = [resampled(lambda values_KM: float(values_KM.mean()), [one], OBJECTIVES, sources) for one in (ours, theirs)]
    found = drawn[0].less(drawn[1], is_paired=True)
    known = paired_difference(ours, theirs, OBJECTIVES, sources)
    assert found.value == pytest.approx(known.value)
    assert found.stderr == pytest.approx(known.stderr, rel=0.1)
    assert np.mean(found.interval) == pytest.approx(known.value, abs=0.2 * known.stderr)
    assert np.ptp(found.interval) == pytest.approx(2 * student(60, 0.95) * found.stderr)


def test_less_itself_it_is_nothing() -> None:
    drawn = of(World().draw(0.0)[0])
    none = drawn.less(drawn, is_paired=True)
    assert (none.value, none.stderr, none.interval, none.verdict) == (0.0, 0.0, (0.0, 0.0), "alike")
    apart = drawn.less(drawn, is_paired=False)
    assert apart.stderr == pytest.approx(np.sqrt(2) * drawn.estimate.stderr, rel=0.15)


def test_a_difference_beyond_noise_has_a_direction() -> None:
    high, low = map(of, World().draw(0.0, 0.2))
    assert high.less(low, is_paired=True).verdict == "better"
    assert low.less(high, is_paired=True).verdict == "worse"


def test_one_source_says_nothing() -> None:
    sources = {"up": [7] * NUM_ITEMS, "down": [7] * NUM_ITEMS}
    estimate = resampled(volume, measured(World().draw(0.0)[0], sources), OBJECTIVES, sources).estimate
    assert (estimate.stderr, estimate.interval) == (np.inf, (-np.inf, np.inf))
