"""The walls between deciding and doing: what the loops (serve.py, train.py) ask of the world.

`shell/` and `tensors/` fulfil them for real; a simulator may fulfil them with a virtual clock, network and disk.
Nothing here does anything.
"""

from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO, Protocol, TypeVar

from hetero_async.arrays import Array
from hetero_async.core.admission import Facts
from hetero_async.core.messages import Message, Push
from hetero_async.core.records import Entry
from hetero_async.core.reign import Reign, Sighting

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end, as the connection's key proves."""

    key: bytes  # Z85, 40 bytes
    role: str  # worker | standby | admin | server
    site: str
    worker: str  # or the standby's name, or the server's


@dataclass(frozen=True, slots=True, kw_only=True)
class Incoming:
    peer: Peer
    message: Message
    payload: bytes = b""
    term: int = 0  # that the sender serves in


class Lane(Protocol):
    """One kind of connection (control or bulk) to every peer."""

    async def receive(self) -> Incoming:
        """The next message. Cancel-atomic: a message is returned, or still waiting."""

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        """Hand one message to the network. False: the peer is away or slow and it was dropped (peers ask again)."""


class Link(Protocol):
    """Control and bulk, on separate connections so that a full bulk lane never delays a heartbeat."""

    @property
    def control(self) -> Lane: ...

    @property
    def bulk(self) -> Lane: ...

    @property
    def bytes_up(self) -> int: ...

    @property
    def bytes_down(self) -> int: ...

    @property
    def generation(self) -> int:
        """Grows with every new connection: what was under way on the old one is lost."""


class ServerLink(Link, Protocol):
    """The end that is dialled. `term`: the one that it serves in, which goes with every message."""

    term: int


class DialLink(Link, Protocol):
    """The end that dials: one server at a time, of those that there are."""

    @property
    def server(self) -> Peer:
        """Whom it is connected to, or dials at present."""

    def turn(self, server: str = "") -> None:
        """Turn to the server of that name, or to the next one; a name that is not known is ignored."""


class Log(Protocol):
    @property
    def chain(self) -> bytes:
        """What links the last durable record to all before it."""

    async def append(self, entries: Sequence[Entry]) -> None:
        """Make the entries durable, all with one fdatasync.

        Raises DiskFull when there is no space (nothing of it is kept). When fsync itself fails it does not return:
        the process ends at once with exit code 74, because the page cache can no longer be trusted.
        """

    def entries(self, after_lsn: int = 0) -> Iterator[Entry]:
        """Every record after that one. Raises LogCorrupt."""

    def read(self, after_lsn: int, count_bytes: int) -> tuple[bytes, list[Entry]] | None:
        """The chain after that record and durable records behind it, about so many bytes of them, at least one where
        there is one. None when they are not held any more. May run beside `append`."""

    def drop_before(self, lsn: int) -> None:
        """Delete whole segments that hold only records before this one."""


class KeptLog(Log, Protocol):
    """A log as its node has it, between two of its lives as a server or a standby."""

    @property
    def first_lsn(self) -> int:
        """The oldest record held."""

    @property
    def last_lsn(self) -> int: ...

    @property
    def last_term(self) -> int: ...

    def cut(self, lsn: int) -> Sequence[object]:
        """Put the records after that one aside, and say where they lie now. Not beside any other call."""

    def reset(self, lsn: int = 0, term: int = 0, chain: bytes = bytes(16)) -> None:
        """Begin anew behind a checkpoint of that record. Not beside any other call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSnapshot:
    """The model's half of a checkpoint. Nobody writes to the arrays, or what is about to change is copied first."""

    arrays: Mapping[str, Array]
    model_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Everything needed to go on from `lsn`: the state (JSON-able, from `core.State.dump`) and the model."""

    run: str
    lsn: int
    term: int
    chain: bytes  # of the log, after that record
    state: dict[str, object]
    state_hash: bytes
    model: ModelSnapshot


class Store(Protocol):
    @property
    def warnings(self) -> Sequence[str]:
        """One line for each damaged checkpoint that `load_newest` passed over."""

    def load_newest(self) -> Checkpoint | None:
        """The newest that is whole; None when there is none."""

    async def save(self, checkpoint: Checkpoint) -> int:
        """Write, fsync, rename, fsync the directory, read back and compare, then drop all but the two newest.

        Returns up to which record the log is not needed any more (0: all of it is). Raises DiskFull; the older
        checkpoints are untouched then.
        """

    def packed(self, lsn: int) -> tuple[int, bytes, "memoryview | bytes"] | None:
        """A checkpoint's record, and its two files as they are on disk; `lsn` 0: of the newest. None: not held."""

    async def keep(self, manifest: bytes, arrays: bytes) -> Checkpoint:
        """Save a checkpoint that another server has made. Raises LogCorrupt, ConfigError, DiskFull."""

    def drop_after(self, lsn: int) -> None:
        """Delete checkpoints of later records: they are of a history that is not the run's."""


