"""The end of a link that is dialled: a server's, or a standby's. Fulfils ports.ServerLink over ZeroMQ.

assembly.py opens it; dial.py is the other end. Control and bulk are separate connections, so that a full bulk lane
delays no heartbeat. Who a peer is, its connection's key says; routing ids are addresses of the moment. Delivery is at
most once: whoever cares asks again.
"""

import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import trio
import zmq

from hetero_async.core.messages import ANSWERS, QUESTIONS, SAID_BY, Message
from hetero_async.errors import PeerError
from hetero_async.ports import Incoming, Observer
from hetero_async.shell import gate, wire
from hetero_async.shell.gate import Gate
from hetero_async.shell.keys import AllowList, load_secret
from hetero_async.shell.sockets import TrioSocket


@dataclass(slots=True)
class Traffic:
    """Bytes of messages: up is from workers to the server."""

    bytes_up: int = 0
    bytes_down: int = 0


class ServerLane:
    """One ROUTER. Fulfils ports.Lane."""

    def __init__(self, link: "ServerLink", socket: TrioSocket) -> None:
        self._link = link
        self._socket = socket
        self._routes: dict[bytes, bytes] = {}  # key → routing id of its newest connection
        self._askers: dict[bytes, bytes] = {}  # the same for connections that only ask

    async def receive(self) -> Incoming:
        while True:
            incoming = self._accepted(await self._socket.receive())
            if incoming is not None:
                return incoming

    async def send(self, key: bytes, message: Message, payload: bytes = b"") -> bool:
        await trio.lowlevel.checkpoint()
        route = (self._askers if isinstance(message, ANSWERS) else self._routes).get(key)
        if route is None or self._link.gate.admitted(key) is None:
            return False
        parts = wire.pack(message, payload, self._link.term)
        # A full queue is a slow peer and no reason to wait: nobody can wait for one peer's room in a ROUTER.
        is_sent = self._socket.try_send([route, *parts])
        if is_sent:
            self._link.count_down(key, sum(map(len, parts)))
        return is_sent

    def _accepted(self, frames: list[zmq.Frame]) -> Incoming | None:
        route, *parts = frames
        peer = self._link.gate.sender(frames[-1])
        if peer is None:
            return None
        self._link.count_up(peer.key, wire.size(parts))
        try:
            term, message, payload = wire.unpack(parts)
        except PeerError as error:
            self._link.gate.refused("refused message", peer.key, worker=peer.worker, reason=str(error))
            return None
        if not isinstance(message, SAID_BY[peer.role]):
            reason = f"{type(message).__name__} is not for a {peer.role} to say"
            self._link.gate.refused("refused message", peer.key, worker=peer.worker, reason=reason)
            return None
        (self._askers if isinstance(message, QUESTIONS) else self._routes)[peer.key] = route.bytes
        return Incoming(peer=peer, message=message, payload=payload, term=term)


class ServerLink:
    """Fulfils ports.ServerLink."""

    def __init__(self, gate: Gate, control: TrioSocket, bulk: TrioSocket) -> None:
        self.gate = gate
        self.control = ServerLane(self, control)
        self.bulk = ServerLane(self, bulk)
        self.term = 0
        self.bytes_up = self.bytes_down = 0
        self.generation = 0  # it dials nobody
        self.traffic: dict[bytes, Traffic] = {}  # by key

    def count_up(self, key: bytes, count: int) -> None:
        self.bytes_up += count
        self.traffic.setdefault(key, Traffic()).bytes_up += count

    def count_down(self, key: bytes, count: int) -> None:
        self.bytes_down += count
        self.traffic.setdefault(key, Traffic()).bytes_down += count


@asynccontextmanager
async def open_server_link(
    *, control: str, bulk: str, secret_path: Path, allowed: AllowList, observer: Observer
) -> AsyncIterator[ServerLink]:
    """Listen at two addresses. Raises ConfigError for unusable keys and for addresses that cannot be had."""
    secret = load_secret(secret_path)
    allowed.load()
    entrance = Gate(allowed, observer)
    async with wire.open_context() as context:
        listen = functools.partial(wire.listen, context, secret=secret, domain=gate.DOMAIN)
        with (
            closing(gate.open_judge(context)) as judge,  # before anybody can knock
            closing(await listen(wire.CONTROL, control, setting="server.address")) as control_socket,
            closing(await listen(wire.BULK, bulk, setting="server.bulk_address")) as bulk_socket,
        ):
            async with trio.open_nursery() as nursery:
                for socket in (judge, control_socket, bulk_socket):
                    nursery.start_soon(socket.watch)
                nursery.start_soon(entrance.answer, judge)
                yield ServerLink(entrance, control_socket, bulk_socket)
                nursery.cancel_scope.cancel()
