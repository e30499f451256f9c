"""The log on disk, as its one writer has it: a server, or a standby that follows one.

`FileLog` owns the directory; segments.py reads it. What the bytes mean is in formats/segment.py. A segment appears
under its name (its first record's number) only when its header is durable, and so is never found half made.
"""

import contextlib
import fcntl
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hetero_async.core.records import Entry
from hetero_async.errors import ConfigError, DiskFull, LogCorrupt, UserError
from hetero_async.formats.segment import (
    BLOCK_BYTES,
    FIRST_CHAIN,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    Scanner,
    SegmentHeader,
    pack,
    segment_file,
)
from hetero_async.formats.shipment import ENTRIES_MAX
from hetero_async.ports import Blocking
from hetero_async.shell.disk import (
    DISK,
    Disk,
    fatal,
    fatal_unless_full,
    full_is_told,
    sync_directory,
    write_all,
    write_durably,
)
from hetero_async.shell.segments import Linked, first_lsn_of, open_segment, read_linked, read_log, segment_paths

# A segment's preallocated size: large enough that making one is rare, small enough to be deleted soon. One with a
# larger record is larger.
SEGMENT_BYTES = 64 * 1024 * 1024
# Records kept in memory for standbys that follow closely, so that feeding them reads no disk.
RECENT_BYTES = 16 * 1024 * 1024


