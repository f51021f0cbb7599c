"""Tasks of the lm-eval harness, frozen: documents, few-shot prompts and their tokens are made once.

lm-eval itself loads a task, draws its examples and writes its prompts, as its command line does with its own seeds.
Its filters and process_results then score what a model responds, document by document.
"""

import dataclasses
import hashlib
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from copy import copy
from dataclasses import dataclass
from difflib import get_close_matches
from inspect import getsource
from io import StringIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from evomerge.errors import DataError, did_you_mean
from evomerge.evaluators.importing import in_one_line
from evomerge.evaluators.layouts import TokenSequence
from evomerge.evaluators.lm_eval_requests import Harness, Request
from evomerge.records import Options

PYTHON_SEED, SEED = 0, 1234  # of lm-eval's command line; the second is NumPy's, torch's and the few-shot sampler's
SCORING = ("metric_list", "filter_list", "process_results", "doc_to_target", "doc_to_choice", "repeats")

Shots = Annotated[int, Field(ge=0)]
Outcome = dict[tuple[str, str], Any]
"""(metric, filter) -> what a task's process_results says of one document."""


class LmEvalOptions(Options):
    """In lm-eval's own words, with the defaults of its command line, but for the last three.

    include_path: a folder of task files (YAML). num_fewshot: of all tasks, or task -> number; a task whose file says 0
    keeps 0. gen_kwargs: added to the tasks' generation_kwargs. max_gen_toks: an upper limit to theirs. sources: task ->
    the field of its documents that names their source; else documents of equal content have one. prefix_cache: run
    common beginnings once.
    """

    include_path: str | None = None
    num_fewshot: Shots | dict[str, Shots] | None = None
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = True
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = {}
    batch_size: int = Field(default=64, ge=1)
    max_gen_toks: int | None = Field(default=None, ge=1)
    sources: dict[str, str] = {}
    prefix_cache: bool = True


@dataclass(frozen=True, slots=True)
class Item:
    """A document and what is asked of the model for it.

    reference: sequences whose log-probabilities tell how likely the right answer is: the answer itself, or all choices;
    gold: which of the choices are right. Both are () where no answer is known.
    """

    doc: Any
    requests: tuple[Request, ...]
    reference: tuple[TokenSequence, ...] = ()
    gold: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FrozenTask:
    """A task of lm-eval and its items; item i is its document i."""

    name: str
    task: Any
    items: tuple[Item, ...]

    @property
    def has_reference(self) -> bool:
        """Whether the right answer of every item is known."""
        return all(item.reference for item in self.items)

    def outcomes(self, items: Sequence[Item], responses: Sequence[Sequence[Any]]) -> list[Outcome]:
        """Filter and score the responses to the items' requests, as lm-eval does."""
        if not items:
            return []
        instances = [[request.instance for request in item.requests] for item in items]
        for of_item, given in zip(instances, responses, strict=True):
            for instance, response in zip(of_item, given, strict=True):
                instance.resps = [response] * instance.repeats
        self.task._instances = [instance for of_item in instances for instance in of_item]
        self.task.apply_filters()
        return [self._outcome(item, of_item) for item, of_item in zip(items, instances, strict=True)]

    def _outcome(self, item: Item, instances: Sequence[Any]) -> Outcome:
        outcome = {}
        for name in instances[0].filtered_resps:
            results = [instance.filtered_resps[name] for instance in instances]
            for metric, value in self.task.process_results(item.doc, results).items():
                outcome[metric, name] = value
        return outcome

    def sources(self, field: str | None) -> list[int | str]:
        """Return the source of each item: a field of its document, or a hash of all of it.

        Raises: DataError for a document without the field.
        """
        if field is None:
            return [_hash(item.doc)[:16] for item in self.items]
        for number, item in enumerate(self.items):
            if field not in item.doc:
                known = did_you_mean(field, item.doc)
                where = f"task {self.name}: evaluation.sources: document {number}"
                raise DataError(f"{where} has no field {field!r}{known}")
        found = [item.doc[field] for item in self.items]
        return [source if type(source) is int else str(source) for source in found]

    @property
    def digest(self) -> str:
        """SHA-256 of prompts, documents, right answers, and of how responses are scored."""
        items = [
            [
                item.doc,
                [request.content for request in item.requests],
                [[sequence.tokens, sequence.num_scored] for sequence in item.reference],
                item.gold,
            ]
            for item in self.items
        ]
        scoring = {key: getattr(self.task.config, key, None) for key in SCORING}
        kind = type(self.task)  # lm-eval's own classes go with its version
        return _hash([self.task.VERSION, None if kind.__module__.startswith("lm_eval.") else kind, scoring, items])


