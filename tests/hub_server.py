"""A stand-in for Hugging Face's hub: the part of its HTTP interface that an upload of a model uses.

It keeps the files of its repositories in memory, takes large files in LFS's way, and checks a card's head by the rules
of the real one that matter here.
"""

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN, OWNER = "hf_stand_in", "someone"
RELATIONS = ("adapter", "merge", "quantized", "finetune")


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)


class Hub(ThreadingHTTPServer):
    """repositories by ``OWNER/NAME``; validated: cards that were sent to be checked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.validated: list[str] = []
        self.is_full = False


@contextmanager
def hub() -> Iterator[Hub]:
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def card_errors(content: str) -> list[str]:
    """What the hub refuses in a card's head."""
    if not content.startswith("---\n"):
        return []
    head = yaml.safe_load(content.split("---\n")[1])
    json.dumps(head, allow_nan=False)
    errors = [
        f'"base_model" with value "{model}" is not valid. Use a model id from https://hf.co/models.'
        for model in head.get("base_model", [])
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", model)
    ]
    if head.get("base_model_relation", "merge") not in RELATIONS:
        errors.append('"base_model_relation" is not valid')
    return errors + [error for model in head.get("model-index", []) for error in _index_errors(model)]


def _index_errors(model: dict[str, Any]) -> list[str]:
    errors = [] if isinstance(model.get("name"), str) else ['"model-index[0].name" is required']
    for result in model.get("results", []):
        given = (result["task"].get("type"), result["dataset"].get("type"), result["dataset"].get("name"))
        if not all(isinstance(part, str) and part for part in given):
            errors.append('"model-index[0].results" misses a type or a name')
        for metric in result["metrics"]:
            if not isinstance(metric.get("type"), str) or "value" not in metric:
                errors.append('"model-index[0].results[0].metrics" misses a type or a value')
    return errors


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        if not self._is_known():
            return
        if self.path == "/api/whoami-v2":
            self._reply({"name": OWNER, "type": "user", "auth": {"type": "access_token"}})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/tree/main", self.path):
            files = self.server.repositories[match[1]].files
            self._reply([{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in files])
        else:
            self._reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/api/validate-yaml":
            self.server.validated.append(json.loads(body)["content"])
            errors = card_errors(self.server.validated[-1])
            found = {"errors": [{"message": error} for error in errors], "warnings": []}
            self._reply(found, 400 if errors else 200)
            return
        if not self._is_known():
            return
        if self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif re.match(r"/api/models/[^/]+/[^/]+/preupload/main", self.path):
            self._reply({"files": [_mode(file["path"]) for file in json.loads(body)["files"]]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [self._upload(wanted) for wanted in json.loads(body)["objects"]]
            self._reply({"transfer": "basic", "objects": objects})
        elif match := re.match(r"/api/models/([^/]+/[^/]+)/commit/main", self.path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()])
        else:
            self._reply({"error": f"no {self.path}"}, 404)

    def _create(self, wanted: dict[str, Any]) -> None:
        owner = wanted["organization"] or OWNER
        repo_id = f"{owner}/{wanted['name']}"
        if owner != OWNER:
            self._reply({"error": f"You don't have the rights to create a model under the namespace {owner}"}, 403)
        elif repo_id in self.server.repositories:
            url = f"{self.server.url}/{repo_id}"
            self._reply({"error": "You already created this model repo", "url": url}, 409)
        else:
            self.server.repositories[repo_id] = Repository(wanted.get("visibility") == "private")
            self._reply({"url": f"{self.server.url}/{repo_id}", "name": repo_id})

    def _upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.server.url}/large/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href, "header": {}}}}

    def _commit(self, repo_id: str, lines: list[dict[str, Any]]) -> None:
        if self.server.is_full:
            self._reply({"error": "Private repository storage limit reached"}, 400)
            return
        repository = self.server.repositories[repo_id]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repository.messages.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self.server.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del repository.files[value["path"]]
        commit = f"{self.server.url}/{repo_id}/commit/{'1' * 40}"
        self._reply({"success": True, "commitUrl": commit, "commitOid": "1" * 40, "hookOutput": ""})

    def _is_known(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._reply({"error": "Invalid username or password."}, 401)
        return False

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def _mode(path: str) -> dict[str, Any]:
    is_large = path.endswith((".safetensors", ".png"))
    return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
