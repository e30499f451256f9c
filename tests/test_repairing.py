"""A damaged log gets back exactly the records that it lost, and comes to the same state, to the bit."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

import pytest
from archives import RUN, SEGMENT_BYTES, Node, replayed, small_run
from shell.place import free_ports
from shell.small_log import SilentDisk, inline
from shell.test_log_faults import CALLS, Crash, CrashingDisk, crashing
from small_run import SmallRun

from hetero_async import roster
from hetero_async.config import RunConfig
from hetero_async.errors import EXIT_CORRUPT, ConfigError, LogCorrupt, UserError
from hetero_async.formats.segment import SEGMENT_HEADER_BYTES, Scanner
from hetero_async.repairing import REPAIRING, Repaired, repair_node
from hetero_async.replay import recover
from hetero_async.shell.archive import open_archive
from hetero_async.shell.disk import DISK, Disk
from hetero_async.shell.log import FileLog
from hetero_async.shell.segments import read_log
from hetero_async.shell.store import CheckpointStore
from hetero_async.tables import template
from hetero_async.tensors.model import ServerModel

WAIT_SECONDS = 60


@pytest.fixture(scope="module")
def run() -> SmallRun:
    return small_run()


@pytest.fixture
def config(tmp_path: Path, run: SmallRun) -> RunConfig:
    """A server and its standby b, both with all of the run, in segments of their own; and an archive."""
    addresses = [f"tcp://127.0.0.1:{port}" for port in free_ports(4)]
    standby = {"site": "there", "address": addresses[0], "bulk_address": addresses[1], "directory": "b"}
    server = {"address": addresses[2], "bulk_address": addresses[3]}
    text = template(run={"name": RUN, "samples": 64}, sites={}, server=server, standbys={"b": standby})
    config = roster.initialize(tmp_path / "run", text)
    node = Node(config.directory)
    node.append(run.entries)
    node.archive_all(open_archive(str(tmp_path / "archive"), Path()))
    Node(config.node("b").directory, segment_bytes=2200).append(run.entries)
    return config


def repair(config: RunConfig, source: object, name: str = "server", disk: Disk = DISK) -> Repaired:
    return repair_node(config, name, str(source), lambda _: None, disk)


def archive_of(config: RunConfig) -> Path:
    return config.path.parent.parent / "archive"


def segments(log: Path) -> list[Path]:
    return sorted(log.glob("*.log"))


def places(path: Path) -> dict[int, tuple[int, int]]:
    """Where each record of the segment begins and ends, up to the first damaged one."""
    found: dict[int, tuple[int, int]] = {}
    with path.open("rb") as file, suppress(LogCorrupt):
        scanner = Scanner(file, name=str(path), is_last=True)
        start = scanner.offset
        for entry in scanner:
            found[entry.lsn] = start, scanner.offset
            start = scanner.offset
    return found


def hashes(directory: Path) -> tuple[int, str, str]:
    """What a server comes to that starts there: record, state, model."""
    with closing(FileLog.open(directory / "log", RUN, inline, SilentDisk(), SEGMENT_BYTES)) as log:
        model = ServerModel()
        state = recover(log, CheckpointStore(directory / "checkpoints", RUN, inline), model, Node(directory).told)
    return state.lsn, state.digest().hex(), model.model_hash().hex()


def flip(path: Path, at: int, mask: int = 0x10) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= mask
    path.write_bytes(content)


def zero(path: Path, first: int, last: int) -> None:
    content = bytearray(path.read_bytes())
    content[first:last] = bytes(last - first)
    path.write_bytes(content)


# Each takes the log's segments and says which records it damaged.
Damage = Callable[[Sequence[Path]], list[int]]


def of_record(segment: int, index: int, change: Callable[[Path, int, int], None]) -> Damage:
    def damage(paths: Sequence[Path]) -> list[int]:
        path = paths[segment]
        lsn, (start, end) = list(places(path).items())[index]
        change(path, start, end)
        return [lsn]

    return damage


def several(*damages: Damage) -> Damage:
    """The last in the log first, so that the places of those before it can still be read."""
    return lambda paths: sorted(lsn for damage in reversed(damages) for lsn in damage(paths))


def truncated(segment: int, index: int, more: int) -> Damage:
    def damage(paths: Sequence[Path]) -> list[int]:
        found = places(paths[segment])
        lsn = list(found)[index]
        os.truncate(paths[segment], found[lsn][0] + more)
        return [lost for lost in found if lost >= lsn]

    return damage


def deleted(*gone: int) -> Damage:
    def damage(paths: Sequence[Path]) -> list[int]:
        lost = [lsn for segment in gone for lsn in places(paths[segment])]
        for segment in gone:
            paths[segment].unlink()
        return lost

    return damage


def replaced(segment: int, content: Callable[[bytes], bytes]) -> Damage:
    def damage(paths: Sequence[Path]) -> list[int]:
        lost = list(places(paths[segment]))
        paths[segment].write_bytes(content(paths[segment].read_bytes()))
        return lost

    return damage


def header_flipped(segment: int, at: int) -> Damage:
    def damage(paths: Sequence[Path]) -> list[int]:
        flip(paths[segment], at)
        return []  # the name, the run and the record before it say what stood there

    return damage


def with_trailer(paths: Sequence[Path]) -> list[int]:
    paths[1].write_bytes(paths[1].read_bytes() + b"noise")
    return []


def at(offset: int) -> Callable[[Path, int, int], None]:
    return lambda path, start, end: flip(path, (start if offset >= 0 else end) + offset)


DAMAGES: dict[str, Damage] = {
    "a bit of a payload": of_record(1, 0, at(-20)),
    "a bit of a record's header": of_record(1, 1, at(20)),
    "a bit of a record's magic": of_record(1, 0, at(0)),
    "the last record of a segment": of_record(1, -1, at(100)),
    "the first record of the log": of_record(0, 0, at(200)),
    "a record that reads as zeros": of_record(2, 1, zero),
    "records of several segments": several(of_record(0, 1, at(80)), of_record(1, 0, at(5)), of_record(3, -1, zero)),
    "two records side by side": several(of_record(1, 0, at(80)), of_record(1, 1, at(9))),
    "a durable record of the last segment": of_record(-1, 0, at(80)),
    "a segment that ends early": truncated(2, 1, 0),
    "a segment that ends in a record": truncated(2, 1, 50),
    "a segment that ends in its header": replaced(2, lambda content: content[:20]),
    "an empty segment": replaced(2, lambda content: b""),
    "a segment of zeros": replaced(2, lambda content: bytes(len(content))),
    "a segment that is gone": deleted(2),
    "two segments that are gone": deleted(2, 3),
    "a segment exchanged for another": lambda paths: replaced(2, lambda _: paths[1].read_bytes())(paths),
    "a segment's header": header_flipped(2, 30),
    "the first segment's header": header_flipped(0, 4),
    "the last segment's header": header_flipped(-1, SEGMENT_HEADER_BYTES - 10),
    "the last segment altogether": replaced(-1, lambda content: bytes(len(content))),
    "something behind a segment's end": with_trailer,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_exactly_the_damaged_records_come_back_and_the_state_is_the_same(
    config: RunConfig, run: SmallRun, damage: Damage
) -> None:
    before = hashes(config.directory)
    lost = damage(segments(config.log))
    damaged = {path.name: path.read_bytes() for path in segments(config.log)}
    with pytest.raises(LogCorrupt):
        hashes(config.directory)
    repaired = repair(config, archive_of(config))
    assert [lsn for mended in repaired.mended for lsn in mended.lsns] == lost
    assert list(read_log(config.log, RUN)) == run.entries
    for mended in repaired.mended:
        assert mended.aside.read_bytes() == damaged[mended.path.name]
    assert len(list(config.log.glob("*.damaged*"))) == len(repaired.mended) > 0
    assert repaired.verdict is not None and repaired.verdict.is_ok
    assert any(f"state       {before[1]} at record {before[0]}" == line for line in repaired.lines())
    assert hashes(config.directory) == before
    assert not (config.directory / REPAIRING).exists()
    assert repair(config, archive_of(config)).mended == []


def test_it_says_what_was_mended_and_from_where(config: RunConfig) -> None:
    lost = several(of_record(1, 0, at(80)), of_record(1, 1, at(9)))(segments(config.log))
    path = segments(config.log)[1]
    line = repair(config, archive_of(config)).lines()[0]
    assert line == (
        f"mended      {path}: record {lost[0]} to {lost[1]} from {archive_of(config)}; as it was: {path.name}.damaged"
    )


def test_where_nothing_is_damaged_nothing_is_changed(config: RunConfig) -> None:
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in config.log.iterdir()}
    assert repair(config, archive_of(config)).lines() == [
        f"{config.log}: no record is damaged, and nothing was changed"
    ]
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in config.log.iterdir()} == before


def test_a_torn_tail_is_no_damage(config: RunConfig, run: SmallRun) -> None:
    """It was never acknowledged; the next start of the server cuts it off."""
    path = segments(config.log)[-1]
    start, end = places(path)[len(run.entries)]
    zero(path, start + 40, end)
    assert repair(config, archive_of(config)).mended == []
    assert hashes(config.directory)[0] == len(run.entries) - 1


def test_a_log_in_use_is_not_touched(config: RunConfig) -> None:
    log = FileLog.open(config.log, RUN, inline)
    with pytest.raises(ConfigError, match="is in use by another server: stop that one"):
        repair(config, archive_of(config))
    log.close()


@pytest.mark.parametrize("damage", [of_record(1, 1, at(90)), deleted(2), header_flipped(1, 9)])
def test_a_source_of_another_history_is_of_no_use(config: RunConfig, tmp_path: Path, damage: Damage) -> None:
    other = Node(tmp_path / "other")
    other.append(_another_run().entries)
    other.archive_all(open_archive("other-archive", tmp_path))
    lost = damage(segments(config.log))
    before = {path.name: path.read_bytes() for path in config.log.iterdir()}
    if not lost:
        assert repair(config, tmp_path / "other-archive").mended, "nothing was needed of it"
        return
    with pytest.raises(UserError, match=f"record {lost[0]} of .* does not continue record {lost[0] - 1} of this log"):
        repair(config, tmp_path / "other-archive")
    assert {path.name: path.read_bytes() for path in config.log.iterdir()} == before


def _another_run() -> SmallRun:
    run = SmallRun()
    run.join("b-0")
    for _ in range(8):
        run.push("b-0")
    return run


def test_what_the_source_has_not_got_is_told(config: RunConfig, run: SmallRun, tmp_path: Path) -> None:
    short = Node(tmp_path / "short")
    short.append(run.entries[:5])
    short.archive_all(open_archive("short-archive", tmp_path))
    (lsn,) = of_record(2, 0, at(80))(segments(config.log))
    with pytest.raises(UserError, match=f"does not hold record {lsn}: name another node, or the archive"):
        repair(config, tmp_path / "short-archive")


@pytest.mark.parametrize(
    ("source", "reason"),
    [("server", "that is the log to mend"), ("tcp://10.0.0.9:1", "no node of .* has this address")],
)
def test_a_source_that_is_none_is_told(config: RunConfig, source: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        repair(config, source)


def test_a_damaged_record_of_the_archive_is_passed_over_and_told(config: RunConfig) -> None:
    (lsn,) = of_record(1, 1, at(90))(segments(config.log))
    for path in (archive_of(config) / RUN / "log").iterdir():
        path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(UserError, match=f"does not hold record {lsn}"):
        repair(config, archive_of(config))


class DyingDisk(CrashingDisk):
    link = crashing("link")


def test_a_repair_that_crashed_anywhere_is_done_again_and_comes_to_the_same(
    config: RunConfig, run: SmallRun, tmp_path: Path
) -> None:
    assert "link" not in CALLS
    before = hashes(config.directory)
    whole = {path.name: path.read_bytes() for path in config.log.iterdir()}
    crashes = 0
    for crash_at in range(1, 200):
        for path in config.log.iterdir():
            path.unlink()
        for name, content in whole.items():
            (config.log / name).write_bytes(content)
        several(of_record(0, 1, at(80)), deleted(2), of_record(3, 0, at(5)))(segments(config.log))
        try:
            repair(config, archive_of(config), disk=DyingDisk(crash_at))
        except Crash:
            crashes += 1
        else:
            break
        repair(config, archive_of(config))
        assert list(read_log(config.log, RUN)) == run.entries
        assert len(list(config.log.glob("*.damaged*"))) == 3, "each damaged file is kept, once"
    assert crashes > 20
    assert hashes(config.directory) == before


# --- from a node that runs ---


@pytest.mark.parametrize(
    ("broken", "verb", "source", "by"),
    [("server", "standby", "b", "address"), ("b", "serve", "server", "name")],
)
def test_a_halted_node_is_mended_from_one_that_runs_whether_that_is_named_or_its_address(
    config: RunConfig, run: SmallRun, broken: str, verb: str, source: str, by: str
) -> None:
    directory = config.node(broken).directory
    before = hashes(directory)
    lost = several(of_record(0, 1, at(80)), of_record(1, 0, zero), deleted(2))(segments(directory / "log"))
    halted = started(config, "serve" if broken == "server" else "standby", broken)
    _, errors = halted.communicate(timeout=WAIT_SECONDS)
    assert halted.returncode == EXIT_CORRUPT
    assert f"hetero-async repair --run {config.path} --name {broken} --from NODE|ARCHIVE" in errors
    running = started(config, verb, source)
    try:
        repaired = repair(config, source if by == "name" else config.node(source).control, broken)
        assert [lsn for mended in repaired.mended for lsn in mended.lsns] == lost
        assert list(read_log(directory / "log", RUN)) == run.entries
        assert running.poll() is None
    finally:
        running.send_signal(signal.SIGTERM)
        running.communicate(timeout=WAIT_SECONDS)
    assert hashes(directory) == before


def started(config: RunConfig, verb: str, name: str) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-m", "hetero_async", verb, "--run", str(config.path), "--name", name]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_it_is_a_verb(config: RunConfig, run: SmallRun) -> None:
    of_record(1, 1, at(90))(segments(config.log))
    arguments = [sys.executable, "-m", "hetero_async", "repair", "--run", str(config.path), "--from", "ARCHIVE"]
    arguments[-1] = str(archive_of(config))
    said = [subprocess.run(arguments, capture_output=True, text=True, timeout=WAIT_SECONDS) for _ in range(2)]
    assert [done.returncode for done in said] == [0, 0], said
    state, _ = replayed(run.entries)
    assert said[0].stdout.splitlines()[-1] == f"state       {state.digest().hex()} at record {len(run.entries)}"
    assert said[1].stdout.lstrip() == f"{config.log}: no record is damaged, and nothing was changed\n"
