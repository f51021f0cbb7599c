"""The materializer on real models: what is built is the merge, what is priced is its gradient."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evomerge.errors import CandidateError, CheckpointError, EvoMergeError
from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint
from evomerge.materialize.materializer import Materializer
from evomerge.operators.iso import IsoC
from evomerge.operators.linear import Linear, LinearOptions, TaskArithmetic
from evomerge.operators.operator import Operator
from evomerge.operators.pcb import Pcb
from evomerge.operators.ties import Ties, TiesPaper
from evomerge.operators.tsv import TsvM
from evomerge.records import Recipe

Make = Callable[..., Materializer]
Checkpoints = Callable[[str, str], list[Checkpoint]]
ROUNDING = {
    "float32": 2.0**-22,
    "bfloat16": 2.0**-8,
    "float16": 2.0**-11,
}  # of a tensor, relative to its largest weight


def groups_of(materializer: Materializer, num_groups: int = 1) -> dict[str, tuple[str, ...]]:
    """Deal the tensors out to groups in turn, so that neighbours differ."""
    names = [tensor.name for tensor in materializer.layout.tensors]
    return {f"group{g}": tuple(names[g::num_groups]) for g in range(num_groups)}


def recipe(
    materializer: Materializer, operator: Operator, values: Mapping[str, Any], num_groups: int | None = None
) -> Recipe:
    """A recipe with one row an expert; a number a row stands for the whole model."""
    matrices = {name: np.atleast_2d(np.asarray(matrix, dtype=float)) for name, matrix in values.items()}
    if num_groups is None:
        num_groups, matrices = 1, {name: matrix.reshape(-1, 1) for name, matrix in matrices.items()}
    return Recipe(
        operator=operator.name,
        options=operator.options.model_dump(),
        base="base",
        experts={"one": "one", "two": "two"},
        dtype="float32",
        groups=groups_of(materializer, num_groups),
        values={name: tuple(map(tuple, matrix.tolist())) for name, matrix in matrices.items()},
    )


TASK_ARITHMETIC = TaskArithmetic()


def build(materializer: Materializer, coefficients: Sequence[float]) -> None:
    materializer.build(TASK_ARITHMETIC, recipe(materializer, TASK_ARITHMETIC, {"coefficient": coefficients}))


def merged_by_hand(
    checkpoints: Sequence[Checkpoint], coefficients: Mapping[str, Sequence[float]] | Sequence[float], dtype: str
) -> dict[str, Tensor]:
    """Task arithmetic of the loaded models in float64, rounded once; coefficients for all tensors or for each."""
    base, *experts = (dict(tiny.load(checkpoint.folder, dtype).named_parameters()) for checkpoint in checkpoints)
    merged = {}
    for name, tensor in base.items():
        of_tensor = coefficients[name] if isinstance(coefficients, Mapping) else coefficients
        total = tensor.detach().double()
        for coefficient, expert in zip(of_tensor, experts, strict=True):
            total = total + coefficient * (expert[name].detach().double() - tensor.detach().double())
        merged[name] = total.to(getattr(torch, dtype))
    return merged


def assert_close_tensors(module: nn.Module, expected: Mapping[str, Tensor], dtype: str) -> None:
    state = module.state_dict()
    assert expected.keys() <= state.keys()
    for name, tensor in expected.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=2 * ROUNDING[dtype] * largest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", tiny.KINDS)
class TestEveryModel:
    def test_its_parameters_are_views_of_one_buffer(self, materializer: Make, kind: str, dtype: str) -> None:
        held = materializer(kind, dtype)
        storage = held.out_P.untyped_storage().data_ptr()
        parameters = dict(held.resident.module.named_parameters())
        assert parameters.keys() == {tensor.name for tensor in held.layout.tensors}
        assert all(parameter.untyped_storage().data_ptr() == storage for parameter in parameters.values())
        assert all(parameter.dtype == getattr(torch, dtype) for parameter in parameters.values())
        assert len({parameter.data_ptr() for parameter in parameters.values()}) == len(parameters)
        assert not held.resident.module.training, "dropout must be off"

    def test_zero_is_the_base_and_one_is_the_expert_exactly(
        self, materializer: Make, checkpoints: Checkpoints, kind: str, dtype: str
    ) -> None:
        held = materializer(kind, dtype)
        hashes = set()
        for checkpoint, coefficients in zip(checkpoints(kind, dtype), [(0, 0), (1, 0), (0, 1)], strict=True):
            build(held, coefficients)
            expected = tiny.outputs(tiny.load(checkpoint.folder, dtype))
            assert torch.equal(tiny.outputs(held.resident.module), expected)
            assert held.weights_hash() == held.hashes[str(checkpoint.folder)]
            hashes.add(held.weights_hash())
        assert len(hashes) == 3

    def test_a_merge_equals_the_model_loaded_from_tensors_merged_by_hand(
        self, materializer: Make, checkpoints: Checkpoints, kind: str, dtype: str
    ) -> None:
        held = materializer(kind, dtype)
        build(held, (0.4, 0.7))
        expected = merged_by_hand(checkpoints(kind, dtype), (0.4, 0.7), dtype)
        assert_close_tensors(held.resident.module, expected, dtype)
        reloaded = tiny.load(checkpoints(kind, dtype)[0].folder, dtype)
        reloaded.load_state_dict(expected, strict=False)
        if kind == "tied":
            reloaded.tie_weights()
        tolerance = 1e-5 if dtype == "float32" else 0.1
        ours, theirs = tiny.outputs(held.resident.module).float(), tiny.outputs(reloaded).float()
        assert float((ours - theirs).abs().max()) <= tolerance * float(theirs.abs().max())

    def test_buffers_are_those_of_a_loaded_model(
        self, materializer: Make, checkpoints: Checkpoints, kind: str, dtype: str
    ) -> None:
        loaded = dict(tiny.load(checkpoints(kind, dtype)[0].folder, dtype).named_buffers())
        ours = dict(materializer(kind, dtype).resident.module.named_buffers())
        assert ours.keys() == loaded.keys()
        assert kind == "vit" or "model.rotary_emb.inv_freq" in ours
        for name, buffer in ours.items():
            assert torch.equal(buffer, loaded[name])
            assert buffer.dtype == loaded[name].dtype


def test_tied_weights_are_merged_once_and_stay_tied(materializer: Make) -> None:
    held = materializer("tied")
    module: Any = held.resident.module
    assert "lm_head.weight" not in {tensor.name for tensor in held.layout.tensors}
    for coefficients in ((0.0, 0.0), (0.3, 0.9)):
        build(held, coefficients)
        assert module.lm_head.weight is module.model.embed_tokens.weight
    num_untied = sum(tensor.num_elements for tensor in materializer("llama").layout.tensors)
    assert sum(tensor.num_elements for tensor in held.layout.tensors) == num_untied - 61 * 32


def test_a_recipe_is_spread_over_its_groups(materializer: Make, checkpoints: Checkpoints) -> None:
    held, operator = materializer("llama"), TaskArithmetic()
    matrix = [[0.1, -0.5, 1.3], [0.9, 0.0, 0.25]]
    held.build(operator, recipe(held, operator, {"coefficient": matrix}, num_groups=3))
    columns = {
        name: [row[g] for row in matrix] for g, names in enumerate(groups_of(held, 3).values()) for name in names
    }
    expected = merged_by_hand(checkpoints("llama", "float32"), columns, "float32")
    assert_close_tensors(held.resident.module, expected, "float32")


def test_what_was_built_before_does_not_matter(materializer: Make) -> None:
    """Also after TIES, whose trims are kept from merge to merge, and in float32, where no cast copies the buffers."""
    used, ties = materializer("llama"), Ties()

    def values(density: float) -> dict[str, Any]:
        return {"coefficient": [0.6, 0.8], "density": [density, 0.5], "scale": [1.1]}

    def build_both(held: Materializer, density: float) -> str:
        held.build(ties, recipe(held, ties, values(density)))
        return held.weights_hash()

    fresh = {}
    for density in (0.2, 0.7):
        fresh[density] = build_both(materializer("llama"), density)
    alone = materializer("llama")
    build(alone, (0.3, 0.3))
    for density in (0.2, 0.7, 0.2):
        assert build_both(used, density) == fresh[density]
    build(used, (0.3, 0.3))
    assert used.weights_hash() == alone.weights_hash()
    assert build_both(used, 0.2) == fresh[0.2]
    assert fresh[0.2] != fresh[0.7]


def test_an_operator_without_structural_numbers_prepares_once(
    materializer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, tsv, prepared = materializer("llama"), TsvM(), []
    prepare = tsv.prepare
    monkeypatch.setattr(tsv, "prepare", lambda *given: prepared.append(1) or prepare(*given))
    for coefficients in ([0.5, 0.5], [0.7, 0.2]):
        held.build(tsv, recipe(held, tsv, {"coefficient": coefficients}))
    assert prepared == [1]


def test_a_preparation_that_fails_midway_leaves_nothing_half_made(
    materializer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It overwrites the earlier state, which must not pass for whole afterwards."""
    iso = IsoC()

    def built(held: Materializer, coefficient: float) -> str:
        held.build(iso, recipe(held, iso, {"coefficient": [coefficient, 1.0], "scale": [1.0]}))
        return held.weights_hash()

    held, fuse, calls = materializer("llama"), iso.fuse, []

    def fails_at_the_third(*given: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise CandidateError("interrupted")
        return fuse(*given)

    before = built(held, 1.0)
    monkeypatch.setattr(iso, "fuse", fails_at_the_third)
    with pytest.raises(CandidateError, match="interrupted"):
        built(held, 0.5)
    assert built(held, 1.0) == before


def test_ties_trims_each_tensor_by_itself(materializer: Make, checkpoints: Checkpoints) -> None:
    held, ties = materializer("vit"), Ties()
    held.build(ties, recipe(held, ties, {"coefficient": [1.0, 0.0], "density": [0.3, 1.0], "scale": [1.0]}))
    base, expert, _ = (
        tiny.load(checkpoint.folder, "float32").state_dict() for checkpoint in checkpoints("vit", "float32")
    )
    for name, tensor in held.resident.module.named_parameters():
        moved = tensor != base[name]
        assert int(moved.sum()) == max(1, int(0.3 * tensor.numel()))
        vector = (expert[name] - base[name]).abs()
        assert float(vector[moved].min()) >= float(vector[~moved].max() if (~moved).any() else 0)


def test_a_merge_that_overflows_is_a_failed_candidate_and_the_next_one_is_fine(materializer: Make) -> None:
    held = materializer("llama", "float16")
    build(held, (0.0, 1.0))
    with pytest.raises(CandidateError, match=r"model\.\S+ is not finite"):
        build(held, (1e9, 0.0))
    build(held, (0.0, 1.0))
    assert held.weights_hash() == list(held.hashes.values())[2]


def test_shards_and_one_file_are_the_same_weights(checkpoints: Checkpoints, tmp_path: Path) -> None:
    folder = tiny.write(tiny.make("llama"), tmp_path / "sharded", max_shard_size="10KB")
    held = Materializer(open_checkpoint("base", folder), checkpoints("llama", "float32")[:1], dtype="float32")
    assert len(set(held.hashes.values())) == 1
    assert len(held.hashes) == 2


def test_progress_names_each_checkpoint(checkpoints: Checkpoints) -> None:
    told: list[str] = []
    base, *experts = checkpoints("vit", "float32")
    Materializer(base, experts, dtype="float32", progress=told.append)
    assert told == ["base", "one", "two"]


@pytest.mark.parametrize("flaw", [float("nan"), float("inf")])
@pytest.mark.parametrize("who", ["base", "expert"])
def test_a_checkpoint_that_is_not_finite_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, flaw: float, who: str
) -> None:
    good = checkpoints("llama", "float32")[0]
    folder = Path(shutil.copytree(good.folder, tmp_path / "damaged"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = flaw
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    damaged = open_checkpoint("the damaged one", folder)
    base, expert = (damaged, good) if who == "base" else (good, damaged)
    with pytest.raises(
        CheckpointError, match=r"the damaged one: model\.layers\.1\.mlp\.up_proj\.weight.*NaN or an inf"
    ):
        Materializer(base, [expert], dtype="float32")


def test_mixed_dtypes_are_merged_in_the_dtype_that_was_decided(checkpoints: Checkpoints, tmp_path: Path) -> None:
    base = checkpoints("llama", "float32")[0]
    folder = Path(shutil.copytree(base.folder, tmp_path / "mixed"))
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    held = Materializer(base, [open_checkpoint("mixed", folder)], dtype="float32")
    operator = TaskArithmetic()
    held.build(operator, recipe(held, operator, {"coefficient": [1.0]}))
    state = held.resident.module.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert torch.equal(state["lm_head.weight"], tensors["lm_head.weight"].float())


def untie(module: Any) -> None:
    module.lm_head.weight = nn.Parameter(module.lm_head.weight.detach().clone())


@pytest.mark.parametrize(
    "break_views",
    [
        lambda module: module.half(),
        lambda module: module.double(),
        lambda module: module.resize_token_embeddings(70),
        lambda module: module.get_submodule("model.norm").half(),
        lambda module: setattr(module.model.norm, "weight", nn.Parameter(torch.ones(32))),
        lambda module: setattr(module.model.norm.weight, "data", torch.ones(32)),
        untie,
    ],
)
def test_a_broken_view_is_noticed(materializer: Make, break_views: Callable[[Any], Any]) -> None:
    held = materializer("tied")
    build(held, (0.1, 0.1))
    break_views(held.resident.module)
    with pytest.raises(EvoMergeError, match="merge buffer|keeps tensors in"):
        build(held, (0.2, 0.1))


class TestGradient:
    """Coefficient gradients against finite differences of the loss itself."""

    COEFFICIENTS = ((0.4, 0.2, 0.6), (0.3, 0.5, 0.1))

    def check(
        self,
        held: Materializer,
        operator: Operator,
        losses: Sequence[Callable[[], Tensor]],
        *,
        step: float,
        tolerance: float,
    ) -> None:
        # Of a structural parameter there is no gradient: it is part of what the coefficients multiply.
        fixed = {spec.name: np.full((1, 3), spec.default) for spec in operator.parameters if spec.structural}

        def recipe_at(matrix: np.ndarray) -> Recipe:
            return recipe(held, operator, {"coefficient": matrix, **fixed}, num_groups=3)

        def loss_at(matrix: np.ndarray) -> float:
            held.build(operator, recipe_at(matrix))
            with torch.no_grad():
                return float(sum(float(loss()) for loss in losses))

        at = np.array(self.COEFFICIENTS)
        found = held.gradients(operator, recipe_at(at), losses)
        assert sum(value for value, _ in found) == pytest.approx(loss_at(at), rel=1e-6)
        gradient_KG = np.sum([gradients["coefficient"] for _, gradients in found], axis=0)
        assert gradient_KG.shape == (2, 3)
        expected_KG = np.zeros_like(gradient_KG)
        for place in np.ndindex(2, 3):
            moved = np.zeros_like(at)
            moved[place] = step
            expected_KG[place] = (loss_at(at + moved) - loss_at(at - moved)) / (2 * step)
        scale = np.abs(expected_KG).max()
        assert scale > 1e-2
        np.testing.assert_allclose(gradient_KG, expected_KG, rtol=0, atol=tolerance * scale)

    @pytest.mark.parametrize("kind", ["llama", "tied"])
    @pytest.mark.parametrize(
        "operator",
        [TaskArithmetic(), Linear(), Linear(LinearOptions(normalize=False)), Pcb(), TsvM()],
        ids=["ta", "linear", "sum", "of directions", "of singular directions"],
    )
    def test_of_a_linear_loss(self, materializer: Make, operator: Operator, kind: str) -> None:
        """A random direction of the weights, summed in float64: only the merge's own rounding is in the way."""
        held = materializer(kind)
        generator = torch.Generator().manual_seed(0)
        direction = {
            name: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            for name, tensor in held.resident.module.named_parameters()
        }

        def loss() -> Tensor:
            products = [
                (tensor.double() * direction[name]).sum() for name, tensor in held.resident.module.named_parameters()
            ]
            return torch.stack(products).sum()

        self.check(held, operator, [loss], step=0.01, tolerance=1e-3)

    @pytest.mark.parametrize("kind", ["llama", "tied"])
    @pytest.mark.parametrize("operator", [TaskArithmetic(), Linear()], ids=["ta", "linear"])
    def test_of_several_cross_entropies(self, materializer: Make, operator: Operator, kind: str) -> None:
        """Forward in float32, and a step of 0.01 whose third-order error is some 1 %."""
        held = materializer(kind)
        module: Any = held.resident.module

        def loss(row: int) -> Tensor:
            logits = module(input_ids=tiny.TOKENS[row : row + 1]).logits[0, :-1]
            return cross_entropy(logits, tiny.TOKENS[row, 1:])

        self.check(held, operator, [lambda: loss(0), lambda: loss(1)], step=0.01, tolerance=0.02)

    def test_nothing_stays_behind(self, materializer: Make) -> None:
        held, operator = materializer("vit"), TaskArithmetic()
        at = recipe(held, operator, {"coefficient": [0.4, 0.2]})

        def loss() -> Tensor:
            return sum(((tensor**2).sum() for tensor in held.resident.module.parameters()), start=torch.zeros(()))

        def broken() -> Tensor:
            raise RuntimeError("the evaluator fell over")

        [(_, first)] = held.gradients(operator, at, [loss])
        with pytest.raises(RuntimeError, match="fell over"):
            held.gradients(operator, at, [loss, broken])
        assert not any(parameter.requires_grad for parameter in held.resident.module.parameters())
        assert all(parameter.grad is None for parameter in held.resident.module.parameters())
        [(_, again)] = held.gradients(operator, at, [loss])
        np.testing.assert_array_equal(first["coefficient"], again["coefficient"])

    def test_a_descent_is_priced_by_what_was_made_once(
        self, materializer: Make, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Other densities need other entries; and after a merge to be scored, nothing is kept."""
        held, ties, densities = materializer("vit"), TiesPaper(), []
        directions = ties.directions
        monkeypatch.setattr(ties, "directions", lambda *given: densities.append(density) or directions(*given))

        def gradient(coefficients: Sequence[float]) -> Any:
            at = recipe(held, ties, {"coefficient": coefficients, "density": [density, density], "scale": [1.0]})
            weights = list(held.resident.module.parameters())
            return held.gradients(ties, at, [lambda: torch.stack([weight.sum() for weight in weights]).sum()])[0][1]

        density = 0.2
        first, second = gradient([0.5, 0.5])["coefficient"], gradient([0.7, 0.2])["coefficient"]
        np.testing.assert_allclose(first, second)  # the loss is linear
        assert densities == [0.2]
        density = 0.6
        assert not np.allclose(second, gradient([0.7, 0.2])["coefficient"])
        assert densities == [0.2, 0.6]
        build(held, [0.5, 0.5])
        gradient([0.7, 0.2])
        assert densities == [0.2, 0.6, 0.6]

    def test_a_loss_that_is_not_finite_is_a_failed_candidate(self, materializer: Make) -> None:
        held, operator = materializer("vit"), TaskArithmetic()
        weight = next(iter(held.resident.module.parameters()))
        with pytest.raises(CandidateError, match="loss is nan"):
            held.gradients(
                operator, recipe(held, operator, {"coefficient": [0.4, 0.2]}), [lambda: weight.sum() * float("nan")]
            )
