"""The model card of an exported model, in Hugging Face's format."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import yaml

from evomerge.publish.card_metadata import Input, interval, metadata, pipeline_tag, public_names
from evomerge.records import Objective, Recipe, Trial
from evomerge.run.claims import claims, use_of_test_items
from evomerge.run.run import Run

PICTURE = "front.png"
CLASSES = {"text-generation": "AutoModelForCausalLM", "image-classification": "AutoModelForImageClassification"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What the card says of the files that it lies among.

    inputs: base and experts by name. architecture: the model's class. weights: SHA-256 of the merged tensors. origin:
    whose tokenizer and its kin are. picture: what it shows. inexpressible: why mergekit cannot make the same merge, if
    it cannot. is_public: the recipe names folders as the card does, by ``public_names``. options: what ``evomerge
    merge`` is told beside the recipe.
    """

    recipe: Recipe
    inputs: Mapping[str, Input]
    architecture: str
    weights: str
    origin: str
    picture: str
    inexpressible: str | None
    is_adapter: bool = False
    is_public: bool = False
    options: str = ""


def model_card(run: Run, trial: Trial, written: Written) -> str:
    """Return the card's Markdown: what was merged, what it scores on which items, how to build it again.

    It holds no path: folders are called by ``public_names``.
    """
    head = metadata(run, trial, written.inputs, written.architecture, is_adapter=written.is_adapter)
    recipe = written.recipe
    how = recipe.operator + (f" in {len(recipe.layers)} layers" if recipe.layers else "")
    what = "An adapter, a merge" if written.is_adapter else "A merge"
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---",
        f"# {run.campaign.name}, trial {trial.number}",
        f"{what} of {_parts(recipe)} by {how}, found by evomerge among {_compared(run)}.",
        f"![{written.picture}]({PICTURE})",
        "## Scores",
        _table(run, trial),
        _honesty(run, trial),
        *_section("What the items say", [f"- {_sentence(claim)}" for claim in claims(run)]),
        "## What was merged",
        _inputs(run, written.inputs),
        *([f"Beside the weights: {written.origin}."] if written.origin else []),
        "## Load it",
        _loading(written),
        "## Build it again",
        _reproduction(run, trial, written),
    ]
    return "\n\n".join(parts) + "\n"


def _parts(recipe: Recipe) -> str:
    """Name the experts; of one that is a merge itself, what it is made of."""
    return ", ".join(
        f"{name} ({_parts(held)} by {held.operator})" if isinstance(held, Recipe) else name
        for name, held in recipe.experts.items()
    )


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(lines)] if lines else []


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _compared(run: Run) -> str:
    num_failed = sum(trial.failure is not None for trial in run.trials)
    counts = [f"{len(run.trials)} candidates"]
    counts += [f"{num_failed} of them failed"] if num_failed else []
    counts += [f"{len(run.stopped)} of them stopped early"] if run.stopped else []
    return ", ".join(counts)


def _table(run: Run, trial: Trial) -> str:
    """One row an objective: test value with standard error and interval, what the base has, and the search value."""
    subject = f"trial:{trial.number}"
    lines = ["| objective | metric | test | 95 % interval | items | base | search |", "|---|---|---|---|---|---|---|"]
    for objective in run.objectives:
        cells = [objective.name, f"{objective.measure} ({objective.direction})", *_tested(run, subject, objective)]
        lines.append(f"| {' | '.join(cells)} | {run.searched[subject].scores[objective.name].value:.4f} |")
    return "\n".join(lines)


def _tested(run: Run, subject: str, objective: Objective) -> list[str]:
    if subject not in run.tested:
        return ["not scored", "", "", ""]
    score = run.tested[subject].scores[objective.name]
    ends = interval(run, "test", objective, score)
    shown = f"{ends[0]:.4f} to {ends[1]:.4f}" if ends else ""
    base = run.tested["base"].scores[objective.name]
    return [f"{score.value:.4f} ± {score.stderr:.4f}", shown, str(len(score.items)), f"{base.value:.4f}"]


