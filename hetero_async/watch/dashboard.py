"""Shows a chronicle to browsers: the page, its figures as they come, and the same for programs. Read only.

Anybody who reaches the port may read, so it is a loopback one unless run.toml says otherwise. A reader has no queue
here: while it is slow to take one message, the looks that come meanwhile pass it by.
"""

import contextlib
import errno
import ipaddress
import logging
import socket
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import trio
from hypercorn.config import Config
from hypercorn.trio import serve
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from hetero_async.watch.chronicle import Chronicle
from hetero_async.watch.document import as_json, document, policy
from hetero_async.watch.history import RECENT_COLUMNS_MAX
from hetero_async.watch.looks import Looks
from hetero_async.watch.metrics import render

READERS_MAX = 16
SEND_EVERY_SECONDS = 2.0
# When the port is taken, these many behind it are tried.
PORTS_TRIED = 20
# The kernel ends a connection whose other side takes nothing for so long.
SLOW_READER_SECONDS = 20
HEADERS = [
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


async def show(url: str, chronicle: Chronicle) -> None:
    """Serve until cancelled. `url`: http://HOST:PORT, where to listen."""
    listening = _listen(url, chronicle)
    if listening is None:
        await trio.sleep_forever()
        return
    with contextlib.closing(listening):
        host, port = urlsplit(url).hostname or "", listening.getsockname()[1]
        shown = f"[{host}]" if ":" in host else host
        chronicle.address = f"http://{shown}:{port}/"
        instead = {} if url.endswith(f":{port}") else {"instead_of": url}
        chronicle.observer.event("dashboard", address=chronicle.address, **instead)
        await serve(guarded(app(chronicle), host), _config(listening, chronicle.complain))  # type: ignore[arg-type]


def _listen(url: str, chronicle: Chronicle) -> socket.socket | None:
    """On the port of the URL or one behind it; None, and told why, where that cannot be."""
    place = urlsplit(url)
    first = place.port or 0
    why = ""
    for port in range(first, min(first + PORTS_TRIED, 1 << 16)):
        try:
            family, *_, address = socket.getaddrinfo(place.hostname, port, type=socket.SOCK_STREAM)[0]
            listening = socket.socket(family, socket.SOCK_STREAM)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # Inherited by what is accepted.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SLOW_READER_SECONDS)
            listening.bind(address)
            listening.listen(READERS_MAX)
        except OSError as error:
            why = f"{place.hostname}:{port}: {error.strerror}"
            if error.errno != errno.EADDRINUSE:
                break
        else:
            return listening
    chronicle.observer.event(
        "no dashboard", reason=why, instead="the run goes on without; another port: `dashboard` in run.toml"
    )
    return None


class _Complaints(logging.Handler):
    def __init__(self, complain: Callable[[object], None]) -> None:
        super().__init__(logging.ERROR)
        self._complain = complain

    def emit(self, record: logging.LogRecord) -> None:
        why = record.exc_info[1] if record.exc_info else ""
        self._complain(f"{record.getMessage()}: {type(why).__name__}: {why}")


def _config(listening: socket.socket, complain: Callable[[object], None]) -> Config:
    config = Config()
    config.bind = [f"fd://{listening.detach()}"]
    logger = logging.Logger("dashboard")
    logger.addHandler(_Complaints(complain))
    config.errorlog = logger
    config.include_server_header = False
    return config


# --- what is told to whom ---


def guarded(inner: ASGIApp, host: str) -> ASGIApp:
    """Lets GET and HEAD through, and only those that were sent to us: another site's page, whose name was made to
    lead here (DNS rebinding), comes with that name in its Host header, and a browser lets it read the answer."""

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await inner(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        if scope["method"] not in ("GET", "HEAD"):
            refusal = PlainTextResponse("this page can only be read: GET\n", 405, {"allow": "GET, HEAD"})
            await refusal(scope, receive, send)
        elif not is_ours(named, host):
            told = "ask for this page by its address, by localhost, or by the name that stands in run.toml\n"
            await PlainTextResponse(told, 421)(scope, receive, send)
        else:
            await inner(scope, receive, _with_headers(send))

    return guard


def _with_headers(send: Send) -> Send:
    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *HEADERS]
        await send(message)

    return sent


def is_ours(named: str, host: str) -> bool:
    """Whether a Host header names us in a way that no other site can: by an address, or by our own name."""
    try:
        name = urlsplit(f"//{named}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in ("localhost", host.lower())
    return True


def app(chronicle: Chronicle) -> Starlette:
    async def page(request: Request) -> Response:
        return HTMLResponse(document(), headers={"content-security-policy": f"{policy()}; frame-ancestors 'none'"})

    async def content(request: Request) -> Response:
        return JSONResponse(pictured(chronicle.looks) if chronicle.looks else {})

    async def metrics(request: Request) -> Response:
        if chronicle.looks is None:
            return PlainTextResponse("nothing has been seen yet\n", 503)
        return PlainTextResponse(render(chronicle.looks.status), media_type="text/plain; version=0.0.4")

    routes = [
        Route("/", page),
        Route("/content.json", content),
        Route("/metrics", metrics),
        Route("/events", Events(chronicle)),
    ]
    return Starlette(routes=routes)


def pictured(looks: Looks, whole_since: int = 0, recent_since: int = 0) -> dict[str, Any]:
    """What the page draws: how the run stands, and its history from those columns on."""
    history = looks.history
    return {
        "is_live": True,
        "seconds": looks.seconds,
        "status": looks.status,
        "whole": history.whole.shown(whole_since),
        "recent": looks.recent.shown(recent_since) | {"most": RECENT_COLUMNS_MAX},
        **history.shown(),
    }


@dataclass(slots=True)
class Reader:
    """What one reader has: up to which columns, of which generation."""

    generation: int = -1
    whole_slot: int = 0
    recent_slot: int = 0


@dataclass(slots=True)
class Events:
    """Server-sent events, an ASGI app: all that there is at first, later what is new."""

    chronicle: Chronicle
    readers: int = 0
    _made: dict[tuple[float, int, int], bytes] = field(default_factory=dict)  # of the newest look, for all readers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.readers >= READERS_MAX:
            told = f"{READERS_MAX} are reading already; close one of those pages\n"
            await PlainTextResponse(told, 503, {"retry-after": "10"})(scope, receive, send)
            return
        self.readers += 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._tell, send)
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()
        finally:
            self.readers -= 1

    async def _tell(self, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        reader = Reader()
        while True:
            looked = self.chronicle.looked
            if (looks := self.chronicle.looks) is not None and looks.status:
                for line in self._new(looks, reader):
                    await send({"type": "http.response.body", "body": line, "more_body": True})
                await trio.sleep(SEND_EVERY_SECONDS)
            await looked.wait()

    def _new(self, looks: Looks, reader: Reader) -> Iterator[bytes]:
        whole, recent = looks.history.whole.slots, looks.recent.slots
        since = (0, 0)
        if reader.generation == looks.generation:
            since = bisect_left(whole, reader.whole_slot), bisect_left(recent, reader.recent_slot)
        reader.generation, reader.whole_slot, reader.recent_slot = looks.generation, whole[-1], recent[-1]
        yield b"event: new\n" if any(since) else b"event: all\n"
        if (made := self._made.get((looks.seconds, *since))) is None:
            if self._made and next(iter(self._made))[0] != looks.seconds:
                self._made.clear()
            made = b"data: " + as_json(pictured(looks, *since)).encode() + b"\n\n"
            self._made[looks.seconds, *since] = made
        yield made
