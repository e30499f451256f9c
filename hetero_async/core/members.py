"""What the server knows of its workers only from having heard them: speeds, silence, what they last said.

None of it is state: it starts empty with every server process and no record depends on it except through a decision
that is itself a record (`Left`).
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from hetero_async.core.admission import STRIKES, NotAdmitted
from hetero_async.core.events import Received, Strike
from hetero_async.core.heartbeat import UNUSED, Heartbeat, Lately, Usage
from hetero_async.core.messages import Hello, Refused, Rejoin
from hetero_async.core.state import Member


@dataclass(slots=True)
class Presence:
    """One worker as last heard. Times are the caller's monotonic milliseconds."""

    heard_ms: int
    life: bytes = b""  # which of the worker's processes has joined this process of ours; none yet
    device: str = ""
    dtype: str = ""
    doing: str = "joining"
    steps: int = 0
    steps_per_second: float = 0.0
    publish: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    evaluates_every: float = 0.0
    refused: int = 0
    staleness: int = 0
    probe: str = ""  # "": not heard of; "agrees", "reference", or what differs
    usage: Usage = UNUSED
    lately: Lately = field(default_factory=Lately)

    def join(self, hello: Hello) -> None:
        if self.life != hello.life:
            self.usage, self.lately, self.probe = UNUSED, Lately(), ""
        self.life, self.steps_per_second = hello.life, 0.0
        self.device, self.dtype, self.doing = hello.device, hello.dtype, "joined"

    def beat(self, heartbeat: Heartbeat) -> None:
        self.doing = heartbeat.state
        self.steps, self.steps_per_second = heartbeat.steps, heartbeat.steps_per_second
        self.publish = heartbeat.publish
        self.bytes_up, self.bytes_down = heartbeat.bytes_up, heartbeat.bytes_down
        self.usage = heartbeat.usage
        self.lately.note(self.heard_ms, heartbeat.usage)
        self.evaluates_every = heartbeat.evaluates_every


class Presences:
    def __init__(self) -> None:
        self.refusals: Counter[str] = Counter()  # by cause, of which there are few
        self._by_worker: dict[str, Presence] = {}
        self._strikes: list[Strike] = []

    def hear(self, worker: str, now_ms: int) -> Presence:
        presence = self._by_worker.setdefault(worker, Presence(heard_ms=now_ms))
        presence.heard_ms = now_ms
        return presence

    def refuse(self, worker: str, now_ms: int, refusal: NotAdmitted) -> None:
        """Count it; where it was for something that no honest worker does, it is a strike as well."""
        self.hear(worker, now_ms).refused += 1
        self.refusals[refusal.cause] += 1
        if refusal.cause in STRIKES:
            self._strikes.append(Strike(worker, refusal.reason))

    def take_strikes(self) -> tuple[Strike, ...]:
        strikes, self._strikes = tuple(self._strikes), []
        return strikes

    def excuse(self, gap_ms: int) -> None:
        """We were away ourselves for so long (frozen, a full disk): nobody's silence of that time counts."""
        for presence in self._by_worker.values():
            presence.heard_ms += gap_ms

    def of(self, worker: str) -> Presence | None:
        return self._by_worker.get(worker)

    def rate(self, worker: str) -> float:
        """Steps per second as the worker measured them, 0 when it has not said yet."""
        presence = self._by_worker.get(worker)
        return presence.steps_per_second if presence else 0.0

    def exchange_seconds(self, worker: str) -> float:
        """Of a delta and a publish, as the worker measured them; 0 when it has not said yet."""
        presence = self._by_worker.get(worker)
        return presence.usage.exchange_seconds if presence else 0.0

    def evaluates_every(self, worker: str) -> float:
        """A share of the run, 0 when it does not."""
        presence = self._by_worker.get(worker)
        return presence.evaluates_every if presence else 0.0

    def silent(self, active: Iterable[str], now_ms: int, limit_ms: int) -> list[str]:
        """The active workers not heard for longer than the limit. One never heard counts from now on."""
        return [worker for worker in active if now_ms - self._since(worker, now_ms) > limit_ms]

    def next_silence(self, active: Iterable[str], now_ms: int, limit_ms: int) -> int | None:
        """When the first of them will have been silent for too long."""
        return min((self._since(worker, now_ms) + limit_ms + 1 for worker in active), default=None)

    def _since(self, worker: str, now_ms: int) -> int:
        return self._by_worker.setdefault(worker, Presence(heard_ms=now_ms)).heard_ms


def is_life(member: Member | None, event: Received, incarnation: int) -> bool:
    """A life has one key: what another one says, of the same worker, belongs to a life still to begin."""
    return member is not None and member.active and (member.incarnation, member.key) == (incarnation, event.key)


def absence(member: Member | None, presence: Presence, event: Received, incarnation: int) -> Rejoin | Refused | None:
    """What to answer where it is not the worker's present life that speaks; None: it is.

    A life joins every process of the server anew: what was lost before that process began comes out then.
    """
    if not presence.life:
        return Rejoin(incarnation=incarnation, reason="joining anew: the server had restarted")
    if is_life(member, event, incarnation):
        return None
    if member is not None and member.active and incarnation < member.incarnation:
        reason = f"another process with the key of {event.worker} has joined since; this one must stop"
        return Refused(reason=reason, incarnation=incarnation, life=presence.life)
    return Rejoin(incarnation=incarnation, reason="the server had given you up")
