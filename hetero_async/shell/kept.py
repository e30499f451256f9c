"""One file that a process keeps for its next life: whole, checked, and replaced as one."""

import os
from pathlib import Path

import xxhash

from hetero_async.errors import PeerError
from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.shell.disk import DISK, Disk, failure_is_told, write_durably


class KeptFile:
    """Every method raises HeteroAsyncError when the disk fails."""

    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self.path = path
        self._disk = disk

    def save(self, content: bytes) -> None:
        """Durable on return. Raises DiskFull; what was kept before stays then."""
        with failure_is_told(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(self.path, pack_parts(xxhash.xxh3_128_digest(content), content), self._disk)

    def load(self) -> bytes | None:
        """What was kept, if anything was. A damaged file is set aside."""
        with failure_is_told(self.path):
            if not self.path.exists():
                return None
            try:
                digest, content = (bytes(part) for part in unpack_parts(self.path.read_bytes(), 2))
                if xxhash.xxh3_128_digest(content) != digest:
                    raise PeerError(f"{self.path.name} is not what was kept")
            except PeerError:
                os.replace(self.path, self.path.with_suffix(".damaged"))
                return None
            return content
