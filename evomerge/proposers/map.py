"""MAP: sample the coefficients, fit a quadratic to every objective, evaluate the front that the fits predict, refit.

    f_m(c) = link(c' A_m c / 2 + b_m' c + e_m)
    link: sigmoid, softplus or none, by the metric's range

When to use: no gradients, one number an expert (``groups: model``), any number of objectives: where scores are nearly
quadratic in a few coefficients it was .8 % ahead of ``auto`` at most, from 40 evaluations on (measured on analytic
problems that are quadratic). Not for many numbers, of which the unknowns are the square (at most 256), and not where
fronts sag: on a concave one it found next to nothing (measured).
Reference: Li et al. 2024, MAP: low-compute model merging with amortized Pareto fronts via quadratic approximation,
arxiv.org/abs/2406.07529. The sampling law and the links are the paper's.
Departures:
- The law has (D+1)(D+2)/2 points, as many as a quadratic has unknowns, and 50 at most; ``num_startup`` can give the
  paper's (D+1)(D+2). As every result refits, the others are better spent on the front.
- A grid with two levels an axis (from eight experts on with the paper's number of points, from five on with ours)
  cannot tell a square from its root: where there would be fewer than three, Sobol points take its place.
- With several numbers an expert, the law says what they are on average, and a Sobol sequence moves each around that.
  The law itself, equal over the groups, has no full rank; a Sobol sequence alone has few points with one expert
  strong in all groups. What is no coefficient of an expert (a density) is spread over its range by Sobol points alone.
- The fit starts from ridge least squares, see ``surrogates/quadratic.py``.
- The predicted front is kept to the box, and near points that were evaluated (0.25, root mean square over the
  coordinates): a quadratic that is fitted inside a box and searched outside promises what it cannot know.
- It is found by evolution with a place for every direction of preference (decomposition, Zhang and Li 2007, IEEE TEC
  11(6)) instead of NSGA-III's reference directions: the same niches without sorting, in any number of objectives.
- Its members are evaluated one by one, those first that go farthest beyond all that was asked before (maximin
  improvement, Svenson and Santner 2016, CSDA 94), and every result refits. So nothing waits for a round to end.
- Floors and ceilings: their margins are fitted beside the values, and what is missed lowers all objectives.

Shape letters: N points, D dimensions, K experts, M objectives, C margins, W directions of preference, S members of the
predicted front, A points asked before.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import ClassVar

import numpy as np
from pydantic import Field

from evomerge.errors import CampaignError
from evomerge.front.pareto import non_dominated
from evomerge.proposers.proposer import Problem
from evomerge.records import Candidate, Floats, Observation, Options
from evomerge.surrogates.link import Identity, Link, Sigmoid, Softplus
from evomerge.surrogates.quadratic import fit

MAX_DIMENSIONS = 256
MAX_STARTUP = 50  # the number of unknowns grows beyond any budget
RIDGES = (1e-4, 1e-2, 1.0)
TRUST_RADIUS = 0.25  # root mean square over the coordinates
GROUP_SPREAD = 0.5  # width within which an expert's numbers vary around their mean
NUM_DIRECTIONS = 100
NUM_GENERATIONS = 25  # the paper's, but 2 D where that is more
PENALTY = 10.0  # by how much more than it is a missed floor or ceiling counts
LEAST_GAIN = 1e-3  # of the front's range
CLOUD = 0.1  # around the front, where nothing on it is promising


class MapOptions(Options):
    """num_startup: points of the sampling law before the first fit; by default one an unknown, 50 at most.

    isotropic: share of them that has all experts equal, half of it with noise.
    """

    num_startup: int | None = Field(default=None, ge=1)
    isotropic: float = Field(default=0.0, ge=0.0, le=1.0)


class SamplingLaw:
    """Where MAP looks first: an endless sequence of points, of which the first ``num_points`` are the paper's law.

    The experts alone, then points with all experts equal, then a random part of a regular grid without points that
    have one expert alone, coefficients of sum 1 or all equal; after that a Sobol sequence. A coefficient runs over
    [0, 1] as far as its range allows, or over its whole range if that lies outside.
    """

    def __init__(self, problem: Problem, num_points: int, isotropic: float) -> None:
        from scipy.stats.qmc import Sobol

        dimensions = problem.dimensions
        experts = problem.searched_experts
        self.num_experts = len(experts)
        self._expert_D = np.array([-1 if owner is None else experts.index(owner) for owner in problem.owners])
        low_D, high_D = np.array([d.low for d in dimensions]), np.array([d.high for d in dimensions])
        begin_D, end_D = np.maximum(low_D, 0.0), np.minimum(high_D, 1.0)
        is_whole_D = (self._expert_D < 0) | (begin_D >= end_D)
        begin_D, end_D = np.where(is_whole_D, low_D, begin_D), np.where(is_whole_D, high_D, end_D)
        self._begin_D, self._span_D = (begin_D - low_D) / (high_D - low_D), (end_D - begin_D) / (high_D - low_D)
        rng = problem.rng(0)
        self._levels_NK = law_levels(self.num_experts, num_points, isotropic, rng)
        self._sobol = Sobol(self.num_experts + len(dimensions), scramble=True, rng=rng)
        self._uniforms: list[Floats] = []

    def point(self, index: int) -> Floats:
        """Return the ``index``-th point, (D,) in [0, 1]."""
        levels_K = self._levels_NK[index] if index < len(self._levels_NK) else self._uniform(index)[: self.num_experts]
        return self.place(levels_K, index, spread=0.0 if index < self.num_experts else GROUP_SPREAD)

    def place(self, levels_K: Floats, index: int, spread: float = GROUP_SPREAD) -> Floats:
        """Return the point (D,) whose experts are at the levels (K,) in [0, 1], on average over their numbers."""
        uniform_D = self._uniform(index)[self.num_experts :]
        fraction_D = uniform_D.copy()
        for k, level in enumerate(levels_K):
            of_expert_D = self._expert_D == k
            width = spread if of_expert_D.sum() > 1 else 0.0
            fraction_D[of_expert_D] = level + width * (uniform_D[of_expert_D] - 0.5)
        point_D = self._begin_D + self._span_D * np.clip(fraction_D, 0.0, 1.0)
        return np.asarray(np.clip(point_D, 0.0, 1.0))  # rounding must not carry it out of the box

    def levels(self, points_ND: Floats) -> Floats:
        """Return the mean level of every expert, (N, K); the other way round from ``place``."""
        fraction_ND = (points_ND - self._begin_D) / self._span_D
        return np.stack([fraction_ND[:, self._expert_D == k].mean(axis=1) for k in range(self.num_experts)], axis=1)

    def _uniform(self, index: int) -> Floats:
        """Return the point of the Sobol sequence, (K + D,)."""
        while len(self._uniforms) <= index:
            self._uniforms.append(self._sobol.random(1)[0])
        return self._uniforms[index]


def law_levels(num_experts: int, num_points: int, isotropic: float, rng: np.random.Generator) -> Floats:
    """Return the levels of the law's first points, (N, K); fewer where Sobol points have to take the grid's place."""
    num_equal = round(isotropic * num_points)
    equal_NK = rng.random((num_equal, 1)).repeat(num_experts, axis=1)
    equal_NK[num_equal // 2 :] += 0.1 * rng.standard_normal(equal_NK[num_equal // 2 :].shape)
    levels_NK = np.vstack([np.eye(num_experts), np.clip(equal_NK, 0.0, 1.0)])[:num_points]
    num_left, num_levels = num_points - len(levels_NK), 1
    while num_experts and num_levels**num_experts < 2 * num_left:
        num_levels += 1
    if num_levels < 3:
        return levels_NK
    shuffled_N = rng.permutation(num_levels**num_experts)
    grid_NK = np.stack(np.unravel_index(shuffled_N, (num_levels,) * num_experts), axis=1) / (num_levels - 1)
    is_one_N = np.abs(grid_NK.sum(axis=1) - 1.0) < 1e-9  # an expert alone has the sum 1
    is_equal_N = (grid_NK == grid_NK[:, :1]).all(axis=1)
    return np.vstack([levels_NK, grid_NK[~(is_one_N | is_equal_N)][:num_left]])


class Map:
    """The sampling law, then the front that quadratic surrogates predict.

    Raises: CampaignError for more than 256 numbers: a quadratic of them would fill the memory.
    """

    name: ClassVar[str] = "map"
    options_type: ClassVar[type[Options]] = MapOptions
    needs_gradients: ClassVar[bool] = False

    def __init__(self, problem: Problem, options: MapOptions) -> None:
        if problem.num_dimensions > MAX_DIMENSIONS:
            raise CampaignError(
                f"search: {self.name} searches {MAX_DIMENSIONS} numbers at most, found {problem.num_dimensions}; "
                "use coarser groups, knots, or the proposer nsga2"
            )
        self.problem = problem
        self.num_startup = options.num_startup or min(num_unknowns(problem.num_dimensions), MAX_STARTUP)
        self.law = SamplingLaw(problem, self.num_startup, options.isotropic)
        self._asked = [observation.point for observation in problem.history]
        self._told = [observation for observation in problem.history if observation.values_M is not None]
        self._num_earlier, self._num_asked = len(self._told), 0
        self._merits: Merits | None = None
        self._front_SD: Floats | None = None

    def ask(self, n: int, pending: Sequence[Candidate]) -> list[Candidate]:  # noqa: ARG002
        """Return ``n`` candidates; those under way are known from their asks."""
        candidates = []
        for _ in range(n):
            candidates.append(Candidate(point=tuple(float(x) for x in self._next())))
            self.recall(candidates[-1])
        return candidates

    def tell(self, observation: Observation) -> None:
        """Take a result; the next ask refits."""
        if observation.values_M is not None:
            self._told.append(observation)
            self._merits = self._front_SD = None

    def recall(self, candidate: Candidate) -> None:
        """Where a candidate was asked, the front needs no second one."""
        self._asked.append(np.array(candidate.point))
        self._num_asked += 1

    def explore(self, index: int) -> Floats:
        """Return the ``index``-th of the points that are chosen to learn from, (D,)."""
        return self.law.point(index)

    @property
    def merits(self) -> "Merits":
        """The surrogates of all results that were told; there must be one."""
        if self._merits is None:
            self._merits = Merits(self._told)
        return self._merits

    def _next(self) -> Floats:
        index = self._num_asked
        # With many workers the startup is asked long before it is told; exploring goes on until half of it is.
        if index + self._num_earlier < self.num_startup or 2 * len(self._told) < self.num_startup:
            return self.explore(index)
        if self._front_SD is None:
            # Not the ask's own generator: in a resumed run another ask may be the one that needs the front.
            rng = np.random.default_rng([*self.problem.seed, len(self._told), 1])
            self._front_SD = predicted_front(self.merits, self.merits.points_ND, rng)
        gains_S = _gains(self.merits(self._front_SD), self.merits(np.array(self._asked)))
        if gains_S.max() > LEAST_GAIN:
            best_D: Floats = self._front_SD[gains_S.argmax()]
            return best_D
        rng = self.problem.rng(index + 1)
        member_D = self._front_SD[rng.integers(len(self._front_SD))]
        return np.asarray(np.clip(member_D + CLOUD * rng.standard_normal(len(member_D)), 0.0, 1.0))


class Merits:
    """The objectives less PENALTY times what floors and ceilings are missed by, as surrogates of results predict them.

    surrogate: of the values, then of the margins, at points_ND; sign_M: -1 where it is of a loss, minus the value.
    """

    def __init__(self, observations: Sequence[Observation]) -> None:
        self.points_ND = np.array([observation.point for observation in observations])
        values_NM = np.array([observation.values_M for observation in observations])
        margins_NC = np.array([observation.margins_C for observation in observations])
        unknown_M = np.full(values_NM.shape[1], np.nan)
        stderr_NM = np.array([unknown_M if o.stderr_M is None else o.stderr_M for o in observations])
        chosen = [_link(values_N, stderr_N) for values_N, stderr_N in zip(values_NM.T, stderr_NM.T, strict=True)]
        links = [*(link for link, _ in chosen), *(Identity() for _ in margins_NC.T)]
        self.sign_M = np.array([sign for _, sign in chosen])
        fitted_NM = np.hstack([self.sign_M * values_NM, margins_NC])
        is_determined = len(self.points_ND) >= num_unknowns(self.points_ND.shape[1])
        self.surrogate = fit(self.points_ND, fitted_NM, links, ridges=RIDGES, refine=is_determined)
        self._values_NM = values_NM

    def squared_errors(self) -> Floats:
        """Return by how much the surrogates miss each result when they are fitted to the others, (N,).

        It is squared, relative to the objective's variance, and the mean over the objectives.
        """
        num_objectives = len(self.sign_M)
        missed_NM = self.sign_M * self.surrogate.left_out_NM[:, :num_objectives] - self._values_NM
        variance_M = self._values_NM.var(axis=0)
        errors_N: Floats = (missed_NM**2 / np.where(variance_M > 0.0, variance_M, 1.0)).mean(axis=1)
        return errors_N

    def __call__(self, points_ND: Floats) -> Floats:
        """Return the merits (N, M) at points (N, D)."""
        predicted_NM = self.surrogate.values(points_ND)
        num_objectives = len(self.sign_M)
        missed_N = -predicted_NM[:, num_objectives:].clip(max=0.0).sum(axis=1)
        merits_NM: Floats = self.sign_M * predicted_NM[:, :num_objectives] - PENALTY * missed_N[:, None]
        return merits_NM


def num_unknowns(num_dimensions: int) -> int:
    """Return how many numbers a quadratic has."""
    return (num_dimensions + 1) * (num_dimensions + 2) // 2


def _link(values_N: Floats, stderr_N: Floats) -> tuple[Link, float]:
    """Return an objective's link and sign: a share lies in [0, 1], minus a loss is nowhere positive."""
    if ((values_N >= 0.0) & (values_N <= 1.0)).all():
        spread_N = values_N * (1.0 - values_N)
        known_N = (stderr_N > 0.0) & (spread_N > 0.0)
        if not known_N.any():
            return Sigmoid(), 1.0
        # The standard error of a share of n items is sqrt(y (1 - y) / n); half an item is the least that can be told.
        num_items = float(np.median(spread_N[known_N] / stderr_N[known_N] ** 2))
        return Sigmoid(np.clip(0.5 / num_items, Sigmoid().epsilon, 0.25)), 1.0
    if (values_N <= 0.0).all():
        return Softplus(), -1.0
    return Identity(), 1.0


