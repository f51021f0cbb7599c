"""A surrogate of one objective: its smooth companion first, then what the metric adds to it.

The companion is a smooth function of the coefficients and tells much from few candidates; the metric that was asked
for mostly follows it. So the metric is a line in the companion's prediction plus a process of what is left, which has
the last word where candidates have told enough. Without a companion, one process models the metric itself.
Shape letters: N candidates told, D dimensions, P points asked about.
"""

from dataclasses import dataclass

import numpy as np

from evomerge.records import Floats
from evomerge.surrogates.gp import GaussianProcess, fit

FLAT = 1e-9
FIRST_STEPS, LATER_STEPS = 40, 8  # of a fit

Logs = list[list[float]]
"""The logs of a surrogate's processes, as JSON."""


@dataclass(frozen=True, slots=True)
class ObjectiveSurrogate:
    """slope and offset: the metric as a line in the companion, which ``companion`` models; ``rest``: what is left."""

    rest: GaussianProcess
    companion: GaussianProcess | None = None
    slope: float = 0.0
    offset: float = 0.0

    def mean(self, points_PD: Floats) -> Floats:
        """Return the expected values, (P,)."""
        if self.companion is None:
            return self.rest.mean(points_PD)
        return self.offset + self.slope * self.companion.mean(points_PD) + self.rest.mean(points_PD)

    def predict(self, points_PD: Floats) -> tuple[Floats, Floats]:
        """Return the expected values and their variances, (P,) each."""
        mean_P, variance_P = self.rest.predict(points_PD)
        if self.companion is None:
            return mean_P, variance_P
        smooth_P, smooth_variance_P = self.companion.predict(points_PD)
        return self.offset + self.slope * smooth_P + mean_P, self.slope**2 * smooth_variance_P + variance_P

    @property
    def logs(self) -> Logs:
        """What a later fit can start from."""
        processes = [self.rest] if self.companion is None else [self.rest, self.companion]
        return [process.logs.round(6).tolist() for process in processes]


def model_objective(
    points_ND: Floats,
    values_N: Floats,
    variances_N: Floats,
    losses_N: Floats | None,
    known: Logs | None = None,
    *,
    refit: bool = True,
) -> ObjectiveSurrogate:
    """Model values (N,), maximized, with the variances of their errors, and the companion's losses (N,), minimized.

    known: the logs of an earlier model; without ``refit`` they are taken as they are.
    """
    rest_logs, *others = [np.array(logs) for logs in known] if known else [None]

    def process(values_N: Floats, variances_N: Floats, logs: Floats | None) -> GaussianProcess:
        if logs is not None and not refit:
            return GaussianProcess(points_ND, values_N, variances_N, logs)
        found = fit(points_ND, values_N, variances_N, logs, FIRST_STEPS if logs is None else LATER_STEPS)
        return GaussianProcess(points_ND, values_N, variances_N, found.logs.round(6))  # as a resumed search knows them

    if losses_N is None or losses_N.std() < FLAT:
        return ObjectiveSurrogate(process(values_N, variances_N, rest_logs))
    companion = process(losses_N, np.zeros(len(losses_N)), others[0] if others else None)
    smooth_N = companion.mean(points_ND)
    deviations_N = smooth_N - smooth_N.mean()
    slope = float(deviations_N @ (values_N - values_N.mean()) / max(deviations_N @ deviations_N, FLAT))
    slope = min(slope, 0.0)  # a higher loss is no better; where it seems so, that is chance
    offset = float((values_N - slope * smooth_N).mean())
    rest = process(values_N - offset - slope * smooth_N, variances_N, rest_logs)
    return ObjectiveSurrogate(rest, companion, slope, offset)
