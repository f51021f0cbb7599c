from pathlib import Path

import pytest

from benchmarks.page import write_run
from evomerge.campaign.campaign import read_campaign
from evomerge.campaign.sections import BudgetSection, StageSection
from evomerge.families.family import FamilySummary
from evomerge.ledger.location import locate
from evomerge.run.run import Run, open_run
from evomerge.run.search import search


@pytest.fixture(scope="session")
def made_up(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run of 121 trials, some of which failed, were stopped, or wait; its numbers are made up."""
    folder = tmp_path_factory.mktemp("page") / "made-up"
    write_run(locate(folder), 121)
    return open_run(folder)


@pytest.fixture(scope="session")
def small_run(small_digits: FamilySummary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished campaign on real files."""
    campaign = read_campaign(small_digits.campaign)
    update = {"search": [StageSection(proposer="sobol")], "budget": BudgetSection(evaluations=12)}
    folder = tmp_path_factory.mktemp("page") / "digits"
    search(campaign.model_copy(update=update), folder)
    return folder