def predicted_front(merits: Callable[[Floats], Floats], data_ND: Floats, rng: np.random.Generator) -> Floats:
    """Return points (S, D) of the front that ``merits`` (N, D) -> (N, M) predicts, in the box and near the data.

    Each direction of preference keeps the best point for it (augmented Tchebycheff, as in ``front/pick.py``); a child
    moves its parent along the difference of two others (differential evolution) and in a few coordinates.
    """
    merits_NM = merits(data_ND)
    num_objectives = merits_NM.shape[1]
    exponential_WM = rng.standard_exponential((max(NUM_DIRECTIONS - num_objectives, 0), num_objectives))
    weights_WM = np.vstack([np.eye(num_objectives), exponential_WM / exponential_WM.sum(axis=1, keepdims=True)])
    points_WD, merits_WM = _best(data_ND, merits_NM, weights_WM)
    num_dimensions = data_ND.shape[1]
    for _ in range(max(NUM_GENERATIONS, 2 * num_dimensions)):
        first_W, second_W = rng.integers(len(points_WD), size=(2, len(points_WD)))
        scale_W2 = 10.0 ** rng.uniform(-3.0, 0.0, size=(len(points_WD), 2))  # wide steps and fine ones
        moves_WD = rng.standard_normal(points_WD.shape) * (rng.random(points_WD.shape) < 2.0 / num_dimensions)
        children_WD = points_WD + scale_W2[:, :1] * (points_WD[first_W] - points_WD[second_W])
        children_WD = _trusted(children_WD + 0.5 * scale_W2[:, 1:] * moves_WD, data_ND)
        pool_ND, pool_NM = np.vstack([points_WD, children_WD]), np.vstack([merits_WM, merits(children_WD)])
        points_WD, merits_WM = _best(pool_ND, pool_NM, weights_WM)
    return points_WD[non_dominated(merits_WM)]


