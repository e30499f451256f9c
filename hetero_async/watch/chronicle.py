"""Keeps a node's history and shows it, in a thread of its own: the least important thing that a server does.

The server's loop hands over a status a second and what its observer is told, and never waits: what this thread has no
time for is dropped, what it dies of is told once, and the run goes on. `history.json` lies beside the log; like
refusals.json it is best effort, and written without fsync.
"""

import contextlib
import functools
import os
import resource
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio
from pydantic import ValidationError

from hetero_async.actors.supervisor import Child, RestartWindow, supervise
from hetero_async.core.records import Delta, Left, Stepped
from hetero_async.errors import ConfigError
from hetero_async.ports import Observer
from hetero_async.watch.history import History
from hetero_async.watch.looks import Looks, Status

NAME = "history.json"
LOOK_EVERY_SECONDS = 1.0
# What a crash costs of the history, at the least; longer where writing it would take more than a share of a processor.
WRITE_EVERY_SECONDS, WRITING_SHARE_MAX = 2.0, 0.002
# The history holds less than a MB; what is larger was not written by us.
FILE_BYTES_MAX = 16 * 1024 * 1024
# What was told since the last look, at the most: at more deltas a second than that, the rest is not counted.
TOLD_MAX = 20_000
# At the end the thread writes its file. It is not waited for any longer: it dies with the process.
FAREWELL_SECONDS = 2.0
# Rests between them keep it from ever coming to so many.
RESTARTS, RESTART_PERIOD_SECONDS, BACKOFF_SECONDS = 1000, 60.0, 5.0


@dataclass(frozen=True, slots=True)
class Told:
    """One line of what the observer was told."""

    name: str
    fields: Mapping[str, Any]
    seconds: float


# Shows the chronicle to readers until cancelled.
Web = Callable[["Chronicle"], Awaitable[None]]


