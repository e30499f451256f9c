"""The log on a real disk: what was acknowledged is there after any restart, and damage is told, never read."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import trio
from shell.small_log import SilentDisk, append, entries_of, inline, open_log, read_by_owner, segments, three_segments

from hetero_async.core.records import Entry
from hetero_async.errors import ConfigError, LogCorrupt
from hetero_async.formats.segment import RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES
from hetero_async.shell.log import FileLog
from hetero_async.shell.segments import read_log

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
