"""The log on disks that fill up, fail, or die with their server at any call."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from shell.small_log import SilentDisk, append, entries_of, open_log, read_by_owner, segments

from hetero_async.errors import EXIT_DISK_FAILED, DiskFull
from hetero_async.shell.disk import Disk, write_durably
from hetero_async.shell.segments import read_log

# --- failing disks ---


class FullDisk(SilentDisk):
    """Takes so many bytes: a last, short write first, then no space, as ext4 does."""

    def __init__(self) -> None:
        self.space_bytes = 1 << 40

    def write(self, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        if not self.space_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        first = memoryview(buffers[0])[: self.space_bytes]
        self.space_bytes -= len(first)
        return super().write(descriptor, [first], offset)

    def fallocate(self, descriptor: int, count: int) -> None:
        if not self.space_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().fallocate(descriptor, count)


@pytest.mark.parametrize("space_bytes", [0, 1, 60, 150, 250])
def test_a_full_disk_keeps_nothing_of_the_batch_and_goes_on_when_there_is_space(
    tmp_path: Path, space_bytes: int
) -> None:
    disk = FullDisk()
    log = open_log(tmp_path, disk)
    append(log, entries_of(1, 2))
    disk.space_bytes = space_bytes
    for _ in range(3):
        with pytest.raises(DiskFull, match=r"no space left to write .*\.log: free some"):
            append(log, entries_of(3, 5))
        disk.space_bytes = 0
        assert list(log.entries()) == list(read_log(tmp_path, "demo")) == entries_of(1, 2)
    disk.space_bytes = 1 << 40
    append(log, entries_of(3, 6))
    assert list(log.entries()) == entries_of(1, 6)
    log.close()
    log = open_log(tmp_path)
    assert (list(log.entries()), log.torn) == (entries_of(1, 6), "")
    log.close()


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("space_bytes", [0, 50, 120])
def test_a_disk_too_full_for_a_new_segment_is_a_pause_too(tmp_path: Path, space_bytes: int) -> None:
    disk = FullDisk()
    log = open_log(tmp_path, disk)
    append(log, entries_of(1, 3))
    disk.space_bytes = space_bytes
    for _ in range(2):
        with pytest.raises(DiskFull):
            append(log, entries_of(4, 4))
        disk.space_bytes = 0
    assert list(tmp_path.glob("*.new")) == []
    disk.space_bytes = 1 << 40
    append(log, entries_of(4, 4), entries_of(5, 5))
    assert list(log.entries()) == entries_of(1, 5)
    assert len(segments(tmp_path)) == 2
    log.close()


def test_a_full_disk_at_the_start_is_told_and_changes_nothing(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log, entries_of(1, 2))
    log.close()
    disk = FullDisk()
    disk.space_bytes = 20
    with pytest.raises(DiskFull):
        open_log(tmp_path, disk)
    assert read_by_owner(tmp_path) == entries_of(1, 2)


FAILING_SERVER = """
import errno, sys, trio
from pathlib import Path
from hetero_async.core.records import Entry, Left
from hetero_async.shell.disk import Disk
from hetero_async.shell.log import FileLog

call, number, code = sys.argv[2], int(sys.argv[3]), getattr(errno, sys.argv[4])

class FailingDisk(Disk):
    left = number
def failing(self, *arguments):
    self.left -= 1
    if self.left == 0:
        raise OSError(code, "injected")
    return getattr(Disk, call)(self, *arguments)
setattr(FailingDisk, call, failing)

log = FileLog.open(Path(sys.argv[1]), "demo", trio.to_thread.run_sync, FailingDisk())
for lsn in range(1, 4):
    trio.run(log.append, [Entry(lsn=lsn, term=1, record=Left(worker="w", reason="bye"))])
    print("acknowledged", lsn, flush=True)
