"""Peers: other tools' searches ask for the points that the tools themselves would ask for."""

import json
import subprocess
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.search.peers import (
    ENVIRONMENT,
    POPULATION,
    PYMOO,
    MapPublished,
    MergekitEvolve,
    PymooNsga2,
    install_pymoo,
)
from evomerge.errors import CampaignError, EvoMergeError
from evomerge.proposers.proposer import Problem, Proposer
from evomerge.records import Floats, Observation, Options
from evomerge.space.choice import COEFFICIENT
from evomerge.space.space import Dimension

NUM_EXPERTS = 4
EXPERTS = [f"e{k}" for k in range(NUM_EXPERTS)]
HAS_PYMOO = pytest.mark.skipif(
    not (ENVIRONMENT / PYMOO).exists(),
    reason=f"{ENVIRONMENT} is not made; python -m benchmarks.search noisy --searchers pymoo_nsga2 makes it",
)
# pymoo's own loop, with the settings of Mergenetic's script
MINIMIZE = """
import json, sys
import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.optimize import minimize

class Two(Problem):
    def _evaluate(self, x, out):
        out["F"] = np.stack([((x - 0.2) ** 2).sum(axis=1), ((x - 0.7) ** 2).sum(axis=1)], axis=1)

seed = int(sys.argv[1])
algorithm = NSGA2(pop_size=25, eliminate_duplicates=True)
found = minimize(Two(n_var=4, n_obj=2, xl=0, xu=1), algorithm, ("n_iter", 4), seed=seed, verbose=False)
print(json.dumps(found.pop.get("X").tolist()))
"""


def problem(low: float = 0.0, high: float = 1.0, seed: int = 0) -> Problem:
    dimensions = tuple(
        Dimension(parameter=COEFFICIENT, expert=name, group="all", low=low, high=high, start=0.3) for name in EXPERTS
    )
    return Problem(dimensions=dimensions, num_objectives=2, seed=(seed,), experts=tuple(EXPERTS))


def values(point: Sequence[float]) -> Floats:
    x_D = np.array(point)
    return -np.array([((x_D - 0.2) ** 2).sum(), ((x_D - 0.7) ** 2).sum()])


def searched(proposer: Proposer, num_candidates: int, failed: Sequence[int] = ()) -> Floats:
    """Ask one by one and tell at once; return the points, fewer where nothing is left."""
    points: list[tuple[float, ...]] = []
    while len(points) < num_candidates and (asked := proposer.ask(1, [])):
        points.append(asked[0].point)
        known = None if len(points) - 1 in failed else values(asked[0].point)
        proposer.tell(Observation(index=len(points) - 1, point=np.array(asked[0].point), values_M=known))
    return np.array(points)


def test_mergekit_evolve_asks_what_fmin2_asks() -> None:
    """Genes of fmin2 itself, given the same normal numbers; where it would evaluate one beyond the box, its edge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cma
    generation, genes = 0, list[Floats]()

    def randn(*shape: int) -> Floats:
        return rngs[generation].standard_normal(shape)

    def evaluate(population: Sequence[Floats]) -> list[float]:
        nonlocal generation
        generation += 1
        genes.extend(population)
        return [-float(values(np.clip(np.abs(x), 0, 1)).mean()) for x in population]

    rngs = [problem().rng(index) for index in range(20)]
    options = {"maxfevals": 80, "randn": randn, "seed": np.nan, "verbose": -9}
    cma.fmin2(None, np.full(NUM_EXPERTS, 1 / NUM_EXPERTS), 1 / 6, options, parallel_objective=evaluate)
    theirs = np.array(genes[:80])
    assert theirs.min() < 0
    ours = searched(MergekitEvolve(problem(), Options()), 80)
    np.testing.assert_allclose(ours, np.clip(np.abs(theirs), 0, 1), atol=1e-12)


def test_mergekit_evolve_begins_at_one_kth_in_the_units_of_the_numbers() -> None:
    """The start of the space (0.3) is not mergekit's; a range that has negative numbers keeps them."""
    first = [searched(MergekitEvolve(problem(-1, 3, seed), Options()), 8) for seed in range(40)]
    numbers = -1 + 4 * np.concatenate(first)
    np.testing.assert_allclose(numbers.mean(axis=0), 1 / NUM_EXPERTS, atol=0.04)
    np.testing.assert_allclose(numbers.std(axis=0), 1 / 6, atol=0.02)
    assert numbers.min() < 0


def test_map_published_fits_once() -> None:
    """What its front is told changes nothing that it asks."""
    num_law = (NUM_EXPERTS + 1) * (NUM_EXPERTS + 2)
    points = searched(MapPublished(problem(), Options()), num_law + 10)
    np.testing.assert_array_equal(points[:NUM_EXPERTS], np.eye(NUM_EXPERTS))
    again = searched(MapPublished(problem(), Options()), num_law + 10, failed=range(num_law, num_law + 10))
    np.testing.assert_array_equal(points, again)
    assert np.linalg.norm(points[num_law:] - 0.45, axis=1).max() < np.linalg.norm(points[:num_law] - 0.45, axis=1).max()


@HAS_PYMOO
def test_pymoo_survives_the_points_that_its_own_loop_does() -> None:
    ours = searched(PymooNsga2(problem(), Options()), 4 * POPULATION)
    command = [ENVIRONMENT / "bin" / "python", "-I", "-c", MINIMIZE, str(problem().rng(0).integers(2**31))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = np.array(json.loads(done.stdout))
    assert theirs.shape == (POPULATION, NUM_EXPERTS)
    assert all((np.abs(ours - x_D).max(axis=1) == 0).any() for x_D in theirs)
    in_generation = [(np.abs(ours - x_D).max(axis=1) == 0).argmax() // POPULATION for x_D in theirs]
    assert max(in_generation) == 3


@HAS_PYMOO
def test_pymoo_outlasts_failures_and_says_so_where_it_has_ended() -> None:
    proposer = PymooNsga2(problem(), Options())
    points = searched(proposer, 2 * POPULATION + 1, failed=[0, *range(POPULATION, 2 * POPULATION)])
    assert len(points) == 2 * POPULATION + 1
    process = proposer._process
    process.kill()
    with pytest.raises(EvoMergeError, match="ended before it answered"):
        proposer._exchange([])
    del proposer
    assert process.poll() is not None


def test_an_environment_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "pymoo").touch()  # venv finds a file where it wants a folder
    with pytest.raises(CampaignError, match=rf"pymoo_nsga2 needs {PYMOO}.*cannot be made here \([^\n]+\); connect"):
        install_pymoo(tmp_path / "pymoo")