class Promises(Protocol):
    """The lowest term that a standby follows, on its disk."""

    def load(self) -> int: ...

    def save(self, term: int) -> None:
        """Durable on return; a failing disk ends the process."""


class PublishedModel(Protocol):
    """The model as one publish shows it. Nobody writes to it any more."""

    def packed(self, about: Mapping[str, str]) -> bytes:
        """As a safetensors file, under the model's own names; `about` is its metadata."""


class Model(Protocol):
    """The tensors' half of the run's state. `apply` is the only thing that changes it."""

    def apply(self, entry: Entry) -> None:
        """Apply one log entry (Genesis, Delta, Stepped, Published; all others change nothing here)."""

    def inspect(self, codec: str, payload: bytes) -> Facts:
        """Decode without keeping: is it whole, finite, of the run's size, and how long is it (L2)?"""

    def inspect_initial(self, schema: bytes, payload: bytes) -> Facts:
        """The same for the initial parameters, before there is a run."""

    def genesis_payload(self, schema: bytes, upload: bytes) -> tuple[bytes, bytes]:
        """The genesis record's payload, and the hash of the parameters in it."""

    def payload_limit(self, schema: bytes) -> int:
        """The most bytes that a delta, or the initial parameters, of the run's model (else of this schema) can have."""

    def mismatch(self, schema: bytes) -> str:
        """One line that says how a schema differs from the run's (tensor, expected, found); empty when equal."""

    def fetch(self, kind: str, number: int) -> bytes | None:
        """A publish or snapshot object as bytes, if it is held; or the initial parameters, coded coarsely."""

    def newest_publish(self) -> int:
        """Which one the shadow stands on."""

    def oldest_publish(self) -> int:
        """The oldest publish still held: from there on, one by one is fewer bytes than a snapshot."""

    def published(self) -> PublishedModel:
        """The newest publish; beside no `apply`."""

    def model_hash(self) -> bytes:
        """xxh3_128 over parameters, outer state, shadow, and the model's buffers."""

    def snapshot(self) -> ModelSnapshot: ...

    def load(self, snapshot: ModelSnapshot) -> None: ...


class Blocking(Protocol):
    """Runs work that would stop the event loop: torch, zstd, disk. A thread in production."""

    def __call__(self, function: Callable[..., T], *arguments: object) -> Awaitable[T]: ...


class Observer(Protocol):
    """Told what happens, for people: log lines, metrics, tables."""

    def event(self, name: str, **fields: object) -> None: ...


class Outbox(Protocol):
    """The worker's deltas on disk, from before the first byte is sent until they are answered."""

    def save(self, push: Push, payload: bytes) -> None:
        """Durable on return. Raises DiskFull."""

    def drop(self, seq: int, is_acknowledged: bool) -> None:
        """Answered: forget it, but keep a note of an acknowledgement. Raises DiskFull."""

    def load(self) -> dict[int, tuple[Push, bytes]]:
        """What an earlier life left, by seq. Damaged files are set aside."""

    def acknowledged(self) -> Collection[int]:
        """The deltas of all lives that the server acknowledged, by their seq."""


class Kept(Protocol):
    """Something of this life for the next one."""

    def save(self, content: bytes) -> None:
        """Durable on return. Raises DiskFull; what was kept before stays then."""

    def load(self) -> bytes | None:
        """What was kept, if anything was and it is whole."""


