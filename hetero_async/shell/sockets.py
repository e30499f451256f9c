"""One ZeroMQ socket under trio: wait until it can be read or written, and never sleep through an edge.

Used by link.py and gate.py. The file descriptor of a ZeroMQ socket means no more than "look at EVENTS again", it says
so once (edge-triggered), and any call into the library may eat that edge. So there is one watcher of the descriptor,
and after every call whoever else could go on is woken. The raw socket is wrapped: nobody else may call it.
"""

import errno
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio
import zmq

T = TypeVar("T")


class TrioSocket:
    """Every call is cancel-atomic. `watch` must run, in a task of the owner, for as long as anybody waits."""

    def __init__(self, raw: "zmq.Socket[bytes]") -> None:
        self._raw = raw
        self._descriptor = int(raw.getsockopt(zmq.FD))
        self._readers = trio.lowlevel.ParkingLot()
        self._writers = trio.lowlevel.ParkingLot()

    async def watch(self) -> None:
        """Wake those who wait, until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._descriptor)
            self._settle()

    async def receive(self) -> list[zmq.Frame]:
        """The next message, all frames of it."""
        return await self._when(
            zmq.POLLIN, self._readers, lambda: self._raw.recv_multipart(zmq.DONTWAIT, copy=False, track=False)
        )

    def try_receive(self) -> list[zmq.Frame] | None:
        """The next message if it is here already, else None. Wakes nobody: the caller goes back to `receive`."""
        try:
            return self._raw.recv_multipart(zmq.DONTWAIT, copy=False, track=False)
        except zmq.Again:
            return None

    async def send(self, parts: Sequence[bytes | memoryview]) -> None:
        """Wait for room, then send. Not for a ROUTER, whose room for one peer cannot be waited for."""
        await self._when(zmq.POLLOUT, self._writers, lambda: self._raw.send_multipart(parts, zmq.DONTWAIT))

    def try_send(self, parts: Sequence[bytes | memoryview]) -> bool:
        """Send at once, or not at all (False): no room, no connection, or a ROUTER's peer is gone.

        Large parts are not copied, so that peers who read nothing share what waits for them; they must not change.
        """
        try:
            self._raw.send_multipart(parts, zmq.DONTWAIT, copy=False)
        except zmq.ZMQError as error:
            if error.errno in (errno.EAGAIN, errno.EHOSTUNREACH):
                return False
            raise
        finally:
            self._settle()
        return True

    def monitor(self, events: int) -> "TrioSocket":
        """Where libzmq tells what becomes of this socket's connections. To be closed before this one."""
        return TrioSocket(self._raw.get_monitor_socket(events))

    def close(self) -> None:
        """To be called when `watch` has ended. Whoever still waits on the descriptor gets ClosedResourceError."""
        if not self._raw.closed:
            trio.lowlevel.notify_closing(self._descriptor)
            self._raw.close()

    async def _when(self, event: int, lot: trio.lowlevel.ParkingLot, operate: Callable[[], T]) -> T:
        await trio.lowlevel.checkpoint_if_cancelled()
        # Nothing may come between the last look at EVENTS and the parking, or the edge is lost.
        while not self._settle() & event:
            await lot.park()
        try:
            return operate()
        finally:
            self._settle()
            # Lets others run, like any checkpoint, but can no longer take away what was done.
            await trio.lowlevel.cancel_shielded_checkpoint()

    def _settle(self) -> int:
        """Read EVENTS, which rearms the descriptor, and wake one of those who can go on."""
        events = int(self._raw.getsockopt(zmq.EVENTS))
        if events & zmq.POLLIN:
            self._readers.unpark()
        if events & zmq.POLLOUT:
            self._writers.unpark()
        return events
