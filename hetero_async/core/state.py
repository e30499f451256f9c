"""The run's state without its tensors. `fold` is the only thing that changes it.

Rules
1. The state after lsn L depends on the records 1 … L and on nothing else: no clock, no chance, no arrival order.
2. Records are decisions already made. `fold` asserts what they promised; it never decides and never refuses.
3. What dies with the server process (who was heard when, how fast somebody is) is not in here but in members.py.

The server folds each record as it makes it, recovery and verify fold the same records from the log, and all of them
end with the same `digest`.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean
from typing import Any

from hetero_async.core import ranges
from hetero_async.core.ledger import Book, Ledger
from hetero_async.core.probe import Reference, packed
from hetero_async.core.ranges import Ranges
from hetero_async.core.records import (
    Beacon,
    Dataset,
    Delta,
    Entry,
    Evaluated,
    Evaluation,
    Genesis,
    Joined,
    Leased,
    Left,
    Metric,
    Probed,
    Promoted,
    Published,
    RunSettings,
    Settings,
    Stepped,
)

# The running median of the norm gate looks back this far: long enough to be steady, short enough to follow training.
NORMS_KEPT = 64
# The server that a run begins with.
FIRST_SERVER = "server"
# Anchors older than this many publishes are beyond any sensible staleness bound.
PUBLISHES_KEPT = 1024


@dataclass(slots=True)
class Member:
    """One worker's durable facts. `active`: joined and not left. `key`: the one that its present life began with."""

    site: str
    key: str = ""
    incarnation: int = 0
    active: bool = False
    last_seq: int = 0
    last_hash: str = ""
    last_lsn: int = 0
    merged_seq: int = 0
    steps: int = 0
    samples: int = 0
    deltas: int = 0
    began: int = 0  # the version that its present life joined at; 0: with the run, or warm
    rounds: int = 0  # deltas of that life


@dataclass(slots=True)
class Contribution:
    """What came in under one key, whoever held it; `worker` and `site` are the last it stood for."""

    worker: str
    site: str
    lives: int = 0
    deltas: int = 0
    steps: int = 0
    samples: int = 0


@dataclass(slots=True)
class PendingDelta:
    """Admitted and durable, not merged yet."""

    worker: str
    seq: int
    anchor_version: int
    steps: int
    samples: int
    tokens: int = 0
    nth: int = 0  # of its worker's deltas since that joined a run under way, cold; 0: it did not


@dataclass(slots=True)
class Kept:
    """A publish that is being measured, or was and is the best: `term` and `lsn` of its `Evaluation` name it for good.

    A publish's number does not: after a takeover another one may have it.
    """

    term: int
    lsn: int
    worker: str
    publish: int
    version: int
    trained: int  # positions, when it was handed out
    name: str = ""  # of the figure that it is the best by
    value: float = 0.0


