"""How a step of a descent moves the coefficients, by the gradient of the loss in them.

A rule holds raw numbers, says which numbers of the space they stand for, and moves them. Numbers are in their own
units, not in [0, 1]; only those that the operator reads take part.
Shape letters: d numbers of the operator's own space, R raw numbers, M anchors, T tasks, H hulls, N numbers of a hull.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from evomerge.records import Descent, Floats, Items
from evomerge.space.choice import is_coefficient
from evomerge.space.space import Dimension

ADAM = (0.9, 0.999, 1e-8)


class Slope(Protocol):
    """What a rule may know of the loss that it descends, and of where."""

    @property
    def dimensions(self) -> Sequence[Dimension]:
        """The operator's own, (d,)."""

    @property
    def start_d(self) -> Floats:
        """The numbers where the descent begins."""

    @property
    def anchors(self) -> Floats:
        """The numbers of the anchors where the descent of a front begins."""

    @property
    def task_shares(self) -> Floats:
        """How much each task counts for each objective that steers."""

    def point(self, numbers_d: Floats) -> Floats:
        """Return the point of the whole space that has these numbers, and is the start in all others."""

    def task_gradients(self) -> Floats:
        """Return the gradient of each task's loss at the start, over all of its samples, (T, d)."""


class Rule:
    """Adam on the numbers themselves, projected into their box after every step; the base of the other rules.

    With weight decay it is AdamW, which decays coefficients, and nothing else, towards 0. clip: the gradient is scaled
    down to this length.
    Reference: Kingma and Ba 2015, arxiv.org/abs/1412.6980, algorithm 1; Loshchilov and Hutter 2019,
    arxiv.org/abs/1711.05101, algorithm 2.
    """

    def __init__(self, descent: Descent, slope: Slope) -> None:
        self.descent, self.slope = descent, slope
        self.low_d = np.array([dimension.low for dimension in slope.dimensions])
        self.high_d = np.array([dimension.high for dimension in slope.dimensions])
        self.num_before = descent.steps_before
        self.raw_R = np.array(descent.raw) if descent.raw else self.begin()
        is_decaying = [is_coefficient(dimension.parameter) for dimension in slope.dimensions]
        self.decay_R = descent.weight_decay * np.resize(is_decaying, len(self.raw_R))
        self.moments = [
            np.array(moment) if moment else np.zeros(len(self.raw_R))
            for moment in (descent.first_moment, descent.second_moment)
        ]

    def begin(self) -> Floats:
        """Return the raw numbers of the start."""
        return self.slope.start_d.copy()

    @property
    def numbers_d(self) -> Floats:
        """The numbers that the raw ones stand for."""
        return self.raw_R

    def look(self, rng: np.random.Generator) -> tuple[Floats, Floats | None]:  # noqa: ARG002
        """Return the numbers whose gradient the next step follows, and how much each task's loss counts, if not 1."""
        return self.numbers_d, None

    def pull_back(self, gradient_d: Floats) -> Floats:
        """Return the gradient in the raw numbers, penalties included."""
        return gradient_d

    def project(self, raw_R: Floats) -> Floats:
        """Return the nearest raw numbers that are allowed."""
        return raw_R.clip(self.low_d, self.high_d)

    def step(self, gradient_d: Floats, step: int) -> None:
        """Take the descent's ``step``-th step, counted from 1."""
        gradient_R, descent = self.pull_back(gradient_d), self.descent
        if descent.clip is not None:
            gradient_R = gradient_R * min(1.0, descent.clip / max(float(np.linalg.norm(gradient_R)), 1e-12))
        first, second, epsilon = ADAM
        self.moments[0] = first * self.moments[0] + (1 - first) * gradient_R
        self.moments[1] = second * self.moments[1] + (1 - second) * gradient_R**2
        number = self.num_before + step
        mean_R, square_R = self.moments[0] / (1 - first**number), self.moments[1] / (1 - second**number)
        step_R = mean_R / (np.sqrt(square_R) + epsilon) + self.decay_R * self.raw_R
        self.raw_R = self.project(self.raw_R - rate(descent, step) * step_R)

    def state(self) -> dict[str, tuple[float, ...]]:
        """Return what the next descent goes on with, by the names of ``Descent``."""
        return {"first_moment": tuple(self.moments[0].tolist()), "second_moment": tuple(self.moments[1].tolist())}


