"""What docs/own.md shows is true: its operator and its proposer are searched, resumed and exported."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.errors import CampaignError
from evomerge.publish.export import export_trial, merge_recipe
from evomerge.run.search import search

PAGE = (Path(__file__).parent.parent / "docs" / "own.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """What the page says in a campaign; its parts lie in the working directory."""
    (tmp_path / "own_parts.py").write_text("\n".join(blocks("python")))
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    for block in blocks("yaml"):
        found |= yaml.safe_load(block)
    return found


def test_they_are_short() -> None:
    assert all(len(block.splitlines()) <= 40 for block in blocks("python"))


def test_they_are_searched_resumed_and_exported(
    sections: dict[str, object], campaign_file: Callable[..., Path], tmp_path: Path
) -> None:
    run = search(read_campaign(campaign_file(**sections, budget={"evaluations": 5})), tmp_path / "run")
    assert not [trial.failure for trial in run.trials if trial.failure]
    run = search(read_campaign(campaign_file(**sections, budget={"evaluations": 9})), tmp_path / "run")
    whole = search(read_campaign(campaign_file(**sections, budget={"evaluations": 9})), tmp_path / "whole")
    assert [trial.point for trial in run.trials] == [trial.point for trial in whole.trials]
    export_trial(run, run.trials[3], tmp_path / "merged", lambda _: None)
    merge_recipe(tmp_path / "merged" / "recipe.yaml", tmp_path / "again", "cpu", lambda _: None)
    one, other = (tmp_path / name / "model.safetensors" for name in ("merged", "again"))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"operator": {"name": "own_parts:Missing"}}, "operator.name: operator own_parts:Missing: expected a function"),
        ({"operator": {"name": "nowhere:Rule"}}, "operator.name: operator nowhere:Rule: nowhere cannot be imported"),
        ({"search": [{"proposer": "own_parts:np"}]}, r"search\[0\].proposer: proposer own_parts:np: expected"),
        ({"search": [{"proposer": "own_parts:rank"}]}, r"own_parts:rank: expected a class with an options_type, found"),
        ({"search": [{"proposer": "own_parts:Walk", "stop": 1}]}, "unknown key; did you mean 'step'"),
    ],
)
def test_what_is_no_part_is_said(
    sections: dict[str, object], make_campaign: Callable[..., Campaign], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(CampaignError, match=message):
        make_campaign(**{**sections, **changes})
