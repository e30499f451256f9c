"""The lowest term that a standby follows, as a small file beside its log: fulfils ports.Promises."""

import json
from pathlib import Path

from hetero_async.errors import LogCorrupt
from hetero_async.shell.disk import DISK, Disk, fatal_unless_full, write_durably


class FilePromises:
    def __init__(self, path: Path, disk: Disk = DISK) -> None:
        self._path = path
        self._disk = disk

    def load(self) -> int:
        """Raises LogCorrupt when the file is not what was saved."""
        try:
            saved = json.loads(self._path.read_bytes())
            return int(saved["term"])
        except FileNotFoundError:
            return 0
        except (ValueError, TypeError, KeyError) as error:
            raise LogCorrupt(f'{self._path}: must be {{"term": NUMBER}}; it says whom a standby may follow') from error

    def save(self, term: int) -> None:
        with fatal_unless_full(self._path, self._disk):
            write_durably(self._path, json.dumps({"term": term}).encode(), self._disk)
