"""How fast a run will turn: rounds, answers, merges and staleness, from step times, links and the model's size.

Pure arithmetic, for plan.py. Nothing is measured, asked or guessed from a name: planning.py gives the figures. A site's
workers share its link; rates are bytes per second, a delay is one way. Where a formula follows from what other code
does, it names that.
"""

import math
from dataclasses import dataclass, replace

from hetero_async.bulk import UPLOAD_BYTES_MAX, UPLOADS_MIN
from hetero_async.core.pace import Windows, reference_rate, steps_for
from hetero_async.core.records import RunSettings
from hetero_async.core.server import STRETCH
from hetero_async.formats.chunks import CHUNK_BYTES, CREDITS
from hetero_async.transfers import STALL_MS

# Bits a parameter as sent, after zstd: measured, the table in README.md.
BITS = {"fp32": 26.4, "bf16": 11.5, "int8": 8.5, "int4": 4.0, "e3m0": 3.8, "2bit": 2.2, "topk": 0.16}


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU time of a codec on one core, nanoseconds a parameter: measured with 8 million normally distributed ones."""

    encode: float
    unpack: float  # zstd
    decode: float


COSTS = {
    "fp32": Cost(12.9, 1.9, 2.8),
    "bf16": Cost(8.4, 1.3, 2.2),
    "int8": Cost(2.4, 1.0, 0.7),
    "int4": Cost(3.5, 0.5, 1.6),
    "e3m0": Cost(33.0, 0.5, 6.9),
    "2bit": Cost(34.0, 0.3, 14.0),
    "topk": Cost(66.0, 0.3, 5.5),
}
# TCP's first flight, ten segments (RFC 6928). While it rests, what it dares to send at once is halved, down to that,
# every so often: a round trip and that much more (RFC 2861, as Linux does it).
FIRST_FLIGHT_BYTES, RETRANSMISSION_SECONDS = 14_480.0, 0.2
ADD_NS, STEP_NS, HASH_NS = 0.5, 2.1, 0.25  # of one delta to the mean, of the outer step, of one vector


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """`step_seconds` is one worker's mean time from step to step, `batch` its samples a step."""

    name: str
    workers: int
    step_seconds: float
    batch: int = 1
    up: float = math.inf
    down: float = math.inf
    delay: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """`samples`: of the whole run, 0 where nobody knows. `up` and `down`: of the server's own site, seen from there."""

    parameters: float
    sites: tuple[Site, ...]
    settings: RunSettings
    samples: int = 0
    up: float = math.inf
    down: float = math.inf
    checkpoint_every: int = 50
    keep_log: bool = False

    @property
    def workers(self) -> int:
        return sum(site.workers for site in self.sites)

    @property
    def delta_bytes(self) -> float:
        return self.parameters * BITS[self.settings.codec_up] / 8

    @property
    def publish_bytes(self) -> float:
        return self.parameters * BITS[self.settings.codec_down] / 8

    @property
    def snapshot_bytes(self) -> float:
        return self.parameters * BITS["fp32"] / 8

    def billionths(self, nanoseconds: float) -> float:
        """Seconds that so much for each parameter takes."""
        return self.parameters * nanoseconds * 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How fast everything turns, all sites together."""

    question: Question
    reference: float  # steps per second of the worker that the others' rounds are measured by
    window: float
    merges_per_second: float
    deltas_per_second: float

    @classmethod
    def of(cls, question: Question) -> "Timing":
        settings = question.settings
        rates = [1 / site.step_seconds for site in question.sites for _ in range(site.workers)]
        reference = reference_rate(rates)
        first = cls(
            question=question,
            reference=reference,
            window=Windows.length_ms(reference, settings) / 1000,
            merges_per_second=0.0,
            deltas_per_second=0.0,
        )
        deltas = sum(site.workers / first.round_seconds(site) for site in question.sites)
        merges = {
            # One at a deadline, if anything has arrived for it.
            "window": min((1 + first.extra_merges()) / first.window, deltas),
            "per-push": deltas,
            "all": deltas / question.workers,
        }
        return replace(first, deltas_per_second=deltas, merges_per_second=merges[settings.merge])

    def extra_merges(self) -> float:
        """A window's, on average, of deltas that come when their merge is over.

        A cut leaves the time that the quickest answers took (desk.py). Where a publish is in the way, a delta is later
        than that, and with many on one link most are; the grace makes up for some. Whoever is late every time makes no
        more merges, since its last delta counts for the next one: one is added when it is in time again.
        """
        late = [self.late_share(site) for site in self.question.sites]
        return max(share * (1 - share) for share in late)

    def late_share(self, site: Site) -> float:
        """Of a site's deltas with windows, those that come when their merge is over, and are in the next."""
        publish = self._publishes_seconds(site)
        if self._is_apart(site) or not publish:
            return 0.0
        spread = self._deltas_seconds(site) * (site.workers - 1) / site.workers
        patience = max(0.0, self.question.settings.grace * self.window - spread)
        in_the_way = min(1.0, publish / (self.window * self.question.settings.publish_every))
        return in_the_way * max(0.0, 1 - patience / publish)

    def steps_per_round(self, site: Site) -> int:
        return steps_for(1 / site.step_seconds, self.reference, self.question.settings)

    def training_seconds(self, site: Site) -> float:
        return self.steps_per_round(site) * site.step_seconds

    def answer_seconds(self, site: Site) -> float:
        """From a cut to its acknowledgement."""
        alone = self._answer_alone(site)
        if self._is_apart(site):
            return alone
        return alone + _queued(self._publishes_seconds(site), self.window * self.question.settings.publish_every)

    def receive_seconds(self, site: Site) -> float:
        """From a merge to its publish in the worker."""
        alone = self._receive_alone(site)
        if self._is_apart(site):
            return alone
        return alone + _queued(self._deltas_seconds(site), max(self.window, self._answer_alone(site)))

    def _is_apart(self, site: Site) -> bool:
        """Whether push and publish are never under way at once: the pushes of a window come when its publish is there.

        Where they are, what is asked for waits behind what is sent: a push is asked for on the lane that brings
        publishes, a publish on the one that takes pushes.
        """
        settings = self.question.settings
        age = (site.step_seconds + self._answer_alone(site) + self._receive_alone(site)) / self.window
        return settings.merge != "window" or age <= 1

    def _deltas_seconds(self, site: Site) -> float:
        size = self.question.delta_bytes
        return _carried(site.workers * size, site.up, size, site.delay)

    def _publishes_seconds(self, site: Site) -> float:
        size = self.question.publish_bytes
        return _carried(site.workers * size, site.down, size, site.delay)

    def _answer_alone(self, site: Site) -> float:
        """Coded and on its way: offered, wanted, sent, looked at and answered. All workers push for one deadline, so
        this is the last one's."""
        question, codec = self.question, COSTS[self.question.settings.codec_up]
        size, workers = question.delta_bytes, question.workers
        theirs = workers * size / question.down
        # Only so many uploads run at a time, each at the speed of its own link.
        slots = max(UPLOADS_MIN, UPLOAD_BYTES_MAX // size)
        single = sum(other.workers * _carried(size, other.up, size, other.delay) for other in question.sites)
        sent = max(self._deltas_seconds(site), theirs, single / slots if workers > slots else 0.0)
        looked_at = workers * question.billionths(codec.unpack + codec.decode)
        slow = _slow_start(size, site.up / site.workers, site.delay, self.window)
        return question.billionths(codec.encode) + 4 * site.delay + slow + sent + looked_at

    def _receive_alone(self, site: Site) -> float:
        """Merged, published, announced, asked for, sent and taken over. The first chunk tells how many there are."""
        question, codec = self.question, COSTS[self.question.settings.codec_down]
        size = question.publish_bytes
        sent = max(self._publishes_seconds(site), question.workers * size / question.up)
        trips = 3 if size <= CHUNK_BYTES else 5
        taken_over = question.billionths(codec.unpack + codec.decode + ADD_NS + HASH_NS)
        return self.merging_seconds + trips * site.delay + self._publish_begins(site) + sent + taken_over

    def _publish_begins(self, site: Site) -> float:
        """What TCP's slow start adds to a publish on its way to a worker there."""
        every = self.window * self.question.settings.publish_every
        return _slow_start(self.question.publish_bytes, site.down / site.workers, site.delay, every)

    @property
    def merging_seconds(self) -> float:
        """One core's, from the last delta that a merge waited for to its publish (tensors/model.py)."""
        question, settings = self.question, self.question.settings
        up, down = COSTS[settings.codec_up], COSTS[settings.codec_down]
        vectors = 2 + buffers(settings)
        each = question.workers * (up.unpack + up.decode + ADD_NS)
        publish = 2 * ADD_NS + down.encode + down.unpack + down.decode + (1 + vectors) * HASH_NS
        return question.billionths(each + STEP_NS + publish)

    @property
    def server_seconds(self) -> float:
        """The server's own work for one merge."""
        question, codec = self.question, COSTS[self.question.settings.codec_up]
        return self.merging_seconds + question.workers * question.billionths(codec.unpack + codec.decode)

    def round_seconds(self, site: Site) -> float:
        """From one of a worker's cuts to the next: no delta leaves before the last one is answered."""
        merge = self.question.settings.merge
        if merge == "all":
            # Each begins when the publish has come, and the merge waits for the last one's delta.
            return max(
                self.receive_seconds(other) + self.training_seconds(other) + self.answer_seconds(other) - other.delay
                for other in self.question.sites
            )
        shortest = self.window if merge == "window" else self.training_seconds(site)
        shortest, answer = max(shortest, site.step_seconds), self.answer_seconds(site)
        if answer <= shortest:
            return shortest
        # Behind an answer that is late the next cut follows at a step's end; a loop that has waited does one more.
        is_waiting = answer > STRETCH * self.training_seconds(site)
        return answer + (site.step_seconds if is_waiting else site.step_seconds / 2)

    def training_share(self, site: Site) -> float:
        """A round goes on beside its answer to STRETCH times its steps; then the worker waits."""
        if self.question.settings.merge == "all":
            return self.training_seconds(site) / self.round_seconds(site)
        longest = STRETCH * self.training_seconds(site) + site.step_seconds
        return min(1.0, longest / self.round_seconds(site))

    def staleness(self, site: Site) -> float:
        """Merges between the one whose publish a delta was measured from and the one that it is in, on average.

        With windows (desk.py) a delta is cut at the step's end that leaves an answer's time, so up to a step more,
        before the deadline, and stands on the newest publish that had come by then. Where an answer takes longer than a
        window, pushes fall anywhere between two deadlines. Of several workers on one link some are earlier.
        """
        settings = self.question.settings
        if settings.merge == "all":
            return 0.0
        back_and_forth = self.answer_seconds(site) + self.receive_seconds(site)
        unpublished = (settings.publish_every - 1) / 2
        if settings.merge == "per-push":
            # Other workers' merges from the publish that it stood on to its own; its own last one is in there.
            others = (self.question.workers - 1) / self.question.workers
            return unpublished + others * self.merges_per_second * (back_and_forth - site.delay)
        if self.answer_seconds(site) > self.window:
            return unpublished + (back_and_forth - site.delay) / self.window
        shared = self._deltas_seconds(site) + self._publishes_seconds(site)
        missed = 0.0
        for place in range(site.workers):
            least = back_and_forth - shared * (site.workers - 1 - place) / site.workers
            missed += _mean_ceiling(least / self.window, (least + site.step_seconds) / self.window) - 1
        return unpublished + self.late_share(site) + max(0.0, missed / site.workers)

    def is_sent_twice(self, site: Site) -> bool:
        """Whether a chunk takes so long that its receiver takes it for lost (transfers.py) and asks for it again."""
        ways = ((self.question.delta_bytes, site.up), (self.question.publish_bytes, site.down))
        chunks = (site.workers * min(size, CHUNK_BYTES) / rate for size, rate in ways)
        return 1000 * (max(chunks) + 2 * site.delay) > STALL_MS

    def is_behind(self, site: Site) -> bool:
        """Whether a publish is not there when the next is made. Each is asked for when the one before it has come."""
        trips = 2 if self.question.publish_bytes <= CHUNK_BYTES else 4
        fetched = self._publishes_seconds(site) + trips * site.delay + self._publish_begins(site)
        fetched = max(fetched, self.question.workers * self.question.publish_bytes / self.question.up)
        return fetched * self.publishes_per_second > 1

    def is_refused(self, site: Site) -> bool:
        """Whether its deltas come so late that the server admits none to rely on (core/admission.py)."""
        settings = self.question.settings
        merges_per_round = self.question.workers if settings.merge == "per-push" else 1
        return self.is_behind(site) or self.staleness(site) > settings.max_staleness * merges_per_round

    @property
    def publishes_per_second(self) -> float:
        return self.merges_per_second / self.question.settings.publish_every

    def fits(self) -> bool:
        """Every delta is answered before its worker's next is due, and every publish is there before the next."""
        return self.server_seconds * self.merges_per_second <= 1 and all(
            self.answer_seconds(site) <= max(self.window, self.training_seconds(site)) and not self.is_behind(site)
            for site in self.question.sites
        )

    def hides_links(self) -> bool:
        return self.fits() and all(self.staleness(site) < 1e-9 for site in self.question.sites)

    def joining_seconds(self) -> float:
        """The first worker's parameters to the server, and from there to everybody as a snapshot."""
        question, cost = self.question, COSTS["fp32"]
        size, first = question.snapshot_bytes, question.sites[0]
        coded = question.billionths(2 * (cost.encode + cost.unpack + cost.decode))
        sent = max(
            _carried(site.workers * size, site.down, size, site.delay)
            + _slow_start(size, site.down / site.workers, site.delay)
            + 5 * site.delay
            for site in question.sites
        )
        provided = _carried(size, min(first.up, question.down), size, first.delay)
        return coded + provided + _slow_start(size, first.up, first.delay) + sent


def _carried(everything: float, rate: float, one: float = 0.0, delay: float = 0.0) -> float:
    """Seconds for so many bytes over one link, of which each object (`one`) is pulled a few chunks at a time."""
    return max(everything / rate, one * 2 * delay / (CREDITS * CHUNK_BYTES))


def _slow_start(size: float, rate: float, delay: float, rest: float = 3600.0) -> float:
    """How much longer a transfer takes, so many seconds after the last one, because TCP begins with a small flight and
    doubles it with each answer until the link is full; J. Kurose, K. Ross, Computer Networking, §3.7."""
    round_trip = 2 * delay
    if not round_trip:
        return 0.0
    halvings = rest // (round_trip + RETRANSMISSION_SECONDS)
    first = max(FIRST_FLIGHT_BYTES, size * math.exp2(-halvings))
    until_sent = math.ceil(math.log2(size / first + 1)) - 1
    until_full = math.floor(math.log2(1 + round_trip * rate / first)) + 1 if math.isfinite(rate) else until_sent
    flights = max(0, min(until_sent, until_full))
    return max(0.0, flights * (round_trip + first / rate) - (math.exp2(flights) - 1) * first / rate)


def _queued(busy_seconds: float, every_seconds: float) -> float:
    """How long a message waits on average behind what occupies a link for so long every so often."""
    return min(1.0, busy_seconds / every_seconds) * busy_seconds / 2


def _mean_ceiling(low: float, high: float) -> float:
    """Of all numbers between the two."""

    def integral(x: float) -> float:
        whole = math.floor(x)
        return whole * (whole + 1) / 2 + (x - whole) * (whole + 1)

    return (integral(high) - integral(low)) / (high - low)


def buffers(settings: RunSettings) -> int:
    """The outer rule's vectors."""
    return 0 if settings.rule == "sgd" else 1
