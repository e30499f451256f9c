"""The best publish's parameters, kept on this node's disk: exactly those that were measured.

What is measured is written down when it is handed out, beside all else; it stays when it turns out to be the best, and
goes when it does not. So there are two files at most. A checkpoint waits until what was handed out before it is on
disk: a recovery finds it there, or makes it anew from the log.
"""

from collections.abc import Collection
from typing import Protocol

import trio

from hetero_async.core.records import Entry, Evaluated, Evaluation
from hetero_async.core.state import Kept, State
from hetero_async.errors import DiskFull
from hetero_async.ports import Blocking, Model, Observer, PublishedModel

DISK_FULL_RETRY_SECONDS = 1.0
# Of the record with which it was handed out: term and lsn.
Name = tuple[int, int]


class BestFiles(Protocol):
    """Parameters under their names, on disk."""

    def held(self) -> Collection[Name]: ...

    def save(self, name: Name, content: bytes) -> None:
        """Durable on return, whole or not there at all. Raises DiskFull."""

    def drop(self, name: Name) -> None: ...


class BestKeeper:
    def __init__(self, files: BestFiles, blocking: Blocking, observer: Observer) -> None:
        self.is_busy = False  # something is not on disk yet that should be, or still there
        self._files = files
        self._blocking = blocking
        self._observer = observer
        self._captured: dict[Name, PublishedModel] = {}
        self._newest: Name = (0, 0)
        self._best: Name = (0, 0)
        self._wanted: dict[Name, Kept] = {}
        self._held = dict.fromkeys(files.held(), True)
        self._changed = trio.Event()

    def seen(self, entry: Entry, model: Model) -> None:
        """That record was applied just now, by the server, a standby or a recovery. In the thread that applies."""
        match entry.record:
            case Evaluation():
                self._newest = (entry.term, entry.lsn)
                if self._newest not in self._held:
                    self._captured[self._newest] = model.published()
            case Evaluated(name=name) if name:
                self._best = self._newest
            case _:
                return
        self._captured = {
            name: captured for name, captured in self._captured.items() if name in (self._newest, self._best)
        }  # all that a recovery may have to hold at once

    def settle(self, state: State) -> None:
        """After each batch of records; in the loop's thread."""
        wanted = {(kept.term, kept.lsn): kept for kept in (state.evaluation, state.best) if kept is not None}
        self._captured = {
            name: captured for name, captured in self._captured.items() if name in wanted and name not in self._held
        }
        if wanted == self._wanted:
            return
        self._wanted = wanted
        self.is_busy = bool(self._missing() or self._superfluous())
        self._changed.set()

    def _missing(self) -> list[Name]:
        return [name for name in self._wanted if name in self._captured and name not in self._held]

    def _superfluous(self) -> list[Name]:
        return [name for name in self._held if name not in self._wanted]

    async def run(self) -> None:
        """Must run."""
        while True:
            await self._changed.wait()
            self._changed = trio.Event()
            while missing := self._missing():
                await self._save(missing[0])
            for name in self._superfluous():
                await self._blocking(self._files.drop, name)
                del self._held[name]
            self.is_busy = False

    async def _save(self, name: Name) -> None:
        kept = self._wanted[name]
        about = {"publish": str(kept.publish), "version": str(kept.version)}
        try:
            content = await self._blocking(self._captured[name].packed, about)
            await self._blocking(self._files.save, name, content)
            self._held[name] = True
        except DiskFull as error:
            self._observer.event("best not kept", publish=kept.publish, reason=str(error))
            await trio.sleep(DISK_FULL_RETRY_SECONDS)
