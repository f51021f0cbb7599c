"""A model on several devices is the model on one: the same bits, hash, outputs, scores and gradients.

Two buffers on the CPU stand for two devices where whole merges are made; where tensors must be brought from one device
to the next, one of them is a pretended GPU, which refuses to mix with the CPU.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_checkpoints as tiny
import torch
from pretend_gpu import GPU, PretendGpu, numbers_of
from test_every_operator import opened, recipe
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from evomerge.campaign.recipe_file import write_recipe
from evomerge.errors import CampaignError, EvoMergeError, InputError
from evomerge.evaluators.layouts import TokenSequence
from evomerge.evaluators.sequences import logprobs
from evomerge.kernels.layout import Layout
from evomerge.materialize.materializer import Materializer, sha256, tensors_hash
from evomerge.materialize.paths import _replace, describe
from evomerge.materialize.residence import Place, choose_device
from evomerge.materialize.resident import ResidentModel, merged_tensors, tensor_index
from evomerge.materialize.spread import Room, Share, divide, settle, spread
from evomerge.operators.passthrough import Passthrough
from evomerge.publish.export import merge_recipe
from evomerge.records import Recipe
from evomerge.space.data_flow import PathLayer

Family = Callable[[str, str], list[Path]]
CPU = torch.device("cpu")
TWO = "cpu,cpu"
GB = 10**9


def rooms(*num_bytes: int) -> list[Room]:
    return [Room(CPU, one) for one in num_bytes]


def held_by(
    family: Family, kind: str, device: str, dtype: str = "float32", name: str = "task_arithmetic"
) -> tuple[Materializer, Callable[[float], Recipe]]:
    """A materializer of a tiny model, and recipes with the last tensor's first parameter times a factor."""
    operator, base, experts = opened(family, name, kind, dtype)
    held = Materializer(base, list(experts.values()), dtype=dtype, place=Place(device))
    return held, lambda factor: recipe(operator, base, experts, held, factor)


