"""The two ends of ports.Link over ZeroMQ: a server that is dialled, a worker that dials, two lanes each.

assembly.py and session.py open them. Control and bulk are separate connections, so that a full bulk lane delays no
heartbeat. Who a peer is, its connection's key says; routing ids are addresses of the moment. Delivery is at most once:
whoever cares asks again.
"""

import functools
import importlib.metadata
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import tenacity
import trio
import zmq

from hetero_async.core.messages import Message, Refused
from hetero_async.errors import PeerError
from hetero_async.formats.chunks import CREDITS
from hetero_async.ports import Incoming, Observer, Peer
from hetero_async.quarantine import Quarantine
from hetero_async.shell import gate, wire
from hetero_async.shell.gate import Gate, Seldom
from hetero_async.shell.keys import AllowList, load_secret
from hetero_async.shell.quota import Quota
from hetero_async.shell.sockets import TrioSocket

# A worker beats, and is answered, once a second. A few answers may be late behind a full link; after that the
# connection is made anew. It is also the only way in for a key that was refused: libzmq never tries again by itself.
SILENCE_SECONDS = 6.0
# Of all keys together, received on one lane and not yet read by the loop.
HELD_BYTES_MAX = 24 * 1024 * 1024
SOFTWARE = importlib.metadata.version("hetero-async")
# Received, and not yet read by the loop; a reader that is slower stops the lane's socket.
CONTROL_INBOX = 64


# --- server ---


@dataclass(slots=True)
class Traffic:
    """Bytes of messages: up is from workers to the server."""

    bytes_up: int = 0
    bytes_down: int = 0


class ServerLane:
    """One ROUTER. Fulfils ports.Lane."""

    def __init__(self, link: "ServerLink", socket: TrioSocket, settings: wire.Settings) -> None:
        self._link = link
        self._socket = socket
        self._quota = Quota(settings.messages_per_second, settings.bytes_per_second)
        self._routes: dict[bytes, bytes] = {}  # key → routing id of its newest connection
        self._in_flight: Counter[bytes] = Counter()  # by key: received, and not yet read by the loop
        self._in_flight_max = settings.in_flight
        self._held_bytes = 0
        self._arrived, self._inbox = trio.open_memory_channel[Incoming](math.inf)  # bounded for each key

    async def listen(self) -> None:
        """Read at once whatever comes, until cancelled: a key that is faster than the loop loses what is too much."""
        while True:
            incoming = self._accepted(await self._socket.receive())
            if incoming is None:
                continue
            is_full = self._held_bytes + len(incoming.payload) > HELD_BYTES_MAX
            if is_full or self._in_flight[incoming.peer.key] == self._in_flight_max:
                self._refuse_too_much(incoming.peer)
                continue
            self._in_flight[incoming.peer.key] += 1
            self._held_bytes += len(incoming.payload)
            self._arrived.send_nowait(incoming)

    def _refuse_too_much(self, peer: Peer) -> None:
        """No strike: a script may record too much, and our own loop may be slow."""
        self._link.gate.refused("refused message", peer.key, worker=peer.worker, reason="it says too much at once")

    async def receive(self) -> Incoming:
        incoming = await self._inbox.receive()
        self._in_flight[incoming.peer.key] -= 1
        self._held_bytes -= len(incoming.payload)
        return incoming

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        await trio.lowlevel.checkpoint()
        route = self._routes.get(key)
        if route is None or self._link.gate.admitted(key) is None:
            return False
        parts = wire.pack(message, payload)
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
        size = wire.size(parts)
        self._link.count_up(peer.key, size)
        if not self._quota.take(peer.key, size):
            self._refuse_too_much(peer)
            return None
        try:
            message, payload = wire.unpack(parts)
        except PeerError as error:
            if self._link.gate.refused("refused message", peer.key, worker=peer.worker, reason=str(error)):
                # Other software, most likely: this message is one that does not change.
                told = Refused(reason=f"hetero-async {SOFTWARE} does not understand what you say: {error}")
                self._socket.try_send([route.bytes, *wire.pack(told, b"")])
            self._link.quarantine.strike(peer, str(error))
            return None
        self._routes[peer.key] = route.bytes
        return Incoming(peer=peer, message=message, payload=payload)


