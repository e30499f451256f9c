"""What strangers and bad members do to a server's ports: real connections, one function a kind of attack.

Each is given the target and works until `stop` is set; it never waits for the server's good will. Used by this folder's
tests and by the benchmark, which run many at once, in threads or in a process of their own.
"""

import contextlib
import random
import socket
import struct
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event, Thread

import zmq
from shell.place import Place, heartbeat

from hetero_async.core.messages import Chunk, Message, Want
from hetero_async.formats.chunks import CHUNK_BYTES
from hetero_async.shell.keys import load_secret
from hetero_async.shell.wire import pack

PAUSE_SECONDS = 0.02
CONNECT_SECONDS = 5.0
STOP_SECONDS = 60.0
IDLE_CONNECTIONS = 500
SLOW_CONNECTIONS = 100
STORM_CLIENTS = 20

# RFC 37: signature, version 3.0, mechanism, as a client, filler.
GREETING = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"CURVE".ljust(20, b"\0") + bytes(32)
HTTP = b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: curl/8.0\r\nAccept: */*\r\n\r\n"
TLS = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(64)) * 8
OLD_ZMTP = b"\x01\x00" + b"\x05\x00hey!"  # version 1: an anonymous peer, and its first message
ZMTP_2 = b"\xff" + bytes(8) + b"\x7f" + b"\x01\x05\x00\x00"
# A command frame of 2^62 bytes, and one of exactly as much as a frame may have.
ENDLESS_FRAME = GREETING + b"\x06" + struct.pack(">Q", 1 << 62)
LARGEST_FRAME = GREETING + b"\x06" + struct.pack(">Q", CHUNK_BYTES + 33)
# A frame after which more of the same message follow.
ONE_MORE_PART = b"\x03" + struct.pack(">Q", CHUNK_BYTES // 16) + bytes(CHUNK_BYTES // 16)
HALF_HELLO = GREETING + b"\x04\xc8\x05HELLO\x01\x00" + bytes(60)
OPENINGS = {
    "http": HTTP, "tls": TLS, "zmtp 1": OLD_ZMTP, "zmtp 2": ZMTP_2, "endless frame": ENDLESS_FRAME,
    "random": random.Random(7).randbytes(4096), "zeros": bytes(4096),
    "other mechanism": GREETING.replace(b"CURVE", b"WRONG"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Target:
    """Two ports on the loopback, the server's key, and a pair of keys that it lets in (or does not)."""

    control: int
    bulk: int
    server_key: bytes
    public: bytes = b""
    secret: bytes = b""


def framed(message: Message) -> bytes:
    """The header frame, as our own software sends it."""
    return bytes(pack(message, b"")[0])


def dial(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=CONNECT_SECONDS)


@contextlib.contextmanager
def crowd(port: int, count: int, opening: bytes = b"") -> Iterator[list[socket.socket]]:
    """So many connections, each with these first bytes. Those that the system does not give are left out."""
    connections: list[socket.socket] = []
    try:
        for _ in range(count):
            with contextlib.suppress(OSError):
                connections.append(dial(port))
                connections[-1].sendall(opening)
                connections[-1].setblocking(False)
        yield connections
    finally:
        for connection in connections:
            connection.close()


def is_closed(connection: socket.socket) -> bool:
    """Whether the other end has ended it."""
    try:
        while received := connection.recv(65536):
            del received
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


# --- by whoever can reach the ports ---


def babble(target: Target, stop: Event) -> None:
    """Bytes of other protocols, a new connection each time."""
    while not stop.is_set():
        for opening in OPENINGS.values():
            for port in (target.control, target.bulk):
                with contextlib.suppress(OSError), dial(port) as connection:
                    connection.sendall(opening)
        stop.wait(PAUSE_SECONDS)


def idle(target: Target, stop: Event) -> None:
    """500 connections that say nothing; whichever is thrown out comes again at once."""
    with crowd(target.control, IDLE_CONNECTIONS) as connections:
        while not stop.is_set():
            for number, connection in enumerate(connections):
                if is_closed(connection) and not stop.is_set():
                    connection.close()
                    with contextlib.suppress(OSError):
                        connections[number] = dial(target.control)
                        connections[number].setblocking(False)
            stop.wait(0.2)


def slow_loris(target: Target, stop: Event) -> None:
    """Handshakes that are right so far and go on by one byte at a time."""
    said = HALF_HELLO
    while not stop.is_set():
        with crowd(target.control, SLOW_CONNECTIONS) as connections:
            for byte in said:
                for connection in connections:
                    with contextlib.suppress(OSError):
                        connection.send(bytes([byte]))
                if stop.wait(0.1):
                    return


def largest_frames(target: Target, stop: Event) -> None:
    """The most memory that somebody without a key can take: almost a whole frame on each of 100 connections."""
    while not stop.is_set():
        with crowd(target.bulk, SLOW_CONNECTIONS, LARGEST_FRAME) as connections:
            for connection in connections:
                with contextlib.suppress(OSError):
                    connection.settimeout(1.0)
                    connection.sendall(bytes(CHUNK_BYTES))
            stop.wait(3.0)


def endless_message(target: Target, stop: Event) -> None:
    """Part after part of one message and no handshake; a new connection when it is thrown out."""
    while not stop.is_set():
        with contextlib.suppress(OSError), dial(target.bulk) as connection:
            connection.sendall(GREETING)
            while not stop.is_set():
                connection.sendall(ONE_MORE_PART)
        stop.wait(PAUSE_SECONDS)


def null_clients(target: Target, stop: Event) -> None:
    """ZeroMQ peers that want to speak without any security, or with a name and a password."""
    while not stop.is_set():
        for who in ("nobody", "admin with a password"):
            with crowd_of_dealers(target, STORM_CLIENTS, who=who) as dealers:
                _say_all(dealers, [framed(heartbeat())])
                stop.wait(0.3)


def stranger_keys(target: Target, stop: Event) -> None:
    """Peers with good manners and keys that nobody has let in: a storm of them, again and again."""
    while not stop.is_set():
        with crowd_of_dealers(target, STORM_CLIENTS, who="stranger") as strangers:
            _say_all(strangers, [framed(heartbeat())])
            stop.wait(0.3)


# --- by the holder of a key that is let in ---


def reconnect_storm(target: Target, stop: Event) -> None:
    """One member that connects on both lanes, says a word and is gone again, all the time."""
    while not stop.is_set():
        with crowd_of_dealers(target, STORM_CLIENTS) as members:
            _say_all(members, [framed(heartbeat())])
            stop.wait(0.1)


def flood(target: Target, stop: Event) -> None:
    """Good messages as fast as they go."""
    with crowd_of_dealers(target, 2) as members:
        while not stop.is_set():
            _say_all(members, [framed(heartbeat())])
            time.sleep(0)


def oversize_frames(target: Target, stop: Event) -> None:
    """Messages that are too long, have too many parts, or none."""
    while not stop.is_set():
        for frames in ([bytes(CHUNK_BYTES + 1)], [framed(heartbeat())] * 50, [b""]):
            with crowd_of_dealers(target, 4) as members:
                _say_all(members, frames)
                stop.wait(0.3)


def unasked_chunks(target: Target, stop: Event) -> None:
    """Whole chunks of a delta that was never offered, on the bulk lane."""
    chunk = framed(Chunk(kind="delta", number=1, index=0, total_bytes=CHUNK_BYTES, total_hash=bytes(16)))
    with crowd_of_dealers(target, 4, lanes=(target.bulk,)) as members:
        while not stop.is_set():
            _say_all(members, [chunk, bytes(CHUNK_BYTES)])
            time.sleep(0.001)


def deaf_readers(target: Target, stop: Event) -> None:
    """Ask for the parameters again and again, and never read what comes."""
    wants = framed(Want(kind="snapshot", number=0, first=0, count=8))
    while not stop.is_set():
        with crowd_of_dealers(target, 10, lanes=(target.bulk,), inbox=1) as members:
            for _ in range(20):
                _say_all(members, [wants])
                if stop.wait(0.1):
                    return


@contextlib.contextmanager
def crowd_of_dealers(
    target: Target,
    count: int,
    *,
    who: str = "member",
    lanes: tuple[int, ...] = (),
    inbox: int = 100,
) -> "Iterator[list[zmq.Socket[bytes]]]":
    with zmq.Context() as context:
        context.setsockopt(zmq.MAX_SOCKETS, 1024)
        sockets = []
        for port in lanes or (target.control, target.bulk):
            for _ in range(count):
                raw = context.socket(zmq.DEALER)
                raw.setsockopt(zmq.LINGER, 0)
                raw.setsockopt(zmq.RCVHWM, inbox)
                raw.setsockopt(zmq.SNDTIMEO, 0)
                secure(raw, target, who)
                raw.connect(f"tcp://127.0.0.1:{port}")
                sockets.append(raw)
        try:
            yield sockets
        finally:
            for raw in sockets:
                raw.close()


def secure(raw: "zmq.Socket[bytes]", target: Target, who: str) -> None:
    if who == "admin with a password":
        raw.setsockopt(zmq.PLAIN_USERNAME, b"admin")
        raw.setsockopt(zmq.PLAIN_PASSWORD, b"admin")
    elif who in ("member", "stranger"):
        public, secret = (target.public, target.secret) if who == "member" else zmq.curve_keypair()
        raw.setsockopt(zmq.CURVE_SERVERKEY, target.server_key)
        raw.setsockopt(zmq.CURVE_PUBLICKEY, public)
        raw.setsockopt(zmq.CURVE_SECRETKEY, secret)


def _say_all(sockets: "list[zmq.Socket[bytes]]", frames: list[bytes]) -> None:
    for raw in sockets:
        with contextlib.suppress(zmq.Again):
            raw.send_multipart(frames, zmq.DONTWAIT)


Attack = Callable[[Target, Event], None]
FROM_OUTSIDE: dict[str, Attack] = {
    "other protocols": babble,
    "idle connections": idle,
    "slow handshakes": slow_loris,
    "largest frames": largest_frames,
    "endless message": endless_message,
    "no key": null_clients,
    "strangers' keys": stranger_keys,
}
# A member's message that never ends is not among them: libzmq gathers all of its parts before anybody sees one, without
# any limit, so the server is stopped by its memory limit (test_memory.py::test_55_…) and comes back from its log.
FROM_WITHIN: dict[str, Attack] = {
    "reconnect storm": reconnect_storm,
    "flood": flood,
    "oversize frames": oversize_frames,
    "unasked chunks": unasked_chunks,
    "deaf readers": deaf_readers,
}


def target_of(place: Place, name: str = "") -> Target:
    """With a name: as the holder of that worker's keys."""
    control, bulk = (int(address.rsplit(":", 1)[1]) for address in (place.control, place.bulk))
    keys = (place.public(name), load_secret(place.keys / f"{name}.secret")) if name else (b"", b"")
    return Target(control, bulk, place.public("server"), *keys)


@contextlib.contextmanager
def under(attack: Attack, target: Target) -> Iterator[None]:
    """In a thread beside what is done meanwhile."""
    stop = Event()
    thread = Thread(target=attack, args=(target, stop))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(STOP_SECONDS)
        assert not thread.is_alive()
