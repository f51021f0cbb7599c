"""The records that travel between the parts; all frozen, none knows who made it.

Objectives are maximized everywhere inside (``Observation``); measurements keep the user's own sign.
Shape letters: K experts, G groups, D dimensions of the space, M objectives.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

Floats = npt.NDArray[np.float64]
Items = npt.NDArray[np.int64]
TaskItems = Mapping[str, Items]
"""Task -> some of its items."""

Direction = Literal["max", "min"]
Split = Literal["adapt", "search", "test"]
Summary = Literal["mean", "worst"]
TrialState = Literal["pending", "scored", "stopped", "failed"]


class Options(BaseModel):
    """Frozen options, strictly read: an unknown key or a wrong type is an error that names its path."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Name and shape of one trainable tensor of the model."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Number of elements; 1 for a scalar."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns: the first dimension by all others (of a convolution, filters); a vector is one row."""
        rows = self.shape[0] if len(self.shape) > 1 else 1
        return rows, self.num_elements // max(rows, 1)


TensorIndex = tuple[TensorInfo, ...]
"""Every merged tensor, in the order in which the model holds them (embeddings first, head last)."""


Layers = tuple[tuple[int | None, ...], ...]
"""Per layer of a merged model, which layer of the base and of each expert it is made of; None for none of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSpec:
    """One parameter of an operator: what it may be, where to search it, what it is when nobody says.

    minimum..maximum is the range in which the operator is defined; low..high the range that is searched by default.
    A structural parameter is part of the operator's preparation; changing a cheap one only re-launches the kernel.
    """

    name: str
    meaning: str
    default: float
    low: float
    high: float
    minimum: float = float("-inf")
    maximum: float = float("inf")
    per_expert: bool = True
    structural: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """An operator with every coefficient resolved: all that is needed to rebuild a merged model.

    experts maps a name to a checkpoint's path, or to the recipe of a merge of the same base, which is merged once more.
    groups maps a group to its tensors; together they hold every merged tensor once. values maps a parameter to its
    (K, G) numbers, experts and groups in the order of their mappings; a parameter of the whole merge has one row.
    dtype is that of the inputs; the result is rounded to out_dtype where it has another. layers: of a model whose
    layers are arranged anew; otherwise each layer is merged from the layers of its number. int8: task vectors are
    rounded to 8 bits, with a factor for each 1,024 elements.
    """

    operator: str
    options: Mapping[str, Any]
    base: str
    experts: Mapping[str, "str | Recipe"]
    dtype: str
    groups: Mapping[str, tuple[str, ...]]
    values: Mapping[str, tuple[tuple[float, ...], ...]]
    out_dtype: str | None = None
    layers: Layers | None = None
    int8: bool = False

    @property
    def merges(self) -> list["Recipe"]:
        """The experts that are merges themselves."""
        return [held for held in self.experts.values() if isinstance(held, Recipe)]

    def fingerprint(self, hashes: Mapping[str, str]) -> str:
        """Return 16 hex digits of the merge itself; ``hashes`` maps a checkpoint's path to the hash of its tensors."""
        merge: dict[str, Any] = {
            "operator": self.operator,
            "options": dict(self.options),
            "base": hashes[self.base],
            "experts": [
                held.fingerprint(hashes) if isinstance(held, Recipe) else hashes[held] for held in self.experts.values()
            ],
            "dtype": self.dtype,
            "groups": list(self.groups.values()),
            "values": dict(self.values),
        }
        merge |= {"out_dtype": self.out_dtype} if self.out_dtype else {}
        merge |= {"layers": self.layers} if self.layers else {}
        merge |= {"int8": True} if self.int8 else {}
        return digest(merge)[:16]


