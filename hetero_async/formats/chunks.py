"""A large object in pieces: the sender's slices, and the receiver's book of what is here and what to ask for.

Used by both ends of a transfer; knows no socket and no clock. A frame that takes longer to cross the link than the
heartbeat's patience can never arrive, hence pieces; what has arrived survives a broken connection.
"""

from collections import deque
from collections.abc import Sequence

import xxhash

from hetero_async.errors import PeerError

# 0.4 s at 20 Mbit/s: well within the connection's heartbeat.
CHUNK_BYTES = 1024 * 1024
# Chunks under way at once: fills a link of 300 ms at 200 Mbit/s, and bounds what can pile up in a socket.
CREDITS = 8


def chunk_count(total_bytes: int) -> int:
    return -(-total_bytes // CHUNK_BYTES)


def slice_chunk(data: bytes | bytearray | memoryview, index: int) -> memoryview:
    """Chunk `index` of an object, without a copy."""
    assert 0 <= index < chunk_count(len(data)), f"chunk {index} of {len(data)} bytes"
    return memoryview(data)[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]


class Assembly:
    """One object on its way in. Memory grows with what has arrived, not with what the peer announced."""

    def __init__(self, total_bytes: int, total_hash: bytes, limit: int) -> None:
        """Raises PeerError when the object is larger than `limit` bytes."""
        if not 0 <= total_bytes <= limit:
            raise PeerError(f"an object of {total_bytes} bytes, at most {limit} are allowed")
        self.total_bytes = total_bytes
        self.total_hash = total_hash
        self._chunks: list[bytes | None] = [None] * chunk_count(total_bytes)
        self._missing = len(self._chunks)
        self._unasked = deque(range(len(self._chunks)))
        self._under_way: set[int] = set()

    def add(self, index: int, chunk: bytes) -> bool:
        """Keep one chunk; False: it was here already. Raises PeerError for a chunk that the object has not."""
        if not 0 <= index < len(self._chunks):
            raise PeerError(f"chunk {index} of an object of {len(self._chunks)}")
        expected = min(CHUNK_BYTES, self.total_bytes - index * CHUNK_BYTES)
        if len(chunk) != expected:
            raise PeerError(f"chunk {index} has {len(chunk)} bytes, expected {expected}")
        self._under_way.discard(index)
        is_new = self._chunks[index] is None
        if self._chunks[index] is None:
            self._chunks[index] = bytes(chunk)
            self._missing -= 1
        return is_new

    def wanted(self, credits: int = CREDITS) -> list[tuple[int, int]]:
        """Runs (first, count) to ask for now, so that at most `credits` chunks are under way; they count as asked."""
        asked: list[int] = []
        while self._unasked and len(self._under_way) < credits:
            index = self._unasked.popleft()
            if self._chunks[index] is None:
                self._under_way.add(index)
                asked.append(index)
        return _runs(asked)

    def lost(self) -> None:
        """The connection broke: nothing is under way any more, and `wanted` starts over with what is missing."""
        self._under_way.clear()
        self._unasked = deque(index for index, chunk in enumerate(self._chunks) if chunk is None)

    @property
    def complete(self) -> bool:
        return self._missing == 0

    def result(self) -> bytes:
        """The whole object, once: its chunks are let go. Raises PeerError when it is not the one that was announced."""
        assert self.complete, f"{self._missing} chunks are missing"
        chunks, self._chunks = self._chunks, []
        whole = b"".join(chunk for chunk in chunks if chunk is not None)
        if xxhash.xxh3_128_digest(whole) != self.total_hash:
            raise PeerError(f"an object of {self.total_bytes} bytes arrived with another hash than was announced")
        return whole


def _runs(indexes: Sequence[int]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for index in indexes:
        if runs and index == sum(runs[-1]):
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((index, 1))
    return runs
