"""Races: what is hopeless stops early, what is of use hardly ever, and what is finished is what it would have been."""

from dataclasses import replace

import numpy as np
import pytest
from simulated import ITEMS, OBJECTIVES, SOURCES, World

from evomerge.errors import CampaignError
from evomerge.fidelity.race import Race, RaceOptions
from evomerge.records import Measurement, Objective


def run(race: Race, whole: Measurement, finished: dict[str, Measurement]) -> tuple[str | None, float]:
    """Race a model; return why it was stopped, if it was, and the share of items that it took."""
    for done in range(1, len(race.rounds.added)):
        estimate = race.estimate(race.rounds.beginning(whole, OBJECTIVES, done), finished)
        reason = race.verdict(estimate, finished)
        if reason is not None:
            return reason, race.rounds.share(done)
    return None, 1.0


def make(
    world: World, objectives: list[Objective] = OBJECTIVES, **options: object
) -> tuple[Race, dict[str, Measurement]]:
    references = world.references()
    race = Race(RaceOptions(**options), objectives, ITEMS, SOURCES, references, seed=0)
    return race, {**references, "trial:0": world.model(1.0, 1.0)}


@pytest.mark.parametrize("estimator", ["paired", "irt"])
def test_the_hopeless_stop_early(estimator: str) -> None:
    world = World(1)
    race, finished = make(world, estimator=estimator)
    outcomes = [run(race, world.model(-1.5, -1.5), finished) for _ in range(20)]
    assert all(reason and "expected to add 0 of the hypervolume" in reason for reason, _ in outcomes)
    assert np.mean([share for _, share in outcomes]) < 0.25


@pytest.mark.parametrize("estimator", ["paired", "irt"])
def test_what_nothing_dominates_is_seldom_stopped(estimator: str) -> None:
    """Candidates as good as the best finished one: not dominated by its values on all items, in half of the cases."""
    world = World(2)
    race, finished = make(world, estimator=estimator, gain=0)
    mistakes, num = 0, 0
    for _ in range(100):
        model = world.model(1.0, 1.0)
        dominated = any(
            all(rival.scores[name].value > model.scores[name].value for name in model.scores)
            for rival in finished.values()
        )
        if dominated:
            continue
        num += 1
        mistakes += run(race, model, finished)[0] is not None
    assert num > 25
    assert mistakes / num <= 0.08


def test_the_first_trial_is_never_stopped() -> None:
    world = World(3)
    race, finished = make(world)
    del finished["trial:0"]
    assert run(race, world.model(-3, -3), finished)[0] is None


def test_a_floor_that_is_out_of_reach_stops() -> None:
    world = World(4)
    objectives = [replace(OBJECTIVES[0], floor=0.9), OBJECTIVES[1]]
    race, finished = make(world, objectives)
    reason, share = run(race, world.model(-1.5, 1.5), finished)
    assert reason is not None
    assert "a misses its floor of 0.9" in reason
    assert share < 1


def test_worse_than_the_base_adds_nothing_above_it() -> None:
    world = World(5)
    race, finished = make(world)
    assert run(race, world.model(-0.9, 2.5), finished)[0] is not None
    above_the_worst, _ = make(World(5), above="worst", gain=0)
    assert run(above_the_worst, world.model(-0.9, 2.5), finished)[0] is None


def test_a_reference_model_above_the_base_does_not_close_the_lower_ground() -> None:
    """Scalars of this world are better than the base in both; as long as no trial is, candidates may be worse in one."""
    world = World(5)
    race, finished = make(world)
    finished["trial:0"] = world.model(-1.0, 2.0)
    assert any(
        all(finished[name].scores[task].value > finished["base"].scores[task].value for task in ("a", "b"))
        for name in finished
        if name.startswith("scalar")
    )
    assert finished["trial:0"].scores["a"].value < finished["base"].scores["a"].value
    assert run(race, world.model(-0.9, 2.5), finished)[0] is None
    finished["trial:1"] = world.model(1.5, 1.5)
    assert run(race, world.model(-0.9, 2.5), finished)[0] is not None


def test_what_is_expected_to_add_little_is_stopped_where_more_is_asked_for() -> None:
    """The same candidates, a little better than a finished one in one objective and worse in the other."""
    world = World(9)
    races = {gain: make(world, gain=gain)[0] for gain in (0.0, 0.001, 0.05)}
    finished = make(world)[1] | {"trial:1": world.model(1.0, 1.0)}
    models = [world.model(0.4, 1.3) for _ in range(20)]
    num_stopped = {
        gain: sum(run(race, model, finished)[0] is not None for model in models) for gain, race in races.items()
    }
    assert num_stopped[0.0] <= num_stopped[0.001] < num_stopped[0.05]


def test_rounds_that_are_joined_are_the_whole() -> None:
    world = World(6)
    race, _ = make(world)
    whole = world.model(0.5, 0.5)
    so_far: Measurement | None = None
    for items in race.rounds.added:
        scores = {
            name: replace(score, items=score.items[items[name]], companion=score.items[items[name]] + 1)
            for name, score in whole.scores.items()
        }
        part = replace(whole, scores=scores, cost=sum(map(len, items.values())) / 400)
        assert race.next_items(so_far) is items
        so_far = race.joined(so_far, part) if so_far else part
    assert so_far is not None
    assert race.next_items(so_far) is None
    assert so_far.cost == pytest.approx(1.0)
    assert so_far.seconds == {"evaluate": pytest.approx(float(len(race.rounds.added)))}
    for name, score in whole.scores.items():
        joined = so_far.scores[name]
        assert (joined.items == score.items).all()
        assert joined.value == score.value
        assert joined.stderr == pytest.approx(score.stderr)
        assert joined.companion is not None
        assert (joined.companion == score.items + 1).all()


def test_estimates_are_better_than_the_first_items_and_their_errors_are_right() -> None:
    world = World(7)
    race, finished = make(world)
    finished |= {f"trial:{number}": world.model(*world.rng.normal(0.5, 0.5, 2)) for number in range(1, 40)}
    off, plain, ratios = [], [], []
    for _ in range(60):
        model = world.model(*world.rng.normal(0.5, 0.5, 2))
        partial = race.rounds.beginning(model, OBJECTIVES, 1)
        estimate = race.estimate(partial, finished)
        for name, score in model.scores.items():
            off.append(estimate.scores[name].value - score.value)
            plain.append(partial.scores[name].value - score.value)
            ratios.append(off[-1] / estimate.scores[name].stderr)
    assert np.sqrt(np.mean(np.square(off))) < np.sqrt(np.mean(np.square(plain)))
    assert 0.7 < np.sqrt(np.mean(np.square(ratios))) < 1.3


def test_irt_refuses_numbers_that_are_no_shares_of_a_hit() -> None:
    world = World(8)
    references = {
        name: replace(
            model, scores={task: replace(score, items=3 * score.items) for task, score in model.scores.items()}
        )
        for name, model in world.references().items()
    }
    with pytest.raises(
        CampaignError, match=r"irt needs scores in \[0, 1\] of every item, but a \(accuracy\) has 0 to 3"
    ):
        Race(RaceOptions(estimator="irt"), OBJECTIVES, ITEMS, SOURCES, references, seed=0)
