"""The network between simulated sites: delay, loss, doubles, reordering, thin and cut links; and both ends of a Link.

A link's two directions have conditions of their own. Messages travel as the bytes that they would be on a socket, in
connections that a worker or a standby opens and that end by silence, by a reset, or because the server at the other end
is a new one or none. What was under way on a connection that has ended is lost.
"""

import heapq
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import trio

from hetero_async.core.messages import Message
from hetero_async.errors import PeerError
from hetero_async.formats import frames
from hetero_async.ports import Incoming, Peer
from hetero_async.shell.dial import FIRST_WORD_SECONDS, SILENCE_SECONDS
from hetero_async.shell.wire import BULK, CONTROL
from hetero_async.sim.process import Process
from hetero_async.sim.trace import Trace, shown

CONTROL_LANE, BULK_LANE = "control", "bulk"
QUEUES = {CONTROL_LANE: CONTROL.queue, BULK_LANE: BULK.queue}
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.2, 2.0
FRAMING_BYTES = 64  # headers of TCP, IP and ZMTP, roughly
# Of a message that is overtaken by others, or comes twice: how much later it may come; mostly it is much less.
DETOUR_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One direction of a link. Chances are per message, times in seconds."""

    delay: float = 0.01
    jitter: float = 0.0
    loss: float = 0.0
    doubled: float = 0.0
    copies: int = 1  # of a message that is doubled, beside the first
    reordered: float = 0.0
    bytes_per_second: float = math.inf


class Network:
    def __init__(self, random: Random, trace: Trace) -> None:
        self.trace = trace
        self.random = random
        self.listeners: dict[str, ServerEnd] = {}  # who answers at each node's address
        self.dialling: dict[bytes, DialEnd] = {}  # the newest life with each key
        self.revoked: set[bytes] = set()  # keys that allowed.json does not list any more, as shell/gate.py treats them
        self._conditions: dict[tuple[str, str], Condition] = {}
        self._cuts: dict[tuple[str, str], bool] = {}
        self._free_at: dict[tuple[str, str, str], float] = {}  # when a lane's rate lets the next message begin
        self._queues: dict[tuple[bytes, str, str], deque[float]] = {}  # when each message has left
        self._arrives: dict[tuple[bytes, str, str], float] = {}  # of a connection's last message, for its order
        self._under_way: list[tuple[float, int, Callable[[], None]]] = []
        self._sent = 0
        self._news = trio.Event()

    def condition(self, source: str, target: str) -> Condition:
        return self._conditions.get((source, target), Condition())

    def join(self, site: str, other: str, condition: Condition) -> None:
        """Both directions of the link between two sites are like this from now on."""
        self._conditions[site, other] = self._conditions[other, site] = condition

    def cut(self, source: str, target: str) -> None:
        """Nothing goes this way any more, what is under way included."""
        self._cuts[source, target] = True

    def mend(self, source: str, target: str) -> None:
        self._cuts.pop((source, target), None)

    def mend_all(self) -> None:
        self._cuts.clear()

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cuts

    def is_full(self, connection: "Connection", lane: str, source: str) -> bool:
        """Whether the sender's queue has no room: as many messages as a socket keeps have not left it."""
        queue = self._queues.get((connection.key, lane, source), deque())
        while queue and queue[0] <= trio.current_time():
            queue.popleft()
        return len(queue) >= QUEUES[lane]

    async def run(self) -> None:
        """Deliver what is due, until cancelled."""
        while True:
            self._news = trio.Event()
            with trio.move_on_at(self._under_way[0][0] if self._under_way else math.inf):
                await self._news.wait()
            while self._under_way and self._under_way[0][0] <= trio.current_time():
                heapq.heappop(self._under_way)[2]()

    def carry(self, connection: "Connection", lane: str, source: str, target: str, size: int,
              deliver: Callable[[], None]) -> None:  # fmt: skip
        condition, random = self.condition(source, target), self.random
        if self.is_cut(source, target) or random.random() < condition.loss:
            return
        begins = max(trio.current_time(), self._free_at.get((source, target, lane), 0.0))
        ends = begins + size / condition.bytes_per_second
        self._free_at[source, target, lane] = ends
        self._queues.setdefault((connection.key, lane, source), deque()).append(ends)
        at = ends + condition.delay + random.random() * condition.jitter
        if random.random() < condition.reordered:
            at += random.random() ** 4 * DETOUR_SECONDS
        else:
            order = (connection.key, lane, source)
            at = self._arrives[order] = max(at, self._arrives.get(order, 0.0))
        self._push(at, deliver)
        if random.random() < condition.doubled:
            for _ in range(condition.copies):
                self._push(at + random.random() ** 4 * DETOUR_SECONDS, deliver)

    def post(self, source: str, target: str, deliver: Callable[[], None]) -> None:
        """One small message that belongs to no connection of ours: it arrives, or it does not."""
        condition, random = self.condition(source, target), self.random
        if self.is_cut(source, target) or random.random() < condition.loss:
            return

        def arrive() -> None:
            if not self.is_cut(source, target):
                deliver()

        self._push(trio.current_time() + condition.delay + random.random() * condition.jitter, arrive)

    def _push(self, at: float, deliver: Callable[[], None]) -> None:
        self._sent += 1
        heapq.heappush(self._under_way, (at, self._sent, deliver))
        if self._under_way[0][1] == self._sent:
            self._news.set()


