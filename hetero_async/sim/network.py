"""The network between simulated sites: delay, loss, doubles, reordering, thin and cut links; and both ends of a Link.

A link's two directions have conditions of their own. Messages travel as the bytes that they would be on a socket, in
connections that a worker opens and that end by silence, by a reset, or because the server at the other end is a new
one. What was under way on a connection that has ended is lost.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import trio

from hetero_async.core.messages import Message
from hetero_async.errors import PeerError
from hetero_async.formats import frames
from hetero_async.ports import Incoming, Peer
from hetero_async.shell.link import SILENCE_SECONDS
from hetero_async.shell.wire import BULK, CONTROL
from hetero_async.sim.process import Process
from hetero_async.sim.trace import Trace, shown

CONTROL_LANE, BULK_LANE = "control", "bulk"
QUEUES = {CONTROL_LANE: CONTROL.queue, BULK_LANE: BULK.queue}
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.2, 2.0
QUEUE_SECONDS = 5.0
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
        self.server: ServerEnd | None = None  # who answers at the server's address
        self.workers: dict[bytes, WorkerEnd] = {}  # the newest life with each key
        self._conditions: dict[tuple[str, str], Condition] = {}
        self._cuts: dict[tuple[str, str], bool] = {}
        self._free_at: dict[tuple[str, str, str], float] = {}  # when a lane's rate lets the next message begin
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

    def is_cut(self, source: str, target: str) -> bool:
        return (source, target) in self._cuts

    def is_full(self, source: str, target: str, lane: str) -> bool:
        """Whether the sender's queue has no room: a thin link has this much to carry already."""
        return self._free_at.get((source, target, lane), 0.0) > trio.current_time() + QUEUE_SECONDS

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

    def _push(self, at: float, deliver: Callable[[], None]) -> None:
        self._sent += 1
        heapq.heappush(self._under_way, (at, self._sent, deliver))
        self._news.set()


class Connection:
    """Between one life of a worker and one life of a server."""

    def __init__(self, worker: "WorkerEnd") -> None:
        self.key = worker.peer.key
        self.worker = worker
        self.server: ServerEnd | None = None  # bound by the first message that arrives

    @property
    def is_open(self) -> bool:
        return self.worker.connection is self and not self.worker.process.is_dead


class Lane:
    """Fulfils ports.Lane. What arrives waits here; a full queue is a slow reader, and what comes then is dropped."""

    def __init__(self, name: str, process: Process, transmit: Callable[[str, bytes, Message, bytes], bool]) -> None:
        self._name = name
        self._process = process
        self._transmit = transmit
        self._arrived, self._inbox = trio.open_memory_channel[Incoming](4 * QUEUES[name])

    async def receive(self) -> Incoming:
        await self._process.here()
        incoming = await self._inbox.receive()
        await self._process.here()
        return incoming

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        await trio.lowlevel.checkpoint()
        await self._process.here()
        return self._transmit(self._name, key, message, bytes(payload))

    def arrive(self, peer: Peer, header: bytes, payload: bytes) -> None:
        try:
            message = frames.decode(header)
        except PeerError:
            return
        assert isinstance(message, Message)
        try:
            self._arrived.send_nowait(Incoming(peer=peer, message=message, payload=payload))
        except trio.WouldBlock:
            return


class ServerEnd:
    """Fulfils ports.Link for one life of a server."""

    def __init__(self, network: Network, process: Process, sending: Callable[[str, Message], None]) -> None:
        """`sending` is told of every message to a worker before it leaves."""
        self.process = process
        self.control = Lane(CONTROL_LANE, process, self._transmit)
        self.bulk = Lane(BULK_LANE, process, self._transmit)
        self.bytes_up = self.bytes_down = 0
        self.generation = 0
        self._network = network
        self._sending = sending
        self._routes: dict[tuple[str, bytes], Connection] = {}

    def arrive(self, connection: Connection, lane: str, header: bytes, payload: bytes) -> None:
        self.bytes_up += len(header) + len(payload)
        self._routes[lane, connection.key] = connection
        (self.control if lane == CONTROL_LANE else self.bulk).arrive(connection.worker.peer, header, payload)

    def _transmit(self, lane: str, key: bytes, message: Message, payload: bytes) -> bool:
        connection = self._routes.get((lane, key))
        if connection is None:
            return False
        self._sending(connection.worker.peer.worker, message)
        return _transmit(self._network, connection, lane, message, payload, up=False)


