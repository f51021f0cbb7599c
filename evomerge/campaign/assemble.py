"""The tables: which names a campaign may use, and what they stand for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from evomerge.errors import CampaignError, did_you_mean
from evomerge.evaluators.callable import CallableEvaluator, CallableOptions
from evomerge.evaluators.classification import ClassificationEvaluator, ClassificationOptions
from evomerge.evaluators.embedding import EmbeddingEvaluator, EmbeddingOptions
from evomerge.evaluators.evaluator import Evaluator, Wanted
from evomerge.evaluators.generation import GenerationEvaluator, GenerationOptions
from evomerge.evaluators.importing import load
from evomerge.evaluators.language import LanguageEvaluator, LanguageOptions
from evomerge.evaluators.lm_eval import LmEvalEvaluator
from evomerge.evaluators.lm_eval_tasks import LmEvalOptions
from evomerge.operators.arcee_fusion import ArceeFusion
from evomerge.operators.breadcrumbs import Breadcrumbs, BreadcrumbsTies
from evomerge.operators.chunked import Chunked
from evomerge.operators.consensus import Consensus
from evomerge.operators.dare import DareLinear, DareTies
from evomerge.operators.della import Della, DellaLinear
from evomerge.operators.iso import IsoC, IsoCts
from evomerge.operators.knots import Knots
from evomerge.operators.linear import Linear, TaskArithmetic
from evomerge.operators.lora import Lora
from evomerge.operators.model_stock import ModelStock
from evomerge.operators.nearswap import NearSwap
from evomerge.operators.opcm import Opcm
from evomerge.operators.operator import Operator
from evomerge.operators.partitioned import Partitioned
from evomerge.operators.passthrough import Passthrough
from evomerge.operators.pcb import Pcb
from evomerge.operators.ram import Ram, RamPlusTl
from evomerge.operators.sce import Sce
from evomerge.operators.spherical import Karcher, MultiSlerp, NuSlerp, Slerp
from evomerge.operators.ties import Ties, TiesPaper
from evomerge.operators.tsv import TsvM
from evomerge.operators.widen import Widen
from evomerge.proposers.adamerging import AdaMerging
from evomerge.proposers.atlas import Atlas
from evomerge.proposers.bayesian_map import BayesianMap
from evomerge.proposers.catcma import CatCma
from evomerge.proposers.cma_es import CmaEs
from evomerge.proposers.expert_merging import ExpertMerging
from evomerge.proposers.fw_merging import FwMerging
from evomerge.proposers.gp import Gp
from evomerge.proposers.gradient_front import GradientFront
from evomerge.proposers.grid import Grid
from evomerge.proposers.llm import Llm
from evomerge.proposers.lorahub import LoraHub
from evomerge.proposers.map import Map
from evomerge.proposers.model_swarms import ModelSwarms
from evomerge.proposers.nested_map import NestedMap
from evomerge.proposers.nsga2 import Nsga2
from evomerge.proposers.nsga3 import Nsga3
from evomerge.proposers.proposer import Proposer
from evomerge.proposers.qlognehvi import QLogNehvi
from evomerge.proposers.random import Random
from evomerge.proposers.self_positioning import SelfPositioning
from evomerge.proposers.sobol import Sobol
from evomerge.proposers.surrogate import Surrogate
from evomerge.proposers.tpe import Tpe
from evomerge.records import Options

Entry = TypeVar("Entry")


@dataclass(frozen=True, slots=True)
class EvaluatorEntry:
    """How an evaluator is made: its options, and a factory (options, wanted metrics, the base's folder) -> Evaluator.

    paths: the options that are paths, relative to the campaign file.
    """

    options_type: type[Options]
    make: Callable[[Any, Wanted, Path], Evaluator]
    paths: tuple[str, ...] = ()


_OPERATORS: tuple[type[Operator], ...] = (
    ArceeFusion,
    Breadcrumbs,
    BreadcrumbsTies,
    Chunked,
    Consensus,
    DareLinear,
    DareTies,
    Della,
    DellaLinear,
    IsoC,
    IsoCts,
    Knots,
    Linear,
    TaskArithmetic,
    Lora,
    ModelStock,
    NearSwap,
    Opcm,
    Partitioned,
    Passthrough,
    Pcb,
    Ram,
    RamPlusTl,
    Sce,
    Slerp,
    NuSlerp,
    MultiSlerp,
    Karcher,
    Ties,
    TiesPaper,
    TsvM,
    Widen,
)
_PROPOSERS: tuple[type[Proposer], ...] = (
    AdaMerging,
    Atlas,
    BayesianMap,
    CatCma,
    CmaEs,
    ExpertMerging,
    FwMerging,
    Gp,
    GradientFront,
    Grid,
    Llm,
    LoraHub,
    Map,
    ModelSwarms,
    NestedMap,
    Nsga2,
    Nsga3,
    QLogNehvi,
    Random,
    SelfPositioning,
    Sobol,
    Surrogate,
    Tpe,
)

OPERATORS = {operator.name: operator for operator in _OPERATORS}
PROPOSERS = {proposer.name: proposer for proposer in _PROPOSERS}
EVALUATORS = {
    "callable": EvaluatorEntry(CallableOptions, lambda options, wanted, _: CallableEvaluator(options, wanted)),
    "classification": EvaluatorEntry(
        ClassificationOptions, lambda options, wanted, _: ClassificationEvaluator(options, wanted), ("data",)
    ),
    "embedding": EvaluatorEntry(EmbeddingOptions, EmbeddingEvaluator, ("data",)),
    "generation": EvaluatorEntry(GenerationOptions, GenerationEvaluator, ("data",)),
    "language": EvaluatorEntry(LanguageOptions, LanguageEvaluator, ("data",)),
    "lm_eval": EvaluatorEntry(LmEvalOptions, LmEvalEvaluator, ("include_path",)),
}
SEVERAL = "several"  # the kind of a list of these


def operator_type(name: object, where: str) -> type[Operator]:
    """Return the operator of a name, or a user's own, ``module:Class``. Raises: CampaignError that names the place."""
    return _own_or_ours(OPERATORS, name, "operator", where)


def proposer_type(name: object, where: str) -> type[Proposer]:
    """Return the proposer of a name, or a user's own, ``module:Class``. Raises: CampaignError that names the place."""
    return _own_or_ours(PROPOSERS, name, "proposer", where)


def _own_or_ours(table: Mapping[str, Entry], name: object, kind: str, where: str) -> Entry:
    if not isinstance(name, str) or ":" not in name:
        return look_up(table, name, kind, where)
    _, found = load(name, f"{where}: {kind}")
    if not issubclass(getattr(found, "options_type", object), Options):
        raise CampaignError(f"{where}: {kind} {name}: expected a class with an options_type, found {found!r:.60}")
    found.name = name  # type: ignore[attr-defined]  # what recipes call it, so that they find it again
    return cast(Entry, found)


def look_up(table: Mapping[str, Entry], name: object, kind: str, where: str) -> Entry:
    """Return what a name stands for. Raises: CampaignError that names the place and what is known."""
    if name not in table:
        raise CampaignError(f"{where}: unknown {kind} {name!r}{did_you_mean(str(name), table)}")
    return table[str(name)]
