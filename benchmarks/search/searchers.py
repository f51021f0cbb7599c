"""Searchers by name: a proposer, ``auto``, another tool's search as it ships, or stages of one's own.

nsga2                                     a proposer with its default options
auto                                      what evomerge chooses itself
mergekit_evolve                           an entry of PEERS
mine=stages.yaml                          a campaign file, of which ``search:`` counts: a list of stages
wide=[{proposer: cma_es, sigma: 0.3}]     the same, written in place
"""

from pathlib import Path
from typing import Any, Literal

import yaml

from evomerge.campaign.assemble import PROPOSERS, proposer_type
from evomerge.campaign.sections import StageSection
from evomerge.errors import CampaignError, did_you_mean
from evomerge.strict import parse, read_yaml

Section = Literal["auto"] | list[StageSection]

PEERS: dict[str, list[dict[str, Any]]] = {
    "pymoo_nsga2": [{"proposer": "benchmarks.search.peers:PymooNsga2"}],
    "mergekit_evolve": [{"proposer": "benchmarks.search.peers:MergekitEvolve"}],
    "map_published": [{"proposer": "benchmarks.search.peers:MapPublished", "space": {"groups": "model"}}],
    "evo_merging": [{"proposer": "cma_es", "sigma": 0.05, "population": 20}],  # arxiv.org/abs/2509.12951, its code
}


def read_searchers(text: str) -> dict[str, Section]:
    """Return label -> search section for a comma-separated list; commas in brackets do not separate.

    Raises: CampaignError for an unknown name, a label given twice, or a section that is no list of stages.
    """
    found: dict[str, Section] = {}
    for entry in _split(text):
        label, is_named, given = (part.strip() for part in entry.partition("="))
        if label in found:
            raise CampaignError(f"--searchers: {label} is given twice")
        found[label] = _stages(label, given) if is_named else _known(label)
    return found


def _known(name: str) -> Section:
    if name == "auto":
        return "auto"
    if name in PEERS:
        return _sections(name, PEERS[name])
    if name in PROPOSERS:
        return [StageSection(proposer=name)]
    known = ["auto", *PROPOSERS, *PEERS]
    raise CampaignError(f"--searchers: unknown searcher {name!r}{did_you_mean(name, known)}")


def _stages(label: str, given: str) -> Section:
    stages = read_yaml(Path(given)).get("search") if given.endswith((".yaml", ".yml")) else yaml.safe_load(given)
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        raise CampaignError(f"--searchers: {label}: expected a list of stages, such as [{{proposer: nsga2}}]")
    return _sections(label, stages)


def _sections(label: str, stages: list[dict[str, Any]]) -> list[StageSection]:
    """Gather what is no key of a stage under its options, as a campaign's reader does, and check the names."""
    sections = []
    for number, stage in enumerate(stages):
        own = {key: value for key, value in stage.items() if key in StageSection.model_fields and key != "options"}
        options = {key: value for key, value in stage.items() if key not in own}
        section = parse(StageSection, {**own, "options": options}, f"{label}[{number}]")
        proposer_type(section.proposer, f"{label}[{number}].proposer")
        sections.append(section)
    return sections


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]
