"""What is searched: the one interface of families of real models and of analytic problems.

Shape letters: M objectives, F points of a front.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.search.searchers import Section
from evomerge.campaign.campaign import Campaign
from evomerge.campaign.plan import Plan, StageSpace
from evomerge.records import Candidate, Floats, Measurement, Split


class Scores(Protocol):
    """Scores a candidate on a split's items, as ``evomerge.scorer.scorer.Scorer`` does."""

    def configure(self, stage_space: StageSpace) -> None:
        """Read the points of candidates by the space of a stage."""

    def score(self, subject: Candidate, split: Split) -> Measurement:
        """Raises: CandidateError if the candidate fails."""


@dataclass(frozen=True)
class Opened:
    """A problem with one seed's splits, ready to score.

    references: base or expert -> maximized values (M,) on test items; searched: the same models' measurements on search
    items. campaign: whose space the stages' own spaces are changes of.
    """

    campaign: Campaign
    plan: Plan
    scorer: Scores
    references: Mapping[str, Floats]
    searched: Mapping[str, Measurement]


class Problem(Protocol):
    """A problem before it has a seed; identity is what defines it, as JSON."""

    @property
    def name(self) -> str:
        """Name on the command line."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What defines it, as JSON: results of another identity are of another problem."""

    @property
    def front(self) -> Floats | None:
        """Points (F, M) of the true front, evenly spaced, where it is known."""

    def campaign(self, search: Section, evaluations: int, seed: int) -> Campaign:
        """The campaign that a searcher's stages are made from."""

    def plan(self, seed: int) -> Plan:
        """The plan with one seed's splits, without the weights."""

    def open(self, seed: int) -> Opened:
        """Load what scores candidates."""
