"""Where the payloads of deltas lie between their admission and their merge: a file without a name, not memory.

So what a server holds does not grow with the number of its workers. They are in the log for good; the file is gone with
the process, and is emptied at each merge, mostly before the kernel has written any of it to the disk.
"""

import contextlib
import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import xxhash

from hetero_async.errors import LogCorrupt

# What is smaller stays in memory: two calls of the system would cost more.
SHELVED_BYTES_MIN = 64 * 1024


@dataclass(frozen=True, slots=True)
class Place:
    offset: int
    size: int
    digest: bytes


class FileShelf:
    """Fulfils tensors.pending.Shelf. `look` may be called from several threads at once."""

    def __init__(self, directory: Path) -> None:
        self._file, path = tempfile.mkstemp(prefix="pending-", dir=directory)
        os.unlink(path)
        weakref.finalize(self, os.close, self._file)
        self._end = 0

    def put(self, content: bytes) -> object:
        """Where it lies now. On a disk that takes no more it stays in memory."""
        if len(content) < SHELVED_BYTES_MIN:
            return content
        with contextlib.suppress(OSError):
            place = Place(self._end, len(content), xxhash.xxh3_128_digest(content))
            rest = memoryview(content)
            while rest:
                rest = rest[os.pwrite(self._file, rest, place.offset + place.size - len(rest)) :]
            self._end += place.size
            return place
        return content

    def look(self, place: object) -> bytes | bytearray:
        """Raises LogCorrupt where it is not what was put there."""
        if isinstance(place, bytes):
            return place
        assert isinstance(place, Place)
        content = bytearray(place.size)
        filled = 0
        while filled < place.size and (
            count := os.preadv(self._file, [memoryview(content)[filled:]], place.offset + filled)
        ):
            filled += count
        if xxhash.xxh3_128_digest(content) != place.digest:
            raise LogCorrupt("a delta that was put aside until its merge was read back as another: start anew")
        return content

    def clear(self) -> None:
        """Nothing that was put there is needed any more."""
        self._end = 0
        with contextlib.suppress(OSError):  # the space is used again all the same
            os.ftruncate(self._file, 0)
