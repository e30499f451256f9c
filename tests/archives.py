"""Servers' directories with real logs and checkpoints of a small run, and what takes them to an archive."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trio
from shell.small_log import SilentDisk, inline
from small_run import SmallRun

from hetero_async.archiving import Archiving
from hetero_async.core.records import Entry
from hetero_async.core.state import State
from hetero_async.formats.segment import FIRST_CHAIN, pack
from hetero_async.ports import Archive, Checkpoint
from hetero_async.shell.holdings import DirectoryHoldings
from hetero_async.shell.log import FileLog
from hetero_async.shell.store import CheckpointStore
from hetero_async.tensors.model import ServerModel

RUN = "small"
SEGMENT_BYTES = 1500
PATIENCE_SECONDS = 60.0


def small_run(pushes: int = 8) -> SmallRun:
    run = SmallRun()
    run.join("a-0")
    for _ in range(pushes):
        run.push("a-0")
    return run


def checkpoint_of(entries: Sequence[Entry]) -> Checkpoint:
    """What a server with exactly these records would save."""
    state, model = replayed(entries)
    chain = FIRST_CHAIN
    for entry in entries:
        _, chain = pack(entry, chain)
    return Checkpoint(
        run=RUN,
        lsn=state.lsn,
        term=state.term,
        chain=chain,
        state=state.dump(),
        state_hash=state.digest(),
        model=model.snapshot(),
    )


def replayed(entries: Sequence[Entry]) -> tuple[State, ServerModel]:
    state, model = State(), ServerModel()
    for entry in entries:
        state.fold(entry)
        model.apply(entry)
    return state, model


class Told:
    """Fulfils ports.Observer."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def event(self, name: str, **fields: object) -> None:
        self.events.append((name, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


class Node:
    """One server's directory. `segment_bytes` decides where its log is cut."""

    def __init__(self, directory: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self.directory = directory
        self.segment_bytes = segment_bytes
        self.holdings = DirectoryHoldings(directory / "log", directory / "checkpoints")
        self.told = Told()

    def append(self, entries: Sequence[Entry]) -> None:
        log = FileLog.open(self.directory / "log", RUN, inline, SilentDisk(), self.segment_bytes)
        for entry in entries:
            trio.run(log.append, [entry])
        log.close()

    def save(self, entries: Sequence[Entry]) -> None:
        store = CheckpointStore(self.directory / "checkpoints", RUN, inline, SilentDisk())
        trio.run(store.save, checkpoint_of(entries))

    def segments(self) -> list[int]:
        """The first record of each."""
        return [int(path.stem) for path in sorted((self.directory / "log").glob("*.log"))]

    def archiving(self, archive: Archive, **changes: Any) -> Archiving:
        """Inside trio only."""
        options: dict[str, Any] = {
            "run": RUN,
            "archive": archive,
            "holdings": self.holdings,
            "blocking": inline,
            "network": inline,
            "observer": self.told,
            "retry_seconds_max": 0.02,
        }
        return Archiving(**{**options, **changes})

    def archive_all(self, archive: Archive) -> None:
        """What a server does that is told to stop."""

        async def finish() -> None:
            with trio.fail_after(PATIENCE_SECONDS):
                archiving = self.archiving(archive)
                await archiving.finish()
                assert not archiving.alarm

        trio.run(finish)


def node_of(run: SmallRun, directory: Path) -> Node:
    """Several closed segments, an open one, and two checkpoints."""
    node = Node(directory)
    node.append(run.entries)
    for records in (10, 20):
        node.save(run.entries[:records])
    assert len(node.segments()) > 3
    return node