class Connection:
    """Between one life of whoever dials and one life of a node."""

    def __init__(self, dialler: "DialEnd", node: str) -> None:
        self.key = dialler.peer.key
        self.dialler = dialler
        self.node = node
        self.server: ServerEnd | None = None  # bound by the first message that arrives

    @property
    def is_open(self) -> bool:
        return self.dialler.connection is self and not self.dialler.process.is_dead


class Lane:
    """Fulfils ports.Lane. What arrives waits here; a full queue is a slow reader, and what comes then is dropped."""

    def __init__(self, name: str, process: Process, transmit: Callable[[str, bytes, Message, bytes], bool]) -> None:
        self._name = name
        self._process = process
        self._transmit = transmit
        self._arrived, self._inbox = trio.open_memory_channel[Incoming](4 * QUEUES[name])

    async def receive(self) -> Incoming:
        await self._process.rest()
        incoming = await self._inbox.receive()
        await self._process.rest()
        return incoming

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        await self._process.here()
        return self._transmit(self._name, key, message, bytes(payload))

    def arrive(self, peer: Peer, letter: "Letter") -> None:
        try:
            message = frames.decode(letter.header)
        except PeerError:
            return
        assert isinstance(message, Message)
        try:
            self._arrived.send_nowait(Incoming(peer=peer, message=message, payload=letter.payload, term=letter.term))
        except trio.WouldBlock:
            return


@dataclass(frozen=True, slots=True)
class Letter:
    """A message as it travels."""

    term: int
    header: bytes
    payload: bytes

    @property
    def size(self) -> int:
        return len(self.header) + len(self.payload) + FRAMING_BYTES


class ServerEnd:
    """Fulfils ports.ServerLink for one life of a node; `process` is named and placed as the node."""

    def __init__(self, network: Network, process: Process, sending: Callable[[Peer, int, Message], None]) -> None:
        """`sending` is told of every message, and its term, before it leaves."""
        self.process = process
        self.term = 0
        self.control = Lane(CONTROL_LANE, process, self._transmit)
        self.bulk = Lane(BULK_LANE, process, self._transmit)
        self.bytes_up = self.bytes_down = 0
        self.generation = 0
        self._network = network
        self._sending = sending
        self._routes: dict[tuple[str, bytes], Connection] = {}
        network.listeners[process.name] = self

    def close(self) -> None:
        if self._network.listeners.get(self.process.name) is self:
            del self._network.listeners[self.process.name]

    def arrive(self, connection: Connection, lane: str, letter: Letter) -> None:
        self.bytes_up += letter.size
        if connection.key in self._network.revoked:
            return
        self._routes[lane, connection.key] = connection
        (self.control if lane == CONTROL_LANE else self.bulk).arrive(connection.dialler.peer, letter)

    def _transmit(self, lane: str, key: bytes, message: Message, payload: bytes) -> bool:
        connection = self._routes.get((lane, key))
        if connection is None or key in self._network.revoked:
            return False
        self._sending(connection.dialler.peer, self.term, message)
        return _transmit(self._network, connection, lane, message, Letter(self.term, frames.encode(message), payload))