BACKWARD_COST = 3.0  # forward and backward, in forwards


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Gradient steps on the adapt items, done in one worker: start at a candidate's point, score where they end.

    loss is a named loss of the evaluator's, or one for each task that has one. rule says how a step moves the
    coefficients (see ``descend.py``), and what the numbers below mean to it. The learning rate falls to ``final_rate``
    of it: linearly, or along a cosine within the first ``period`` steps, and again within twice as many, and so on.
    samples: draw batches from so many adapt items a task, the same for all descents of a stage, instead of from all.
    layers: transformer blocks whose hidden states a loss ``kl:<expert>`` compares too, ``alignment`` their weight.
    seed: of the stage, and last the number of the descent. What follows steps_before is what the descents before have
    left: first_moment and second_moment are Adam's, () before the first step; raw are the numbers that the rule moves,
    where the point does not tell them. anchors: for the descent of a whole front, the points of M models, one for each
    objective that steers, end to end (M * D); the point of a preference w over the objectives is their mean, weighted
    by w, and the candidate's is that of equal weights. Each step then draws a preference.
    """

    loss: str | Mapping[str, str]
    steps: int
    learning_rate: float
    batch_size: int
    seed: tuple[int, ...]
    rule: str = "adam"
    final_rate: float = 1.0
    period: int | None = None
    samples: int | None = None
    weight_decay: float = 0.0
    clip: float | None = None
    penalty: float = 0.0
    temperature: float = 1.0
    layers: tuple[int, ...] = ()
    alignment: float = 1.0
    steps_before: int = 0
    first_moment: tuple[float, ...] = ()
    second_moment: tuple[float, ...] = ()
    raw: tuple[float, ...] = ()
    anchors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An immutable point of a space, in [0, 1]^D, and what is to be done with it.

    memo is the proposer's own note (JSON), kept in the ledger and handed back by ``recall`` when a run resumes.
    """

    point: tuple[float, ...]
    descent: Descent | None = None
    memo: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A metric of a task, or a summary of other objectives, and which way it is better, within floor and ceiling.

    A summary has no task and no metric of its own: it is the mean or the worst of the objectives that ``parts`` names,
    each divided by the score that the expert which normalized_by names has in it. What a summary is made of is
    measured, shown and kept within its bounds, but steers the search through the summary alone.
    """

    name: str
    task: str = ""
    metric: str = ""
    direction: Direction
    floor: float | None = None
    ceiling: float | None = None
    summary: Summary | None = None
    parts: tuple[str, ...] = ()
    normalized_by: Mapping[str, str] = field(default_factory=dict)
    steers: bool = True

    @property
    def sign(self) -> int:
        """+1 if larger is better, else -1."""
        return 1 if self.direction == "max" else -1

    @property
    def measure(self) -> str:
        """What is measured, in words: the metric, or the summary and its parts."""
        normalized = ", normalized by the experts' own" if self.normalized_by else ""
        return f"{self.summary} of {', '.join(self.parts)}{normalized}" if self.summary else self.metric

    def margins(self, value: float) -> list[float]:
        """Return by how much ``value`` keeps the floor and the ceiling, as far as there are any; below 0: misses it."""
        above_floor = [] if self.floor is None else [value - self.floor]
        return above_floor if self.ceiling is None else [*above_floor, self.ceiling - value]


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One objective's score in the user's sign, its standard error, and one number an item whose mean is the score.

    companion: per item, minus the log-probability of the right answer in nats, where the evaluator gives it.
    """

    value: float
    stderr: float
    items: npt.NDArray[np.float32]
    companion: npt.NDArray[np.float32] | None = None

    @property
    def loss(self) -> tuple[float, float]:
        """Mean of the companion and its standard error; NaN where there is none."""
        if self.companion is None:
            return float("nan"), float("nan")
        deviation = float(self.companion.std(dtype=np.float64))
        return float(self.companion.mean(dtype=np.float64)), deviation / len(self.companion) ** 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Slopes:
    """What a descent learned on its way: the labels' loss of each objective that steers, and its gradient.

    Each of B parts of the way is the mean of some steps: its point (D), losses (M) and gradients (M * D), in units of
    the box; all parts end to end.
    """

    points: tuple[float, ...]
    losses: tuple[float, ...]
    gradients: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """Where a descent ended: its point, the loss at each step, and what the next one needs to go on (``Descent``).

    slopes: of a descent of the labels' loss.
    """

    point: tuple[float, ...]
    losses: tuple[float, ...]
    first_moment: tuple[float, ...] = ()
    second_moment: tuple[float, ...] = ()
    raw: tuple[float, ...] = ()
    anchors: tuple[float, ...] = ()
    slopes: Slopes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What one candidate scored on one split, or on the first items of it if it was stopped.

    stopped says why a race left the other items out; values and standard errors are then estimates of what all items
    would have given. cost is in full-evaluation equivalents (a forward over all search items of all tasks = 1, with
    backward = 3); seconds says where the time went. weights is the hash of the merged tensors where it was asked for.
    halved: it did not fit memory, and was made in batches of half the size (a trial's fate says so too).
    """

    split: Split
    scores: Mapping[str, Score]
    cost: float
    seconds: Mapping[str, float]
    weights: str | None = None
    arrival: Arrival | None = None
    stopped: str | None = None
    halved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A candidate with its end: a measurement, a reason for failing, or neither yet.

    number counts all trials of a run, index those of its stage. known is how many results of the run the proposer had
    been told when it proposed this one; order is this result's place in the sequence of results. fate: how it came to
    its end (JSON), {} if nothing is to be said.
    """

    number: int
    stage: int
    index: int
    candidate: Candidate
    known: int
    order: int | None = None
    measurement: Measurement | None = None
    failure: str | None = None
    fate: Mapping[str, Any] = field(default_factory=dict)

    @property
    def point(self) -> tuple[float, ...]:
        """The point that was scored: where the descent ended, if there was one."""
        arrival = self.measurement.arrival if self.measurement else None
        return arrival.point if arrival else self.candidate.point

    @property
    def state(self) -> TrialState:
        """Pending until it has its result; then scored on all items, stopped by a race before that, or failed."""
        if self.order is None:
            return "pending"
        return "failed" if self.measurement is None else "stopped" if self.measurement.stopped else "scored"


def in_order(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials that have a result, in the order of the results."""
    return sorted((trial for trial in trials if trial.order is not None), key=lambda trial: trial.order or 0)


def as_it_went(trials: Sequence[Trial]) -> Iterator[tuple[Trial, bool]]:
    """Yield the trials of a stage as its proposer met them: (trial, False) when asked for, (trial, True) when told.

    trials: in the order of issue.
    """
    results = deque(in_order(trials))
    for trial in trials:
        while results and (results[0].order or 0) < trial.known:
            yield results.popleft(), True
        yield trial, False
    yield from ((trial, True) for trial in results)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What a proposer is told of a trial of its stage: all values maximized, None if the trial failed.

    index is the trial's place among the proposer's own asks. losses_M are the means of the smooth companions
    (minimized, NaN where an objective has none) with their standard errors; margins_C say by how much each floor and
    ceiling is kept. is_estimate: the trial was stopped; its standard errors say how far off all items may be.
    """

    index: int
    point: Floats
    values_M: Floats | None
    stderr_M: Floats | None = None
    losses_M: Floats | None = None
    loss_stderr_M: Floats | None = None
    margins_C: Floats = field(default_factory=lambda: np.zeros(0))
    arrival: Arrival | None = None
    is_estimate: bool = False

    @property
    def violation(self) -> float:
        """By how much floors and ceilings are missed, summed."""
        return float(-self.margins_C.clip(max=0).sum())


def digest(data: Any) -> str:
    """Return the SHA-256 of ``data``'s canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
