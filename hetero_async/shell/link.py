"""The end of a link that is dialled: a server's, or a standby's. Fulfils ports.ServerLink over ZeroMQ.

assembly.py opens it; dial.py is the other end. Control and bulk are separate connections, so that a full bulk lane
delays no heartbeat. Who a peer is, its connection's key says; routing ids are addresses of the moment. Delivery is at
most once: whoever cares asks again.
"""

import functools
import importlib.metadata
import math
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path

import trio
import zmq

from hetero_async.core.messages import ANSWERS, QUESTIONS, SAID_BY, Message, Refused, Want
from hetero_async.errors import PeerError
from hetero_async.ports import Incoming, Observer
from hetero_async.quarantine import Quarantine
from hetero_async.shell import gate, wire
from hetero_async.shell.gate import Gate
from hetero_async.shell.keys import AllowList, load_secret
from hetero_async.shell.quota import Quota
from hetero_async.shell.sockets import TrioSocket

# Of all keys together, received on one lane unasked and not yet read by the loop; and of one of them, so that it leaves
# room to the others: two of the largest messages, and what an honest worker says beside them.
HELD_BYTES_MAX = 8 * 1024 * 1024
HELD_BYTES_OF_ONE_MAX = 2 * wire.FRAME_BYTES_MAX + 256 * 1024
# So long a lane reads at once before others get their turn, and so many messages its reader. Shorter bursts would leave
# to libzmq's thread, which does not share its turns with anybody here, what it receives in between.
BURST_SECONDS_MAX = 0.05
BURST_MESSAGES_MAX = 32
SOFTWARE = importlib.metadata.version("hetero-async")


@dataclass(slots=True)
class Traffic:
    """Bytes of messages: up is from workers to the server."""

    bytes_up: int = 0
    bytes_down: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """Received and not yet read; `unasked_bytes` count against what all keys may hold together."""

    incoming: Incoming
    unasked_bytes: int