class TestOneModelInTwoBuffers:
    @pytest.mark.parametrize(("kind", "dtype"), [("llama", "float32"), ("tied", "bfloat16"), ("vit", "float32")])
    @pytest.mark.parametrize("name", ["task_arithmetic", "ties"])
    def test_merges_have_the_same_bits(self, family: Family, kind: str, dtype: str, name: str) -> None:
        (one, recipe_of), (two, _) = (held_by(family, kind, device, dtype, name) for device in ("cpu", TWO))
        operator = opened(family, name, kind, dtype)[0]
        assert len(one.resident.buffers) == 1
        assert two.residence == "host"
        assert len(two.resident.buffers) == 2
        # Neither holds more than what its half and one layer take.
        assert max(room.num_bytes for room in two.resident.devices) < 0.7 * one.resident.devices[0].num_bytes
        for factor in (1.0, 0.9, 1.0):
            for held in (one, two):
                held.build(operator, recipe_of(factor))
            assert two.weights_hash() == one.weights_hash()
            assert torch.equal(tiny.outputs(two.module), tiny.outputs(one.module))
        two.resident.check_views()

    def test_only_what_changed_is_shipped(self, family: Family) -> None:
        held, recipe_of = held_by(family, "llama", TWO)
        operator = opened(family, "task_arithmetic", "llama", "float32")[0]
        held.build(operator, recipe_of(1.0))
        for _, piece_P in held.resident.pieces():
            piece_P.fill_(7.0)
        held.build(operator, recipe_of(0.9))
        changed = {name for name, tensor in held.module.named_parameters() if not bool((tensor == 7.0).all())}
        assert changed == {held.layout.tensors[-1].name}

    @pytest.mark.parametrize("kind", ["tied", "vit"])
    def test_gradients(self, family: Family, kind: str) -> None:
        found = []
        for device in ("cpu", TWO):
            held, recipe_of = held_by(family, kind, device)
            operator = opened(family, "task_arithmetic", kind, "float32")[0]
            found += held.gradients(operator, recipe_of(1.0), [lambda model=held.module: loss_of(model)])
        (one, of_one), (two, of_two) = found
        assert one == two
        assert np.abs(of_one["coefficient"]).max() > 0
        np.testing.assert_array_equal(of_one["coefficient"], of_two["coefficient"])

    def test_what_is_written(self, family: Family, tmp_path: Path) -> None:
        held, recipe_of = held_by(family, "tied", "cpu", "bfloat16")
        write_recipe(recipe_of(1.0), tmp_path / "recipe.yaml")
        held.build(opened(family, "task_arithmetic", "tied", "bfloat16")[0], recipe_of(1.0))
        written = merge_recipe(tmp_path / "recipe.yaml", tmp_path / "merged", TWO, lambda _: None).weights
        assert written == held.weights_hash()

    def test_a_tensor_that_was_replaced_is_noticed(self, family: Family) -> None:
        held, recipe_of = held_by(family, "llama", TWO)
        weight = held.module.get_parameter("model.layers.1.mlp.up_proj.weight")
        weight.data = weight.data.clone()
        with pytest.raises(EvoMergeError, match="up_proj.weight no longer lies in the merge buffer"):
            held.build(opened(family, "task_arithmetic", "llama", "float32")[0], recipe_of(1.0))

    def test_paths_are_refused(self, family: Family) -> None:
        held, recipe_of = held_by(family, "llama", TWO)
        layers, groups, values = describe(held.layout.tensors, 2, (PathLayer(0, 0, 1.0), PathLayer(1, 1, 1.0)))
        rows = {name: tuple(map(tuple, matrix.tolist())) for name, matrix in values.items()}
        path = replace(recipe_of(1.0), layers=layers, groups=groups, values=rows)
        with pytest.raises(InputError, match="device: paths run .* on one device, .* spread over cpu, cpu"):
            held.build(Passthrough(), path)

    @pytest.mark.parametrize("make", ["bert", "t5"])
    def test_tensors_that_lie_out_of_order(self, make: str) -> None:
        """A head's bias with the embeddings that the head is tied to; embeddings that three modules share."""
        held = ResidentModel(make_tied(make), rooms(GB, GB, GB))
        assert len(held.buffers) == 3
        assert sha256(*(piece_P for _, piece_P in held.pieces())) == tensors_hash(make_tied(make))
        places = [here for here, _ in held.pieces()]
        assert [here.start for here in places] == [0, *(here.stop for here in places[:-1])]
        if make == "bert":
            bias = next(s for s, tensor in enumerate(held.layout.tensors) if tensor.name == "cls.predictions.bias")
            assert bias in held.shares[0].tensors
            assert len(places) > 3


def make_tied(kind: str) -> Any:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 40}
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**small, vocab_size=61)).eval()
    t5 = T5Config(d_model=32, d_kv=16, d_ff=40, num_layers=3, num_heads=2, vocab_size=61, decoder_start_token_id=0)
    return T5ForConditionalGeneration(t5).eval()


def loss_of(model: Any) -> Tensor:
    if "pixel_values" in model.main_input_name:
        pixels = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)
        squares: Tensor = model(pixel_values=pixels).pooler_output.square().mean()
        return squares
    logits = model(input_ids=tiny.TOKENS).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), tiny.TOKENS[:, 1:].flatten())


@contextmanager
def second_half_elsewhere(model: Any) -> Iterator[list[Share]]:
    """While entered, the model's second half lies on a pretended GPU, where nothing mixes with the CPU."""
    model.set_attn_implementation("eager")
    named, layout = merged_tensors(model), Layout.of(tensor_index(model))
    near, far = spread(model, named, layout, rooms(GB, GB))
    with PretendGpu():
        _replace(model, {layout.tensors[s].name: named[layout.tensors[s].name].to(GPU) for s in far.tensors})
        shares = [near, replace(far, device=GPU)]
        settle(model, shares)
        yield shares


