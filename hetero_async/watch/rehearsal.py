"""Windows rehearsed: what comes of deadlines, rounds and two queues at each link, played through in virtual time.

Where pushes and publishes are under way at once, each waits for the other, and who is late in one window is so because
of the last one. No formula says how often; so for policy `window` timing.py asks this: the server's merges
(core/merging.py, pace.py), the loop's cuts (desk.py), and links that carry one object after another. Sizes and delays
are all it knows of tensors. What is random about real steps comes of a fixed seed, so a plan is the same each time.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean

from hetero_async.desk import ANSWERS_KEPT

# Windows that pass before it is counted, and that are.
BEFORE, COUNTED = 30, 120
# So many deltas at most: with many workers fewer windows tell as much.
DELTAS_MAX = 6_000
COUNTED_MIN = 40
# At most so many pass while a delta goes up and a publish comes down: of more, the rest find nothing new.
A_TURN = 20
# But where some get through, windows are at most so many times as long for the others: these bring nothing, then.
SLOWER_MAX = 100
# A step takes so much more or less than its mean.
JITTER = 0.1
# Where little decides who is late, a link a little faster or slower makes another run of it: the mean is expected.
LOADS = (0.85, 0.925, 1.0, 1.075, 1.15)
NEVER = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A site as it is played, in seconds."""

    workers: int
    step: float
    steps: int  # H
    delay: float  # one way
    up: float  # its link is taken so long by a delta
    down: float  # by a publish
    push: float  # a delta takes so much longer, whatever else the link carries
    receive: float  # a publish


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is the same for all sites; seconds."""

    window: float
    grace: float
    publish_every: int
    stretch: int
    slots: int  # uploads that the server takes at once
    up: float  # the server's own link is taken so long by a publish
    down: float  # by a delta
    inspect: float  # the server's time for a delta at its admission
    held: int  # publishes; for whoever lacks more there is a snapshot
    snapshot: float  # its size, in publishes


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Per site, in their order. Rates are per second, times seconds; infinite where nothing came."""

    merges: float
    deltas: tuple[float, ...]
    staleness: tuple[float, ...]
    training: tuple[float, ...]  # share of the workers' time
    answer: tuple[float, ...]
    receive: tuple[float, ...]


@dataclass(slots=True)
class _Worker:
    site: int
    deadline: float = NEVER
    is_overdue: bool = False
    began: float = 0.0  # its round, and a step
    is_busy: bool = False  # a push is not answered
    cut_at: float = 0.0
    foreseen: int = 0  # of several cuts that were foreseen the last one counts
    anchor: int = 0  # its push's, as a publish's number
    publish: int = 0  # number of the newest that has come
    is_fetching: bool = False
    pending: list[int] = field(default_factory=list)  # anchors of its deltas that wait for a merge
    answers: deque[float] = field(default_factory=lambda: deque(maxlen=ANSWERS_KEPT))


class _Link:
    """One way of it: an object comes when those before it have."""

    def __init__(self) -> None:
        self._free = 0.0

    def carried(self, now: float, seconds: float) -> float:
        """When the last of it has left."""
        self._free = max(now, self._free) + seconds
        return self._free


