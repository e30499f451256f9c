"""A simulated disk that a script can look at, and break at a call of its choice. Used by scenario.py."""

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from hetero_async.sim.disk import SimulatedDisk


class NotingDisk(SimulatedDisk):
    """Asks before every call, by the call's name, and knows which one was the last."""

    def __init__(self, root: Path, random: Random) -> None:
        super().__init__(root, random)
        self.last_call = ""
        self.before: Callable[[str, str], None] = lambda name, path: None
        self.misdirected_bytes = 0  # so far before its place the next write to the log lands
        self.tear: Callable[[bytes], int | None] = lambda whole: None  # how much of an append arrives before the end

    def adopt(self) -> None:
        """What was put there by hand is durable."""
        self._adopt(self.root)

    def _ask(self, name: str, file: int | Path) -> None:
        self.last_call = name
        self.before(name, str(file) if isinstance(file, Path) else os.readlink(f"/proc/self/fd/{file}"))

    def write(self, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        self._ask("write", descriptor)
        if not os.readlink(f"/proc/self/fd/{descriptor}").endswith(".log"):
            return super().write(descriptor, buffers, offset)
        if (arriving := self.tear(b"".join(buffers))) is not None:
            os.pwrite(descriptor, b"".join(buffers)[:arriving], offset)
            self._die()
        astray, self.misdirected_bytes = self.misdirected_bytes, 0
        return super().write(descriptor, buffers, offset - astray)

    def fsync(self, descriptor: int) -> None:
        is_directory = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        self._ask("fsync of a directory" if is_directory else "fsync", descriptor)
        super().fsync(descriptor)

    def fallocate(self, descriptor: int, count: int) -> None:
        self._ask("fallocate", descriptor)
        super().fallocate(descriptor, count)

    def truncate(self, descriptor: int, count: int) -> None:
        self._ask("truncate", descriptor)
        super().truncate(descriptor, count)

    def rename(self, source: Path, target: Path) -> None:
        self._ask("rename", source)
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._ask("unlink", path)
        super().unlink(path)
