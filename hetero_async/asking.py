"""Asks the nodes of a run from outside: how it stands, where each of them is, to take over, to hear a key again.

On a node's own host its operator's socket answers, elsewhere the node itself, over the wire.
"""

import contextlib
import functools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from hetero_async import ports
from hetero_async.complaints import SERVER
from hetero_async.config import Node, RunConfig
from hetero_async.core.messages import Fence, Position, StatusReport, StatusRequest
from hetero_async.ports import Observer
from hetero_async.shell.admin import NotServing, ask
from hetero_async.shell.dial import DialLink, Endpoint, open_dial_link, until_stopped
from hetero_async.shell.keys import load_public
from hetero_async.shell.telemetry import NullObserver

Status = dict[str, Any]

STATUS_SECONDS = 5.0
STATUS_RETRY_SECONDS = 0.1
# All others are asked, twice, and a server that hands over is waited for.
PROMOTION_SECONDS = 40.0
# Another node, asked where it stands, that has not answered in this time cannot be reached.
ASK_SECONDS, ASK_AGAIN_SECONDS, SEND_AGAIN_SECONDS = 4.0, 1.0, 0.1


# --- over the wire ---


def endpoints(config: RunConfig, without: str = "") -> list[Endpoint]:
    """Every node of the run, with its pinned key; a standby that has never joined has none. Raises ConfigError where
    the server's is missing."""
    return [
        Endpoint(
            name=node.name,
            key=load_public(config.keys / f"{node.name}.public"),
            control=node.control,
            bulk=node.bulk,
        )
        for node in config.nodes().values()
        if node.name != without and (node.name == SERVER or (config.keys / f"{node.name}.public").exists())
    ]


async def ask_nodes(config: RunConfig, name: str, term: int) -> dict[str, Position | None]:
    """Tell all other nodes, as this one, of a term (0: only ask); where each stands, None: it did not answer."""
    secret = config.keys / f"{name}.secret"

    async def ask(other: Endpoint) -> Position:
        async with open_dial_link([other], secret_path=secret, observer=NullObserver()) as link:
            return await asked(link, Fence(term=term))

    # All nodes count, also those whose key is not known here: which terms a node may take follows from their names.
    unknown: dict[str, Position | None] = dict.fromkeys(other for other in config.nodes() if other != name)
    others = {other.name: functools.partial(ask, other) for other in endpoints(config, without=name)}
    return unknown | await ask_all(others)


async def ask_all(questions: Mapping[str, Callable[[], Awaitable[Position]]]) -> dict[str, Position | None]:
    """All nodes at once; None: no answer in time."""
    positions: dict[str, Position | None] = dict.fromkeys(sorted(questions))

    async def ask(name: str) -> None:
        with trio.move_on_after(ASK_SECONDS):
            positions[name] = await questions[name]()

    async with trio.open_nursery() as nursery:
        for name in questions:
            nursery.start_soon(ask, name)
    return positions


async def asked(link: ports.DialLink, fence: Fence) -> Position:
    """The answer of the node that is dialled; its caller's deadline ends the wait."""
    while True:
        with trio.move_on_after(ASK_AGAIN_SECONDS):
            while not await link.control.send(link.server.key, fence):  # noqa: ASYNC110, the deadline ends it
                await trio.sleep(SEND_AGAIN_SECONDS)
            while not isinstance(message := (await link.control.receive()).message, Position):
                pass
            return message


# --- as the operator ---


def nodes_here(config: RunConfig) -> list[Node]:
    """Those that this host can be, as far as its key files tell."""
    return [node for node in config.nodes().values() if (config.keys / f"{node.name}.secret").exists()]


@contextlib.asynccontextmanager
async def open_status(
    config: RunConfig, observer: Observer, how_long: Callable[[], str] = until_stopped
) -> AsyncIterator[Callable[[], Awaitable[Status | None]]]:
    """The question how the run stands; the answer is None when there is none (in time).

    On the server's host the operator's socket is asked, elsewhere the server, with a key that it lets in.
    `how_long`: as in open_dial_link.
    """
    if nodes_here(config):
        yield functools.partial(_ask_here, config)
        return
    secret = _key_to_ask_with(config)
    async with open_dial_link(endpoints(config), secret_path=secret, observer=observer, how_long=how_long) as link:

        async def ask_there() -> Status | None:
            with trio.move_on_after(STATUS_SECONDS):
                return await _ask_status(link)
            return None

        yield ask_there


def for_one_question() -> str:
    """How long a server is tried by somebody who asks once."""
    return f"until {STATUS_SECONDS:g} s have passed"


def why_no_status(config: RunConfig) -> str:
    if nodes_here(config):
        return f"no server answers on {config.directory}; start it with: hetero-async serve --run {config.path}"
    addresses = ", ".join(endpoint.control for endpoint in endpoints(config))
    return f"no answer from {addresses} in {STATUS_SECONDS:g} s"


async def _ask_here(config: RunConfig) -> Status | None:
    """Where several run on one host, the one that serves."""
    answers: list[Status] = []
    for node in nodes_here(config):
        with contextlib.suppress(NotServing):
            answers.append(await ask(node.admin, "status"))
    return min(answers, key=lambda status: "standby" in status, default=None)


async def promote(config: RunConfig, name: str, in_spite: bool) -> list[str]:
    """Have a standby of this host take over. What stands against it, in lines; none: it does."""
    answer: list[str] = await ask(config.node(name).admin, "promote", PROMOTION_SECONDS, in_spite=in_spite)
    return answer


async def lift(config: RunConfig, key: str) -> str:
    """Have the server of this host hear a quarantined key again; whose it is. Raises NotServing, UserError."""
    for node in nodes_here(config):
        with contextlib.suppress(NotServing):
            if "standby" not in await ask(node.admin, "status"):
                return str(await ask(node.admin, "lift", key=key))
    raise NotServing(f"no server is running on {config.directory}: a key is lifted where it runs")


def _key_to_ask_with(config: RunConfig) -> Path:
    """An operator's own key where there is one, else a worker's, who is not disturbed by it."""
    names = ["operator", *(worker for _, worker in config.workers())]
    paths = [config.keys / f"{name}.secret" for name in names]
    return next((path for path in paths if path.exists()), paths[0])


async def _ask_status(link: DialLink) -> Status:
    while not await link.control.send(link.server.key, StatusRequest()):  # noqa: ASYNC110, the caller's deadline ends it
        await trio.sleep(STATUS_RETRY_SECONDS)
    while True:
        incoming = await link.control.receive()
        if isinstance(incoming.message, StatusReport):
            status: Status = json.loads(incoming.payload)
            if not status.get("standby", {}).get("hears_server"):
                return status
            link.turn(status["standby"]["server"])
            return await _ask_status(link)
