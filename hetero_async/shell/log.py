"""The log on disk: a directory of segments, appended to by one server, read by recovery, verify and export.

`FileLog` owns the directory and is the only writer; `read_log` changes nothing, so it may look on while a server
runs. What the bytes mean is in formats/segment.py. A segment appears under its name (its first record's number) only
when its header is durable, and so is never found half made.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from hetero_async.core.records import Entry
from hetero_async.errors import ConfigError, DiskFull, LogCorrupt, UserError
from hetero_async.formats.segment import (
    BLOCK_BYTES,
    FIRST_CHAIN,
    SEGMENT_HEADER_BYTES,
    Scanner,
    SegmentHeader,
    pack,
)
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

# A segment's preallocated size: large enough that making one is rare, small enough to be deleted soon. One with a
# larger record is larger.
SEGMENT_BYTES = 64 * 1024 * 1024


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
        self._term = 0
        self._chain = FIRST_CHAIN
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
        log = cls(directory, run, blocking, disk, segment_bytes or SEGMENT_BYTES, _lock(directory, disk))
        with contextlib.ExitStack() as if_it_fails:
            if_it_fails.callback(log.close)
            log._recover()
            if_it_fails.pop_all()
        return log

    @property
    def first_lsn(self) -> int:
        """The oldest record still held (the next one to come, when there is none)."""
        return _first_lsn(_segment_paths(self.directory)[0])

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

    def drop_before(self, lsn: int) -> None:
        """Delete the segments that hold only records before this one; never the last. May run beside `append`."""
        paths = _segment_paths(self.directory)
        old = [path for path, following in pairwise(paths) if _first_lsn(following) <= lsn]
        with fatal(self.directory, self._disk):
            for path in old:  # oldest first: a crash in between leaves no gap
                self._disk.unlink(path)
            if old:
                sync_directory(self.directory, self._disk)

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
        paths = _segment_paths(self.directory)
        if not paths:
            self._start_segment()
            return
        for path in paths:  # cheap, and tells of a foreign segment before anything is changed
            with _scanner(path, self.run, is_last=True):
                pass
        self._rewrite(paths[-1])

    def _rewrite(self, path: Path) -> None:
        """Copy the good part of the last segment into a new file and go on in that.

        After a failed fsync the page cache may show bytes that the disk never got: only what is written and synced
        once more is known to be there.
        """
        with _scanner(path, self.run, is_last=True) as scanner:
            for _ in scanner:
                pass
            if scanner.torn:
                self._set_aside(path, scanner)
            blocks = _blocks(path, scanner.offset)
            self._install(path, blocks, scanner.offset)
            self._segment_first_lsn = scanner.header.first_lsn
            self.last_lsn, self._term, self._chain = scanner.last_lsn, scanner.term, scanner.chain

    def _set_aside(self, path: Path, scanner: Scanner) -> None:
        aside = path.with_name(f"{path.name}.torn-{scanner.last_lsn + 1}")
        tail = scanner.tail()
        with fatal_unless_full(aside, self._disk):
            write_durably(aside, tail, self._disk)
        self.torn = (
            f"{path}: cut off {len(tail)} bytes of the unfinished record {scanner.last_lsn + 1} "
            f"({scanner.torn}); it was never acknowledged; kept as {aside.name}"
        )

    # --- writing: runs in a thread ---

    def _append(self, entries: Sequence[Entry]) -> None:
        packed, chain = self._pack(entries)
        total_bytes = sum(len(record) for record in packed)
        if self._offset + total_bytes > self._segment_bytes and self.last_lsn >= self._segment_first_lsn:
            self._roll(total_bytes)
        end = self._write(packed)
        with fatal(self._path, self._disk):
            self._disk.fdatasync(self._segment)
        self._offset, self._chain = end, chain
        self.last_lsn, self._term = entries[-1].lsn, entries[-1].term

    def _pack(self, entries: Sequence[Entry]) -> tuple[list[bytes], bytes]:
        """Nothing is written unless every entry can be."""
        lsn, term, chain = self.last_lsn, self._term, self._chain
        packed: list[bytes] = []
        for entry in entries:
            assert entry.lsn == lsn + 1, f"record {entry.lsn} cannot follow record {lsn}"
            assert entry.term >= term, f"term {entry.term} cannot follow term {term}"
            record, chain = pack(entry, chain, self.last_lsn)
            packed.append(record)
            lsn, term = entry.lsn, entry.term
        assert packed, "nothing to append"
        return packed, chain

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
        header = SegmentHeader(run=self.run, first_lsn=first_lsn, chain=self._chain).pack()
        self._install(self.directory / f"{first_lsn:020d}.log", [header], SEGMENT_HEADER_BYTES + total_bytes)
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


def read_log(directory: Path, run: str | None, after_lsn: int | None = None) -> Iterator[Entry]:
    """Every whole record, from the oldest held or those after `after_lsn`; locks and changes nothing.

    A torn tail is where it ends: a running server may be writing it. Raises LogCorrupt, and ConfigError when there is
    no log or it is another run's. `run` None: whichever it is.
    """
    if not directory.is_dir():
        raise ConfigError(f"{directory}: there is no log here")
    following: tuple[int, bytes] | None = None
    term = 0
    paths = _paths_after(_segment_paths(directory), after_lsn)
    for path in paths:
        with _scanner(path, run, is_last=path is paths[-1], term=term) as scanner:
            if following not in (None, (scanner.header.first_lsn, scanner.header.chain)):
                raise LogCorrupt(f"{path}: does not continue the segment before it: one is missing or exchanged")
            yield from (entry for entry in scanner if after_lsn is None or entry.lsn > after_lsn)
            following, term, run = (scanner.last_lsn + 1, scanner.chain), scanner.term, scanner.header.run


def run_of(directory: Path) -> str:
    """The name of the run whose log this is. Raises ConfigError when there is none."""
    paths = _segment_paths(directory)
    if not paths:
        raise ConfigError(f"{directory}: there is no log here")
    with _scanner(paths[-1], None, is_last=True) as scanner:
        return scanner.header.run


def _paths_after(paths: list[Path], after_lsn: int | None) -> list[Path]:
    """Without the segments before the one that holds record `after_lsn` + 1. Raises LogCorrupt when that is gone."""
    if after_lsn is None or not paths:
        return paths
    if _first_lsn(paths[0]) > after_lsn + 1:
        raise LogCorrupt(
            f"{paths[0].parent}: begins at record {_first_lsn(paths[0])}, record {after_lsn + 1} is missing"
        )
    return paths[sum(_first_lsn(path) <= after_lsn + 1 for path in paths) - 1 :]


@contextmanager
def _scanner(path: Path, run: str | None, *, is_last: bool, term: int = 0) -> Iterator[Scanner]:
    """Unbuffered: a buffer could show old bytes beside new ones of a segment that is being written."""
    try:
        file = path.open("rb", buffering=0)
    except FileNotFoundError as error:
        raise UserError(f"{path} has been dropped by the running server meanwhile: try again") from error
    with file:
        scanner = Scanner(file, name=str(path), is_last=is_last, term=term)
        if run not in (None, scanner.header.run):
            raise ConfigError(f'{path} belongs to run "{scanner.header.run}", not "{run}": use another directory')
        if scanner.header.first_lsn != _first_lsn(path):
            raise LogCorrupt(f"{path}: offset 0: begins at record {scanner.header.first_lsn}, its name says otherwise")
        yield scanner


def _segment_paths(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*.log") if path.stem.isdigit())


def _first_lsn(path: Path) -> int:
    return int(path.stem)


def _blocks(path: Path, count: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while count and (block := file.read(min(count, BLOCK_BYTES))):
            count -= len(block)
            yield block


def _lock(directory: Path, disk: Disk) -> int:
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
