"""What the server hears of who reigns, and who comes after it: from standbys, from the witness, from its successor.

Part of the server's machine. A standby's records are told from ours by the terms that its log went through: a term has
one server, so two logs agree for as long as their terms do. A server that hears of a higher term stops.
"""

from hetero_async.core.events import Followed, Witnessed
from hetero_async.core.messages import Confirm, Cut, Fence, Follow, Following, Position, Redirect, Refused
from hetero_async.core.post import Post
from hetero_async.core.replication import Replication
from hetero_async.core.state import State

# A server that is to hand over gives its successor so long to fetch the last records.
HANDOVER_MS = 10_000
TWO_HISTORIES = (
    "record {lsn} of this log is another one in {server}'s, of the same term: one of the two disks has lost records. "
    "Neither is changed; keep a copy of both, and let the one that you trust more serve"
)


class Succession:
    def __init__(self, name: str, run: str, state: State, replication: Replication, post: Post) -> None:
        self.name = name
        self.deposed = ""  # by whom, for people: then this server must stop
        self._run = run
        self._state = state
        self._replication = replication
        self._post = post
        self._followers: dict[str, bool] = {}  # standbys whose logs were found to agree with this process's
        self._successor = ""
        self._latest_ms = 0  # it goes then, whether its successor has everything or not

    @property
    def is_under_way(self) -> bool:
        """Handing over: nothing is decided any more."""
        return bool(self._successor or self.deposed)

    def position(self, standby: str, fence: Fence) -> Position:
        """The answer to a Fence, after it has been stepped."""
        term = self._state.term
        is_granted = fence.term == 0 or (fence.term > term and self._successor == standby)
        return Position(lsn=self._state.lsn, last_term=term, term=term, is_granted=is_granted)

    def step(self, event: Followed | Witnessed) -> None:
        if isinstance(event, Witnessed):
            self._witnessed(event)
        else:
            self._followed(event)
        self.hand_over(event.now_ms)

    def hand_over(self, now_ms: int) -> None:
        """The successor is waited for, but not for long: then it takes over with what it has."""
        standing = self._replication.standings.get(self._successor)
        has_all = standing is not None and standing.confirmed >= self._state.lsn
        if self._successor and (has_all or now_ms > self._latest_ms):
            self.deposed = self.deposed or f"{self._successor} takes over"

    def _followed(self, event: Followed) -> None:
        standby, term = event.standby, self._state.term
        match event.message:
            case Follow() as follow:
                self._follow(standby, follow, event.is_chained)
            case Confirm(term=theirs, lsn=lsn) if theirs == term and lsn > self._state.lsn:
                self._lost(standby, lsn, self._state.lsn)
            case Confirm(term=theirs, lsn=lsn) if theirs == term and standby in self._followers:
                self._replication.confirm(standby, lsn, self._state.lsn, event.now_ms)
                self._tell_following(standby)
            case Confirm():
                # It was joined to another reign, or to an earlier process of ours, whose last records may have been
                # others. Whatever it hears from here makes it ask anew, as it must.
                self._post.send(standby, Redirect(server=self.name, term=term))
            case Fence(term=wanted) if wanted > term and not self._successor:
                self._successor, self._latest_ms = standby, event.now_ms + HANDOVER_MS
            case Redirect(server=server, term=higher) if higher > term:
                self.deposed = f"{server} has taken over, in term {higher}"

    def _follow(self, standby: str, follow: Follow, is_chained: bool) -> None:
        """One that has more of this very reign, or has something else, shows that a disk has lost what it had."""
        promotions = list(zip(follow.terms, follow.began, strict=False))
        common, last_term = self._state.common_lsn(promotions), max(follow.terms, default=0)
        if follow.run != self._run:
            reason = f'this server trains the run "{self._run}", not "{follow.run}"'
            self._post.send(standby, Refused(reason=reason))
        elif last_term > self._state.term:
            self.deposed = f"{standby} has records of term {last_term}, and this is term {self._state.term}"
        elif promotions == self._state.promotions and follow.lsn > common:
            self._lost(standby, follow.lsn, common)
        elif follow.lsn <= common and not is_chained:
            self._post.send(standby, Refused(reason=TWO_HISTORIES.format(lsn=follow.lsn, server=self.name)))
        elif follow.lsn > common:
            self._post.send(standby, Cut(lsn=common))
        else:
            self._followers[standby] = True
            self._tell_following(standby)

    def _lost(self, standby: str, theirs: int, ours: int) -> None:
        self.deposed = (
            f"{standby} has record {theirs} of this term and this log ends with record {ours}: "
            f"what was durable here is lost, and {standby} has it"
        )

    def _tell_following(self, standby: str) -> None:
        self._post.send(standby, Following(lsn=self._state.lsn, partner=self._replication.partner))

    def _witnessed(self, event: Witnessed) -> None:
        reign = event.reign
        if reign.term > self._state.term or reign.server != self.name:
            self.deposed = f"{reign.server} has taken over, in term {reign.term}"