"""


@pytest.mark.parametrize(
    ("call", "number", "code", "acknowledged"),
    [
        ("fdatasync", 2, "EIO", 1),
        ("fdatasync", 2, "ENOSPC", 1),  # after a failed sync nobody knows what is on the disk
        ("fsync", 2, "EIO", 0),
        ("write", 3, "EIO", 1),
        ("write", 3, "EROFS", 1),
        ("write", 3, "ENOMEM", 1),
        ("rename", 1, "EIO", 0),
    ],
)
def test_a_failing_disk_ends_the_process_without_an_acknowledgement(
    tmp_path: Path, call: str, number: int, code: str, acknowledged: int
) -> None:
    arguments = [sys.executable, "-c", FAILING_SERVER, str(tmp_path), call, str(number), code]
    server = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert server.returncode == EXIT_DISK_FAILED
    assert server.stdout.count("acknowledged") == acknowledged
    assert server.stderr.startswith("the disk failed: ") and server.stderr.count("\n") == 1
    log = open_log(tmp_path)
    assert acknowledged <= log.last_lsn <= acknowledged + 1
    log.close()


def test_a_failing_disk_ends_the_process_even_if_nothing_can_be_said(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", FAILING_SERVER, str(tmp_path), "fdatasync", "2", "EIO"]
    with open("/dev/full", "w") as full:
        server = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=full, timeout=60)
    assert (server.returncode, server.stdout) == (EXIT_DISK_FAILED, b"acknowledged 1\n")


# --- crashes ---


class Crash(BaseException):
    """The process is gone: nothing catches it."""


CALLS = ("write", "fdatasync", "fsync", "fallocate", "truncate", "rename", "unlink")


class CrashingDisk(SilentDisk):
    """Counts its calls, notes their names, and dies in the middle of the one it is told."""

    def __init__(self, crash_at: int = 0) -> None:
        self.crash_at = crash_at
        self.calls: list[str] = []


def crashing(name: str) -> Callable[..., object]:
    def call(self: CrashingDisk, *arguments: object) -> object:
        self.calls.append(name)
        if len(self.calls) == self.crash_at:
            if name == "write":
                descriptor, buffers, offset = arguments
                os.pwrite(descriptor, bytes(buffers[0])[: len(buffers[0]) // 2], offset)  # type: ignore
            raise Crash
        return getattr(SilentDisk, name)(self, *arguments)

    return call


for call_name in CALLS:
    setattr(CrashingDisk, call_name, crashing(call_name))


def live(directory: Path, disk: Disk, durable: list[int], dropped: list[int]) -> None:
    """One life of a server: recover, append up to record 12, drop once. Notes what it acknowledged."""
    log = open_log(directory, disk)
    try:
        while log.last_lsn < 12:
            append(log, entries_of(log.last_lsn + 1, log.last_lsn + 2))
            durable.append(log.last_lsn)
            if log.last_lsn > 7 and not dropped:
                dropped.append(4)
                log.drop_before(4)
    finally:
        log.close()


@pytest.mark.usefixtures("small_segments")
def test_a_crash_at_any_call_loses_nothing_acknowledged(tmp_path: Path) -> None:
    crashes = 0
    for crash_at in range(1, 1000):
        directory = tmp_path / str(crash_at)
        durable, dropped = [0], list[int]()
        try:
            live(directory, CrashingDisk(crash_at), durable, dropped)
        except Crash:
            crashes += 1
        else:
            break
        for again in range(1, 8):  # and once more in the recovery
            try:
                live(directory, CrashingDisk(again), durable, dropped)
            except Crash:
                continue
        held = list(read_log(directory, "demo"))
        first_lsn = held[0].lsn if held else 1
        assert first_lsn == 1 or (dropped and first_lsn <= 4)
        assert held == entries_of(first_lsn, first_lsn + len(held) - 1)
        assert first_lsn + len(held) - 1 >= durable[-1]
        live(directory, SilentDisk(), durable, dropped)
        assert list(read_log(directory, "demo"))[-1].lsn == 12
    assert crashes > 30


@pytest.mark.usefixtures("small_segments")
def test_the_disk_is_told_to_sync_in_the_right_places(tmp_path: Path) -> None:
    disk = CrashingDisk()
    log = open_log(tmp_path, disk)
    assert disk.calls == ["fsync", "fallocate", "write", "fsync", "rename", "fsync"]
    disk.calls.clear()
    append(log, entries_of(1, 3))
    assert disk.calls == ["write", "fdatasync"]
    disk.calls.clear()
    append(log, entries_of(4, 4))
    assert disk.calls == ["truncate", "fallocate", "write", "fsync", "rename", "fsync", "write", "fdatasync"]
    disk.calls.clear()
    log.drop_before(4)
    assert disk.calls == ["unlink", "fsync"]
    log.close()
    disk.calls.clear()
    write_durably(tmp_path / "file", b"content", disk)
    assert disk.calls == ["write", "fsync", "rename", "fsync"]


def test_the_last_segment_is_written_anew_at_every_start(tmp_path: Path) -> None:
    """After a failed fsync the page cache shows what the disk may not have."""
    log = open_log(tmp_path)
    append(log, entries_of(1, 2))
    log.close()
    (path,) = segments(tmp_path)
    before = path.stat().st_ino
    open_log(tmp_path).close()
    assert path.stat().st_ino != before
    assert list(read_log(tmp_path, "demo")) == entries_of(1, 2)


def test_a_file_is_written_durably_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_durably(path, b"old")
    disk = FullDisk()
    disk.space_bytes = 1
    with pytest.raises(DiskFull, match="no space left to write"):
        write_durably(path, b"new", disk)
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"
