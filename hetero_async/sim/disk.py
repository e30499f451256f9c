"""A disk that forgets: real files, and beside them a book of what would be left of them if the power went now.

A file's bytes are durable as of its last fsync, a directory's names as of the directory's own. A power cut keeps, of
everything since, some: a directory is found as it was after any one of its changes, a file's sectors are each old or
new. Reads need no simulation: a cut writes what survived back to the directory.
"""

import errno
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NoReturn

from hetero_async.shell.disk import Disk
from hetero_async.sim.process import Killed, Process

SECTOR_BYTES = 512
SHORT_WRITE_CHANCE = 0.05


@dataclass(slots=True)
class Troubles:
    """What ails a disk at present."""

    is_full: bool = False
    slow_seconds: float = 0.0
    failing: str = ""  # the next call of this name fails with EIO
    die_in_calls: int = 0  # the process dies at that call from now; 0: it does not
    die_in_renames: int = 0


@dataclass(slots=True)
class Stored:
    """A file's bytes that are on the platter, and those that a failed fsync has made the kernel forget to write."""

    durable: bytes = b""
    given_up: bytes | None = None


@dataclass(slots=True)
class Directory:
    """Its names (→ inode) after every change since its last fsync; the first of them is durable."""

    states: list[dict[str, int]] = field(default_factory=list)


