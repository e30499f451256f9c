"""Takes the server's log and checkpoints to the archive, behind its back: no acknowledgement ever waits for it.

`run` is a child of serve.Serving, `finish` what a server does before it ends. Both go on where the archive already is:
what is to be done follows from the server's directory and the list of what is there, and nothing else is remembered.
"""

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity
import trio

from hetero_async.errors import ArchiveAway, ArchiveConflict, LogCorrupt
from hetero_async.formats.archived import pieces
from hetero_async.ports import Archive, Blocking, Held, Holdings, Observer

T = TypeVar("T")

# How often to look for a closed segment or a checkpoint.
LOOK_SECONDS = 1.0
# Pauses between attempts, with jitter: long enough to leave a struggling store alone, short enough to be well soon.
RETRY_SECONDS_MIN, RETRY_SECONDS_MAX = 0.5, 30.0
# Somebody has to do something about it: no use in asking every second whether it has been done.
ALARM_SECONDS = 60.0


class Archiving:
    """`network` runs calls to the archive and may abandon them when cancelled; `blocking` reads the own disk."""

    def __init__(
        self,
        *,
        run: str,
        archive: Archive,
        holdings: Holdings,
        blocking: Blocking,
        network: Blocking,
        observer: Observer,
        retry_seconds_max: float = RETRY_SECONDS_MAX,
    ) -> None:
        self.lsn = 0  # all records up to here that the log still had are in the archive
        self.checkpoint_lsn = 0
        self.failing = ""
        self.alarm = ""
        self._run = run
        self._archive = archive
        self._holdings = holdings
        self._blocking = blocking
        self._network = network
        self._observer = observer
        self._insist = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(ArchiveAway),
            wait=tenacity.wait_random_exponential(min=min(RETRY_SECONDS_MIN, retry_seconds_max), max=retry_seconds_max),
            before_sleep=self._failed,
            sleep=trio.sleep,
        )
        self._sizes: dict[str, int] | None = None  # of what is in the archive
        self._is_identified = False
        self._complete_at = trio.current_time()

    async def run(self) -> None:
        """Archive until cancelled."""
        while True:
            await self._guarded(with_open=False)
            await trio.sleep(ALARM_SECONDS if self.alarm else LOOK_SECONDS)

    def not_needed(self, lsn: int) -> int:
        """Up to which record the log may be dropped: what is not archived is kept, however large the log becomes."""
        return min(lsn, self.lsn)

    async def finish(self) -> None:
        """All there is, the segment that was written to last included. Waits for the archive as long as it takes."""
        await self._guarded(with_open=True)

    def status(self) -> dict[str, Any]:
        """JSON-able. `seconds_behind`: since when the archive has not had all that it should have."""
        return {
            "lsn": self.lsn,
            "checkpoint": self.checkpoint_lsn,
            "seconds_behind": trio.current_time() - self._complete_at,
            "failing": self.failing,
            "alarm": self.alarm,
        }

    async def _guarded(self, with_open: bool) -> None:
        try:
            await self._take(with_open)
        except (ArchiveConflict, LogCorrupt, OSError) as error:  # OSError: the own disk
            if str(error) != self.alarm:
                self._observer.event("archive alarm", reason=str(error))
            self.alarm = str(error)
        else:
            self.alarm = ""
            self._complete_at = trio.current_time()

    async def _take(self, with_open: bool) -> None:
        """Checkpoints and segments in turn, so that neither waits for all of the other over a slow link."""
        await self._identify()
        while True:
            checkpoint = await self._checkpoint()
            segment = await self._blocking(self._holdings.segment_after, self.lsn, with_open)
            if segment is not None:
                with segment.file:
                    await self._put(segment)
                self.lsn = segment.lsn
            elif not checkpoint:
                return

    async def _identify(self) -> None:
        """Raises ArchiveConflict when another run of this name has been archived there."""
        if self._sizes is None:
            there = await self._insisting(self._archive.list, self._run)
            self._sizes = {name: archived.size_bytes for name, archived in there.items()}
        if not self._is_identified and (genesis := await self._blocking(self._holdings.genesis)):
            try:
                await self._insisting(self._archive.put_new, f"{self._run}/genesis", genesis)
            except ArchiveConflict as error:
                raise ArchiveConflict(
                    f"another run was archived as {self._run}: give this one its own place"
                ) from error
            self._is_identified = True

    async def _checkpoint(self) -> bool:
        try:
            files = await self._blocking(self._holdings.checkpoint_after, self.checkpoint_lsn)
        except FileNotFoundError:  # deleted while we looked: there is a newer one
            return True
        with contextlib.ExitStack() as opened:
            for held in files:
                opened.enter_context(held.file)
            for held in files:
                await self._put(held)
        if files:
            self.checkpoint_lsn = files[-1].lsn
        return bool(files)

    async def _put(self, held: Held) -> None:
        assert self._sizes is not None
        for name, start, size in pieces(held.name, held.size_bytes):
            if self._sizes.get(name) != size:
                content = await self._blocking(_read, held, start, size)
                await self._insisting(self._archive.put_new, name, content)
                self._sizes[name] = size
        self._observer.event("archived", file=held.name, lsn=held.lsn)

    async def _insisting(self, call: Callable[..., T], *arguments: object) -> T:
        result: T = await self._insist(self._network, call, *arguments)
        if self.failing:
            self._observer.event("archive well again")
            self.failing = ""
        return result

    def _failed(self, attempts: tenacity.RetryCallState) -> None:
        assert attempts.outcome is not None
        reason = str(attempts.outcome.exception())
        if not self.failing:
            self._observer.event("archive failing", reason=reason)
        self.failing = reason


def _read(held: Held, start: int, size: int) -> bytes:
    held.file.seek(start)
    content = held.file.read(size)
    while len(content) < size and (more := held.file.read(size - len(content))):
        content += more
    assert len(content) == size, f"{held.name} has become shorter while it was read"
    return content
