"""The page, served: read-only, of the runs that a place holds, live while they are written.

On the loopback any program of this machine may look, but no web page: the Host header has to name the machine itself,
so that no other name can be bound to its address. Anywhere else a token is needed.
"""

import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from ipaddress import ip_address
from threading import Lock
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from evomerge.errors import EvoMergeError, InputError, RunError
from evomerge.ledger.ledger import Ledger
from evomerge.ledger.location import Location
from evomerge.records import digest
from evomerge.report.page.document import TYPES, static_text
from evomerge.report.page.parts import PARTS, part_json, trial_items_json
from evomerge.run.run import Run, open_run
from evomerge.run.runs import run_locations, summarize_run

PORT = 8700
NUM_PORTS = 50  # that are tried
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        b"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),  # the token stands in the first URL
    (b"cache-control", b"no-cache"),
]


@dataclass
class _Opened:
    """A run as of one stamp, with the parts that were asked for."""

    stamp: str = ""
    run: Run | None = None
    parts: dict[str, str] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)


class Pages:
    """What the server answers, of the runs in a place; nothing outside them has an address."""

    def __init__(self, place: Location) -> None:
        self.place = place
        self._opened: dict[str, _Opened] = {}
        list(run_locations(place))  # Raises: RunError if there is no such place

    def routes(self) -> list[Route]:
        """Return the addresses."""
        return [
            Route("/", self.home),
            Route("/runs", self.runs),
            Route("/static/{name}", self.static),
            Route("/run/{name}/", self.page),
            Route("/run/{name}/{part}", self.part),
            Route("/run/{name}/items/{trial:int}", self.items),
        ]

    def home(self, _: Request) -> Response:
        """The list of runs, or the page of the only one that was named."""
        names = list(self._locations())
        if len(names) == 1 and (self.place.name or not self.place.is_missing):
            return RedirectResponse(f"/run/{names[0]}/", status_code=307)
        return _text("page.html")

    def page(self, request: Request) -> Response:
        """The page of one run."""
        self._location(request)
        return _text("page.html")

    def static(self, request: Request) -> Response:
        """A file of the page."""
        try:
            return _text(request.path_params["name"])
        except KeyError as error:
            raise HTTPException(404) from error

    def runs(self, _: Request) -> Response:
        """All runs in a few numbers."""
        found = {name: asdict(summarize_run(location)) for name, location in self._locations().items()}
        rows = [row | {"run": name, "location": str(row["location"])} for name, row in found.items()]
        return JSONResponse({"place": str(self.place), "runs": rows})

    def part(self, request: Request) -> Response:
        """A part of a run's page; nothing but its stamp if the reader holds the latest."""
        part = request.path_params["part"]
        if part not in PARTS:
            raise HTTPException(404)
        return self._answer(request, part, lambda run: part_json(run, part))

    def items(self, request: Request) -> Response:
        """The scores of one trial item by item."""
        trial = request.path_params["trial"]
        return self._answer(request, f"items/{trial}", lambda run: trial_items_json(run, trial))

    def _answer(self, request: Request, part: str, make: Callable[[Run], str]) -> Response:
        """Make a part of the run as it is now, or take the one that was made of it."""
        location = self._location(request)
        opened = self._opened.setdefault(request.path_params["name"], _Opened())
        try:
            with opened.lock:
                stamp = _stamp(location)
                headers = {"ETag": f'"{stamp}"'}
                if request.headers.get("if-none-match") == headers["ETag"]:
                    return Response(status_code=304, headers=headers)
                if opened.run is None or opened.stamp != stamp:
                    opened.run, opened.stamp, opened.parts = open_run(location), stamp, {}
                if part not in opened.parts:
                    opened.parts[part] = make(opened.run)
                return Response(opened.parts[part], media_type="application/json", headers=headers)
        except EvoMergeError as error:
            return PlainTextResponse(str(error), status_code=503)

    def _locations(self) -> dict[str, Location]:
        """Return the runs by the names under which they are served."""
        return {_name(location): location for location in run_locations(self.place)}

    def _location(self, request: Request) -> Location:
        found = self._locations().get(request.path_params["name"])
        if found is None:
            raise HTTPException(404)
        return found


