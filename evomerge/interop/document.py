"""mergekit's YAML as it is written: its sections, strictly read, and what a parameter is worth at a tensor.

A key that we do not read is named with the reason, never skipped. Everything here follows mergekit's documented
behaviour (its README and merge method guide); what was measured on its outputs is in ``tests/golden``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from evomerge.errors import CampaignError
from evomerge.records import Options
from evomerge.strict import parse

Parameters = Mapping[str, Any]
Dtype = Literal["float32", "bfloat16", "float16"]

REFUSED = {
    "modules": "several modules in one file; merge each as a model of its own",
    "residual_weight": "a residual between slices; leave it out",
}


class ModelSection(Options):
    """An entry of ``models``."""

    model: str
    parameters: dict[str, Any] | None = None


class SourceSection(ModelSection):
    """An entry of a slice's ``sources``: layers from the first number up to, not including, the second."""

    layer_range: Annotated[list[int], Field(min_length=2, max_length=2)]


class SliceSection(Options):
    """An entry of ``slices``."""

    sources: Annotated[list[SourceSection], Field(min_length=1)]
    base_model: str | None = None
    parameters: dict[str, Any] | None = None


class MergekitSection(Options):
    """The file."""

    merge_method: str
    models: Annotated[list[ModelSection], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceSection], Field(min_length=1)] | None = None
    base_model: str | None = None
    parameters: dict[str, Any] | None = None
    dtype: Dtype | None = None
    out_dtype: Dtype | None = None
    tokenizer_source: str | None = None
    tokenizer: dict[str, Any] | None = None
    chat_template: str | None = None


@dataclass(frozen=True, slots=True)
class Level:
    """Parameters and where they stand in the file."""

    where: str
    parameters: Parameters


@dataclass(frozen=True, slots=True)
class Source:
    """A model of a slice; first is the number of its first layer there, None for a model that is merged whole."""

    model: str
    level: Level
    first: int | None


@dataclass(frozen=True, slots=True)
class Slice:
    """Layers that are merged from the same sources; num_layers is None for a merge of whole models."""

    sources: tuple[Source, ...]
    level: Level
    num_layers: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """The file, its two forms made one: ``models`` are one slice of whole models."""

    method: str
    slices: tuple[Slice, ...]
    level: Level
    base: str | None
    dtype: str | None
    out_dtype: str | None

    @property
    def models(self) -> list[str]:
        """Every model among the sources, in the order of the file."""
        return list(dict.fromkeys(source.model for part in self.slices for source in part.sources))


def read_document(data: Mapping[str, Any]) -> Document:
    """Read a mergekit file's contents. Raises: CampaignError that names the key and what to do."""
    _refuse(data)
    section = parse(MergekitSection, dict(data), "")
    if (section.models is None) == (section.slices is None):
        raise CampaignError(f"expected models or slices, found {'both' if section.models else 'neither'}")
    slices = _whole(section.models) if section.models else _slices(section.slices or [])
    _check_tokenizer(section, section.base_model or slices[0].sources[0].model)
    bases = {section.base_model, *(part.base_model for part in section.slices or ())} - {None}
    if len(bases) > 1:
        raise CampaignError(f"base_model: expected one for all slices, found {', '.join(sorted(map(str, bases)))}")
    return Document(
        method=section.merge_method,
        slices=slices,
        level=Level("parameters", section.parameters or {}),
        base=next(iter(bases), None),
        dtype=section.dtype,
        out_dtype=section.out_dtype,
    )


def _refuse(data: Mapping[str, Any]) -> None:
    slices = data.get("slices")
    for where, part in [("", data), *((f"slices[{n}].", part) for n, part in enumerate(slices or ()))]:
        for key in REFUSED.keys() & (part.keys() if isinstance(part, Mapping) else ()):
            raise CampaignError(f"{where}{key}: cannot be read: {REFUSED[key]}")


def _check_tokenizer(section: MergekitSection, base: str) -> None:
    """The merged model has the base's tokenizer, embeddings and chat template; other wishes are refused."""
    if section.tokenizer is not None and section.tokenizer_source is not None:
        raise CampaignError("tokenizer: expected this or tokenizer_source, found both")
    where, source = "tokenizer_source", section.tokenizer_source
    if section.tokenizer is not None:
        where, source = "tokenizer.source", section.tokenizer.get("source", "base")
        for key, value in section.tokenizer.items():
            if key != "source" and value:
                raise CampaignError(f"tokenizer.{key}: cannot be read: embeddings are merged as they are; leave it out")
    if source not in (None, "base", base):
        raise CampaignError(
            f"{where}: cannot be read: the merged model has the tokenizer of its base, found {source!r}; say base, and "
            "have experts of one vocabulary"
        )
    if section.chat_template is not None:
        raise CampaignError(
            "chat_template: cannot be read: the merged model has that of its base; leave it out and set it afterwards"
        )


