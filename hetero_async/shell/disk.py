"""The calls that change a disk, and what a failure of one means. Used by the log, the checkpoints and the outbox.

No space is a pause (DiskFull). Any other failure, and any failure of fsync, ends a server at once: the kernel marks
the pages clean after a failed fsync, so neither trying again nor reading back would tell what is really stored.
"""

import contextlib
import errno
import itertools
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from hetero_async.errors import EXIT_DISK_FAILED, DiskFull, HeteroAsyncError

NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
# What else than a repair may help.
REMEDIES = {
    errno.EMFILE: "raise the limit of open files (ulimit -n) and restart",
    errno.ENFILE: "raise the system's limit of open files (fs.file-max) and restart",
    errno.EROFS: "restart when it can be written again",
}
# Linux's IOV_MAX: so many buffers may one write have.
BUFFERS_MAX = 1024
GROUP_BYTES = 8 * 1024 * 1024
STDERR = 2


class Disk:
    """One method a system call, so that a test's own disk can fail or crash at any one of them."""

    def write(self, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        return os.pwritev(descriptor, buffers, offset)

    def fdatasync(self, descriptor: int) -> None:
        os.fdatasync(descriptor)

    def fsync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def fallocate(self, descriptor: int, count: int) -> None:
        os.posix_fallocate(descriptor, 0, count)

    def truncate(self, descriptor: int, count: int) -> None:
        os.ftruncate(descriptor, count)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def failed(self, path: Path, error: OSError) -> NoReturn:
        """End the process, with one line and no further write or acknowledgement."""
        remedy = REMEDIES.get(error.errno or 0, "restart when it is repaired")
        line = f"the disk failed: {path}: {error.strerror}: stopping at once, {remedy}\n"
        try:
            os.write(STDERR, line.encode())
        finally:
            os._exit(EXIT_DISK_FAILED)  # also if the line went to the same disk


DISK = Disk()


@contextlib.contextmanager
def fatal(path: Path, disk: Disk = DISK) -> Iterator[None]:
    """For a server: an OSError in here ends the process."""
    try:
        yield
    except OSError as error:
        disk.failed(path, error)


@contextlib.contextmanager
def fatal_unless_full(path: Path, disk: Disk = DISK) -> Iterator[None]:
    """As `fatal`, but no space raises DiskFull."""
    with fatal(path, disk), full_is_told(path):
        yield


@contextlib.contextmanager
def full_is_told(path: Path) -> Iterator[None]:
    """No space raises DiskFull, other failures stay what they are."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise DiskFull(f"no space left to write {path}: free some, the work goes on by itself then") from error


@contextlib.contextmanager
def failure_is_told(path: Path) -> Iterator[None]:
    """For a worker: an OSError in here raises HeteroAsyncError. Its next life reads what is really there."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "restart when it is repaired")
        raise HeteroAsyncError(f"the disk failed: {path}: {error.strerror}: this worker stops, {remedy}") from error


def write_all(disk: Disk, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
    """Write all, however little each call takes: a disk that fills up takes a part first. Returns the end's offset."""
    rest = deque(memoryview(buffer) for buffer in buffers if len(buffer))
    while rest:
        written = disk.write(descriptor, list(itertools.islice(rest, BUFFERS_MAX)), offset)
        assert written > 0, "a write took nothing and reported no error"
        offset += written
        while rest and written >= len(rest[0]):
            written -= len(rest.popleft())
        if written:
            rest[0] = rest[0][written:]
    return offset


def write_durably(path: Path, content: bytes, disk: Disk = DISK) -> None:
    """As `write_pieces_durably`, of one piece."""
    write_pieces_durably(path, [content], disk)


def write_pieces_durably(path: Path, content: Iterable[bytes | memoryview], disk: Disk = DISK) -> None:
    """Whole and on stable storage, or not there at all. Raises DiskFull and OSError; a file of the name stays then."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        with full_is_told(path):
            _write_new(temporary, content, disk)
            disk.rename(temporary, path)
            sync_directory(path.parent, disk)
    except DiskFull:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path, disk: Disk = DISK) -> None:
    """Names, too, must be made durable: a rename without this is lost with the power."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_new(path: Path, content: Iterable[bytes | memoryview], disk: Disk) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        offset = 0
        for pieces in _grouped(content):
            offset = write_all(disk, descriptor, pieces, offset)
        disk.fsync(descriptor)
    finally:
        os.close(descriptor)


def _grouped(content: Iterable[bytes | memoryview]) -> Iterator[list[bytes | memoryview]]:
    """Pieces that are made while they are written are not all in memory at once."""
    group, size = list[bytes | memoryview](), 0
    for piece in content:
        group.append(piece)
        size += len(piece)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
