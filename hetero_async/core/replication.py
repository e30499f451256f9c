"""Which records the server may speak of: those that no single disaster can take away, by what the run asked for.

Whatever follows from a record (an acknowledgement, a lease, a publish) leaves the server only when the record is
released. With durability `local` that is when it is durable here; with `replicated` when a standby has confirmed it in
this term. A standby that takes over has all that was released, and a server that was deposed can get no confirmation
any more, whatever its clock says: that is the whole fence.

With a witness, only the *partner's* confirmations count: the standby that the witness knows to have everything. The
server changes partners only by changing that record first, so no other standby ever takes over by itself. From the
moment it asks for that change until it knows what became of it, a record is released when it would be with either
partner. Without a witness every standby's confirmation counts, because taking over is then the operator's decision and
asks them all.

A server that is alone, with `when_alone = "continue"`, has the witness forget its partner and then releases by itself.
"""

from dataclasses import dataclass
from typing import Literal

LOCAL, REPLICATED = "local", "replicated"
WAIT, CONTINUE = "wait", "continue"


@dataclass(frozen=True, slots=True, kw_only=True)
class Durability:
    """What the run asked for. `lease_ms`: a server, or a standby, not heard of for so long counts as away."""

    durability: Literal["local", "replicated"] = "local"
    when_alone: Literal["wait", "continue"] = "wait"
    has_witness: bool = False
    lease_ms: int = 5_000


@dataclass(slots=True)
class Standing:
    """A standby that follows, as last heard. `seen`: our last record at that time."""

    heard_ms: int
    confirmed: int = 0
    seen: int = 0
    is_level: bool = False  # it has confirmed all that we had when it spoke the time before


class Replication:
    def __init__(self, rules: Durability) -> None:
        self.rules = rules
        self.standings: dict[str, Standing] = {}
        self.partner = ""  # on the witness's record; with no witness always ""
        self.released = 0
        self._proposed: str | None = None  # as partner; what became of it is not known
        self._sure_until_ms = 0
        self._holds_back = ""  # whom we wait for before the witness is told that it has everything

    def confirm(self, standby: str, confirmed: int, lsn: int, now_ms: int) -> None:
        """A standby of this term has all up to `confirmed`; our own last record is `lsn`."""
        standing = self.standings.setdefault(standby, Standing(heard_ms=now_ms))
        standing.is_level = standing.seen > 0 and confirmed >= standing.seen
        standing.heard_ms, standing.confirmed, standing.seen = now_ms, max(standing.confirmed, confirmed), lsn

    def witnessed(self, partner: str | None, sure_until_ms: int) -> None:
        """`partner`: who is on record; None: that is not known, an answer did not come."""
        self._sure_until_ms = sure_until_ms
        if partner is not None:
            self.partner, self._proposed = partner, None
            self._holds_back = "" if partner else self._holds_back

    def release(self, now_ms: int, lsn: int) -> int:
        """The last record that may be spoken of, `lsn` being the last one that there is. It never goes back."""
        self.released = max(self.released, min(lsn, self._releasable(now_ms, lsn)))
        return self.released

    def _releasable(self, now_ms: int, lsn: int) -> int:
        if self.is_by_itself:
            return lsn if self.is_sure(now_ms) else 0
        if not self.rules.has_witness:
            return max((standing.confirmed for standing in self.standings.values()), default=0)
        return min(map(self._confirmed, self._partners()), default=0)

    def _confirmed(self, standby: str) -> int:
        return self.standings[standby].confirmed if standby in self.standings else 0

    def _partners(self) -> list[str]:
        """All that may be on record, or shall soon be."""
        return [standby for standby in (self.partner, self._proposed, self._holds_back) if standby]

    @property
    def is_by_itself(self) -> bool:
        """Whether our own disk is enough."""
        may_be_alone = self.rules.when_alone == CONTINUE and self.rules.has_witness
        return self.rules.durability == LOCAL or (may_be_alone and not self._partners())

    def is_sure(self, now_ms: int) -> bool:
        """Whether nobody else can reign: the witness keeps our lease, or a standby has just spoken in our term."""
        return not self.rules.has_witness or now_ms < self._sure_until_ms or bool(self._present(now_ms))

    def _present(self, now_ms: int) -> list[str]:
        return [name for name, heard in self.standings.items() if now_ms - heard.heard_ms < self.rules.lease_ms]

    def is_away(self, standby: str, now_ms: int) -> bool:
        return standby not in self._present(now_ms)

    def wanted_partner(self, now_ms: int) -> str | None:
        """Whom the witness is to have on record instead, to be asked of it at once; None: nobody else.

        A standby is proposed when it has all that was released. Before that, while we are by ourselves and go on
        releasing, one that is nearly there is waited for.
        """
        if not self.rules.has_witness or (self.partner and not self.is_away(self.partner, now_ms)):
            return None
        level = [name for name in self._present(now_ms) if self.standings[name].is_level]
        if self._holds_back and self._holds_back not in level:
            self._holds_back = ""
        for name in sorted(level):
            if self.standings[name].confirmed >= self.released:
                return self._propose(name)
        if level and not self.partner and self.rules.durability == REPLICATED:
            self._holds_back = min(level)
        if self.partner and (self.rules.durability == LOCAL or self.rules.when_alone == CONTINUE):
            return self._propose("")
        return None

    def _propose(self, partner: str) -> str:
        self._proposed = partner
        return partner

    def why_held(self, now_ms: int, lsn: int) -> str:
        """Why something waits, for people; "" when nothing does, or not for long."""
        if self.released >= lsn or self._present(now_ms):
            return ""
        if self.is_by_itself:
            return "acknowledgements wait: the witness cannot be reached, so another server may have taken over"
        return "acknowledgements wait: no standby is in reach to confirm them"

    def keeps_from(self, lsn: int, now_ms: int) -> int:
        """The log is still needed from the record after this one, by standbys that are on their way."""
        return min((self.standings[name].confirmed for name in self._present(now_ms)), default=lsn)
