"""Any task of the lm-eval harness, scored in process on the resident model.

    evaluation: {kind: lm_eval, include_path: tasks, num_fewshot: 5}

Tasks, documents, prompts, filters and metrics are lm-eval's own, frozen by ``lm_eval_tasks``; the forwards are ours, of
subsets of the frozen requests. Metrics are named as lm-eval prints them, ``metric,filter``; where a task has one filter
the metric's name is enough. Items that the model answers with a NaN score NaN in every metric.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from importlib.metadata import version
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from evomerge.errors import DataError
from evomerge.evaluators.evaluator import LOSS, ItemScores, Metric, Wanted, half
from evomerge.evaluators.generate import Limits, generate
from evomerge.evaluators.layouts import Tokens, TokenSequence
from evomerge.evaluators.lm_eval_requests import Harness, Request
from evomerge.evaluators.lm_eval_tasks import FrozenTask, Item, LmEvalOptions, Outcome, freeze_tasks
from evomerge.evaluators.sequences import forwards, logprobs, scored_logits
from evomerge.records import Direction, Items, digest

BETTER: dict[bool | None, Direction] = {True: "max", False: "min"}
"""Of lm-eval's higher_is_better."""

Logprobs = dict[TokenSequence, tuple[float, bool]]
"""Sequence -> the summed log-probability of its scored tokens, nats, and whether each is the likeliest."""


@dataclass(frozen=True, slots=True)
class _Aggregate:
    """lm-eval's way from items to a score, where that is no mean; NaN if an item has no value."""

    combine: Callable[[list[Any]], Any]

    def __call__(self, reported: npt.NDArray[Any], _items: Items) -> float:
        values = list(reported)
        return float("nan") if any(value is None for value in values) else float(self.combine(values))


@dataclass(frozen=True, slots=True)
class _Reported:
    """What a task reports: name -> (metric, filter) of lm-eval, and name -> how it counts."""

    keys: Mapping[str, tuple[str, str]]
    metrics: Mapping[str, Metric]


