"""Real file systems of a few megabytes, for one test each: filled up, shut down as by a power cut, mounted again, gone.

The power goes by the file system's own ioctl: from then on every call fails with EIO, and nothing of what is in memory
reaches the image any more. Where root, a loop device or a program is missing, the test is skipped and says so.
"""

import array
import errno
import fcntl
import os
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from types import TracebackType

import pytest

FS_IOC_SHUTDOWN = 0x8004587D
# What the journal holds may still be written, or nothing at all. The first leaves names and sizes without their bytes.
JOURNAL_ONLY, NOTHING_MORE = 1, 2
# XFS makes nothing smaller than 300 MiB; the image is sparse.
MEBIBYTES = {"ext4": 16, "xfs": 300, "tmpfs": 4}
# No commit by the clock: what is found after the cut is there because somebody asked for it.
OPTIONS = {"ext4": "loop,commit=600", "xfs": "loop", "tmpfs": "size=4m"}
UNMOUNT_SECONDS = 30.0
BALLAST_BLOCK = bytes(64 * 1024)


class Volume:
    """Mounted at `path`; leaving it unmounts it."""

    def __init__(self, kind: str, directory: Path, options: str = "") -> None:
        self.kind = kind
        self.path = directory / "mounted"
        self.path.mkdir(parents=True)
        self._image = directory / "image"
        self._options = ",".join(filter(None, (OPTIONS[kind], options)))
        self._is_mounted = False
        self._ballast = self.path / "ballast"

    def __enter__(self) -> "Volume":
        if self.kind != "tmpfs":
            with self._image.open("wb") as image:
                image.truncate(MEBIBYTES[self.kind] << 20)
            call(f"mkfs.{self.kind}", "-q", str(self._image))
        self.mount()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            self.unmount()
        finally:
            if self._is_mounted:  # nothing of a failed test shall stay behind
                call("umount", "--lazy", str(self.path))
            self._image.unlink(missing_ok=True)

    def mount(self) -> None:
        source = "none" if self.kind == "tmpfs" else str(self._image)
        call("mount", "-t", self.kind, "-o", self._options, source, str(self.path))
        self._is_mounted = True

    def unmount(self) -> None:
        """Waits for the last process that still dies with a file open."""
        deadline = time.monotonic() + UNMOUNT_SECONDS
        while self._is_mounted and (said := attempt("umount", str(self.path))):
            assert time.monotonic() < deadline, said
            time.sleep(0.01)
        self._is_mounted = False

    def cut_power(self, leaving: int = NOTHING_MORE) -> None:
        root = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(root, FS_IOC_SHUTDOWN, array.array("I", [leaving]))
        finally:
            os.close(root)

    def power_on(self) -> None:
        self.unmount()
        self.mount()

    def remount(self, options: str) -> None:
        call("mount", "-o", f"remount,{options}", str(self.path))

    def find_error(self) -> None:
        """ext4 behaves as if it had come upon a fault in its own structures."""
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        [device] = [source for source, target, *_ in mounts if target == str(self.path)]
        Path("/sys/fs/ext4", Path(device).name, "trigger_fs_error").write_text("1")

    def fill(self, leaving_bytes: int = 0) -> None:
        """Take all space but so much."""
        descriptor = os.open(self._ballast, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        block = BALLAST_BLOCK
        try:
            while block:
                try:
                    os.write(descriptor, block)
                except OSError as error:
                    if error.errno != errno.ENOSPC:
                        raise
                    block = block[: len(block) // 2]
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - leaving_bytes)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def free(self) -> None:
        self._ballast.unlink()


def volume(kind: str, directory: Path, options: str = "") -> Volume:
    """A volume of that kind, or a skipped test."""
    if reason := why_not(kind):
        pytest.skip(reason)
    return Volume(kind, directory, options)


@cache
def why_not(kind: str) -> str:
    """Tries it once: what this machine lacks to make such a volume; "" for nothing."""
    if os.geteuid() != 0:
        return f"only root can mount {kind}"
    needed = {"mount", "umount"} | ({f"mkfs.{kind}"} if kind != "tmpfs" else set())
    if lacking := sorted(program for program in needed if shutil.which(program) is None):
        return f"{', '.join(lacking)} is not installed"
    with tempfile.TemporaryDirectory() as directory:
        try:
            with Volume(kind, Path(directory)):
                return ""
        except subprocess.CalledProcessError as error:
            return f"{kind} cannot be mounted here: {error.stderr.strip()}"


def attempt(*words: str) -> str:
    """What a command complained of; "" when it did what it should."""
    said = subprocess.run(words, capture_output=True, text=True, check=False)
    return "" if said.returncode == 0 else f"{words[0]}: {said.stderr.strip()}"


def call(*words: str) -> None:
    subprocess.run(words, capture_output=True, text=True, check=True)