class FileLog:
    """`torn` says what `open` had to cut off, "" for nothing; `last_lsn` is the last durable record."""

    def __init__(
        self, directory: Path, run: str, blocking: Blocking, disk: Disk, segment_bytes: int, lock: int
    ) -> None:
        """Only for `open`."""
        self.directory = directory
        self.run = run
        self.torn = ""
        self.last_lsn = 0
        self._blocking = blocking
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._lock = lock
        self.last_term = 0
        self.chain = FIRST_CHAIN  # of the last durable record
        self._recent: tuple[Linked, ...] = ()
        # The last segment: its path, descriptor, first record's number, and where the next record goes.
        self._path = directory
        self._segment = -1
        self._segment_first_lsn = 1
        self._offset = 0

    @classmethod
    def open(
        cls, directory: Path, run: str, blocking: Blocking, disk: Disk = DISK, segment_bytes: int = 0
    ) -> "FileLog":
        """Lock the directory and repair what a crash left. Older segments are checked when `entries` reads them.

        Raises ConfigError (in use, another run's), LogCorrupt, DiskFull.
        """
        log = cls(directory, run, blocking, disk, segment_bytes or SEGMENT_BYTES, lock_directory(directory, disk))
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(log.close)
            log._recover()
            if_it_fails.pop_all()
        return log

    @property
    def first_lsn(self) -> int:
        """The oldest record still held (the next one to come, when there is none)."""
        return first_lsn_of(segment_paths(self.directory)[0])

    def entries(self, after_lsn: int = 0) -> Iterator[Entry]:
        """Every record after that one, from disk. Raises LogCorrupt, also when some of them are gone."""
        last_lsn = max(after_lsn, self.first_lsn - 1)
        for entry in read_log(self.directory, self.run, after_lsn):
            last_lsn = entry.lsn
            yield entry
        if last_lsn != self.last_lsn:
            raise LogCorrupt(
                f"{self.directory}: {last_lsn} was read as the last record, the log ends at {self.last_lsn}"
            )

    async def append(self, entries: Sequence[Entry]) -> None:
        """Durable on return, all of them with one fdatasync. Raises DiskFull: none of them is kept then.

        Cancellation is heard before or after the write, never in its middle. Does not return when the disk fails.
        """
        await self._blocking(self._append, tuple(entries))

    def read(self, after_lsn: int, count_bytes: int) -> tuple[bytes, list[Entry]] | None:
        last_lsn, chain, recent = self.last_lsn, self.chain, self._recent
        if after_lsn >= last_lsn:
            return (chain, []) if after_lsn == last_lsn else None
        if recent and recent[0][1].lsn <= after_lsn + 1:
            linked: Iterable[Linked] = (one for one in recent if one[1].lsn > after_lsn)
        elif self.first_lsn <= after_lsn + 1:
            linked = read_linked(self.directory, self.run, after_lsn)
        else:
            return None
        try:
            return _up_to(linked, last_lsn, count_bytes)
        except (UserError, LogCorrupt):
            if self.first_lsn > after_lsn + 1:
                return None  # dropped between two looks
            raise

    def drop_before(self, lsn: int) -> None:
        """Delete the segments that hold only records before this one; never the last. May run beside `append`."""
        paths = segment_paths(self.directory)
        old = [path for path, following in pairwise(paths) if first_lsn_of(following) <= lsn]
        with fatal(self.directory, self._disk):
            for path in old:  # oldest first: a crash in between leaves no gap
                self._disk.unlink(path)
            if old:
                sync_directory(self.directory, self._disk)

    def cut(self, lsn: int) -> list[Path]:
        """Put the records after this one aside, and return where they lie now. Not beside any other call.

        A crash in its middle leaves a log that ends somewhere after it: then it is done again.
        """
        beyond = [path for path in segment_paths(self.directory) if first_lsn_of(path) > lsn + 1]
        aside = [self._rename_aside(path) for path in reversed(beyond)]
        kept = segment_paths(self.directory)
        if kept:
            aside += self._rewrite(kept[-1], lsn)
        else:
            self.reset()
        self._recent = ()
        return aside

    def reset(self, lsn: int = 0, term: int = 0, chain: bytes = FIRST_CHAIN) -> None:
        """Begin anew behind a checkpoint of that record; what is there is forgotten. Not beside any other call."""
        with fatal(self.directory, self._disk):
            for path in segment_paths(self.directory):
                self._disk.unlink(path)
            sync_directory(self.directory, self._disk)
        self.last_lsn, self.last_term, self.chain, self._recent = lsn, term, chain, ()
        self._start_segment()

    def close(self) -> None:
        if self._segment >= 0:
            os.close(self._segment)
        os.close(self._lock)
        self._segment = self._lock = -1

    # --- recovery ---

    def _recover(self) -> None:
        with fatal(self.directory, self._disk):
            for leftover in self.directory.glob("*.new"):
                self._disk.unlink(leftover)
        paths = segment_paths(self.directory)
        if not paths:
            self._start_segment()
            return
        for path in paths:  # cheap, and tells of a foreign segment before anything is changed
            with open_segment(path, self.run, is_last=True):
                pass
        self._rewrite(paths[-1])

    def _rewrite(self, path: Path, last_lsn: int | None = None) -> list[Path]:
        """Copy the good part of the last segment, up to that record, into a new file and go on in that.

        After a failed fsync the page cache may show bytes that the disk never got: only what is written and synced
        once more is known to be there. Returns where the rest was put aside.
        """
        with open_segment(path, self.run, is_last=True) as scanner:
            end = _End.of(scanner)
            for entry in scanner:
                if last_lsn is not None and entry.lsn > last_lsn:
                    break
                end = _End.of(scanner)
            aside: list[Path] = []
            if scanner.torn:
                aside = [self._set_aside(path, scanner)]
            elif end.lsn < scanner.last_lsn:
                aside = [self._copy_aside(path, end)]
            self._install(path, _blocks(path, end.offset), end.offset)
            self._segment_first_lsn = scanner.header.first_lsn
        self.last_lsn, self.last_term, self.chain = end.lsn, end.term, end.chain
        return aside

    def _rename_aside(self, path: Path) -> Path:
        aside = _unused(path.with_name(f"{path.name}.cut"))
        with fatal(path, self._disk):
            self._disk.rename(path, aside)
            sync_directory(self.directory, self._disk)
        return aside

    def _copy_aside(self, path: Path, end: "_End") -> Path:
        aside = _unused(path.with_name(f"{path.name}.cut-{end.lsn + 1}"))
        with fatal_unless_full(aside, self._disk), path.open("rb") as file:
            file.seek(end.offset)
            write_durably(aside, file.read().rstrip(b"\0"), self._disk)
        return aside

    def _set_aside(self, path: Path, scanner: Scanner) -> Path:
        aside = path.with_name(f"{path.name}.torn-{scanner.last_lsn + 1}")
        tail = scanner.tail()
        with fatal_unless_full(aside, self._disk):
            write_durably(aside, tail, self._disk)
        self.torn = (
            f"{path}: cut off {len(tail)} bytes of the unfinished record {scanner.last_lsn + 1} "
            f"({scanner.torn}); it was never acknowledged; kept as {aside.name}"
        )
        return aside

    # --- writing: runs in a thread ---

    def _append(self, entries: Sequence[Entry]) -> None:
        packed, chain, linked = self._pack(entries)
        total_bytes = sum(len(record) for record in packed)
        if self._offset + total_bytes > self._segment_bytes and self.last_lsn >= self._segment_first_lsn:
            self._roll(total_bytes)
        end = self._write(packed)
        with fatal(self._path, self._disk):
            self._disk.fdatasync(self._segment)
        self._recent = _newest((*self._recent, *linked))
        self._offset, self.chain = end, chain
        self.last_lsn, self.last_term = entries[-1].lsn, entries[-1].term

    def _pack(self, entries: Sequence[Entry]) -> tuple[list[bytes], bytes, list[Linked]]:
        """Nothing is written unless every entry can be."""
        lsn, term, chain = self.last_lsn, self.last_term, self.chain
        packed: list[bytes] = []
        linked: list[Linked] = []
        for entry in entries:
            assert entry.lsn == lsn + 1, f"record {entry.lsn} cannot follow record {lsn}"
            assert entry.term >= term, f"term {entry.term} cannot follow term {term}"
            linked.append((chain, entry))
            record, chain = pack(entry, chain, self.last_lsn)
            packed.append(record)
            lsn, term = entry.lsn, entry.term
        assert packed, "nothing to append"
        return packed, chain, linked

    def _write(self, packed: Sequence[bytes]) -> int:
        try:
            with fatal_unless_full(self._path, self._disk):
                return write_all(self._disk, self._segment, packed, self._offset)
        except DiskFull:
            with fatal(self._path, self._disk):
                self._disk.truncate(self._segment, self._offset)
                self._disk.fsync(self._segment)
            raise

    def _roll(self, total_bytes: int) -> None:
        """The next records go to a new segment. What the old one had reserved in vain is given back first."""
        with fatal(self._path, self._disk):
            self._disk.truncate(self._segment, self._offset)
        self._start_segment(total_bytes)

    def _start_segment(self, total_bytes: int = 0) -> None:
        first_lsn = self.last_lsn + 1
        header = SegmentHeader(run=self.run, first_lsn=first_lsn, chain=self.chain).pack()
        self._install(self.directory / segment_file(first_lsn), [header], SEGMENT_HEADER_BYTES + total_bytes)
        self._segment_first_lsn = first_lsn

    def _install(self, path: Path, blocks: Iterable[bytes], size: int) -> None:
        """Make `path` durable with these bytes and append to it from now on. On DiskFull nothing has changed."""
        temporary = path.with_suffix(".new")
        with fatal_unless_full(temporary, self._disk):
            segment = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with fatal_unless_full(temporary, self._disk):
                self._disk.fallocate(segment, max(size, self._segment_bytes))
                offset = 0
                for block in blocks:
                    offset = write_all(self._disk, segment, [block], offset)
        except DiskFull:
            os.close(segment)
            with fatal(temporary, self._disk):
                self._disk.unlink(temporary)
            raise
        with fatal(path, self._disk):
            self._disk.fsync(segment)
            self._disk.rename(temporary, path)
            sync_directory(self.directory, self._disk)
        if self._segment >= 0:
            os.close(self._segment)
        self._path, self._segment, self._offset = path, segment, offset