class _OnceADocument:
    """A task's function of a document, worked out once for each: lm-eval compiles its template at every call."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._known: dict[int, tuple[Any, Any]] = {}

    def __call__(self, doc: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return self._function(doc, *args, **kwargs)
        known = self._known.get(id(doc))
        if known is None or known[0] is not doc:  # an id is only its own while the document lives, in this process
            known = self._known[id(doc)] = doc, self._function(doc)
        return copy(known[1])


def freeze_tasks(names: Sequence[str], options: LmEvalOptions, base: Path) -> tuple[Harness, dict[str, FrozenTask]]:
    """Load tasks and make all of their requests; return them with the tokenization that made them.

    Raises: DataError for what lm-eval does not know, cannot load, or cannot ask of this model.
    """
    _require_folder_and_names(names, options)
    with _quiet():
        harness = Harness(base)
        manager = _task_manager(names, options.include_path)
        frozen = {}
        for name in names:
            try:
                frozen[name] = _freeze(name, manager, harness, options)
            except DataError as error:
                raise DataError(f"task {name}: {error}") from error
            except Exception as error:  # a task is somebody's file and code, and its dataset lies anywhere
                raise DataError(f"task {name}: lm-eval cannot prepare it ({in_one_line(error)})") from error
        return harness, frozen


def _require_folder_and_names(names: Sequence[str], options: LmEvalOptions) -> None:
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise DataError(
            f"evaluation.include_path: expected a folder of task files, found none at {options.include_path}"
        )
    shots = options.num_fewshot if isinstance(options.num_fewshot, dict) else {}
    for key, mapping in (("num_fewshot", shots), ("sources", options.sources)):
        if unknown := sorted(set(mapping) - set(names)):
            known = did_you_mean(unknown[0], names)
            raise DataError(f"evaluation.{key}: no objective is of a task {unknown[0]!r}{known}")


def _task_manager(names: Sequence[str], include_path: str | None) -> Any:
    """Return lm-eval's index of tasks: of the local folder alone, which takes no time, if that has them all."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=False)
    missing = [name for name in names if name not in manager.task_index]
    if missing and include_path:
        _require_readable(missing[0], Path(include_path))
    return TaskManager(include_path=include_path) if missing else manager


