"""A standby's half of the protocol between servers: follow the log, confirm what is durable, know when to take over.

The same shape as the other machines: `step(event)` in, `ready()` out, time in the events. It knows of the log only its
end, and of records nothing.

Rules
1. A term is promised before a word of it is said: what was promised survives a crash, and no server of a lower term is
   followed or confirmed to from then on. That is how one that takes over fences the others.
2. Only what is durable here is confirmed, and only to the server from whom it came, in that server's term.
3. From the moment that it tries to take over it confirms nothing more, unless the attempt has failed for certain.
"""

from dataclasses import dataclass, field

from hetero_async.core.messages import (
    Confirm,
    Cut,
    Fence,
    Follow,
    Following,
    Message,
    Position,
    Redirect,
    Refused,
    Wait,
)
from hetero_async.core.reign import Reign, Sighting
from hetero_async.core.state import State

FOLLOW_EVERY_MS = 1_000
TURN_EVERY_MS = 1_000
CONFIRM_EVERY_MS = 500
LONG_AGO_MS = -(10**9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """From the server that is dialled, or from whoever says that it is one."""

    now_ms: int
    server: str
    term: int  # it serves in, 0: in none
    message: Message


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Records came and are durable; `lsn` is the last one, of `last_term`."""

    now_ms: int
    lsn: int
    last_term: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconnected:
    now_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    now_ms: int


Event = Heard | Stored | Reconnected | Tick


@dataclass(slots=True)
class Owed:
    """Work owed to the world, in this order: make the promise durable, send, turn, cut."""

    promise: int = 0  # a term; 0: none
    messages: list[Message] = field(default_factory=list)
    turn: str | None = None  # to the server of that name, or to the next one ("")
    cut: int | None = None  # records after this one are not the run's


class Standby:
    def __init__(self, *, name: str, run: str, software: str, state: State, promised: int) -> None:
        """`state`: what its log came to; it belongs to whoever applies records, and is looked at here."""
        self.name = name
        self.lsn = state.lsn
        self.last_term = state.term
        self.term = max(promised, state.term)
        self._state = state
        self.server = ""  # whom it follows
        self.server_lsn = 0
        self.partner = ""
        self.is_joined = False
        self.is_storing = False  # records of the server that it followed last are on their way to the disk
        self.is_taking_over = False
        self.refusal = ""
        self.heard_ms = LONG_AGO_MS  # from a server that it follows
        self._candidate = ""  # to whom the present term was granted
        self.vowed = 0
        self._run, self._software = run, software
        self._said_ms = self._turned_ms = LONG_AGO_MS
        self._owed = Owed()

    def step(self, event: Event) -> None:
        match event:
            case Heard():
                self._hear(event)
            case Stored():
                self.lsn, self.last_term, self.is_storing = event.lsn, event.last_term, False
                self._confirm(event.now_ms)
            case Reconnected():
                self.is_joined, self._said_ms = False, LONG_AGO_MS
                self._speak(event.now_ms)
            case Tick():
                self._speak(event.now_ms)

    def ready(self) -> Owed:
        owed, self._owed = self._owed, Owed()
        return owed

    # --- what can be read off it ---

    @property
    def wanted(self) -> int | None:
        """The record that it would like to have next."""
        return self.lsn + 1 if self.is_joined and not self.is_taking_over else None

    @property
    def lag(self) -> int:
        """Records that the server had and we had not, when it was last heard."""
        return max(0, self.server_lsn - self.lsn)

    def hears_server(self, now_ms: int, within_ms: int) -> bool:
        return now_ms - self.heard_ms < within_ms

    # --- following ---

    def _hear(self, heard: Heard) -> None:
        if heard.term and heard.term < self.term:
            # Its reign is over, and it does not know.
            self._owed.messages.append(Redirect(server=self.server, term=self.term))
            return
        if heard.term > self.term:
            self._promise(heard.term)
        match heard.message:
            case Following() as following if not self.is_taking_over:
                self.is_joined, self.server, self.heard_ms = True, heard.server, heard.now_ms
                self.server_lsn, self.partner = following.lsn, following.partner
            case Cut(lsn=lsn):
                self._owed.cut = lsn
            case Redirect(server=server, term=term) if term >= self.term:
                self._owed.turn = server
            case Wait() if not self.is_joined and heard.now_ms - self._turned_ms >= TURN_EVERY_MS:
                self._turned_ms, self._owed.turn = heard.now_ms, ""  # another standby
            case Refused(reason=reason):
                self.refusal = reason

    def _speak(self, now_ms: int) -> None:
        if self.is_taking_over:
            return
        if self.is_joined and now_ms - self._said_ms >= CONFIRM_EVERY_MS:
            self._confirm(now_ms)
        elif not self.is_joined and not self.is_storing and now_ms - self._said_ms >= FOLLOW_EVERY_MS:
            # Where our log ends is what the answer is about, so it may not grow in between.
            self._said_ms = now_ms
            terms, began = zip(*self._state.promotions, strict=True) if self._state.promotions else ((), ())
            follow = Follow(run=self._run, software=self._software, lsn=self.lsn, terms=terms, began=began)
            self._owed.messages.append(follow)

    def _confirm(self, now_ms: int) -> None:
        if self.is_joined and not self.is_taking_over:
            self._said_ms = now_ms
            self._owed.messages.append(Confirm(term=self.term, lsn=self.lsn))

    def _promise(self, term: int) -> None:
        self.term = self._owed.promise = term
        self._candidate = ""
        self.is_joined = False  # to a server of another term

    # --- taking over ---

    def vow(self, term: int) -> None:
        """Grant a term to ourselves: nobody else gets it from here."""
        self.vowed = term

    def fence(self, fence: Fence, candidate: str) -> Position:
        """Another takes over, or asks where we stand."""
        if fence.term > max(self.term, self.vowed):
            self._promise(fence.term)
            self._candidate, self.server = candidate, ""
        is_granted = fence.term == 0 or (fence.term == self.term and self._candidate == candidate)
        return Position(lsn=self.lsn, last_term=self.last_term, term=self.term, is_granted=is_granted)

    def claim(self, sighting: Sighting, now_ms: int, silence_ms: int) -> Reign | None:
        """The reign to claim at the witness, if it is for us to do so now: nobody holds the lease, and the witness
        knows that we have everything; or we had begun a reign already when we died."""
        reign = sighting.reign
        if reign is None or sighting.holder or self.hears_server(now_ms, silence_ms) or self.lsn == 0:
            return None
        if reign.server == self.name and reign.term >= self.term:
            return reign
        if reign.partner == self.name and reign.term >= self.last_term:
            return Reign(term=max(reign.term, self.term) + 1, server=self.name)
        return None
