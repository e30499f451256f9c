"""What links take for objects of a size: pulled a few chunks at a time, over TCP that begins slowly. For timing.py."""

import math

from hetero_async.formats.chunks import CHUNK_BYTES, CREDITS

# TCP's first flight, ten segments (RFC 6928). While it rests, what it dares to send at once is halved, down to that,
# every so often: a round trip and that much more (RFC 2861, as Linux does it).
FIRST_FLIGHT_BYTES, RETRANSMISSION_SECONDS = 14_480.0, 0.2


def carried(everything: float, rate: float, one: float = 0.0, delay: float = 0.0) -> float:
    """Seconds for so many bytes over one link, of which each object (`one`) is pulled a few chunks at a time."""
    return max(everything / rate, one * 2 * delay / (CREDITS * CHUNK_BYTES))


def slow_start(size: float, rate: float, delay: float, rest: float = 3600.0) -> float:
    """How much longer a transfer takes, so many seconds after the last one, because TCP begins with a small flight and
    doubles it with each answer until the link is full; J. Kurose, K. Ross, Computer Networking, §3.7."""
    round_trip = 2 * delay
    if not round_trip:
        return 0.0
    halvings = rest // (round_trip + RETRANSMISSION_SECONDS)
    first = max(FIRST_FLIGHT_BYTES, size * math.exp2(-halvings))
    until_sent = math.ceil(math.log2(size / first + 1)) - 1
    until_full = math.floor(math.log2(1 + round_trip * rate / first)) + 1 if math.isfinite(rate) else until_sent
    flights = max(0, min(until_sent, until_full))
    return max(0.0, flights * (round_trip + first / rate) - (math.exp2(flights) - 1) * first / rate)


def lingering(size: float, rate: float, delay: float) -> float:
    """How much longer an object takes than its bytes do, because it is pulled a few chunks at a time."""
    return carried(size, rate, size, delay) - size / rate


def trips(size: float) -> int:
    """One-way trips from the news of an object until it is there. The first chunk tells how many there are."""
    return 3 if size <= CHUNK_BYTES else 5
