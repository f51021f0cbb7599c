from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint
from evomerge.materialize.materializer import Materializer


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], list[Path]]:
    """(kind, dtype) -> folders of the base and two experts, written once."""
    root = tmp_path_factory.mktemp("tiny")

    @cache
    def make(kind: str, dtype: str) -> list[Path]:
        return tiny.write_family(kind, dtype, root / f"{kind}-{dtype}")

    return make


@pytest.fixture(scope="session")
def checkpoints(family: Callable[[str, str], list[Path]]) -> Callable[[str, str], list[Checkpoint]]:
    def opened(kind: str, dtype: str) -> list[Checkpoint]:
        return [open_checkpoint(folder.name, folder) for folder in family(kind, dtype)]

    return opened


@pytest.fixture
def materializer(checkpoints: Callable[[str, str], list[Checkpoint]]) -> Callable[[str, str], Materializer]:
    """(kind, dtype) -> a fresh materializer of the base and two experts."""

    def make(kind: str, dtype: str = "float32") -> Materializer:
        base, *experts = checkpoints(kind, dtype)
        return Materializer(base, experts, dtype=dtype)

    return make
