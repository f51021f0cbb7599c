"""Tokenizer, chat template and their kin: whose files lie beside a merged model, and that it is said."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_checkpoints as tiny

from evomerge.errors import InputError
from evomerge.materialize.checkpoint import Checkpoint, open_checkpoint
from evomerge.materialize.companions import choose_companions

Add = Callable[..., Checkpoint]


@pytest.fixture
def add(tmp_path: Path) -> Add:
    """Write a checkpoint with a tokenizer of some words, and other files by name; return it."""

    def made(name: str, words: str = "a b c", **files: str) -> Checkpoint:
        folder = tiny.write(tiny.make("llama"), tmp_path / name)
        (folder / "generation_config.json").unlink()
        vocabulary = {word: row for row, word in enumerate(words.split())}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "by": name}))
        for file, text in files.items():
            (folder / file.replace("__", ".")).write_text(text)
        return open_checkpoint(name, folder)

    return made


def test_the_bases_files_are_taken_and_nothing_else(add: Add, tmp_path: Path) -> None:
    of_base = {
        "special_tokens_map__json": "{}",
        "merges__txt": "",
        "generation_config__json": "{}",
        "chat_template__jinja": "x",
    }
    base = add("base", **of_base, README__md="its card", training_args__bin="", optimizer__pt="")
    found = choose_companions(base, {"one": add("one", preprocessor_config__json="{}")})
    expected = {"tokenizer.json", *(name.replace("__", ".") for name in of_base)}
    (tmp_path / "out").mkdir()
    found.copy(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["by"] == "base"
    assert found.origin == f"{', '.join(sorted(expected))} of base"
    assert not found.notes


def test_an_experts_tokenizer_comes_whole_and_the_rest_from_whoever_has_it(add: Add, tmp_path: Path) -> None:
    base = add("base", chat_template__jinja="base's", generation_config__json="base", preprocessor_config__json="base")
    config = json.dumps({"chat_template": "chat's"})
    chat = add("chat", tokenizer_config__json=config, generation_config__json="chat")
    found = choose_companions(base, {"chat": chat}, "chat")
    (tmp_path / "out").mkdir()
    found.copy(tmp_path / "out")
    written = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert written.keys() == {
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "preprocessor_config.json",
    }
    assert written["generation_config.json"] == "chat"
    assert written["preprocessor_config.json"] == "base"
    assert (
        found.origin
        == "generation_config.json, tokenizer.json, tokenizer_config.json of chat; preprocessor_config.json of base"
    )
    assert found.notes == (
        "the chat template written is that of chat; base has another: --tokenizer-from base takes that one's tokenizer files",
    )


def test_a_template_that_only_an_expert_has_is_pointed_out(add: Add) -> None:
    base, template = add("base"), json.dumps({"chat_template": [{"name": "default", "template": "x"}]})
    experts = {"plain": add("plain"), "chat": add("chat", tokenizer_config__json=template)}
    assert choose_companions(base, experts).notes == (
        "base has no chat template; chat has one: --tokenizer-from chat takes that one's tokenizer files",
    )


def test_a_model_without_tokenizer_has_nothing_to_state(tmp_path: Path) -> None:
    base = open_checkpoint("base", tiny.write(tiny.make("vit"), tmp_path / "vit"))
    found = choose_companions(base, {})
    assert (found.origin, found.notes) == ("", ())


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("chta", "--tokenizer-from: no expert 'chta'; did you mean 'chat'?"),
        ("bare", "--tokenizer-from bare: .* holds no tokenizer"),
        ("chat", r"--tokenizer-from chat: its vocabulary is not the base's \(4 tokens against 3\)"),
    ],
)
def test_what_does_not_suit_is_a_users_mistake(add: Add, chosen: str, message: str) -> None:
    bare = add("bare")
    (bare.folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=message):
        choose_companions(add("base"), {"chat": add("chat", words="a b c d"), "bare": bare}, chosen)
