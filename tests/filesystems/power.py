"""A short life of log, checkpoints and outbox on a file system that loses its power in it, and what must be left."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import pytest
import trio
import xxhash
from filesystems.volumes import JOURNAL_ONLY, NOTHING_MORE, Volume
from shell.small_log import entries_of, inline

from hetero_async.core.messages import Push
from hetero_async.core.records import Entry
from hetero_async.errors import DiskFull
from hetero_async.ports import Checkpoint, ModelSnapshot
from hetero_async.shell.disk import Disk, sync_directory
from hetero_async.shell.log import FileLog
from hetero_async.shell.outbox import FileOutbox
from hetero_async.shell.store import CheckpointStore

RUN = "demo"
ROUNDS = 5
CALLS = ("write", "fdatasync", "fsync", "fallocate", "truncate", "rename", "unlink")
# Three small records fill a segment. All of it lies in the block that its header has allocated already: an append
# changes nothing of the file's description then, and makes durable nothing but itself.
SEGMENT_BYTES = 512
LARGE_BYTES = 9000  # several blocks; not what comes right after a new segment


class PowerCut(BaseException):
    """Everything stops here: nothing of the code under test may catch it."""


class CutDisk(Disk):
    """The real calls; before the `at`-th of them the power goes."""

    def __init__(self, volume: Volume, at: int, leaving: int) -> None:
        self.volume = volume
        self.at = at
        self.leaving = leaving
        self.made: list[str] = []


def _counted(name: str) -> Callable[..., Any]:
    def call(self: CutDisk, *arguments: Any) -> Any:
        self.made.append(name)
        if len(self.made) == self.at:
            self.volume.cut_power(self.leaving)
            raise PowerCut
        return getattr(Disk, name)(self, *arguments)

    return call


for _name in CALLS:
    setattr(CutDisk, _name, _counted(_name))


@dataclass
class Told:
    """What somebody was promised before the power went."""

    lsn: int = 0
    checkpoint: int = 0
    unanswered: set[int] = field(default_factory=set)


def live(directory: Path, disk: Disk, told: Told) -> None:
    """A worker and a server in one: keep the delta, write it down, acknowledge, drop it, now and then a checkpoint."""
    log = FileLog.open(directory / "log", RUN, inline, disk, SEGMENT_BYTES)
    try:
        store = CheckpointStore(directory / "checkpoints", RUN, inline, disk)
        outbox = FileOutbox(directory / "outbox", disk)
        for number in range(1, ROUNDS + 1):
            outbox.save(push(number), payload_of(number))
            told.unanswered.add(number)
            trio.run(log.append, entries(log.last_lsn + 1, log.last_lsn + 1 + number % 2))
            told.lsn = log.last_lsn
            told.unanswered.remove(number)
            outbox.drop(number, is_acknowledged=True)
            if number % 2:
                covered = trio.run(store.save, checkpoint_at(log.last_lsn))
                told.checkpoint = log.last_lsn
                log.drop_before(covered + 1)
    finally:
        log.close()


def judge(directory: Path, told: Told) -> None:
    """Everything that was promised is there, and nothing else than what was written."""
    store = CheckpointStore(directory / "checkpoints", RUN, inline)
    newest = store.load_newest()
    assert not store.warnings, f"a checkpoint is damaged: {store.warnings}"
    assert (newest.lsn if newest else 0) >= told.checkpoint, f"checkpoint {told.checkpoint} is lost"
    log = FileLog.open(directory / "log", RUN, inline, segment_bytes=SEGMENT_BYTES)
    try:
        assert log.last_lsn >= told.lsn, f"record {told.lsn} is lost: {log.last_lsn} is the last"
        for lsn in store.lsns()[-2:] or [0]:
            assert lsn == 0 or store.load(lsn).lsn == lsn
            assert list(log.entries(lsn)) == entries(lsn + 1, log.last_lsn), f"the log from {lsn} on is another one"
    finally:
        log.close()
    outbox = FileOutbox(directory / "outbox").load()
    assert told.unanswered <= outbox.keys(), f"of the outbox {told.unanswered - outbox.keys()} is lost"
    assert all(payload == payload_of(seq) for seq, (_, payload) in outbox.items())


def sweep(volume: Volume, leaving: int = NOTHING_MORE) -> list[str]:
    """A life for each of its disk calls, the power gone before it; then one to the end. Returns the calls of that."""
    at = 0
    while True:
        at += 1
        directory = volume.path / str(at)
        directory.mkdir()
        sync_directory(volume.path)
        told, disk = Told(), CutDisk(volume, at, leaving)
        try:
            live(directory, disk, told)
        except PowerCut:
            is_last = False
            close_all_below(volume.path)
        else:
            is_last = True
            volume.cut_power(leaving)
        volume.power_on()
        try:
            judge(directory, told)
        except Exception as error:
            error.add_note(f"power cut before call {at}: {disk.made[-1]}; promised: {told}")
            raise
        if is_last:
            return disk.made


def close_all_below(path: Path) -> None:
    """What the end of a process does, and an exception does not."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the listing's own is gone
            if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(path):
                os.close(descriptor)


