"""A merge of adapters as an adapter: exactly what is added to the base, in PEFT's layout.

The weighted sum c_1 B_1 A_1 + ... + c_K B_K A_K is one product, [c_1 B_1 ... c_K B_K] times the A's stacked: its rank
is the sum of theirs. PEFT calls that combination ``cat``. Nothing is truncated.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evomerge.errors import EvoMergeError, InputError
from evomerge.kernels.layout import Layout
from evomerge.kernels.sources import LowRank, Sources
from evomerge.materialize.adapter import CONFIG, WEIGHTS, Adapter, open_expert
from evomerge.materialize.checkpoint import Checkpoint, hub_id
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.residence import Place
from evomerge.materialize.resident import empty_model
from evomerge.materialize.write import new_folder
from evomerge.operators.linear import TaskArithmetic
from evomerge.operators.lora import Lora
from evomerge.operators.operator import LinearOperator, Operator
from evomerge.records import Recipe

PREFIX = "base_model.model."


def why_no_adapter(operator: Operator, experts: Mapping[str, Checkpoint | Adapter]) -> str | None:
    """Return why a merge of these experts is no adapter, or None; further reasons may show in its numbers."""
    if full := [name for name, expert in experts.items() if not isinstance(expert, Adapter)]:
        return f"expert {full[0]} is a full checkpoint; expected adapters only"
    if not (isinstance(operator, Lora) or (operator.reads_factors and operator.differentiable)):
        return f"{operator.name} is no weighted sum of adapters; expected task_arithmetic, linear or lora"
    return None


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge adds to the base, tensor by tensor; layout and module are the model's."""

    factors: LowRank
    layout: Layout
    module: nn.Module


def merged_adapter(materializer: Materializer, operator: Operator, recipe: Recipe) -> Merged:
    """Return a recipe's merge as one adapter. Raises: InputError that says why it is none."""
    sources, weights_KS, state = materializer.parts(operator, recipe)
    if isinstance(operator, Lora):
        factors = operator.combined(weights_KS, state)
    else:
        assert isinstance(operator, LinearOperator)
        factors = _concatenated(operator.directions(sources, state), weights_KS, operator.name)
    return Merged(factors, materializer.layout, materializer.resident.module)


def _concatenated(sources: Sources, weights_KS: Tensor, operator: str) -> LowRank:
    experts = [expert for expert in sources.experts if isinstance(expert, LowRank)]
    if len(experts) < len(sources.experts):
        raise InputError(f"--as-adapter: what {operator} adds to the base is no product of factors")
    names = [tensor.name for tensor in sources.layout.tensors]
    for s, share in enumerate(weights_KS[0].tolist()):
        if share != 1:
            raise InputError(
                f"--as-adapter: {operator} multiplies the base's {names[s]} by {share:g}, and an adapter only adds to "
                "it; leave the option out"
            )
    if whole := sorted({names[s] for expert in experts for s in expert.factors.keys() - expert.scalings.keys()}):
        raise InputError(
            f"--as-adapter: an expert saves {whole[0]} whole (modules_to_save or bias); leave the option out"
        )
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    for s in sorted({s for expert in experts for s in expert.factors}):
        pairs = [
            (float(weights_KS[k, s]) * expert.factors[s][0], expert.factors[s][1])
            for k, expert in enumerate(experts, start=1)
            if s in expert.factors
        ]
        factors[s] = torch.cat([left for left, _ in pairs], dim=1), torch.cat([right for _, right in pairs])
    return LowRank(factors, transposed=frozenset().union(*(expert.transposed for expert in experts)))


def write_adapter(
    materializer: Materializer, merged: Merged, base: Checkpoint, out: Path, add: Callable[[Path], None]
) -> str:
    """Write the merge that a materializer holds as an adapter of the base; return the SHA-256 of the merged tensors.

    What was written is read again and merged into the base, and must give the same bits before it is moved into place.
    Raises: InputError if ``out`` exists and is not empty; EvoMergeError if the check fails.
    """
    expected = materializer.weights_hash()
    place = Place(device=str(materializer.out_P.device), residence="resident")
    with new_folder(out) as folder:
        _write_files(merged, base, folder)
        add(folder)
        dtype = str(materializer.out_P.dtype).removeprefix("torch.")
        materializer.let_go()
        found = adapted(base, folder, dtype, place).weights_hash()
        if found != expected:
            raise EvoMergeError(
                f"the base with the written adapter holds other tensors ({found[:12]}) than the merge ({expected[:12]})"
            )
    return expected


def _write_files(merged: Merged, base: Checkpoint, folder: Path) -> None:
    """Write the two files that PEFT loads."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for s, (left, right) in merged.factors.factors.items():
        name = merged.layout.tensors[s].name.removesuffix(".weight")
        owner = merged.module.get_submodule(name)
        b, a = (right.T, left.T) if s in merged.factors.transposed else (left, right)
        ranks[name] = len(a)
        if isinstance(owner, nn.Embedding):
            named = {f"{name}.lora_embedding_A": a, f"{name}.lora_embedding_B": b}
        else:
            further = merged.layout.tensors[s].shape[2:]  # of a convolution
            a_shape, b_shape = (len(a), -1, *further), (*b.shape, *(1 for _ in further))
            named = {f"{name}.lora_A.weight": a.reshape(a_shape), f"{name}.lora_B.weight": b.reshape(b_shape)}
        tensors |= {PREFIX + key: tensor.cpu().contiguous() for key, tensor in named.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    is_stored_transposed = any(type(merged.module.get_submodule(name)).__name__ == "Conv1D" for name in ranks)
    config = _config(merged.module, ranks) | {
        "base_model_name_or_path": hub_id(base.folder) or str(base.folder),
        "fan_in_fan_out": is_stored_transposed,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _config(module: nn.Module, ranks: Mapping[str, int]) -> dict[str, Any]:
    """Return PEFT's configuration: scaling 1 everywhere, and the rank of each module."""
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    is_causal = type(module).__name__.endswith("ForCausalLM")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "inference_mode": True,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": _targets(module, list(ranks)),
        "bias": "none",
        "lora_dropout": 0.0,
    }


def _targets(module: nn.Module, names: Sequence[str]) -> list[str]:
    """Return the last parts of the modules' names where these mean no other module, else the whole names."""
    short = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in module.named_modules() if name.rpartition(".")[2] in short}
    return sorted(short if meant == set(names) else names)


def adapted(base: Checkpoint, folder: Path, dtype: str, place: Place) -> Materializer:
    """Return a materializer whose model is the base with the adapter of a folder merged into it."""
    adapter = open_expert("the adapter", folder, empty_model(base))
    held = Materializer(base, [adapter], dtype=dtype, place=place)
    operator = TaskArithmetic()
    recipe = Recipe(
        operator=operator.name,
        options={},
        base=str(base.folder),
        experts={"adapter": str(folder)},
        dtype=dtype,
        groups={"model": tuple(tensor.name for tensor in held.layout.tensors)},
        values={"coefficient": ((1.0,),)},
    )
    held.build(operator, recipe)
    return held