class Guard:
    """Lets nobody in who may not be: reads alone, and a known host or the token."""

    def __init__(self, app: ASGIApp, token: str | None, cookie: str) -> None:
        self.app, self.token, self.cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or hand it on."""
        if scope["type"] != "http":
            return
        request = Request(scope)
        answer = self._refusal(request)

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        handler: Callable[[Scope, Receive, Send], Awaitable[None]] = answer or self.app
        await handler(scope, receive, send_with_headers)

    def _refusal(self, request: Request) -> Response | None:
        if request.method not in ("GET", "HEAD"):
            return PlainTextResponse("read-only", status_code=405)
        if self.token is None:
            if is_loopback(request.url.hostname or ""):
                return None
            return PlainTextResponse("not the name of this machine's loopback", status_code=403)
        if secrets.compare_digest(request.cookies.get(self.cookie, "").encode(), self.token.encode()):
            return None
        if secrets.compare_digest(request.query_params.get("token", "").encode(), self.token.encode()):
            answer = RedirectResponse(request.url.path, status_code=307)
            answer.set_cookie(self.cookie, self.token, httponly=True, samesite="lax")
            return answer
        return PlainTextResponse("open the address that evomerge ui printed: it holds a token", status_code=403)


def make_app(place: Location, token: str | None = None, port: int = PORT) -> Starlette:
    """Return the application. token: what visitors need; None where the loopback is served. Raises: RunError."""
    guard = Middleware(Guard, token=token, cookie=f"evomerge_{port}")
    return Starlette(routes=Pages(place).routes(), middleware=[guard, Middleware(GZipMiddleware, compresslevel=5)])


def serve(place: Location, *, host: str, port: int | None, started: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. port: None for 8700 or the next that is free; started: is told the address once it answers.

    Raises: InputError for a host or port that cannot be had; RunError if there is no such place.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started(_address(host, number, token))

    with _listen(host, port) as listening, suppress(KeyboardInterrupt):  # which the server raises again in the end
        number = listening.getsockname()[1]
        token = None if is_loopback(host) else secrets.token_urlsafe(24)
        app = make_app(place, token, number)
        Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off")).run(sockets=[listening])


def is_loopback(host: str) -> bool:
    """Whether a host is this machine's loopback, by name or by number."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int | None) -> socket.socket:
    numbers = range(PORT, PORT + NUM_PORTS) if port is None else [port]
    reason = ""
    for number in numbers:
        try:
            family, *_, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address, family=family)
        except OSError as error:
            reason = str(error.strerror)
    what = f"{host}, port {port}" if port is not None else f"{host}, ports {numbers[0]} to {numbers[-1]}"
    raise InputError(f"cannot serve at {what} ({reason}); choose others with --host and --port")


def _address(host: str, port: int, token: str | None) -> str:
    shown = f"[{host}]" if ":" in host else host
    if shown in ("0.0.0.0", "[::]"):  # noqa: S104 - everywhere: a name that others can reach
        shown = socket.gethostname()
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


def _name(location: Location) -> str:
    if location.folder is not None:
        return location.folder.resolve().name
    return location.name or "run"


def _stamp(location: Location) -> str:
    """Return what changes with a run: what is written, and who drives it."""
    if location.is_missing:
        raise RunError(f"{location}: expected a run, found none any more")
    ledger = Ledger.open(location)
    try:
        return digest([ledger.stamp(), str(ledger.holder())])[:16]
    finally:
        ledger.close()


def _text(name: str) -> Response:
    kind = TYPES[name[name.rindex(".") :]]
    return Response(static_text(name), media_type=f"{kind}; charset=utf-8")
