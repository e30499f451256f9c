"""Who may train on which sample: leased ∪ free ∪ trained = all, and no two of them meet.

A run has so many positions to train on, and a *book* for each set of samples that it may train on them with: one that
all sites share, one for each site whose data must stay there, one for streams, whose samples only their worker sees.
The n-th book to be opened has the positions n·2⁴⁴ … n·2⁴⁴ + positions−1, `samples` of them to a pass; `sample_at`
shuffles each pass by a keyed bijection, so that no table is kept and every worker computes the same order. Positions
move free → leased → trained, or back from leased to free when their worker leaves without reporting them; of all
books together no more are leased and trained than the run has. Called by State.fold only; admission reads it.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from hetero_async.core import ranges
from hetero_async.core.ranges import Ranges

MASK = (1 << 64) - 1
# The most a worker is leased at once, in positions: bounds what one silent worker can hold back.
LEASE_POSITIONS_MAX = 1 << 20
# Positions of each book: no run has so many, and there is room for 2¹⁹ books below 2⁶³.
BOOK_POSITIONS = 1 << 44
# What a worker trains on; `SHARED` and `STREAM` are books, and each site has a private one.
SHARED, PRIVATE, STREAM = "shared", "private", "stream"
FEISTEL_ROUNDS = 4  # Luby & Rackoff 1988: four rounds of a good mixing function are a strong permutation


@dataclass(slots=True)
class Book:
    first: int
    samples: int


@dataclass(slots=True)
class Ledger:
    positions: int = 0
    books: dict[str, Book] = field(default_factory=dict)
    free: Ranges = ()
    trained: Ranges = ()
    leased: dict[str, Ranges] = field(default_factory=dict)

    def open(self, book: str, samples: int, positions: int) -> None:
        assert book not in self.books, "a book is opened once"
        assert samples > 0 and 0 < positions <= BOOK_POSITIONS
        assert self.positions in (0, positions), "all books have the run's positions"
        self.positions = positions
        self.books[book] = Book(len(self.books) * BOOK_POSITIONS, samples)
        self.free = ranges.union(self.free, self.all_of(book))

    def all_of(self, book: str) -> Ranges:
        opened = self.books.get(book)
        return ((opened.first, opened.first + self.positions),) if opened else ()

    @property
    def room(self) -> int:
        """How many more positions may be leased: the run has no more than that, whatever book they are taken from."""
        return self.positions - sum(ranges.size(taken) for taken in (self.trained, *self.leased.values()))

    def free_of(self, book: str) -> Ranges:
        """What may be leased of it."""
        return ranges.take(ranges.intersection(self.free, self.all_of(book)), self.room)[0]

    def held(self, worker: str) -> Ranges:
        return self.leased.get(worker, ())

    def claimable(self, worker: str, claims: Ranges, books: Iterable[str]) -> Ranges:
        """What of its claims a worker may keep: what it holds, and what is free in these books."""
        mine = ranges.intersection(claims, self.held(worker))
        open_ = ranges.normal(stretch for book in books for stretch in self.all_of(book))
        free = ranges.intersection(claims, ranges.intersection(self.free, open_))
        return ranges.union(mine, ranges.take(free, self.room)[0])

    def lease(self, worker: str, wanted: Ranges) -> None:
        assert ranges.contains(self.free, wanted), "only free positions are leased"
        assert ranges.size(wanted) <= self.room, "no more is leased than the run has to train on"
        self.free = ranges.difference(self.free, wanted)
        self.leased[worker] = ranges.union(self.held(worker), wanted)

    def lease_size(self, wanted: int, batch: int, share: float) -> int:
        """What was asked for, but near the end no more than a fair share, so that nobody slow holds the last samples.

        Guided self-scheduling (Polychronopoulos & Kuck 1987): at most half of what is the worker's share of the rest.
        """
        fair = int(share * self.room / 2)
        return max(1, min(wanted, max(batch, fair // batch * batch), LEASE_POSITIONS_MAX))

    def release(self, worker: str, kept: Ranges = ()) -> None:
        """Return what the worker holds to the pool, all but `kept`."""
        held = self.held(worker)
        assert ranges.contains(held, kept), "a worker keeps only what it holds"
        self.free = ranges.union(self.free, ranges.difference(held, kept))
        self._hold(worker, kept)

    def train(self, worker: str, consumed: Ranges) -> None:
        held = self.held(worker)
        assert ranges.contains(held, consumed), "only leased positions are trained"
        assert not ranges.intersection(self.trained, consumed), "no position is trained twice"
        self.trained = ranges.union(self.trained, consumed)
        self._hold(worker, ranges.difference(held, consumed))

    def is_exact(self) -> bool:
        """Leased ∪ free ∪ trained = all, each position in exactly one of them, and no more taken than the run has."""
        parts = [self.free, self.trained, *self.leased.values()]
        whole = ranges.normal(stretch for part in parts for stretch in part)
        everything = ranges.normal(stretch for book in self.books for stretch in self.all_of(book))
        return sum(map(ranges.size, parts)) == ranges.size(whole) and whole == everything and self.room >= 0

    def _hold(self, worker: str, held: Ranges) -> None:
        if held:
            self.leased[worker] = held
        else:
            self.leased.pop(worker, None)


def book_of(data: str, site: str) -> str:
    """The book that a worker of that site leases from."""
    return f"{PRIVATE} {site}" if data == PRIVATE else data


def sample_at(position: int, samples: int, seed: int) -> int:
    """The sample number at a position of a book: a permutation of 0 … samples−1 in every pass, another one each pass.

    A Feistel network over the smallest even number of bits that holds `samples`, walked until it falls inside
    (Black & Rogaway 2002, "cycle walking"): fewer than four walks on average.
    """
    run_pass, index = divmod(position % BOOK_POSITIONS, samples)
    half = max(1, ((samples - 1).bit_length() + 1) // 2)
    key = _mix(seed ^ _mix(run_pass + 1))
    while True:
        index = _feistel(index, half, key)
        if index < samples:
            return index


def _feistel(value: int, half: int, key: int) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for number in range(FEISTEL_ROUNDS):
        left, right = right, left ^ (_mix(right ^ _mix(key + number)) & mask)
    return left << half | right


def _mix(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & MASK
    return value ^ value >> 31
