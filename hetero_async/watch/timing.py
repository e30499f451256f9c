"""How fast a run will turn: rounds, answers, merges and staleness, from step times, links and the model's size.

Pure arithmetic, for plan.py. Nothing is measured, asked or guessed from a name: planning.py gives the figures. A site's
workers share its link; rates are bytes per second, a delay is one way. Where a formula follows from what other code
does, it names that.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hetero_async.bulk import UPLOAD_BYTES_MAX, UPLOADS_MIN
from hetero_async.core.pace import Windows, reference_rate, rounds_longer, steps_for
from hetero_async.core.records import RunSettings
from hetero_async.core.server import STRETCH
from hetero_async.watch.carrying import carried, lingering, slow_start, trips
from hetero_async.watch.rehearsal import LOADS, Played, Scene, Stage, played

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
# model.py holds so many for workers that fall behind, or as many as have a snapshot's bytes.
PUBLISHES_HELD_MIN = 2
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
    begins_slowly: bool = True  # TCP, after each rest

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


@dataclass(frozen=True, kw_only=True)
class Timing:
    """How fast everything turns, all sites together."""

    question: Question
    reference: float  # steps per second of the worker that the others' rounds are measured by
    window: float
    longer: float = 1.0  # rounds, than the settings have them

    @classmethod
    def of(cls, question: Question, *, is_plain: bool = False) -> "Timing":
        """`is_plain`: with rounds of the settings' length, whatever the links are."""
        settings = question.settings
        reference = reference_rate([1 / site.step_seconds for site in question.sites for _ in range(site.workers)])
        plain = cls(question=question, reference=reference, window=Windows.length_ms(reference, settings) / 1000)
        exchanges = [plain.exchange_seconds(site) for site in question.sites for _ in range(site.workers)]
        longer = 1.0 if is_plain else rounds_longer(exchanges, reference, settings)
        return replace(plain, window=Windows.length_ms(reference, settings, longer) / 1000, longer=longer)

    @functools.cached_property
    def _rehearsed(self) -> Played:
        """With policy `window`."""
        question, settings = self.question, self.question.settings
        codec, held = COSTS[settings.codec_up], max(PUBLISHES_HELD_MIN, int(32 / BITS[settings.codec_down]))
        scene = Scene(
            window=self.window,
            grace=settings.grace * self.window,
            publish_every=settings.publish_every,
            stretch=STRETCH,
            slots=uploads_at_once(question),
            up=question.publish_bytes / question.up,
            down=question.delta_bytes / question.down,
            inspect=question.billionths(codec.unpack + codec.decode),
            held=held,
            snapshot=BITS["fp32"] / BITS[settings.codec_down],
        )
        return played([self._stage(site) for site in question.sites], scene)

    def _stage(self, site: Site) -> Stage:
        delta, publish = self.question.delta_bytes, self.question.publish_bytes
        codec = COSTS[self.question.settings.codec_up]
        return Stage(
            workers=site.workers,
            step=site.step_seconds,
            steps=self.steps_per_round(site),
            delay=site.delay,
            up=delta / site.up,
            down=publish / site.down,
            push=self.question.billionths(codec.encode)
            + self._push_begins(site)
            + lingering(delta, site.up, site.delay),
            receive=self.merging_seconds
            + (trips(publish) - 3) * site.delay
            + self._publish_begins(site)
            + lingering(publish, site.down, site.delay)
            + self._taken_over_seconds,
        )

    def _of(self, figures: Sequence[float], site: Site) -> float:
        return figures[self.question.sites.index(site)]

    @property
    def deltas_per_second(self) -> float:
        if self.question.settings.merge == "window":
            return sum(self._rehearsed.deltas)
        return sum(site.workers / self.round_seconds(site) for site in self.question.sites)

    @property
    def merges_per_second(self) -> float:
        match self.question.settings.merge:
            case "window":
                return self._rehearsed.merges
            case "per-push":
                return self.deltas_per_second
            case _:
                return self.deltas_per_second / self.question.workers

    def steps_per_round(self, site: Site) -> int:
        return steps_for(1 / site.step_seconds, self.reference, self.question.settings, self.longer)

    def training_seconds(self, site: Site) -> float:
        return self.steps_per_round(site) * site.step_seconds

    def answer_seconds(self, site: Site) -> float:
        """From a cut to its acknowledgement."""
        is_window = self.question.settings.merge == "window"
        return self._of(self._rehearsed.answer, site) if is_window else self._answer_alone(site)

    def receive_seconds(self, site: Site) -> float:
        """From a merge to its publish in the worker."""
        is_window = self.question.settings.merge == "window"
        return self._of(self._rehearsed.receive, site) if is_window else self._receive_alone(site)

    def _is_apart(self, site: Site) -> bool:
        """Whether the pushes of a window come when the last one's publish is there."""
        settings = self.question.settings
        answer = LOADS[-1] * self._answer_alone(site)
        # A cut leaves the time of the quickest answers; whoever has to wait for others' deltas comes within the grace.
        waited = answer - self._answer_quickest(site)
        age = site.step_seconds + answer + LOADS[-1] * self._receive_alone(site)
        return settings.merge != "window" or (age <= self.window and waited <= settings.grace * self.window)

    def _deltas_seconds(self, site: Site) -> float:
        size = self.question.delta_bytes
        return carried(site.workers * size, site.up, size, site.delay)

    def _publishes_seconds(self, site: Site) -> float:
        size = self.question.publish_bytes
        return carried(site.workers * size, site.down, size, site.delay)

    def _answer_alone(self, site: Site) -> float:
        """Coded and on its way: offered, wanted, sent, looked at and answered. All workers push for one deadline, so
        this is the last one's."""
        question, codec = self.question, COSTS[self.question.settings.codec_up]
        size, workers = question.delta_bytes, question.workers
        theirs, slots = workers * size / question.down, uploads_at_once(question)
        # Only so many uploads run at a time, each at the speed of its own link.
        single = sum(other.workers * carried(size, other.up, size, other.delay) for other in question.sites)
        sent = max(self._deltas_seconds(site), theirs, single / slots if workers > slots else 0.0)
        looked_at = workers * question.billionths(codec.unpack + codec.decode)
        return question.billionths(codec.encode) + 4 * site.delay + self._push_begins(site) + sent + looked_at

    def _answer_quickest(self, site: Site) -> float:
        """When nobody else pushes."""
        pace, single = self._single(site)
        return pace._answer_alone(single)

    def _single(self, site: Site) -> "tuple[Timing, Site]":
        """One of its workers, with nobody else there."""
        single = replace(site, workers=1)
        return replace(self, question=replace(self.question, sites=(single,))), single

    def _receive_alone(self, site: Site) -> float:
        """Merged, published, announced, asked for, sent and taken over. The first chunk tells how many there are."""
        question, size = self.question, self.question.publish_bytes
        sent = max(self._publishes_seconds(site), question.workers * size / question.up)
        begins = trips(size) * site.delay + self._publish_begins(site)
        return self.merging_seconds + begins + sent + self._taken_over_seconds

    @property
    def _taken_over_seconds(self) -> float:
        codec = COSTS[self.question.settings.codec_down]
        return self.question.billionths(codec.unpack + codec.decode + ADD_NS + HASH_NS)

    def _push_begins(self, site: Site) -> float:
        """What TCP's slow start adds to a delta on its way from a worker there."""
        return self._begins(self.question.delta_bytes, site.up / site.workers, site.delay, self.window)

    def _publish_begins(self, site: Site) -> float:
        """And to a publish on its way to it."""
        every = self.window * self.question.settings.publish_every
        return self._begins(self.question.publish_bytes, site.down / site.workers, site.delay, every)

    def _begins(self, *told: float) -> float:
        return slow_start(*told) if self.question.begins_slowly else 0.0

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
        if merge == "window":
            deltas = self._of(self._rehearsed.deltas, site)
            return site.workers / deltas if deltas else math.inf
        shortest, answer = max(self.training_seconds(site), site.step_seconds), self.answer_seconds(site)
        if answer <= shortest:
            return shortest
        # Behind an answer that is late the next cut follows at a step's end; a loop that has waited does one more.
        is_waiting = answer > STRETCH * self.training_seconds(site)
        return answer + (site.step_seconds if is_waiting else site.step_seconds / 2)

    def training_share(self, site: Site) -> float:
        """A round goes on beside its answer to STRETCH times its steps; then the worker waits."""
        merge = self.question.settings.merge
        if merge == "window":
            return self._of(self._rehearsed.training, site)
        if merge == "all":
            return self.training_seconds(site) / self.round_seconds(site)
        longest = STRETCH * self.training_seconds(site) + site.step_seconds
        return min(1.0, longest / self.round_seconds(site))

    def staleness(self, site: Site) -> float:
        """Merges between the one whose publish a delta was measured from and the one that it is in, on average."""
        settings = self.question.settings
        if settings.merge == "window":
            return self._of(self._rehearsed.staleness, site)
        if settings.merge == "all":
            return 0.0
        # Other workers' merges from the publish that it stood on to its own; its own last one is in there.
        back_and_forth = self.answer_seconds(site) + self.receive_seconds(site)
        others = (self.question.workers - 1) / self.question.workers
        return (settings.publish_every - 1) / 2 + others * self.merges_per_second * (back_and_forth - site.delay)

    def is_behind(self, site: Site) -> bool:
        """Whether a publish is not there when the next is made. Each is asked for when the one before it has come."""
        return self._fetched_seconds(site) * self._merges_due > self.question.settings.publish_every

    def _fetched_seconds(self, site: Site) -> float:
        """From asking for a publish until it is there."""
        asked = trips(self.question.publish_bytes) - 1  # its news has come already
        fetched = self._publishes_seconds(site) + asked * site.delay + self._publish_begins(site)
        return max(fetched, self.question.workers * self.question.publish_bytes / self.question.up)

    def exchange_seconds(self, site: Site) -> float:
        """Of a delta and of a publish, each from when it is asked for, as a worker measures them (traffic.py). Of those
        who share a link one is first and one is last, so half of the others are waited for."""
        coded = self.question.billionths(COSTS[self.question.settings.codec_up].encode)
        pace, single = self._single(site)
        first = pace._answer_alone(single) + pace._fetched_seconds(single)
        last = self._answer_alone(site) + self._fetched_seconds(site)
        return (first + last) / 2 - coded - 2 * site.delay

    def is_refused(self, site: Site) -> bool:
        """Whether its deltas come so late that the server admits none to rely on (core/admission.py)."""
        settings = self.question.settings
        merges_per_round = self.question.workers if settings.merge == "per-push" else 1
        return self.is_behind(site) or self.staleness(site) > settings.max_staleness * merges_per_round

    @property
    def _merges_due(self) -> float:
        """A second, where nothing is late."""
        return 1 / self.window if self.question.settings.merge == "window" else self.merges_per_second

    @property
    def publishes_per_second(self) -> float:
        return self.merges_per_second / self.question.settings.publish_every

    def fits(self) -> bool:
        """Every delta is answered before its worker's next is due, and every publish is there before the next."""
        return self.server_seconds * self._merges_due <= 1 and all(
            self._answer_alone(site) <= max(self.window, self.training_seconds(site)) and not self.is_behind(site)
            for site in self.question.sites
        )

    def hides_links(self) -> bool:
        settings = self.question.settings
        if settings.merge == "window":
            return self.fits() and settings.publish_every == 1 and all(map(self._is_apart, self.question.sites))
        return self.fits() and all(self.staleness(site) < 1e-9 for site in self.question.sites)

    def joining_seconds(self) -> float:
        """The first worker's parameters to the server, and from there to everybody as a snapshot."""
        question, cost = self.question, COSTS["fp32"]
        size, first = question.snapshot_bytes, question.sites[0]
        coded = question.billionths(2 * (cost.encode + cost.unpack + cost.decode))
        sent = max(
            carried(site.workers * size, site.down, size, site.delay)
            + slow_start(size, site.down / site.workers, site.delay)
            + 5 * site.delay
            for site in question.sites
        )
        provided = carried(size, min(first.up, question.down), size, first.delay)
        return coded + provided + slow_start(size, first.up, first.delay) + sent


def uploads_at_once(question: Question) -> int:
    return int(max(UPLOADS_MIN, UPLOAD_BYTES_MAX // question.delta_bytes))


def buffers(settings: RunSettings) -> int:
    """The outer rule's vectors."""
    return 0 if settings.rule == "sgd" else 1