class Chronicle:
    """Fulfils ports.Observer: passes everything on, and hands to its thread what a history needs."""

    def __init__(self, directory: Path, observer: Observer, web: Web | None) -> None:
        self.looks: Looks | None = None
        self.address = ""  # where it is shown, when it is
        self.looked = trio.Event()  # replaced at every look; of the thread's loop
        self.observer = observer
        self._path = directory / NAME
        self._disk_bytes = 0
        self._web = web
        self._told: deque[Told] = deque(maxlen=TOLD_MAX)
        self._newest: tuple[float, Status] | None = None  # handed over, and not taken yet
        self._thread: threading.Thread | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._handed = trio.Event()  # of the thread's loop, as `looked` is
        self._closed = trio.Event()
        self._is_closing = False
        self._complaint = ""

    # --- the server's side ---

    def event(self, name: str, **fields: object) -> None:
        self.observer.event(name, **fields)
        if name in _TAKEN:
            self._told.append(Told(name, fields, time.time()))

    def shown_in(self, status: Status) -> dict[str, Any]:
        """A status that says where the dashboard is, and what the node takes of its host."""
        memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {**status, "dashboard": self.address, "memory_bytes": memory, "disk_bytes": self._disk_bytes}

    async def follow(self, status: Callable[[], Status | None]) -> None:
        """Hand over a status a second, where there is one, until cancelled."""
        await supervise(
            {"dashboard": functools.partial(self._follow, status)},
            RestartWindow(RESTARTS, RESTART_PERIOD_SECONDS),
            backoff_seconds=BACKOFF_SECONDS,
            report=self.complain,
        )

    async def _follow(self, status: Callable[[], Status | None]) -> None:
        while True:
            if (present := status()) is not None:
                self.hand(present)
            await trio.sleep(LOOK_EVERY_SECONDS)

    def hand(self, status: Status) -> None:
        """Where the thread has not taken the one before yet, this one takes its place."""
        self._newest = time.time(), self.shown_in(status)
        if self._thread is None:
            self._thread = threading.Thread(target=trio.run, args=(self._run,), name="dashboard", daemon=True)
            self._thread.start()
        self._wake()

    def close(self) -> None:
        """Nothing is handed over any more."""
        self._is_closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join(FAREWELL_SECONDS)

    def _wake(self) -> None:
        if self._token is not None:
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._has_come, idempotent=True)

    def _has_come(self) -> None:
        self._handed.set()

    def complain(self, what: object) -> None:
        """Of what goes wrong in here; the same is told once."""
        if str(what) != self._complaint:
            self._complaint = str(what)
            self.observer.event("dashboard failing", reason=what)

    # --- the thread's ---

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        children: dict[str, Child] = {"history": self._keep}
        if self._web is not None:
            children["dashboard"] = functools.partial(self._web, self)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                functools.partial(
                    supervise,
                    children,
                    RestartWindow(RESTARTS, RESTART_PERIOD_SECONDS),
                    backoff_seconds=BACKOFF_SECONDS,
                    report=self.complain,
                )
            )
            await self._closed.wait()
            nursery.cancel_scope.cancel()

    async def _keep(self) -> None:
        write_at = 0.0
        while not self._is_closing:
            self._take()
            if trio.current_time() >= write_at:
                began = time.thread_time()  # on a busy machine a moment's work may last long, and cost no more
                self._disk_bytes = _size_of(self._path.parent)
                self._write()
                seconds = time.thread_time() - began
                write_at = trio.current_time() + max(WRITE_EVERY_SECONDS, seconds / WRITING_SHARE_MAX)
            with trio.move_on_after(WRITE_EVERY_SECONDS):
                await self._handed.wait()
            self._handed = trio.Event()
        self._take()
        self._write()
        self._closed.set()

    def _take(self) -> None:
        if self.looks is None:
            self.looks = Looks(self._load())
        for _ in range(len(self._told)):
            told = self._told.popleft()
            _TAKEN[told.name](self.looks, told)
        newest, self._newest = self._newest, None
        if newest is not None:
            self.looks.look(*newest)
            looked, self.looked = self.looked, trio.Event()
            looked.set()

    def _load(self) -> History:
        try:
            return load_history(self._path) or History()
        except ConfigError as error:
            self.observer.event("history begun anew", reason=error)
            return History()

    def _write(self) -> None:
        if self.looks is None or not self.looks.status:
            return
        temporary = self._path.with_name(f"{NAME}.new")
        try:
            temporary.write_bytes(self.looks.history.model_dump_json().encode())
            temporary.replace(self._path)
        except OSError as error:
            self.complain(f"{self._path}: not written: {error.strerror}")


def _size_of(node: Path) -> int:
    """Of its log and checkpoints. Others write and remove files there meanwhile."""
    size = 0
    for name in ("log", "checkpoints"):
        for path in (node / name).rglob("*"):
            with contextlib.suppress(OSError):
                size += path.stat().st_size
    return size


def _delta(looks: Looks, told: Told) -> None:
    record = told.fields["record"]
    assert isinstance(record, Delta)
    looks.delta(told.fields["lsn"], record.anchor_version)


def _stepped(looks: Looks, told: Told) -> None:
    record = told.fields["record"]
    assert isinstance(record, Stepped)
    looks.stepped(record)


def _left(looks: Looks, told: Told) -> None:
    record = told.fields["record"]
    assert isinstance(record, Left)
    looks.left(record.worker, record.reason)


_TAKEN: dict[str, Callable[[Looks, Told], None]] = {
    "delta": _delta,
    "stepped": _stepped,
    "left": _left,
    "log paused": lambda looks, told: looks.paused(told.seconds, str(told.fields["reason"])),
    "log resumed": lambda looks, told: looks.resumed(told.seconds),
}


@contextlib.contextmanager
def open_chronicle(directory: Path, observer: Observer, web: Web | None) -> Iterator[Chronicle]:
    chronicle = Chronicle(directory, observer, web)
    try:
        yield chronicle
    finally:
        chronicle.close()


def load_history(path: Path) -> History | None:
    """None where there is none. Raises ConfigError when it cannot be read."""
    try:
        with path.open("rb") as file:
            content = file.read(min(os.fstat(file.fileno()).st_size, FILE_BYTES_MAX))
        return History.model_validate_json(content)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: is not a history ({error.errors()[0]['msg']}); remove it") from None
