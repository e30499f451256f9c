"""Bulk objects over a lane: the receiver pulls chunks a few at a time, the sender answers what is asked.

Used by both loops, serve.py and train.py. Asking is the flow control: no more than the credits are ever under way, so
a slow link queues nothing, and after a broken connection only the missing chunks are asked for again.
"""

from dataclasses import dataclass

from hetero_async.core.messages import RECORDS, Chunk, Want
from hetero_async.formats.chunks import CHUNK_BYTES, CREDITS, Assembly, chunk_count, slice_chunk
from hetero_async.ports import Lane

# A transfer without any new chunk for so long asks again; longer than one chunk takes on a 2 Mbit/s link. Over a
# thinner one, what is late is under way still, and would be sent twice, before all that comes after it: so the patience
# follows what chunks have taken, and doubles each time that asking again has brought nothing, up to the limit.
STALL_MS = 8_000
PATIENCE_MS_MAX = 60_000
LONG_AGO_MS = -1 << 60


@dataclass(slots=True)
class Pull:
    """One object on its way in. `assembly` is None until its size is known; `expected_ms` is what the object before it
    waited for a chunk (its `slowest_ms`), 0 where there was none."""

    kind: str
    number: int
    now_ms: int
    limit: int
    assembly: Assembly | None = None
    expected_ms: int = 0
    slowest_ms: int = 0  # the longest that was waited for a chunk, however often it was asked for
    arrived_ms: int = 0  # when a chunk came that was missing
    repeats: int = 0  # how often it was asked again since

    def __post_init__(self) -> None:
        self.arrived_ms = self.now_ms

    def size(self, total_bytes: int, total_hash: bytes) -> None:
        """Learn the object's size. Raises PeerError when it is over the limit."""
        if self.assembly is None:
            self.assembly = Assembly(total_bytes, total_hash, self.limit)

    def add(self, chunk: Chunk, payload: bytes, now_ms: int) -> None:
        """Take one chunk. Raises PeerError when it does not fit the object."""
        was_poll = self._is_poll
        self.size(chunk.total_bytes, chunk.total_hash)
        assert self.assembly is not None
        if self.assembly.add(chunk.index, payload):
            self.slowest_ms = max(self.slowest_ms, 0 if was_poll else now_ms - self.arrived_ms)
            self.arrived_ms, self.repeats = now_ms, 0
        self.now_ms = now_ms

    def is_another(self, chunk: Chunk) -> bool:
        """Whether it belongs to another object than the one whose size we know."""
        return self.assembly is not None and chunk.total_hash != self.assembly.total_hash

    def wants(self) -> list[Want]:
        """What to ask for now. The first question, of unknown size, is for the first chunk."""
        if self.assembly is None:
            return [Want(kind=self.kind, number=self.number, first=0, count=1)]
        return [
            Want(kind=self.kind, number=self.number, first=first, count=count)
            for first, count in self.assembly.wanted(CREDITS)
        ]

    def is_stalled(self, now_ms: int) -> bool:
        return now_ms - self.now_ms >= self._patience_ms(max(STALL_MS, 2 * (self.slowest_ms or self.expected_ms)))

    def is_overdue(self, now_ms: int) -> bool:
        """Whether what is under way is lost rather than slow, by what the chunks before it took, or by its size."""
        size = min(self.assembly.total_bytes, CHUNK_BYTES) if self.assembly else CHUNK_BYTES
        # The link may have become slower since the object before; that it was fast says nothing.
        unknown_ms = max(2 * self.expected_ms, STALL_MS * size // CHUNK_BYTES)
        return now_ms - self.now_ms > self._patience_ms(2 * self.slowest_ms or unknown_ms)

    def _patience_ms(self, at_first_ms: int) -> int:
        return min(at_first_ms << self.repeats, max(at_first_ms, PATIENCE_MS_MAX))

    @property
    def _is_poll(self) -> bool:
        """Records are asked for before there are any, so that nothing comes says nothing of the link."""
        return self.kind == RECORDS and self.assembly is None

    def is_idle(self, now_ms: int, limit_ms: int) -> bool:
        """Whether nothing new has come for so long, however often it was asked for."""
        return now_ms - self.arrived_ms >= limit_ms

    def interrupted(self) -> None:
        """The connection is gone, and with it what was under way: ask again at once."""
        self.now_ms = LONG_AGO_MS

    def ask_again(self, now_ms: int) -> list[Want]:
        """After a stall or a broken connection."""
        self.now_ms = now_ms
        self.repeats += not self._is_poll
        if self.assembly is not None:
            self.assembly.lost()
        return self.wants()

    @property
    def is_complete(self) -> bool:
        return self.assembly is not None and self.assembly.complete


async def send_chunks(lane: Lane, key: bytes, want: Want, blob: bytes | memoryview, blob_hash: bytes) -> None:
    """Answer a Want, credits at most. What the lane drops is asked for again by the receiver."""
    last = min(want.first + min(want.count, CREDITS), chunk_count(len(blob)))
    for index in range(want.first, last):
        piece = slice_chunk(blob, index)
        chunk = Chunk(kind=want.kind, number=want.number, index=index, total_bytes=len(blob), total_hash=blob_hash)
        if not await lane.send(key, chunk, piece):
            return
