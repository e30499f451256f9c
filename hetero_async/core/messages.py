"""What travels between a worker and the server, as plain values; `formats.frames` turns them into bytes.

Two lanes: *control* (small, must never wait) and *bulk* (chunks). Large objects are pulled by their receiver:
it sends `Want` for a few chunks at a time, which is the flow control, and asks again from where it was after a
broken connection. The first `Want` of a worker's transfer goes over control: on bulk it would wait for what is sent the
other way, and a thin link would carry one way at a time. Nobody names itself in a message: the sender is the key that
the connection was made with. Beside each message travels the term that its sender serves in (0: it serves in none), so
that nobody follows a server whose reign has ended. All integers are non-negative.
"""

from dataclasses import dataclass
from typing import get_args

from hetero_async.core.heartbeat import Heartbeat
from hetero_async.core.probe import ProbeReport, ProbeVerdict
from hetero_async.core.publish_note import PublishNote
from hetero_async.core.records import Range

# Kinds of bulk object. A delta is numbered by its seq, publish and snapshot by the publish's number.
INITIAL, DELTA, PUBLISH, SNAPSHOT = "initial", "delta", "publish", "snapshot"
# For standbys. A shipment of records is numbered by the first of them; a checkpoint's two files by its record, of which
# the asker names 0 for "the newest".
RECORDS, MANIFEST, ARRAYS = "records", "manifest", "arrays"


# --- worker → server, control; Heartbeat is in heartbeat.py, what is said of probes in probe.py ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Ask to join. Payload: the model's schema. `claims`: ranges of an earlier life that it still wants to report.

    It is said again until answered, and anew to every process of the server. `life` is the same in all that one process
    says, and no other's, so that the last of them is not taken for a second process. `acknowledged` is the newest delta
    that was acknowledged in this life, and `receipt` what came with it. `is_warm`: its inner optimizer has a past.
    """

    run: str
    software: str
    schema_hash: bytes
    last_seq: int
    claims: tuple[Range, ...]
    device: str
    dtype: str
    life: bytes
    attempt: int = 0  # counts how often this life had to join anew
    shadow_term: int = 0  # of the server that the worker's parameters came from
    acknowledged: int = 0
    receipt: bytes = b""
    is_warm: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRequest:
    """Ask for more positions, at best whole batches, of the shared data, the site's private data or a stream (`data`).

    `dataset_samples`: the length of the dataset on this side.
    `held`: all that the worker knows to be leased to it and not yet admitted; what else the server has leased was
    lost on the way, or came back with a refused delta. `number` counts requests; an answer to an older one is void.
    """

    incarnation: int
    number: int
    held: tuple[Range, ...]
    undrawn: int = 0  # of those, samples that no step has used yet
    samples: int
    batch: int
    dataset_samples: int
    data: str = "shared"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricReport:
    """Figures of a publish. `is_evaluation`: as `Beat` asks for them; said again for as long as it does."""

    incarnation: int
    figures: tuple[tuple[str, float], ...]
    publish: int
    is_evaluation: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    """Leave: all unreported ranges may go to others at once."""

    incarnation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRequest:
    """Ask for the status table; answered to any admitted key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsRequest:
    """Ask for what a site must know of the run's settings; answered to any admitted key."""


# --- server → worker, control ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """You are in. `last_seq`: the last delta of yours in the log. `granted`: those claims that are still yours.

    `common`: the last publish of the run that the server of the Hello's `shadow_term` had made as well. A later one of
    that server's is not the run's, though it may have the number of one that is.
    """

    incarnation: int
    last_seq: int
    granted: tuple[Range, ...]
    publish: int
    common: int
    seed: int
    codec: str
    stretch: int  # a round may stretch to this many times its steps while a push is in flight
    life: bytes  # as in the Hello that this answers
    attempt: int = 0  # likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class Provide:
    """The run has no parameters yet: offer yours, then say `Hello` again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Not yet: ask again. `reason` is for people."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """No, and asking again will not help. `reason` says what differs and what to do.

    `incarnation` is the one that is meant, 0: whoever asked. What an earlier one has said may be answered late. `life`
    is that of the process that has joined instead: it may be the asker itself, who had said Hello twice.
    """

    reason: str
    incarnation: int = 0
    life: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejoin:
    """The server does not know that life of yours (any more): send `Hello` again."""

    incarnation: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """Answer to `Heartbeat`: where the run stands. Publishes from `oldest` on can be fetched one by one.

    `evaluate`: the publish that this worker is to measure, or a later one if it is beyond it; 0: none.
    """

    version: int
    publish: int
    oldest: int
    trained: int
    positions: int
    evaluate: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Positions that are now yours, in answer to request `number`. Empty: none is free at present."""

    number: int
    ranges: tuple[Range, ...]
    samples: int  # of one pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Push when this window ends, `milliseconds` from now; 0: after `steps` steps. `steps` is the H expected of you."""

    number: int
    milliseconds: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ack:
    """The delta is durable. It will be merged, exactly once. `receipt` proves to the server that it said so."""

    seq: int
    lsn: int
    receipt: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nack:
    """The delta was refused and will never be merged; its samples are not counted."""

    seq: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReady:
    """Publish `number` can be fetched. `evaluate`: and is to be measured."""

    number: int
    version: int
    evaluate: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """All samples are trained and merged; `publish` is the last one."""

    publish: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """Payload: the status (formats/status.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsReport:
    """Payload: tables of run.toml, and the standbys' public keys, as JSON."""


