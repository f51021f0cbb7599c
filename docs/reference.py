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
from markdown.extensions.toc import slugify
from pydantic.fields import FieldInfo

from evomerge.campaign.assemble import EVALUATORS, OPERATORS, PROPOSERS
from evomerge.campaign.campaign import Campaign
from evomerge.campaign.sections import CoefficientSection, ParameterSection, ScaleSection, SplitSection, StageSection
from evomerge.errors import InputError
from evomerge.materialize.bandwidth import Bandwidth, merge_seconds
from evomerge.materialize.residence import Residence, choose_residence, device_bytes
from evomerge.records import Options
from evomerge.space.shares import ShareOptions
from evomerge.strict import sections_in

WHAT_SECTIONS_HOLD_AS_TEXT = (CoefficientSection, ParameterSection, ShareOptions, ScaleSection, SplitSection)
TITLES = {  # what a section is called by where it stands in the file; otherwise by its class
    "Campaign": "The file",
    "ObjectiveSection": "objectives, each",
    "SpaceSection": "space",
    "DataFlowSection": "space, kind: data_flow",
    "CoefficientSection": "space.coefficient",
    "ShareOptions": "space.coefficient.start",
    "RangeSection": "a range",
    "ParameterSection": "a parameter of the operator",
    "ScaleSection": "space.scale, kind: data_flow",
    "RaceOptions": "fidelity",
    "StageSection": "search, each stage",
    "StageSpaceSection": "space of a stage",
    "InlineOptions": "workers, kind: inline",
    "RayOptions": "workers, kind: ray",
    "TensorboardOptions": "trackers, kind: tensorboard",
    "MlflowOptions": "trackers, kind: mlflow",
    "WandbOptions": "trackers, kind: wandb",
    "SplitSection": "evaluation.split",
    "ModelJudgeOptions": "evaluation.judge",
    "ServedOptions": "evaluation.endpoint",
    "PublishOptions": "evaluation.endpoint.publish",
}

LABELS = "When to use|References?|Departures|Raises"

SERVER, BUS_5, BUS_4 = 460e9, 64e9, 32e9  # 12 channels of DDR5-4800; 16 lanes of PCIe 5 and 4
DEVICES = (  # with its bytes, and bytes a second: what their makers state
    ("H200", 141 * 10**9, Bandwidth(device=4.8e12, host=SERVER, bus=BUS_5)),
    ("H100, 80 GB", 80 * 10**9, Bandwidth(device=3.35e12, host=SERVER, bus=BUS_5)),
    ("A100, 80 GB", 80 * 10**9, Bandwidth(device=2.04e12, host=SERVER, bus=BUS_4)),
    ("L40S, 48 GB", 48 * 10**9, Bandwidth(device=0.864e12, host=SERVER, bus=BUS_4)),
    ("RTX 4090, 24 GB", 24 * 10**9, Bandwidth(device=1.01e12, host=90e9, bus=BUS_4)),  # a desktop's 2 channels of DDR5
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
            "**Gradients:** yes." if operator.differentiable else "**Gradients:** none.",
            *([_table(("parameter", "meaning", "default", "searched", "one for"), rows)] if rows else []),
            *_options(operator_type.options_type),
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
    parts = []
    for section in dict.fromkeys([*_with_inner(Campaign), *WHAT_SECTIONS_HOLD_AS_TEXT]):
        parts += [f"## {_title(section)}", *_section(section)]
    for kind, entry in sorted(EVALUATORS.items()):
        of_kind, *inner = _with_inner(entry.options_type)
        parts += [f"## evaluation, kind: {kind}", *_section(of_kind)]
        for section in inner:
            parts += [f"## {_title(section)}", *_section(section)]
    return "\n\n".join(filter(None, parts))


def commands() -> str:
    """Every command with its options."""
    from evomerge.cli import app

    return "\n\n".join(_command(name, command) for name, command in _commands(typer.main.get_command(app)))


def memory() -> str:
    """What base, experts and the merged model take on the device, as ``evomerge check`` computes it."""
    rows = []
    for billions, num_experts in ((1, 3), (7, 2), (7, 3), (7, 8), (13, 3), (70, 3)):
        needed = device_bytes(billions * 2 * 10**9, num_experts, 2)
        sizes = [f"{needed[residence] / 1e9:,.0f} GB" for residence in get_args(Residence)]
        rows.append((f"{billions}B", str(num_experts), *sizes))
    return _table(("bfloat16 model", "experts", *get_args(Residence)), rows)


def times() -> str:
    """How long a merge of 7B and three experts takes at least, as ``evomerge check`` computes it, by device."""
    held, rows = device_bytes(7 * 2 * 10**9, 3, 2), []
    for name, num_bytes, bandwidth in DEVICES:
        seconds, cells = merge_seconds(held, bandwidth), []
        for residence in get_args(Residence):
            try:
                choose_residence(residence, held, num_bytes)
                cells.append(f"{seconds[residence]:.2g} s")
            except InputError:
                cells.append("does not fit")
        speeds = f"{bandwidth.device / 1e12:.3g} TB/s; {bandwidth.host / 1e9:.0f} and {bandwidth.bus / 1e9:.0f} GB/s"
        rows.append((name, speeds, choose_residence("auto", held, num_bytes), *cells))
    head = ("device", "its memory; the host's, and the bus", "`auto` takes", *get_args(Residence))
    return _table(head, rows)


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
    return _section(section) if section.model_fields else []


def _with_inner(section: type[Options]) -> list[type[Options]]:
    """Return a section and those that it holds, each after the one that holds it."""
    sections = [section]
    for outer in sections:  # grows as it goes
        for field in outer.model_fields.values():
            sections += [inner for inner in sections_in(field.annotation) if inner not in sections]
    return sections


def _title(section: type[Options]) -> str:
    return TITLES.get(section.__name__) or re.sub(r"(Section|Options)$", "", section.__name__).lower()


def _section(section: type[Options]) -> list[str]:
    """Return what a section says of itself, and its keys with what it or its bases say of each."""
    prose, meanings = _explained(section)
    fields = section.model_fields.items()
    rows = [
        (
            f"`{name}`",
            meanings.get(name, ""),
            _type(field),
            "required" if field.is_required() else f"`{_shown(field.get_default(call_default_factory=True))}`",
        )
        for name, field in fields
        if (section, name) != (StageSection, "options")  # the proposer's own, which stand in the stage itself
    ]
    head = ("key", "meaning", "what", "default")
    if not meanings:
        head, rows = (head[0], *head[2:]), [(row[0], *row[2:]) for row in rows]
    return [prose, _table(head, rows)]


def _explained(section: type[Options]) -> tuple[str, dict[str, str]]:
    """Return what a section's docstring says of the whole, and of each key: ``key, other: what they are; third: ...``.

    Of what its own docstring does not name, its bases' speak.
    """
    key = "|".join(section.model_fields)
    prose: list[str] = []
    meanings: dict[str, str] = {}
    for documented in section.__mro__:
        if not issubclass(documented, Options) or documented is Options or documented.__doc__ is None:
            continue
        for paragraph in (inspect.getdoc(documented) or "").split("\n\n"):
            before, *told = re.split(rf"(?:^|(?<=[.;]\s))((?:{key})(?:, (?:{key}))*):\s", paragraph)
            prose += [before] if before and documented is section else []
            for keys, meaning in zip(told[::2], told[1::2], strict=True):
                for name in keys.split(", "):
                    meanings.setdefault(name, _markdown(meaning.strip().rstrip(".;")))
    return _markdown("\n\n".join(prose)), meanings


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
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "not fewer than"}
    said = [
        f"{words} {getattr(rule, key)}"
        for rule in field.metadata
        for key, words in bounds.items()
        if hasattr(rule, key)
    ]
    return ", ".join([_words(field.annotation), *said])


