"""A front's hypervolume and how sure it is: the items are drawn anew, what is on the front is taken as given."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evomerge.evidence.functions import NUM_RESAMPLES, Estimate, Resampled, resampled
from evomerge.front.front import maximized
from evomerge.front.pareto import hypervolume
from evomerge.records import Floats, Objective, Split
from evomerge.run.run import Run


def front_volume(run: Run) -> Estimate:
    """Return the hypervolume of a run's front above the base, on search items; the base must be scored."""
    reference_M = maximized(run.searched["base"], run.objectives)
    numbers = [trial.number for trial in run.front]
    return above_0(resampled_volume(run, "search", numbers, run.steering, reference_M).estimate)


def resampled_volume(
    run: Run, split: Split, numbers: Sequence[int], objectives: Sequence[Objective], reference_M: Floats
) -> Resampled:
    """Return the hypervolume of some trials on a split's items; of none it is 0, whatever the items."""
    sources = run.sources(split)
    if not numbers:
        num_sources = len({str(source) for objective in objectives for source in sources[objective.name]})
        return Resampled(value=0.0, drawn_R=np.zeros(NUM_RESAMPLES), num_sources=num_sources)
    measured = run.tested if split == "test" else run.searched
    members = [measured[f"trial:{number}"] for number in numbers]
    return resampled(lambda values_KM: hypervolume(values_KM, reference_M), members, objectives, sources)


def above_0(estimate: Estimate) -> Estimate:
    """Return an estimate of a hypervolume without what none can be."""
    low, high = estimate.interval
    return replace(estimate, interval=(max(0.0, low), max(0.0, high)))