class Replica(Protocol):
    """The parameters in training, as the loop's side uses them; a delta, a target and buffers are opaque to it."""

    def cut(self) -> object:
        """A round ends: its delta. The next is measured from here."""

    def cut_buffers(self) -> object:
        """Called with every `cut`: those of the model's buffers that the round has changed."""

    def adopt(self, target: object, buffers: object) -> None:
        """Stand on the target and keep the round's progress."""

    def reset(self, target: object, buffers: object) -> None:
        """Stand on the target with no progress."""


class Follower(Protocol):
    """The worker's tensors as the background uses them; a delta and a target are opaque to it.

    It is told which push (`pushed`) what was encoded last has become, and what the server did with it (`answered`).
    """

    schema: bytes
    schema_hash: bytes

    def initial_upload(self) -> bytes: ...

    def encode(self, delta: object, codec: str, buffers: object) -> bytes: ...

    def pushed(self, seq: int) -> None: ...

    def answered(self, seq: int, is_accepted: bool) -> None: ...

    def feedback(self) -> bytes:
        """What the next life must know of what coarse codecs have left out; empty: nothing was.

        To be kept before the newest push is, which is in it.
        """

    def restore_feedback(self, content: bytes, accepted: Collection[int], unanswered: Collection[int]) -> None:
        """Go on from that. `accepted`: all ever acknowledged; `unanswered`: what is still offered. Raises PeerError."""

    def norm(self, delta: object, buffers: object) -> float:
        """L2, as the server will find it: not finite where it will find a NaN, an infinity or far too much."""

    def take(self, kind: str, blob: bytes) -> int:
        """Move the shadow by a publish or snapshot object; returns its number. Initial parameters are only kept. Raises
        PeerError."""

    def merged_seq(self, worker: str) -> int:
        """Up to which seq a worker's deltas are in the shadow."""

    def published(self) -> object:
        """The shadow as it is, which nobody will write to; not beside `take`."""

    def target(self, pending: Sequence[tuple[str, bytes]]) -> object:
        """Shadow − Σ decoded deltas (codec, payload): where the parameters stand without any progress of a round."""

    @property
    def buffers(self) -> object:
        """The model's buffers as the shadow has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Archived:
    size_bytes: int
    stored_at: float  # seconds since the epoch, by the archive's clock


class Archive(Protocol):
    """Small objects far away, put once and never changed. Blocks: call it in a thread.

    Every method raises ArchiveAway when the object was not surely taken or given.
    """

    def put_new(self, name: str, content: bytes) -> None:
        """Durable there on return; the same content again is no error. Raises ArchiveConflict for another."""

    def list(self, run: str = "") -> Mapping[str, Archived]:
        """Every object of a run, or of all runs, by its name."""

    def get(self, name: str) -> bytes:
        """Raises FileNotFoundError when there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A file of the server's directory that belongs into the archive, open: it can be read when it is deleted."""

    name: str
    file: BinaryIO
    size_bytes: int
    lsn: int  # of its last record


class Holdings(Protocol):
    """What the server's directory has for the archive. Blocks: call it in a thread."""

    def genesis(self) -> bytes | None:
        """The chain after the first record, which tells runs of one name apart; None when it is not held any more."""

    def segment_after(self, lsn: int, with_open: bool) -> Held | None:
        """The oldest closed segment with records after that one, or the one still written to. Raises LogCorrupt."""

    def checkpoint_after(self, lsn: int) -> Sequence[Held]:
        """The newest checkpoint's files in the order to be put, unless it is not newer. Raises LogCorrupt."""


class Witness(Protocol):
    """A third party that lets one server reign at a time. Every method raises WitnessAway when it has not answered in
    time or not for sure: then nothing is known, and whoever asked looks again before it does anything."""

    async def look(self) -> Sighting:
        """What is in force now; read from a majority, never from a lagging member."""

    async def claim(self, before: Reign | None, after: Reign) -> bool:
        """Put `after` in the place of `before` and take the lease for `after.server`, all of it or nothing.

        False when the reign is not `before` any more, or when another server holds the lease. `before` equal to
        `after` takes the lease again, after a restart or a pause.
        """

    async def amend(self, before: Reign, after: Reign) -> bool:
        """Put `after` in the place of `before`, the lease as it is. False when the reign is not `before` any more."""

    async def renew(self) -> bool:
        """Hold the lease for another `lease_seconds`. False when it has run out, or another holds it."""

    async def resign(self) -> None:
        """Give the lease back at once, so that nobody has to wait for its end."""