class SimulatedDisk(Disk):
    """One machine's disk. Outlives the processes that use it, one at a time."""

    def __init__(self, root: Path, random: Random) -> None:
        root.mkdir(parents=True)
        self.root = root
        self.troubles = Troubles()
        self.calls = 0
        self.process: Process | None = None
        self._random = random
        self._delay = 0.0
        self._files: dict[int, Stored] = {}
        self._directories: dict[int, Directory] = {}
        self._pins: dict[int, int] = {}  # inode → a descriptor, so that its number is not given to another file

    def close(self) -> None:
        for descriptor in self._pins.values():
            os.close(descriptor)
        self._pins.clear()

    def taken(self) -> float:
        """Seconds that the calls since the last question would have taken."""
        delay, self._delay = self._delay, 0.0
        return delay

    # --- the calls ---

    def write(self, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        whole = b"".join(buffers)
        if self._dies_now():
            os.pwrite(
                descriptor, whole[: self._random.choice([len(whole), self._random.randint(0, len(whole))])], offset
            )
            self._die()
        if self.troubles.is_full:
            # A disk fills up in the middle of a write, and says so with the next one.
            room = self._random.choice([0, 0, len(whole) // 2])
            if room:
                return os.pwrite(descriptor, whole[:room], offset)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._fail_if_due("write")
        if len(whole) > 1 and self._random.random() < SHORT_WRITE_CHANCE:
            whole = whole[: self._random.randint(1, len(whole) - 1)]
        return os.pwrite(descriptor, whole, offset)

    def fdatasync(self, descriptor: int) -> None:
        self.fsync(descriptor)

    def fsync(self, descriptor: int) -> None:
        if self._dies_now():
            self._die()
        self._delay += self.troubles.slow_seconds
        status = os.fstat(descriptor)
        if stat.S_ISDIR(status.st_mode):
            self._fail_if_due("fsync")
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            self._directories[status.st_ino] = Directory([self._names(path)])
        else:
            self._sync_file(descriptor, status.st_ino)

    def fallocate(self, descriptor: int, count: int) -> None:
        if self._dies_now():
            self._die()
        if self.troubles.is_full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().fallocate(descriptor, count)

    def truncate(self, descriptor: int, count: int) -> None:
        if self._dies_now():
            self._die()
        super().truncate(descriptor, count)

    def rename(self, source: Path, target: Path) -> None:
        self.troubles.die_in_renames -= self.troubles.die_in_renames > 0
        if self.troubles.die_in_renames == 1:
            self.troubles.die_in_renames, self.troubles.die_in_calls = 0, 1 + self._random.randint(1, 3)
        if self._dies_now():
            self._die()
        self._watch(source.parent)
        super().rename(source, target)
        self._watch(source.parent)

    def unlink(self, path: Path) -> None:
        if self._dies_now():
            self._die()
        self._watch(path.parent)
        super().unlink(path)
        self._watch(path.parent)

    def failed(self, path: Path, error: OSError) -> NoReturn:
        self._die()

    def _dies_now(self) -> bool:
        """Count the call. Raises Killed when the process is dead already."""
        if self.process is not None:
            self.process.check()
        self.calls += 1
        self.troubles.die_in_calls -= self.troubles.die_in_calls > 0
        if self.troubles.die_in_calls == 1:
            self.troubles.die_in_calls = 0
            return True
        return False

    def _die(self) -> NoReturn:
        if self.process is not None:
            self.process.kill()
        raise Killed

    def _fail_if_due(self, name: str) -> None:
        if self.troubles.failing == name:
            self.troubles.failing = ""
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    # --- the book ---

    def _sync_file(self, descriptor: int, inode: int) -> None:
        self._pin(inode, f"/proc/self/fd/{descriptor}")
        stored = self._files.setdefault(inode, Stored())
        live = _content(self._pins[inode])  # the caller's own may be for writing only
        if self.troubles.failing == "fsync":
            stored.given_up = live  # the kernel calls these pages clean now, and will never write them
            self._fail_if_due("fsync")
        if stored.given_up is None:
            stored.durable = live
        else:
            stored.durable = _without(live, stored.given_up, stored.durable)

    def _names(self, directory: Path) -> dict[str, int]:
        names = {}
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            names[entry.name] = entry.inode()
            self._pin(entry.inode(), entry.path)
        return names

    def _watch(self, path: Path) -> None:
        """Note how the directory looks, if it has changed."""
        directory = self._directories.setdefault(path.stat().st_ino, Directory([{}]))
        names = self._names(path)
        if directory.states[-1] != names:
            directory.states.append(names)

    def _pin(self, inode: int, path: str) -> None:
        if inode not in self._pins:
            self._pins[inode] = os.open(path, os.O_RDONLY)

    def is_durable(self, needle: bytes, directory: Path) -> bool:
        """Whether these bytes would be found in one of the directory's files after a power cut, whatever else is."""
        inodes = self.durable_names(directory).values()
        return any(needle in self._files[inode].durable for inode in inodes if inode in self._files)

    def durable_names(self, directory: Path) -> dict[str, int]:
        """The directory's names (→ inode) that are found after a power cut, however much of the rest is lost."""
        known = self._directories.get(directory.stat().st_ino) if directory.exists() else None
        first, *later = known.states if known else [{}]
        return {name: inode for name, inode in first.items() if all(state.get(name) == inode for state in later)}

    # --- disasters, while no process runs ---

    def cut_power(self) -> None:
        """Leave what survives, and forget everything else."""
        remains = self.root.with_name(f"{self.root.name}.remains")
        self._rebuild(self.root.stat().st_ino, self.root, remains)
        shutil.rmtree(self.root)
        remains.rename(self.root)
        self.close()
        self._files.clear()
        self._directories.clear()
        self._adopt(self.root)

    def _rebuild(self, inode: int, live: Path | None, target: Path) -> None:
        target.mkdir()
        known = self._directories.get(inode)
        states = known.states if known else [{}]
        if live is not None and live.is_dir() and live.stat().st_ino == inode:
            states = [*states, self._names(live)]
        for name, entry in self._random.choice([states[0], states[-1], self._random.choice(states)]).items():
            if stat.S_ISDIR(os.fstat(self._pins[entry]).st_mode):
                self._rebuild(entry, None if live is None else live / name, target / name)
            else:
                (target / name).write_bytes(self._surviving(entry))

    def _surviving(self, inode: int) -> bytes:
        stored = self._files.get(inode, Stored())
        live = _content(self._pins[inode])
        if stored.given_up is not None:
            live = _without(live, stored.given_up, stored.durable)
        fate = self._random.choice(["lost", "kept", "torn"])
        if fate == "lost" or live == stored.durable:
            return stored.durable
        return live if fate == "kept" else self._torn(stored.durable, live)

    def _torn(self, old: bytes, new: bytes) -> bytes:
        size = self._random.choice([len(old), len(new)])
        sectors = []
        for start in range(0, size, SECTOR_BYTES):
            source = self._random.choice([old, new])[start : min(start + SECTOR_BYTES, size)]
            sectors.append(source.ljust(min(SECTOR_BYTES, size - start), b"\0"))
        return b"".join(sectors)

    def _adopt(self, directory: Path) -> None:
        """All that is there now is durable."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self._pin(path.stat().st_ino, str(path))
                self._files[path.stat().st_ino] = Stored(path.read_bytes())
        for path in [directory, *(path for path in sorted(directory.rglob("*")) if path.is_dir())]:
            self._directories[path.stat().st_ino] = Directory([self._names(path)])

    def flip_bit(self, path: Path, before: int = 0) -> None:
        """A bit of the file, or of its first `before` bytes, is another one from now on, and after a power cut too."""
        content = path.read_bytes()
        at, bit = self._random.randrange(before or len(content)), 1 << self._random.randrange(8)
        path.write_bytes(_flipped(content, at, bit))
        if (stored := self._files.get(path.stat().st_ino)) is not None:
            stored.durable = _flipped(stored.durable, at, bit)


def _flipped(content: bytes, at: int, bit: int) -> bytes:
    return content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :] if at < len(content) else content


def _content(descriptor: int) -> bytes:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0)


def _without(live: bytes, given_up: bytes, durable: bytes) -> bytes:
    """`live`, but where it is still what was given up, the old bytes."""
    sectors = []
    for start in range(0, len(live), SECTOR_BYTES):
        sector = live[start : start + SECTOR_BYTES]
        is_lost = sector == given_up[start : start + SECTOR_BYTES]
        sectors.append(durable[start : start + len(sector)].ljust(len(sector), b"\0") if is_lost else sector)
    return b"".join(sectors)