class WorkerEnd:
    """Fulfils ports.Link for one life of a worker. `run` must run."""

    def __init__(self, network: Network, process: Process, server_site: str) -> None:
        self.process = process
        self.peer = Peer(key=process.name.encode(), role="worker", site=process.site, worker=process.name)
        self.server = Peer(key=b"server", role="server", site=server_site, worker="")
        self.control = Lane(CONTROL_LANE, process, self._transmit)
        self.bulk = Lane(BULK_LANE, process, self._transmit)
        self.bytes_up = self.bytes_down = 0
        self.generation = 0
        self.connection: Connection | None = None
        self._network = network
        self._heard_at = 0.0
        self._is_heard = False
        self._broken = trio.Event()
        network.workers[self.peer.key] = self

    async def run(self) -> None:
        """Keep a connection, until cancelled."""
        while True:
            await self.process.here()
            self.connection, self._is_heard = Connection(self), False
            self._broken, self._heard_at = trio.Event(), trio.current_time()
            while not self._broken.is_set() and trio.current_time() < self._heard_at + SILENCE_SECONDS:
                with trio.move_on_at(self._heard_at + SILENCE_SECONDS):
                    await self._broken.wait()
            self.connection = None
            await trio.sleep(self._network.random.uniform(RETRY_SECONDS_MIN, RETRY_SECONDS_MAX))

    def reset(self) -> None:
        """The connection is gone, and both ends are told."""
        self.connection = None
        self._broken.set()

    def arrive(self, lane: str, header: bytes, payload: bytes) -> None:
        self.bytes_down += len(header) + len(payload)
        if lane == CONTROL_LANE:
            self._heard_at = trio.current_time()
            self.generation += not self._is_heard
            self._is_heard = True
        (self.control if lane == CONTROL_LANE else self.bulk).arrive(self.server, header, payload)

    def _transmit(self, lane: str, key: bytes, message: Message, payload: bytes) -> bool:
        connection = self.connection
        if connection is None:
            return False
        return _transmit(self._network, connection, lane, message, payload, up=True)


def _transmit(
    network: Network, connection: Connection, lane: str, message: Message, payload: bytes, *, up: bool
) -> bool:
    header = frames.encode(message)
    worker = connection.worker
    size = len(header) + len(payload) + FRAMING_BYTES
    source, target = (worker.peer.site, worker.server.site) if up else (worker.server.site, worker.peer.site)
    if network.is_full(source, target, lane):
        return False
    sender, receiver = (worker.peer.worker, "server") if up else ("server", worker.peer.worker)
    worker.bytes_up += size if up else 0
    told = shown(message)
    network.trace.note(sender, f"→ {receiver}: {told}")

    def deliver() -> None:
        if network.is_cut(source, target) or not connection.is_open:
            return
        network.trace.note(receiver, f"← {sender}: {told}")
        if up:
            _arrive_at_server(network, connection, lane, header, payload)
        elif connection.server is network.server and network.server is not None:
            worker.arrive(lane, header, payload)

    network.carry(connection, lane, source, target, size, deliver)
    return True


def _arrive_at_server(network: Network, connection: Connection, lane: str, header: bytes, payload: bytes) -> None:
    server = network.server
    if server is None or (connection.server is not None and connection.server is not server):
        connection.worker.reset()  # nobody listens, or somebody who knows nothing of this connection
        return
    connection.server = server
    server.arrive(connection, lane, header, payload)
