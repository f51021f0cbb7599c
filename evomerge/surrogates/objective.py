"""A surrogate of one objective: its smooth companion first, then what the metric adds to it.

The companion is a smooth function of the coefficients and tells much from few candidates; the metric that was asked
for mostly follows it. So the metric is a line in the companion's prediction plus a process of what is left, which has
the last word where candidates have told enough. Without a companion, one process models the metric itself. Where a
descent has told what the loss is like, by its gradients, the companion is that and a process of what it is off by.
Shape letters: N candidates told, D dimensions, P points asked about.
"""

from dataclasses import dataclass

import numpy as np

from evomerge.records import Floats
from evomerge.surrogates.gp import GaussianProcess, fit
from evomerge.surrogates.slopes import SlopeProcess

FLAT = 1e-9
FIRST_STEPS, LATER_STEPS = 40, 8  # of a fit

Logs = list[list[float]]
"""The logs of a surrogate's processes, as JSON."""


@dataclass(frozen=True, slots=True)
class ObjectiveSurrogate:
    """A line in the smooth companion, and ``rest``, what the metric adds.

    The companion is what a descent's ``slopes`` say of it, as far as there was one, and ``companion``, what that is off
    by. ``slope`` and ``offset`` make the line.
    """

    rest: GaussianProcess
    companion: GaussianProcess | None = None
    slopes: SlopeProcess | None = None
    slope: float = 0.0
    offset: float = 0.0

    def mean(self, points_PD: Floats) -> Floats:
        """Return the expected values, (P,)."""
        mean_P = self.offset + self.rest.mean(points_PD)
        if self.companion is not None:
            mean_P += self.slope * self.companion.mean(points_PD)
        if self.slopes is not None:
            mean_P += self.slope * self.slopes.predict(points_PD)
        return mean_P

    def predict(self, points_PD: Floats) -> tuple[Floats, Floats]:
        """Return the expected values and their variances, (P,) each."""
        mean_P, variance_P = self.rest.predict(points_PD)
        mean_P = mean_P + self.offset
        if self.companion is not None:
            smooth_P, smooth_variance_P = self.companion.predict(points_PD)
            mean_P += self.slope * smooth_P
            variance_P = variance_P + self.slope**2 * smooth_variance_P
        if self.slopes is not None:
            mean_P += self.slope * self.slopes.predict(points_PD)
        return mean_P, variance_P

    @property
    def logs(self) -> Logs:
        """What a later fit can start from."""
        processes = [self.rest] if self.companion is None else [self.rest, self.companion]
        return [process.logs.tolist() for process in processes]


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of one objective at points (N, D).

    values (N,), maximized, with the variances of their errors; losses of the smooth companion (N,), minimized, where
    there is one; slopes: what descents say of the losses.
    """

    points_ND: Floats
    values_N: Floats
    variances_N: Floats
    losses_N: Floats | None = None
    slopes: SlopeProcess | None = None


def model_objective(told: Told, known: Logs | None = None, *, refit: bool = True) -> ObjectiveSurrogate:
    """Model an objective. known: the logs of an earlier model; without ``refit`` they are taken as they are."""
    points_ND, values_N, losses_N, slopes = told.points_ND, told.values_N, told.losses_N, told.slopes
    rest_logs, *others = [np.array(logs) for logs in known] if known else [None]

    def process(values_N: Floats, variances_N: Floats, logs: Floats | None) -> GaussianProcess:
        if logs is not None and not refit:
            return GaussianProcess(points_ND, values_N, variances_N, logs)
        return fit(points_ND, values_N, variances_N, logs, FIRST_STEPS if logs is None else LATER_STEPS)

    smooth_N = np.zeros(len(values_N)) if slopes is None else slopes.predict(points_ND)
    companion = None
    if losses_N is not None and losses_N.std() > FLAT:
        companion = process(losses_N - smooth_N, np.zeros(len(losses_N)), others[0] if others else None)
        smooth_N = smooth_N + companion.mean(points_ND)
    if companion is None and slopes is None:
        return ObjectiveSurrogate(process(values_N, told.variances_N, rest_logs))
    deviations_N = smooth_N - smooth_N.mean()
    slope = float(deviations_N @ (values_N - values_N.mean()) / max(deviations_N @ deviations_N, FLAT))
    slope = min(slope, 0.0)  # a higher loss is no better; where it seems so, that is chance
    offset = float((values_N - slope * smooth_N).mean())
    rest = process(values_N - offset - slope * smooth_N, told.variances_N, rest_logs)
    return ObjectiveSurrogate(rest, companion, slopes, slope, offset)
