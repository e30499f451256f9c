"""The log as standbys need it: read on in pieces, cut where it leaves the run's, begun anew behind a checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest
from shell.small_log import append, entries_of, open_log, segments, three_segments
from shell.test_log_faults import Crash, CrashingDisk

from hetero_async.core.records import Entry
from hetero_async.errors import LogCorrupt
from hetero_async.formats.segment import FIRST_CHAIN, Scanner, pack
from hetero_async.shell import log as log_module
from hetero_async.shell.log import FileLog
from hetero_async.shell.segments import read_linked, read_log

ALL = 1 << 30


def chains_of(entries: list[Entry], chain: bytes = FIRST_CHAIN) -> list[bytes]:
    """Before each of them, and after the last."""
    chains = [chain]
    for entry in entries:
        chains.append(pack(entry, chains[-1])[1])
    return chains


# --- reading on ---


@pytest.fixture(params=["memory", "disk", "both"])
def nine(request: pytest.FixtureRequest, tmp_path: Path, small_segments: None) -> FileLog:
    """Nine records in three segments: remembered since they were written, not at all, or the last two."""
    three_segments(tmp_path / "source")
    if request.param == "memory":
        log = open_log(tmp_path / "log")
        append(log, *([entry] for entry in entries_of(1, 9)))
        return log
    if request.param == "disk":
        return open_log(tmp_path / "source")
    log = open_log(tmp_path / "source")
    log.cut(7)
    append(log, entries_of(8, 9))
    return log


@pytest.mark.parametrize("after_lsn", range(10))
def test_records_are_read_on_with_the_chain_that_they_continue(nine: FileLog, after_lsn: int) -> None:
    chain = chains_of(entries_of(1, 9))[after_lsn]
    assert nine.read(after_lsn, ALL) == (chain, entries_of(after_lsn + 1, 9))
    first = entries_of(after_lsn + 1, 9)[:1]
    assert nine.read(after_lsn, 1) == (chain, first), "one at least, however large"


def test_there_is_nothing_beyond_the_end(nine: FileLog) -> None:
    assert nine.read(9, ALL) == (chains_of(entries_of(1, 9))[9], [])
    assert nine.read(10, ALL) is None


def test_no_more_is_read_at_once_than_was_asked_for(nine: FileLog, monkeypatch: pytest.MonkeyPatch) -> None:
    payload_and_header = 20 + log_module.RECORD_HEADER_BYTES
    read = nine.read(2, 2 * payload_and_header)
    assert read is not None and read[1] == entries_of(3, 4)
    monkeypatch.setattr(log_module, "ENTRIES_MAX", 3)
    read = nine.read(2, ALL)
    assert read is not None and read[1] == entries_of(3, 5)


@pytest.mark.usefixtures("small_segments")
def test_what_was_dropped_is_not_to_be_had(tmp_path: Path) -> None:
    three_segments(tmp_path)
    log = open_log(tmp_path)
    log.drop_before(5)
    assert log.read(2, ALL) is None
    assert log.read(3, ALL) == (chains_of(entries_of(1, 3))[3], entries_of(4, 9))


@pytest.mark.usefixtures("small_segments")
def test_what_is_dropped_while_it_is_looked_for_is_not_to_be_had_either(tmp_path: Path) -> None:
    class Hasty(FileLog):
        """Drops between two looks, once, as the checkpointer may."""

        drops_before = 0

        @property
        def first_lsn(self) -> int:
            first_lsn = super().first_lsn
            lsn, self.drops_before = self.drops_before, 0
            if lsn:
                self.drop_before(lsn)
            return first_lsn

    three_segments(tmp_path)
    open_log(tmp_path).close()
    log = Hasty.open(tmp_path, "demo", lambda *_: None)  # type: ignore[arg-type, return-value]
    log.drops_before = 7
    assert log.read(1, ALL) is None


@pytest.mark.usefixtures("small_segments")
def test_damage_is_told_and_not_taken_for_dropped(tmp_path: Path) -> None:
    three_segments(tmp_path)
    log = open_log(tmp_path)
    damaged = segments(tmp_path)[1]
    damaged.write_bytes(damaged.read_bytes()[:-3] + b"xyz")
    with pytest.raises(LogCorrupt, match="record 6"):
        log.read(3, ALL)


def test_only_the_newest_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "RECENT_BYTES", 500)
    log = open_log(tmp_path)
    append(log, entries_of(1, 9))
    assert 1 < len(log._recent) < 9
    assert log.read(0, ALL) == (FIRST_CHAIN, entries_of(1, 9))
    append(log, entries_of(10, 10, payload_bytes=1000))
    assert [entry.lsn for _, entry in log._recent] == [10], "one larger than all of it is remembered all the same"


@pytest.mark.usefixtures("small_segments")
def test_every_record_comes_with_the_chain_before_it(tmp_path: Path) -> None:
    entries = three_segments(tmp_path)
    linked = list(zip(chains_of(entries)[:-1], entries, strict=True))
    assert list(read_linked(tmp_path, "demo")) == linked
    for after_lsn in range(9):
        assert list(read_linked(tmp_path, None, after_lsn)) == linked[after_lsn:]


# --- cutting ---


def bytes_aside(directory: Path) -> bytes:
    """All that lies beside the log, in the order of its records."""
    paths = sorted(directory.glob("*.cut*"), key=lambda path: (path.name.split(".")[0], path.name))
    return b"".join(path.read_bytes() for path in paths)


def payloads(first: int, last: int) -> list[bytes]:
    return [entry.payload for entry in entries_of(first, last)]


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("lsn", range(10))
def test_a_log_is_cut_after_any_record_and_goes_on_from_there(tmp_path: Path, lsn: int) -> None:
    entries = three_segments(tmp_path)
    log = open_log(tmp_path)
    aside = log.cut(lsn)
    assert (log.last_lsn, log.chain) == (lsn, chains_of(entries)[lsn])
    assert list(log.entries()) == list(read_log(tmp_path, "demo")) == entries[:lsn]
    assert log.read(lsn, ALL) == (log.chain, [])
    assert sorted(aside) == sorted(tmp_path.glob("*.cut*"))
    kept_aside = bytes_aside(tmp_path)
    assert all(payload in kept_aside for payload in payloads(lsn + 1, 9)), "nothing is thrown away"
    others = entries_of(lsn + 1, lsn + 5, payload_bytes=33, term=2)
    append(log, others)
    log.close()
    log = open_log(tmp_path)
    assert (list(log.entries()), log.torn) == ([*entries[:lsn], *others], "")
    log.close()


@pytest.mark.usefixtures("small_segments")
def test_what_was_cut_is_not_remembered_either(tmp_path: Path) -> None:
    log = open_log(tmp_path)
    append(log, entries_of(1, 9))
    log.cut(5)
    others = entries_of(6, 8, payload_bytes=33, term=2)
    append(log, others)
    assert log.read(3, ALL) == (chains_of(entries_of(1, 9))[3], [*entries_of(4, 5), *others])


@pytest.mark.usefixtures("small_segments")
def test_a_torn_record_beyond_the_cut_is_no_obstacle(tmp_path: Path) -> None:
    entries = three_segments(tmp_path)
    log = open_log(tmp_path)
    last = segments(tmp_path)[-1]
    with last.open("r+b") as file:
        scanner = Scanner(file, name="", is_last=True)
        ends = [scanner.offset for _ in scanner]
        file.seek(ends[1] + 50)
        file.write(b"torn")
    assert log.cut(7)
    assert list(log.entries()) == entries[:7]
    log.close()


@pytest.mark.usefixtures("small_segments")
@pytest.mark.parametrize("lsn", range(9))
def test_a_cut_that_crashed_is_done_again_and_comes_to_the_same(tmp_path: Path, lsn: int) -> None:
    entries = entries_of(1, 9)

    def prepared(directory: Path) -> None:
        three_segments(directory)

    def cut(log: FileLog) -> None:
        log.cut(lsn)

    for directory in crashed_everywhere(tmp_path, prepared, cut):
        log = open_log(directory)
        assert log.last_lsn >= lsn, "what both have is never lost"
        assert list(log.entries()) == entries[: log.last_lsn]
        log.cut(lsn)
        assert (log.last_lsn, log.chain) == (lsn, chains_of(entries)[lsn])
        assert list(log.entries()) == entries[:lsn]
        kept_aside = bytes_aside(directory)
        assert all(payload in kept_aside for payload in payloads(lsn + 1, 9))
        log.close()


def crashed_everywhere(
    tmp_path: Path, prepared: Callable[[Path], None], change: Callable[[FileLog], None]
) -> list[Path]:
    """Directories after a crash at each of the disk calls that the change makes."""
    crashed: list[Path] = []
    for crash_at in range(1, 1000):
        directory = tmp_path / f"crash-{crash_at}"
        prepared(directory)
        disk = CrashingDisk()
        log = open_log(directory, disk)
        disk.calls.clear()
        disk.crash_at = crash_at
        try:
            change(log)
        except Crash:
            crashed.append(directory)
        else:
            break
        finally:
            log.close()
    assert len(crashed) > 4
    return crashed


# --- beginning anew ---

BEHIND, CHAIN = 40, b"c" * 16


@pytest.mark.usefixtures("small_segments")
def test_a_log_that_was_begun_anew_continues_the_checkpoint(tmp_path: Path) -> None:
    three_segments(tmp_path)
    log = open_log(tmp_path)
    log.reset(BEHIND, 3, CHAIN)
    assert (log.first_lsn, log.last_lsn, log.last_term, log.chain) == (BEHIND + 1, BEHIND, 3, CHAIN)
    assert log.read(BEHIND, ALL) == (CHAIN, [])
    assert log.read(8, ALL) is None
    append(log, entries_of(BEHIND + 1, BEHIND + 4, term=3))
    log.close()
    log = open_log(tmp_path)
    assert list(log.entries(BEHIND)) == entries_of(BEHIND + 1, BEHIND + 4, term=3)
    assert next(read_linked(tmp_path, "demo"))[0] == CHAIN
    log.close()


@pytest.mark.usefixtures("small_segments")
def test_beginning_anew_that_crashed_is_done_again_and_comes_to_the_same(tmp_path: Path) -> None:
    def prepared(directory: Path) -> None:
        three_segments(directory)

    def begin_anew(log: FileLog) -> None:
        log.reset(BEHIND, 3, CHAIN)

    for directory in crashed_everywhere(tmp_path, prepared, begin_anew):
        log = open_log(directory)
        assert log.last_lsn in (0, 9, BEHIND)
        if log.last_lsn != BEHIND:  # as a node does that finds a checkpoint beyond its log
            log.reset(BEHIND, 3, CHAIN)
        append(log, entries_of(BEHIND + 1, BEHIND + 1, term=3))
        assert list(log.entries(BEHIND)) == entries_of(BEHIND + 1, BEHIND + 1, term=3)
        log.close()