class ServerLink:
    """Fulfils ports.Link for the server."""

    def __init__(self, gate: Gate, quarantine: Quarantine, control: TrioSocket, bulk: TrioSocket) -> None:
        self.gate = gate
        self.quarantine = quarantine
        self.control = ServerLane(self, control, wire.CONTROL)
        self.bulk = ServerLane(self, bulk, wire.BULK)
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
    *,
    control: str,
    bulk: str,
    secret_path: Path,
    allowed: AllowList,
    observer: Observer,
    quarantine: Quarantine | None = None,
) -> AsyncIterator[ServerLink]:
    """Listen at two addresses. Raises ConfigError for unusable keys and for addresses that cannot be had.

    Messages that nobody can understand are strikes for `quarantine`.
    """
    secret = load_secret(secret_path)
    allowed.load()
    entrance = Gate(allowed, observer)
    async with _context() as context:
        listen = functools.partial(wire.listen, context, secret=secret, domain=gate.DOMAIN)
        with (
            closing(gate.open_judge(context)) as judge,  # before anybody can knock
            closing(await listen(wire.CONTROL, control, setting="server.address")) as control_socket,
            closing(await listen(wire.BULK, bulk, setting="server.bulk_address")) as bulk_socket,
            closing(control_socket.monitor(gate.NOT_A_HANDSHAKE)) as control_monitor,
            closing(bulk_socket.monitor(gate.NOT_A_HANDSHAKE)) as bulk_monitor,
        ):
            async with trio.open_nursery() as nursery:
                for socket in (judge, control_socket, bulk_socket, control_monitor, bulk_monitor):
                    nursery.start_soon(socket.watch)
                for monitor in (control_monitor, bulk_monitor):
                    nursery.start_soon(entrance.count_strangers, monitor)
                nursery.start_soon(entrance.answer, judge)
                link = ServerLink(entrance, quarantine or Quarantine(observer), control_socket, bulk_socket)
                nursery.start_soon(link.control.listen)
                nursery.start_soon(link.bulk.listen)
                yield link
                nursery.cancel_scope.cancel()


# --- worker ---


class WorkerLane:
    """The DEALER of the present connection, and what was received on all of them. Fulfils ports.Lane."""

    def __init__(self, link: "WorkerLink", size: int) -> None:
        self.socket: TrioSocket | None = None
        self._link = link
        self.arrived, self._inbox = trio.open_memory_channel[Incoming](size)

    async def receive(self) -> Incoming:
        return await self._inbox.receive()

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        """False while there is no connection: nothing is kept, since it may not be true any more when there is one."""
        assert key == self._link.server.key, "a worker speaks with its server only"
        await trio.lowlevel.checkpoint()
        parts = wire.pack(message, payload)
        is_sent = self.socket is not None and self.socket.try_send(parts)
        if is_sent:
            self._link.bytes_up += sum(map(len, parts))
        return is_sent


