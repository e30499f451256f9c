"""A thin link on the loopback: TCP proxies that share so many bytes a second, fairly, in each direction.

A test puts one proxy before each of the server's addresses; what goes through all of them together is bounded, as on
one wire between two sites.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import trio

# What one connection may pass on before it is the others' turn: small, as packets are.
SLICE_BYTES = 1500
# What the wire's own queue holds. More than this and the sender's kernel holds it.
SOCKET_BUFFER_BYTES = 32 * 1024


class Wire:
    """One direction. Connections take turns: whoever waits for his slice waits in a queue."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self.bytes_passed = 0
        self._turn = trio.StrictFIFOLock()
        self._free_at = 0.0

    async def carry(self, count: int) -> None:
        """Return when `count` bytes have crossed. One at a time, in the order of asking."""
        async with self._turn:
            self._free_at = max(self._free_at, trio.current_time()) + count / self.bytes_per_second
            await trio.sleep_until(self._free_at)
            self.bytes_passed += count


class Throttle:
    """The link between two sites; `up` is towards the addresses behind it."""

    def __init__(self, bits_per_second: float) -> None:
        self.up = Wire(bits_per_second / 8)
        self.down = Wire(bits_per_second / 8)

    @asynccontextmanager
    async def before(self, ports: Sequence[int]) -> AsyncIterator[list[str]]:
        """Addresses on this machine, each leading through the link to the port of the same place."""
        async with trio.open_nursery() as nursery:
            fronts = []
            for port in ports:
                [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
                nursery.start_soon(self._serve, listener, port)
                fronts.append(f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}")
            yield fronts
            nursery.cancel_scope.cancel()

    async def _serve(self, listener: trio.SocketListener, port: int) -> None:
        async with listener, trio.open_nursery() as nursery:
            while True:
                near = await listener.accept()
                nursery.start_soon(self._join, near, port)

    async def _join(self, near: trio.SocketStream, port: int) -> None:
        """Carry one connection both ways until either side ends it."""
        async with near, await trio.open_tcp_stream("127.0.0.1", port) as far:
            for stream in (near, far):
                stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
                stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_RCVBUF, SOCKET_BUFFER_BYTES)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_pipe, near, far, self.up, nursery.cancel_scope)
                nursery.start_soon(_pipe, far, near, self.down, nursery.cancel_scope)


async def _pipe(source: trio.SocketStream, sink: trio.SocketStream, wire: Wire, both: trio.CancelScope) -> None:
    try:
        while piece := await source.receive_some(SLICE_BYTES):
            await wire.carry(len(piece))
            await sink.send_all(piece)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        pass  # either side may end it, in any way
    both.cancel()
