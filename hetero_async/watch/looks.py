"""Reads a status, the JSON that `hetero-async status --json` prints, into a run's history.

Two looks at the same run tell what a single one cannot: who sends at present, who died, who came back, who took over.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from hetero_async.core.records import Stepped
from hetero_async.watch.history import (
    ABSENT,
    DEAD,
    PENDING_MAX,
    RECENT_COLUMNS_MAX,
    RECENT_STEP_SECONDS,
    SENDING,
    SILENT_SECONDS,
    TRAINING,
    UNKNOWN,
    WAITING,
    History,
    Mark,
    Point,
    Series,
)

Status = Mapping[str, Any]

# Heartbeats and leases are less than this a second; a chunk of a delta is more.
SENDING_BYTES = 4096
BYE = "said bye"


@dataclass(slots=True)
class Seen:
    """A worker as it was at the last look. `has_joined`: this process of the server, which each one joins anew."""

    alive: bool
    incarnation: int
    has_joined: bool
    bytes_up: int
    was_lost: bool = False


@dataclass(slots=True)
class Looks:
    """Of one life of a server or standby. `recent`: the same columns as the history's, short and new, kept nowhere."""

    history: History
    recent: Series = field(default_factory=lambda: Series(step_seconds=RECENT_STEP_SECONDS))
    status: Status = field(default_factory=dict)
    seconds: float = 0.0
    generation: int = 0  # grows when columns have become others than they were
    _seen: dict[str, Seen] = field(default_factory=dict)
    _pending: dict[int, int] = field(default_factory=dict)  # lsn of a delta that is not merged yet → anchor's version
    _reasons: dict[str, str] = field(default_factory=dict)  # why a worker left

    # --- what happened ---

    def delta(self, lsn: int, anchor_version: int) -> None:
        if len(self._pending) < PENDING_MAX:
            self._pending[lsn] = anchor_version

    def stepped(self, record: Stepped) -> None:
        for lsn in record.deltas:
            if (anchor := self._pending.pop(lsn, None)) is not None:
                self.history.merged(record.version - anchor - 1)

    def left(self, worker: str, reason: str) -> None:
        self._reasons[worker] = reason

    def paused(self, seconds: float, reason: str) -> None:
        self.history.mark(Mark(at=seconds, kind="paused", text=reason[:240]))

    def resumed(self, seconds: float) -> None:
        self.history.mark(Mark(at=seconds, kind="resumed"))

    # --- how it stands ---

    def look(self, seconds: float, status: Status) -> None:
        """`seconds`: since 1970."""
        if not self.status:
            if self.history.whole.slots:
                self.history.mark(Mark(at=seconds, kind="started", who=_node(status)))
        else:
            self._mark_changes(seconds, status)
        self.history.refused(status["refusals"])
        doing = list(self._doing(seconds, status["workers"]))
        figures, carried = self._figures(status), self._carried(status["workers"])
        self.generation += self.history.look(seconds, figures, doing, carried)
        self.recent.add(seconds, figures, doing, carried)
        self.recent.forget(RECENT_COLUMNS_MAX)
        for name, metric in status["metrics"].items():
            if metric != self.status.get("metrics", {}).get(name):
                point = Point(
                    at=seconds, version=metric["version"], trained=status["trained"], value=float(metric["value"])
                )
                self.history.measured(name, point)
        self.status, self.seconds = status, seconds

    def _mark_changes(self, seconds: float, status: Status) -> None:
        if status["term"] > self.status["term"]:
            text = f"term {status['term']}"
            self.history.mark(Mark(at=seconds, kind="takeover", who=str(status["server"]), text=text))
        if status["state"] == "finished" != self.status["state"]:
            self.history.mark(Mark(at=seconds, kind="finished"))

    def _doing(self, seconds: float, workers: list[Status]) -> Iterator[tuple[str, str, str]]:
        for now in workers:
            before = self._seen.get(now["worker"])
            self.history.heard_of(now["worker"], now["bytes_up"], now["bytes_down"])
            seen = Seen(now["alive"], now["incarnation"], bool(now["device"]), now["bytes_up"])
            if before is not None:
                seen.was_lost = before.was_lost and not (seen.alive and not before.alive)
                self._mark_worker(seconds, now, before, seen)
            self._seen[now["worker"]] = seen
            yield now["site"], now["worker"], _letter(now, before, seen)

    def _mark_worker(self, seconds: float, now: Status, before: Seen, seen: Seen) -> None:
        who = {"who": now["worker"], "site": now["site"]}
        if before.alive and not seen.alive:
            reason = self._reasons.pop(now["worker"], "")
            seen.was_lost = reason != BYE
            kind = "lost" if seen.was_lost else "left"
            self.history.mark(Mark(at=seconds, kind=kind, text=reason, **who))
        elif before.was_lost and seen.alive:
            self.history.mark(Mark(at=seconds, kind="back", **who))
        elif before.has_joined and seen.alive and seen.incarnation > before.incarnation:
            self.history.mark(Mark(at=seconds, kind="back", text=f"life {seen.incarnation}", **who))

    def _carried(self, workers: list[Status]) -> dict[str, tuple[int, int]]:
        """By site, what its workers have sent and received in all their lives."""
        carried: dict[str, tuple[int, int]] = {}
        for worker in workers:
            if (traffic := self.history.traffic.get(worker["worker"])) is not None:
                sent, received = carried.get(worker["site"], (0, 0))
                carried[worker["site"]] = sent + traffic[0], received + traffic[1]
        return carried

    def _figures(self, status: Status) -> dict[str, float]:
        total, log = self.history.total, status["log"]
        return {
            "looks": 1,
            "trained": status["trained"],
            "version": status["version"],
            "acknowledged": status["deltas"]["acknowledged"],
            "refused": total("refused", status["deltas"]["refused"]),
            "bytes_up": total("bytes_up", status["bytes"]["up"]),
            "bytes_down": total("bytes_down", status["bytes"]["down"]),
            "unreleased": max(0, log["lsn"] - log["released"]),
            "standby_lag": _lag(status),
            "is_serving": "standby" not in status,
            "memory_bytes": status.get("memory_bytes", 0),
            "disk_bytes": status.get("disk_bytes", 0),
        }


def _lag(status: Status) -> int:
    if "standby" in status:
        return int(status["standby"]["lag"])
    return max((standby["lag"] for standby in status.get("standbys", [])), default=0)


def _node(status: Status) -> str:
    return str(status["standby"]["name"] if "standby" in status else status["server"])


def _letter(now: Status, before: Seen | None, seen: Seen) -> str:
    if not seen.alive:
        return DEAD if seen.was_lost else ABSENT
    if not now["state"]:
        return UNKNOWN
    if now["state"] != "training" or now["seconds_since_heard"] >= SILENT_SECONDS:
        return WAITING
    return SENDING if before is not None and seen.bytes_up - before.bytes_up > SENDING_BYTES else TRAINING
