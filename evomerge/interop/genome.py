"""A mergekit-evolve configuration -> a campaign file: models, method, search space, and its tasks of lm-eval.

After mergekit's public description of the format (its ``docs/evolve.md``). What cannot be carried over is named twice:
in the campaign's comments and in the notes that are returned.
"""

from collections.abc import Mapping
from pathlib import Path
from textwrap import wrap
from typing import Annotated, Any

import yaml
from pydantic import Field, field_validator

from evomerge.campaign.assemble import OPERATORS, look_up
from evomerge.errors import CampaignError
from evomerge.interop.document import expert_names, local_path
from evomerge.interop.methods import METHODS
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.resident import empty_model, tensor_index
from evomerge.records import Options
from evomerge.space.choice import COEFFICIENT
from evomerge.space.groups import BLOCK_NUMBER
from evomerge.strict import parse, read_yaml

SEARCHED = ("density", "gamma")
"""What mergekit-evolve searches beside the weights, where the method has it."""
NO_EFFECT = {
    "limit": "the share evaluation.split.search says how many items steer the search",
    "shuffle": "items are split by source and seed",
    "random_init": "the search starts at equal weights",
}


class GenomeSection(Options):
    """What is merged, and which tensors share numbers."""

    models: Annotated[list[str], Field(min_length=1)]
    merge_method: str
    base_model: str | None = None
    tokenizer_source: str | None = None
    layer_granularity: Annotated[int, Field(ge=1)] = 1
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: list[str] | None = None
    smooth: bool = False


class TaskSection(Options):
    """A task of the lm-eval harness; the fitness is the weighted sum of the metrics."""

    name: str
    weight: float = 1.0
    metric: str = "acc,none"