class TestBetweenDevices:
    @pytest.mark.parametrize("kind", tiny.KINDS)
    def test_outputs_and_gradients(self, kind: str) -> None:
        here, there = tiny.make(kind), tiny.make(kind)
        here.set_attn_implementation("eager")
        loss_of(here).backward()
        with second_half_elsewhere(there):
            assert torch.equal(tiny.outputs(there), tiny.outputs(here))  # where the caller put the inputs
            for parameter in there.parameters():
                parameter.requires_grad_(True)
            loss_of(there).backward()
        distant = [name for name, parameter in there.named_parameters() if parameter.device == GPU]
        assert 0.2 < len(distant) / len(list(there.parameters())) < 0.8
        for (name, mine), parameter in zip(here.named_parameters(), there.parameters(), strict=True):
            assert parameter.grad is not None
            grad = numbers_of(parameter.grad) if name in distant else parameter.grad
            assert torch.equal(grad, mine.grad), name

    @pytest.mark.parametrize("kind", ["llama", "tied"])
    def test_kept_keys_and_values(self, kind: str) -> None:
        """Of generation, and of beginnings that are run once: each layer's stay on its device."""
        here, there = tiny.make(kind), tiny.make(kind)
        here.set_attn_implementation("eager")
        contexts = [tuple(range(3, 23)), (3, 4, 5, *range(30, 50))]
        sequences = [TokenSequence((*context, a, b), 2) for context in contexts for a, b in ((1, 2), (7, 8), (9, 4))]
        settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        expected = logprobs(here, sequences, 4)
        written = here.generate(input_ids=tiny.TOKENS, **settings)
        with second_half_elsewhere(there):
            found = logprobs(there, sequences, 4)
            assert torch.equal(there.generate(input_ids=tiny.TOKENS, **settings), written)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])

    def test_a_part_of_the_model_answers_where_it_is_asked(self) -> None:
        here, there = tiny.make("llama"), tiny.make("llama")
        here.set_attn_implementation("eager")
        with second_half_elsewhere(there), torch.no_grad():
            hidden = there.base_model(input_ids=tiny.TOKENS).last_hidden_state
            assert torch.equal(hidden, here.base_model(input_ids=tiny.TOKENS).last_hidden_state)

    def test_a_head_lies_with_the_embeddings_that_it_is_tied_to(self) -> None:
        with second_half_elsewhere(tiny.make("tied")) as (near, far):
            assert "lm_head" in near.modules
        with second_half_elsewhere(tiny.make("llama")) as (near, far):
            assert "lm_head" in far.modules
            assert "model.rotary_emb" in near.modules  # read by the layers of both


class TestDivision:
    @pytest.mark.parametrize(
        ("sizes", "capacities", "expected"),
        [
            ([1, 1, 1, 1], [9, 9], [0, 0, 1, 1]),
            ([5, 1, 1, 1], [9, 9], [0, 1, 1, 1]),
            ([1, 1, 1, 5], [9, 9], [0, 0, 0, 1]),
            ([1, 1, 1, 1, 1, 1], [20, 10], [0, 0, 0, 0, 1, 1]),
            ([3, 1, 1, 1], [1, 9], [1, 1, 1, 1]),
            ([2, 2, 2], [sys.maxsize] * 4, [0, 1, 2]),
            ([2, 2], [1, 1], [0, 1]),
            ([1, 1], [0, 9], [1, 1]),
            ([1, 1], [0, 0], [0, 0]),
        ],
    )
    def test_ranges_that_fill_rooms_alike(self, sizes: list[int], capacities: list[int], expected: list[int]) -> None:
        assert divide(sizes, capacities) == expected

    def test_too_little_room_is_refused_with_needed_and_found(self) -> None:
        model = tiny.make("llama")
        parts = merged_tensors(model), Layout.of(tensor_index(model))
        with pytest.raises(
            InputError,
            match=r"device: .* GB of the merged model, spread over cpu, cpu, are .* GB on cpu, expected at most 0\.0 "
            r".*workers\.gpus.*device: cpu",
        ):
            spread(model, *parts, rooms(57_344, 57_344))
        assert len(spread(model, *parts, rooms(61_440, 61_440))) == 2

    def test_a_model_that_does_not_say_what_is_whole(self) -> None:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        layout = Layout.of(tensor_index(model))
        with pytest.raises(InputError, match="Sequential does not say which of its modules .*device: cuda:0"):
            spread(model, merged_tensors(model), layout, rooms(GB, GB))

    def test_a_module_that_is_tied_to_several_others(self) -> None:
        model = tiny.make("llama")
        layers, third = model.model.layers, tiny.make("llama", seed=1).model.layers[0]
        layers.append(third)
        third.mlp.up_proj.weight = layers[0].mlp.up_proj.weight
        shares = spread(model, merged_tensors(model), Layout.of(tensor_index(model)), rooms(GB, GB, GB))
        assert ("model.layers.0", "model.layers.2") in [share.modules for share in shares]
        third.mlp.gate_proj.weight = layers[1].mlp.gate_proj.weight
        layout = Layout.of(tensor_index(model))
        with pytest.raises(InputError, match=r"ties model\.layers\.2 to modules that would lie on several .*cuda:0"):
            spread(model, merged_tensors(model), layout, rooms(GB, GB))


