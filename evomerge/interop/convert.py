"""``evomerge import``: a file of mergekit's becomes one of ours."""

from pathlib import Path
from typing import Literal

from evomerge.campaign.recipe_file import write_recipe
from evomerge.errors import CampaignError, InputError
from evomerge.interop.document import is_mergekit
from evomerge.interop.genome import is_genome, read_genome
from evomerge.interop.read import read_mergekit
from evomerge.strict import read_yaml


def convert(path: Path, out: Path) -> tuple[Literal["campaign", "recipe"], list[str]]:
    """Write a campaign (of a mergekit-evolve configuration) or a recipe to ``out``; return which, and what to know.

    Raises: InputError if ``out`` exists or the file is neither.
    """
    if out.exists():
        raise InputError(f"{out}: expected a new file; choose another --out")
    data = read_yaml(path)
    if is_genome(data):
        text, notes = read_genome(path)
        out.write_text(text)
        return "campaign", notes
    if is_mergekit(data):
        read = read_mergekit(path)
        write_recipe(read.recipe, out)
        return "recipe", list(read.notes)
    raise CampaignError(
        f"{path}: expected a configuration of mergekit (merge_method) or mergekit-evolve (genome), found "
        f"{', '.join(map(str, data)) or 'nothing'}"
    )
