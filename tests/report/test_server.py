"""The server answers reads of the runs it was given, and nobody else."""

import json
import shutil
import socket
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient
from typer.testing import CliRunner

from benchmarks.page import EXPERTS, World, write_run
from evomerge.cli import app
from evomerge.errors import InputError, RunError
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import locate
from evomerge.records import Candidate
from evomerge.report.page.parts import trial_items_json
from evomerge.report.server import is_loopback, make_app, serve
from evomerge.run.run import open_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("server")
    write_run(locate(root / "runs" / "one"), 3)
    (root / "runs" / "no-run").mkdir()
    (root / "secret.txt").write_text("secret")
    return root / "runs"


def client(folder: Path, token: str | None = None, base: str = "http://127.0.0.1:8700") -> TestClient:
    return TestClient(make_app(locate(folder), token), base_url=base, follow_redirects=False)


def test_runs_are_listed_and_each_has_a_page(folder: Path) -> None:
    visitor = client(folder)
    (listed,) = visitor.get("/runs").json()["runs"]
    assert (listed["run"], listed["name"], listed["state"]) == ("one", "made-up", "finished")
    assert "text/html" in visitor.get("/").headers["content-type"]
    assert visitor.get("/run/one/").status_code == 200
    assert visitor.get("/run/one/overview").json()["trials"]["count"] == 3


def test_a_run_alone_has_its_page_at_once(folder: Path) -> None:
    answer = client(folder / "one").get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/run/one/")


@pytest.mark.parametrize(
    "path",
    [
        "/run/no-run/",
        "/run/two/overview",
        "/run/one/ledger.sqlite",
        "/run/../secret.txt",
        "/run/%2e%2e/overview",
        "/run/..%2f..%2fsecret.txt/overview",
        "/static/..%2fparts.py",
        "/static/nothing.js",
        "/secret.txt",
    ],
)
def test_nothing_else_has_an_address(folder: Path, path: str) -> None:
    assert client(folder).get(path).status_code == 404


def test_it_only_reads(folder: Path) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client(folder).request(method, "/run/one/overview").status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.0.2.1", "0.0.0.0"])
def test_on_the_loopback_only_its_own_names_are_answered(folder: Path, host: str) -> None:
    assert client(folder).get("/runs", headers={"Host": f"{host}:8700"}).status_code == 403
    for own in ("localhost:8700", "127.0.0.1:8700", "[::1]:8700"):
        assert client(folder).get("/runs", headers={"Host": own}).status_code == 200


def test_elsewhere_a_token_is_needed_once(folder: Path) -> None:
    visitor = client(folder, token="right", base="http://machine:8700")
    assert visitor.get("/runs").status_code == 403
    assert visitor.get("/?token=wrong").status_code == 403
    assert visitor.get("/static/page.css").status_code == 403
    answer = visitor.get("/run/one/?token=right")
    assert (answer.status_code, answer.headers["location"]) == (307, "/run/one/")
    assert "HttpOnly" in answer.headers["set-cookie"]
    assert visitor.get("/runs").status_code == 200  # the cookie


def test_every_answer_has_a_policy_without_other_hosts(folder: Path) -> None:
    for path in ("/", "/runs", "/static/page.js", "/nothing"):
        headers = client(folder).get(path).headers
        assert "http" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_a_trial_has_its_items_at_an_address(folder: Path) -> None:
    visitor = client(folder)
    assert visitor.get("/run/one/items/1").json() == json.loads(trial_items_json(open_run(folder / "one"), 1))
    assert not any("trial:" in subject for subject in visitor.get("/run/one/items").json()["held"]["search"])
    assert "no trial 99" in visitor.get("/run/one/items/99").text
    assert visitor.get("/run/one/items/knee").status_code == 404


def test_only_what_is_new_is_sent(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "one")
    visitor = client(tmp_path)
    first = visitor.get("/run/one/overview")
    same = visitor.get("/run/one/overview", headers={"If-None-Match": first.headers["etag"]})
    assert (same.status_code, same.content) == (304, b"")
    with closing(Ledger.drive(locate(tmp_path / "one"), "made-up")) as ledger:
        trial = ledger.issue(0, 3, Candidate(point=(0.5,) * 32))
        issued = visitor.get("/run/one/overview", headers={"If-None-Match": first.headers["etag"]})
        assert issued.json()["state"] == "running"
        ledger.record(trial, World(EXPERTS).measure(np.full(32, 0.5), "search"), None)
        recorded = visitor.get("/run/one/overview", headers={"If-None-Match": issued.headers["etag"]})
    assert recorded.json()["trials"]["count"] == 4
    assert len({first.headers["etag"], issued.headers["etag"], recorded.headers["etag"]}) == 3
    (tmp_path / "one" / "ledger.sqlite").unlink()
    assert visitor.get("/run/one/overview").status_code == 404


def test_a_place_without_runs_and_a_port_that_is_taken_are_mistakes(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="expected a folder with runs, found none"):
        make_app(locate(tmp_path / "nowhere"))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InputError, match="choose others with --host and --port"),
    ):
        serve(locate(tmp_path), host="127.0.0.1", port=taken.getsockname()[1], started=lambda _: None)


def test_a_place_that_is_not_there_is_a_mistake() -> None:
    done = CliRunner().invoke(app, ["ui", "nowhere"])
    assert isinstance(done.exception, RunError)


def test_what_the_loopback_is() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "localhost", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.0.2.1", "machine", "")))
