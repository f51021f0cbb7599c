"""The reference pages say of every operator and proposer what it computes, where it is from and when to use it."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from evomerge.campaign.assemble import OPERATORS, PROPOSERS

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("page", "table"), [("operators", OPERATORS), ("proposers", PROPOSERS)])
def test_every_part_has_a_formula_a_source_and_a_use(reference: ModuleType, page: str, table: dict[str, type]) -> None:
    sections = re.split(r"^## ", getattr(reference, page)(), flags=re.MULTILINE)[1:]
    by_name = {section.splitlines()[0]: section for section in sections}
    assert by_name.keys() == table.keys()
    needed = {
        "formula": r"^    .*( = |<-| ~ ).*\S",
        "source": r"^\*\*References?:\*\* .*?(arxiv\.org/|doi\.org/|huggingface\.co/|\d{4}|mergekit|Optuna)",
        "use": r"^\*\*When to use:\*\* (\S+\s+){10}",
    }
    lacking = [
        f"{name}: {what}"
        for name, section in by_name.items()
        for what, pattern in needed.items()
        if not re.search(pattern, section, flags=re.MULTILINE | re.DOTALL if what == "source" else re.MULTILINE)
    ]
    assert not lacking, f"write it into the docstring of {lacking}, see docs/reference.py"


def test_the_table_of_choices_names_proposers(reference: ModuleType) -> None:
    before = (DOCS / "proposers.md").read_text(encoding="utf-8").split("{{ proposers }}")[0]
    assert all(f"`{name}`" in before for name in PROPOSERS)


def test_code_in_docstrings_stays_as_it_is(reference: ModuleType) -> None:
    def documented() -> None:
        """First a_b * c.

            theta = a_b * c_d

        Use ``x_y:
        z_w`` with - no list - and
        - a list
        - of two.
        Reference: Someone 2020, arxiv.org/abs/1234.56789.

        Shape letters: K experts.
        """

    assert reference._prose(documented) == (
        "First a\\_b \\* c.\n\n    theta = a_b * c_d\n\nUse `x_y:\nz_w` with - no list - and\n\n- a list\n- of two.\n\n"
        "**Reference:** Someone 2020, [arxiv.org/abs/1234.56789](https://arxiv.org/abs/1234.56789)."
    )
