"""A bad way between two sites where the kernel has no netem: packets late, lost, doubled and out of order, by a seed.

One thread of the test carries the packets of one pair of sites from a TUN device in the one to a TUN device in the
other. What it does to each is netem's own definition of these words, so that both give a test the same network.
"""

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_BYTES_MAX = 65_535
# Packets under way at once; a router's memory has an end too, and past it they are lost.
UNDER_WAY_MAX = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Rough:
    """What befalls the packets of one direction. Shares are of 1; reordered packets overtake by not being delayed."""

    delay_ms: float
    jitter_ms: float = 0.0
    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0

    def netem(self) -> str:
        shares = {"loss": self.loss, "duplicate": self.duplicate, "reorder": self.reorder}
        told = [f"{word} {100 * share:g}%" for word, share in shares.items() if share]
        return " ".join([f"netem delay {self.delay_ms:g}ms {self.jitter_ms:g}ms", *told])

    def delays(self, chance: random.Random) -> Iterator[float]:
        """Of each copy of one packet that arrives, in seconds."""
        if chance.random() < self.loss:
            return
        for _ in range(2 if chance.random() < self.duplicate else 1):
            is_overtaking = chance.random() < self.reorder
            spread = chance.uniform(-self.jitter_ms, self.jitter_ms)
            yield 0.0 if is_overtaking else max(0.0, self.delay_ms + spread) / 1000


class RoughLink:
    """Between two sites."""

    def __init__(self, ends: Mapping[str, int]) -> None:
        """`ends`: the sites and their TUN devices, which are up; they are closed with the link."""
        self._ends = ends
        self._out = dict(zip(ends.values(), reversed(ends.values()), strict=True))
        self._rough = dict.fromkeys(self._out, Rough(delay_ms=0))
        self._chance = random.Random(0)
        self._stop, self._stopping = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="rough link", daemon=True)
        self._thread.start()

    def set(self, source: str, rough: Rough) -> None:
        self._rough[self._ends[source]] = rough

    def close(self) -> None:
        os.close(self._stopping)
        self._thread.join()
        for descriptor in (self._stop, *self._ends.values()):
            os.close(descriptor)

    def _carry(self) -> None:
        poll = select.poll()
        for descriptor in (self._stop, *self._out):
            poll.register(descriptor, select.POLLIN)
        under_way: list[tuple[float, int, int, bytes]] = []
        number = 0
        while True:
            wait_ms = max(0.0, under_way[0][0] - time.monotonic()) * 1000 if under_way else None
            ready = [descriptor for descriptor, _ in poll.poll(wait_ms)]
            if self._stop in ready:
                return
            for descriptor in ready:
                packet = os.read(descriptor, PACKET_BYTES_MAX)
                for delay in self._rough[descriptor].delays(self._chance):
                    if len(under_way) < UNDER_WAY_MAX:
                        number += 1
                        heapq.heappush(under_way, (time.monotonic() + delay, number, self._out[descriptor], packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, _, out, packet = heapq.heappop(under_way)
                os.write(out, packet)


def open_tun(name: str) -> int:
    """A TUN device in the calling thread's namespace; it is gone when the descriptor is closed."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
    return descriptor
