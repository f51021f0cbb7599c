"""A recipe -> mergekit's YAML, wherever mergekit can express it, else the reason why not.

What is written reads back (``read_mergekit``) to the same numbers at every tensor.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evomerge.campaign.spaces import make_operator, operator_of
from evomerge.errors import EvoMergeError
from evomerge.interop.document import evaluate
from evomerge.interop.methods import METHODS, Method, Number
from evomerge.materialize.adapter import Adapter
from evomerge.materialize.arrangement import rows_of
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.materialize.merge import Source
from evomerge.materialize.resident import empty_model, tensor_index
from evomerge.records import Recipe
from evomerge.space.groups import BLOCK_NUMBER, blocks

HEAD = "# The same merge for mergekit: mergekit-yaml mergekit.yaml OUT\n"
OTHER_ENDS = "embeddings or head are taken from another expert than the layers beside them"
DRAWS = "# mergekit draws its own random numbers: the result has the same distribution, not the same bits.\n"


class InexpressibleError(EvoMergeError):
    """Mergekit cannot express a recipe; the message is the reason, not yet a sentence for the user."""


def write_mergekit(recipe: Recipe, sources: Sequence[Source], path: Path) -> str | None:
    """Write a recipe for mergekit and return None; or return the reason why that cannot be done.

    sources are the base and the experts.
    """
    try:
        data = mergekit_data(recipe, sources)
    except InexpressibleError as reason:
        return str(reason)
    draws = DRAWS if METHODS[recipe.operator].is_random else ""
    path.write_text(HEAD + draws + yaml.safe_dump(data, sort_keys=False, width=120, default_flow_style=None))
    return None


def mergekit_data(recipe: Recipe, sources: Sequence[Source]) -> dict[str, Any]:
    """Return the contents of mergekit's file. Raises: InexpressibleError."""
    method = METHODS.get(recipe.operator)
    if method is None:
        raise InexpressibleError(f"mergekit has no merge method {recipe.operator}")
    if recipe.int8:
        raise InexpressibleError("its task vectors are rounded to 8 bits")
    if recipe.merges:
        raise InexpressibleError("one of its experts is a merge itself, which mergekit would have to make first")
    flags, has_base = _flags(recipe, method)
    table = _Table(recipe, method, sources, has_base)
    is_aligned = any(isinstance(one, Checkpoint) and one.alignment for one in sources[1:])
    if is_aligned and not has_base:
        raise InexpressibleError("experts of several vocabularies are aligned to a base, and this method has none")
    is_sliced = recipe.layers is not None or recipe.operator == "passthrough"
    if is_sliced:
        parts = table.slices(list(table.columns) if recipe.layers else _model_order(sources[0]))
    else:
        parts = [_Part({name: name for name in table.columns}, None, 0)]
    entries = [table.entry(part) for part in parts]
    on_disk = sources[0].header if isinstance(sources[0], Checkpoint) else {}
    if table.uses_filters and not _unnumbered(table.columns) <= _unnumbered(on_disk):
        raise InexpressibleError("tensors have other names in the checkpoint's files than in transformers")
    parameters: dict[str, Any] = {flag: value for flag, value in flags.items() if value != method.flags[flag]}
    for name, number in method.of_options.items():
        parameters |= {name: recipe.options[number.ours]} if recipe.options[number.ours] != number.default else {}
    if not is_sliced:
        parameters |= entries[0].get("parameters", {})
    return {
        "merge_method": recipe.operator,
        **({"base_model": recipe.base} if has_base else {}),
        **({"slices": entries} if is_sliced else {"models": entries[0]["sources"]}),
        **({"parameters": parameters} if parameters else {}),
        **_dtypes(recipe, sources[0]),
        **({"tokenizer_source": "base"} if is_aligned else {}),
    }


def _flags(recipe: Recipe, method: Method) -> tuple[dict[str, bool], bool]:
    """Return mergekit's flags (and whether it is given a base) that read as the recipe's options."""
    # What mergekit has elsewhere: of each model, or on its command line.
    kept = {number.ours for number in method.of_options.values()} | {"seed"}
    rest = {name: value for name, value in recipe.options.items() if name in kept}
    for values in product((False, True), repeat=len(method.flags)):
        flags = dict(zip(method.flags, values, strict=True))
        for has_base in {"needed": (True,), "optional": (False, True), "none": (False,)}[method.base]:
            operator, _ = make_operator({"name": recipe.operator, **method.options(flags, has_base), **rest})
            if operator.options.model_dump() == recipe.options:
                return flags, has_base
    shown = ", ".join(f"{name}: {value}" for name, value in recipe.options.items())
    raise InexpressibleError(f"mergekit's {recipe.operator} cannot be set to {shown}")


