"""Where files lie: how fast a disk keeps what it is given, its room, and whether it is a disk of this host at all."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hetero_async.config import Node, RunConfig
from hetero_async.doctor.findings import Finding, failed, ok, warning

FSYNCS, FSYNC_BYTES = 40, 4096
# An acknowledgement waits for one of these, and so do all that are behind it.
FSYNC_SECONDS_MAX = 0.1
# Where nobody knows the model.
ROOM_BYTES_MIN = 10e9
MOUNTS = Path("/proc/self/mountinfo")
# The server of such a file system can lose what it has confirmed, and lock files lie.
OVER_A_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "glusterfs", "lustre", "beegfs", "afs")
FORGETFUL = ("tmpfs", "ramfs", "overlay")


def place(what: str, directory: Path, needed_bytes: float) -> Iterator[Finding]:
    """One directory that a process of the run writes to, or will make. `needed_bytes` 0: nobody knows."""
    subject = f"disk of {what}"
    directory = next(parent for parent in (directory, *directory.parents) if parent.exists())
    try:
        seconds = _fsyncs(directory)
        free = shutil.disk_usage(directory).free
    except OSError as error:
        yield failed(subject, f"{directory}: {error.strerror}; make it writable for this user")
        return
    kind = file_system(directory, MOUNTS.read_text() if MOUNTS.exists() else "")
    if kind in OVER_A_NETWORK or kind.startswith("fuse"):
        yield warning(
            subject, f"{directory} is on {kind}, over a network: it can lose what it confirmed; use a local disk"
        )
    elif kind in FORGETFUL:
        yield warning(subject, f"{directory} is on {kind}, which a restart empties; use a disk")
    middle, slow = 1000 * seconds[len(seconds) // 2], 1000 * seconds[int(0.99 * len(seconds))]
    told = f"{directory} ({kind or 'unknown'}): {FSYNCS} fsyncs, half within {middle:.1f} ms, p99 {slow:.1f} ms"
    if slow > 1000 * FSYNC_SECONDS_MAX:
        yield warning(subject, f"{told}: each acknowledgement waits for one; use a faster disk, or one with less to do")
    else:
        yield ok(subject, told)
    yield _room(subject, free, needed_bytes)


def _room(subject: str, free: int, needed_bytes: float) -> Finding:
    if free < needed_bytes:
        return failed(
            subject,
            f"{free / 1e9:.1f} GB free, needed {needed_bytes / 1e9:.1f}: make room, or lower checkpoint_every",
        )
    if not needed_bytes and free < ROOM_BYTES_MIN:
        return warning(subject, f"{free / 1e9:.1f} GB free; what the run needs says: hetero-async plan")
    return ok(subject, f"{free / 1e9:.1f} GB free" + (f", {needed_bytes / 1e9:.1f} GB needed" if needed_bytes else ""))


def _fsyncs(directory: Path) -> list[float]:
    """Seconds that each of some small appends took to become durable, in ascending order."""
    took = []
    with tempfile.TemporaryFile(dir=directory) as file:
        for _ in range(FSYNCS):
            began = time.perf_counter()
            os.write(file.fileno(), bytes(FSYNC_BYTES))
            os.fdatasync(file.fileno())
            took.append(time.perf_counter() - began)
    return sorted(took)


def file_system(directory: Path, mounts: str) -> str:
    """The kind of the file system that a directory is on, by Linux's mountinfo; "" where it does not say."""
    kinds: dict[Path, str] = {}
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        kinds[Path(before.split()[4].replace("\\040", " "))] = after.split()[0]
    path = directory.resolve()
    return next((kinds[parent] for parent in (path, *path.parents) if parent in kinds), "")


def parameters_of(config: RunConfig, node: Node) -> int:
    """As its newest checkpoint tells by its size; 0 where there is none."""
    sizes = [path.stat().st_size for path in sorted(node.checkpoints.glob("*/model.safetensors"))]
    vectors = 2 if config.training.rule == "sgd" else 3
    return sizes[-1] // (4 * vectors) if sizes else 0
