"""The run's history as its judge knows it: every record that some node has applied, and what follows from them.

There is one history. A takeover ends it where the new term begins: what an older term had beyond that is no part of it
any more, and a server that goes on with it is on a branch of its own. Nothing here asks the code under test.
"""

from dataclasses import dataclass, field

import torch
import xxhash

from hetero_async.core.records import Delta, Entry, Genesis, Joined, Left, Published, Record, Stepped

Key = tuple[str, int]  # worker, seq


@dataclass(frozen=True, slots=True)
class Chapter:
    """A record, its hash, and the shadow that the workers are given after it, where it made one."""

    lsn: int
    term: int
    record: Record
    digest: bytes
    shadow: torch.Tensor | None = None

    @staticmethod
    def of(entry: Entry, shadow: torch.Tensor) -> "Chapter":
        digest = xxhash.xxh3_128_digest(repr((entry.lsn, entry.term, entry.record)).encode() + entry.payload)
        is_seen = isinstance(entry.record, Genesis | Published)
        return Chapter(entry.lsn, entry.term, entry.record, digest, shadow.clone() if is_seen else None)


@dataclass(frozen=True, slots=True)
class Publish:
    term: int
    version: int
    shadow: torch.Tensor
    merged: dict[str, int]  # worker → up to which seq its deltas are in it


@dataclass(slots=True)
class Story:
    chapters: list[Chapter] = field(default_factory=list)  # by lsn − 1
    deltas: dict[Key, int] = field(default_factory=dict)  # → lsn
    takers: dict[int, Key] = field(default_factory=dict)  # position → the delta that counted it
    active: dict[str, bool] = field(default_factory=dict)
    version: int = 0
    publishes: list[Publish] = field(default_factory=list)
    given_up: dict[int, list[Publish]] = field(default_factory=dict)  # of histories that a takeover ended, by number

    @property
    def lsn(self) -> int:
        return len(self.chapters)

    @property
    def term(self) -> int:
        return self.chapters[-1].term if self.chapters else 0

    def at(self, lsn: int) -> Chapter | None:
        return self.chapters[lsn - 1] if 0 < lsn <= len(self.chapters) else None

    def has(self, lsn: int, term: int) -> bool:
        """Whether a log that ends with that record in that term is the beginning of this history; a longer one may
        become it. A term has one server, so its records are the same wherever they are."""
        chapter = self.at(lsn)
        return term >= self.term if chapter is None else chapter.term == term

    def append(self, chapter: Chapter) -> None:
        self.chapters.append(chapter)
        match chapter.record:
            case Joined() as joined:
                self.active[joined.worker] = True
            case Left() as left:
                self.active.pop(left.worker, None)
            case Delta() as delta:
                self.deltas[delta.worker, delta.seq] = chapter.lsn
                for start, stop in delta.ranges:
                    for position in range(start, stop):
                        self.takers.setdefault(position, (delta.worker, delta.seq))
            case Stepped():
                self.version += 1
            case Genesis():
                assert chapter.shadow is not None
                self.publishes.append(Publish(chapter.term, 0, chapter.shadow, {}))
            case Published() as published:
                assert chapter.shadow is not None
                self.publishes.append(Publish(chapter.term, self.version, chapter.shadow, dict(published.merged)))

    def cut(self, lsn: int) -> dict[Key, int]:
        """End it after that record. Returns the deltas that are no part of it any more."""
        kept, before, publishes = self.chapters[:lsn], self.deltas, self.publishes
        self.chapters, self.deltas, self.takers, self.active = [], {}, {}, {}
        self.version, self.publishes = 0, []
        for chapter in kept:
            self.append(chapter)
        for number in range(len(self.publishes), len(publishes)):
            self.given_up.setdefault(number, []).append(publishes[number])
        return {key: at for key, at in before.items() if key not in self.deltas}

    def give_up(self, chapter: Chapter) -> None:
        """A server whose reign has ended goes on, and workers that have heard of no other follow it."""
        if isinstance(chapter.record, Published):
            assert chapter.shadow is not None
            publish = Publish(chapter.term, chapter.record.version, chapter.shadow, dict(chapter.record.merged))
            self.given_up.setdefault(chapter.record.number, []).append(publish)

    def base(self, number: int, term: int) -> Publish:
        """The base of a delta from that publish of that term's server, or the last before it that is the run's."""
        return [publish for publish in self.publishes[: number + 1] if publish.term <= term][-1]

    def merged_in_vain(self, worker: str) -> int:
        """Up to which seq the worker may have let its deltas go, as merged by a server that was lost."""
        given_up = [publish for publishes in self.given_up.values() for publish in publishes]
        return max((publish.merged.get(worker, 0) for publish in given_up), default=0)

    def seen_as(self, number: int) -> list[Publish]:
        """What a worker that stands on this publish may have been given."""
        present = self.publishes[number : number + 1]
        return [*present, *self.given_up.get(number, ())]