class LmEvalEvaluator:
    """Scores tasks of lm-eval, of every output type.

    The smooth companion, also a metric, is ``loss``: of a choice, minus the log-probability of the right ones among the
    choices, each as likely as all of its tokens together; else the mean over the tokens of the target, of the text, or
    of the reference answer that is to be written. Tasks whose documents do not hold it have none.
    Raises: DataError for a task that lm-eval does not know or cannot load, or that this model cannot be asked.
    """

    def __init__(self, options: LmEvalOptions, wanted: Wanted, base: Path) -> None:
        self._options = options
        self._harness, self._tasks = freeze_tasks(list(wanted), options, base)
        self._reported = {name: _reported(task, wanted[name], self._harness) for name, task in self._tasks.items()}
        self.sources: Mapping[str, Sequence[int | str]] = {
            name: task.sources(options.sources.get(name)) for name, task in self._tasks.items()
        }
        smooth = all(task.has_reference for task in self._tasks.values())
        self.losses = frozenset({"ce", "entropy", "kl"} if smooth else ())
        self.digest = digest([version("lm_eval"), {name: task.digest for name, task in self._tasks.items()}])

    def metrics(self, task: str) -> Mapping[str, Metric]:
        """What the task's process_results reports, and the loss; of no known direction where lm-eval says none."""
        return self._reported[task].metrics

    def score(self, model: nn.Module, task: str, items: Items) -> ItemScores:
        """Ask the model and let lm-eval score its responses; what raises there, raises here."""
        held, reported = self._tasks[task], self._reported[task]
        chosen, smooth = [held.items[item] for item in items], held.has_reference
        logp = self._logprobs(model, chosen)
        responses = self._responses(model, chosen, logp)
        losses = np.array([_loss(item, logp) if smooth else 0.0 for item in chosen])
        sound = [
            not (math.isnan(loss) or any(map(_is_nan, of_item)))
            for of_item, loss in zip(responses, losses, strict=True)
        ]
        found = iter(held.outcomes(list(compress(chosen, sound)), list(compress(responses, sound))))
        outcomes: list[Outcome] = [next(found) if whole else {} for whole in sound]
        scores = {
            name: _column([outcome.get(key) for outcome in outcomes], reported.metrics[name])
            for name, key in reported.keys.items()
        }
        if not smooth:
            return scores
        companions = [f"{LOSS}:{name}" for name in reported.keys] if LOSS in reported.keys else [LOSS]
        return {**scores, **dict.fromkeys(companions, losses.astype(np.float32))}

    def loss(self, model: nn.Module, task: str, items: Items, name: str) -> Tensor:
        """Mean over items of the companion, or of the entropy of the predictions: over the choices, or of a token."""
        held = self._tasks[task]
        if not held.has_reference:
            raise DataError(f"task {task}: a search asks for the loss {name!r}; its documents hold no right answer")
        chosen = [held.items[item] for item in items]
        of_choices = bool(chosen[0].gold)
        sums = _sums(model, chosen, self._options.batch_size, "ce" if of_choices else name)
        if not of_choices:
            num_tokens = [sum(sequence.num_scored for sequence in item.reference) for item in chosen]
            return torch.stack([part.sum() / num for part, num in zip(sums, num_tokens, strict=True)]).mean()
        logp = [(-part).log_softmax(0) for part in sums]
        if name == "entropy":
            return -torch.stack([(row.exp() * row).sum() for row in logp]).mean()
        right = [row[list(item.gold)].logsumexp(0) for row, item in zip(logp, chosen, strict=True)]
        return -torch.stack(right).mean()

    def halved(self) -> "LmEvalEvaluator":
        """Take half as many sequences a forward."""
        twin = copy(self)
        twin._options = self._options.model_copy(update={"batch_size": half(self._options.batch_size)})
        return twin

    def logits(self, model: nn.Module, task: str, items: Items) -> list[Tensor]:
        """One row over the choices, or one for each token of the reference."""
        chosen, batch_size = [self._tasks[task].items[item] for item in items], self._options.batch_size
        if chosen[0].gold:
            return [-part[None] for part in _sums(model, chosen, batch_size, "ce")]
        rows = iter(scored_logits(model, [part for item in chosen for part in item.reference], batch_size))
        return [torch.cat([next(rows) for _ in item.reference]) for item in chosen]

    def _logprobs(self, model: nn.Module, chosen: Sequence[Item]) -> Logprobs:
        """Run each sequence of the items' requests and references once."""
        asked = [part for item in chosen for request in item.requests for part in request.sequences]
        sequences = list(dict.fromkeys([*asked, *(part for item in chosen for part in item.reference)]))
        options = self._options
        total, greedy = logprobs(model, sequences, options.batch_size, share_prefixes=options.prefix_cache)
        return dict(zip(sequences, zip(total.tolist(), greedy.tolist(), strict=True), strict=True))

    def _responses(self, model: nn.Module, chosen: Sequence[Item], logp: Logprobs) -> list[list[Any]]:
        """Return what lm-eval's model class would respond to each request of the items."""
        texts = self._texts(model, [request for item in chosen for request in item.requests])

        def response(request: Request) -> Any:
            if request.limits:
                return texts[request.limits, request.prompt]
            if request.instance.request_type == "loglikelihood_rolling":
                return sum(logp[window][0] for window in request.sequences)
            return logp[request.sequences[0]]

        return [[response(request) for request in item.requests] for item in chosen]

    def _texts(self, model: nn.Module, requests: Sequence[Request]) -> dict[tuple[Limits, Tokens], str]:
        """Have the answers written, those of equal limits together; what a stop string ends is cut as by lm-eval."""
        from lm_eval.models.utils import postprocess_generated_text

        prompts: dict[Limits, dict[Tokens, None]] = {}
        for request in requests:
            if request.limits:
                prompts.setdefault(request.limits, {})[request.prompt] = None
        texts, tokenizer = {}, self._harness.tokenizer
        for limits, unique in prompts.items():
            written = generate(model, tokenizer, list(unique), limits, self._options.batch_size)
            for prompt, tokens in zip(unique, written, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                texts[limits, prompt] = postprocess_generated_text(text, list(limits.stop), None)
        return texts


def _sums(model: nn.Module, chosen: Sequence[Item], batch_size: int, name: str) -> tuple[Tensor, ...]:
    """Return, an item, the summed loss of each of its reference sequences, differentiable."""
    sequences = [sequence for item in chosen for sequence in item.reference]
    indices: list[int] = []
    sums = []
    for batch, logits, targets, scored in forwards(model, sequences, batch_size):
        logp = logits.log_softmax(-1)
        per_token = -logp.gather(-1, targets[..., None])[..., 0] if name == "ce" else -(logp.exp() * logp).sum(-1)
        indices += batch
        sums.append((per_token * scored).sum(1))
    in_order = torch.cat(sums)[torch.tensor(indices).argsort()]
    return in_order.split([len(item.reference) for item in chosen])  # type: ignore[no-any-return]


def _loss(item: Item, logp: Logprobs) -> float:
    """Return the companion of an item."""
    totals = [logp[sequence][0] for sequence in item.reference]
    if item.gold:
        return _logsumexp(totals) - _logsumexp([totals[index] for index in item.gold])
    return -sum(totals) / sum(sequence.num_scored for sequence in item.reference)


def _logsumexp(values: Sequence[float]) -> float:
    largest = max(values)
    return largest + math.log(sum(math.exp(value - largest) for value in values))


def _is_nan(response: Any) -> bool:
    value = response[0] if isinstance(response, tuple) else response
    return isinstance(value, float) and math.isnan(value)


def _column(values: Sequence[Any], metric: Metric) -> npt.NDArray[Any]:
    """Return a metric's values of the items; None where the model's response was none, or the task said nothing."""
    if metric.aggregate is None:
        return np.array([np.nan if value is None else value for value in values], np.float32)
    column = np.empty(len(values), object)
    for number, value in enumerate(values):
        column[number] = value
    return column


def _reported(held: FrozenTask, wanted: Sequence[str], harness: Harness) -> _Reported:
    """Find out what a task reports: what its process_results makes of made-up responses to its first document."""
    from lm_eval.api.metrics import mean

    combine, better = held.task.aggregation(), held.task.higher_is_better()
    made_up = _made_up(held, harness)
    keys = in_full = {f"{metric},{name}": (metric, name) for metric, name in made_up}
    if len({name for _, name in made_up}) == 1:
        in_short = {metric: (metric, name) for metric, name in made_up}
        keys = {**in_short, **{asked: in_full[asked] for asked in wanted if asked in in_full}}
    metrics = {}
    for name, key in keys.items():
        function = combine.get(key[0], mean)  # without one of its own, lm-eval takes the mean
        is_mean = function is mean and isinstance(made_up[key], int | float | np.generic | None)
        direction = BETTER.get(better.get(key[0]))
        metrics[name] = Metric(direction, None if is_mean else _Aggregate(function), direction is not None)
    if held.has_reference and LOSS not in keys:
        metrics[LOSS] = Metric("min")
    return _Reported(keys, metrics)


def _made_up(held: FrozenTask, harness: Harness) -> Outcome:
    item = held.items[0]

    def response(number: int, request: Request) -> Any:
        if request.limits:
            right = [harness.tokenizer.decode(part.tokens[-part.num_scored :]) for part in item.reference]
            return right[0] if right else ""
        return -1.0 if request.instance.request_type == "loglikelihood_rolling" else (-1.0 - number, False)

    try:
        return held.outcomes([item], [[response(number, request) for number, request in enumerate(item.requests)]])[0]
    except Exception:  # it expects more of a response: what it declares has to do
        return {(metric, ensemble.name): None for ensemble in held.task._filters for metric in held.task.aggregation()}
