"""What a comparison says: curves over cost, who wins how often, and by how much, with intervals over seeds.

Everything is of the test values of the front (or of the trial) that was chosen on search values.

Shape letters: S seeds, G costs, M objectives, F points of the true front.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.search.trace import Trace
from evomerge.front.improvement import improvement_over, most_gaining
from evomerge.front.pareto import hypervolume
from evomerge.records import Floats

ReferenceName = Literal["zero", "base", "worst"]
COSTS = (12, 20, 40, 60, 100, 200)
FINE = 200  # costs of a curve
MANY_OBJECTIVES = 6  # from here on a hypervolume takes up to seconds, and is taken at COSTS alone
LEVEL = 0.9  # of intervals


@dataclass(frozen=True)
class Difference:
    """A searcher's mean gain over another one on the same seeds, and half its interval's width, as shares of it."""

    other: str
    gain: float
    half_width: float


@dataclass(frozen=True)
class Comparison:
    """All searchers on one problem; the mappings are by searcher.

    costs_G are full-evaluation equivalents; volumes hypervolumes (S, G); hindsight the same of as many models as the
    focus has by then, if they were chosen from all searchers' trials; means the best mean of objectives (S, G);
    distances the mean distance from the true front's points to the nearest found one (IGD), (S, G), empty where that
    front is not known, and ceiling its hypervolume; propose_s and propose_share seconds of proposing a candidate, and
    its share of proposing and scoring.
    """

    problem: str
    num_dimensions: int
    num_objectives: int
    reference: ReferenceName
    costs_G: Floats
    volumes: Mapping[str, Floats]
    hindsight: Floats
    means: Mapping[str, Floats]
    distances: Mapping[str, Floats]
    ceiling: float | None
    propose_s: Mapping[str, float]
    propose_share: Mapping[str, float]

    @property
    def searchers(self) -> list[str]:
        """In the order of the command."""
        return list(self.volumes)

    @property
    def num_seeds(self) -> int:
        """S."""
        return len(next(iter(self.volumes.values())))

    @property
    def focus(self) -> str:
        """The searcher that the others are compared with: auto, else the first."""
        return _focus(self.volumes)

    def place(self, cost: float) -> int:
        """Return the place of a cost in costs_G."""
        return int(np.flatnonzero(self.costs_G == cost)[0])

    @property
    def table_costs(self) -> list[float]:
        """The costs that tables show: those of COSTS that are within the budget, and the budget."""
        budget = self.costs_G[-1]
        return [*(float(cost) for cost in COSTS if cost < budget), float(budget)]

    def wins(self, searcher: str, other: str) -> float:
        """Return the share of seeds in which a searcher ends above another one; equal is half a win."""
        gain_S = self.volumes[searcher][:, -1] - self.volumes[other][:, -1]
        return float(np.mean((gain_S > 0) + 0.5 * (gain_S == 0)))

    def best_other(self, searcher: str, place: int = -1) -> str:
        """Return the other searcher with the largest median hypervolume at a cost."""
        others = [name for name in self.searchers if name != searcher]
        return max(others, key=lambda name: float(np.median(self.volumes[name][:, place])))

    def difference(self, searcher: str, cost: float) -> Difference:
        """Return the paired difference to the best other searcher: Student's t over seeds, NaN wide with one seed."""
        from scipy.stats import t

        place = self.place(cost)
        other = self.best_other(searcher, place)
        gain_S = self.volumes[searcher][:, place] - self.volumes[other][:, place]
        level = float(np.mean(self.volumes[other][:, place])) or np.nan
        stderr = gain_S.std(ddof=1) / self.num_seeds**0.5 if self.num_seeds > 1 else np.nan
        half_width = float(t.ppf((1 + LEVEL) / 2, self.num_seeds - 1) * stderr) if self.num_seeds > 1 else np.nan
        return Difference(other, float(gain_S.mean()) / level, half_width / level)

    def costs_to_reach(self, searcher: str) -> Floats:
        """Return per seed at which cost a searcher is first where the best other one ends, inf if never, (S,)."""
        level_S = self.volumes[self.best_other(searcher)][:, -1]
        is_there_SG = self.volumes[searcher] >= level_S[:, None]
        return np.where(is_there_SG.any(axis=1), self.costs_G[is_there_SG.argmax(axis=1)], np.inf)


