"""Looks at a stopped server's log, and damages copies of it. Used by test_scenarios_log.py and _disk.py."""

import shutil
from pathlib import Path

import pytest
import trio
from sim.scenario import ScriptedWorld

from hetero_async.errors import LogCorrupt
from hetero_async.formats.segment import RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, RecordHeader
from hetero_async.shell.disk import Disk
from hetero_async.shell.log import FileLog
from hetero_async.shell.threads import in_thread
from hetero_async.sim.plan import SERVER


class QuickDisk(Disk):
    """Of a log that is only looked at: nothing in it needs to survive."""

    def fsync(self, descriptor: int) -> None:
        pass


def segments(log: Path) -> list[Path]:
    return sorted(log.glob("[0-9]*.log"))


def record_headers(segment: Path) -> list[tuple[int, RecordHeader]]:
    """Of every whole record, with its offset."""
    found: list[tuple[int, RecordHeader]] = []
    content = segment.read_bytes()
    offset = SEGMENT_HEADER_BYTES
    while header := RecordHeader.unpack(content[offset : offset + RECORD_HEADER_BYTES]):
        found.append((offset, header))
        offset += header.padded_bytes
    return found


def start_on(log: Path, after_lsn: int = 0) -> int:
    """The last record that a server starting on this log would go on from. Raises LogCorrupt."""
    opened = FileLog.open(log, "simulated", in_thread, QuickDisk(), segment_bytes=4096)
    try:
        return max((entry.lsn for entry in opened.entries(after_lsn)), default=0)
    finally:
        opened.close()


def refusal(log: Path) -> str:
    """Why no server starts on this log, without the name of the directory."""
    with pytest.raises(LogCorrupt) as halted:
        start_on(log)
    return str(halted.value).replace(f"{log}/", "").replace(str(log), "the log")


def copy_of(log: Path) -> Path:
    """A log to damage; only one at a time."""
    copy = log.parent / "damaged"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(log, copy)
    return copy


def flip(path: Path, at: int) -> None:
    damaged = bytearray(path.read_bytes())
    damaged[at] ^= 1 << at % 8
    path.write_bytes(damaged)


async def train_and_stop(world: ScriptedWorld, deltas: int) -> None:
    """The server is gone and stays away; its log holds so many deltas of w0."""
    await world.until(lambda: len(world.deltas("w0")) >= deltas, f"w0 has {deltas} deltas in the log")
    world.kill(SERVER)
    await trio.sleep(0.1)


async def start_and_halt(world: ScriptedWorld) -> None:
    """The log is beyond repair: the server's next word must be the last."""
    world.must_halt = True
    world.release(SERVER)
    await world.until(lambda: False, "the server halts")


async def restore_older_log(world: ScriptedWorld) -> None:
    """The server is gone, and its log is as it was some deltas ago: a good log, of which the end is missing."""
    await world.until(lambda: len(world.deltas("w0")) == 3, "w0 has trained a while")
    (segment,) = segments(world.log)
    kept = segment.read_bytes()
    await train_and_stop(world, 5)
    segment.write_bytes(kept)
