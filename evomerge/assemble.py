"""The tables: which names a campaign may use, and what they stand for."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from evomerge.errors import CampaignError, did_you_mean
from evomerge.evaluators.classification import ClassificationEvaluator, ClassificationOptions
from evomerge.evaluators.evaluator import Evaluator
from evomerge.evaluators.language import LanguageEvaluator, LanguageOptions
from evomerge.operators.linear import Linear, TaskArithmetic
from evomerge.operators.operator import Operator
from evomerge.operators.ties import Ties
from evomerge.proposers.adamerging import AdaMerging
from evomerge.proposers.cma_es import CmaEs
from evomerge.proposers.gp import Gp
from evomerge.proposers.nsga2 import Nsga2
from evomerge.proposers.proposer import Proposer
from evomerge.proposers.sobol import Sobol
from evomerge.proposers.tpe import Tpe
from evomerge.records import Options

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class EvaluatorEntry:
    """How an evaluator is made: its options, and a factory (options, tasks, the base's folder) -> Evaluator."""

    options_type: type[Options]
    make: Callable[[Any, Sequence[str], Path], Evaluator]


_OPERATORS: tuple[type[Operator], ...] = (Linear, TaskArithmetic, Ties)
_PROPOSERS: tuple[type[Proposer], ...] = (Sobol, CmaEs, Tpe, Nsga2, Gp, AdaMerging)

OPERATORS = {operator.name: operator for operator in _OPERATORS}
PROPOSERS = {proposer.name: proposer for proposer in _PROPOSERS}
EVALUATORS = {
    "classification": EvaluatorEntry(
        ClassificationOptions, lambda options, tasks, _: ClassificationEvaluator(options, tasks)
    ),
    "language": EvaluatorEntry(LanguageOptions, LanguageEvaluator),
}


def look_up(table: Mapping[str, Entry], name: object, kind: str, where: str) -> Entry:
    """Return what a name stands for. Raises: CampaignError that names the place and what is known."""
    if name not in table:
        raise CampaignError(f"{where}: unknown {kind} {name!r}{did_you_mean(str(name), table)}")
    return table[str(name)]