def _dtypes(recipe: Recipe, base: Source) -> dict[str, str]:
    """We sum in float32 and round once; mergekit does so if it is told to compute in float32 and to round at the end.

    Where the recipe rounds its inputs first (float32 checkpoints, dtype bfloat16), so must mergekit.
    """
    out = recipe.out_dtype or recipe.dtype
    is_lossless = isinstance(base, Checkpoint) and base.dtypes == {recipe.dtype}
    dtype = "float32" if is_lossless else recipe.dtype
    return {"dtype": dtype, **({"out_dtype": out} if out != dtype else {})}


@dataclass(frozen=True, slots=True)
class _Part:
    """The tensors of a slice, or all. patterns: tensor -> what a filter may test its name for.

    row: the first layers of base and experts, None for whole models; length: how many layers follow each other.
    """

    patterns: Mapping[str, str]
    row: tuple[int | None, ...] | None
    length: int


class _Table:
    """A recipe's numbers by tensor, and how mergekit has them."""

    def __init__(self, recipe: Recipe, method: Method, sources: Sequence[Source], has_base: bool) -> None:
        self.recipe, self.method, self.has_base = recipe, method, has_base
        self.uses_filters = False
        self.columns: dict[str, dict[str, tuple[float, ...]]] = {}
        for g, names in enumerate(recipe.groups.values()):
            column = {parameter: tuple(row[g] for row in matrix) for parameter, matrix in recipe.values.items()}
            self.columns |= dict.fromkeys(names, column)
        self.experts = [
            f"{recipe.base}+{place}" if isinstance(expert, Adapter) else place
            for place, expert in zip(recipe.experts.values(), sources[1:], strict=True)
            if isinstance(place, str)
        ]
        self._require_expressible()

    def _require_expressible(self) -> None:
        """What mergekit has no parameter for must be as the reader will have it."""
        operator = operator_of(self.recipe)
        known = {number.ours for number in (*self.method.of_model.values(), *self.method.of_merge.values())}
        for spec in operator.parameters:
            if spec.name in known or (self.recipe.operator == "passthrough" and spec.name == "coefficient"):
                continue
            if any(number != spec.default for row in self.recipe.values[spec.name] for number in row):
                raise InexpressibleError(f"mergekit's {operator.name} has no {spec.name}")

    def entry(self, part: _Part) -> dict[str, Any]:
        """Return the sources of a part, and the parameters of the merge there; mergekit's defaults are left out."""
        sources = []
        if self.has_base and part.row is not None:
            if part.row[0] is None:
                raise InexpressibleError("the base is no source of some layers")
            sources.append({"model": self.recipe.base, **self._span(part, 0)})
        for k, model in enumerate(self.experts):
            if part.row is None or part.row[1 + k] is not None:
                parameters = self._numbers(self.method.of_model, k, part)
                given = {"parameters": parameters} if parameters else {}
                sources.append({"model": model, **self._span(part, 1 + k), **given})
        if self.recipe.operator == "passthrough" and len(sources) > 1:
            raise InexpressibleError(OTHER_ENDS)
        parameters = self._numbers(self.method.of_merge, 0, part)
        return {"sources": sources, **({"parameters": parameters} if parameters else {})}

    def slices(self, names: Sequence[str]) -> list[_Part]:
        """Return runs of layers with the same numbers, as long as they can be; names are in the model's order."""
        layers = self.recipe.layers or self._chosen(names)
        suffixes: list[dict[str, str]] = [{} for _ in layers]
        before: dict[str, str] = {}
        after: dict[str, str] = {}
        for name, block in zip(names, blocks(names), strict=True):
            if block is not None:
                suffixes[block[1]][name] = _suffix(name)
            else:
                (after if suffixes[0] else before)[name] = name
        parts: list[_Part] = []
        previous: dict[str, Any] = {}
        for i, row in enumerate(layers):
            numbers = {suffix: self.columns[name] for name, suffix in suffixes[i].items()}
            if i and row == _next(layers[i - 1]) and numbers == previous:
                parts[-1] = _Part({**parts[-1].patterns, **suffixes[i]}, parts[-1].row, parts[-1].length + 1)
            else:
                parts.append(_Part({**(before if i == 0 else {}), **suffixes[i]}, row, 1))
            previous = numbers
        parts[-1] = _Part({**parts[-1].patterns, **after}, parts[-1].row, parts[-1].length)
        return parts

    def _chosen(self, names: Sequence[str]) -> tuple[tuple[int | None, ...], ...]:
        """Return the slices of a passthrough merge of whole models: each layer from the one expert it is taken from."""
        sources = {name: int(np.argmax(self.columns[name]["coefficient"])) for name in names}
        found = blocks(names)
        depth = 1 + max((block[1] for block in found if block), default=-1)
        rows = []
        for i in range(depth):
            taken = {sources[name] for name, block in zip(names, found, strict=True) if block and block[1] == i}
            if len(taken) != 1:
                raise InexpressibleError("tensors of one layer are taken from several experts")
            rows.append(tuple(i if k in taken else None for k in range(-1, len(self.experts))))
        if any(row[1 + sources[name]] is None for name, row in zip(names, rows_of(names, tuple(rows)), strict=True)):
            raise InexpressibleError(OTHER_ENDS)
        return tuple(rows)

    def _span(self, part: _Part, column: int) -> dict[str, Any]:
        first = part.row[column] if part.row else None
        return {} if first is None else {"layer_range": [first, first + part.length]}

    def _numbers(self, numbers: Mapping[str, Number], k: int, part: _Part) -> dict[str, Any]:
        """Return what is written of some parameters of expert k at a part's tensors."""
        found: dict[str, Any] = {}
        for name, number in numbers.items():
            if number.ours not in self.recipe.values:  # it went into the coefficients when it was read
                continue
            row = k if len(self.recipe.values[number.ours]) > 1 else 0
            given = self._encode({tensor: self.columns[tensor][number.ours][row] for tensor in part.patterns}, part)
            if given != number.default:
                found[name] = given
        return found

    def _encode(self, values: Mapping[str, float], part: _Part) -> Any:
        """Return one number, or filters that give every tensor its own."""
        if len(set(values.values())) == 1:
            return next(iter(values.values()))
        self.uses_filters = True
        suffixes = {name: _suffix(name) for name in values}  # for numbers that are the same in every layer
        found = [
            given
            for patterns in (suffixes, part.patterns)
            for given in _filters({patterns[name]: value for name, value in values.items()})
            if all(evaluate(given, name, 0.0) == value for name, value in values.items())
        ]
        if not found:
            raise InexpressibleError("its tensors' names are parts of each other, and no filter tells them apart")
        return min(found, key=len)