class EvolveSection(Options):
    """The file."""

    genome: GenomeSection
    tasks: Annotated[list[TaskSection], Field(min_length=1)]
    limit: Any = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    shuffle: Any = None
    random_init: Any = None
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True

    @field_validator("tasks", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        """A task may be its name alone."""
        return (
            [{"name": task} if isinstance(task, str) else task for task in given] if isinstance(given, list) else given
        )


def is_genome(data: Mapping[str, Any]) -> bool:
    """Whether a file's contents are mergekit-evolve's."""
    return "genome" in data


def read_genome(path: Path) -> tuple[str, list[str]]:
    """Return a campaign file's text, and what of the configuration is left to do or has no place in it.

    Raises: CampaignError that names the key.
    """
    try:
        return _Translation(parse(EvolveSection, read_yaml(path), ""), path).text()
    except CampaignError as error:
        raise CampaignError(f"{path}: {error}") from error.__cause__


class _Translation:
    """One file's translation; notes gather on the way."""

    def __init__(self, section: EvolveSection, path: Path) -> None:
        self.section, self.genome, self.path = section, section.genome, path
        self.notes: list[str] = []
        self.method = look_up(METHODS, self.genome.merge_method, "merge method", "genome.merge_method")
        self.operator = OPERATORS[self.genome.merge_method]()
        if self.method.base == "needed" and self.genome.base_model is None:
            raise CampaignError(
                f"genome.base_model: missing; {self.genome.merge_method} merges what models changed of it"
            )
        folder = path.resolve().parent
        self.base = local_path(self.genome.base_model or self.genome.models[0], folder)
        has_base = self.method.base != "none" and self.genome.base_model is not None
        models = [local_path(model, folder) for model in self.genome.models]
        self.experts = [model for model in dict.fromkeys(models) if not (has_base and model == self.base)]
        self.has_base = has_base

    def text(self) -> tuple[str, list[str]]:
        """Return the campaign, with the notes at its head, and the notes."""
        groups, knots = self._groups()
        sections = [
            {
                "name": _label(self.path.stem),
                "base": self.base,
                "experts": dict(zip(expert_names(self.experts), self.experts, strict=True)),
            },
            {"operator": self._operator(knots)},
            {"space": {"groups": groups, "coefficient": self._coefficient(knots)}},
            {"objectives": self._objectives()},
            {"evaluation": self._evaluation()},
            # mergekit-evolve's own search and its length, which its configuration does not hold.
            {"search": [{"proposer": "cma_es", "sigma": 0.1667}], "budget": {"evaluations": 100}, "seed": 0},
        ]
        for key, advice in NO_EFFECT.items():
            if getattr(self.section, key) not in (None, False):
                self.notes.append(f"{key}: {advice}")
        if self.genome.tokenizer_source not in (None, "base"):
            self.notes.append("genome.tokenizer_source: the merged model has its base's tokenizer")
        head = [f"From the mergekit-evolve configuration {self.path.name}."]
        head += [line for note in self.notes for line in wrap(note, 116, initial_indent="- ", subsequent_indent="  ")]
        parts = [yaml.safe_dump(part, sort_keys=False, width=120, default_flow_style=None) for part in sections]
        return "\n".join(["".join(f"# {line}\n" for line in head), *parts]), self.notes

    def _operator(self, knots: int | None) -> dict[str, Any]:
        """The options as mergekit has them, and ranges for what mergekit-evolve searches beside the weights."""
        flags = dict(self.method.flags)
        if "normalize" in flags and not self.method.folds and self.genome.normalize is not None:
            flags["normalize"] = self.genome.normalize
        elif self.genome.normalize not in (None, flags.get("normalize", False)):
            self.notes.append(f"genome.normalize: {self.operator.name} has no such option here")
        found: dict[str, Any] = {"name": self.operator.name, **self.method.options(flags, self.has_base)}
        specs = {spec.name: spec for spec in self.operator.parameters}
        for number in self.method.of_model.values():
            spec, default = specs[number.ours], number.default
            if default is None or spec.name == COEFFICIENT:
                continue
            if spec.name in SEARCHED:
                place = {"knots": knots} if knots else {"per": "group"}
                found[spec.name] = {"low": spec.low, "high": spec.high, "start": default, **place}
            elif default != spec.default:
                found[spec.name] = default
        return found

    def _coefficient(self, knots: int | None) -> dict[str, Any]:
        low = -1.0 if self.genome.allow_negative_weights else 0.0
        start = 0.5 if self.method.of_merge.keys() == {"t"} else round(1 / len(self.experts), 4)
        return {"low": low, "high": 1.0, "start": start, **({"knots": knots} if knots else {})}

    def _groups(self) -> tuple[Any, int | None]:
        """Return the groups of tensors, and how many knots over depth where numbers are interpolated."""
        size, filters = self.genome.layer_granularity, self.genome.filters or []
        names = self._tensor_names()
        if names is None:
            self.notes.append(
                f"genome.layer_granularity: {size} is not carried over, as {self.base} is no local folder and its "
                "number of layers is not known: every layer has numbers of its own; download it and import again"
            )
            by_filter = {_label(part): f"*.{{layer}}.*{part}*" for part in filters}
            return {**by_filter, "layers": "*.{layer}.*", "rest": "*"} if filters else "layer", None
        inside = [match for match in map(BLOCK_NUMBER.search, names) if match]
        depth = 1 + max((int(match.group(1)) for match in inside), default=-1)
        if depth % size or not depth:
            raise CampaignError(f"genome.layer_granularity: expected a divisor of the {depth} layers, found {size}")
        self.notes.append(
            "embeddings, final norm and head have numbers of their own; in mergekit-evolve they follow the first layers"
        )
        knots = depth // size if self.genome.smooth else None
        size = 1 if self.genome.smooth else size
        if size == 1 and not filters:
            return "layer", knots
        prefix = inside[0].string[: inside[0].start(1)]
        outside = [name for name in names if not BLOCK_NUMBER.search(name)]
        first = names.index(inside[0].string)
        groups: dict[str, Any] = {}
        for begin in range(0, depth, size):
            label = f"layers{begin}-{begin + size - 1}" if size > 1 else f"layer{begin}"
            for part in filters:
                patterns = [f"{prefix}{i}.*{part}*" for i in range(begin, begin + size)]
                if any(part in name for name in names if name.startswith(f"{prefix}{begin}.")):
                    groups[f"{label}.{_label(part)}"] = patterns
            groups[label] = [f"{prefix}{i}.*" for i in range(begin, begin + size)]
        for label, members in (
            ("before", [name for name in outside if names.index(name) < first]),
            ("after", [name for name in outside if names.index(name) > first]),
        ):
            groups |= {label: members} if members else {}
        return groups, knots

    def _tensor_names(self) -> list[str] | None:
        """Return the base's tensors in the model's order, if it lies in a folder here."""
        if not Path(self.base).is_dir():
            return None
        return [tensor.name for tensor in tensor_index(empty_model(open_checkpoint("base", self.base)))]

    def _objectives(self) -> list[dict[str, str]]:
        sections: list[dict[str, str]] = []
        weights: dict[str, float] = {}
        for task in self.section.tasks:
            label = _label(task.name)
            label = f"{label}.{_label(task.metric)}" if label in weights else label
            weights[label] = task.weight
            lower_is_better = {"direction": "min"} if task.weight < 0 else {}
            sections.append({"name": label, "task": task.name, "metric": task.metric, **lower_is_better})
        if len({abs(weight) for weight in weights.values()}) > 1:
            shown = ",".join(f"{name}={abs(weight):g}" for name, weight in weights.items())
            self.notes.append(
                "tasks: their weights are not part of a campaign, which finds the front of all trade-offs; pick from "
                f"it with evomerge export RUN --prefer {shown}"
            )
        return sections

    def _evaluation(self) -> dict[str, Any]:
        """lm-eval's tasks and options; half of the items steer the search, the other half tell what came of it."""
        self.notes.append(
            "evaluation.include_path: where task files of your own lie, if there are any: what --task-search-path named"
        )
        shots = {} if self.section.num_fewshot is None else {"num_fewshot": self.section.num_fewshot}
        return {
            "kind": "lm_eval",
            **shots,
            "apply_chat_template": self.section.apply_chat_template,
            "fewshot_as_multiturn": self.section.fewshot_as_multiturn,
            "split": {"adapt": 0.0, "search": 0.5, "test": 0.5},
        }


def _label(name: str) -> str:
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in name).lstrip("_.-") or "task"