class TestDecision:
    """What ``device: auto`` comes to, by the memory of GPUs that are only told of."""

    @pytest.fixture
    def choose(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
        def chosen(free: list[float], device: str = "auto", residence: Any = "auto") -> Any:
            monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free[device.index or 0] * GB), 80 * GB))
            needed = {"resident": 70 * GB, "int8": 49 * GB, "host": 14 * GB}
            return Place(device, residence).choose(needed)  # type: ignore[arg-type]

        return chosen

    @pytest.mark.parametrize(
        ("free", "residence", "expected", "num_devices"),
        [
            ([100, 100], "auto", "resident", 1),
            ([40, 40], "auto", "host", 1),
            ([18, 18], "auto", "host", 2),
            ([18, 18], "host", "host", 1),
            ([13, 13, 13], "host", "host", 3),
            ([80, 80], "resident", "resident", 1),
            ([50, 50], "int8", "int8", 1),
        ],
    )
    def test_auto_takes_one_where_the_model_fits(
        self, choose: Callable[..., Any], free: list[float], residence: str, expected: str, num_devices: int
    ) -> None:
        settled = choose(free, residence=residence)
        assert (settled.residence, len(settled.rooms)) == (expected, num_devices)

    def test_room_is_left_to_evaluate_unless_a_person_decides(self, choose: Callable[..., Any]) -> None:
        assert [room.num_bytes for room in choose([16, 8]).rooms] == [12 * GB, 6 * GB]
        assert [room.num_bytes for room in choose([8, 8], residence="host").rooms] == [8 * GB, 8 * GB]

    def test_several_that_are_asked_for_are_taken(self, choose: Callable[..., Any]) -> None:
        settled = choose([100, 100, 100], "cuda:0,cuda:2")
        assert settled.residence == "host"
        assert [str(room.device) for room in settled.rooms] == ["cuda:0", "cuda:2"]

    @pytest.mark.parametrize("residence", ["resident", "int8"])
    def test_experts_lie_on_one_device(self, choose: Callable[..., Any], residence: str) -> None:
        for device in ("cuda:0,cuda:1", TWO):
            with pytest.raises(InputError, match=f"residence: {residence}: .* one device; expected residence: host"):
                choose([100, 100], device, residence)

    def test_of_experts_that_do_not_fit_one_it_says_what_does(self, choose: Callable[..., Any]) -> None:
        with pytest.raises(InputError, match="resident needs 70.0 GB on the GPU.*device: auto, workers.gpus"):
            choose([13, 13], residence="resident")

    def test_devices_that_a_campaign_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert choose_device(" cpu, cpu") == TWO
        assert choose_device("cpu") == "cpu"
        for wrong in ("cpu,meta", "meta,cpu,cpu"):
            with pytest.raises(CampaignError, match=f"device: expected auto, one device, .* found '{wrong}'"):
                choose_device(wrong)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        for count, expected in ((1, "cuda"), (2, "auto")):
            monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
            assert choose_device("auto") == expected
