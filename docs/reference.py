"""Writes the reference pages from the code: a page's line ``{{ operators }}`` becomes a section for each operator.

A hook of MkDocs (``make docs``). What it prints of a class is the class's own docstring, so that formulas, sources and
ranges stand in one place.
"""

import inspect
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, get_args

import typer
from pydantic.fields import FieldInfo

from evomerge.campaign.assemble import EVALUATORS, OPERATORS, PROPOSERS
from evomerge.campaign.campaign import Campaign
from evomerge.campaign.sections import (
    BoundsSection,
    CoefficientSection,
    DataFlowSection,
    ObjectiveSection,
    ParameterSection,
    ScaleSection,
    SpaceSection,
    SplitSection,
    StageSection,
)
from evomerge.materialize.residence import Residence, device_bytes
from evomerge.records import Options
from evomerge.space.shares import ShareOptions
from evomerge.strict import sections_in

WHAT_SECTIONS_HOLD_AS_TEXT = (
    BoundsSection,
    CoefficientSection,
    ParameterSection,
    ShareOptions,
    SplitSection,
    ScaleSection,
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what the code says in the place of ``{{ name }}``; MkDocs calls this for every page."""
    return re.sub(r"^\{\{ (\w+) \}\}$", lambda match: WRITERS[match[1]](), markdown, flags=re.MULTILINE)


def operators() -> str:
    """Every operator: what it computes, its parameters and options."""
    parts = []
    for name, operator_type in sorted(OPERATORS.items()):
        operator = operator_type()
        rows = [
            (
                f"`{spec.name}`",
                spec.meaning,
                f"{spec.default:g}",
                f"{spec.low:g} to {spec.high:g}",
                "an expert" if spec.per_expert else "the whole merge",
            )
            for spec in operator.parameters
        ]
        parts += [
            f"## {name}",
            _prose(operator_type),
            *([_table(("parameter", "meaning", "default", "searched", "one for"), rows)] if rows else []),
            *_options(operator_type.options_type),
            "Gradients reach its coefficients." if operator.differentiable else "",
        ]
    return "\n\n".join(filter(None, parts))


def proposers() -> str:
    """Every proposer: how it searches, its options, and its source."""
    parts = []
    for name, proposer_type in sorted(PROPOSERS.items()):
        module = inspect.getmodule(proposer_type)
        needs = "It needs gradients, and adapt items." if proposer_type.needs_gradients else ""
        parts += [f"## {name}", _prose(module), _prose(proposer_type), needs, *_options(proposer_type.options_type)]
    return "\n\n".join(filter(None, parts))


def campaign() -> str:
    """Every key of a campaign file, section by section."""
    sections: list[type[Options]] = [Campaign]
    for section in sections:  # grows as it goes: a section comes after the one that holds it
        for field in section.model_fields.values():
            sections += [inner for inner in sections_in(field.annotation) if inner not in sections]
    sections += [section for section in WHAT_SECTIONS_HOLD_AS_TEXT if section not in sections]
    titles = {SpaceSection: "space", DataFlowSection: "space, kind: data_flow", ObjectiveSection: "objectives, each"}
    titles |= {Campaign: "The file", StageSection: "search, each stage", ParameterSection: "a searched parameter"}
    parts = []
    for section in sections:
        title = titles.get(section) or re.sub(r"(Section|Options)$", "", section.__name__).lower()
        parts += [f"## {title}", _prose(section), _keys(section)]
    for kind, entry in sorted(EVALUATORS.items()):
        parts += [f"## evaluation, kind: {kind}", _prose(entry.options_type), _keys(entry.options_type)]
    return "\n\n".join(filter(None, parts))


def commands() -> str:
    """Every command with its options."""
    from evomerge.cli import app

    return "\n\n".join(_command(name, command) for name, command in _commands(typer.main.get_command(app)))


def memory() -> str:
    """What base, experts and the merged model take on the device, as ``evomerge check`` computes it."""
    rows = []
    for billions, num_experts in ((1, 3), (7, 2), (7, 4), (7, 8), (13, 4), (70, 4)):
        needed = device_bytes(billions * 2 * 10**9, num_experts, 2)
        sizes = [f"{needed[residence] / 1e9:,.0f} GB" for residence in get_args(Residence)]
        rows.append((f"{billions}B", str(num_experts), *sizes))
    return _table(("bfloat16 model", "experts", *get_args(Residence)), rows)


def _commands(group: Any, before: str = "evomerge") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{before} {name}")
        else:
            yield f"{before} {name}", command


def _command(name: str, command: Any) -> str:
    words, rows = [], []
    for parameter in command.params:
        help_text = getattr(parameter, "help", None) or ""
        if parameter.param_type_name == "argument":
            word = parameter.metavar or parameter.name.upper()
            words.append(word)
            rows.append((f"`{word}`", help_text))
        else:
            flag = ", ".join(f"`{option}`" for option in parameter.opts)
            rows.append((flag, help_text + (" Required." if parameter.required else "")))
    table = _table(("word", "meaning"), rows) if rows else ""
    return "\n\n".join((f"## {name}", f"    {' '.join([name, *words])}", (command.help or "").strip(), table))


def _options(section: type[Options]) -> list[str]:
    return [_prose(section), _keys(section)] if section.model_fields else []


def _keys(section: type[Options]) -> str:
    rows = [
        (
            f"`{name}`",
            _type(field),
            "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`",
        )
        for name, field in section.model_fields.items()
        if (section, name) != (StageSection, "options")  # the proposer's own, which stand in the stage itself
    ]
    return _table(("key", "what", "default"), rows) if rows else ""


def _shown(value: Any) -> str:
    """Return a default as a campaign file writes it."""
    if isinstance(value, Options):
        return (
            json.dumps(value.model_dump(mode="json", exclude_defaults=True))
            if value.model_fields_set
            else "all of its own"
        )
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _type(field: FieldInfo) -> str:
    """Say in words what a key takes."""
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "at least this many:"}
    said = [
        f"{words} {getattr(rule, key)}"
        for rule in field.metadata
        for key, words in bounds.items()
        if hasattr(rule, key)
    ]
    return ", ".join([_words(field.annotation), *said])


def _words(annotation: Any) -> str:
    names = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "none"}
    if isinstance(annotation, type) and not get_args(annotation):
        found = names.get(annotation.__name__, annotation.__name__)
        return re.sub(r"(Section|Options)$", " section", found).lower() if found[0].isupper() else found
    origin = getattr(annotation, "__origin__", None)
    inner = get_args(annotation)
    if origin is list:
        return f"a list of {_words(inner[0])}"
    if origin is dict:
        return f"a mapping of {_words(inner[0])} to {_words(inner[1])}"
    if inner and all(isinstance(value, str | int | bool) for value in inner):
        return " or ".join(f"`{value}`" for value in inner)
    if hasattr(annotation, "__metadata__"):
        return _words(inner[0])
    words = dict.fromkeys(_words(part) for part in inner if part is not type(None))
    return " or ".join(words) or "anything"


def _prose(documented: Any) -> str:
    """Return a docstring as Markdown: its code in single backticks, what is indented left as it is."""
    text = inspect.getdoc(documented) or ""
    if isinstance(documented, type) and documented.__doc__ is None:
        return ""
    text = re.sub(r"\n*Shape letters?:.*?(?=\n\n|\Z)", "", text, flags=re.DOTALL)
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    text = re.sub(r"(?<![\w/(])((?:arxiv|doi)\.org/[\w./-]*\w)", r"[\1](https://\1)", text)
    lines = [
        line if line.startswith(" ") else re.sub(r"(?<!`)([*_])(?!`)", r"\\\1", line) if "`" not in line else line
        for line in text.splitlines()
    ]
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


WRITERS: dict[str, Callable[[], str]] = {
    "operators": operators,
    "proposers": proposers,
    "campaign": campaign,
    "commands": commands,
    "memory": memory,
}
