"""The server's loop: receive, ask the core, write to the log, apply, tell the workers, in that order.

It is given its ports and holds no opinion: what to do is core.Server's, how is the ports'. The control lane, the bulk
lane (bulk.py) and the checkpointer run beside the task that decides; that one alone touches the machine's state.
"""

import contextlib
import functools
import json
from collections.abc import Sequence
from typing import Any

import trio

from hetero_async.actors.supervisor import Child, RestartWindow, supervise
from hetero_async.bulk import Bulk
from hetero_async.checkpoints import Checkpointer
from hetero_async.core.events import Applied, Event, Followed, Provided, Ready, Received, Tick, Witnessed
from hetero_async.core.messages import (
    Fence,
    Follow,
    Hello,
    Nack,
    Push,
    Refused,
    SettingsReport,
    SettingsRequest,
    StatusReport,
    StatusRequest,
    Want,
)
from hetero_async.core.probe import ProbeVerdict
from hetero_async.core.records import Entry, Genesis, Published
from hetero_async.core.reign import Reign
from hetero_async.core.server import Server
from hetero_async.core.status import summary
from hetero_async.core.trend import Trend
from hetero_async.errors import Deposed, DiskFull, LogCorrupt, UserError
from hetero_async.feed import Feed
from hetero_async.formats.status import pack_status
from hetero_async.parts import Parts
from hetero_async.ports import Incoming, Model, Peer
from hetero_async.reigning import Keeper, Lookout

# Events waiting for the deciding task; a full inbox stops the lanes from reading, which is the back-pressure.
INBOX_SIZE = 256
# Records of one group commit: enough to share an fsync, few enough to keep answers prompt.
BATCH_EVENTS_MAX = 64
DISK_FULL_RETRY_SECONDS = 1.0
# The deciding task may be at work on a batch; longer than this it is waiting for its disk.
HANDING_OVER_SECONDS = 2.0
# A commit that takes longer than this is told: acknowledgements are as slow as the disk.
SLOW_COMMIT_SECONDS = 2.0
# The lanes and the checkpointer may crash and come back; the deciding task may not: its state is the log's.
WHAT_IS_LEFT = (
    "put the newest copy back (hetero-async restore), or go on without what is lost: start this one as a standby and "
    "promote it (hetero-async standby --name {name}, hetero-async promote --name {name})"
)
RESTARTS = 3
RESTART_PERIOD_SECONDS = 60.0
RESTART_BACKOFF_SECONDS = 0.5