class DialEnd:
    """Fulfils ports.DialLink for one life of a worker or a standby. `run` must run."""

    def __init__(
        self, network: Network, process: Process, servers: Sequence[str], *, role: str = "worker", key: bytes = b""
    ) -> None:
        self.process = process
        name = process.name
        self.peer = Peer(key=key or name.encode(), role=role, site=process.site, worker=name)
        self.control = Lane(CONTROL_LANE, process, self._transmit)
        self.bulk = Lane(BULK_LANE, process, self._transmit)
        self.bytes_up = self.bytes_down = 0
        self.generation = 0
        self.connection: Connection | None = None
        self._network = network
        self._servers = list(servers)
        self._turn = 0
        self._is_turned = False
        self._heard_at = 0.0
        self._is_heard = False
        self._broken = trio.Event()
        network.dialling[self.peer.key] = self

    @property
    def server(self) -> Peer:
        name = self._servers[self._turn]
        return Peer(key=name.encode(), role="server", site=name, worker=name)

    def turn(self, server: str = "") -> None:
        names = self._servers
        turn = names.index(server) if server in names else self._turn + (server == "")
        if turn % len(names) != self._turn:
            self._turn, self._is_turned = turn % len(names), True
            self._broken.set()

    async def run(self) -> None:
        """Keep a connection, until cancelled."""
        while True:
            await self.process.here()
            self.connection, self._is_heard = Connection(self, self._servers[self._turn]), False
            self._broken, self._heard_at, self._is_turned = trio.Event(), trio.current_time(), False
            while not self._broken.is_set() and trio.current_time() < self._patience_ends:
                with trio.move_on_at(self._patience_ends):
                    await self._broken.wait()
            self.connection = None
            if not self._is_turned:
                self._turn = (self._turn + 1) % len(self._servers)
            await trio.sleep(self._network.random.uniform(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX))

    @property
    def _patience_ends(self) -> float:
        is_short = not self._is_heard and len(self._servers) > 1
        return self._heard_at + (FIRST_WORD_SECONDS if is_short else SILENCE_SECONDS)

    def reset(self) -> None:
        """The connection is gone, and both ends are told."""
        self.connection = None
        self._broken.set()

    def arrive(self, lane: str, letter: Letter) -> None:
        self.bytes_down += letter.size
        if lane == CONTROL_LANE:
            self._heard_at = trio.current_time()
            self.generation += not self._is_heard
            self._is_heard = True
        (self.control if lane == CONTROL_LANE else self.bulk).arrive(self.server, letter)

    def _transmit(self, lane: str, key: bytes, message: Message, payload: bytes) -> bool:
        connection = self.connection
        if connection is None or key != connection.node.encode():
            return False
        return _transmit(self._network, connection, lane, message, Letter(0, frames.encode(message), payload), up=True)


def _transmit(
    network: Network, connection: Connection, lane: str, message: Message, letter: Letter, *, up: bool = False
) -> bool:
    dialler, node = connection.dialler, connection.node
    source, target = (dialler.peer.site, node) if up else (node, dialler.peer.site)
    if network.is_full(connection, lane, source):
        return False
    sender, receiver = (dialler.peer.worker, node) if up else (node, dialler.peer.worker)
    dialler.bytes_up += letter.size if up else 0
    told = shown(message)
    network.trace.note(sender, f"→ {receiver}: {told}")

    def deliver() -> None:
        if network.is_cut(source, target) or not connection.is_open:
            return
        network.trace.note(receiver, f"← {sender}: {told}")
        listener = network.listeners.get(node)
        if up:
            _arrive_at_node(connection, listener, lane, letter)
        elif listener is not None and connection.server is listener:
            dialler.arrive(lane, letter)

    network.carry(connection, lane, source, target, letter.size, deliver)
    return True


def _arrive_at_node(connection: Connection, listener: ServerEnd | None, lane: str, letter: Letter) -> None:
    if listener is None or (connection.server is not None and connection.server is not listener):
        connection.dialler.reset()  # nobody listens, or somebody who knows nothing of this connection
        return
    connection.server = listener
    listener.arrive(connection, lane, letter)
