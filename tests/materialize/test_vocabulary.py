"""Experts with another vocabulary: aligned by token string, decided in the open, or refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_checkpoints as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from evomerge.errors import CheckpointError
from evomerge.materialize.inputs import decisions, open_checkpoints
from evomerge.materialize.vocabulary import Vocabulary, align, read_vocabulary, vocabulary_tensors
from evomerge.publish.export import merge_recipe

BASE = {f"t{row}": row for row in range(61)}  # the tiny Llama's 61 rows


def write_tokenizer(folder: Path, vocabulary: Vocabulary) -> None:
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def with_rows(model: Any, vocabulary: Vocabulary, num_rows: int) -> Any:
    """The same network with its embeddings and head ordered by another vocabulary; new rows are random."""
    other = copy.deepcopy(model)
    for name in ("model.embed_tokens", "lm_head"):
        module = other.get_submodule(name)
        rows = torch.randn(num_rows, module.weight.shape[1], generator=torch.Generator().manual_seed(7))
        for token, row in vocabulary.items():
            if token in BASE:
                rows[row] = model.get_submodule(name).weight[BASE[token]]
        module.weight = nn.Parameter(rows)
    other.config.vocab_size = num_rows
    return other


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Any, Path, Path, Vocabulary]:
    """A base, and an expert whose tokens stand in reverse order, without t3 and with two of its own."""
    base = tiny.make("llama")
    expert = tiny.tuned(base, 1)
    tokens = [token for token in reversed(BASE) if token != "t3"] + ["<new>", "<newer>"]
    vocabulary = {token: row for row, token in enumerate(tokens)}
    tiny.write(base, tmp_path / "base")
    tiny.write(with_rows(expert, vocabulary, 62), tmp_path / "expert")
    write_tokenizer(tmp_path / "base", BASE)
    write_tokenizer(tmp_path / "expert", vocabulary)
    return expert, tmp_path / "base", tmp_path / "expert", vocabulary


def recipe(base: Path, expert: Path) -> Path:
    path = base.parent / "recipe.yaml"
    path.write_text(
        f"base: {base}\nexperts: {{one: {expert}}}\noperator: {{name: task_arithmetic}}\ncoefficient: 1.0\n"
    )
    return path


def test_rows_are_merged_with_the_rows_of_the_same_token(folders: Any, tmp_path: Path) -> None:
    tuned, base, expert, _ = folders
    merge_recipe(recipe(base, expert), tmp_path / "merged", "cpu", lambda _: None)
    merged, before = tiny.load(tmp_path / "merged", "float32"), tiny.load(base, "float32")
    for name, tensor in merged.state_dict().items():
        expected = tuned.state_dict()[name].clone()
        if expected.shape[0] == 61:
            expected[3] = before.state_dict()[name][3]  # the token that the expert lacks keeps the base's row
        assert torch.equal(tensor, expected), name


def test_a_merge_says_what_it_decided(folders: Any, tmp_path: Path) -> None:
    _, base, expert, _ = folders
    merged = merge_recipe(recipe(base, expert), tmp_path / "merged", "cpu", lambda _: None)
    assert merged.decisions[0].startswith("expert one: another vocabulary, aligned by token: 59 tokens moved")


def test_only_what_loses_digits_is_called_rounding(tmp_path: Path) -> None:
    model = tiny.make("llama")
    for dtype in ("float32", "bfloat16"):
        tiny.write(model, tmp_path / dtype, dtype)
    _, experts, _ = open_checkpoints(
        str(tmp_path / "float32"), {name: str(tmp_path / name) for name in ("float32", "bfloat16")}
    )
    assert decisions(experts.values(), "float32") == []
    assert decisions(experts.values(), "bfloat16") == ["expert float32: its float32 tensors are rounded to bfloat16"]


def test_the_decision_is_said(folders: Any) -> None:
    _, base, expert, _ = folders
    _, opened, _ = open_checkpoints(str(base), {"one": str(expert)})
    alignment = opened["one"].alignment
    assert alignment is not None
    assert alignment.missing == ("t3",)
    assert alignment.dropped == ("<new>", "<newer>")
    assert alignment.decision == (
        "59 tokens moved to the base's rows; 1 token ('t3') missing, the base's rows stay; "
        "2 tokens ('<new>', '<newer>') only in the expert, dropped"
    )


def test_the_same_shape_with_another_order_is_found_out(tmp_path: Path) -> None:
    """No shape betrays it: without the tokenizers every row would be merged with another token's."""
    base = tiny.make("llama")
    swapped = {**BASE, "t5": 9, "t9": 5}
    expert = tiny.tuned(base, 1)
    tiny.write(base, tmp_path / "base")
    tiny.write(with_rows(expert, swapped, 61), tmp_path / "expert")
    write_tokenizer(tmp_path / "base", BASE)
    write_tokenizer(tmp_path / "expert", swapped)
    merge_recipe(recipe(tmp_path / "base", tmp_path / "expert"), tmp_path / "merged", "cpu", lambda _: None)
    merged = tiny.load(tmp_path / "merged", "float32")
    assert torch.equal(merged.lm_head.weight, expert.lm_head.weight)


def test_without_both_tokenizers_another_number_of_rows_is_refused(folders: Any) -> None:
    _, base, expert, _ = folders
    (base / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer lies beside both to align the tokens by"):
        open_checkpoints(str(base), {"one": str(expert)})


def test_equal_vocabularies_are_not_aligned(tmp_path: Path) -> None:
    base = tiny.make("llama")
    for name, model in (("base", base), ("expert", tiny.tuned(base, 1))):
        tiny.write(model, tmp_path / name)
        write_tokenizer(tmp_path / name, BASE)
    _, opened, _ = open_checkpoints(str(tmp_path / "base"), {"one": str(tmp_path / "expert")})
    assert opened["one"].alignment is None


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("llama", {"model.embed_tokens.weight", "lm_head.weight"}),
        ("tied", {"model.embed_tokens.weight"}),
        ("vit", set()),
    ],
)
def test_tensors_with_one_row_a_token(kind: str, expected: set[str]) -> None:
    assert vocabulary_tensors(tiny.make(kind)) == expected


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer.json": {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<c>"}]}},
        {"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["b", -2.0]]}, "added_tokens": [{"id": 2, "content": "<c>"}]}},
        {"vocab.json": {"a": 0, "b": 1}, "added_tokens.json": {"<c>": 2}},
        {"vocab.txt": "a\nb\n<c>\n"},
    ],
)  # fmt: skip
def test_every_common_tokenizer_file_is_read(tmp_path: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_vocabulary(tmp_path) == {"a": 0, "b": 1, "<c>": 2}


def test_no_tokenizer_and_a_damaged_one(tmp_path: Path) -> None:
    assert read_vocabulary(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer.json cannot be read"):
        read_vocabulary(tmp_path)


@given(order=st.permutations(range(6)), lacking=st.sets(st.integers(0, 5)), extra=st.integers(0, 3))
def test_an_aligned_matrix_holds_each_token_where_the_base_has_it(
    order: list[int], lacking: set[int], extra: int
) -> None:
    base = {f"t{row}": row for row in range(6)}
    tokens = [f"t{row}" for row in order if row not in lacking] + [f"new{n}" for n in range(extra)]
    expert = {token: row for row, token in enumerate(tokens)}
    aligned = align(base, expert, 6).apply(
        torch.tensor([[float(int(token[-1]))] for token in tokens]).reshape(-1, 1) + 10, torch.arange(6.0)[:, None]
    )
    assert aligned.flatten().tolist() == [row if row in lacking else row + 10 for row in range(6)]
