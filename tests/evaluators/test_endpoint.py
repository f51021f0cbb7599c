"""The client of OpenAI-compatible endpoints against real servers on this machine."""

import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from served_model import ServedModel, serving
from tiny_models import tiny, word_tokenizer, write_base

from evomerge.errors import DataError
from evomerge.evaluators.endpoint import MARK, Endpoint, EndpointOptions, Publisher, PublishOptions

PROMPTS = [f"w{n} w{n + 3}" for n in range(9)]


def options(url: str, **changes: Any) -> EndpointOptions:
    return EndpointOptions(url=url, model="m", **changes)


def echo(path: str, body: dict[str, Any], _: dict[str, str]) -> tuple[int, Any]:
    """Answers late to early questions."""
    if path == "/completions":
        number = int(body["prompt"].split()[0].removeprefix("w"))
        time.sleep(0.01 * (10 - number))
        return 200, {"choices": [{"text": f"after {body['prompt']}"}]}
    return 200, {"choices": [{"message": {"content": None}}]}


def test_answers_come_in_the_order_of_the_questions() -> None:
    with serving(echo) as url:
        assert Endpoint(options(url + "/")).complete(PROMPTS, max_tokens=5) == [f"after {p}" for p in PROMPTS]
        assert Endpoint(options(url)).chat(PROMPTS[:2], max_tokens=5) == ["", ""]
        assert Endpoint(options(url)).complete([], max_tokens=5) == []


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def keep(path: str, body: dict[str, Any], headers: dict[str, str]) -> tuple[int, Any]:
        seen.append((path, body, headers.get("Authorization")))
        return 200, {"choices": [{"text": "", "message": {"content": ""}}]}

    monkeypatch.setenv("OPENAI_API_KEY", "sk-one")
    monkeypatch.setenv("JUDGE_KEY", "sk-two")
    monkeypatch.delenv("NO_KEY", raising=False)
    with serving(keep) as url:
        Endpoint(options(url)).complete(["one"], max_tokens=7, stop=["\n"])
        Endpoint(options(url, api_key="JUDGE_KEY")).chat(["two"], max_tokens=8)
        Endpoint(options(url, api_key="NO_KEY")).chat(["two"], max_tokens=8)
    common = {"model": "m", "temperature": 0}
    message = [{"role": "user", "content": "two"}]
    assert seen == [
        ("/completions", {**common, "prompt": "one", "max_tokens": 7, "stop": ["\n"]}, "Bearer sk-one"),
        ("/chat/completions", {**common, "messages": message, "max_tokens": 8}, "Bearer sk-two"),
        ("/chat/completions", {**common, "messages": message, "max_tokens": 8}, None),
    ]


def test_a_failure_that_passes_is_outlived() -> None:
    statuses = [503, 429, 200]

    def recovers(*_: Any) -> tuple[int, Any]:
        return statuses.pop(0), {"choices": [{"text": "back"}]}

    with serving(recovers) as url:
        start = time.monotonic()
        # The wait is 1 s, then 2 s: the real one, once.
        assert Endpoint(options(url, retries=2)).complete(["?"], max_tokens=1) == ["back"]
        assert time.monotonic() - start > 2.9


@pytest.mark.parametrize(
    ("status", "reply", "words"),
    [
        (401, {"error": "no such key sk-secret"}, ["HTTP 401", "no such key ***", "1 attempts", "MY_KEY"]),
        (404, "not here\nat all", ["HTTP 404", "not here at all", "/completions"]),
        (503, "busy", ["HTTP 503", "busy"]),
        (302, "http://example.invalid/", ["HTTP 302"]),
        (200, "<html>", ["not JSON"]),
        (200, {"choices": []}, ["expected choices"]),
        (200, {"error": "odd"}, ["expected choices", "odd"]),
        (200, [1], ["expected choices"]),
    ],
)
def test_what_a_server_must_not_answer(
    status: int, reply: Any, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    with serving(lambda *_: (status, reply)) as url, pytest.raises(DataError) as caught:
        Endpoint(options(url, retries=0, api_key="MY_KEY")).complete(["?"], max_tokens=1)
    for word in words:
        assert word in str(caught.value)
    assert "sk-secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(DataError, match=r"refused.*see that it is served"):
        Endpoint(options(url, retries=0)).complete(["?"], max_tokens=1)


def test_a_server_that_is_too_slow() -> None:
    def sleeps(*_: Any) -> tuple[int, Any]:
        time.sleep(0.5)
        return 200, {}

    with serving(sleeps) as url, pytest.raises(DataError, match="timed out"):
        Endpoint(options(url, retries=0, timeout=0.1)).complete(["?"], max_tokens=1)


@pytest.mark.parametrize("url", ["localhost:30000/v1", "file:///etc/passwd", "ftp://host/v1", ""])
def test_only_web_addresses(url: str) -> None:
    with pytest.raises(ValidationError, match="http"):
        options(url)
    with pytest.raises(ValidationError, match="http"):
        PublishOptions(folder="/x", url=url)


def test_a_published_model_is_the_candidate(tmp_path: Path) -> None:
    """Twice, with other weights the second time: the folder is written anew, and nothing else is left in it."""
    base = write_base(tmp_path / "base", tiny("llama"), word_tokenizer(eos_token="w1"))
    served, model, folder = ServedModel(), tiny("llama"), tmp_path / "shm" / "candidate"
    with serving(served) as url:
        publish = PublishOptions(folder=str(folder), url=f"{url}/update_weights_from_disk")
        publisher = Publisher(publish, options(url), base)
        (base / "model.safetensors.index.json").write_text("{}")
        for seed in (1, 2):
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn_like(parameter))
            publisher.publish(model)
            found = served.model.state_dict()
            assert all(torch.equal(tensor, found[name]) for name, tensor in model.state_dict().items())
        assert served.loads == [str(folder)] * 2
        assert served.tokenizer("w3 w4")["input_ids"] == [0, 5, 6]
        assert {path.name for path in folder.iterdir()} >= {MARK, "config.json", "model.safetensors", "tokenizer.json"}
        assert not (folder / "model.safetensors.index.json").exists()
        Publisher(publish, options(url), base).publish(model)  # a later run may use the folder again


def test_a_folder_with_something_else_in_it_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    publish = PublishOptions(folder=str(tmp_path), url="http://127.0.0.1:1/x")
    with pytest.raises(DataError, match="expected an empty folder"):
        Publisher(publish, options("http://127.0.0.1:1"), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ((200, {"success": False, "message": "shapes differ"}), "did not load .*shapes differ"),
        ((400, {"success": False, "message": "no such folder"}), "HTTP 400.*no such folder"),
    ],
)
def test_a_server_that_does_not_load(reply: Any, words: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tiny("llama"), word_tokenizer())
    with serving(lambda *_: reply) as url:
        publisher = Publisher(PublishOptions(folder=str(tmp_path / "out"), url=url), options(url, retries=0), base)
        with pytest.raises(DataError, match=words):
            publisher.publish(tiny("llama"))


def test_a_published_folder_must_be_the_same_for_the_server() -> None:
    with pytest.raises(ValidationError, match="absolute path"):
        PublishOptions(folder="candidates", url="http://127.0.0.1:1")