class Serving:
    def __init__(self, parts: Parts, machine: Server, model: Model, reign: Reign | None, trend: Trend) -> None:
        """`reign`: what the witness has on record for this server, where there is a witness."""
        self.machine = machine
        self.model = model
        self.trend = trend
        self.log = parts.log
        self.link = parts.listening
        self.blocking = parts.blocking
        self.observer = parts.observer
        self.archiving = parts.archiving
        self.quarantine = parts.quarantine
        self.paused = ""
        self.finished = trio.Event()
        self.deserted = trio.Event()  # finished, the last checkpoint written, and no worker in the run any more
        self._parts = parts
        # What its reign begins with is durable. Before that nobody hears of it: it might never have been.
        self._begun = trio.Event()
        self._handing_over = trio.Event()
        self._inbox_send, self._inbox = trio.open_memory_channel[Event](INBOX_SIZE)
        # Applying changes what a snapshot or a checkpoint reads, so only one of them runs at a time.
        self._model_lock = trio.Lock()
        self._peers: dict[str, Peer] = {}
        self._bulk = Bulk(
            state=machine.state,
            model=model,
            model_lock=self._model_lock,
            link=self.link,
            blocking=self.blocking,
            observer=self.observer,
            quarantine=self.quarantine,
            arrived=self._arrived,
            feed=Feed(log=self.log, store=parts.store, lane=self.link.bulk, blocking=self.blocking),
            announced=lambda: machine.announced,
        )
        self._checkpointer = Checkpointer(parts, model, self._model_lock, drop_log=self._needed_log)
        self._sentry = self._make_sentry(parts, reign)
        self.link.term = machine.state.term

    def _make_sentry(self, parts: Parts, reign: Reign | None) -> Keeper | Lookout:
        """Who notices that another reigns: by the witness, or by asking the others."""
        if parts.witness is None or reign is None:
            return Lookout(ask=parts.ask, term=self.machine.state.term, tell=self._inbox_send.send)
        return Keeper(
            witness=parts.witness,
            reign=reign,
            lease_seconds=parts.lease_seconds,
            replication=self.machine.replication,
            observer=parts.observer,
            tell=self._witnessed,
        )

    async def _witnessed(self, event: Witnessed) -> None:
        """Where a slow disk lets the inbox fill up, the lease is renewed all the same: it is said again each time."""
        with contextlib.suppress(trio.WouldBlock):
            self._inbox_send.send_nowait(event)

    async def run(self) -> None:
        """Serve until cancelled. Raises what must end the process: Deposed, a broken assertion, a corrupt log."""
        helpers: dict[str, Child] = {
            "control lane": self._receive_control,
            "bulk lane": self._run_bulk,
            "checkpointer": self._checkpointer.run,
            "sentry": self._sentry.run,
        }
        if self._parts.best is not None:
            helpers["keeper of the best"] = self._parts.best.run
        if self.archiving is not None:
            helpers["archiver"] = self.archiving.run
        async with trio.open_nursery() as nursery:
            nursery.start_soon(
                functools.partial(
                    supervise,
                    helpers,
                    RestartWindow(RESTARTS, RESTART_PERIOD_SECONDS),
                    backoff_seconds=RESTART_BACKOFF_SECONDS,
                    report=lambda crash: self.observer.event("crash", report=crash),
                )
            )
            await self._decide()

    # --- deciding ---

    async def _decide(self) -> None:
        await self._settle()
        self._begun.set()
        while True:
            now = _now_ms()
            due = self.machine.timer(now)
            with trio.move_on_after(max(0, due - now) / 1000):
                self._step(await self._inbox.receive())
            self._drain()
            self.machine.step(Tick(now_ms=_now_ms()))
            await self._settle()

    def _drain(self) -> None:
        for _ in range(BATCH_EVENTS_MAX):
            try:
                self._step(self._inbox.receive_nowait())
            except trio.WouldBlock:
                return

    def _step(self, event: Event) -> None:
        self.machine.step(event)
        if isinstance(event, Received) and isinstance(event.message, Push):
            self._bulk.decided(event.worker)

    async def _settle(self) -> None:
        """Do all work the machine owes, the work that follows from it included."""
        ready = self.machine.ready()
        if self.machine.lost:
            raise LogCorrupt(f"{self.machine.lost}; {WHAT_IS_LEFT.format(name=self._parts.name)}")
        while ready.records or ready.messages:
            if ready.records:
                await self._append(ready.records)
                self._bulk.feed.grown()
                await self._apply(ready.records)
            await self._send(ready)
            ready = self.machine.ready()
        if self.machine.succession.is_under_way:
            self._handing_over.set()
        if reason := self.machine.succession.deposed:
            raise Deposed(f"{reason}: this server stops; start it again as a standby")
        if (best := self._parts.best) is not None:
            best.settle(self.machine.state)
        if best is None or not best.is_busy:
            await self._checkpointer.consider(self.machine.state)
            self._notice_end()

    def _notice_end(self) -> None:
        if self.machine.state.is_finished:
            self.finished.set()
            if not self.machine.state.active and not self._checkpointer.is_busy:
                self.deserted.set()

    async def _append(self, entries: Sequence[Entry]) -> None:
        while True:
            begun = trio.current_time()
            try:
                await self.log.append(entries)
            except DiskFull as error:
                if not self.paused:
                    self.observer.event("log paused", reason=str(error))
                self.paused = f"paused: {error}"
                await trio.sleep(DISK_FULL_RETRY_SECONDS)
            else:
                if self.paused:
                    self.observer.event("log resumed")
                self.paused = ""
                if (seconds := trio.current_time() - begun) > SLOW_COMMIT_SECONDS:
                    self.observer.event("slow disk", seconds=round(seconds, 1), records=len(entries))
                return

    async def _apply(self, entries: Sequence[Entry]) -> None:
        def apply() -> bytes:
            for entry in entries:
                self.model.apply(entry)
                if self._parts.best is not None:
                    self._parts.best.seen(entry, self.model)
            is_published = any(isinstance(entry.record, Published | Genesis) for entry in entries)
            return self.model.model_hash() if is_published else b""

        async with self._model_lock:
            model_hash = await self.blocking(apply)
        for entry in entries:
            self.trend.see(entry, _now_ms())
            self._observe(entry)
        if model_hash:
            self.machine.step(Applied(oldest_publish=self.model.oldest_publish(), model_hash=model_hash))

    def _observe(self, entry: Entry) -> None:
        name = type(entry.record).__name__.lower()
        self.observer.event(name, lsn=entry.lsn, record=entry.record)

    async def _send(self, ready: Ready) -> None:
        for outgoing in ready.messages:
            if isinstance(outgoing.message, Nack):
                member, reason = self.machine.state.members[outgoing.to], outgoing.message.reason
                self.observer.event("refused", worker=outgoing.to, key=member.key, reason=reason)
            if isinstance(outgoing.message, ProbeVerdict) and (reason := outgoing.message.reason):
                self.observer.event("probe differs", worker=outgoing.to, reason=reason)
            if peer := self._peers.get(outgoing.to):
                await self.link.control.send(peer.key, outgoing.message)
        for strike in ready.strikes:
            self.quarantine.strike(self._peers[strike.worker], strike.reason)

    def _needed_log(self, covered: int) -> int | None:
        """From which record on the log is needed: by a recovery, the archive, and standbys on their way."""
        if self._parts.keep_log:
            return None
        if self.archiving is not None:
            covered = self.archiving.not_needed(covered)
        return min(covered, self.machine.replication.keeps_from(covered, _now_ms())) + 1

    # --- lanes ---

    async def _run_bulk(self) -> None:
        await self._begun.wait()
        await self._bulk.run()

    async def _receive_control(self) -> None:
        await self._begun.wait()
        while True:
            incoming = await self.link.control.receive()
            if isinstance(incoming.message, StatusRequest):
                await self.link.control.send(incoming.peer.key, StatusReport(), pack_status(self.status()))
            elif isinstance(incoming.message, SettingsRequest):
                told = json.dumps(self._parts.told(incoming.peer)).encode()
                await self.link.control.send(incoming.peer.key, SettingsReport(), told)
            elif incoming.peer.role == "standby":
                await self._hear_standby(incoming)
            elif incoming.peer.role == "worker":
                await self._hear_worker(incoming)

    async def _hear_worker(self, incoming: Incoming) -> None:
        if refusal := self.quarantine.refusal(incoming.peer.key):
            await self.link.control.send(incoming.peer.key, Refused(reason=refusal))
        elif isinstance(incoming.message, Want):
            self._bulk.ask(incoming)
        else:
            await self._pass_on(self._heard(incoming))

    def _is_chained(self, follow: Follow) -> bool:
        """Whether its log is ours as far as it goes, where ours still reaches back so far."""
        read = self.log.read(follow.lsn, 0) if follow.lsn else None
        return read is None or read[0] == follow.chain

    async def _hear_standby(self, incoming: Incoming) -> None:
        standby, message = incoming.peer.worker, incoming.message
        is_chained = not isinstance(message, Follow) or await self.blocking(self._is_chained, message)
        followed = Followed(now_ms=_now_ms(), standby=standby, message=message, is_chained=is_chained)
        await self._pass_on(followed)
        self._peers[standby] = incoming.peer
        if not isinstance(message, Fence):
            return
        # Whoever takes over must hear where we end, so we end first.
        if message.term > self.machine.state.term:
            with trio.move_on_after(HANDING_OVER_SECONDS):
                await self._handing_over.wait()
        await self.link.control.send(incoming.peer.key, self.machine.succession.position(standby, message))

    async def _pass_on(self, received: Event) -> None:
        """To the deciding task. While that waits for disk space, what does not fit is dropped: peers ask again."""
        try:
            self._inbox_send.send_nowait(received)
        except trio.WouldBlock:
            if not self.paused:
                await self._inbox_send.send(received)

    def _heard(self, incoming: Incoming) -> Received:
        worker = incoming.peer.worker
        self._peers[worker] = incoming.peer
        mismatch = ""
        if isinstance(incoming.message, Hello):
            mismatch = self._other_software(incoming.message) or self.model.mismatch(incoming.payload)
            if self.machine.state.settings is None and not mismatch:
                self._bulk.schemas[worker] = (incoming.payload, incoming.message.schema_hash)
        return Received(
            now_ms=_now_ms(),
            worker=worker,
            key=incoming.peer.key.decode(),
            site=incoming.peer.site,
            message=incoming.message,
            mismatch=mismatch,
        )

    def _other_software(self, hello: Hello) -> str:
        ours = self._parts.software
        if hello.software.split(".")[:2] == ours.split(".")[:2]:
            return ""
        return f"this server runs hetero-async {ours}, and you run {hello.software}: install the same"

    async def _arrived(self, peer: Peer, event: Received | Provided) -> None:
        self._peers[event.worker] = peer
        await self._inbox_send.send(event)

    def lift(self, key: str) -> str:
        """Hear a quarantined key again; whose it is. Raises UserError when it is not in quarantine."""
        found = self.quarantine.keys.get(key.encode())
        if found is None or not self.quarantine.lift(key.encode()):
            raise UserError(f"{key} is not in quarantine; `hetero-async status` lists the keys that are")
        return found.worker

    def status(self) -> dict[str, Any]:
        return self.look() | {"state_hash": self.machine.state.digest().hex()}

    def look(self) -> dict[str, Any]:
        """The status without what takes time to know."""
        status = summary(self.machine, self.trend, _now_ms())
        held = self.machine.replication.why_held(_now_ms(), self.machine.state.lsn)
        status["state"] = self.paused or held or status["state"]
        status["paused"], status["held"] = self.paused, held
        status["bytes"] = {"up": self.link.bytes_up, "down": self.link.bytes_down}
        status["quarantine"] = self.quarantine.listed()
        status["log"] = {"lsn": self.machine.state.lsn, "released": self.machine.replication.released}
        if self.archiving is not None:
            status["archive"] = self.archiving.status()
        return status


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