def entries(first: int, last: int) -> list[Entry]:
    return [entry for lsn in range(first, last + 1) for entry in entries_of(lsn, lsn, bytes_of(lsn))]


def bytes_of(lsn: int) -> int:
    return LARGE_BYTES if lsn % 6 == 2 else 20


def checkpoint_at(lsn: int) -> Checkpoint:
    arrays = {"parameters": numpy.arange(2000, dtype=numpy.float32) * lsn}
    model = ModelSnapshot(arrays=arrays, model_hash=bytes(16))
    return Checkpoint(run=RUN, lsn=lsn, term=1, chain=bytes(16), state={"lsn": lsn}, state_hash=bytes(16), model=model)


def payload_of(seq: int) -> bytes:
    return bytes([seq]) * 3000


def push(seq: int) -> Push:
    payload = payload_of(seq)
    return Push(
        incarnation=1,
        seq=seq,
        anchor=0,
        anchor_term=1,
        steps=1,
        ranges=((0, 8),),
        codec="int8",
        payload_bytes=len(payload),
        payload_hash=xxhash.xxh3_128_digest(payload),
    )


class UnsyncedDisk(Disk):
    """The process ends before anything of it is synced."""

    def fdatasync(self, descriptor: int) -> None:
        raise PowerCut


def restart(volume: Volume) -> None:
    """A start that reads from the page cache what the disk has never got; then the power goes."""
    append_to(volume, Disk(), 1, 1)
    with pytest.raises(PowerCut):
        append_to(volume, UnsyncedDisk(), 2, 2)
    close_all_below(volume.path)
    assert kept(volume) == entries(1, 2), "read from memory: the disk has never got it"
    volume.cut_power()
    volume.power_on()
    assert kept(volume) == entries(1, 2), "a record is lost that a start has read"


def fill_up(volume: Volume) -> None:
    """No space for a record, larger than what a segment has reserved; then there is some, and the next ones come."""
    log = opened(volume, Disk())
    try:
        volume.fill()
        with contextlib.suppress(DiskFull):
            trio.run(log.append, entries_of(1, 1, LARGE_BYTES))
        volume.free()
        trio.run(log.append, entries_of(log.last_lsn + 1, 3))
    finally:
        close_all_below(volume.path)
    assert kept(volume) == entries_of(1, 3), "a record is lost for which there was no space"


def refuse(volume: Volume) -> None:
    """The file system turns read-only, at which the process must end."""
    append_to(volume, Disk(), 1, 1)
    log = opened(volume, Disk())
    volume.find_error()
    try:
        trio.run(log.append, entries_of(2, 2))
    finally:
        close_all_below(volume.path)
    volume.power_on()
    assert kept(volume) == [*entries(1, 1), *entries_of(2, 2)], "a record is lost that a read-only disk refused"


def opened(volume: Volume, disk: Disk) -> FileLog:
    return FileLog.open(volume.path / "log", RUN, inline, disk, SEGMENT_BYTES)


def append_to(volume: Volume, disk: Disk, first: int, last: int) -> None:
    log = opened(volume, disk)
    try:
        trio.run(log.append, entries(first, last))
    finally:
        log.close()


def kept(volume: Volume) -> list[Entry]:
    log = opened(volume, Disk())
    try:
        return list(log.entries())
    finally:
        log.close()


def sweep_both_ways(kind: str, directory: Path) -> None:
    for leaving in (NOTHING_MORE, JOURNAL_ONLY):
        with Volume(kind, directory / str(leaving)) as volume:
            sweep(volume, leaving)


def first_broken(kind: str, directory: Path, name: str) -> str:
    """What breaks in the life of that name; "" when nothing does."""
    try:
        if name == "sweep":
            sweep_both_ways(kind, directory)
        else:
            with Volume(kind, directory, "errors=remount-ro" if name == "refuse" else "") as volume:
                {"restart": restart, "fill up": fill_up, "refuse": refuse}[name](volume)
    except Exception as error:
        return f"{type(error).__name__}: {error} ({'; '.join(getattr(error, '__notes__', []))})"
    return ""
