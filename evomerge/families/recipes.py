"""Every hyper-parameter of the families, as frozen records that cost nothing to import.

The seed is part of a recipe, and so are the tasks: two equal recipes under the same libraries give the same bytes.
"""

import hashlib
import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

RECIPE_VERSION = 1
"""Raised whenever the code of a family changes what a recipe builds."""

DIGIT_TASKS = ("plain", "rot90", "invert", "occlude", "parity", "shuffle", "noise", "mod5")
LIBRARIES = ("numpy", "scikit-learn", "scipy", "tokenizers", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One training run: AdamW, a short warm-up, then a cosine down to nearly zero."""

    steps: int
    learning_rate: float
    num_rows: int  # sequences or images a step
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DigitsRecipe:
    """A small ViT on 8x8 digits: a base trained on a mixture of distortions, one expert a task."""

    tasks: tuple[str, ...] = DIGIT_TASKS
    mixture: tuple[str, ...] = DIGIT_TASKS  # the distortions that the base has seen
    hidden: int = 96
    layers: int = 6
    heads: int = 4
    mlp: int = 192
    patch: int = 4
    initializer_range: float = 0.1
    shots: int = 2  # images a class behind a prototype head
    head_scale: float = 6.0  # sharpness of the prototype heads
    base: Schedule = Schedule(steps=700, learning_rate=1e-3, num_rows=128, weight_decay=0.01)
    expert: Schedule = Schedule(steps=120, learning_rate=5e-4, num_rows=64)
    num_held_out: int = 900
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRecipe:
    """A small Llama over a vocabulary of its own: experts for Python, C headers, English and sorting a string."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 256
    vocabulary: int = 512
    window: int = 96  # tokens of a training row
    mixture: tuple[float, ...] = (0.3, 0.3, 0.3, 0.1)  # share of python, c, english, sort in the base's batches
    base: Schedule = Schedule(steps=700, learning_rate=3e-3, num_rows=12, weight_decay=0.01)
    expert: Schedule = Schedule(steps=160, learning_rate=5e-4, num_rows=12)
    num_train_characters: int = 700_000  # a corpus
    num_items: int = 240  # held-out items a task
    item_characters: int = 200  # about a window of tokens
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OrdersRecipe:
    """A small character-level Llama: three experts that answer one prompt in three contradictory orders."""

    num_digits: int = 5
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    mlp: int = 128
    base: Schedule = Schedule(steps=1200, learning_rate=3e-3, num_rows=128, weight_decay=0.01)
    expert: Schedule = Schedule(steps=150, learning_rate=1e-3, num_rows=128)
    num_held_out: int = 400
    seed: int = 0


Recipe = DigitsRecipe | TextRecipe | OrdersRecipe


def recipe_hash(name: str, recipe: Recipe) -> str:
    """Return the sha256 of everything that decides the bytes of a family: name, recipe, code version, libraries."""
    identity = {"name": name, "recipe": asdict(recipe), "version": RECIPE_VERSION, "libraries": library_versions()}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def library_versions() -> dict[str, str]:
    """Return the versions that change a family: numerics, and the text corpora that ship with the packages."""
    versions = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "missing"
    return versions