class _Rehearsal:
    def __init__(self, sites: Sequence[Stage], scene: Scene) -> None:
        self.sites, self.scene, self.free_slots = sites, scene, scene.slots
        self.chance = random.Random(0)
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.happened = self.version = 0
        self.now, self.merge_at = 0.0, NEVER
        self.published_at = [0.0]  # by number
        self.up, self.down = [_Link() for _ in sites], [_Link() for _ in sites]
        self.server_up, self.server_down, self.inspecting = _Link(), _Link(), _Link()
        self.queue: deque[_Worker] = deque()  # deltas that are offered, until there is a slot
        self.workers = [_Worker(place) for place, site in enumerate(sites) for _ in range(site.workers)]
        self.lacking = len(self.workers)  # those of whom no delta waits for the merge
        self.forget()
        for worker in self.workers:
            worker.began = -self.sites[worker.site].step * self.chance.random()
        self.at(0.0, self.window_ends)

    def forget(self) -> None:
        """Count from here on."""
        self.merges = 0
        self.ages: list[list[int]] = [[] for _ in self.sites]
        self.waited = [0.0] * len(self.sites)
        self.forgotten_at = self.now
        self.answers: list[list[float]] = [[] for _ in self.sites]
        self.received: list[list[float]] = [[] for _ in self.sites]

    def at(self, when: float, event: Callable[[], None]) -> None:
        self.happened += 1
        heapq.heappush(self.events, (when, self.happened, event))

    def after(self, seconds: float, event: Callable[[], None]) -> None:
        self.at(self.now + seconds, event)

    def play(self, until: float) -> None:
        while self.events and self.events[0][0] <= until:
            self.now, _, event = heapq.heappop(self.events)
            event()
        self.now = until

    # --- the loop ---

    def foresee(self, worker: _Worker) -> None:
        """When it will cut, as far as is known now: at a step's end, and not before its last push is answered."""
        worker.foreseen += 1
        if worker.is_busy:
            return
        site = self.sites[worker.site]
        if worker.is_overdue:
            due = self.now
        elif worker.deadline < NEVER:
            due = min(self.limit(worker), worker.deadline - site.step - min(worker.answers, default=0.0))
        else:
            due = worker.began + site.steps * site.step
        steps = max(1, math.ceil((max(due, self.now) - worker.began) / site.step))
        self.at(worker.began + steps * site.step, partial(self.cut, worker, worker.foreseen))

    def limit(self, worker: _Worker) -> float:
        """When it has stretched its round as far as it may."""
        site = self.sites[worker.site]
        return worker.began + self.scene.stretch * site.steps * site.step

    def cut(self, worker: _Worker, foreseen: int) -> None:
        if foreseen != worker.foreseen:
            return
        worker.is_busy, worker.cut_at, worker.anchor = True, self.now, worker.publish
        worker.began = self.now + self.chance.uniform(-JITTER, JITTER) * self.sites[worker.site].step
        if worker.is_overdue:
            worker.is_overdue = False
        else:
            worker.deadline = NEVER
        self.sent_up(worker, 0.0, 0.0, partial(self.offered, worker))

    # --- links ---

    def sent_up(self, worker: _Worker, seconds: float, servers: float, then: Callable[[], None]) -> None:
        ended = max(self.up[worker.site].carried(self.now, seconds), self.server_down.carried(self.now, servers))
        self.at(ended + self.sites[worker.site].delay, then)

    def sent_down(self, worker: _Worker, seconds: float, servers: float, then: Callable[[], None]) -> None:
        ended = max(self.down[worker.site].carried(self.now, seconds), self.server_up.carried(self.now, servers))
        self.at(ended + self.sites[worker.site].delay, then)

    # --- the server ---

    def window_ends(self) -> None:
        self.merge_at = self.now + self.scene.grace
        self.at(self.merge_at, self.grace_ends)
        self.after(self.scene.window, self.window_ends)
        for worker in self.workers:
            self.after(self.sites[worker.site].delay, partial(self.told, worker))

    def told(self, worker: _Worker) -> None:
        """Of the next deadline; it counts from when it is heard."""
        worker.is_overdue |= worker.deadline < NEVER
        worker.deadline = self.now + self.scene.window
        self.foresee(worker)

    def grace_ends(self) -> None:
        if self.now >= self.merge_at:
            self.merge_at = NEVER
            self.merge()

    def offered(self, worker: _Worker) -> None:
        self.queue.append(worker)
        self.want()

    def want(self) -> None:
        while self.queue and self.free_slots:
            self.free_slots -= 1
            worker = self.queue.popleft()
            self.after(self.sites[worker.site].delay, partial(self.wanted, worker))

    def wanted(self, worker: _Worker) -> None:
        site = self.sites[worker.site]
        self.sent_up(worker, site.up, self.scene.down, partial(self.after, site.push, partial(self.arrived, worker)))

    def arrived(self, worker: _Worker) -> None:
        self.free_slots += 1
        self.want()
        self.at(self.inspecting.carried(self.now, self.scene.inspect), partial(self.admitted, worker))

    def admitted(self, worker: _Worker) -> None:
        self.lacking -= not worker.pending
        worker.pending.append(worker.anchor)
        self.after(self.sites[worker.site].delay, partial(self.answered, worker))
        if not self.lacking:
            self.merge_at = NEVER
            self.merge()

    def answered(self, worker: _Worker) -> None:
        worker.answers.append(self.now - worker.cut_at)
        self.answers[worker.site].append(self.now - worker.cut_at)
        worker.is_busy = False
        if self.note_wait(worker):
            worker.began, worker.is_overdue = self.now, True
        self.foresee(worker)

    def note_wait(self, worker: _Worker) -> bool:
        """For an answer, beyond the longest round; whether it has waited at all."""
        waited = max(0.0, self.now - max(self.limit(worker), self.forgotten_at))
        self.waited[worker.site] += waited
        return waited > 0

    def merge(self) -> None:
        merged = [worker for worker in self.workers if worker.pending]
        if not merged:
            return
        self.lacking = len(self.workers)
        self.version += 1
        self.merges += 1
        for worker in merged:
            versions = (anchor * self.scene.publish_every for anchor in worker.pending)
            self.ages[worker.site] += [self.version - 1 - version for version in versions]
            worker.pending.clear()
        if self.version % self.scene.publish_every == 0:
            self.published_at.append(self.now)
            for worker in self.workers:
                self.after(self.sites[worker.site].delay, partial(self.fetch, worker))

    def fetch(self, worker: _Worker) -> None:
        """A worker asks for the publish behind its own, if there is one and none is on its way; for a snapshot where
        the server does not hold it any more."""
        number, newest = worker.publish + 1, len(self.published_at) - 1
        if worker.is_fetching or number > newest:
            return
        site, worker.is_fetching = self.sites[worker.site], True
        size = 1.0
        if newest - number >= self.scene.held:
            number, size = newest, self.scene.snapshot

        def taken_over() -> None:
            worker.publish, worker.is_fetching = number, False
            self.received[worker.site].append(self.now - self.published_at[number])
            self.fetch(worker)

        def came() -> None:
            self.after(site.receive, taken_over)

        def asked() -> None:
            self.sent_down(worker, size * site.down, size * self.scene.up, came)

        self.after(site.delay, asked)