class ServerLane:
    """One ROUTER. Fulfils ports.Lane."""

    def __init__(self, link: "ServerLink", socket: TrioSocket, settings: wire.Settings) -> None:
        self._link = link
        self._socket = socket
        self._routes: dict[bytes, bytes] = {}  # key → routing id of its newest connection
        self._askers: dict[bytes, bytes] = {}  # the same for connections that only ask
        self._quota = Quota(settings.messages_per_second, settings.bytes_per_second)
        self._in_flight: Counter[bytes] = Counter()  # by key: received, and not yet read by the loop
        self._in_flight_max = settings.in_flight
        self._asked: Counter[bytes] = Counter()  # by key: chunks that we asked for, and that may still come
        self._held_bytes = 0  # of what nobody asked for
        self._held_bytes_of: Counter[bytes] = Counter()  # the same by key
        self._arrived, self._inbox = trio.open_memory_channel[Held](math.inf)  # bounded for each key
        self._read_at_once = 0

    async def listen(self) -> None:
        """Read at once whatever comes, until cancelled: a key that is faster than the loop loses what is too much.

        All that is there, not a message each time the loop comes round: libzmq, in a thread of its own, would go on
        receiving more than that, and its queue for the control lane has no limit (wire.listen says why).
        """
        while True:
            frames: list[wire.Frame] | None = await self._socket.receive()
            ends = trio.current_time() + BURST_SECONDS_MAX
            while frames is not None:
                self._take(frames)
                frames = self._socket.try_receive() if trio.current_time() < ends else None

    def _take(self, frames: list[wire.Frame]) -> None:
        incoming = self._accepted(frames)
        if incoming is None:
            return
        key, unasked_bytes = incoming.peer.key, len(incoming.payload)
        if self._asked[key] and unasked_bytes:
            self._asked[key] -= 1
            unasked_bytes = 0
        self._in_flight[key] += 1
        self._hold(key, unasked_bytes)
        self._arrived.send_nowait(Held(incoming, unasked_bytes))

    def _has_room(self, key: bytes, size: int) -> bool:
        """What was asked for has its room where it is asked for (bulk.py), and nobody can take it away."""
        if self._in_flight[key] >= self._in_flight_max:
            return False
        is_within = self._held_bytes_of[key] + size <= HELD_BYTES_OF_ONE_MAX
        return self._asked[key] > 0 or (is_within and self._held_bytes + size <= HELD_BYTES_MAX)

    def _hold(self, key: bytes, unasked_bytes: int) -> None:
        self._held_bytes += unasked_bytes
        self._held_bytes_of[key] += unasked_bytes

    def _refuse_too_much(self, key: bytes) -> None:
        """No strike: a script may record too much, and our own loop may be slow."""
        self._link.gate.refused("refused message", key, reason="it says too much at once")

    async def receive(self) -> Incoming:
        """Does not let others run each time: their turns would come between any two messages of a flood."""
        self._read_at_once = (self._read_at_once + 1) % BURST_MESSAGES_MAX
        try:
            if self._read_at_once == 0:
                raise trio.WouldBlock
            held = self._inbox.receive_nowait()
        except trio.WouldBlock:
            held = await self._inbox.receive()
        key = held.incoming.peer.key
        self._in_flight[key] -= 1
        self._hold(key, -held.unasked_bytes)
        return held.incoming

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        await trio.lowlevel.checkpoint()
        route = (self._askers if isinstance(message, ANSWERS) else self._routes).get(key)
        if route is None or self._link.gate.admitted(key) is None:
            return False
        parts = wire.pack(message, payload, self._link.term)
        # A full queue is a slow peer and no reason to wait: nobody can wait for one peer's room in a ROUTER.
        is_sent = self._socket.try_send([route, *parts])
        if is_sent:
            self._link.count_down(key, sum(map(len, parts)))
            if isinstance(message, Want):
                self._link.bulk.expect(key, message.count)
        return is_sent

    def expect(self, key: bytes, chunks: int) -> None:
        """They were asked for, over whichever lane."""
        self._asked[key] = min(self._asked[key] + chunks, self._in_flight_max)

    def _accepted(self, frames: list[zmq.Frame]) -> Incoming | None:
        route, *parts = frames
        key, size = gate.key_of(frames[-1]), wire.size(parts)
        self._link.count_up(key, size)
        # First of all, and before anything is copied: refusing must cost less than libzmq's thread takes to receive.
        if not self._quota.take(key, size) or not self._has_room(key, size):
            self._refuse_too_much(key)
            return None
        peer = self._link.gate.sender(key)
        if peer is None:
            return None
        try:
            term, message, payload = wire.unpack(parts)
        except PeerError as error:
            if self._link.gate.refused("refused message", peer.key, reason=str(error)):
                # Other software, most likely: this message is one that does not change.
                told = Refused(reason=f"hetero-async {SOFTWARE} does not understand what you say: {error}")
                self._socket.try_send([route.bytes, *wire.pack(told, b"")])
            self._link.quarantine.strike(peer, str(error))
            return None
        if not isinstance(message, SAID_BY[peer.role]):
            reason = f"{type(message).__name__} is not for a {peer.role} to say"
            self._link.gate.refused("refused message", peer.key, reason=reason)
            self._link.quarantine.strike(peer, reason)
            return None
        (self._askers if isinstance(message, QUESTIONS) else self._routes)[peer.key] = route.bytes
        return Incoming(peer=peer, message=message, payload=payload, term=term)


class ServerLink:
    """Fulfils ports.ServerLink."""

    def __init__(self, gate: Gate, quarantine: Quarantine, control: TrioSocket, bulk: TrioSocket) -> None:
        self.gate = gate
        self.quarantine = quarantine
        self.control = ServerLane(self, control, wire.CONTROL)
        self.bulk = ServerLane(self, bulk, wire.BULK)
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
    async with wire.open_context() as context:
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
