"""mergekit's YAML -> a recipe: every parameter evaluated at every tensor, in mergekit's order of precedence.

Shape letters: K experts, S tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from evomerge.campaign.assemble import look_up
from evomerge.campaign.plan import make_recipe
from evomerge.campaign.recipe_file import ReadRecipe, read_recipe
from evomerge.campaign.spaces import make_operator
from evomerge.errors import CampaignError, did_you_mean
from evomerge.interop.document import (
    Document,
    Resolver,
    Slice,
    Source,
    expert_names,
    is_mergekit,
    local_path,
    read_document,
    unused_filters,
)
from evomerge.interop.methods import METHODS, Method, Number
from evomerge.materialize.arrangement import num_layers
from evomerge.materialize.checkpoint import open_checkpoint
from evomerge.materialize.inputs import open_sources
from evomerge.operators.operator import Operator
from evomerge.records import Floats, Layers, ParameterSpec, TensorIndex
from evomerge.space.choice import COEFFICIENT
from evomerge.space.groups import blocks
from evomerge.space.space import check_setting
from evomerge.strict import read_yaml

NO_EFFECT = {"int8_mask": "saves memory in mergekit; has no effect here"}


def read_any_recipe(path: Path) -> ReadRecipe:
    """Read a recipe file, ours or mergekit's. Raises: InputError that names the key."""
    return read_mergekit(path) if is_mergekit(read_yaml(path)) else read_recipe(path)


def read_mergekit(path: Path) -> ReadRecipe:
    """Read a mergekit file and check it against its checkpoints. Raises: InputError that names the key.

    Paths are relative to the file, else to the present folder, as mergekit has them.
    """
    data = read_yaml(path)
    try:
        return _read(read_document(data), path.resolve().parent)
    except CampaignError as error:
        raise CampaignError(f"{path}: {error}") from error.__cause__


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cast:
    """Who plays what: where the base lies, and where the experts lie by name; a source's model is one of them."""

    base: str
    has_base: bool
    experts: Mapping[str, str]
    locations: Mapping[str, str]

    def source(self, part: Slice, expert: str) -> Source | None:
        """Return the source of a slice that is this expert, or None."""
        place = self.experts[expert]
        return next((source for source in part.sources if self.locations[source.model] == place), None)

    def is_base(self, source: Source) -> bool:
        """Whether a source is the base and no expert."""
        return self.has_base and self.locations[source.model] == self.base


@dataclass(frozen=True, slots=True)
class _Place:
    """A tensor: its name, which slice it belongs to, and how deep in the slice it lies, from 0 to 1."""

    tensor: str
    part: Slice
    t: float


def _read(document: Document, folder: Path) -> ReadRecipe:
    method = look_up(METHODS, document.method, "merge method", "merge_method")
    cast = _cast(document, method, folder)
    notes = _check_parameters(document, method, cast)
    layers = _layers(document, cast)
    if layers and all(row[k] in (i, None) for i, row in enumerate(layers) for k in range(len(row))):
        layers = None if len(layers) == num_layers(open_checkpoint("base", cast.base)) else layers
    base, experts, tensors = open_sources(cast.base, cast.experts, layers)
    places = _places(document, tensors)
    evaluation = _Evaluation(document, method, cast, places)
    operator, flags = evaluation.operator()
    values = evaluation.values(operator)
    if method.folds:
        values = _fold(values, normalize=flags["normalize"])
    used_filters = evaluation.resolver.used
    notes += unused_filters(document, used_filters)
    if used_filters and not layers and not {place.tensor for place in places} <= base.header.keys():
        notes.append(
            f"filters are compared with transformers' names, such as {places[0].tensor}; in the files they have others"
        )
    dtype = document.dtype or base.dtype
    recipe = make_recipe(operator, base, experts, dtype, {place.tensor: (place.tensor,) for place in places}, values)
    out_dtype = document.out_dtype if document.out_dtype != dtype else None
    return ReadRecipe(
        recipe=replace(recipe, out_dtype=out_dtype, layers=layers),
        base=base,
        experts=tuple(experts.values()),
        operator=operator,
        notes=tuple(notes),
    )


def _cast(document: Document, method: Method, folder: Path) -> _Cast:
    models = document.models
    references = {model: _reference(model, folder) for model in models}
    locations = {model: location for model, (location, _) in references.items()}
    base = None if document.base is None else local_path(document.base, folder)
    if method.base == "needed" and base is None:
        raise CampaignError(f"base_model: missing; {document.method} merges what the models changed of it")
    if method.base == "none" and base is not None and base not in locations.values():
        raise CampaignError(
            f"base_model: {document.method} has no base but merges it like any model: list it among the models, or "
            "leave it out"
        )
    for part in document.slices:
        _require_distinct(part, locations)
    has_base = method.base != "none" and base is not None
    among = list(dict.fromkeys(place for place in locations.values() if not (has_base and place == base)))
    if not among:
        raise CampaignError("models: expected one beside the base, found none")
    if method.num_models not in (None, len(among)):
        beside = " beside the base" if has_base else ""
        expected = f"{method.num_models} model{'s' if method.num_models != 1 else ''}{beside}"
        raise CampaignError(f"models: {document.method} merges {expected}, found {len(among)}")
    carcass = base or references[models[0]][1] or locations[models[0]]
    for model, (_, under) in references.items():
        if under not in (None, carcass):
            raise CampaignError(f"{model}: cannot be read: an adapter of another model than {carcass}; merge it first")
    return _Cast(
        base=carcass,
        has_base=has_base,
        experts=dict(zip(expert_names(among), among, strict=True)),
        locations=locations,
    )


