"""Who judges the simulated run: keeps its own account of what was promised and done, and holds the code against it.

Nothing here asks the code under test what it believes. The judge sees what passes the ports: rounds cut, bytes encoded,
saved and sent, records applied, acknowledgements on their way out. The numbers are those of the invariants in
ARCHITECTURE.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from hetero_async.core.messages import Ack, Message, Nack, PublishReady, Push
from hetero_async.core.records import Delta, Entry, Published, RunSettings
from hetero_async.core.state import State
from hetero_async.shell.store import KEPT
from hetero_async.sim.disk import SimulatedDisk
from hetero_async.sim.story import Chapter, Key, Story
from hetero_async.tensors.codecs import decode_payload
from hetero_async.tensors.replica import read_object

# Deltas that a worker may have unanswered: one offered, one waiting, and what an earlier life has left.
OUTBOX_MAX = 8
# What a server may hold: per worker, messages that wait for a standby and deltas that wait for a merge; checkpoints,
# of which one may be damaged and one is being made.
HELD_MAX, PENDING_MAX, CHECKPOINTS_MAX = 40, 8, KEPT + 2


@dataclass(frozen=True, slots=True)
class Violation:
    """`invariant` is its number, or "liveness", or "crash"."""

    invariant: str
    what: str


@dataclass(slots=True)
class Account:
    """What one worker has done and was told, over all its lives."""

    saved: dict[int, tuple[Push, bytes]] = field(default_factory=dict)
    unanswered: dict[int, bool] = field(default_factory=dict)
    acknowledged: dict[int, int] = field(default_factory=dict)  # seq → lsn
    nacked: dict[int, bool] = field(default_factory=dict)  # it may not have heard of it yet


class Judge:
    def __init__(
        self, settings: RunSettings, fail: Callable[[Violation], None], *, nodes: Sequence[str] = (), copies: int = 1,
        is_alone: Callable[[str], bool] = lambda node: False,
    ) -> None:  # fmt: skip
        """`fail` is told of the first violation. `copies`: on so many of the nodes' disks is what is acknowledged, but
        by a node that `is_alone` on its own."""
        self.settings = settings
        self.violation: Violation | None = None
        self.accounts: dict[str, Account] = {}
        self.story = Story()
        self.forgiven: dict[Key, bool] = {}  # admitted by a server that was lost with its site; `local` allows it
        self.announced: dict[int, str] = {}  # publishes of the story that workers were told of, and by whom
        self._fail = fail
        self._nodes = nodes
        self._copies = copies
        self._is_alone = is_alone
        self._hashes: dict[int, tuple[bytes, bytes]] = {}  # lsn → hashes of state and model
        self._reached: dict[str, int] = {}  # node → up to which record it has applied the story
        self._astray: dict[str, int] = {}  # node → after which record it is on a branch of its own
        self._servers: dict[int, str] = {}  # term → who acknowledges in it

    @property
    def trained(self) -> int:
        return len(self.story.takers)

    @property
    def acknowledged(self) -> int:
        return sum(len(account.acknowledged) for account in self.accounts.values())

    @property
    def refused(self) -> int:
        return sum(len(account.nacked) for account in self.accounts.values())

    def account(self, worker: str) -> Account:
        return self.accounts.setdefault(worker, Account())

    def violated(self, invariant: str, what: str) -> None:
        if self.violation is None:
            self.violation = Violation(invariant, what)
            self._fail(self.violation)

    def stuck(self, task: str) -> None:
        self.violated("liveness", f"{task} is busy for ever and gets nowhere")

    # --- what a node says ---

    def sends(self, node: str, term: int, worker: str, message: Message, disks: Mapping[str, SimulatedDisk]) -> None:
        """A message leaves. An acknowledgement must be of something that no disaster takes away."""
        account = self.account(worker)
        if isinstance(message, Nack):
            account.nacked[message.seq] = True
            if (worker, message.seq) in self.story.deltas and message.seq in account.unanswered:
                self.violated("1", f"delta {message.seq} of {worker} is refused, and it is in the log")
        if isinstance(message, PublishReady) and node not in self._astray:
            self.announced[message.number] = node
        if not isinstance(message, Ack):
            return
        name, lsn = f"delta {message.seq} of {worker}", message.lsn
        if self._servers.setdefault(term, node) != node:
            self.violated("5", f"{node} and {self._servers[term]} both acknowledge in term {term}")
        elif lsn > self._astray.get(node, lsn):
            self._lose({(worker, message.seq): lsn}, f"{node}, deposed, acknowledges")
        elif account.acknowledged.setdefault(message.seq, lsn) != lsn:
            self.violated("1", f"{name} is acknowledged as record {lsn} and as {account.acknowledged[message.seq]}")
        elif self.story.deltas.get((worker, message.seq)) != lsn:
            self.violated("1", f"{name} is acknowledged as record {lsn}, which was not applied")
        elif not self._is_safe(node, lsn, account.saved[message.seq][1], disks):
            self.violated("1", f"{name} is acknowledged, and a power cut or the loss of a site would lose it")

    def _is_safe(self, node: str, lsn: int, payload: bytes, disks: Mapping[str, SimulatedDisk]) -> bool:
        holders = [name for name in self._nodes if _holds(disks[name], lsn, payload, 1 if name != node else KEPT)]
        return node in holders and (len(holders) >= self._copies or self._is_alone(node))

    def _lose(self, deltas: Mapping[Key, int], how: str) -> None:
        """Acknowledged, and no part of the run's history."""
        for worker, seq in deltas:
            if self.account(worker).acknowledged.pop(seq, None) is not None or "acknowledges" in how:
                self.forgiven[worker, seq] = True
                if self._copies > 1:
                    self.violated("1", f"{how} delta {seq} of {worker}, which is not in the run's history")

    # --- what a node does ---

    def applied(self, node: str, entry: Entry, shadow: torch.Tensor, publish: bytes) -> None:
        """A node has applied a record, for the first time or in a recovery. What was applied once never changes.

        `shadow` is θ̂ now; `publish` is what workers are to fetch, where the record made one.
        """
        chapter, known = Chapter.of(entry, shadow), self.story.at(entry.lsn)
        if known is not None and known.digest == chapter.digest:
            self._reached[node] = max(self._reached.get(node, 0), entry.lsn)
        elif known is not None and entry.term == known.term:
            self.violated("3", f"record {entry.lsn} is not the one that was applied before")
        elif entry.term < self.story.term:  # also of one that began to reign after another had in a higher term
            self._astray[node] = min(self._astray.get(node, entry.lsn), entry.lsn - 1)
            self.story.give_up(chapter)
        elif known is None and entry.lsn != self.story.lsn + 1:
            self.violated("3", f"record {entry.lsn} is applied, record {self.story.lsn + 1} never was")
        else:
            self._end_at(entry.lsn - 1)
            self._begins(node, entry, chapter, publish)

    def _end_at(self, lsn: int) -> None:
        """A takeover: what an older term had after this record is not the run's."""
        if lsn < self.story.lsn:
            lost = self.story.cut(lsn)
            for node, reached in self._reached.items():
                if reached > lsn:
                    self._astray[node], self._reached[node] = lsn, lsn
            self._hashes = {at: hashes for at, hashes in self._hashes.items() if at <= lsn}
            self._lose(lost, "a takeover loses")
            if self._copies == 1:
                self.forgiven |= dict.fromkeys(lost, True)
            taken_back = [number for number in self.announced if number >= len(self.story.publishes)]
            for number in taken_back:
                node = self.announced.pop(number)
                if self._copies > 1:
                    self.violated("6", f"a takeover takes back publish {number}, which {node} has told workers of")

    def _begins(self, node: str, entry: Entry, chapter: Chapter, publish: bytes) -> None:
        if isinstance(entry.record, Delta):
            self._admitted(entry, entry.record)
        if isinstance(entry.record, Published):
            note, payload = read_object(publish)
            assert chapter.shadow is not None
            moved = decode_payload(note.codec, payload, chapter.shadow.numel()).add_(self.story.publishes[-1].shadow)
            if not torch.equal(moved, chapter.shadow):
                self.violated("6", f"publish {note.number} does not take workers to where the server stands")
        self.story.append(chapter)
        self._reached[node] = entry.lsn

    def _admitted(self, entry: Entry, delta: Delta) -> None:
        key, name, story = (delta.worker, delta.seq), f"delta {delta.seq} of {delta.worker}", self.story
        if key in story.deltas:
            self.violated("1", f"{name} is in the log twice: records {story.deltas[key]} and {entry.lsn}")
        if delta.seq not in self.account(delta.worker).saved:
            self.violated("1", f"{name} is in the log, and its worker never saved it")
            return
        push, payload = self.account(delta.worker).saved[delta.seq]
        if (payload, push.ranges) != (entry.payload, delta.ranges):
            self.violated("1", f"{name} is in the log, and not as its worker saved it")
        for position in positions_of(delta.ranges):
            if (taker := story.takers.get(position)) is not None:
                self.violated("2", f"position {position} is counted in {name}, and in delta {taker[1]} of {taker[0]}")
        versions_per_round = len(story.active) if self.settings.merge == "per-push" else 1
        staleness = story.version - story.base(push.anchor, push.anchor_term).version
        if staleness > self.settings.max_staleness * versions_per_round:
            self.violated("4", f"{name} is admitted {staleness} versions behind")

    def settled(self, node: str, state: State, model_hash: bytes) -> None:
        """A batch of records is durable and applied."""
        if self.story.has(state.lsn, state.term):
            self._hashes[state.lsn] = (state.digest(), model_hash)
        if not state.ledger.is_exact():
            self.violated("2", f"after record {state.lsn}: leased, free and trained positions do not add up")

    def holds(self, node: str, state: State, held: int, checkpoints: int) -> None:
        """What a server has in memory and on its disk."""
        bounds = {
            "messages that wait": (held, HELD_MAX * max(1, len(state.members))),
            "deltas that wait": (len(state.pending), PENDING_MAX * max(1, len(state.members))),
            "checkpoints": (checkpoints, CHECKPOINTS_MAX),
        }
        for what, (found, most) in bounds.items():
            if found > most:
                self.violated("7", f"{node} has {found} {what}, and may have {most}")

    def disk_lost(self, node: str) -> None:
        """A disk has lost what was durable on it: it may come back with less."""
        self._reached.pop(node, None)

    def recovered(self, node: str, state: State, model_hash: bytes) -> None:
        """A node has come back. Records that nobody saw applied may come back with it; those that it applied must."""
        if not self.story.has(state.lsn, state.term):
            return  # on a branch that a takeover has ended
        self._astray.pop(node, None)
        reached, hashes = self._reached.get(node, 0), (state.digest(), model_hash)
        if state.lsn < reached:
            self.violated("1", f"{node} is back up to record {state.lsn}, but it had applied record {reached}")
        elif any(state.members[worker].last_seq != seq for worker, seq in self._last_seqs(state.lsn).items()):
            self.violated("1", f"{node} is back at record {state.lsn}, and does not know which deltas were admitted")
        elif self._hashes.get(state.lsn, hashes) != hashes:
            self.violated("3", f"{node} is back at record {state.lsn} with other hashes than were seen there")

    def _last_seqs(self, lsn: int) -> dict[str, int]:
        last: dict[str, int] = {}
        for (worker, seq), at in self.story.deltas.items():
            if at <= lsn:
                last[worker] = max(seq, last.get(worker, 0))
        return last

    def lost(self, state: State) -> int:
        """Acknowledged deltas of which a recovered state knows nothing. A worker's deltas are admitted in order."""
        last = {worker: member.last_seq for worker, member in state.members.items()}
        return sum(
            seq > last.get(worker, 0) for worker, account in self.accounts.items() for seq in account.acknowledged
        )

    def finished(self, positions: int) -> None:
        if self.trained != positions:
            self.violated("2", f"the run has ended, and {self.trained} of {positions} positions are trained")


def _holds(disk: SimulatedDisk, lsn: int, payload: bytes, checkpoints: int) -> bool:
    """Whether a record outlives any power cut there: in the log, or in so many checkpoints."""
    names = disk.durable_names(disk.root / "checkpoints")
    is_covered = sum(name.isdigit() and int(name) >= lsn for name in names) >= checkpoints
    log = disk.root / "log"
    return is_covered or (log.exists() and disk.is_durable(payload, log))


def positions_of(ranges: Sequence[tuple[int, int]]) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]
