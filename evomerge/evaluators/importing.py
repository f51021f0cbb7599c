"""Functions of a user's own, named in a campaign as ``package.module:function``."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from evomerge.errors import CampaignError


def load(named: str, what: str) -> tuple[ModuleType, Callable[..., Any]]:
    """Return the module and the function, from the working directory or what is installed; what: its part in messages.

    Raises: CampaignError if it cannot be imported or is not one.
    """
    name, _, attribute = named.partition(":")
    if not name or not attribute:
        raise CampaignError(f"{what} {named!r}: expected package.module:function")
    try:
        with _working_directory_on_path():
            module = importlib.import_module(name)
    except Exception as error:  # a user's module raises whatever it likes
        raise CampaignError(
            f"{what} {named}: {name} cannot be imported from {Path.cwd()} or what is installed ({in_one_line(error)})"
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise CampaignError(
            f"{what} {named}: expected a function {attribute} in {module.__file__}, found {found!r:.60}"
        )
    return module, found


def in_one_line(error: Exception) -> str:
    """Return an error's kind and words, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


@contextmanager
def _working_directory_on_path() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with suppress(ValueError):  # the module may have changed the path itself
            sys.path.remove(folder)