def _whole(models: Sequence[ModelSection]) -> tuple[Slice, ...]:
    sources = tuple(
        Source(model.model, Level(f"models[{n}].parameters", model.parameters or {}), None)
        for n, model in enumerate(models)
    )
    return (Slice(sources, Level("parameters", {}), None),)


def _slices(sections: Sequence[SliceSection]) -> tuple[Slice, ...]:
    slices = []
    for n, section in enumerate(sections):
        sources, lengths = [], {}
        for m, source in enumerate(section.sources):
            where = f"slices[{n}].sources[{m}]"
            first, end = source.layer_range
            if not 0 <= first < end:
                raise CampaignError(
                    f"{where}.layer_range: expected two growing numbers of layers, found {source.layer_range}"
                )
            lengths[end - first] = where
            sources.append(Source(source.model, Level(f"{where}.parameters", source.parameters or {}), first))
        if len(lengths) > 1:
            raise CampaignError(
                f"slices[{n}]: expected sources of the same number of layers, found "
                f"{' and '.join(map(str, sorted(lengths)))}"
            )
        level = Level(f"slices[{n}].parameters", section.parameters or {})
        slices.append(Slice(tuple(sources), level, next(iter(lengths))))
    return tuple(slices)


def _is_number(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool)


@dataclass(slots=True)
class Resolver:
    """What parameters are worth at tensors; remembers which filters were used.

    A parameter is looked for in the source's parameters, then the slice's, then the file's. A list of numbers lies
    evenly over the layers of the slice, with straight lines between; a list of filters gives the value of the first
    that is part of the tensor's name (none, or "*": of every name), and if none is, the next level is asked.
    """

    used: set[str] = field(default_factory=set)

    def value(self, name: str, levels: Sequence[Level], tensor: str, t: float) -> tuple[Any, str] | None:
        """Return the parameter's value at a tensor and where it stands, or None if nothing is said of it."""
        for level in levels:
            if name in level.parameters:
                where = f"{level.where}.{name}"
                value = evaluate(level.parameters[name], tensor, t, where, self.used)
                if value is not None:
                    return value, where
        return None


def evaluate(given: Any, tensor: str, t: float, where: str = "", used: set[str] | None = None) -> Any:
    """Return what a parameter's value is at a tensor, None if no filter matches; note in ``used`` the one that did.

    Raises: CampaignError if it is no number, list of numbers, or list of filters with values.
    """
    if isinstance(given, bool | int | float):
        return given
    if isinstance(given, list) and given and all(_is_number(number) for number in given):
        place = t * (len(given) - 1)
        low = min(int(place), max(len(given) - 2, 0))
        high = min(low + 1, len(given) - 1)
        return given[low] * (1 - (place - low)) + given[high] * (place - low)
    if isinstance(given, list) and given and all(isinstance(entry, Mapping) for entry in given):
        for n, entry in enumerate(given):
            if "value" not in entry or entry.keys() - {"filter", "value"}:
                raise CampaignError(f"{where}[{n}]: expected filter and value, found {', '.join(map(str, entry))}")
            pattern = entry.get("filter")
            if pattern is None or pattern == "*" or str(pattern) in tensor:
                if used is not None:
                    used.add(f"{where}[{n}]")
                return evaluate(entry["value"], tensor, t, f"{where}[{n}].value", used)
        return None
    raise CampaignError(
        f"{where}: expected a number, a list of numbers over the layers, or a list of filters with values, found "
        f"{given!r}"
    )


def unused_filters(document: Document, used: set[str]) -> list[str]:
    """Name the filters that no tensor came to, so that a misspelt one is noticed."""
    sources = [source.level for part in document.slices for source in part.sources]
    levels = [*sources, *(part.level for part in document.slices), document.level]
    return [
        f"{level.where}.{name}[{n}]: the filter {entry.get('filter')!r} is not used: no tensor's name has it, or an "
        "earlier one or another level comes first"
        for level in levels
        for name, given in level.parameters.items()
        if isinstance(given, list)
        for n, entry in enumerate(given)
        if isinstance(entry, Mapping) and entry.get("filter") and f"{level.where}.{name}[{n}]" not in used
    ]


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether a file's contents are mergekit's: a recipe of ours has neither of these keys."""
    return bool(data.keys() & {"merge_method", "slices", "modules"})


def local_path(location: str, folder: Path) -> str:
    """Return where a model lies: relative to the file, else (as mergekit has it) to where the command is typed."""
    for place in (folder, Path.cwd()):
        path = place / Path(location).expanduser()
        if path.is_dir():
            return str(path.resolve())
    return location


def expert_names(locations: Sequence[str]) -> list[str]:
    """Name experts by the last part of their paths; a number tells equal ones apart."""
    names: list[str] = []
    for location in locations:
        plain = "".join(c if c.isalnum() or c in "_.-" else "_" for c in Path(location).name).lstrip("_.-") or "model"
        name, number = plain, 2
        while name in names:
            name, number = f"{plain}-{number}", number + 1
        names.append(name)
    return names
