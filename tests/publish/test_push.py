"""Uploading to a stand-in of the hub, through the hub's own client."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, hub

from evomerge.errors import EvoMergeError, InputError
from evomerge.publish.push import push, require_pushable


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running hub to which the client is pointed, with the right token and no store of chunks of its own."""
    from huggingface_hub import constants

    with hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an export leaves, in little."""
    made = tmp_path / "my export"
    made.mkdir()
    (made / "README.md").write_text("---\ntags: [merge]\n---\n# It\n")
    (made / "config.json").write_text("{}")
    (made / "model-00001-of-00002.safetensors").write_bytes(bytes(range(256)) * 40)
    (made / "model-00002-of-00002.safetensors").write_bytes(b"x" * 999)
    (made / "model.safetensors.index.json").write_text("{}")
    return made


@pytest.mark.parametrize("private", [False, True])
def test_every_file_arrives_in_a_new_repository(server: Hub, folder: Path, private: bool) -> None:
    require_pushable("someone/merged")
    address = push(folder, "someone/merged", "Merge by evomerge: digits, trial 3", private=private)
    assert address == f"{server.url}/someone/merged"
    repository = server.repositories["someone/merged"]
    assert repository.private is private
    assert repository.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert repository.messages == ["Merge by evomerge: digits, trial 3"]
    assert set(server.validated) == {(folder / "README.md").read_text()}


def test_weights_of_an_earlier_upload_go_and_other_files_stay(server: Hub, folder: Path) -> None:
    """transformers would load a lone model.safetensors rather than the shards beside it."""
    push(folder, "someone/merged", "first", private=False)
    files = server.repositories["someone/merged"].files
    files |= {"model.safetensors": b"old", "adapter_config.json": b"old", "notes.txt": b"mine", ".gitattributes": b"x"}
    (folder / "config.json").write_text('{"changed": 1}')
    push(folder, "someone/merged", "second", private=False)
    assert files.keys() == {path.name for path in folder.iterdir()} | {"notes.txt", ".gitattributes"}
    assert files["config.json"] == b'{"changed": 1}'


@pytest.mark.parametrize("repo_id", ["merged", "a/b/c", "some one/merged", "/merged", "someone/"])
def test_a_name_that_is_none_is_a_users_mistake(repo_id: str) -> None:
    with pytest.raises(InputError, match="--push: expected OWNER/NAME such as someone/merged, found"):
        require_pushable(repo_id)


def test_without_a_token_nothing_is_begun(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="no token of the hub was found; sign in with: hf auth login"):
        require_pushable("someone/merged")


def test_a_token_that_the_hub_does_not_take(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_outdated")
    with pytest.raises(InputError, match=r"the hub does not take the token \(401\); sign in with"):
        require_pushable("someone/merged")


def test_another_owners_models_are_not_written(server: Hub, folder: Path) -> None:
    with pytest.raises(
        InputError, match=r"no right to write there \(403\); .* hf upload other/merged '.*my export' \.$"
    ):
        push(folder, "other/merged", "first", private=False)


def test_what_the_hub_refuses_is_said_in_one_line(server: Hub, folder: Path) -> None:
    server.is_full = True
    with pytest.raises(EvoMergeError, match="storage limit reached.*the export is in .*hf upload") as caught:
        push(folder, "someone/merged", "first", private=False)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 1


def test_a_card_that_the_hub_does_not_take_uploads_nothing(server: Hub, folder: Path) -> None:
    (folder / "README.md").write_text("---\nbase_model: [/home/me/base]\n---\n")
    with pytest.raises(EvoMergeError, match='"base_model" with value "/home/me/base" is not valid'):
        push(folder, "someone/merged", "first", private=False)
    assert not server.repositories["someone/merged"].files


def test_a_hub_that_is_not_there(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EvoMergeError, match="--push someone/merged: the hub could not be reached") as caught:
        require_pushable("someone/merged")
    assert caught.value.exit_status == 1