def _honesty(run: Run, trial: Trial) -> str:
    stopped = trial.measurement is not None and trial.measurement.stopped
    sentences = [
        "± is one standard error, clustered by source.",
        "Search scores steered the choice and are optimistic; test scores were not used for it.",
        "This model's search scores are estimates: a race stopped it before all items were scored." if stopped else "",
        f"In this run {use_of_test_items(run)}." if run.ledger.num_test_touches() > 1 else "",
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _inputs(run: Run, inputs: Mapping[str, Input]) -> str:
    """One row a checkpoint: its public name, its licence as far as its own card states it, the hash of its tensors."""
    names = public_names(inputs)
    lines = ["| | model | licence | SHA-256 |", "|---|---|---|---|"]
    for name, model in inputs.items():
        digest = run.facts["hashes"].get(str(model.folder), "")
        license_ = model.license.get("license", "not stated")
        lines.append(f"| {name} | `{names[name]}` | {license_} | `{digest}` |")
    return "\n".join(lines)


def auto_class(architecture: str) -> str:
    """Return the class of transformers by which people load a model of this architecture."""
    return CLASSES.get(pipeline_tag(architecture) or "", "AutoModel")


def _loading(written: Written) -> str:
    loader = auto_class(written.architecture)
    lines = [f"from transformers import {loader}", "", f'model = {loader}.from_pretrained("{{}}")']
    place = "path/to/this/folder"
    if written.is_adapter:
        base = written.inputs["base"]
        name = public_names(written.inputs)["base"]
        lines = ["from peft import PeftModel", *lines, f'model = PeftModel.from_pretrained(model, "{place}")']
        place = name if base.hub_id else f"path/to/{name}"
    code = "\n".join(lines).format(place)
    return f"```python\n{code}\n```"


def _reproduction(run: Run, trial: Trial, written: Written) -> str:
    versions = {name: version(name) for name in ("evomerge", "torch", "transformers")}
    pins = " ".join(f"{name}=={number.partition('+')[0]}" for name, number in versions.items())
    command = f"evomerge merge recipe.yaml --out merged{written.options}"
    paragraphs = [
        f"`recipe.yaml`, which lies beside this card, has every coefficient{_stand_ins(written)}:",
        f"```\npip install {pins}\n{command}\n```",
        f"SHA-256 of the merged tensors{' (base and adapter merged)' if written.is_adapter else ''}: "
        f"`{written.weights}` (Python {platform.python_version()}, torch {versions['torch']}, {written.recipe.dtype}).",
        _sentence("; ".join(_search(run, trial))),
        f"mergekit cannot make this merge: {written.inexpressible}."
        if written.inexpressible
        else "`mergekit.yaml` describes the same merge for mergekit:\n\n```\nmergekit-yaml mergekit.yaml merged\n```",
    ]
    return "\n\n".join(paragraphs)


def _stand_ins(written: Written) -> str:
    """Say which names of a public recipe are no ids of the hub's, and what to do about them."""
    names = public_names(written.inputs)
    folders = [f"`{names[name]}`" for name, model in written.inputs.items() if not model.hub_id]
    if not written.is_public or not folders:
        return ""
    return (
        f". In it {', '.join(folders)} stand for the publisher's folders: put the checkpoints with the SHA-256 above "
        "beside it, under these names"
    )


def _search(run: Run, trial: Trial) -> list[str]:
    """Say how the trial came about."""
    stages = run.campaign.search
    proposers = "auto" if isinstance(stages, str) else ", then ".join(stage.proposer for stage in stages)
    return [
        f"the search that found it (`{proposers}` in {run.dimensions} dimensions, seed {run.campaign.seed}) took "
        f"{run.cost:.0f} full-evaluation equivalents",
        f"this is candidate {trial.index + 1} of stage {trial.stage + 1}",
        *run.lineage,
    ]
