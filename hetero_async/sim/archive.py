"""An archive that is away now and then: before it has taken an object, or when it was to say that it has."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random

from hetero_async.errors import ArchiveAway, ArchiveConflict
from hetero_async.ports import Archived, Held
from hetero_async.shell.holdings import DirectoryHoldings

AWAY = 0.2  # share of the calls


class SimulatedArchive:
    """Fulfils ports.Archive."""

    def __init__(self, random: Random) -> None:
        self.is_well = False  # from then on every call succeeds
        self._random = random
        self._objects: dict[str, bytes] = {}

    def put_new(self, name: str, content: bytes) -> None:
        self._may_be_away()
        if self._objects.setdefault(name, content) != content:
            raise ArchiveConflict(f"{name} is there already, with other content")
        self._may_be_away()

    def list(self, run: str = "") -> Mapping[str, Archived]:
        self._may_be_away()
        return {
            name: Archived(size_bytes=len(content), stored_at=0.0)
            for name, content in self._objects.items()
            if name.startswith(run)
        }

    def get(self, name: str) -> bytes:
        self._may_be_away()
        if name not in self._objects:
            raise FileNotFoundError(name)
        return self._objects[name]

    def _may_be_away(self) -> None:
        if not self.is_well and self._random.random() < AWAY / 2:
            raise ArchiveAway("no answer")


class HoldingsInMemory(DirectoryHoldings):
    """Hands out what needs no closing: a simulated process that dies leaves its files open."""

    def segment_after(self, lsn: int, with_open: bool) -> Held | None:
        held = super().segment_after(lsn, with_open)
        return None if held is None else _in_memory(held)

    def checkpoint_after(self, lsn: int) -> Sequence[Held]:
        return [*map(_in_memory, super().checkpoint_after(lsn))]


def _in_memory(held: Held) -> Held:
    with held.file:
        held.file.seek(0)
        return replace(held, file=io.BytesIO(held.file.read()))
