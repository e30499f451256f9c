"""What both ends of a lane must agree on: how a message lies in frames, and how a lane's sockets are made.

Used by link.py alone. A message is one header frame and at most one payload frame; libzmq cannot bound the number of
frames, so whoever sends another number is refused here. Nothing here sends or receives.
"""

import errno
import ipaddress
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import urlsplit

import trio
import zmq

from hetero_async.core.messages import Message
from hetero_async.errors import ConfigError, PeerError
from hetero_async.formats.chunks import CHUNK_BYTES
from hetero_async.formats.frames import HEADER_BYTES_MAX, decode, encode
from hetero_async.shell.handshake import DialSocket
from hetero_async.shell.sockets import TrioSocket

Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"
Frame: TypeAlias = zmq.Frame

# What CURVE adds to a frame counts against libzmq's limit.
CURVE_OVERHEAD_BYTES = 33
# The term that the sender serves in stands before each header, 0 when it serves in none.
TERM = struct.Struct("<Q")
FRAME_BYTES_MAX = max(CHUNK_BYTES, TERM.size + HEADER_BYTES_MAX)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a lane's sockets are set. Times in milliseconds, queues in messages for each connection.

    `inbox` is a server's, 0 without limit; `heartbeat_every` 0 leaves it to TCP to find out that a host is gone. The
    rest is what one key may do at a server: `in_flight` messages received and not yet read by the loop, and so many
    messages and bytes a second.
    """

    queue: int
    inbox: int
    in_flight: int
    messages_per_second: int
    bytes_per_second: int
    heartbeat_every: int
    heartbeat_timeout: int
    linger: int


# A site that vanished is known by its silence here. The last words (a Bye) get half a second to leave.
# A worker says about four things a second, and what its script records; its largest message is the schema in a Hello.
CONTROL = Settings(
    queue=64, inbox=0, in_flight=32, messages_per_second=100, bytes_per_second=4 * 1024 * 1024, linger=500,
    heartbeat_every=5_000, heartbeat_timeout=15_000,
)  # fmt: skip
# A frame on its way does not count as a sign of life until it is whole, so the time-out must be longer than 1 MiB takes
# on the slowest link, shared by all workers of a site: at 2 Mbit/s that is 4.2 s for one worker and 60 s for fourteen.
# The queue holds the credits of a transfer, the next ones, and what libzmq has not reported as sent yet (up to half).
# What a server has not read yet waits in TCP, with its sender: however busy the loop is, a connection holds in libzmq
# the chunks of its inbox and the one that finds it full. That needs a lane without libzmq's heartbeats, see `listen`.
# CURVE does about 600 chunks of 1 MiB a second, and a worker asks once for each that it fetches.
BULK_INBOX = 2
BULK = Settings(
    queue=16, inbox=BULK_INBOX, in_flight=24, messages_per_second=2_000, bytes_per_second=1024 * 1024 * 1024, linger=0,
    heartbeat_every=0, heartbeat_timeout=60_000,
)  # fmt: skip

# A stranger can hold one frame's memory until he is thrown out; libzmq's default is 30 s.
HANDSHAKE_MS = 5_000
BACKLOG = 128
# Of TCP's own, unanswered, until a silent connection is given up.
PROBES = 3


# Between two attempts to connect. A server that comes back is found by all within the longest.
RETRY_MS_MIN = 200
RETRY_MS_MAX = 3_000


@asynccontextmanager
async def open_context() -> AsyncIterator[Context]:
    """Ending it waits until all is sent that lingers, half a second at most, in a thread."""
    context = zmq.Context()
    try:
        yield context
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(context.term)


async def listen(
    context: Context, settings: Settings, address: str, *, setting: str, secret: bytes, domain: bytes
) -> TrioSocket:
    """A ROUTER that admits whom the domain's judge admits. Raises ConfigError when the address cannot be had."""
    local = await _numeric(address, setting)
    raw = _configured(context.socket(zmq.ROUTER), settings, local)
    raw.setsockopt(zmq.ROUTER_MANDATORY, 1)  # without it, what cannot be delivered vanishes without a word
    # No limit where there are heartbeats, so the link reads at once. libzmq 4.3.5 ends the whole process
    # (stream_engine_base.cpp, assertion !_io_error) when a peer leaves whose queue is full and a heartbeat falls due,
    # or one of the peer's is found, before somebody has read from it.
    raw.setsockopt(zmq.RCVHWM, settings.inbox)
    raw.setsockopt(zmq.BACKLOG, BACKLOG)
    raw.setsockopt(zmq.CURVE_SERVER, 1)
    raw.setsockopt(zmq.CURVE_SECRETKEY, secret)
    raw.setsockopt(zmq.ZAP_DOMAIN, domain)
    raw.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # no judge, no entrance
    try:
        raw.bind(local)
    except zmq.ZMQError as error:
        raw.close()
        raise ConfigError(_why_not(address, setting, error)) from None
    return TrioSocket(raw)