def _require_readable(name: str, folder: Path) -> None:
    """Name the first task file that lm-eval leaves out without a word, because it cannot read it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(folder.rglob("*.yaml")):
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # the same net as lm-eval's own
            raise DataError(f"task {name}: {path.name} cannot be read ({in_one_line(error)})") from error


def _freeze(name: str, manager: Any, harness: Harness, options: LmEvalOptions) -> FrozenTask:
    _require_one_task(name, manager, options.include_path)
    with _seeded():
        task = manager.load(name)["tasks"][name]
        _require_scorable(task)
        _configure(task, name, harness, options)
        chat = options.apply_chat_template
        task.build_all_requests(
            system_instruction=options.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            chat_template=harness.lm.apply_chat_template if chat else None,
            tokenizer_name=harness.lm.tokenizer_name if chat else "",
        )
        for function in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            setattr(task, function, _OnceADocument(getattr(task, function)))
        instances: dict[int, list[Any]] = {}
        for instance in sorted(task.instances, key=lambda instance: (instance.doc_id, instance.idx)):
            instances.setdefault(instance.doc_id, []).append(instance)
        return FrozenTask(name, task, tuple(_item(task, of_doc, harness, chat) for of_doc in instances.values()))


def _require_one_task(name: str, manager: Any, include_path: str | None) -> None:
    entry = manager.task_index.get(name)
    if entry is None:
        close = get_close_matches(name, manager.all_tasks, n=3)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        folder = f"the folder {include_path}" if include_path else "a folder (evaluation.include_path)"
        raise DataError(f"neither lm-eval's registry nor {folder} has a task of this name{hint}")
    kind = entry.kind.name.lower()
    if kind in ("tag", "group"):
        members = entry.tags if kind == "tag" else entry.cfg["task"]
        names = [member.get("task", member.get("group")) if isinstance(member, dict) else member for member in members]
        raise DataError(
            f"it is a {kind} of {len(names)} tasks; make an objective of each, and one of their mean: "
            f"{', '.join(sorted(map(str, names)))}"
        )


def _require_scorable(task: Any) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise DataError("it shows images or sounds; expected a task of text")
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError("it runs code that the model writes, which is not done here")
    if task.config.process_results is None:
        for metric, function in getattr(task, "_metric_fn_list", {}).items():
            if function is None:
                raise DataError(f"lm-eval has no metric {metric!r}, and the evaluate library has none at hand")


def _configure(task: Any, name: str, harness: Harness, options: LmEvalOptions) -> None:
    """Set what lm-eval's command line sets of a task before it makes its requests."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if task.get_config("output_type") == "generate_until":
        task.set_config("generation_kwargs", dict(options.gen_kwargs), update=True)
        own = normalize_gen_kwargs(task.get_config("generation_kwargs"))["max_gen_toks"]
        most = min(own, options.max_gen_toks or own)
        if most >= harness.lm.max_length:
            raise DataError(
                f"it writes up to {most} tokens, but the model takes {harness.lm.max_length}, prompts included; "
                "lower them with evaluation.max_gen_toks"
            )
        task.set_config("generation_kwargs", {"max_gen_toks": most}, update=True)
    own_shots = task.get_config("num_fewshot")
    shots = options.num_fewshot.get(name) if isinstance(options.num_fewshot, dict) else options.num_fewshot
    if own_shots is None or (own_shots != 0 and shots is not None):
        task.set_config("num_fewshot", shots or 0)
    task.set_fewshot_seed(SEED)


def _item(task: Any, instances: Sequence[Any], harness: Harness, chat: bool) -> Item:
    doc = instances[0].doc
    requests = tuple(harness.request(instance) for instance in instances)
    if task.OUTPUT_TYPE == "multiple_choice":
        gold, num_choices = _gold(task, doc)
        choices = tuple(sequence for request in requests[:num_choices] for sequence in request.sequences)
        return Item(doc, requests, choices if gold else (), gold)
    if len(requests) > 1:  # of a task's own Python class; nothing says which is the right answer
        return Item(doc, requests)
    if requests[0].limits:
        return Item(doc, requests, _written_answer(task, instances[0], harness, chat))
    return Item(doc, requests, requests[0].sequences)


def _gold(task: Any, doc: Any) -> tuple[tuple[int, ...], int]:
    """Return which choices are right, as far as the document says, and how many there are."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    golds = gold if isinstance(gold, list) else [gold]
    return tuple(index for index in golds if isinstance(index, int) and 0 <= index < len(choices)), len(choices)


def _written_answer(task: Any, instance: Any, harness: Harness, chat: bool) -> tuple[TokenSequence, ...]:
    """Return the prompt with the (first) right answer behind it, placed as lm-eval places a choice; () if none."""
    config, target = task.config, task.doc_to_target(instance.doc)
    if config.doc_to_choice is not None and isinstance(target, int):
        target = task.doc_to_choice(instance.doc)[target]
    if isinstance(target, list):
        target = target[0] if target else ""
    inside_turn = chat and (not config.gen_prefix or config.gen_prefix[-1].isspace())
    arguments = (instance.args[0], f"{'' if inside_turn else config.target_delimiter}{target}")
    asked = dataclasses.replace(instance, request_type="loglikelihood", arguments=arguments)
    try:
        return harness.request(asked).sequences if str(target) else ()
    except DataError:  # longer than the model takes
        return ()


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """Return JSON for what a document or a task's configuration may hold: arrays, dates, functions."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if not callable(value):
        return str(value)
    try:
        return getsource(value)
    except (TypeError, OSError):
        return getattr(value, "__qualname__", type(value).__qualname__)


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed the global generators as lm-eval's command line does before it loads tasks; leave them as they were."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        random.seed(PYTHON_SEED)
        np.random.seed(SEED)  # noqa: NPY002
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval's and the datasets' progress bars and advice from the terminal; what fails is still raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(disabled)
