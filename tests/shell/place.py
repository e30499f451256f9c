"""A run's keys and addresses on the loopback, for tests of the link; and a small server that answers."""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import trio
import trio.lowlevel

from hetero_async.core.messages import Beat, Chunk, Heartbeat, Message
from hetero_async.formats.chunks import CHUNK_BYTES
from hetero_async.ports import Incoming
from hetero_async.shell.dial import DialLink, Endpoint, open_dial_link
from hetero_async.shell.keys import AllowList, create_keypair
from hetero_async.shell.link import ServerLink, open_server_link
from hetero_async.shell.telemetry import SeldomObserver
from hetero_async.shell.wire import pack

SILENCE_SECONDS = 1.0
BEAT = Beat(version=1, publish=2, oldest=1, trained=3, positions=4)
CHUNK = Chunk(kind="delta", number=1, index=0, total_bytes=CHUNK_BYTES, total_hash=bytes(16))


class Notes:
    """Fulfils ports.Observer: remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def event(self, name: str, **fields: object) -> None:
        self.events.append((name, fields))

    def of(self, name: str) -> list[dict[str, object]]:
        return [fields for event, fields in self.events if event == name]


@dataclass(frozen=True, slots=True)
class Place:
    """A run's keys and two free ports."""

    keys: Path
    allowed: AllowList
    control: str
    bulk: str
    notes: Notes

    def public(self, name: str, suffix: str = ".public") -> bytes:
        return (self.keys / f"{name}{suffix}").read_bytes().split()[1]

    def server(self) -> Any:
        return open_server_link(
            control=self.control,
            bulk=self.bulk,
            secret_path=self.keys / "server.secret",
            allowed=AllowList(self.allowed.path),
            observer=SeldomObserver(self.notes),
        )

    def worker(self, name: str, server_key: bytes = b"", silence_seconds: float = SILENCE_SECONDS) -> Any:
        return self.dialling(name, self, server_key=server_key, silence_seconds=silence_seconds)

    def dialling(
        self, name: str, *places: "Place", server_key: bytes = b"", silence_seconds: float = SILENCE_SECONDS
    ) -> Any:
        """A worker that looks for the server at each of these places."""
        key = server_key or self.public("server")
        return open_dial_link(
            [Endpoint(name="server", key=key, control=place.control, bulk=place.bulk) for place in places],
            secret_path=self.keys / f"{name}.secret",
            observer=self.notes,
            silence_seconds=silence_seconds,
        )


def prepared(directory: Path) -> Place:
    allowed = AllowList(directory / "allowed.json")
    create_keypair(directory / "server")
    for name in ("a-0", "a-1"):
        allowed.admit(create_keypair(directory / name), role="worker", site="a", worker=name)
    create_keypair(directory / "stranger")
    control, bulk = free_addresses()
    return Place(directory, allowed, control, bulk, Notes())


def elsewhere(place: Place) -> Place:
    """The same server at other addresses."""
    control, bulk = free_addresses()
    return replace(place, control=control, bulk=bulk)


def free_addresses() -> list[str]:
    return [f"tcp://127.0.0.1:{port}" for port in free_ports(2)]


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def run(main: Callable[[], Awaitable[None]], seconds: float = 30) -> None:
    async def bounded() -> None:
        with trio.fail_after(seconds):
            await main()

    trio.run(bounded)


async def moment() -> None:
    """Between two looks at something that will come about."""
    await trio.sleep(0.01)


def heartbeat(number: int = 0) -> Heartbeat:
    return Heartbeat(
        incarnation=1, state="training", steps=number, steps_per_second=1.0, publish=0, bytes_up=0, bytes_down=0
    )


def framed(message: Message) -> bytes:
    """The one frame in which a socket of whatever software says it."""
    return b"".join(pack(message, b""))


async def answer_all(link: ServerLink, heard: list[Incoming]) -> None:
    """A small server: answer heartbeats on control, and on bulk a chunk with a Want."""

    async def control() -> None:
        while True:
            incoming = await link.control.receive()
            heard.append(incoming)
            await link.control.send(incoming.peer.key, BEAT)

    async def bulk() -> None:
        while True:
            incoming = await link.bulk.receive()
            heard.append(incoming)
            await link.bulk.send(incoming.peer.key, CHUNK, incoming.payload[::-1])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(control)
        nursery.start_soon(bulk)


@asynccontextmanager
async def serving(place: Place) -> AsyncIterator[tuple[ServerLink, list[Incoming]]]:
    heard: list[Incoming] = []
    async with place.server() as link, trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, link, heard)
        yield link, heard
        nursery.cancel_scope.cancel()


async def insist(link: DialLink, lane: Any, message: Any, payload: bytes = b"") -> Incoming:
    """Ask until answered, as the loops do."""
    while True:
        await lane.send(link.server.key, message, payload)
        with trio.move_on_after(0.2):
            received: Incoming = await lane.receive()
            return received


async def reach(worker: DialLink, server: ServerLink) -> Incoming:
    """Until the server has heard the worker once."""
    while not await worker.control.send(worker.server.key, heartbeat()):
        await moment()
    return await server.control.receive()
