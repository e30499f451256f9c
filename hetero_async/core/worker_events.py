"""What goes into a worker's machine and what comes out of it."""

from dataclasses import dataclass, field, replace

from hetero_async.core.heartbeat import UNUSED, Heartbeat, Usage
from hetero_async.core.messages import PUBLISH, LeaseRequest, Message, Push
from hetero_async.core.ranges import Ranges


@dataclass(frozen=True, slots=True, kw_only=True)
class Vitals:
    """What the training loop knows of itself. `held`: ranges leased and not yet in any cut delta."""

    doing: str = "joining"
    steps: int = 0
    steps_per_second: float = 0.0
    bytes_up: int = 0
    bytes_down: int = 0
    held: Ranges = ()
    wanted_samples: int = 0
    undrawn_samples: int = 0
    batch: int = 1
    dataset_samples: int = 0
    usage: Usage = UNUSED
    data: str = "shared"
    evaluates_every: float = 0.0

    def heartbeat(self, incarnation: int, publish: int, round_trip_ms: int) -> Heartbeat:
        return Heartbeat(
            incarnation=incarnation,
            state=self.doing,
            steps=self.steps,
            steps_per_second=self.steps_per_second,
            publish=publish,
            bytes_up=self.bytes_up,
            bytes_down=self.bytes_down,
            evaluates_every=self.evaluates_every,
            usage=replace(self.usage, round_trip_seconds=round_trip_ms / 1000),
        )

    def lease_request(self, incarnation: int, number: int, held: Ranges) -> LeaseRequest:
        return LeaseRequest(
            incarnation=incarnation,
            number=number,
            held=held,
            undrawn=self.undrawn_samples,
            samples=self.wanted_samples,
            batch=self.batch,
            dataset_samples=self.dataset_samples,
            data=self.data,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """`term`: that the sender serves in, 0 for a standby."""

    now_ms: int
    message: Message
    term: int = 0


@dataclass(frozen=True, slots=True)
class Anchor:
    """A publish, and the term of the server that it came from: after a takeover others may have its number."""

    publish: int = 0
    term: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A round ended and its delta is encoded."""

    now_ms: int
    anchor: Anchor
    steps: int
    ranges: Ranges
    codec: str
    payload_bytes: int
    payload_hash: bytes
    tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetched:
    """The worker's shadow now stands at this publish, which contains its own deltas up to `merged_seq`.

    `term` is that of the server that it came from. An INITIAL leaves the shadow where it is.
    """

    number: int
    term: int
    merged_seq: int
    kind: str = PUBLISH


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconnected:
    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed, and this is how the training loop is."""

    now_ms: int
    vitals: Vitals


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The user's script measured something on the parameters of the present publish."""

    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The user's script measured the parameters of that publish, as it was asked to. `term`: of its server."""

    publish: int
    figures: tuple[tuple[str, float], ...]
    term: int = 0


Event = Heard | Measured | Evaluated | Cut | Fetched | Reconnected | Tick


@dataclass(frozen=True, slots=True)
class Dropped:
    """An answered delta. `refusal` is empty when it was admitted."""

    seq: int
    refusal: str = ""


@dataclass(slots=True)
class Owed:
    """Work owed to the world, in this order: save, drop, send. `granted` goes to the training loop."""

    saves: list[Push] = field(default_factory=list)
    drops: list[Dropped] = field(default_factory=list)
    control: list[Message] = field(default_factory=list)
    bulk: list[Message] = field(default_factory=list)
    granted: list[Ranges] = field(default_factory=list)
    regranted: Ranges | None = None  # after a new join: what is still held, in place of what was
    provide: bool = False
    turn: str | None = None  # to the server of that name, or to the next one ("")
