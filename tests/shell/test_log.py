"""The log on a real disk: what was acknowledged is there after any crash, and damage is told, never read."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from hetero_async.core.records import Entry, Left
from hetero_async.errors import EXIT_DISK_FAILED, ConfigError, DiskFull, LogCorrupt
from hetero_async.formats.segment import RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES
from hetero_async.shell import log as log_module
from hetero_async.shell.disk import Disk, write_durably
from hetero_async.shell.log import FileLog, read_log

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


# --- the simplest use ---


def test_what_was_appended_is_read_after_a_restart(tmp_path: Path) -> None:
    log = FileLog.open(tmp_path / "log", "demo", trio.to_thread.run_sync)
    append(log, entries_of(1, 3), entries_of(4, 4, term=2))
    assert (log.first_lsn, log.last_lsn) == (1, 4)
    log.close()
    log = FileLog.open(tmp_path / "log", "demo", trio.to_thread.run_sync)
    assert (log.first_lsn, log.last_lsn, log.torn) == (1, 4, "")
    append(log, entries_of(5, 5, term=2))
    assert list(log.entries()) == entries_of(1, 3) + entries_of(4, 5, term=2)
    assert list(log.entries(after_lsn=3)) == entries_of(4, 5, term=2)
    assert list(log.entries(after_lsn=5)) == []
    log.close()


def test_a_new_log_is_empty(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    assert (list(log.entries()), log.first_lsn, log.last_lsn) == ([], 1, 0)
    log.close()
    assert list(read_log(tmp_path, None)) == []


@pytest.mark.parametrize(
    "wrong", [entries_of(5, 5), entries_of(7, 7), entries_of(6, 6, term=0), [*entries_of(6, 6), *entries_of(8, 8)], []]
)
def test_records_are_appended_in_order_or_not_at_all(tmp_path: Path, wrong: list[Entry]) -> None:
    log = open_log(tmp_path)
    append(log, entries_of(1, 5))
    with pytest.raises(AssertionError):
        append(log, wrong)
    append(log, entries_of(6, 6))
    assert list(log.entries()) == entries_of(1, 6)
    log.close()


# --- segments ---


@pytest.mark.usefixtures("small_segments")
def test_full_segments_are_followed_by_new_ones_and_keep_no_reserve(tmp_path: Path) -> None:
    entries = three_segments(tmp_path)
    assert list(read_log(tmp_path, "demo")) == entries
    first, second, last = (path.stat().st_size for path in segments(tmp_path))
    assert first == second < 512 == last


@pytest.mark.usefixtures("small_segments")
def test_a_record_larger_than_a_segment_gets_a_segment_of_its_size(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    batches = [entries_of(1, 1, 5000), entries_of(2, 2), entries_of(3, 3, 3_000_000), entries_of(4, 4)]
    append(log, *batches)
    log.close()
    log = open_log(tmp_path)
    assert list(log.entries()) == [entry for batch in batches for entry in batch]
    assert len(segments(tmp_path)) == 4
    log.close()


def test_more_records_than_one_write_takes_are_appended_at_once(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log, entries_of(1, 3000))
    assert list(log.entries()) == entries_of(1, 3000)
    log.close()


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize(("lsn", "first_lsn"), [(0, 1), (3, 1), (4, 4), (6, 4), (7, 7), (9, 7), (99, 7)])
def test_only_whole_segments_before_a_record_are_dropped(tmp_path: Path, lsn: int, first_lsn: int) -> None:
    entries = three_segments(tmp_path)
    log = open_log(tmp_path)
    log.drop_before(lsn)
    assert log.first_lsn == first_lsn
    assert list(log.entries(first_lsn - 1)) == entries[first_lsn - 1 :]
    assert list(read_log(tmp_path, "demo")) == entries[first_lsn - 1 :]
    if first_lsn > 1:
        with pytest.raises(LogCorrupt, match=f"begins at record {first_lsn}, record 1 is missing"):
            list(log.entries())
    log.close()


# --- damage ---


@pytest.mark.usefixtures("small_segments")
def test_the_last_record_cut_at_any_byte_is_cut_off_and_kept_aside(tmp_path: Path) -> None:
    log = open_log(tmp_path / "good")
    append(log, entries_of(1, 3))
    end = log._offset
    log.close()
    (good,) = segments(tmp_path / "good")
    record_bytes = (end - SEGMENT_HEADER_BYTES) // 3
    for cut in range(end - record_bytes + 1, end):
        directory = tmp_path / f"cut-{cut}"
        directory.mkdir()
        (directory / good.name).write_bytes(good.read_bytes()[:cut])
        assert list(read_log(directory, "demo")) == entries_of(1, 2)
        log = open_log(directory)
        assert log.last_lsn == 2
        assert "cut off" in log.torn and "record 3" in log.torn
        (aside,) = directory.glob("*.torn-3")
        assert aside.read_bytes() == good.read_bytes()[end - record_bytes : cut].rstrip(b"\0")
        append(log, entries_of(3, 4))
        log.close()
        log = open_log(directory)
        assert (list(log.entries()), log.torn) == (entries_of(1, 4), "")
        log.close()
        shutil.rmtree(directory)


@pytest.mark.usefixtures("small_segments")
def test_a_bit_flipped_anywhere_in_three_segments_never_becomes_an_entry(tmp_path: Path) -> None:
    entries = three_segments(tmp_path / "good")
    paths = segments(tmp_path / "good")
    directory = tmp_path / "damaged"
    verdicts = {"corrupt": 0, "torn": 0}
    for path in paths:
        good = path.read_bytes()
        for at in range(len(good)):
            shutil.copytree(tmp_path / "good", directory)
            (directory / path.name).write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1 :])
            verdict = recovered(directory, entries)
            assert verdict == "corrupt" or path == paths[-1], f"{path.name} byte {at}"
            verdicts[verdict] += 1
            shutil.rmtree(directory)
    reserve_bytes = 512 - paths[0].stat().st_size
    record_bytes = (512 - SEGMENT_HEADER_BYTES - reserve_bytes) // 3
    assert 0 < verdicts["torn"] <= record_bytes + reserve_bytes


def recovered(directory: Path, entries: list[Entry]) -> str:
    """How a damaged log is judged. Whatever it gives must be a beginning of what was written."""
    try:
        looked_on = list(read_log(directory, "demo"))
        log = open_log(directory)
    except LogCorrupt:
        return "corrupt"
    try:
        assert looked_on == list(log.entries())
        assert looked_on in (entries, entries[:-1])
        assert log.torn
    finally:
        log.close()
    return "torn"


def swap(paths: list[Path]) -> None:
    aside = paths[0].with_name("aside")
    paths[0].rename(aside)
    paths[1].rename(paths[0])
    aside.rename(paths[1])


DAMAGES: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "first missing": (lambda paths: paths[0].unlink(), "begins at record 4, record 1 is missing"),
    "middle missing": (lambda paths: paths[1].unlink(), "does not continue the segment before it"),
    "swapped": (swap, "begins at record 4, its name says otherwise"),
    "renamed": (lambda paths: paths[1].rename(paths[1].with_stem(f"{5:020d}")), "its name says otherwise"),
    "emptied": (lambda paths: paths[1].write_bytes(b""), "does not begin like a log segment"),
    "last emptied": (lambda paths: paths[2].write_bytes(b""), "does not begin like a log segment"),
    "zeroed": (lambda paths: paths[1].write_bytes(bytes(512)), "does not begin like a log segment"),
    "older cut": (lambda paths: os.truncate(paths[1], paths[1].stat().st_size - 8), "the file ends inside it"),
    "older loses its last record": (
        lambda paths: os.truncate(paths[1], SEGMENT_HEADER_BYTES + RECORD_HEADER_BYTES),
        "the file ends inside it",
    ),
}


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize(("damage", "what"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_missing_or_exchanged_segment_halts(
    tmp_path: Path, damage: Callable[[list[Path]], object], what: str
) -> None:
    three_segments(tmp_path)
    damage(segments(tmp_path))
    with pytest.raises(LogCorrupt, match=what):
        list(read_log(tmp_path, "demo", after_lsn=0))
    with pytest.raises(LogCorrupt, match=what):
        read_by_owner(tmp_path)


def read_by_owner(directory: Path) -> list[Entry]:
    log = open_log(directory)
    try:
        return list(log.entries())
    finally:
        log.close()


@pytest.mark.usefixtures("small_segments")
def test_a_segment_of_an_older_copy_of_the_run_is_noticed(tmp_path: Path) -> None:
    three_segments(tmp_path / "this")
    log = open_log(tmp_path / "other")
    append(log, *([entry] for entry in entries_of(1, 9, term=2)))
    log.close()
    shutil.copy(segments(tmp_path / "other")[1], segments(tmp_path / "this")[1])
    with pytest.raises(LogCorrupt, match="does not continue the segment before it"):
        read_by_owner(tmp_path / "this")


@pytest.mark.usefixtures("small_segments")
def test_a_log_that_ends_before_its_checkpoint_halts(tmp_path: Path) -> None:
    three_segments(tmp_path)
    segments(tmp_path)[-1].unlink()
    log = open_log(tmp_path)
    assert list(log.entries(after_lsn=6)) == []
    with pytest.raises(LogCorrupt, match="the log ends at 6"):
        list(log.entries(after_lsn=8))
    log.close()


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_segment_of_another_run_is_named(tmp_path: Path, number: int) -> None:
    three_segments(tmp_path / "demo")
    path = segments(tmp_path / "demo")[number]
    FileLog.open(tmp_path / "other", "other", inline).close()
    shutil.copy(segments(tmp_path / "other")[0], path)
    with pytest.raises(ConfigError, match='belongs to run "other", not "demo"'):
        open_log(tmp_path / "demo")
    with pytest.raises(ConfigError, match='belongs to run "other", not "demo"'):
        list(read_log(tmp_path / "demo", "demo"))


# --- who may open ---


def test_a_second_server_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    with pytest.raises(ConfigError, match=f"{tmp_path} is in use by another server"):
        open_log(tmp_path)
    log.close()
    open_log(tmp_path).close()


def test_a_log_that_cannot_be_opened_is_not_left_locked(tmp_path: Path) -> None:
    open_log(tmp_path).close()
    with pytest.raises(ConfigError, match="belongs to run"):
        FileLog.open(tmp_path, "other", inline)
    open_log(tmp_path).close()


def test_a_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/log: no log can be kept here: Not a directory"):
        open_log(tmp_path / "file" / "log")
    with pytest.raises(ConfigError, match="there is no log here"):
        list(read_log(tmp_path / "nowhere", None))


class ReadInTheMiddle(SilentDisk):
    """Looks on through `read_log` when half of each write has been done."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.seen: list[list[Entry]] = []

    def write(self, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        half = memoryview(buffers[0])[: len(buffers[0]) // 2 + 1]
        written = super().write(descriptor, [half], offset)
        self.seen.append(list(read_log(self.directory, "demo")))
        return written


@pytest.mark.usefixtures("small_segments")
def test_a_reader_sees_whole_records_while_a_server_writes(tmp_path: Path) -> None:
    disk = ReadInTheMiddle(tmp_path)
    log = open_log(tmp_path, disk)
    entries = entries_of(1, 9)
    append(log, *([entry] for entry in entries))
    log.close()
    assert all(seen == entries[: len(seen)] for seen in disk.seen)
    assert {len(seen) for seen in disk.seen} >= set(range(9))


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
        ("fsync", 1, "EIO", 0),
        ("write", 3, "EIO", 1),
        ("write", 3, "EROFS", 1),
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
    assert disk.calls == ["fallocate", "write", "fsync", "rename", "fsync"]
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
