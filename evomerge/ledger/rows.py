"""Records to rows of the tables and back."""

import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from evomerge.records import Arrival, Candidate, Descent, Measurement, Score, Slopes, Split, Trial

ItemNumbers = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]
"""What items score in one objective, and its companion."""
Row = dict[str, Any]


class LazyItems:
    """What the items of a subject's measurement score, by objective: read once, when somebody asks."""

    __slots__ = ("_numbers", "_read", "_subject")

    def __init__(self, read: Callable[[str], Mapping[str, ItemNumbers]], subject: str) -> None:
        self._read, self._subject = read, subject
        self._numbers: Mapping[str, ItemNumbers] | None = None

    def __getitem__(self, objective: str) -> ItemNumbers:
        if self._numbers is None:
            self._numbers = self._read(self._subject)
        return self._numbers[objective]


class StoredScore(Score):
    """A score whose items are read when somebody asks for them.

    numbers: its value and standard error, those of its loss (None for NaN).
    """

    __slots__ = ("_items", "_loss", "_objective")
    _items: LazyItems
    _loss: tuple[float, float]
    _objective: str

    def __init__(self, objective: str, numbers: Sequence[float | None], items: LazyItems) -> None:
        value, stderr, loss, loss_stderr = numbers
        is_missing = loss is None or loss_stderr is None
        fill = object.__setattr__  # frozen, as every score is
        fill(self, "value", value)
        fill(self, "stderr", stderr)
        fill(self, "_loss", (math.nan, math.nan) if is_missing else (loss, loss_stderr))
        fill(self, "_objective", objective)
        fill(self, "_items", items)

    @property
    def items(self) -> npt.NDArray[np.float32]:
        """One number an item."""
        return self._items[self._objective][0]

    @property
    def companion(self) -> npt.NDArray[np.float32] | None:
        """Per item, minus the log-probability of the right answer."""
        return self._items[self._objective][1]

    @property
    def loss(self) -> tuple[float, float]:
        """Mean of the companion and its standard error; NaN where there is none."""
        return self._loss


def trial_of(row: Any, measurement: Measurement | None) -> Trial:
    """Return the trial of a row, with its measurement."""
    return Trial(
        number=row.number,
        stage=row.stage,
        index=row.stage_index,
        candidate=_candidate(json.loads(row.candidate)),
        known=row.known,
        order=row.finish_order,
        measurement=measurement,
        failure=row.failure,
        fate=json.loads(row.fate) if row.fate else {},
    )


def measurement_of(row: Any, split: Split, scores: Mapping[str, Score]) -> Measurement:
    """Return the measurement of a row, with its scores."""
    return Measurement(
        split=split,
        scores=scores,
        cost=row.cost,
        seconds=json.loads(row.seconds),
        weights=row.weights,
        arrival=_arrival(json.loads(row.arrival)) if row.arrival else None,
        stopped=row.stopped,
    )


def rows_of(key: Row, measurement: Measurement) -> tuple[Row, list[Row], list[Row]]:
    """Return the rows of a measurement (all but its place), of its scores and of their items.

    key: run and subject.
    """
    key = {**key, "split": measurement.split}
    of_measurement = {
        **key,
        "cost": measurement.cost,
        "seconds": json.dumps(dict(measurement.seconds)),
        "weights": measurement.weights,
        "arrival": json.dumps(asdict(measurement.arrival)) if measurement.arrival else None,
        "stopped": measurement.stopped,
    }
    of_scores, of_items = [], []
    for number, (objective, score) in enumerate(measurement.scores.items()):
        numbers = {"value": score.value, "stderr": score.stderr, **loss_columns(score)}
        of_scores.append({**key, "objective": objective, "place": number, **numbers})
        of_items.append({**key, "objective": objective, **_packed_items(score)})
    return of_measurement, of_scores, of_items


def loss_columns(score: Score) -> Row:
    """Return what the row of a score says of its loss."""
    loss, loss_stderr = (None if math.isnan(number) else number for number in score.loss)
    return {"loss": loss, "loss_stderr": loss_stderr}


def item_numbers_of(row: Any) -> ItemNumbers:
    """Return what a row says of an objective's items."""
    numbers = _unpacked(row.scores)
    return numbers, None if row.companion is None else _unpacked(row.companion) if row.companion else numbers


def _packed_items(score: Score) -> Row:
    companion = None
    if score.companion is not None:
        is_the_same = score.companion.tobytes() == score.items.tobytes()
        companion = b"" if is_the_same else _packed(score.companion)
    return {"scores": _packed(score.items), "companion": companion}


def _packed(numbers: npt.NDArray[np.float32]) -> bytes:
    return zlib.compress(numbers.astype("<f4").tobytes())


def _unpacked(packed: bytes) -> npt.NDArray[np.float32]:
    numbers: npt.NDArray[np.float32] = np.frombuffer(zlib.decompress(packed), dtype="<f4")
    return numbers


def _candidate(data: Row) -> Candidate:
    descent = data["descent"]
    return Candidate(
        point=tuple(data["point"]),
        descent=None if descent is None else Descent(**{key: _frozen(value) for key, value in descent.items()}),
        memo=data["memo"],
    )


def _arrival(data: Row) -> Arrival:
    slopes = data.pop("slopes", None)
    frozen = {key: _frozen(value) for key, value in data.items()}
    return Arrival(**frozen, slopes=slopes and Slopes(**{key: _frozen(value) for key, value in slopes.items()}))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