@dataclass(slots=True)
class State:
    term: int = 1
    server: str = FIRST_SERVER  # whose term it is
    promotions: list[tuple[int, int]] = field(default_factory=list)  # term, and the lsn that it began with
    inherited: dict[int, int] = field(default_factory=dict)  # term that a takeover began → the publish it went on from
    lsn: int = 0
    settings: RunSettings | None = None
    schema_hash: str = ""
    version: int = 0
    publish: int = 0
    publish_versions: dict[int, int] = field(default_factory=dict)  # publish → version it was made at
    ledger: Ledger = field(default_factory=Ledger)
    members: dict[str, Member] = field(default_factory=dict)
    contributions: dict[str, Contribution] = field(default_factory=dict)  # by key
    pending: dict[int, PendingDelta] = field(default_factory=dict)  # by lsn, ascending
    norms: list[float] = field(default_factory=list)
    lag: float = 0.0  # mean staleness of the last step's deltas
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)  # name → value, version
    evaluated_at: int = 0  # positions that were trained when the newest answered evaluation was handed out
    evaluated_publish: int = 0  # what that measured
    evaluator: str = ""  # to whom the newest one was handed out
    forsaken_by: str = ""  # whoever left before answering it
    evaluation: Kept | None = None  # under way
    best: Kept | None = None
    references: dict[str, Reference] = field(default_factory=dict)  # by kind and arithmetic of the probe

    def fold(self, entry: Entry) -> None:
        """Apply one record. Raises AssertionError when the log contradicts itself."""
        assert entry.lsn == self.lsn + 1, f"record {entry.lsn} follows {self.lsn}"
        assert entry.term >= self.term, f"term fell from {self.term} to {entry.term}"
        assert self.settings is not None or isinstance(entry.record, Genesis), "a log begins with its genesis"
        _FOLDS[type(entry.record)](self, entry.record, entry.lsn)
        self.lsn, self.term = entry.lsn, max(self.term, entry.term)

    # --- what can be read off it ---

    @property
    def active(self) -> list[str]:
        return [name for name, member in self.members.items() if member.active]

    @property
    def is_trained(self) -> bool:
        """Every position is in an admitted delta."""
        return 0 < self.ledger.positions == ranges.size(self.ledger.trained)

    @property
    def is_finished(self) -> bool:
        """Everything is trained, merged and published."""
        return self.is_trained and not self.pending and self.publish_versions[self.publish] == self.version

    def common_lsn(self, promotions: list[tuple[int, int]]) -> int:
        """The last record that this history shares with another one of the run, given that one's takeovers.

        A term has one server: where two histories have the same terms they are the same, and they part where the first
        of them goes over to a term that the other does not go over to just there.
        """
        shared = sum(ours == theirs for ours, theirs in zip(self.promotions, promotions, strict=False))
        parting = [*self.promotions[shared : shared + 1], *promotions[shared : shared + 1]]
        return min([self.lsn, *(first - 1 for _, first in parting)])

    def common_publish(self, term: int) -> int:
        """The last publish that this history shares with all that the server of that term can have made."""
        return min([self.publish, *(publish for began, publish in self.inherited.items() if began > term)])

    def staleness(self, anchor_version: int) -> int:
        """Of a delta that would be merged by the next outer step."""
        return self.version - anchor_version

    def staleness_bound(self) -> int:
        """`max_staleness` rounds in versions: a round is one window, or one version per worker when each push steps."""
        assert self.settings is not None
        versions_per_round = max(1, len(self.active)) if self.settings.merge == "per-push" else 1
        return self.settings.max_staleness * versions_per_round

    # --- as plain values ---

    def dump(self) -> dict[str, Any]:
        """Everything, as JSON-able values; `load` of it is equal."""
        return asdict(self)

    @classmethod
    def load(cls, dumped: dict[str, Any]) -> "State":
        settings = dumped["settings"]
        ledger = dumped["ledger"]
        return cls(
            term=dumped["term"],
            server=dumped["server"],
            promotions=[(term, first) for term, first in dumped["promotions"]],
            inherited={int(term): publish for term, publish in dumped["inherited"].items()},
            lsn=dumped["lsn"],
            settings=None if settings is None else RunSettings(**settings),
            schema_hash=dumped["schema_hash"],
            version=dumped["version"],
            publish=dumped["publish"],
            publish_versions={int(number): version for number, version in dumped["publish_versions"].items()},
            ledger=Ledger(
                positions=ledger["positions"],
                books={name: Book(**book) for name, book in ledger["books"].items()},
                free=_ranges(ledger["free"]),
                trained=_ranges(ledger["trained"]),
                leased={worker: _ranges(held) for worker, held in ledger["leased"].items()},
            ),
            members={name: Member(**member) for name, member in dumped["members"].items()},
            contributions={key: Contribution(**given) for key, given in dumped["contributions"].items()},
            pending={int(lsn): PendingDelta(**pending) for lsn, pending in dumped["pending"].items()},
            norms=list(dumped["norms"]),
            lag=dumped["lag"],
            metrics={name: (value, version) for name, (value, version) in dumped["metrics"].items()},
            evaluated_at=dumped["evaluated_at"],
            evaluated_publish=dumped["evaluated_publish"],
            evaluator=dumped["evaluator"],
            forsaken_by=dumped["forsaken_by"],
            evaluation=_kept(dumped["evaluation"]),
            best=_kept(dumped["best"]),
            references={key: Reference(**reference) for key, reference in dumped["references"].items()},
        )

    def digest(self) -> bytes:
        """16 bytes that two states share exactly when they are equal (blake2b of canonical JSON)."""
        canonical = json.dumps(self, default=_members_of, sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(canonical.encode(), digest_size=16).digest()

    # --- one method a record ---

    def _genesis(self, record: Genesis, lsn: int) -> None:
        assert lsn == 1, "genesis is the first record"
        self.settings, self.schema_hash = record.settings, record.schema_hash.hex()
        self.publish_versions = {0: 0}

    def _settings(self, record: Settings, lsn: int) -> None:
        self.settings = record.settings
        if record.settings.probe == "off":
            self.references = {}  # which is how an operator has a wrong one forgotten

    def _dataset(self, record: Dataset, lsn: int) -> None:
        self.ledger.open(record.book, record.samples, record.positions)

    def _joined(self, record: Joined, lsn: int) -> None:
        member = self.members.setdefault(record.worker, Member(site=record.site))
        assert record.incarnation == member.incarnation + 1, "incarnations grow by one"
        self._give_up_evaluation(record.worker)
        self.ledger.release(record.worker, ranges.intersection(self.ledger.held(record.worker), record.kept))
        self.ledger.lease(record.worker, ranges.difference(record.kept, self.ledger.held(record.worker)))
        member.site, member.incarnation, member.active = record.site, record.incarnation, True
        member.key, member.began, member.rounds = record.key, 0 if record.is_warm else self.version, 0
        given = self.contributions.setdefault(record.key, Contribution(worker=record.worker, site=record.site))
        given.worker, given.site = record.worker, record.site
        given.lives += 1

    def _left(self, record: Left, lsn: int) -> None:
        assert self.members[record.worker].active, "only an active worker leaves"
        self.members[record.worker].active = False
        self._give_up_evaluation(record.worker)
        self.ledger.release(record.worker)

    def _leased(self, record: Leased, lsn: int) -> None:
        assert self.members[record.worker].active, "only an active worker leases"
        self.ledger.lease(record.worker, record.ranges)

    def _delta(self, record: Delta, lsn: int) -> None:
        member = self.members[record.worker]
        assert member.active and record.incarnation == member.incarnation, "only a worker's present life pushes"
        assert record.seq > member.last_seq, "a worker's deltas are admitted once, in their order"
        assert 0 <= self.staleness(record.anchor_version) <= self.staleness_bound(), "no delta is staler than the bound"
        self.ledger.train(record.worker, record.ranges)
        samples = ranges.size(record.ranges)
        member.rounds += 1
        self.pending[lsn] = PendingDelta(
            worker=record.worker,
            seq=record.seq,
            anchor_version=record.anchor_version,
            steps=record.steps,
            samples=samples,
            tokens=record.tokens,
            nth=member.rounds if member.began else 0,
        )
        self.norms = [*self.norms, record.norm][-NORMS_KEPT:]
        member.last_seq, member.last_hash, member.last_lsn = record.seq, record.payload_hash.hex(), lsn
        for account in (member, self.contributions[member.key]):
            account.steps += record.steps
            account.samples += samples
            account.deltas += 1

    def _stepped(self, record: Stepped, lsn: int) -> None:
        assert record.version == self.version + 1, "versions grow by one"
        assert record.deltas and len(record.deltas) == len(record.weights), (
            "a step merges something, each with its weight"
        )
        self.lag = fmean(self.staleness(self.pending[merged].anchor_version) for merged in record.deltas)
        for merged in record.deltas:
            pending = self.pending.pop(merged)
            member = self.members[pending.worker]
            assert pending.seq > member.merged_seq, "a worker's deltas are merged once, in their order"
            member.merged_seq = pending.seq
        self.version = record.version

    def _published(self, record: Published, lsn: int) -> None:
        assert record.number == self.publish + 1, "publishes are numbered without gaps"
        assert record.version == self.version, "a publish shows the present version"
        self.publish = record.number
        self.publish_versions[record.number] = record.version
        self.publish_versions.pop(record.number - PUBLISHES_KEPT, None)

    def _metric(self, record: Metric, lsn: int) -> None:
        self.metrics[record.name] = (record.value, record.version)

    def _evaluation(self, record: Evaluation, lsn: int) -> None:
        assert self.members[record.worker].active, "only an active worker evaluates"
        assert record.publish == self.publish, "the newest publish is measured"
        self.evaluator = record.worker
        self.evaluation = Kept(
            term=self.term,
            lsn=lsn,
            worker=record.worker,
            publish=record.publish,
            version=self.publish_versions[record.publish],
            trained=ranges.size(self.ledger.trained),
        )

    def _evaluated(self, record: Evaluated, lsn: int) -> None:
        given = self.evaluation
        assert given is not None and (given.worker, given.publish) == (record.worker, record.publish), (
            "what was handed out is answered"
        )
        if record.name:
            self.best = replace(given, name=record.name, value=record.value)
        self.evaluated_at, self.evaluated_publish = given.trained, given.publish
        self.evaluation, self.forsaken_by = None, ""

    def _give_up_evaluation(self, worker: str) -> None:
        """With its worker's life; another one measures the next publish."""
        if self.evaluation is not None and self.evaluation.worker == worker:
            self.evaluation, self.forsaken_by = None, worker

    def _probed(self, record: Probed, lsn: int) -> None:
        self.references[record.digest.key] = Reference(
            worker=record.worker, site=record.site, device=record.device, dtype=record.dtype,
            software=record.software, digest=packed(record.digest),
        )  # fmt: skip

    def _promoted(self, record: Promoted, lsn: int) -> None:
        assert record.term > self.term, "terms only grow"
        self.term, self.server = record.term, record.server
        self.promotions = [*self.promotions, (record.term, lsn)]
        self.inherited[record.term] = self.publish

    def _beacon(self, record: Beacon, lsn: int) -> None:
        assert record.state_hash == self.digest(), f"the state before record {lsn} is not the one that was logged"


_FOLDS: dict[type, Callable[[State, Any, int], None]] = {
    Genesis: State._genesis,
    Settings: State._settings,
    Dataset: State._dataset,
    Joined: State._joined,
    Left: State._left,
    Leased: State._leased,
    Delta: State._delta,
    Stepped: State._stepped,
    Published: State._published,
    Metric: State._metric,
    Evaluation: State._evaluation,
    Evaluated: State._evaluated,
    Probed: State._probed,
    Promoted: State._promoted,
    Beacon: State._beacon,
}


@functools.cache
def _names_of(kind: type) -> tuple[str, ...]:
    return tuple(member.name for member in fields(kind))


def _members_of(part: Any) -> dict[str, Any]:
    """As `asdict`, one level at a time and without its copies: a digest is taken of every outer step."""
    return {name: getattr(part, name) for name in _names_of(part.__class__)}


def _kept(dumped: dict[str, Any] | None) -> Kept | None:
    return None if dumped is None else Kept(**dumped)


def _ranges(pairs: list[list[int]]) -> Ranges:
    return tuple((start, stop) for start, stop in pairs)
