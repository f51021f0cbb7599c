"""Strict reading: YAML in which no key stands twice, and sections in which no key is unknown.

Every mistake is one line with the path of the key: what was expected, what was found, what is known.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from evomerge.errors import CampaignError, InputError, did_you_mean
from evomerge.records import Options

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
"""What names of campaigns, tasks and runs are made of."""

Section = TypeVar("Section", bound=Options)


def parse(section: type[Section], data: Any, where: str) -> Section:
    """Validate data against a section. Raises: CampaignError with the path of the first mistake and what to do."""
    try:
        return section.model_validate(data)
    except ValidationError as error:
        first, steps = _deepest(error)
        path = _join(where, steps)
        if first["type"] == "extra_forbidden":
            known = _fields_at(section, first["loc"][:-1])
            raise CampaignError(f"{path}: unknown key{did_you_mean(str(steps[-1]), known)}") from error
        if first["type"] == "missing":
            raise CampaignError(
                f"{path}: missing; expected here: {', '.join(_fields_at(section, first['loc'][:-1]))}"
            ) from error
        found = first["input"]
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        message = message.replace("String should", "expected a string that should")
        shown = f", found {found!r}" if isinstance(found, str | int | float | bool | None) else ""
        raise CampaignError(f"{path}: {message}{shown}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; a key that is given twice is a mistake. Raises: CampaignError."""
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506  (a SafeLoader)
    except FileNotFoundError as error:
        raise CampaignError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CampaignError(f"{path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise CampaignError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise CampaignError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    return data


def read_numbers(text: str, option: str) -> dict[str, float]:
    """Read ``a=2,b=1``, as an option of the command line has it. Raises: InputError."""
    numbers = {}
    for part in text.split(","):
        name, _, number = part.partition("=")
        try:
            numbers[name.strip()] = float(number)
        except ValueError as error:
            raise InputError(f"{option}: expected NAME=NUMBER,... such as a=2,b=1, found {part!r}") from error
    return numbers


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML in which 1e-3 is a number and no key stands twice."""


def _unique_mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in mapping:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", key_node.start_mark)
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _join(where: str, steps: list[Any]) -> str:
    path = where
    for step in steps:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else str(step)
    return path or "the file"


def _deepest(error: ValidationError) -> tuple[Any, list[Any]]:
    """Return the first mistake and its path; of alternatives that all failed, the one that came farthest.

    What has the right type and a wrong value came farther than what has another type.
    """
    found = [(mistake, [step for step in mistake["loc"] if not _is_union_branch(step)]) for mistake in error.errors()]
    prefix = found[0][1]
    rivals = [pair for pair in found if pair[1][: len(prefix)] == prefix]
    return max(rivals, key=lambda pair: (len(pair[1]), not pair[0]["type"].endswith("_type")))


def _is_union_branch(step: Any) -> bool:
    """Pydantic puts the name of the tried alternative into the path; a user did not write it."""
    return isinstance(step, str) and (
        step.endswith(("Section", "Options"))
        or "[" in step
        or step in ("float", "str", "int", "constrained-str", "constrained-int")
    )


def _fields_at(section: type[Options], steps: Sequence[Any]) -> list[str]:
    """Return the known keys of the section that the path leads to; names of sections in it say which alternative."""
    current, alternatives = section, [section]
    for step in steps:
        if isinstance(step, str) and step in current.model_fields:
            alternatives = list(sections_in(current.model_fields[step].annotation)) or alternatives
            current = alternatives[0]
        current = next((other for other in alternatives if other.__name__ == step), current)
    return [name for name, field in current.model_fields.items() if not field.exclude]


def sections_in(annotation: Any) -> Iterator[type[Options]]:
    """Yield the sections that a type is or is made of: ``list[Section] | float`` holds one."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        yield annotation
    for inner in get_args(annotation):
        yield from sections_in(inner)
