"""Who may speak: answers libzmq's question about every new connection, and link.py's about every message.

Those who never come so far as to show a key (port scanners, browsers, the slow and the silent) libzmq throws out by
itself; they are counted here, and told of.

Without an answer to the first, CURVE would let any key in; without the second, a key that was struck off would keep its
living connection. Nobody's word counts here but allowed.json's.
"""

from collections.abc import Sequence

import trio
import zmq
from zmq.utils import z85

from hetero_async.ports import Observer, Peer
from hetero_async.shell.keys import AllowList
from hetero_async.shell.sockets import TrioSocket

# libzmq asks here, once for each context; a socket that enforces its domain refuses all until somebody answers.
ADDRESS = "inproc://zeromq.zap.01"
DOMAIN = b"hetero-async"
COMPLAIN_EVERY_SECONDS = 60.0
# Of a connection that ended before a key was shown, or in the middle of showing it.
NOT_A_HANDSHAKE = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
# Past so many different subjects in that time, we complain no more.
COMPLAINTS_MAX = 256


class Seldom:
    """Whether it is time to speak of a subject again. Bounded, however many subjects there are."""

    def __init__(self) -> None:
        self._spoken: dict[object, float] = {}

    def is_due(self, subject: object) -> bool:
        start = trio.current_time() - COMPLAIN_EVERY_SECONDS
        if self._spoken.get(subject, start) > start:
            return False
        self._spoken = {known: at for known, at in self._spoken.items() if at > start}
        if len(self._spoken) >= COMPLAINTS_MAX:
            return False
        self._spoken[subject] = trio.current_time()
        return True


def key_of(frame: zmq.Frame) -> bytes:
    """The key of the connection that this frame came over."""
    return str(frame.get("User-Id")).encode()


def open_judge(context: "zmq.Context[zmq.Socket[bytes]]") -> TrioSocket:
    raw = context.socket(zmq.REP)
    raw.setsockopt(zmq.LINGER, 0)
    raw.bind(ADDRESS)
    return TrioSocket(raw)


class Gate:
    def __init__(self, allowed: AllowList, observer: Observer) -> None:
        self.refusals = 0  # connections and messages
        self.strangers = 0  # connections that came to nothing
        self._allowed = allowed
        self._observer = observer
        self._complaints = Seldom()

    async def answer(self, socket: TrioSocket) -> None:
        """Answer libzmq (RFC 27) about every handshake, until cancelled."""
        while True:
            request = [frame.bytes for frame in await socket.receive()]
            await socket.send(self._verdict(request))

    async def count_strangers(self, monitor: TrioSocket) -> None:
        """Of one listening socket, until cancelled. How seldom they are told of, telemetry.py decides."""
        reason = "they did not shake hands as CURVE does, and were thrown out"
        while True:
            await monitor.receive()
            self.strangers += 1
            self._observer.event("strangers", connections_so_far=self.strangers, reason=reason)

    def _verdict(self, request: Sequence[bytes]) -> list[bytes]:
        version, request_id, _domain, address, _identity, mechanism, *credentials = request
        key = z85.encode(credentials[0]) if mechanism == b"CURVE" else b""
        if key and self.admitted(key) is not None:
            return [version, request_id, b"200", b"OK", key, b""]
        self.refusals += 1
        told, reason = (key or address).decode(), "it is not in allowed.json"
        self._observer.event("refused key", key=told, address=address.decode(), reason=reason)
        return [version, request_id, b"400", b"not allowed", b"", b""]

    def sender(self, key: bytes) -> Peer | None:
        """Whose message that is; None if he is not let in (any more)."""
        peer = self.admitted(key)
        if peer is None:
            self.refused("refused message", key, reason="its key is not in allowed.json any more")
        return peer

    def admitted(self, key: bytes) -> Peer | None:
        peer = self._allowed.lookup(key)
        if self._allowed.problem and self._complaints.is_due(self._allowed.problem):
            self._observer.event("allow-list unusable", reason=f"{self._allowed.problem}; the last good one stays")
        return peer

    def refused(self, event: str, key: bytes, **fields: object) -> bool:
        """Count it, and say so, at most once a minute for each key; whether it was said now."""
        self.refusals += 1
        is_due = self._complaints.is_due((event, key))
        if is_due:
            if (peer := self.admitted(key)) is not None:
                fields = {"worker": peer.worker, **fields}
            self._observer.event(event, key=key.decode(), **fields, refusals_so_far=self.refusals)
        return is_due