def compare(
    problem: str,
    num_dimensions: int,
    traces: Mapping[str, Sequence[Trace]],
    reference: ReferenceName,
    budget: int,
    front_FM: Floats | None,
) -> Comparison:
    """Draw the curves; traces are by searcher, each in the order of the seeds."""
    num_objectives = len(traces[next(iter(traces))][0].references["base"])
    steps = COSTS if num_objectives >= MANY_OBJECTIVES else np.linspace(1, budget, min(budget, FINE)).round()
    costs_G = np.array(sorted({float(cost) for cost in (*steps, *COSTS) if cost < budget} | {float(budget)}))
    all_steps = {name: [step for trace in runs for step in trace.steps] for name, runs in traces.items()}
    propose_s = {name: [step.propose_s for step in steps] for name, steps in all_steps.items()}
    score_s = {name: [step.score_s for step in steps] for name, steps in all_steps.items()}
    seeds = list(zip(traces[_focus(traces)], zip(*traces.values(), strict=False), strict=False))

    return Comparison(
        problem=problem,
        num_dimensions=num_dimensions,
        num_objectives=num_objectives,
        reference=reference,
        costs_G=costs_G,
        volumes={
            name: np.array([_curve(trace, costs_G, _volume(reference_point(trace, reference))) for trace in runs])
            for name, runs in traces.items()
        },
        hindsight=np.array([_hindsight(one, all_, costs_G, reference_point(one, reference)) for one, all_ in seeds]),
        means={name: np.array([_curve(trace, costs_G, _best_mean) for trace in runs]) for name, runs in traces.items()},
        distances={}
        if front_FM is None
        else {
            name: np.array([_curve(trace, costs_G, _distance(front_FM)) for trace in runs])
            for name, runs in traces.items()
        },
        ceiling=None
        if front_FM is None
        else hypervolume(front_FM, reference_point(traces[next(iter(traces))][0], reference)),
        propose_s={name: float(np.mean(seconds)) for name, seconds in propose_s.items()},
        propose_share={name: sum(propose_s[name]) / (sum(propose_s[name]) + sum(score_s[name])) for name in traces},
    )


def reference_point(trace: Trace, reference: ReferenceName) -> Floats:
    """Return where hypervolume begins, (M,): zero, the base's test values, or the worst of base and experts."""
    models = {name: np.array(values) for name, values in trace.references.items()}
    match reference:
        case "zero":
            return np.zeros(len(models["base"]))
        case "base":
            return models["base"]
        case "worst":
            return np.asarray(np.min(list(models.values()), axis=0))


def _focus(searchers: Collection[str]) -> str:
    return "auto" if "auto" in searchers else next(iter(searchers))


def _hindsight(one: Trace, traces: Sequence[Trace], costs_G: Floats, reference_M: Floats) -> Floats:
    """Return the hypervolume of as many models as one trace has at each cost, chosen from all traces' trials, (G,).

    Each is the one that adds most, on search values, to those before it.
    """
    able = [(trace, [n for n in trace.scored(costs_G[-1]) if trace.steps[n].test]) for trace in traces]
    searched_NM = np.concatenate([trace.searched(trials) for trace, trials in able])
    tested_NM = np.concatenate([trace.tested(trials) for trace, trials in able])
    counts = [len(one.scored(cost)) for cost in costs_G]
    front, alike_N = improvement_over(searched_NM[:0], reference_M), np.ones(len(searched_NM))
    order = most_gaining(front, searched_NM, searched_NM[None], alike_N, counts[-1])
    return np.array([hypervolume(tested_NM[order[:count]], reference_M) for count in counts])


Quality = Callable[[Trace, list[int]], float]
"""What a front (trials of a trace) is worth."""


def _curve(trace: Trace, costs_G: Floats, quality: Quality) -> Floats:
    """Return the quality of the front at each cost, (G,); before there is one, hypervolume is 0, the others are NaN."""
    known: dict[tuple[int, ...], float] = {}
    curve = []
    for cost in costs_G:
        front = trace.front(cost)
        key = tuple(front)
        if key not in known:
            known[key] = quality(trace, front)
        curve.append(known[key])
    return np.array(curve)


def _volume(reference_M: Floats) -> Quality:
    return lambda trace, front: hypervolume(trace.tested(front), reference_M) if front else 0.0


def _distance(front_FM: Floats) -> Quality:
    def distance(trace: Trace, front: list[int]) -> float:
        if not front:
            return np.nan
        between_FN = np.linalg.norm(front_FM[:, None] - trace.tested(front), axis=2)
        return float(between_FN.min(axis=1).mean())

    return distance


def _best_mean(trace: Trace, front: list[int]) -> float:
    """The mean of the test values of the trial with the best mean of search values, which is always on the front."""
    if not front:
        return np.nan
    best = int(trace.searched(front).mean(axis=1).argmax())
    return float(trace.tested(front)[best].mean())
