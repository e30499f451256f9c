"""What a run was like over time, in bounded room: the figures of the dashboard and of `report`.

Fed with a status a second, it keeps columns of time. When there are too many of them, two by two become one and each
lasts twice as long, so that a month takes the room of a day. It is a note on the side, like refusals.json: it holds
wall-clock times, changes no state and is replayed by nobody; what is lost of it is missed on a page.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from types import MappingProxyType
from typing import Annotated, Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

V = TypeVar("V")

COLUMNS_MAX = 480
RECENT_COLUMNS_MAX = 300
RECENT_STEP_SECONDS = 2
# Of all that grows with the run or its members; what is beyond is counted, or drawn in its site's lane only.
SITES_MAX = 64
LANES_MAX = 512
MARKS_MAX = 200
METRICS_MAX = 4
CAUSES_MAX = 32
STALENESS_MAX = 32
PENDING_MAX = 65_536
NAME_LENGTH_MAX = 240
OTHER = "others"
# Heartbeats come every second: silent for longer than a few, a worker is not known to train.
SILENT_SECONDS = 4.0

# What a worker was seen doing. ABSENT: not in the run, or gone with a bye; UNKNOWN: in it, as a standby knows it.
TRAINING, SENDING, WAITING, DEAD, UNKNOWN, ABSENT = "tswdu-"
STATES = TRAINING + SENDING + WAITING + DEAD + UNKNOWN
NOTHING = (0, 0)  # sent, received


def no_figures() -> dict[str, list[float]]:
    return {name: [] for name in FIGURES}


def last(values: Sequence[V]) -> V:
    return values[-1]


# How several looks, or several columns, become one. Counters grow; of what goes up and down the worst is kept.
FIGURES: dict[str, Callable[[Sequence[float]], float]] = {
    "looks": sum,
    "trained": last,
    "version": last,
    "acknowledged": last,
    "refused": last,
    "bytes_up": last,
    "bytes_down": last,
    "unreleased": max,  # records on this disk that an acknowledgement still waits for
    "standby_lag": max,  # records, of the standby that is furthest behind
    "is_serving": max,
    "memory_bytes": max,  # of the node's process, at its peak
    "disk_bytes": max,  # of log and checkpoints
}
COUNTED_BY_A_LIFE = ("refused", "bytes_up", "bytes_down")  # a server that is started again counts from nothing

Text = Annotated[str, Field(max_length=NAME_LENGTH_MAX)]


def together(letters: Sequence[str]) -> str:
    """One letter for several looks: a death stays to be seen, else the last one, as a sample of them."""
    return DEAD if DEAD in letters else letters[-1]


def added(shares: Sequence[list[int]]) -> list[int]:
    return [sum(share) for share in zip(*shares, strict=True)]


class Kept(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Series(Kept):
    """Columns of time: column i is the time from `slots[i]` · `step_seconds` on, in seconds since 1970.

    A slot in which nobody looked has no column. `sites`: how many workers were seen in each of STATES, summed over the
    column's looks; `carried`: what a site's workers had sent and received by then, in bytes; `lanes`: one letter a
    column for each worker.
    """

    step_seconds: Annotated[int, Field(ge=1)] = 1
    slots: list[int] = []
    figures: dict[str, list[float]] = Field(default_factory=no_figures)
    sites: dict[Text, list[list[int]]] = {}
    carried: dict[Text, list[list[int]]] = {}
    lanes: dict[Text, list[str]] = {}

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for name in FIGURES:
            self.figures.setdefault(name, [0.0] * len(self.slots))  # older software did not note it
        lines = self._lines()
        if self.figures.keys() != FIGURES.keys() or {len(line) for line in lines} - {len(self.slots)}:
            raise ValueError("its columns are not whole")
        if any(len(share) != len(STATES) for shares in self.sites.values() for share in shares):
            raise ValueError("its sites are not whole")
        if any(len(totals) != len(NOTHING) for carried in self.carried.values() for totals in carried):
            raise ValueError("what its sites carried is not whole")
        return self

    def _lines(self) -> list[list[Any]]:
        """All that has an entry for each column."""
        lines = (self.figures, self.sites, self.carried, self.lanes)
        return [self.slots, *(line for kind in lines for line in kind.values())]

    def add(
        self,
        seconds: float,
        figures: Mapping[str, float],
        doing: Iterable[tuple[str, str, str]],
        carried: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> None:
        """One look. `doing`: (site, worker, letter) of every worker. `carried`: by site, what its workers have sent and
        received in all."""
        slot = int(seconds // self.step_seconds)
        if self.slots and slot <= self.slots[-1]:  # also where the clock was set back
            for name, line in self.figures.items():
                line[-1] = FIGURES[name]((line[-1], figures[name]))
        else:
            self._open(slot, figures)
        before = len(self.slots) - 1
        for site, totals in carried.items():
            if site in self.carried or len(self.carried) < SITES_MAX:
                self.carried.setdefault(site, [[*NOTHING] for _ in self.slots])[before] = [*totals]
        for site, worker, letter in doing:
            if letter != ABSENT:
                self._share(site, before)[STATES.index(letter)] += 1
            if (lane := self.lanes.get(worker)) is not None:
                lane[before] = together((lane[before], letter))
            elif len(self.lanes) < LANES_MAX:
                self.lanes[worker] = [*(ABSENT for _ in range(before)), letter]

    def _open(self, slot: int, figures: Mapping[str, float]) -> None:
        """A new column at the end, in which nobody was seen yet."""
        self.slots.append(slot)
        for name, line in self.figures.items():
            line.append(figures[name])
        for shares in self.sites.values():
            shares.append([0] * len(STATES))
        for totals in self.carried.values():
            totals.append(totals[-1])
        for lane in self.lanes.values():
            lane.append(ABSENT)

    def _share(self, site: str, before: int) -> list[int]:
        if site not in self.sites and len(self.sites) >= SITES_MAX:
            site = OTHER
        if (shares := self.sites.get(site)) is None:
            shares = self.sites[site] = [[0] * len(STATES) for _ in range(before + 1)]
        return shares[before]

    def thin(self) -> None:
        """Columns that last twice as long."""
        self.step_seconds *= 2
        places = groupby(range(len(self.slots)), key=lambda place: self.slots[place] // 2)
        groups = [list(group) for _, group in places]
        self.slots = [slot // 2 for slot in self.slots]
        self._reduce(groups)

    def _reduce(self, groups: Sequence[Sequence[int]]) -> None:
        """Each group of places becomes one column."""

        def reduced(line: Sequence[V], one: Callable[[Sequence[V]], V]) -> list[V]:
            return [
                line[group[0]] if len(group) == 1 else one([line[place] for place in group]) for group in groups
            ]  # fmt: skip

        self.slots = reduced(self.slots, last)
        self.figures = {name: reduced(line, FIGURES[name]) for name, line in self.figures.items()}
        self.sites = {site: reduced(shares, added) for site, shares in self.sites.items()}
        self.carried = {site: reduced(totals, last) for site, totals in self.carried.items()}
        self.lanes = {worker: reduced(lane, together) for worker, lane in self.lanes.items()}

    def forget(self, most: int) -> None:
        """All but the newest columns, and whom none of them has."""
        if (over := len(self.slots) - most) <= 0:
            return
        for line in self._lines():
            del line[:over]
        self.lanes = {worker: lane for worker, lane in self.lanes.items() if lane.count(ABSENT) < most}

    def shown(self, since: int = 0) -> dict[str, Any]:
        """For the page: the columns from that place on; a lane is a string."""
        return {
            "step": self.step_seconds,
            "slots": self.slots[since:],
            "figures": {name: line[since:] for name, line in self.figures.items()},
            "sites": {site: shares[since:] for site, shares in self.sites.items()},
            "carried": {site: totals[since:] for site, totals in self.carried.items()},
            "lanes": {worker: "".join(lane[since:]) for worker, lane in self.lanes.items()},
        }


class Mark(Kept):
    """Something to be marked on the axis of time; `who`: a worker, a server, or nobody."""

    at: float
    kind: Text  # one of KINDS
    who: Text = ""
    site: Text = ""
    text: Text = ""


# What is left out first where there are too many marks.
KINDS = ("left", "back", "lost", "paused", "resumed", "started", "takeover", "finished")


class Point(Kept):
    """A figure that a worker measured: when it was heard of, and what the run had come to."""

    at: float
    version: int
    trained: int
    value: float


class History(Kept):
    """Everything of a run that is kept over time. Every list and mapping in it is bounded."""

    whole: Series = Field(default_factory=Series)
    losses: dict[Text, list[Point]] = {}
    marks: list[Mark] = []
    counts: dict[Text, int] = {}  # of all marks that there ever were, by their kind
    refusals: dict[Text, int] = {}  # cause → how many deltas, over all lives of the server
    staleness: dict[int, int] = {}  # versions → how many merged deltas
    traffic: dict[Text, tuple[int, int]] = {}  # worker → bytes that it sent and received, over all its lives
    began: dict[Text, float] = {}  # what a counter of COUNTED_BY_A_LIFE, or of a cause, had come to before this life
    heard: dict[Text, float] = {}  # its newest value in this life

    # --- what is heard ---

    def total(self, name: str, value: float) -> float:
        """Of a counter that begins at nothing with each life of the server."""
        if value < self.heard.get(name, 0.0):
            self.began[name] = self.began.get(name, 0.0) + self.heard[name]
        self.heard[name] = value
        return self.began.get(name, 0.0) + value

    def look(
        self,
        seconds: float,
        figures: Mapping[str, float],
        doing: Sequence[tuple[str, str, str]],
        carried: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> bool:
        """One look at the run. True: the columns are others than before."""
        self.whole.add(seconds, figures, doing, carried)
        if len(self.whole.slots) <= COLUMNS_MAX:
            return False
        self.whole.thin()
        for name, points in self.losses.items():
            by_slot = {self._slot(point.at): point for point in points}
            self.losses[name] = list(by_slot.values())
        return True

    def _slot(self, seconds: float) -> int:
        return int(seconds // self.whole.step_seconds)

    def measured(self, name: str, point: Point) -> None:
        """A column keeps the last one of each name."""
        if not math.isfinite(point.value) or (name not in self.losses and len(self.losses) >= METRICS_MAX):
            return
        points = self.losses.setdefault(name[:NAME_LENGTH_MAX], [])
        if points and (points[-1].version, points[-1].value) == (point.version, point.value):
            return  # a server that has just been started knows it from the log
        if points and self._slot(points[-1].at) >= self._slot(point.at):
            points.pop()
        points.append(point)

    def mark(self, mark: Mark) -> None:
        self.counts[mark.kind] = self.counts.get(mark.kind, 0) + 1
        self.marks.append(mark)
        if len(self.marks) > MARKS_MAX:
            self.marks.remove(min(self.marks, key=lambda mark: (KINDS.index(mark.kind), mark.at)))

    def refused(self, causes: Mapping[str, int]) -> None:
        for cause, count in causes.items():
            if cause in self.refusals or len(self.refusals) < CAUSES_MAX:
                self.refusals[cause] = int(self.total(f"refused: {cause}", count))

    def heard_of(self, worker: str, sent: int, received: int) -> None:
        """Its own counts, which begin at nothing with each of its lives; 0 before it was heard."""
        if sent and (worker in self.traffic or len(self.traffic) < LANES_MAX):
            totals = self.total(f"up: {worker}", sent), self.total(f"down: {worker}", received)
            self.traffic[worker] = (int(totals[0]), int(totals[1]))

    def merged(self, staleness: int) -> None:
        """One delta, so many versions old when it was merged; the last place is for all beyond."""
        place = min(staleness, STALENESS_MAX)
        self.staleness[place] = self.staleness.get(place, 0) + 1

    # --- for the page ---

    def shown(self) -> dict[str, Any]:
        """All but the columns, JSON-able."""
        return self.model_dump(include={"losses", "marks", "counts", "refusals"}) | {
            "staleness": sorted(self.staleness.items())
        }