def _suffix(name: str) -> str:
    """Return a tensor's name within its block."""
    match = BLOCK_NUMBER.search(name)
    return name[match.end() :] if match else name


def _filters(values: Mapping[str, float]) -> Iterator[list[dict[str, Any]]]:
    """Yield lists of filters that may give every pattern its value: short ones first, then one that is sure to."""
    prefixes = list(_prefixes("", values))
    common = Counter(value for _, value in prefixes).most_common(1)[0][0]
    yield [*_entries(pair for pair in prefixes if pair[1] != common), {"value": common}]
    yield _entries(prefixes)
    yield _entries(sorted(values.items(), key=lambda pair: -len(pair[0])))  # a name may be part of a longer one


def _entries(pairs: Iterable[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"filter": pattern, "value": value} for pattern, value in pairs]


def _prefixes(prefix: str, values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    """Yield the shortest beginnings of names, cut at dots, below which all values are the same."""
    if len(set(values.values())) == 1 and prefix:
        yield prefix, next(iter(values.values()))
        return
    children: dict[str, dict[str, float]] = {}
    for name, value in values.items():
        first, dot, _ = name.removeprefix(prefix).partition(".")
        children.setdefault(prefix + first + dot, {})[name] = value
    for child, below in children.items():
        yield from _prefixes(child, below)


def _model_order(base: Source) -> list[str]:
    assert isinstance(base, Checkpoint)
    return [tensor.name for tensor in tensor_index(empty_model(base))]


def _unnumbered(names: Iterable[str]) -> set[str]:
    """Return names without the numbers of their blocks: layers may have been arranged anew."""
    return {BLOCK_NUMBER.sub(".", name) for name in names}


def _next(row: tuple[int | None, ...]) -> tuple[int | None, ...]:
    return tuple(None if number is None else number + 1 for number in row)
