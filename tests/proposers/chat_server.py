"""A real HTTP server that answers chat completions; what it answers depends on the prompt alone."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Raw:
    """An answer that is no chat completion."""

    status: int
    chunks: Iterable[bytes]
    location: str | None = None


Answer = Callable[[str], str | Raw]


class ChatServer:
    """Serves while it is open, and remembers what it was asked; an answer may wait for ``closing``."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.closing = threading.Event()
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/v1"

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]

    def __enter__(self) -> "ChatServer":
        chat = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                chat.bodies.append(body)
                chat.keys.append(self.headers["Authorization"])
                answer = chat.answer(body["messages"][0]["content"])
                if isinstance(answer, str):
                    answer = Raw(200, [json.dumps({"choices": [{"message": {"content": answer}}]}).encode()])
                with suppress(ConnectionError):  # the client has given up
                    self.send_response(answer.status)
                    if answer.location is not None:
                        self.send_header("Location", answer.location)
                    self.end_headers()
                    for chunk in answer.chunks:
                        self.wfile.write(chunk)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def shown(prompt: str) -> np.ndarray:
    """The numbers of the merges that a prompt shows as scored, worst first, (N, B)."""
    return np.array([json.loads(row) for row in re.findall(r"^(\[[\d, ]+\]) -?\d", prompt, flags=re.MULTILINE)])


def reply(means: Any) -> str:
    return json.dumps({"means": means})


def clever(prompt: str) -> str:
    """The means of the best 2, 3, 4 and 5 that are shown."""
    rows = shown(prompt)
    return reply([np.rint(rows[-count:].mean(axis=0)).astype(int).tolist() for count in (2, 3, 4, 5)])


def useless(prompt: str) -> str:
    """Numbers that have nothing to do with the scores."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4], "little")
    return reply(np.random.default_rng(seed).integers(0, 101, (4, shown(prompt).shape[1])).tolist())