# --- between servers: a standby, or one that becomes the server, to another ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Follow:
    """Ask for the records after `lsn`, the asker's last one. Answered by Following or Cut.

    `terms`, each of which a takeover began, with the record that it `began` with, are those of the asker's log, and
    `chain` is what its records up to `lsn` are chained to.
    """

    run: str
    software: str
    lsn: int
    terms: tuple[int, ...]
    began: tuple[int, ...]
    chain: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirm:
    """All records up to `lsn` are durable here, in that term. Said after each batch, and each second as a heartbeat."""

    term: int
    lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """Follow no server of a term below this one any more, on whatever it says; answered by Position.

    Term 0 only asks.
    """

    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Following:
    """Answer to Follow and Confirm: the server's own last durable record, and whose confirmations count ("": all)."""

    lsn: int
    partner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Your records after `lsn` are not in the run's history: put them aside, then follow."""

    lsn: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    """Not me: `server` reigns, in `term`. A standby says it to workers, and to a server that has been deposed.

    From a server that may have been deposed and cannot know, `server` is "": look for another one.
    """

    server: str
    term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """Where a node stands: its last record, that record's term, and the lowest term that it follows, or serves in.

    `is_granted`: the asker may reign in the term that it asked for, as far as this one is concerned. A term is granted
    once.
    """

    lsn: int
    last_term: int
    term: int
    is_granted: bool


# --- bulk, either way ---


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """Offer of a delta: everything about it but its bytes. Answered by `Want`, in the end by `Ack` or `Nack`."""

    incarnation: int
    seq: int
    anchor: int  # number of the publish that the worker's parameters stood on
    anchor_term: int  # of the server that it came from
    steps: int
    ranges: tuple[Range, ...]
    codec: str
    payload_bytes: int
    payload_hash: bytes
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Offer of the initial parameters."""

    kind: str
    number: int
    payload_bytes: int
    payload_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """Send me chunks first … first + count − 1 of that object."""

    kind: str
    number: int
    first: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One chunk (payload) of `chunks`, of an object of `total_bytes` whose xxh3_128 is `total_hash`."""

    kind: str
    number: int
    index: int
    total_bytes: int
    total_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """That object is not held here (any more). Take a newer one."""

    kind: str
    number: int


Message = (
    Hello | Heartbeat | LeaseRequest | MetricReport | ProbeReport | Bye | StatusRequest | SettingsRequest
    | Welcome | Provide | Wait | Refused | Rejoin | Beat | Lease | Window | Ack | Nack | PublishReady
    | Finished | ProbeVerdict | StatusReport | SettingsReport
    | Follow | Confirm | Fence | Following | Cut | Redirect | Position
    | Push | Offer | Want | Chunk | Gone
)  # fmt: skip
MESSAGE_TYPES: tuple[type, ...] = (*get_args(Message), PublishNote)

# Anybody who is let in may look on, and a node may ask another where it stands. Such a question may come over a
# connection of its own, beside that of a worker or standby with the same key, and its answer goes back there.
QUESTIONS: tuple[type, ...] = (StatusRequest, SettingsRequest, Fence)
ANSWERS: tuple[type, ...] = (StatusReport, SettingsReport, Position)
# Role of a key → what its holder may say to a server. What changes a run otherwise is not said over the network at all.
SAID_BY: dict[str, tuple[type, ...]] = {
    "worker": (
        Hello, Heartbeat, LeaseRequest, MetricReport, ProbeReport, Bye, Push, Offer, Want, Chunk, StatusRequest,
        SettingsRequest,
    ),
    "standby": (Follow, Confirm, Redirect, Want, *QUESTIONS),
    "admin": (StatusRequest, SettingsRequest),
}  # fmt: skip
