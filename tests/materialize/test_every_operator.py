"""Every registered operator on real architectures: all tensors are merged, rebuilt alike, and written as they are."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from tiny_adapters import random_factors, write_adapter
from torch import nn

from evomerge.campaign.assemble import OPERATORS
from evomerge.campaign.plan import make_recipe
from evomerge.materialize.adapter import Adapter, open_expert
from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.materialize.resident import empty_model
from evomerge.operators.operator import Operator
from evomerge.publish.export import merge_recipe
from evomerge.records import Recipe
from evomerge.space.groups import make_groups

Family = Callable[[str, str], list[Path]]
ONE_EXPERT = {"slerp", "nearswap", "arcee_fusion", "passthrough"}
OF_ADAPTERS = {"lora"}
SELDOM_MOVES = {"nearswap", "arcee_fusion", "consensus", "pcb", "lora"}
"""Operators that leave a tensor as it is where no entry is worth it, or no adapter has factors of it."""


def opened(
    family: Family, name: str, kind: str, dtype: str
) -> tuple[Operator, Checkpoint, dict[str, Checkpoint | Adapter]]:
    base, *experts = (open_checkpoint(folder.name, folder) for folder in family(kind, dtype))
    used: list[Checkpoint | Adapter] = [*(experts[:1] if name in ONE_EXPERT else experts)]
    if name in OF_ADAPTERS:
        used = [adapter_beside(expert, base, seed) for seed, expert in enumerate(experts)]
    return OPERATORS[name](), base, {expert.name: expert for expert in used}


def adapter_beside(expert: Checkpoint, base: Checkpoint, seed: int) -> Checkpoint | Adapter:
    """An adapter of the attention and MLP matrices, written once."""
    model = empty_model(base)
    folder = expert.folder.with_name(f"{expert.name}-adapter")
    if not folder.exists():
        modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
        write_adapter(folder, random_factors(model, modules, seed=seed))
    return open_expert(expert.name, folder, model)


def recipe(
    operator: Operator,
    base: Checkpoint,
    experts: dict[str, Checkpoint | Adapter],
    held: Materializer,
    factor: float = 1.0,
) -> Recipe:
    """Defaults everywhere, but ``factor`` times the first parameter's in the last tensor."""
    groups = make_groups(held.resident.layout.tensors, "tensor")
    values = {
        spec.name: np.full((len(experts) if spec.per_expert else 1, len(groups)), spec.default)
        for spec in operator.parameters
    }
    if operator.parameters:
        values[operator.parameters[0].name][:, -1] *= factor
    return make_recipe(operator, base, experts, base.dtype, groups, values)


@pytest.mark.parametrize("kind", ["vit", "tied"])
@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_every_tensor_is_merged(family: Family, kind: str, name: str) -> None:
    """Not 8 of a ViT's 72 tensors with the rest left out: each is written, finite, and most have moved."""
    operator, base, experts = opened(family, name, kind, "float32")
    held = Materializer(base, list(experts.values()), dtype="float32")
    held.out_P.fill_(float("nan"))
    held.build(operator, recipe(operator, base, experts, held))
    tensors = dict(held.resident.module.named_parameters())
    before = tiny.load(base.folder, "float32").state_dict()
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    moved = [name for name, tensor in tensors.items() if not torch.equal(tensor, before[name])]
    assert len(moved) == len(tensors) or name in SELDOM_MOVES
    assert moved


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_a_rebuild_of_what_changed_equals_a_fresh_build(family: Family, name: str) -> None:
    operator, base, experts = opened(family, name, "llama", "bfloat16")
    held, fresh = (Materializer(base, list(experts.values()), dtype="bfloat16") for _ in range(2))
    first, second = (recipe(operator, base, experts, held, factor) for factor in (1.0, 0.9))
    held.build(operator, first)
    held.build(operator, second)
    fresh.build(OPERATORS[name](), second)
    assert torch.equal(held.out_P, fresh.out_P)


@pytest.mark.parametrize("name", sorted(OPERATORS))
def test_a_recipe_file_builds_what_the_materializer_holds(family: Family, name: str, tmp_path: Path) -> None:
    operator, base, experts = opened(family, name, "vit", "bfloat16")
    held = Materializer(base, list(experts.values()), dtype="bfloat16")
    held.build(operator, recipe(operator, base, experts, held))
    paths = ", ".join(f"{expert}: {checkpoint.folder}" for expert, checkpoint in experts.items())
    (tmp_path / "recipe.yaml").write_text(f"base: {base.folder}\nexperts: {{{paths}}}\noperator: {{name: {name}}}\n")
    assert (
        merge_recipe(tmp_path / "recipe.yaml", tmp_path / "merged", "cpu", lambda _: None).weights
        == held.weights_hash()
    )