@dataclass(frozen=True, slots=True)
class _End:
    """Where a segment's record ends."""

    offset: int
    lsn: int
    term: int
    chain: bytes

    @staticmethod
    def of(scanner: Scanner) -> "_End":
        """Of the last record that the scanner has read."""
        return _End(scanner.offset, scanner.last_lsn, scanner.term, scanner.chain)


def _newest(linked: tuple[Linked, ...]) -> tuple[Linked, ...]:
    """The last of them that fit into RECENT_BYTES, one at least."""
    left, count = RECENT_BYTES, 0
    for _, entry in reversed(linked):
        left -= len(entry.payload) + RECORD_HEADER_BYTES
        if left < 0 and count:
            break
        count += 1
    return linked[len(linked) - count :]


def _up_to(linked: Iterable[Linked], last_lsn: int, count_bytes: int) -> tuple[bytes, list[Entry]]:
    before, entries = b"", list[Entry]()
    for chain, entry in linked:
        if entry.lsn > last_lsn or len(entries) == ENTRIES_MAX or (entries and count_bytes < len(entry.payload)):
            break
        before = before or chain
        entries.append(entry)
        count_bytes -= len(entry.payload) + RECORD_HEADER_BYTES
        if count_bytes <= 0:
            break
    return before, entries


def _unused(path: Path) -> Path:
    """That name, or the first of .1, .2, … behind it that nothing has."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{number}") for number in itertools.count(1)))
    return next(name for name in names if not name.exists())


def _blocks(path: Path, count: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while count and (block := file.read(min(count, BLOCK_BYTES))):
            count -= len(block)
            yield block


def lock_directory(directory: Path, disk: Disk) -> int:
    """Held by the directory's descriptor, so that it goes with the process, however that ends."""
    try:
        with full_is_told(directory):
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(directory.parent, disk)
        lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ConfigError(f"{directory}: no log can be kept here: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise ConfigError(
            f"{directory} is in use by another server: stop that one, or use another directory"
        ) from error
    return lock