NAMES = {"str": "text", "int": "a whole number", "float": "a number", "bool": "true or false", "NoneType": "none"}


def _words(annotation: Any) -> str:
    inner = get_args(annotation)
    if isinstance(annotation, type) and not inner:
        if issubclass(annotation, Options):
            return f"[{_title(annotation)}](#{slugify(_title(annotation), '-')})"
        return NAMES.get(annotation.__name__, "anything")
    if getattr(annotation, "__origin__", None) is list:
        return f"a list of {_words(inner[0])}"
    if getattr(annotation, "__origin__", None) is dict:
        return f"a mapping of {_words(inner[0])} to {_words(inner[1])}"
    if inner and all(isinstance(value, str | int | bool) for value in inner):
        return " or ".join(f"`{value}`" for value in inner)
    parts = inner[:1] if hasattr(annotation, "__metadata__") else inner
    return " or ".join(dict.fromkeys(_words(part) for part in parts if part is not type(None))) or "anything"


def _prose(documented: Any) -> str:
    """Return a docstring as Markdown.

    What is indented stays as it is and becomes code, such as formulas; code has single backticks; what begins with one
    of the LABELS, and lists, are paragraphs of their own.
    """
    if isinstance(documented, type) and documented.__doc__ is None:
        return ""
    return _markdown(inspect.getdoc(documented) or "")


def _markdown(text: str) -> str:
    text = re.sub(r"\n*Shape letters?:.*?(?=\n\n|\Z)", "", text, flags=re.DOTALL)
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    text = re.sub(r"(?<![\w/(])((?:arxiv|doi)\.org/[\w./-]*\w)", r"[\1](https://\1)", text)
    text = re.sub(
        r"^ {4}.*$|`[^`]+`|[*_]",
        lambda match: f"\\{match[0]}" if match[0] in "*_" else match[0],
        text,
        flags=re.MULTILINE,
    )
    text = re.sub(rf"^({LABELS}):", r"\n**\1:**", text, flags=re.MULTILINE)
    text = re.sub(r"^((?!- |  ).+)\n(?=- )", r"\1\n\n", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text)


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
    "times": times,
}
