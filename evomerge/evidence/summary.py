"""Summaries of several objectives: their mean, or the worst of them, each as a share of an expert's own score.

Reference: MergeBench (He et al. 2025) reports the mean of scores that are normalized by the specialized models' own.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from evomerge.errors import EvoMergeError
from evomerge.evidence.scores import cluster_error, source_codes
from evomerge.records import Floats, Measurement, Objective, Score

Sources = Mapping[str, Sequence[int | str]]
"""Objective -> the source of each number that its score has for an item."""


class Summarizer:
    """Adds the summaries among some objectives to measurements of one split.

    sources: of the measured objectives, on all items of the split. references: the reference models' measurements on
    the split; ``expert:NAME`` says what that expert itself scores. Raises: EvoMergeError if that is 0.
    """

    def __init__(
        self, objectives: Sequence[Objective], sources: Sources, references: Mapping[str, Measurement]
    ) -> None:
        self._summaries = [objective for objective in objectives if objective.summary]
        self._sources = sources
        self._weights = {summary.name: _weights(summary, references) for summary in self._summaries}

    def add(self, measurement: Measurement) -> Measurement:
        """Return the measurement with the scores of those summaries that it lacks."""
        missing = [summary for summary in self._summaries if summary.name not in measurement.scores]
        if not missing:
            return measurement
        summarized = {summary.name: self._summarized(summary, measurement) for summary in missing}
        return replace(measurement, scores={**measurement.scores, **summarized})

    def add_to_all(self, measurements: Mapping[str, Measurement]) -> dict[str, Measurement]:
        """Return subject -> measurement with the summaries' scores."""
        return {subject: self.add(measurement) for subject, measurement in measurements.items()}

    def _summarized(self, summary: Objective, measurement: Measurement) -> Score:
        """Return the summary's score; a part's items deviate from it as they do from the part, by the part's weight.

        Its standard error takes shared sources into account, and the experts' own scores as given. Of a stopped
        candidate, whose parts' errors are estimates, it takes the parts as independent.
        """
        parts = [measurement.scores[part] for part in summary.parts]
        weights_P = self._weights[summary.name].copy()
        values_P = weights_P * np.array([part.value for part in parts])
        if summary.summary == "worst":
            active = int(np.argmin(summary.sign * values_P))
            value, weights_P[np.arange(len(parts)) != active] = float(values_P[active]), 0.0
        else:
            value, weights_P = float(values_P.mean()), weights_P / len(parts)
        residuals_N = _residuals([part.items for part in parts], weights_P)
        if measurement.stopped:
            stderr = float(np.sqrt(sum((w * part.stderr) ** 2 for w, part in zip(weights_P, parts, strict=True))))
        else:
            stderr = cluster_error(residuals_N, source_codes(sources_of(summary, self._sources)))
        items_N = value + len(residuals_N) * residuals_N
        return Score(value=value, stderr=stderr, items=items_N.astype(np.float32), companion=_mean_companion(parts))


def _residuals(parts: Sequence[npt.NDArray[np.float32]], weights_P: Floats) -> Floats:
    """Return by how much each item moves the weighted sum of the parts' means from what it is."""
    return np.concatenate(
        [
            weight / len(items) * (items - items.mean(dtype=np.float64))
            for weight, items in zip(weights_P, parts, strict=True)
        ]
    )


def _mean_companion(parts: Sequence[Score]) -> npt.NDArray[np.float32] | None:
    """Return the smooth companion of a summary: the mean of its parts' losses, which is what descents follow."""
    companions = [part.companion for part in parts if part.companion is not None]
    if len(companions) < len(parts):
        return None
    residuals_N = _residuals(companions, np.full(len(parts), 1 / len(parts)))
    loss = np.mean([companion.mean(dtype=np.float64) for companion in companions])
    smooth: npt.NDArray[np.float32] = (loss + len(residuals_N) * residuals_N).astype(np.float32)
    return smooth


def sources_of(objective: Objective, sources: Sources) -> Sequence[int | str]:
    """Return the sources of an objective's items; a summary's are those of its parts, one after the other."""
    if not objective.summary:
        return sources[objective.name]
    return [source for part in objective.parts for source in sources[part]]


def all_sources(
    objectives: Iterable[Objective], by_task: Mapping[str, Sequence[int | str]]
) -> dict[str, list[int | str]]:
    """Return objective -> the sources of its items, summaries included, from task -> the sources of a split's items."""
    objectives = list(objectives)
    measured = {objective.name: list(by_task[objective.task]) for objective in objectives if not objective.summary}
    return {objective.name: list(sources_of(objective, measured)) for objective in objectives}


def _weights(summary: Objective, references: Mapping[str, Measurement]) -> Floats:
    """Return what each part is multiplied with: 1, or 1 over what the part's expert scores in it."""
    weights = []
    for part in summary.parts:
        expert = summary.normalized_by.get(part)
        own = references[f"expert:{expert}"].scores[part].value if expert else 1.0
        if own == 0:
            raise EvoMergeError(
                f"objective {summary.name}: expert {expert} scores 0 in {part}, so nothing can be normalized by it; "
                "take the part out of normalized_by"
            )
        weights.append(1.0 / own)
    return np.array(weights)
