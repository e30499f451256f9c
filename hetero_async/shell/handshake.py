"""The socket that dials, and why it is not connected when it is not: what libzmq tells its monitor, in words.

wire.py makes it, dial.py reports what it says. Without this, a wrong address, a key that is not let in and a wrong
server would all look the same: like silence. What a stranger at the other end makes us say is a guess, and called one.
"""

import itertools
import struct

import trio
import zmq

from hetero_async.shell.sockets import TrioSocket

NOBODY = "nobody answers at that address"
NOT_LET_IN = "the server does not let this key in"
# A server that holds another key cannot answer what was encrypted to the pinned one; it hangs up.
OTHER_SERVER = "what answers at that address does not hold the pinned server key"
SILENT = "connected, and not a word"
LOST = "the server, its host or something between has ended the connection, or did not answer"

PROBLEMS: dict[int, str] = {
    zmq.EVENT_CLOSED: NOBODY,
    zmq.EVENT_DISCONNECTED: LOST,
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: NOT_LET_IN,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: OTHER_SERVER,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: OTHER_SERVER,
    zmq.EVENT_HANDSHAKE_SUCCEEDED: SILENT,
}
EVENTS = sum(PROBLEMS)
NUMBERS = itertools.count()
# A monitor's first frame: which event, and a number that goes with it.
EVENT_FRAME = struct.Struct("=HI")


class DialSocket(TrioSocket):
    """`problem` is the first known reason why nothing comes; "" before the first attempt has ended.

    `ended` is set when there is no connection any more, or none could be made. libzmq would try again without a word,
    and whoever waits for what was under way would wait for ever.
    """

    def __init__(self, raw: "zmq.Socket[bytes]") -> None:
        super().__init__(raw)
        self.problem = ""
        self.ended = trio.Event()
        self.address = ""
        # Never the same again: what a closed socket's monitor was called is free only some time later.
        address = f"inproc://monitor-{next(NUMBERS)}"
        raw.monitor(address, EVENTS)
        monitor = raw.context.socket(zmq.PAIR)
        monitor.setsockopt(zmq.LINGER, 0)
        monitor.connect(address)
        self._monitor = TrioSocket(monitor)

    def connect(self, address: str) -> None:
        self.address = address
        self._raw.connect(address)

    async def watch(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(super().watch)
            nursery.start_soon(self._monitor.watch)
            while True:
                event, _ = await self._monitor.receive()
                number, _ = EVENT_FRAME.unpack(event.bytes)
                if not self.ended.is_set():  # a handshake that fails is a lost connection too, and that says less
                    self.problem = PROBLEMS[number]
                if number != zmq.EVENT_HANDSHAKE_SUCCEEDED:
                    self.ended.set()

    def close(self) -> None:
        # While the monitor is on and nobody listens to it, libzmq would wait for a listener in its only thread.
        self._raw.disable_monitor()
        self._monitor.close()
        super().close()
