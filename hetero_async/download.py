"""A worker's download: one publish or snapshot at a time, for as long as the server is ahead. Part of train.py."""

import trio

from hetero_async.core.messages import SNAPSHOT, Chunk, Want
from hetero_async.ports import DialLink, Lane
from hetero_async.traffic import DOWN, Traffic
from hetero_async.transfers import Pull

# No object of a run is larger than this: it bounds what a confused server can make a worker allocate.
OBJECT_BYTES_MAX = 1 << 40


class Download:
    def __init__(self, link: DialLink, traffic: Traffic) -> None:
        self._link = link
        self._traffic = traffic
        self._pull: Pull | None = None
        self._waited_ms = 0  # for a chunk of the object before
        self._way_back = -1  # the connection on which the server has heard us on the bulk lane

    async def follow(self, wanted: tuple[str, int] | None) -> None:
        """Keep one going: kind and number, None for nothing."""
        pull = self._pull
        # Over a thin link there are newer snapshots before this one is here; publishes lead on from an old one as well.
        is_outrun = pull is not None and wanted is not None and pull.kind == wanted[0] == SNAPSHOT
        if wanted is None:
            self._pull = None
            self._traffic.end(DOWN, trio.current_time())
        elif pull is None or ((pull.kind, pull.number) != wanted and not is_outrun):
            self._pull = self._begin(*wanted)
            self._traffic.begin(DOWN, trio.current_time())
            # It passes what is being sent. Only the first of a connection goes where the answer comes from.
            is_known = self._way_back == self._link.generation
            await self._ask(self._link.control if is_known else self._link.bulk, self._pull.wants())
        elif pull.is_stalled(_now_ms()):
            await self._ask(self._link.bulk, pull.ask_again(_now_ms()))

    def reconnected(self) -> None:
        if self._pull is not None:
            self._pull.interrupted()

    async def add(self, chunk: Chunk, payload: bytes) -> Pull | None:
        """Take one chunk; the pull that is complete with it. Raises PeerError when it does not fit the object."""
        pull = self._pull
        if pull is None or pull.is_complete:
            return None
        if pull.kind == chunk.kind == SNAPSHOT and pull.number < chunk.number:
            # What we asked for is outdated already, and the server sends its newest one instead.
            pull = self._pull = self._begin(SNAPSHOT, chunk.number)
        if (pull.kind, pull.number) != (chunk.kind, chunk.number):
            return None
        pull.add(chunk, payload, _now_ms())
        if not pull.is_complete:
            await self._ask(self._link.bulk, pull.wants())
            return None
        self._waited_ms = pull.slowest_ms
        self._traffic.end(DOWN, trio.current_time(), chunk.total_bytes)
        return pull

    def is_of(self, kind: str, number: int) -> bool:
        return self._pull is not None and (self._pull.kind, self._pull.number) == (kind, number)

    def end(self) -> Pull | None:
        """It has been taken, or is given up; what it was."""
        pull, self._pull = self._pull, None
        return pull

    def _begin(self, kind: str, number: int) -> Pull:
        return Pull(kind, number, _now_ms(), OBJECT_BYTES_MAX, expected_ms=self._waited_ms)

    async def _ask(self, lane: Lane, wants: list[Want]) -> None:
        for want in wants:
            if await lane.send(self._link.server.key, want) and lane is self._link.bulk:
                self._way_back = self._link.generation


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
