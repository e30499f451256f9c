"""The end of a link that dials: a worker's, a standby's, an operator's. Fulfils ports.DialLink.

There are several servers, of which one reigns. The link keeps a connection to one of them at a time; when that one
falls silent the next is tried, and after a whole round without an answer the pauses grow. Each server is known by its
key, which is pinned: whoever listens at its address with another key gets no byte.
"""

import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from copy import copy
from dataclasses import dataclass
from pathlib import Path

import tenacity
import trio
import zmq

from hetero_async.core.messages import Message
from hetero_async.errors import PeerError
from hetero_async.formats.chunks import CREDITS
from hetero_async.ports import Incoming, Observer, Peer
from hetero_async.shell import handshake, wire
from hetero_async.shell.gate import Seldom
from hetero_async.shell.handshake import DialSocket
from hetero_async.shell.keys import load_secret
from hetero_async.shell.sockets import TrioSocket

# A worker beats, and is answered, once a second. A few answers may be late behind a full link; after that the
# connection is made anew. It is also the only way in for a key that was refused: libzmq never tries again by itself.
SILENCE_SECONDS = 6.0
# With another server to turn to, waiting so long for the first word of one would be a waste.
FIRST_WORD_SECONDS = 2.0
# Received, and not yet read by the loop; a reader that is slower stops the lane's socket.
CONTROL_INBOX = 64


def until_stopped() -> str:
    """What a link says of itself: it never gives up. Its caller may."""
    return "until stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server's name, its public key, and where its two lanes are."""

    name: str
    key: bytes
    control: str
    bulk: str


class DialLane:
    """The DEALER of the present connection, and what was received on all of them. Fulfils ports.Lane."""

    def __init__(self, link: "DialLink", size: int) -> None:
        self.socket: DialSocket | None = None
        self._link = link
        self.arrived, self._inbox = trio.open_memory_channel[Incoming](size)

    async def receive(self) -> Incoming:
        return await self._inbox.receive()

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        """False while there is no connection: nothing is kept, since it may not be true any more when there is one."""
        await trio.lowlevel.checkpoint()
        parts = wire.pack(message, payload)
        is_meant = key == self._link.server.key  # it may have been turned to another server meanwhile
        is_sent = is_meant and self.socket is not None and self.socket.try_send(parts)
        if is_sent:
            self._link.bytes_up += sum(map(len, parts))
        return is_sent


