"""Deltas that are admitted and not merged yet: on a shelf outside memory, so that many workers need no more of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch

from hetero_async.formats.parts import pack_parts, unpack_parts
from hetero_async.tensors.buffers import Changes, Specs, buffers_in, without_buffers
from hetero_async.tensors.codecs import open_payload

ARRAY = "pending/"


class Shelf(Protocol):
    """Where payloads lie until their merge (shell/shelf.py)."""

    def put(self, content: bytes) -> object:
        """Where it lies now."""

    def look(self, place: object) -> bytes | bytearray:
        """Raises LogCorrupt where it is not what was put there."""

    def clear(self) -> None:
        """Nothing that was put there is needed any more."""


class InMemory:
    """A shelf for those who read a log once and go."""

    def put(self, content: bytes) -> object:
        return content

    def look(self, place: object) -> bytes | bytearray:
        assert isinstance(place, bytes)
        return place

    def clear(self) -> None:
        """It goes with whoever holds its place."""


@dataclass(frozen=True, slots=True)
class Pending:
    codec: str
    place: object  # of its payload, on the shelf
    samples: int


class PendingDeltas:
    """By the number of their record."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._by_lsn: dict[int, Pending] = {}

    def add(self, lsn: int, codec: str, payload: bytes, samples: int) -> None:
        self._by_lsn[lsn] = Pending(codec, self._shelf.put(payload), samples)

    def of(self, lsns: Sequence[int]) -> list[Pending]:
        return [self._by_lsn[lsn] for lsn in lsns]

    def opened(self, delta: Pending, specs: Specs, numel: int) -> tuple[torch.Tensor, Changes]:
        """Coded bytes and buffers. Raises PeerError."""
        payload = self._shelf.look(delta.place)
        return open_payload(delta.codec, without_buffers(specs, payload), numel), buffers_in(specs, payload)

    def drop(self, lsns: Sequence[int]) -> None:
        for lsn in lsns:
            del self._by_lsn[lsn]
        if not self._by_lsn:
            self._shelf.clear()

    def arrays(self) -> dict[str, numpy.ndarray]:
        """For a checkpoint."""
        return {f"{ARRAY}{lsn}": self._array(delta) for lsn, delta in self._by_lsn.items()}

    def _array(self, delta: Pending) -> numpy.ndarray:
        parts = delta.codec.encode(), self._shelf.look(delta.place), str(delta.samples).encode()
        return numpy.frombuffer(pack_parts(*parts), dtype=numpy.uint8)

    def load(self, arrays: Mapping[str, numpy.ndarray]) -> None:
        """In the place of what is here. Raises PeerError."""
        self._by_lsn.clear()
        self._shelf.clear()
        for lsn in sorted(int(name.removeprefix(ARRAY)) for name in arrays if name.startswith(ARRAY)):
            codec, payload, samples = unpack_parts(arrays[f"{ARRAY}{lsn}"].tobytes(), 3)
            self.add(lsn, bytes(codec).decode(), bytes(payload), int(bytes(samples)))
