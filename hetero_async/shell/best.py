"""Parameters that were measured: one safetensors file a publish, named after the record that it was handed out with."""

import re
from pathlib import Path

from hetero_async.errors import HeteroAsyncError
from hetero_async.shell.disk import DISK, Disk, fatal, fatal_unless_full, sync_directory, write_durably

NAME = re.compile(r"(\d+)-(\d+)\.safetensors")


class DirectoryBest:
    """A disk that fails otherwise than by being full ends the process."""

    def __init__(self, directory: Path, disk: Disk = DISK) -> None:
        self.directory = directory
        self._disk = disk

    def held(self) -> list[tuple[int, int]]:
        found = [NAME.fullmatch(path.name) for path in sorted(self.directory.glob("*.safetensors"))]
        return [(int(match[1]), int(match[2])) for match in found if match]

    def save(self, name: tuple[int, int], content: bytes) -> None:
        with fatal_unless_full(self.directory, self._disk):
            self.directory.mkdir(parents=True, exist_ok=True)
            sync_directory(self.directory.parent, self._disk)
            write_durably(self.path(*name), content, self._disk)

    def drop(self, name: tuple[int, int]) -> None:
        with fatal(self.directory, self._disk):
            self.path(*name).unlink(missing_ok=True)

    def path(self, term: int, lsn: int) -> Path:
        return self.directory / f"{term}-{lsn}.safetensors"

    def read(self, term: int, lsn: int) -> bytes:
        """Raises HeteroAsyncError where it is not held."""
        path = self.path(term, lsn)
        try:
            return path.read_bytes()
        except OSError as error:
            raise HeteroAsyncError(
                f"{path}: cannot be read ({error.strerror}): export it where the server was when it was measured"
            ) from None
