"""Models behind OpenAI-compatible endpoints: a question, and the text that is answered.

Such a server is a provider's, or one's own: vLLM, SGLang, llama.cpp and ``transformers serve`` speak the same.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from http import HTTPStatus
from http.client import HTTPException
from threading import Thread
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pydantic import Field, field_validator

from evomerge.errors import DataError
from evomerge.records import Options

PASSING = {HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, *(s for s in HTTPStatus if s >= 500)}
MAX_BYTES = 2**20  # of a reply: a server that never ends must not fill the memory
SHORTEST_SECRET = 8  # characters; "x" and "EMPTY" stand in where a server asks for no key, and may be words of a reply
Result = TypeVar("Result")


class ServerOptions(Options):
    """url: up to and with /v1; api_key: name of the environment variable that holds the key, if there is one.

    timeout: seconds for one answer.
    """

    url: str
    model: str
    api_key: str = "OPENAI_API_KEY"
    timeout: float = Field(default=120.0, gt=0)

    @field_validator("url")
    @classmethod
    def _is_web(cls, given: str) -> str:
        return web_address(given)


def web_address(given: str) -> str:
    """Return an http or https address without the slash at its end; ValueError for anything else."""
    parts = urlsplit(given)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:  # port: ValueError if it is none
        raise ValueError("expected an address that begins with http:// or https:// and a host")
    return given.rstrip("/")


def ask(what: str, body: Mapping[str, Any], options: ServerOptions, retries: int = 0) -> str:
    """Return what the model writes; the key, should it be in there, is not.

    what: "chat/completions", with messages in the body, or "completions", with a prompt in it.
    Raises: DataError where the server cannot be reached, refuses, or does not answer as the convention says.
    """
    url = f"{options.url}/{what}"
    reply = post(url, {"model": options.model, **body}, options, retries)
    try:
        choice = reply["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        if not isinstance(text, str | None):
            raise TypeError
    except (KeyError, IndexError, TypeError) as error:
        found = _without(_key(options), repr(reply))
        raise DataError(f"{url}: expected choices with an answer, found {found[:200]}") from error
    return _without(_key(options), text or "")  # null, where a model answers nothing


def post(url: str, body: Mapping[str, Any], options: ServerOptions, retries: int = 0) -> Any:
    """Send JSON and return the reply's; ask again, 1, 2, 4, ... s later, after failures that may pass.

    No attempt lasts longer than the time-out, however slowly the answer drips.
    Raises: DataError, without the key.
    """
    key = _key(options)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = Request(url, json.dumps(body).encode(), headers)  # noqa: S310  (http or https: see web_address)
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(2.0 ** (attempt - 1))
        try:
            status, content = _within(options.timeout, lambda: _send(request, options.timeout))
        except (HTTPException, OSError, ValueError) as error:
            cause = getattr(error, "reason", "") or error
            failure = f"timed out after {options.timeout:g} s" if isinstance(cause, TimeoutError) else str(cause)
            failure = failure or type(error).__name__
            if isinstance(error, ValueError):  # an address that is none
                break
            continue
        if status < HTTPStatus.MULTIPLE_CHOICES:
            try:
                return json.loads(content)
            except (ValueError, RecursionError) as error:
                failure = f"not JSON ({error})"
                break
        failure = f"HTTP {status}: {content}"
        if status not in PASSING:
            break
    failure = " ".join(_without(key, failure).split())
    raise DataError(
        f"{url}: expected an answer, found {failure[:200]} ({attempt + 1} attempts); see that it is served there, and "
        f"that {options.api_key} holds the key if it asks for one"
    )


class _NoRedirects(HTTPRedirectHandler):
    """A key is for the address that was given, not for one that it points to."""

    def redirect_request(self, *_: Any) -> None:
        """Follow none: the answer becomes an error."""


_OPENER = build_opener(_NoRedirects)


def _send(request: Request, timeout: float) -> tuple[int, str]:
    """Return the status and the content of the answer."""
    try:
        with _OPENER.open(request, timeout=timeout) as reply:
            return reply.status, reply.read(MAX_BYTES).decode(errors="replace")
    except HTTPError as error:
        with error:
            return error.code, error.read(MAX_BYTES).decode(errors="replace")


def _within(seconds: float, call: Callable[[], Result]) -> Result:
    """Return what ``call`` returns, raise what it raises, and TimeoutError where it takes longer.

    A socket's own time-out counts from the last byte, and looking up a name has none.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    Thread(target=run, daemon=True).start()  # daemon: one that still waits does not keep the process alive
    return outcome.result(seconds)


def _key(options: ServerOptions) -> str:
    """Return the key, or "". Raises: DataError for one that no header can hold: the error of that would show it."""
    key = os.environ.get(options.api_key, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise DataError(f"{options.api_key}: expected a key of printable characters, found others in it; set it anew")
    return key


def _without(key: str, text: str) -> str:
    return text.replace(key, "***") if len(key) >= SHORTEST_SECRET else text
