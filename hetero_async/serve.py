"""The server's loop: receive, ask the core, write to the log, apply, tell the workers, in that order.

It is given its ports and holds no opinion: what to do is core.Server's, how is the ports'. The control lane, the bulk
lane (bulk.py) and the checkpointer run beside the task that decides; that one alone touches the machine's state.
"""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

import trio

from hetero_async.actors.mailbox import Mailbox
from hetero_async.actors.supervisor import Child, RestartWindow, supervise
from hetero_async.bulk import Bulk
from hetero_async.core.events import Applied, Event, Provided, Ready, Received, Tick
from hetero_async.core.messages import Hello, Push, Refused, StatusReport, StatusRequest
from hetero_async.core.records import Entry, Genesis, Published
from hetero_async.core.server import Server
from hetero_async.core.status import summary
from hetero_async.errors import DiskFull, UserError
from hetero_async.ports import Blocking, Checkpoint, Incoming, Link, Log, Model, Observer, Peer, Store
from hetero_async.quarantine import Quarantine

# Events waiting for the deciding task; a full inbox stops the lanes from reading, which is the back-pressure.
INBOX_SIZE = 256
# Records of one group commit: enough to share an fsync, few enough to keep answers prompt.
BATCH_EVENTS_MAX = 64
DISK_FULL_RETRY_SECONDS = 1.0
# The lanes and the checkpointer may crash and come back; the deciding task may not: its state is the log's.
RESTARTS = 3
RESTART_PERIOD_SECONDS = 60.0
RESTART_BACKOFF_SECONDS = 0.5