class Anchors(Rule):
    """Adam on the numbers of M points at once: of a whole front, one an objective that steers.

    Each step draws a preference from a flat Dirichlet distribution, and follows the gradient of the loss that it
    weighs at the mean of the anchors that it weighs: the sampling loop of PaMaL (Dimitriadis et al. 2023,
    arxiv.org/abs/2210.09759), over coefficients instead of weights. The descent ends at the anchors' plain mean.
    """

    def begin(self) -> Floats:
        """The raw numbers are the anchors', end to end."""
        return self.slope.anchors.ravel()

    @property
    def anchors(self) -> Floats:
        """The anchors."""
        return self.raw_R.reshape(self.slope.anchors.shape)

    @property
    def numbers_d(self) -> Floats:
        """Those of equal preferences."""
        mean_d: Floats = self.anchors.mean(axis=0)
        return mean_d

    def look(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Draw a preference."""
        self._preference_M = rng.dirichlet(np.ones(len(self.anchors)))
        return self._preference_M @ self.anchors, self._preference_M @ self.slope.task_shares

    def pull_back(self, gradient_d: Floats) -> Floats:
        """Each anchor's by its part in the preference."""
        return np.outer(self._preference_M, gradient_d).ravel()

    def project(self, raw_R: Floats) -> Floats:
        """Into the box, one by one."""
        anchors_Md = raw_R.reshape(self.slope.anchors.shape)
        return anchors_Md.clip(self.low_d, self.high_d).ravel()

    def state(self) -> dict[str, tuple[float, ...]]:
        """Adam's moments, and the anchors as points."""
        points = [x for anchor_d in self.anchors for x in self.slope.point(anchor_d).tolist()]
        return {**super().state(), "anchors": tuple(points)}


class FrankWolfe(Rule):
    """Steps within the convex hull of the experts, one hull a group: towards the vertex that descends most steeply.

    The vertices of a group are its experts, each at a coefficient of 1 with all others at 0, and where the space
    starts. The learning rate is a factor on Frank-Wolfe's own step of 2 / (t + 2), t counted from 0. A group in which
    no vertex descends is left alone.
    Reference: Jaggi 2013 (proceedings.mlr.press/v28/jaggi13), algorithm 1 over a product of hulls.
    """

    def step(self, gradient_d: Floats, step: int) -> None:
        """Go a part of the way to each group's vertex."""
        share = self.descent.learning_rate * 2 / (self.num_before + step + 1)
        starts_d = np.array([dimension.start for dimension in self.slope.dimensions])
        for hull_N in hulls(self.slope.dimensions):
            gradient_N, here_N = gradient_d[hull_N], self.raw_R[hull_N]
            vertices = np.vstack([np.eye(len(hull_N)), starts_d[hull_N]])
            way_N = vertices[(vertices @ gradient_N).argmin()] - here_N
            if gradient_N @ way_N < 0:
                self.raw_R[hull_N] = here_N + share * way_N

    def state(self) -> dict[str, tuple[float, ...]]:
        """The number of steps says it all."""
        return {}


class VertexWeights(Rule):
    """One step of Frank-Wolfe's towards several experts at once, whose weights Adam learns, in each group its own.

    Of each task in turn the expert is picked, among those not picked yet, whose task vector has the smallest inner
    product with the gradient of that task's loss. Numbers are c = (1 - sum_j w_j) c_0 + sum_j w_j e_j: the weights of a
    group stay in the simplex {w >= 0, sum w <= 1}, so that what was in the hull stays there.
    """

    def begin(self) -> Floats:
        """Pick the experts; the first step's weights begin at 0.3, the later ones' as good as 0."""
        dimensions = self.slope.dimensions
        self._hull_of_d = np.full(len(dimensions), -1)
        for number, hull_N in enumerate(hulls(dimensions)):
            self._hull_of_d[hull_N] = number
        experts = [dimension.expert if self._hull_of_d[d] >= 0 else None for d, dimension in enumerate(dimensions)]
        picked: list[str] = []
        for gradient_d in self.slope.task_gradients():
            left = dict.fromkeys(expert for expert in experts if expert is not None and expert not in picked)
            products = {
                expert: sum(gradient_d[d] for d, other in enumerate(experts) if other == expert) for expert in left
            }
            picked += [min(products, key=lambda expert: products[expert])] if products else []
        self._picked_R = np.array([d for d, expert in enumerate(experts) if expert in picked])
        first, self.num_before = self.num_before == 0, 0  # Adam begins anew
        return self.project(np.full(len(self._picked_R), 0.3 if first else 1e-8))

    @property
    def numbers_d(self) -> Floats:
        """Between where the step begins and the picked experts."""
        sums_H = self._sums(self._hull_of_d[self._picked_R], self.raw_R)
        numbers_d: Floats = self.slope.start_d * (1 - np.append(sums_H, 0.0)[self._hull_of_d])
        numbers_d[self._picked_R] += self.raw_R
        return numbers_d

    def pull_back(self, gradient_d: Floats) -> Floats:
        """dL/dw_j = <dL/dc, e_j - c_0>."""
        here_H = self._sums(self._hull_of_d, gradient_d * self.slope.start_d)
        difference_R: Floats = gradient_d[self._picked_R] - here_H[self._hull_of_d[self._picked_R]]
        return difference_R

    def project(self, raw_R: Floats) -> Floats:
        """Group by group."""
        projected_R, hull_of_R = raw_R.copy(), self._hull_of_d[self._picked_R]
        for hull in np.unique(hull_of_R):
            projected_R[hull_of_R == hull] = into_simplex(raw_R[hull_of_R == hull])
        return projected_R

    def state(self) -> dict[str, tuple[float, ...]]:
        """The next step picks anew."""
        return {}

    def _sums(self, hull_of: Items, numbers: Floats) -> Floats:
        """Sum what belongs to each hull, (H,)."""
        inside = hull_of >= 0
        return np.asarray(np.bincount(hull_of[inside], numbers[inside], minlength=self._hull_of_d.max() + 1), float)


class ScaledSoftmax(Rule):
    """SGD on c_k = s softmax(a)_k, of every group a_k and s its own, with a penalty on the mean of s^2 over groups.

    The raw numbers are the a of all numbers (d), unused where there is no coefficient, then the s (H). s stays where
    no coefficient can leave its range; other numbers than coefficients stay where they are.
    """

    def begin(self) -> Floats:
        """Equal shares that sum to 1: the average of the experts."""
        return np.append(np.zeros(len(self.slope.dimensions)), np.ones(len(hulls(self.slope.dimensions))))

    @property
    def numbers_d(self) -> Floats:
        """The coefficients of the raw numbers."""
        numbers_d = self.slope.start_d.copy()
        for hull_N, scale, shares_N in self._groups():
            numbers_d[hull_N] = scale * shares_N
        return numbers_d

    def pull_back(self, gradient_d: Floats) -> Floats:
        """dL/da_k = s p_k (g_k - <p, g>) and dL/ds = <p, g>, p the shares."""
        gradient_R, num = np.zeros(len(self.raw_R)), len(self.slope.dimensions)
        for number, (hull_N, scale, shares_N) in enumerate(self._groups()):
            mean = shares_N @ gradient_d[hull_N]
            gradient_R[hull_N] = scale * shares_N * (gradient_d[hull_N] - mean)
            gradient_R[num + number] = mean + 2 * self.descent.penalty * scale / (len(self.raw_R) - num)
        return gradient_R

    def project(self, raw_R: Floats) -> Floats:
        """Only s is bound."""
        num = len(self.slope.dimensions)
        highest = [self.high_d[hull_N].min() for hull_N in hulls(self.slope.dimensions)]
        return np.append(raw_R[:num], raw_R[num:].clip(0, highest))

    def step(self, gradient_d: Floats, step: int) -> None:
        """Plain SGD: a step against the gradient."""
        self.raw_R = self.project(self.raw_R - rate(self.descent, step) * self.pull_back(gradient_d))

    def state(self) -> dict[str, tuple[float, ...]]:
        """Coefficients do not tell a and s apart to the last bit."""
        return {"raw": tuple(self.raw_R.tolist())}

    def _groups(self) -> list[tuple[Items, float, Floats]]:
        """Return, of each group, which numbers are its coefficients, s, and the shares."""
        num, groups = len(self.slope.dimensions), []
        for number, hull_N in enumerate(hulls(self.slope.dimensions)):
            powers_N = np.exp(self.raw_R[hull_N] - self.raw_R[hull_N].max())
            groups.append((hull_N, float(self.raw_R[num + number]), powers_N / powers_N.sum()))
        return groups


class Sigmoid(Rule):
    """AdamW on r of c = low + (high - low) / (1 + exp(-r)), with a penalty on the mean of |c - start| over numbers.

    The start is the space's. The projection has nothing to do: every r is a number within its range.
    """

    def begin(self) -> Floats:
        """Those of the start; the ends of a range are out of reach."""
        share_d = (self.slope.start_d - self.low_d) / (self.high_d - self.low_d)
        raw_d: Floats = np.log(share_d / (1 - share_d))
        return raw_d

    @property
    def numbers_d(self) -> Floats:
        """Within their ranges."""
        numbers_d: Floats = self.low_d + (self.high_d - self.low_d) * self._shares_d()
        return numbers_d

    def pull_back(self, gradient_d: Floats) -> Floats:
        """dc/dr = (high - low) p (1 - p), p the share of the range."""
        starts_d = np.array([dimension.start for dimension in self.slope.dimensions])
        pull_d = self.descent.penalty * np.sign(self.numbers_d - starts_d) / len(starts_d)
        share_d = self._shares_d()
        pulled_d: Floats = (gradient_d + pull_d) * (self.high_d - self.low_d) * share_d * (1 - share_d)
        return pulled_d

    def project(self, raw_R: Floats) -> Floats:
        """Nothing to do."""
        return raw_R

    def state(self) -> dict[str, tuple[float, ...]]:
        """Near an end of the range, a coefficient no longer tells its r."""
        return {**super().state(), "raw": tuple(self.raw_R.tolist())}

    def _shares_d(self) -> Floats:
        shares_d: Floats = 1 / (1 + np.exp(-self.raw_R))
        return shares_d


RULES: dict[str, type[Rule]] = {
    "adam": Rule,
    "frank_wolfe": FrankWolfe,
    "vertex_weights": VertexWeights,
    "scaled_softmax": ScaledSoftmax,
    "sigmoid": Sigmoid,
}


def hulls(dimensions: Sequence[Dimension]) -> list[Items]:
    """Return which numbers are the experts' coefficients in each group, in the order of the groups."""
    of_group: dict[tuple[str, str | None], list[int]] = {}
    for d, dimension in enumerate(dimensions):
        if is_coefficient(dimension.parameter) and dimension.expert is not None:
            of_group.setdefault((dimension.parameter, dimension.group), []).append(d)
    return [np.array(members) for members in of_group.values()]


def into_simplex(weights_N: Floats) -> Floats:
    """Return the nearest weights of which none is negative and that sum to 1 at most.

    Reference: Duchi et al. 2008 (doi.org/10.1145/1390156.1390191), figure 1, for those that would sum to more.
    """
    excess = 0.0
    if weights_N.clip(0).sum() > 1:
        descending_N = np.sort(weights_N)[::-1]
        excess_N = (descending_N.cumsum() - 1) / np.arange(1, len(weights_N) + 1)
        excess = excess_N[np.flatnonzero(descending_N > excess_N)[-1]]
    nearest_N: Floats = (weights_N - excess).clip(0)
    return nearest_N


def rate(descent: Descent, step: int) -> float:
    """Return the learning rate of the ``step``-th step, counted from 1.

    The cosine restarts as in Loshchilov and Hutter 2017 (SGDR), arxiv.org/abs/1608.03983, eq. 5, with periods that
    double.
    """
    done = (step - 1) / descent.steps
    if descent.period is not None:
        at, length = descent.steps_before + step - 1, descent.period
        while at >= length:
            at, length = at - length, 2 * length
        done = (1 - np.cos(np.pi * at / length)) / 2
    return float(descent.learning_rate * (1 - (1 - descent.final_rate) * done))
