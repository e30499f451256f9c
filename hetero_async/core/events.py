"""What goes into the server's machine and what comes out of it."""

from dataclasses import dataclass

from hetero_async.core.admission import Facts
from hetero_async.core.messages import Message
from hetero_async.core.records import Entry
from hetero_async.core.reign import Reign

UNSEEN = Facts()


@dataclass(frozen=True, slots=True, kw_only=True)
class Received:
    """A worker's message, and the key (Z85) that its connection was made with.

    `mismatch` says how its schema differs, `facts` what its payload is like.
    """

    now_ms: int
    worker: str
    key: str
    site: str
    message: Message
    payload: bytes = b""
    facts: Facts = UNSEEN
    mismatch: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provided:
    """A worker uploaded the initial parameters. `payload` is the whole of the genesis record's."""

    now_ms: int
    worker: str
    key: str
    schema_hash: bytes
    parameters_hash: bytes
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Followed:
    """A standby's message, or what another node says of who reigns."""

    now_ms: int
    standby: str
    message: Message
    is_chained: bool = True  # a Follow whose log ends in a record that ours has: as ours has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Witnessed:
    """What the witness has on record."""

    now_ms: int
    reign: Reign


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """All records handed out so far are applied; the model hashes to this."""

    oldest_publish: int
    model_hash: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    now_ms: int


Event = Received | Followed | Witnessed | Provided | Applied | Tick


@dataclass(frozen=True, slots=True)
class Outgoing:
    to: str  # a worker or a standby
    message: Message


@dataclass(frozen=True, slots=True)
class Strike:
    """A worker did what no honest one does. Too many of them, and its key is quarantined."""

    worker: str
    reason: str


@dataclass(frozen=True, slots=True)
class Ready:
    """Work owed to the world, in this order: make `records` durable, apply them, send `messages`, count `strikes`."""

    records: tuple[Entry, ...]
    messages: tuple[Outgoing, ...]
    strikes: tuple[Strike, ...] = ()