class DialLink:
    """`run` must run."""

    def __init__(
        self,
        *,
        servers: Sequence[Endpoint],
        secret_path: Path,
        observer: Observer,
        silence_seconds: float,
        how_long: Callable[[], str],
    ) -> None:
        self.control = DialLane(self, CONTROL_INBOX)
        self.bulk = DialLane(self, CREDITS)
        self.bytes_up = self.bytes_down = 0
        self.generation = 0
        self.connected = False  # the server was heard on the present connection
        self._servers = list(servers)
        self._turn = 0
        self._is_turned = False  # to another server, on purpose
        self._connection = trio.CancelScope()
        self._secret_path = secret_path
        self._secret = load_secret(secret_path)
        self.problem = ""  # why nothing was heard on the last connection
        self._observer = observer
        self._complaints = Seldom()
        self._silence_seconds = silence_seconds
        self._how_long = how_long
        self._was_missed = False

    @property
    def server(self) -> Peer:
        if not self._servers:
            return Peer(key=b"", role="server", site="", worker="")
        return Peer(key=self._endpoint.key, role="server", site="", worker=self._endpoint.name)

    @property
    def _endpoint(self) -> Endpoint:
        return self._servers[self._turn]

    def turn(self, server: str = "") -> None:
        names = [endpoint.name for endpoint in self._servers]
        turn = names.index(server) if server in names else self._turn + (server == "")
        if names and turn % len(names) != self._turn:
            self._turn = turn % len(names)
            self._is_turned = True
            self._connection.cancel()

    async def run(self, context: wire.Context) -> None:
        """Keep a connection, until cancelled: a server may be away for hours and come back."""
        if not self._servers:
            await trio.sleep_forever()  # a run's only server, started as a standby: it awaits the operator
        while True:
            patiently = tenacity.AsyncRetrying(
                retry=tenacity.retry_if_exception_type(trio.TooSlowError),
                wait=self._pause,
                before_sleep=self._miss,
                sleep=trio.sleep,
                reraise=True,
            )
            await patiently(self._connect, context)

    def _pause(self, attempts: tenacity.RetryCallState) -> float:
        """Every server is tried before the pauses grow. Jittered: whom one server lost do not come back as one."""
        rounds = copy(attempts)  # tenacity counts on in its own
        rounds.attempt_number = 1 + (attempts.attempt_number - 1) // len(self._servers)
        jittered = tenacity.wait_random_exponential(min=wire.RETRY_MS_MIN / 1000, max=wire.RETRY_MS_MAX / 1000)
        return jittered(rounds)

    async def _connect(self, context: wire.Context) -> None:
        """Two fresh sockets, until the server falls silent or another is turned to.

        Raises TooSlowError when it was never heard on them; it is another's turn then.
        """
        generation, self._is_turned = self.generation, False
        self._secret = load_secret(self._secret_path)  # a key that was rotated is used from here on
        dialled = self._endpoint
        with (
            closing(self._dial(context, wire.CONTROL, dialled.control)) as self.control.socket,
            closing(self._dial(context, wire.BULK, dialled.bulk)) as self.bulk.socket,
        ):
            try:
                async with trio.open_nursery() as nursery:
                    self._connection = nursery.cancel_scope
                    self._connection.deadline = trio.current_time() + self._first_word_seconds
                    for socket in (self.control.socket, self.bulk.socket):
                        nursery.start_soon(socket.watch)
                        nursery.start_soon(self._notice_end, socket, self._connection)
                    nursery.start_soon(self._receive_control, self.control.socket, self._connection)
                    nursery.start_soon(self._receive_bulk, self.bulk.socket)
            finally:
                self.connected = False
                self.problem = self.control.socket.problem or self.bulk.socket.problem
                self.control.socket = self.bulk.socket = None
        if not self._is_turned:
            self._turn = (self._turn + 1) % len(self._servers)
        if self.generation == generation and not self._is_turned:
            raise trio.TooSlowError

    async def _notice_end(self, socket: DialSocket, connection: trio.CancelScope) -> None:
        """A server that closes, or refuses, is known at once; one that vanishes, by its silence.

        A link that loses only what is large is known by this alone, since heartbeats pass.
        """
        await socket.ended.wait()
        if self.connected:
            self._observer.event("connection lost", address=socket.address, reason=f"{socket.problem}; dialling anew")
        connection.cancel()

    @property
    def _first_word_seconds(self) -> float:
        return self._silence_seconds if len(self._servers) == 1 else min(FIRST_WORD_SECONDS, self._silence_seconds)

    def _dial(self, context: wire.Context, settings: wire.Settings, address: str) -> DialSocket:
        return wire.dial(context, settings, address, server_key=self._endpoint.key, secret=self._secret)

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

    def _understood(self, frames: "Sequence[wire.Frame]") -> Incoming | None:
        self.bytes_down += wire.size(frames)
        try:
            term, message, payload = wire.unpack(frames)
        except PeerError as error:
            if self._complaints.is_due(str(error)):
                self._observer.event("refused message", reason=str(error))
            return None
        return Incoming(peer=self.server, message=message, payload=payload, term=term)

    def _hear(self) -> None:
        if self.connected:
            return
        self.connected = True
        self.generation += 1
        if self._was_missed:
            self._observer.event("server reached", address=self._endpoint.control)
        self._was_missed = False

    def _miss(self, attempts: tenacity.RetryCallState) -> None:
        self._was_missed = True
        assert attempts.next_action is not None
        self._observer.event(
            "server not reached",
            address=", ".join(endpoint.control for endpoint in self._servers),
            silent_seconds=round(attempts.seconds_since_start or 0.0, 1),
            next_try_seconds=round(attempts.next_action.sleep, 1),
            reason=f"{self._why_missed()} Trying again {self._how_long()}",
        )

    def _why_missed(self) -> str:
        key, server_key = zmq.curve_public(self._secret).decode(), self.server.key.decode()
        cures = {
            handshake.NOBODY: "is the server running, and is this its address?",
            handshake.NOT_LET_IN: f"on its host, its operator can: hetero-async keys allow '{key}' --site SITE.",
            handshake.OTHER_SERVER: f"that key is {server_key}, ours is {key}; nothing was sent.",
        }
        cure = cures.get(self.problem)
        return f"{self.problem}; {cure}" if cure else f"{self.problem or 'no answer'}."


@asynccontextmanager
async def open_dial_link(
    servers: Sequence[Endpoint],
    *,
    secret_path: Path,
    observer: Observer,
    silence_seconds: float = SILENCE_SECONDS,
    how_long: Callable[[], str] = until_stopped,
) -> AsyncIterator[DialLink]:
    """Dial the servers and keep at it. Raises ConfigError for an unusable key, not for absent servers.

    A caller that has nothing to ask for `silence_seconds` hears nothing either, and gets a new connection. One that
    closes the link when nobody answers in time says by `how_long`, for people, when that will be.
    """
    link = DialLink(
        servers=servers,
        secret_path=secret_path,
        observer=observer,
        silence_seconds=silence_seconds,
        how_long=how_long,
    )
    async with wire.open_context() as context, trio.open_nursery() as nursery:
        nursery.start_soon(link.run, context)
        yield link
        nursery.cancel_scope.cancel()