def _best(points_ND: Floats, merits_NM: Floats, weights_WM: Floats) -> tuple[Floats, Floats]:
    """Return for each direction the best of the points, and its merits, both scaled over the front."""
    front_NM = merits_NM[non_dominated(merits_NM)]
    ideal_M, range_M = front_NM.max(axis=0), np.ptp(front_NM, axis=0)
    short_NM = (ideal_M - merits_NM) / np.where(range_M > 0.0, range_M, 1.0)
    shortfall_WN = _largest(np.multiply, weights_WM, short_NM) + 0.05 * weights_WM @ short_NM.T
    best_W = shortfall_WN.argmin(axis=1)
    return points_ND[best_W], merits_NM[best_W]


def _trusted(points_ND: Floats, data_ND: Floats) -> Floats:
    """Return the points, drawn into the box and towards the nearest data as far as TRUST_RADIUS asks."""
    points_ND = np.clip(points_ND, 0.0, 1.0)
    squared_NN = (points_ND**2).sum(axis=1)[:, None] + (data_ND**2).sum(axis=1) - 2.0 * points_ND @ data_ND.T
    nearest_ND = data_ND[squared_NN.argmin(axis=1)]
    distance_N = np.sqrt(((points_ND - nearest_ND) ** 2).mean(axis=1))
    allowed_N = TRUST_RADIUS / np.maximum(distance_N, TRUST_RADIUS)
    trusted_ND: Floats = nearest_ND + allowed_N[:, None] * (points_ND - nearest_ND)
    return trusted_ND


def _gains(merits_SM: Floats, asked_AM: Floats) -> Floats:
    """Return the maximin improvement of each point: by how much the nearest of those asked before falls short, (S,)."""
    range_M = np.ptp(np.vstack([merits_SM, asked_AM]), axis=0)
    scale_M = np.where(range_M > 0.0, range_M, 1.0)
    gains_S: Floats = _largest(np.subtract, merits_SM / scale_M, asked_AM / scale_M).min(axis=1)
    return gains_S


def _largest(combine: np.ufunc, left_SM: Floats, right_NM: Floats) -> Floats:
    """Return max_m combine(left_sm, right_nm), (S, N): objective by objective, as numpy is slow on short axes."""
    columns = (combine.outer(left_S, right_N) for left_S, right_N in zip(left_SM.T, right_NM.T, strict=True))
    largest_SN: Floats = reduce(np.maximum, columns)
    return largest_SN
