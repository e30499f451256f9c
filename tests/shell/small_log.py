"""Logs small enough to be damaged at every byte, on disks that do not make a test wait."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from hetero_async.core.records import Entry, Left
from hetero_async.shell import log as log_module
from hetero_async.shell.disk import Disk
from hetero_async.shell.log import FileLog

T = TypeVar("T")


async def inline(function: Callable[..., T], *arguments: object) -> T:
    return function(*arguments)


def entries_of(first: int, last: int, payload_bytes: int = 20, term: int = 1) -> list[Entry]:
    return [
        Entry(
            lsn=lsn, term=term, record=Left(worker=f"w{lsn}", reason="bye"), payload=bytes([lsn % 251]) * payload_bytes
        )
        for lsn in range(first, last + 1)
    ]


class SilentDisk(Disk):
    """Without the waits of a real disk, for tests that open a log thousands of times."""

    def fsync(self, descriptor: int) -> None:
        pass

    def fdatasync(self, descriptor: int) -> None:
        pass

    def fallocate(self, descriptor: int, count: int) -> None:
        os.ftruncate(descriptor, count)


def open_log(directory: Path, disk: Disk | None = None) -> FileLog:
    return FileLog.open(directory, "demo", inline, disk or SilentDisk())


def append(log: FileLog, *batches: Sequence[Entry]) -> None:
    for batch in batches:
        trio.run(log.append, batch)


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.log"))


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "SEGMENT_BYTES", 512)


def three_segments(directory: Path) -> list[Entry]:
    """Nine records, three in each segment of 512 bytes."""
    entries = entries_of(1, 9)
    log = open_log(directory)
    append(log, *([entry] for entry in entries))
    log.close()
    assert [path.stem.lstrip("0") for path in segments(directory)] == ["1", "4", "7"]
    return entries


def read_by_owner(directory: Path) -> list[Entry]:
    log = open_log(directory)
    try:
        return list(log.entries())
    finally:
        log.close()
