"""A user's own object as evaluator: for what evomerge does not know how to score.

    evaluation: {kind: callable, factory: "package.module:make", options: {...}}

``make(**options)`` returns an object with two methods:

    num_items(task) -> int                     how many items a task has
    score(model, task, items) -> dict          items: list[int]; metric -> one number an item, in their order

The campaign's objectives name its tasks, metrics and directions; that is the whole contract. Numbers come as a tensor
of any device and type, an array or a list. Under ``loss`` (or ``loss:<metric>``) may stand a smooth companion: lower is
better, at best minus the log-probability of the right answer in nats. Where that is a tensor which depends on the
model's parameters, searches can follow its gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import field_validator
from torch import Tensor, nn

from evomerge.errors import CampaignError, DataError
from evomerge.evaluators.evaluator import LOSS, ItemScores, Metric, Wanted, digest_of
from evomerge.evaluators.importing import in_one_line, load
from evomerge.records import Items, Options, digest


class CallableOptions(Options):
    """factory: ``package.module:make``; options: what it is called with."""

    factory: str
    options: dict[str, Any] = {}

    @field_validator("factory")
    @classmethod
    def _names_module_and_attribute(cls, given: str) -> str:
        module, _, attribute = given.partition(":")
        if not all(name.isidentifier() for name in [*module.split("."), attribute]):
            raise ValueError("expected package.module:make, the import path of a function or class")
        return given


class CallableEvaluator:
    """Scores with the object that a factory makes.

    The module is imported from the working directory or the installed packages; the working directory is on Python's
    path while it is imported, not after. Every item is a source of its own. ``losses`` holds ``ce`` until a first score
    shows a task without companion.
    Raises: CampaignError if the factory cannot be imported or called; DataError for anything else that it gets wrong.
    """

    def __init__(self, options: CallableOptions, wanted: Wanted) -> None:
        self.losses = frozenset({"ce"})
        self._factory, self._wanted, self._num_parts = options.factory, wanted, 1
        module, make = load(options.factory, "factory")
        self._object = self._make(make, options.options)
        counts = {task: self._count(task) for task in wanted}
        self.sources: Mapping[str, Sequence[int | str]] = {
            task: [f"{task}/{item}" for item in range(count)] for task, count in counts.items()
        }
        file = Path(module.__file__ or "")
        code = digest_of([file]) if file.is_file() else None
        self.digest = digest({**options.model_dump(mode="json"), "items": counts, "code": code})

    def metrics(self, task: str) -> Mapping[str, Metric]:
        """Those that objectives ask for; only of ``loss`` is known which way it is better."""
        return {metric: Metric("min" if metric == LOSS else None) for metric in self._wanted[task]}

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Ask the object, without gradients; what it reports beside the wanted metrics and companions is left out."""
        parts = [
            self._score(model, task, part) for part in np.array_split(items, min(self._num_parts, max(len(items), 1)))
        ]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def halved(self) -> "CallableEvaluator":
        """Ask twice, each time for half of the items: how many go into a forward is the object's own matter."""
        twin = copy(self)
        twin._num_parts = 2 * self._num_parts
        return twin

    def _score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        with torch.no_grad():  # not inference_mode: what the object keeps of its inputs may meet gradients later
            reported = self._ask(model, task, items)
        if missing := [metric for metric in self._wanted[task] if metric not in reported]:
            raise DataError(f"{self._score_of(task)}: no {' and no '.join(missing)}; found {_keys(reported)}")
        companions = self._companions(task, reported)
        if not companions:
            self.losses = frozenset()
        tensors = {
            key: self._tensor(reported[key], task, key, len(items))
            for key in dict.fromkeys([*self._wanted[task], *companions])
        }
        return {key: tensor.detach().float().cpu().numpy() for key, tensor in tensors.items()}

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Mean over the items of ``loss``, or of the wanted metrics' ``loss:<metric>``.

        Raises: DataError where there is none, or one that does not depend on the model's parameters.
        """
        where = self._score_of(task)
        if name != "ce":
            raise DataError(f"{where}: a search asks for the loss {name!r}; a callable gives ce alone")
        reported = self._ask(model, task, items)
        tensors = {key: self._tensor(reported[key], task, key, len(items)) for key in self._companions(task, reported)}
        if not tensors:
            raise DataError(f"{where}: a search follows the gradient of loss; found {_keys(reported)}")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in model.parameters()):
            for key, tensor in tensors.items():
                if tensor.grad_fn is None:
                    raise DataError(
                        f"{where}: {key} has no gradient; compute it without no_grad, detach or numpy, or choose a "
                        "search without gradients"
                    )
        return torch.stack([tensor.float().mean() for tensor in tensors.values()]).mean()

    def _make(self, make: Callable[..., Any], options: Mapping[str, Any]) -> Any:
        where = f"factory {self._factory}"
        try:
            made = make(**options)
        except Exception as error:  # a user's code raises whatever it likes
            given = ", ".join(options) or "no options"
            raise CampaignError(f"{where}: called with {given}, it raised {in_one_line(error)}") from error
        if missing := [name for name in ("num_items", "score") if not callable(getattr(made, name, None))]:
            raise CampaignError(
                f"{where}: expected an object with num_items and score, but the {type(made).__name__} that it made "
                f"has no {' and no '.join(missing)}"
            )
        return made

    def _count(self, task: str) -> int:
        where = f"factory {self._factory}: num_items({task!r})"
        try:
            given = self._object.num_items(task)
        except Exception as error:
            raise DataError(f"{where} raised {in_one_line(error)}; tasks are what the objectives name") from error
        if isinstance(given, bool) or not isinstance(given, int | np.integer) or given < 1:
            raise DataError(f"{where}: expected a whole number, at least 1, found {given!r:.100}")
        return int(given)

    def _ask(self, model: nn.Module, task: str, items: Items) -> Mapping[str, Any]:
        reported = self._object.score(model, task, items.tolist())
        if not isinstance(reported, Mapping):
            found = type(reported).__name__
            raise DataError(f"{self._score_of(task)}: expected a dict of numbers by metric, found {found}")
        return reported

    def _companions(self, task: str, reported: Mapping[str, Any]) -> list[str]:
        """Return the keys under which companions of the wanted metrics stand, each once."""
        own = [f"{LOSS}:{metric}" for metric in self._wanted[task]]
        keys = dict.fromkeys(key if key in reported else LOSS for key in own)
        return [key for key in keys if key in reported]

    def _tensor(self, given: Any, task: str, key: str, num_items: int) -> Tensor:
        try:
            tensor = given if isinstance(given, Tensor) else torch.tensor(given)
        except (TypeError, ValueError, RuntimeError) as error:
            found = f"{type(given).__name__} ({in_one_line(error)})"
            raise DataError(f"{self._score_of(task)}: {key}: expected numbers, found {found}") from error
        if tensor.shape != (num_items,):
            raise DataError(
                f"{self._score_of(task)}: {key}: expected {num_items} numbers, one an item, found the shape "
                f"{tuple(tensor.shape)}"
            )
        return tensor

    def _score_of(self, task: str) -> str:
        return f"factory {self._factory}: score() of task {task}"


def _keys(reported: Mapping[str, Any]) -> str:
    return ", ".join(map(str, reported)) or "nothing"