def _require_distinct(part: Slice, locations: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for source in part.sources:
        place = locations[source.model]
        if place in seen:
            where = source.level.where.removesuffix(".parameters")
            raise CampaignError(f"{where}.model: {source.model} is the same model as {seen[place]}; one entry a model")
        seen[place] = source.model


def _reference(model: str, folder: Path) -> tuple[str, str | None]:
    """Return where a model lies; of ``model+adapter``, where the adapter does, and the model under it."""
    under, plus, adapter = model.rpartition("+")
    if plus and not Path(local_path(model, folder)).is_dir():
        return local_path(adapter, folder), local_path(under, folder)
    return local_path(model, folder), None


def _check_parameters(document: Document, method: Method, cast: _Cast) -> list[str]:
    """Refuse parameters that the method does not have, or not there; return what is to be said of the others."""
    notes: dict[str, None] = {}
    of_model, whole = method.of_model.keys() | method.of_options.keys(), method.of_merge.keys() | method.flags.keys()
    sources = [source for part in document.slices for source in part.sources]
    levels = [(source.level, cast.is_base(source), True) for source in sources]
    levels += [(level, False, False) for level in (*(part.level for part in document.slices), document.level)]
    for level, is_base, is_source in levels:
        if is_base and level.parameters:
            notes[f"{level.where}: the base's own parameters have no effect in {document.method}"] = None
            continue
        for name in level.parameters:
            where = f"{level.where}.{name}"
            if name in NO_EFFECT:
                notes[f"{where}: {NO_EFFECT[name]}"] = None
            elif name in method.fixed:
                if level.parameters[name] != method.fixed[name]:
                    raise CampaignError(
                        f"{where}: cannot be read: it is always {method.fixed[name]} here; leave it out"
                    )
            elif is_source and name in whole:
                raise CampaignError(f"{where}: is read for the slice or the file, not for a model; move it there")
            elif name not in of_model and name not in whole:
                known = did_you_mean(name, [*of_model, *whole, *method.fixed, *NO_EFFECT])
                raise CampaignError(f"{where}: cannot be read: {document.method} has no such parameter{known}")
    return list(notes)


def _layers(document: Document, cast: _Cast) -> Layers | None:
    """Return the (L, 1 + K) sources of each layer, or None for whole models."""
    rows: list[tuple[int | None, ...]] = []
    for number, part in enumerate(document.slices):
        if part.num_layers is None:
            return None
        sources = [cast.source(part, expert) for expert in cast.experts]
        base = next((source for source in part.sources if cast.is_base(source)), None)
        first = base.first if base else None
        if base is None and cast.has_base:
            starts = {source.first for source in sources if source}
            if len(starts) > 1:
                raise CampaignError(f"slices[{number}].sources: expected the base among them: which of its layers?")
            first = starts.pop()
        firsts = [first, *(source.first if source else None for source in sources)]
        rows += [tuple(None if f is None else f + i for f in firsts) for i in range(part.num_layers)]
    return tuple(rows)


def _places(document: Document, tensors: TensorIndex) -> list[_Place]:
    """Say of each tensor to which slice it belongs, and where in it.

    What precedes the blocks belongs to the first slice, what follows them to the last; both lie at its beginning.
    """
    names = [tensor.name for tensor in tensors]
    found = blocks(names)
    rows = [(part, i) for part in document.slices for i in range(part.num_layers or 0)]
    depth: dict[str, int] = {}
    for tower, number in filter(None, found):
        depth[tower] = max(depth.get(tower, 0), number + 1)
    places, seen_block = [], False
    for name, block in zip(names, found, strict=True):
        if block is None:
            places.append(_Place(name, document.slices[-1 if seen_block else 0], 0.0))
            continue
        seen_block = True
        part, i = rows[block[1]] if rows else (document.slices[0], block[1])
        last = (part.num_layers or depth[block[0]]) - 1
        places.append(_Place(name, part, i / last if last else 1.0))
    return places


@dataclass(frozen=True, slots=True)
class _Evaluation:
    """What the file's parameters are worth at every tensor."""

    document: Document
    method: Method
    cast: _Cast
    places: Sequence[_Place]
    resolver: Resolver = field(default_factory=Resolver)

    def operator(self) -> tuple[Operator, dict[str, bool]]:
        """Return the operator with its options, and mergekit's flags."""
        flags = {name: self._flag(name, default) for name, default in self.method.flags.items()}
        options = self.method.options(flags, self.cast.has_base)
        options |= {number.ours: self._option(name, number) for name, number in self.method.of_options.items()}
        operator, _ = make_operator({"name": self.document.method, **options})
        return operator, flags

    def values(self, operator: Operator) -> dict[str, Floats]:
        """Return (K, S) or (1, S) numbers by parameter, our names; what mergekit does not have is at our default."""
        experts, places = list(self.cast.experts), self.places
        specs = {spec.name: spec for spec in operator.parameters}
        present_KS = np.array([[self.cast.source(place.part, k) is not None for place in places] for k in experts])
        self._check_presence(present_KS, can_leave_out=COEFFICIENT in specs)
        values = {
            spec.name: np.full((len(experts) if spec.per_expert else 1, len(places)), spec.default)
            for spec in operator.parameters
        }
        for name, number in self.method.of_merge.items():
            spec = specs.get(number.ours)  # without one it goes into the coefficients
            values[number.ours] = np.array([[self._number(name, number, None, place, spec) for place in places]])
        for name, number in self.method.of_model.items():
            spec = specs[number.ours]
            rows = [[self._of_expert(name, number, k, place, spec) for place in places] for k in experts]
            values[number.ours] = np.array(rows)
            if not spec.per_expert:  # of the one source that there is
                values[number.ours] = values[number.ours][present_KS.argmax(0), np.arange(len(places))][None]
        if COEFFICIENT in specs:
            values[COEFFICIENT] = np.where(present_KS, values[COEFFICIENT], 0.0)
        return values

    def _flag(self, name: str, default: bool) -> bool:
        """Return a flag of the whole merge; given per tensor it must come out the same for all."""
        found: dict[bool, str] = {}
        for place in self.places:
            value, where = self._look_up(name, None, place) or (default, "")
            if value not in (True, False):
                raise CampaignError(f"{where}: expected true or false, found {value!r}")
            found.setdefault(bool(value), place.tensor)
        if len(found) > 1:
            differ = f"true for {found[True]} and false for {found[False]}"
            raise CampaignError(f"parameters.{name}: cannot be read: {differ}; give one for all")
        return next(iter(found))

    def _option(self, name: str, number: Number) -> float:
        """Return a number that mergekit has for every model and we for the whole merge: it must be the same for all."""
        found = {
            self._number(name, number, source, place, None)
            for place in self.places
            for source in place.part.sources
            if not self.cast.is_base(source)
        }
        if len(found) > 1:
            differ = " and ".join(map(str, sorted(found)))
            raise CampaignError(f"{name}: cannot be read: {differ}; give one for all models")
        return found.pop()

    def _of_expert(self, name: str, number: Number, expert: str, place: _Place, spec: ParameterSpec) -> float:
        """Return an expert's number at a tensor; where it is no source, one that does not matter."""
        source = self.cast.source(place.part, expert)
        return self._number(name, number, source, place, spec) if source else spec.default

    def _number(
        self, name: str, number: Number, source: Source | None, place: _Place, spec: ParameterSpec | None
    ) -> float:
        """Return a number at a tensor, or mergekit's default; within the range of ``spec``."""
        where = f"{(source or place.part).level.where}.{name}"
        value, where = self._look_up(name, source, place) or (number.default, where)
        if value is None:
            raise CampaignError(f"{where}: missing for {place.tensor}; {self.document.method} needs it")
        if isinstance(value, bool):
            raise CampaignError(f"{where}: expected a number, found {value!r}")
        if spec is not None:
            check_setting(spec, float(value), where)
        return float(value)

    def _look_up(self, name: str, source: Source | None, place: _Place) -> tuple[Any, str] | None:
        """Return what is said of a parameter and where: for a model (its source), the slice or the file."""
        levels = [*([source.level] if source else []), place.part.level, self.document.level]
        return self.resolver.value(name, levels, place.tensor, place.t)

    def _check_presence(self, present_KS: Any, *, can_leave_out: bool) -> None:
        """Raise CampaignError if the slices differ in their models and the method cannot leave one out."""
        name = self.document.method
        if name == "passthrough" and (present_KS.sum(0) != 1).any():
            raise CampaignError("slices: expected one source each for passthrough, found several")
        if not present_KS.all() and not can_leave_out:
            k, s = np.argwhere(~present_KS)[0]
            raise CampaignError(
                f"slices: {name} merges the same models everywhere, and {list(self.cast.experts)[k]} is no source of "
                f"{self.places[s].tensor}; give every slice the same models"
            )


def _fold(values: dict[str, Floats], *, normalize: bool) -> dict[str, Floats]:
    """Let scale and normalization go into the coefficients; like mergekit, do not divide by a sum below 1e-8."""
    coefficients_KS = values[COEFFICIENT]
    if normalize:
        sum_S = coefficients_KS.sum(0)
        coefficients_KS = coefficients_KS / np.where(np.abs(sum_S) < 1e-8, 1.0, sum_S)
    return {COEFFICIENT: coefficients_KS * values["scale"]}
