"""Integers in the place of tensors, for test_cluster.py: a merge mixes them so that a wrong order shows."""

import hashlib
from dataclasses import dataclass, field

from hetero_async.core.records import Delta, Entry, Genesis, Published, Stepped

MERSENNE = (1 << 61) - 1


def coded(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest())


@dataclass(slots=True)
class Numbers:
    """A model of one integer."""

    theta: int = 0
    shadow: int = 0
    deltas: dict[int, int] = field(default_factory=dict)
    publishes: dict[int, tuple[int, dict[str, int], int]] = field(default_factory=dict)  # move, merged, shadow after

    def apply(self, entry: Entry) -> None:
        match entry.record:
            case Genesis():
                self.theta = self.shadow = int.from_bytes(entry.payload)
            case Delta():
                self.deltas[entry.lsn] = int.from_bytes(entry.payload)
            case Stepped() as stepped:
                for lsn in stepped.deltas:
                    self.theta = (self.theta * 31 + self.deltas.pop(lsn)) % MERSENNE
            case Published() as published:
                move, self.shadow = self.theta - self.shadow, self.theta
                self.publishes[published.number] = (move, dict(published.merged), self.shadow)