class Serving:
    def __init__(
        self,
        *,
        machine: Server,
        model: Model,
        log: Log,
        store: Store,
        link: Link,
        blocking: Blocking,
        observer: Observer,
        checkpoint_every: int,
        keep_log: bool,
        quarantine: Quarantine | None = None,
        software: str = "",
    ) -> None:
        """`software`: its version; workers of another MAJOR.MINOR are turned away. "": whoever comes."""
        self.machine = machine
        self.model = model
        self.log = log
        self.store = store
        self.link = link
        self.blocking = blocking
        self.observer = observer
        self.checkpoint_every = checkpoint_every
        self.keep_log = keep_log
        self.paused = ""
        self.finished = trio.Event()
        self.deserted = trio.Event()  # finished, the last checkpoint written, and no worker in the run any more
        self._inbox_send, self._inbox = trio.open_memory_channel[Event](INBOX_SIZE)
        # Applying changes what a snapshot or a checkpoint reads, so only one of them runs at a time.
        self._model_lock = trio.Lock()
        self._software = software
        self.quarantine = quarantine or Quarantine(observer)
        self._peers: dict[str, Peer] = {}
        self._bulk = Bulk(
            state=machine.state,
            model=model,
            model_lock=self._model_lock,
            link=link,
            blocking=blocking,
            observer=observer,
            quarantine=self.quarantine,
            arrived=self._arrived,
        )
        self._checkpointed = machine.state.version
        self._checkpoints = Mailbox[Checkpoint]("checkpointer", size=1)
        self._is_checkpointing = False

    async def run(self) -> None:
        """Serve until cancelled. Raises what must end the process: a broken assertion, a corrupt log."""
        helpers: dict[str, Child] = {
            "control lane": self._receive_control,
            "bulk lane": self._bulk.run,
            "checkpointer": functools.partial(self._checkpoints.serve, self._save),
        }
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
        while True:
            now = _now_ms()
            due = self.machine.timer(now)
            with trio.move_on_after(math.inf if due is None else max(0, due - now) / 1000):
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
        while ready.records or ready.messages:
            if ready.records:
                await self._append(ready.records)
                await self._apply(ready.records)
            await self._send(ready)
            ready = self.machine.ready()
        await self._consider_checkpoint()
        self._notice_end()

    def _notice_end(self) -> None:
        if self.machine.state.is_finished:
            self.finished.set()
            if not self.machine.state.active and not self._is_checkpointing:
                self.deserted.set()

    async def _append(self, entries: Sequence[Entry]) -> None:
        while True:
            try:
                await self.log.append(entries)
            except DiskFull as error:
                self.paused = f"paused: {error}"
                self.observer.event("log paused", reason=str(error))
                await trio.sleep(DISK_FULL_RETRY_SECONDS)
            else:
                if self.paused:
                    self.observer.event("log resumed")
                self.paused = ""
                return

    async def _apply(self, entries: Sequence[Entry]) -> None:
        def apply() -> bytes:
            for entry in entries:
                self.model.apply(entry)
            is_published = any(isinstance(entry.record, Published | Genesis) for entry in entries)
            return self.model.model_hash() if is_published else b""

        async with self._model_lock:
            model_hash = await self.blocking(apply)
        for entry in entries:
            self._observe(entry)
        if model_hash:
            self.machine.step(Applied(oldest_publish=self.model.oldest_publish(), model_hash=model_hash))

    def _observe(self, entry: Entry) -> None:
        name = type(entry.record).__name__.lower()
        self.observer.event(name, lsn=entry.lsn, record=entry.record)

    async def _send(self, ready: Ready) -> None:
        for outgoing in ready.messages:
            if peer := self._peers.get(outgoing.worker):
                await self.link.control.send(peer.key, outgoing.message)
        for strike in ready.strikes:
            self.quarantine.strike(self._peers[strike.worker], strike.reason)

    # --- checkpoints ---

    async def _consider_checkpoint(self) -> None:
        """Copy state and model between two batches, where they are at the same record; write them meanwhile."""
        state = self.machine.state
        is_due = state.version - self._checkpointed >= self.checkpoint_every
        is_last = state.is_finished and state.version > self._checkpointed
        if self._is_checkpointing or not (is_due or is_last):
            return
        self._is_checkpointing = True
        self._checkpointed = state.version
        async with self._model_lock:
            model = await self.blocking(self.model.snapshot)
        checkpoint = Checkpoint(
            run=self.machine.settings.run,
            lsn=state.lsn,
            term=state.term,
            state=state.dump(),
            state_hash=state.digest(),
            model=model,
        )
        await self._checkpoints.ref.tell(checkpoint)

    async def _save(self, checkpoint: Checkpoint) -> None:
        try:
            covered = await self.store.save(checkpoint)
            if not self.keep_log:
                await self.blocking(self.log.drop_before, covered + 1)
            self.observer.event("checkpoint", lsn=checkpoint.lsn)
        except DiskFull as error:
            self.observer.event("checkpoint failed", lsn=checkpoint.lsn, reason=str(error))
        finally:
            self._is_checkpointing = False
        self._notice_end()

    # --- control lane ---

    async def _receive_control(self) -> None:
        while True:
            incoming = await self.link.control.receive()
            if isinstance(incoming.message, StatusRequest):
                status = json.dumps(self.status()).encode()
                await self.link.control.send(incoming.peer.key, StatusReport(), status)
            elif incoming.peer.role != "worker":
                continue
            elif refusal := self.quarantine.refusal(incoming.peer.key):
                await self.link.control.send(incoming.peer.key, Refused(reason=refusal))
            else:
                await self._pass_on(self._heard(incoming))

    async def _pass_on(self, received: Received) -> None:
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
            site=incoming.peer.site,
            message=incoming.message,
            mismatch=mismatch,
        )

    def _other_software(self, hello: Hello) -> str:
        if not self._software or hello.software.split(".")[:2] == self._software.split(".")[:2]:
            return ""
        return f"this server runs hetero-async {self._software}, and you run {hello.software}: install the same"

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
        status = summary(self.machine, _now_ms())
        if self.paused:
            status["state"] = self.paused
        status["bytes"] = {"up": self.link.bytes_up, "down": self.link.bytes_down}
        status["log"] = {"lsn": self.machine.state.lsn}
        status["quarantine"] = self.quarantine.listed()
        status["state_hash"] = self.machine.state.digest().hex()
        return status


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