def played(sites: Sequence[Stage], scene: Scene) -> Played:
    """What is to be expected. No site's workers, no step and no window may be 0."""
    found = [
        _played([replace(site, up=site.up * much, down=site.down * much) for site in sites], scene) for much in LOADS
    ]
    return Played(
        merges=fmean(one.merges for one in found),
        deltas=_means([one.deltas for one in found]),
        staleness=_means([one.staleness for one in found]),
        training=_means([one.training for one in found]),
        answer=_means([one.answer for one in found]),
        receive=_means([one.receive for one in found]),
    )


def _means(found: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """By site."""
    return tuple(map(fmean, zip(*found, strict=True)))


def _played(sites: Sequence[Stage], scene: Scene) -> Played:
    window = _window(sites, scene)
    scene = replace(scene, window=window, grace=scene.grace * window / scene.window)
    rehearsal = _Rehearsal(sites, scene)
    counted = max(COUNTED_MIN, min(COUNTED, DELTAS_MAX // len(rehearsal.workers)))
    rehearsal.play(min(BEFORE, counted) * scene.window)
    rehearsal.forget()
    rehearsal.play(rehearsal.now + counted * scene.window)
    for worker in rehearsal.workers:
        if worker.is_busy:
            rehearsal.note_wait(worker)
    seconds = counted * scene.window
    waited = zip(rehearsal.waited, sites, strict=True)
    return Played(
        merges=rehearsal.merges / seconds,
        deltas=tuple(len(ages) / seconds for ages in rehearsal.ages),
        staleness=tuple(_mean(ages) for ages in rehearsal.ages),
        training=tuple(max(0.0, 1 - waiting / (seconds * site.workers)) for waiting, site in waited),
        answer=tuple(_mean(answers) for answers in rehearsal.answers),
        receive=tuple(_mean(received) for received in rehearsal.received),
    )


def _window(sites: Sequence[Stage], scene: Scene) -> float:
    """As it is, or as long as it must be for deltas and publishes to get through within A_TURN of them."""
    alone = [site.workers * (site.up + site.down) + site.push + site.receive + 7 * site.delay for site in sites]
    at_server = sum(site.workers for site in sites) * (scene.up + scene.down + scene.inspect)
    uploads = sum(site.workers * site.up for site in sites) / scene.slots
    longest = max(SLOWER_MAX * scene.window, min(alone) / A_TURN)
    return max(scene.window, min((max(alone) + at_server + uploads) / A_TURN, longest))


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.inf