def dial(context: Context, settings: Settings, address: str, *, server_key: bytes, secret: bytes) -> DialSocket:
    """A DEALER that speaks with the holder of that key or with nobody. Goes on trying by itself until it is closed."""
    raw = _configured(context.socket(zmq.DEALER), settings, address)
    raw.setsockopt(zmq.IMMEDIATE, 1)  # queue nothing for a connection that is not there
    raw.setsockopt(zmq.RECONNECT_IVL, RETRY_MS_MIN)  # libzmq adds its own jitter
    raw.setsockopt(zmq.RECONNECT_IVL_MAX, RETRY_MS_MAX)
    raw.setsockopt(zmq.CURVE_SERVERKEY, server_key)
    raw.setsockopt(zmq.CURVE_SECRETKEY, secret)
    raw.setsockopt(zmq.CURVE_PUBLICKEY, zmq.curve_public(secret))
    socket = DialSocket(raw)
    socket.connect(address)
    return socket


def _configured(raw: "zmq.Socket[bytes]", settings: Settings, address: str) -> "zmq.Socket[bytes]":
    probe_every_seconds = max(1, settings.heartbeat_timeout // 1000 // (1 + PROBES))  # libzmq cannot connect with 0
    options = {
        zmq.MAXMSGSIZE: FRAME_BYTES_MAX + CURVE_OVERHEAD_BYTES,
        zmq.SNDHWM: settings.queue,
        zmq.RCVHWM: settings.queue,
        zmq.HANDSHAKE_IVL: HANDSHAKE_MS,
        zmq.HEARTBEAT_IVL: settings.heartbeat_every,
        zmq.HEARTBEAT_TIMEOUT: settings.heartbeat_timeout,
        zmq.HEARTBEAT_TTL: settings.heartbeat_timeout,
        zmq.TCP_MAXRT: settings.heartbeat_timeout,
        zmq.TCP_KEEPALIVE: 1,
        zmq.TCP_KEEPALIVE_IDLE: probe_every_seconds,
        zmq.TCP_KEEPALIVE_INTVL: probe_every_seconds,
        zmq.TCP_KEEPALIVE_CNT: PROBES,
        zmq.LINGER: settings.linger,
        zmq.IPV6: int("[" in address),
    }
    for option, value in options.items():
        raw.setsockopt(option, value)
    return raw


async def _numeric(address: str, setting: str) -> str:
    """libzmq looks up names when it dials, but not when it listens."""
    parsed = urlsplit(address)
    host, port = parsed.hostname or "", parsed.port
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return f"tcp://{await _looked_up(host, address, setting)}:{port}"
    return address


async def _looked_up(host: str, address: str, setting: str) -> str:
    try:
        found = await trio.socket.getaddrinfo(host, None, family=trio.socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"cannot listen at {address}: {error.strerror}; change {setting} in run.toml") from None
    return str(found[0][4][0])


def _why_not(address: str, setting: str, error: zmq.ZMQError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"address {address} is already in use; stop the other server or change {setting} in run.toml"
    return f"cannot listen at {address}: {error.strerror}; {setting} in run.toml must be an address of this machine"


def pack(message: Message, payload: bytes | memoryview, term: int = 0) -> list[bytes | memoryview]:
    assert len(payload) <= FRAME_BYTES_MAX, f"a payload of {len(payload)} bytes for {type(message).__name__}"
    header = TERM.pack(term) + encode(message)
    return [header, payload] if payload else [header]


def unpack(frames: Sequence[zmq.Frame]) -> tuple[int, Message, bytes]:
    """Term, message and payload. Raises PeerError for anything that `pack` does not make."""
    if not 1 <= len(frames) <= 2:
        raise PeerError(f"a message of {len(frames)} frames, there must be 1 or 2")
    header = frames[0].bytes
    if len(header) < TERM.size:
        raise PeerError(f"a header of {len(header)} bytes")
    message = decode(header[TERM.size :])
    if not isinstance(message, Message):
        raise PeerError(f"{type(message).__name__} is not a message between peers")
    return TERM.unpack(header[: TERM.size])[0], message, frames[1].bytes if len(frames) == 2 else b""


def size(frames: Sequence[zmq.Frame]) -> int:
    return sum(len(frame) for frame in frames)
