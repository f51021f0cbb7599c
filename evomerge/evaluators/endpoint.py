"""Models behind OpenAI-compatible endpoints: a judge, or a server that answers for the candidate.

    {url: http://localhost:30000/v1, model: judge-32b}

A server that answers for the candidate is first given its weights: they are written as a checkpoint to a folder, and
the server is told with a POST of {"model_path": folder}, as SGLang's /update_weights_from_disk takes it.
"""

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from evomerge.chat import ServerOptions, ask, post, web_address
from evomerge.errors import DataError
from evomerge.materialize.companions import companion_files
from evomerge.materialize.resident import quiet_transformers
from evomerge.records import Options

MARK = "published-by-evomerge"


class EndpointOptions(ServerOptions):
    """url, model, api_key, timeout: see ServerOptions; parallel: questions that are under way at a time.

    retries: further attempts after a failure that may pass, 1, 2, 4, ... s apart.
    """

    retries: int = Field(default=4, ge=0, le=10)
    parallel: int = Field(default=16, ge=1)


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


class Endpoint:
    """Asks a model behind an endpoint, greedily: temperature 0.

    Raises: DataError where it cannot be reached, refuses, or does not answer as the convention says.
    """

    def __init__(self, options: EndpointOptions) -> None:
        self._options = options

    def complete(self, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return what the model writes after each text."""
        return self._ask_all("completions", [{"prompt": prompt} for prompt in prompts], max_tokens, stop)

    def chat(self, prompts: Sequence[str], *, max_tokens: int, stop: Sequence[str] = ()) -> list[str]:
        """Return what the model answers to each message of a user."""
        bodies = [{"messages": [{"role": "user", "content": prompt}]} for prompt in prompts]
        return self._ask_all("chat/completions", bodies, max_tokens, stop)

    def _ask_all(
        self, what: str, bodies: Sequence[Mapping[str, Any]], max_tokens: int, stop: Sequence[str]
    ) -> list[str]:
        """Ask several at a time; a server puts them into batches of its own."""
        common: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens} | ({"stop": list(stop)} if stop else {})

        def answer(body: Mapping[str, Any]) -> str:
            return ask(what, {**common, **body}, self._options, self._options.retries)

        with ThreadPoolExecutor(self._options.parallel) as threads:
            return list(threads.map(answer, bodies))


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
        for path in companion_files(self._base):
            shutil.copyfile(path, self._folder / path.name)
        reply = post(self._url, {"model_path": str(self._folder)}, self._endpoint, self._endpoint.retries)
        if isinstance(reply, Mapping) and reply.get("success") is False:
            raise DataError(f"{self._url}: the server did not load {self._folder} ({reply.get('message')!s:.200})")
