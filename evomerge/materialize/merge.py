"""What stands among the experts of a merge: checkpoints, adapters, and merges, which are merged once more."""

from dataclasses import dataclass, replace

from evomerge.materialize.adapter import Adapter
from evomerge.materialize.checkpoint import Checkpoint
from evomerge.operators.operator import Operator
from evomerge.records import Recipe


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Merge:
    """A merge of the same base as an expert: its recipe, and what it is made of; name says in messages whose it is."""

    name: str
    recipe: Recipe
    operator: Operator
    base: Checkpoint
    experts: "tuple[Source, ...]"

    @property
    def form(self) -> Checkpoint:
        """A checkpoint with its configuration, names and shapes, which are the base's."""
        return replace(self.base, name=self.name)


Source = Checkpoint | Adapter | Merge
