"""Parity with mergekit from its own configuration files on: reader, materializer and operators together."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evomerge.interop.read import read_mergekit
from evomerge.materialize.materializer import Materializer

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = sorted(path.stem for path in (GOLDEN / "configs").glob("*.yaml"))
DETERMINISTIC = [name for name in CONFIGS if not name.startswith("zz_")]

# Relative to a tensor's largest entry. float32: a few roundings (2^-24) of sums in another order. bfloat16 computed by
# mergekit: up to eight of its own roundings (2^-8) of terms of about that size. Rounded at the end: one step at a tie.
TOLERANCE = {"bf16_linear": 4 * 2.0**-8, "bf16_task_arithmetic": 4 * 2.0**-8, "bf16_out_only_task_arithmetic": 2.0**-8}
EXACT = {"passthrough_a_frankenmerge"}
# Entries may be chosen otherwise if their importance lies at the bound (see test_arcee_fusion).
MAY_BE_APART = {"arcee_fusion_a": 2, "arcee_fusion_b": 2}


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_a_configuration_of_mergekit_gives_its_model(folder: Path, name: str) -> None:
    path = folder / f"{name}.yaml"
    path.write_text((GOLDEN / "configs" / f"{name}.yaml").read_text())
    read = read_mergekit(path)
    assert not read.notes
    held = Materializer(read.base, read.experts, dtype=read.recipe.dtype, output=read.output)
    held.build(read.operator, read.recipe)
    merged = held.resident.module.state_dict()
    reference = load_file(GOLDEN / f"{name}.safetensors")
    assert len(reference) >= 4
    num_apart = 0
    for tensor, expected in reference.items():
        ours = merged[tensor][: len(expected)]
        assert ours.dtype == expected.dtype
        bound = TOLERANCE.get(name, 8 * 2.0**-24) * float(expected.abs().max()) * (name not in EXACT)
        num_apart += int(((ours.double() - expected.double()).abs() > bound).sum())
    assert num_apart <= MAY_BE_APART.get(name, 0)


def test_the_frankenmerge_has_its_depth(folder: Path) -> None:
    path = folder / "passthrough.yaml"
    path.write_text((GOLDEN / "configs" / "passthrough_a_frankenmerge.yaml").read_text())
    read = read_mergekit(path)
    held = Materializer(read.base, read.experts, dtype="float32", output=read.output)
    held.build(read.operator, read.recipe)
    module = held.resident.module
    assert module.config.num_hidden_layers == 6  # type: ignore[union-attr]
    with torch.inference_mode():
        generated = module.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3, do_sample=False)  # type: ignore[operator]
    assert generated.shape == (1, 6)


@pytest.mark.parametrize("name", sorted(set(CONFIGS) - set(DETERMINISTIC)))
def test_random_masks_are_mergekits_in_distribution(folder: Path, name: str) -> None:
    """How much is kept, how large it is, and how much of the task vectors it holds; of some 14,000 entries."""
    path = folder / f"{name}.yaml"
    path.write_text((GOLDEN / "configs" / f"{name}.yaml").read_text())
    read = read_mergekit(path)
    assert read.recipe.options["rescale"] == "l1"
    held = Materializer(read.base, read.experts, dtype="float32")
    held.build(read.operator, read.recipe)
    merged = held.resident.module.state_dict()
    base, *experts = (load_file(GOLDEN / f"{name}.safetensors") for name in ("base", "v1", "v2", "v3"))
    reference = load_file(GOLDEN / f"{name}.safetensors")
    whole = [
        sum(weight * (expert[tensor] - base[tensor]) for weight, expert in zip((0.5, 0.3, 0.2), experts, strict=True))
        for tensor in reference
    ]
    exact = torch.cat([torch.as_tensor(part).flatten() for part in whole]).double()
    figures = []
    for found in (reference, merged):
        change = torch.cat([(found[tensor] - base[tensor]).flatten() for tensor in reference]).double()
        kept = (change != 0).double().mean()
        figures.append([float(kept), float(change.square().mean().sqrt()), float(change @ exact / (exact @ exact))])
    for theirs, ours in zip(*figures, strict=True):
        assert ours == pytest.approx(theirs, rel=0.03)  # their standard errors are 0.5 to 1 %
