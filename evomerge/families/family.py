"""The families by name: what they are, and building one into a folder, once.

The recipes were chosen by looking at the score matrices: the families are test beds, not evidence about merging at
large. Importing this module loads no torch; the builders are imported when a family is made.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evomerge.errors import InputError, did_you_mean
from evomerge.families.built import Built, write_campaign, write_description
from evomerge.families.folder import finished_description, is_occupied, move_into_place, temporary_sibling
from evomerge.families.recipes import DigitsRecipe, OrdersRecipe, Recipe, Schedule, TextRecipe, recipe_hash

Progress = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Family:
    """A family that can be made: one line about it, its full-size recipe, and the module that builds it."""

    description: str
    recipe: Recipe
    module: str


FAMILIES: dict[str, Family] = {
    "digits": Family("eight image tasks on 8x8 digits, a ViT of 0.5M parameters", DigitsRecipe(), "digits"),
    "digits4": Family(
        "four harder image tasks: a weaker base and one-shot heads leave room above the best single coefficient",
        DigitsRecipe(
            tasks=("rot90", "invert", "parity", "mod5"),
            shots=1,
            base=Schedule(steps=320, learning_rate=1e-3, num_rows=128, weight_decay=0.01),
            seed=2,  # of three seeds the one with the most room between the best single coefficient and one per layer
        ),
        "digits",
    ),
    "orders": Family(
        "three contradictory answers to one prompt, a Llama of 0.1M parameters; exact matches sum to at most 1",
        OrdersRecipe(),
        "orders",
    ),
    "text": Family(
        "Python, C++ headers, English and sorting, a Llama of 0.7M parameters with a tokenizer of its own",
        TextRecipe(),
        "text",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilySummary:
    """A family on disk, as its family.json describes it.

    ``scores`` maps a model (base, each expert, uniform) to its score a task on all held-out items; ``metrics`` says
    what the scores are. ``seconds`` are CPU seconds by part. ``cached`` is true where nothing had to be built.
    """

    name: str
    path: Path
    recipe_hash: str
    cached: bool
    experts: tuple[str, ...]
    metrics: dict[str, str]
    scores: dict[str, dict[str, float]]
    num_items: dict[str, int]
    num_parameters: int
    seconds: dict[str, float]
    notes: tuple[str, ...]

    @property
    def campaign(self) -> Path:
        """The campaign file that searches this family."""
        return self.path / "campaign.yaml"


def make(name: str, out: Path, *, recipe: Recipe | None = None, progress: Progress | None = None) -> FamilySummary:
    """Build the family ``name`` into ``out``, or return at once if ``out`` holds it already.

    ``progress(message, fraction)`` is called about every 0.2 s of training, fraction in [0, 1]. The folder appears
    whole: a build that is killed leaves nothing in its place.
    Raises: InputError for an unknown name, for a recipe of another family, and for an ``out`` that holds anything else.
    """
    if name not in FAMILIES:
        raise InputError(f"family {name!r} is unknown{did_you_mean(name, FAMILIES)}")
    family = FAMILIES[name]
    recipe = family.recipe if recipe is None else recipe
    if type(recipe) is not type(family.recipe):
        expected, got = type(family.recipe).__name__, type(recipe).__name__
        raise InputError(f"family {name!r}: expected a {expected}, got a {got}; pass a recipe of this family")
    out = Path(out).absolute()
    identity = recipe_hash(name, recipe)
    if is_occupied(out):
        return _summary(out, finished_description(out, name, identity), cached=True)
    builder = importlib.import_module(f"evomerge.families.{family.module}")
    started = time.monotonic()
    with temporary_sibling(out) as folder:
        built: Built = builder.build(folder, recipe, progress)
        write_campaign(folder, name, built)
        write_description(folder, name, recipe, built, time.monotonic() - started)
        move_into_place(folder, out)
    if progress is not None:
        progress("done", 1.0)
    return _summary(out, finished_description(out, name, identity), cached=False)


def _summary(out: Path, description: Mapping[str, Any], cached: bool) -> FamilySummary:
    return FamilySummary(
        name=description["name"],
        path=out,
        recipe_hash=description["hash"],
        cached=cached,
        experts=tuple(description["experts"]),
        metrics=description["metrics"],
        scores=description["scores"],
        num_items=description["num_items"],
        num_parameters=description["num_parameters"],
        seconds=description["cpu_seconds"],
        notes=tuple(description["notes"]),
    )
