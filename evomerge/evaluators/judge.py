"""Judges of written answers: a function of the user's, or a model behind an endpoint.

    judge: "package.module:function"       function(lines: list[dict], answers: list[str]) -> dict[str, list[float]]
    judge: {url: ..., model: ..., prompt: "... {prompt} ... {answer} ...", metric: refusal}

A function gets the lines of the file as they are and returns a number an item for each metric that it knows. Of a
model's reply the first number counts.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from evomerge.errors import DataError
from evomerge.evaluators.endpoint import Endpoint, EndpointOptions
from evomerge.evaluators.evaluator import digest_of
from evomerge.evaluators.importing import in_one_line, load
from evomerge.records import digest

NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")
FIELDS = re.compile(r"\{(prompt|answer|reference)\}")

Line = Mapping[str, Any]
Judged = dict[str, npt.NDArray[np.float32]]


class ModelJudgeOptions(EndpointOptions):
    """prompt: with {prompt}, {answer} and {reference} in their places; metric: what the reply's first number is."""

    prompt: str
    metric: str
    max_tokens: int = Field(default=16, ge=1)

    @property
    def needs_reference(self) -> bool:
        """Whether the lines must have answers."""
        return "{reference}" in self.prompt

    @field_validator("prompt")
    @classmethod
    def _holds_the_answer(cls, given: str) -> str:
        if "{answer}" not in given:
            raise ValueError("expected a template with {answer}, and if need be {prompt} and {reference}, in it")
        return given


class JudgeError(Exception):
    """A judge's own code failed on some answers."""


class Judge(Protocol):
    """Gives answers numbers."""

    @property
    def digest(self) -> str:
        """Hash of what it judges by, as far as it can be seen from here."""

    def knows(self, metric: str) -> bool:
        """Tell whether it may report a metric; a function shows only when it is called."""

    def judge(self, lines: Sequence[Line], answers: Sequence[str], wanted: Sequence[str]) -> Judged:
        """Return a number an item for every wanted metric; NaN where there is none."""


class FunctionJudge:
    """A function of the user's."""

    def __init__(self, named: str) -> None:
        module, self._function = load(named, "judge")
        self._named = named
        code = Path(module.__file__ or "")
        self.digest = digest([named, digest_of([code]) if code.is_file() else None])

    def knows(self, metric: str) -> bool:  # noqa: ARG002
        """Whatever an objective asks for."""
        return True

    def judge(self, lines: Sequence[Line], answers: Sequence[str], wanted: Sequence[str]) -> Judged:
        """Call it. Raises: DataError for metrics that it does not report; JudgeError where it raises."""
        try:
            reported = self._function([dict(line) for line in lines], list(answers))
        except Exception as error:  # it raises whatever it likes
            raise JudgeError(f"judge {self._named} raised {in_one_line(error)}") from error
        if not isinstance(reported, Mapping):
            raise DataError(f"judge {self._named}: expected a dict of metrics, found {type(reported).__name__}")
        return {metric: self._numbers(reported, metric, len(answers)) for metric in wanted}

    def _numbers(self, reported: Mapping[str, Any], metric: str, num_items: int) -> npt.NDArray[np.float32]:
        if metric not in reported:
            found = ", ".join(map(str, reported)) or "nothing"
            raise DataError(f"judge {self._named}: an objective asks for {metric!r}; expected it, found {found}")
        try:
            numbers = np.array(reported[metric], dtype=np.float32)
        except (TypeError, ValueError) as error:
            raise DataError(f"judge {self._named}: {metric}: expected numbers ({in_one_line(error)})") from error
        if numbers.shape != (num_items,):
            raise DataError(
                f"judge {self._named}: {metric}: expected {num_items} numbers, one an answer, found the shape "
                f"{numbers.shape}"
            )
        return numbers


class ModelJudge:
    """A model behind an endpoint, asked about each answer."""

    def __init__(self, options: ModelJudgeOptions) -> None:
        self._options, self._endpoint = options, Endpoint(options)
        self.digest = digest([options.url, options.model, options.prompt, options.metric, options.max_tokens])

    def knows(self, metric: str) -> bool:
        """The one that the campaign names."""
        return metric == self._options.metric

    def judge(self, lines: Sequence[Line], answers: Sequence[str], wanted: Sequence[str]) -> Judged:
        """Ask about every answer; a reply without a number is NaN."""
        questions = [self._question(line, answer) for line, answer in zip(lines, answers, strict=True)]
        replies = self._endpoint.chat(questions, max_tokens=self._options.max_tokens)
        found = [NUMBER.search(reply) for reply in replies]
        numbers = np.array([float(match[0]) if match else np.nan for match in found], np.float32)
        return dict.fromkeys(wanted, numbers)

    def _question(self, line: Line, answer: str) -> str:
        """Fill in the template in one pass: an answer may itself hold a field's name."""
        fields = {"prompt": line["prompt"], "answer": answer, "reference": line.get("answer", "")}
        return FIELDS.sub(lambda match: str(fields[match[1]]), self._options.prompt)
