"""A real HTTP server that answers as OpenAI's convention says, from the checkpoint that it was told to load."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.evaluators.generate import Limits, answer_text, end_tokens, generate
from evomerge.evaluators.lines import text_tokens
from evomerge.materialize.resident import quiet_transformers

Reply = tuple[int, Any]


@contextmanager
def serving(answer: Callable[[str, dict[str, Any], dict[str, str]], Reply]) -> Iterator[str]:
    """Serve on a free port: answer(path, body, headers) -> status, and JSON or text; give the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, reply = answer(self.path, body, dict(self.headers))
            content = (reply if isinstance(reply, str) else json.dumps(reply)).encode()
            self.send_response(status)
            if status in (301, 302, 303, 307):
                self.send_header("Location", str(reply))
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class ServedModel:
    """Loads with transformers, answers with ``generate``; remembers what it loaded and was asked."""

    def __init__(self) -> None:
        self.model: Any = None
        self.tokenizer: Any = None
        self.loads: list[str] = []
        self.asked: list[dict[str, Any]] = []
        self._one_at_a_time = threading.Lock()

    def __call__(self, path: str, body: dict[str, Any], _headers: dict[str, str]) -> Reply:
        with self._one_at_a_time:
            if path == "/update_weights_from_disk":
                return self._load(Path(body["model_path"]))
            self.asked.append(body)
            if path == "/v1/completions":
                return 200, {"choices": [{"text": self._write(text_tokens(self.tokenizer, body["prompt"]), body)}]}
            if path == "/v1/chat/completions":
                prompt = self.tokenizer.apply_chat_template(
                    body["messages"], add_generation_prompt=True, return_dict=False
                )
                return 200, {"choices": [{"message": {"content": self._write(tuple(prompt), body)}}]}
            return 404, {"error": "no such path"}

    def _load(self, folder: Path) -> Reply:
        with quiet_transformers():
            self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.loads.append(str(folder))
        return 200, {"success": True, "message": "loaded"}

    def _write(self, prompt: tuple[int, ...], body: dict[str, Any]) -> str:
        stop = tuple(body.get("stop", ()))
        limits = Limits(body["max_tokens"], end_tokens(self.model, self.tokenizer), stop)
        return answer_text(self.tokenizer, generate(self.model, self.tokenizer, [prompt], limits, 1)[0], stop)
