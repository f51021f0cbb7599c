"""Families of real models as problems.

digits4                 four objectives, one coefficient an expert and layer
digits4:2               the first two objectives alone; all experts stay
digits4:model           one coefficient an expert (or: layer, module, tensor)
digits4:2:model         both
text:small              text with a smaller model and short passages: a twentieth of the time, for long comparisons
"""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.search.problem import Opened
from benchmarks.search.searchers import Section
from evomerge.campaign.campaign import Campaign, read_campaign
from evomerge.campaign.plan import Plan, make_plan
from evomerge.campaign.references import input_recipes
from evomerge.campaign.sections import BudgetSection, SpaceSection
from evomerge.errors import CampaignError
from evomerge.families.family import make
from evomerge.families.recipes import TextRecipe
from evomerge.front.front import maximized
from evomerge.records import Floats

FOLDER = Path(".cache/families")
GROUPS = ("model", "layer", "module", "tensor")
SMALL = {"text": TextRecipe(hidden=64, layers=3, mlp=128, item_characters=60)}


class FamilyProblem:
    """A variant of a family, which is built if it is not there yet; the seed draws the splits too.

    Raises: CampaignError for a variant that is none.
    """

    front: Floats | None = None

    def __init__(self, name: str) -> None:
        self.name = name
        family, *variants = name.split(":")
        if variants[:1] == ["small"] and family in SMALL:
            del variants[0]
            self._summary = make(family, FOLDER / f"{family}-small", recipe=SMALL[family])
        else:
            self._summary = make(family, FOLDER / family)
        self._campaign = read_campaign(self._summary.campaign)
        for variant in variants:
            self._campaign = _varied(self._campaign, variant)

    @cached_property
    def identity(self) -> Mapping[str, Any]:
        """The family's recipe, and what of its campaign is not the search."""
        kept = self._campaign.model_dump(mode="json", include={"operator", "space", "objectives"})
        return {"family": self._summary.recipe_hash, "split": self._campaign.split.model_dump(), **kept}

    def campaign(self, search: Section, evaluations: int, seed: int) -> Campaign:
        """The family's own campaign with another search."""
        update = {"search": search, "budget": BudgetSection(evaluations=evaluations), "seed": seed}
        return self._campaign.model_copy(update=update)

    def plan(self, seed: int) -> Plan:
        """The plan with one seed's splits."""
        return make_plan(self._campaign.model_copy(update={"seed": seed}))

    def open(self, seed: int) -> Opened:
        """Load the models, and score base and experts."""
        from evomerge.scorer.scorer import Scorer

        scorer = Scorer(self.plan(seed))
        plan = scorer.plan
        inputs = input_recipes(plan)
        tested = {name: maximized(scorer.score(recipe, "test"), plan.objectives) for name, recipe in inputs.items()}
        searched = {name: scorer.score(recipe, "search") for name, recipe in inputs.items()}
        return Opened(self._campaign, plan, scorer, tested, searched)


def _varied(campaign: Campaign, variant: str) -> Campaign:
    if variant.isdigit() and 0 < int(variant) <= len(campaign.objectives):
        return campaign.model_copy(update={"objectives": campaign.objectives[: int(variant)]})
    if variant in GROUPS:
        sections = {**campaign.space.model_dump(exclude_unset=True), "groups": variant}
        return campaign.model_copy(update={"space": SpaceSection.model_validate(sections)})
    raise CampaignError(
        f"--problems: {campaign.name}:{variant}: expected a number of objectives up to {len(campaign.objectives)}, or "
        f"one of {', '.join(GROUPS)}"
    )