class WorkerLink:
    """Fulfils ports.Link for a worker, or an operator. `run` must run."""

    def __init__(
        self, *, control: str, bulk: str, server_key: bytes, secret: bytes, observer: Observer, silence_seconds: float
    ) -> None:
        self.server = Peer(key=server_key, role="server", site="", worker="")
        self.control = WorkerLane(self, CONTROL_INBOX)
        self.bulk = WorkerLane(self, CREDITS)
        self.bytes_up = self.bytes_down = 0
        self.generation = 0
        self.connected = False  # the server was heard on the present connection
        self._addresses = {self.control: control, self.bulk: bulk}
        self._secret = secret
        self._observer = observer
        self._complaints = Seldom()
        self._silence_seconds = silence_seconds
        self._was_missed = False

    async def run(self, context: wire.Context) -> None:
        """Keep a connection, until cancelled: a server may be away for hours and come back."""
        while True:
            patiently = tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(trio.TooSlowError),
                wait=tenacity.wait_random_exponential(min=wire.RETRY_MS_MIN / 1000, max=wire.RETRY_MS_MAX / 1000),
                before_sleep=self._miss,
                sleep=trio.sleep,
                reraise=True,
            )
            await patiently(self._connect, context)

    async def _connect(self, context: wire.Context) -> None:
        """Two fresh sockets, until the server falls silent. Raises TooSlowError when it was never heard on them."""
        generation = self.generation
        with (
            closing(self._dial(context, wire.CONTROL, self.control)) as self.control.socket,
            closing(self._dial(context, wire.BULK, self.bulk)) as self.bulk.socket,
        ):
            try:
                async with trio.open_nursery() as nursery:
                    nursery.cancel_scope.deadline = trio.current_time() + self._silence_seconds
                    nursery.start_soon(self.control.socket.watch)
                    nursery.start_soon(self.bulk.socket.watch)
                    nursery.start_soon(self._receive_control, self.control.socket, nursery.cancel_scope)
                    nursery.start_soon(self._receive_bulk, self.bulk.socket)
            finally:
                self.connected = False
                self.control.socket = self.bulk.socket = None
        if self.generation == generation:
            raise trio.TooSlowError

    def _dial(self, context: wire.Context, settings: wire.Settings, lane: WorkerLane) -> TrioSocket:
        return wire.dial(context, settings, self._addresses[lane], server_key=self.server.key, secret=self._secret)

    async def _receive_control(self, socket: TrioSocket, connection: trio.CancelScope) -> None:
        """Every message moves the end of the connection further away."""
        while True:
            incoming = self._understood(await socket.receive())
            self._hear()
            connection.deadline = math.inf  # while our own loop is too busy to take it, the server is not silent
            if incoming is not None:
                await self.control.arrived.send(incoming)
            connection.deadline = trio.current_time() + self._silence_seconds

    async def _receive_bulk(self, socket: TrioSocket) -> None:
        while True:
            incoming = self._understood(await socket.receive())
            if incoming is not None:
                await self.bulk.arrived.send(incoming)

    def _understood(self, frames: list[zmq.Frame]) -> Incoming | None:
        self.bytes_down += wire.size(frames)
        try:
            message, payload = wire.unpack(frames)
        except PeerError as error:
            if self._complaints.is_due(str(error)):
                self._observer.event("refused message", reason=str(error))
            return None
        return Incoming(peer=self.server, message=message, payload=payload)

    def _hear(self) -> None:
        if self.connected:
            return
        self.connected = True
        self.generation += 1
        if self._was_missed:
            self._observer.event("server reached", address=self._addresses[self.control])
        self._was_missed = False

    def _miss(self, attempts: tenacity.RetryCallState) -> None:
        self._was_missed = True
        assert attempts.next_action is not None
        self._observer.event(
            "server not reached",
            address=self._addresses[self.control],
            silent_seconds=round(attempts.seconds_since_start or 0.0, 1),
            next_try_seconds=round(attempts.next_action.sleep, 1),
            reason="no answer; is it running, and is this key in its allowed.json? Trying again until stopped",
        )


@asynccontextmanager
async def open_worker_link(
    *,
    control: str,
    bulk: str,
    server_key: bytes,
    secret_path: Path,
    observer: Observer,
    silence_seconds: float = SILENCE_SECONDS,
) -> AsyncIterator[WorkerLink]:
    """Dial the server's two addresses and keep at it. Raises ConfigError for an unusable key, not for an absent server.

    A caller that has nothing to ask for `silence_seconds` hears nothing either, and gets a new connection.
    """
    link = WorkerLink(
        control=control,
        bulk=bulk,
        server_key=server_key,
        secret=load_secret(secret_path),
        observer=observer,
        silence_seconds=silence_seconds,
    )
    async with _context() as context, trio.open_nursery() as nursery:
        nursery.start_soon(link.run, context)
        yield link
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _context() -> AsyncIterator[wire.Context]:
    """Ending it waits until all is sent that lingers, half a second at most, in a thread."""
    context = zmq.Context()
    try:
        yield context
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(context.term)
