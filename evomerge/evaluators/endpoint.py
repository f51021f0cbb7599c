"""Models behind OpenAI-compatible endpoints: a judge, or a server that answers for the candidate.

    {url: http://localhost:30000/v1, model: judge-32b}

A server that answers for the candidate is first given its weights: they are written as a checkpoint to a folder, and
the server is told with a POST of {"model_path": folder}, as SGLang's /update_weights_from_disk takes it.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pydantic import Field, field_validator

from evomerge.errors import DataError
from evomerge.materialize.resident import quiet_transformers
from evomerge.materialize.write import COMPANIONS
from evomerge.records import Options

MARK = "published-by-evomerge"
PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, *(s for s in HTTPStatus if s >= 500)}
Asked = TypeVar("Asked")


class EndpointOptions(Options):
    """url: up to and with /v1; api_key: name of the environment variable that holds the key, if there is one.

    timeout: seconds for one answer; retries: further attempts after a failure that may pass, 1, 2, 4, ... s apart;
    parallel: questions that are under way at a time.
    """

    url: str
    model: str
    api_key: str = "OPENAI_API_KEY"
    timeout: float = Field(default=120.0, gt=0)
    retries: int = Field(default=4, ge=0, le=10)
    parallel: int = Field(default=16, ge=1)

    @field_validator("url")
    @classmethod
    def _is_web(cls, given: str) -> str:
        return web_address(given)


class PublishOptions(Options):
    """How the server gets a candidate: the folder that is written, absolute, and where it is told to load it."""

    folder: str
    url: str

    @field_validator("folder")
    @classmethod
    def _is_absolute(cls, given: str) -> str:
        if not Path(given).is_absolute():
            raise ValueError("expected an absolute path, which is the same folder for the server")
        return given

    @field_validator("url")
    @classmethod
    def _is_web(cls, given: str) -> str:
        return web_address(given)


def web_address(given: str) -> str:
    """Return an http or https address without the slash at its end; ValueError for any other."""
    if not given.startswith(("http://", "https://")):
        raise ValueError("expected an address that begins with http:// or https://")
    return given.rstrip("/")


class Endpoint:
    """Asks a model behind an endpoint, greedily: temperature 0.

    Raises: DataError where it cannot be reached, refuses, or does not answer as the convention says.
    """

    def __init__(self, options: EndpointOptions) -> None:
        self._options = options

    def complete(self, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return what the model writes after each text."""
        bodies = [{"prompt": prompt} for prompt in prompts]
        return self._ask_all("completions", bodies, max_tokens, stop, lambda choice: choice["text"])

    def chat(self, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return what the model answers to each message of a user."""
        bodies = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
        return self._ask_all("chat/completions", bodies, max_tokens, stop, lambda choice: choice["message"]["content"])

    def _ask_all(
        self,
        what: str,
        bodies: Sequence[Mapping[str, Any]],
        max_tokens: int,
        stop: Sequence[str],
        answer: Callable[[Any], str | None],
    ) -> list[str]:
        """Ask several at a time; a server puts them into batches of its own."""
        url = f"{self._options.url}/{what}"
        common = {"model": self._options.model, "temperature": 0, "max_tokens": max_tokens}
        common |= {"stop": list(stop)} if stop else {}

        def ask(body: Mapping[str, Any]) -> str:
            reply = post(url, {**common, **body}, self._options)
            try:
                text = answer(reply["choices"][0])
            except (KeyError, IndexError, TypeError) as error:
                raise DataError(f"{url}: expected choices with an answer, found {reply!r:.200}") from error
            return text or ""  # null, where a model answers nothing

        with ThreadPoolExecutor(self._options.parallel) as threads:
            return list(threads.map(ask, bodies))


class Publisher:
    """Writes a live model to a folder and has the server load it.

    Raises: DataError for a folder that holds anything else, which would be overwritten, or a server that does not load.
    """

    def __init__(self, options: PublishOptions, endpoint: EndpointOptions, base: Path) -> None:
        self._url, self._endpoint, self._base = options.url, endpoint, base
        self._folder = Path(options.folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        if any(self._folder.iterdir()) and not (self._folder / MARK).is_file():
            raise DataError(f"{self._folder}: expected an empty folder for the candidates, found files; choose another")

    def publish(self, model: Any) -> None:
        """Write the weights, and the base's tokenizer beside them; return when the server has loaded them."""
        for path in self._folder.iterdir():  # removed, not overwritten: a server may still have them mapped
            path.unlink()
        (self._folder / MARK).touch()
        with quiet_transformers():
            model.save_pretrained(self._folder)
        for path in {path for pattern in COMPANIONS for path in self._base.glob(pattern) if path.is_file()}:
            shutil.copyfile(path, self._folder / path.name)
        reply = post(self._url, {"model_path": str(self._folder)}, self._endpoint)
        if isinstance(reply, Mapping) and reply.get("success") is False:
            raise DataError(f"{self._url}: the server did not load {self._folder} ({reply.get('message')!s:.200})")


class _NoRedirects(HTTPRedirectHandler):
    """A key is for the address that was given, not for one that it points to."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none: the answer becomes an error."""


_OPENER = build_opener(_NoRedirects)


def post(url: str, body: Mapping[str, Any], options: EndpointOptions) -> Any:
    """Send JSON and return the reply's; ask again after failures that may pass. Raises: DataError, without the key."""
    key = os.environ.get(options.api_key)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = Request(url, json.dumps(body).encode(), headers)  # noqa: S310  (http or https: see web_address)
    for attempt in range(options.retries + 1):
        if attempt:
            time.sleep(2.0 ** (attempt - 1))
        try:
            with _OPENER.open(request, timeout=options.timeout) as reply:
                return json.load(reply)
        except HTTPError as error:
            failure = f"HTTP {error.code}: {error.read(2000).decode(errors='replace')}"
            if error.code not in PASSING:
                break
        except (URLError, HTTPException, OSError) as error:
            failure = str(getattr(error, "reason", "") or error or type(error).__name__)
        except ValueError as error:
            failure = f"not JSON ({error})"
            break
    failure = " ".join(failure.replace(key, "***").split() if key else failure.split())
    raise DataError(
        f"{url}: expected an answer, found {failure[:200]} ({attempt + 1} attempts); see that it is served there, and "
        f"that {options.api_key} holds the key if it asks for one"
    )
