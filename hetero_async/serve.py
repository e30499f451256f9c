"""The server's loop: receive, ask the core, write to the log, apply, tell the workers, in that order.

It is given its ports and holds no opinion: what to do is core.Server's, how is the ports'. Three tasks share it: the
control lane, the bulk lane (which pulls deltas in and hands publishes out) and the one that decides. Only the last
one touches the machine's state.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import trio
import xxhash

from hetero_async.actors.mailbox import Mailbox
from hetero_async.actors.supervisor import Child, RestartWindow, supervise
from hetero_async.core.admission import Admitted, Facts, judge
from hetero_async.core.events import Applied, Event, Provided, Ready, Received, Tick
from hetero_async.core.messages import (
    DELTA,
    INITIAL,
    Chunk,
    Gone,
    Hello,
    Nack,
    Offer,
    Push,
    StatusReport,
    StatusRequest,
    Want,
)
from hetero_async.core.records import Entry, Genesis, Published
from hetero_async.core.server import Server
from hetero_async.core.status import summary
from hetero_async.errors import DiskFull, PeerError
from hetero_async.ports import Blocking, Checkpoint, Incoming, Link, Log, Model, Observer, Store
from hetero_async.transfers import Pull, send_chunks

# Events waiting for the deciding task; a full inbox stops the lanes from reading, which is the back-pressure.
INBOX_SIZE = 256
# Records of one group commit: enough to share an fsync, few enough to keep answers prompt.
BATCH_EVENTS_MAX = 64
DISK_FULL_RETRY_SECONDS = 1.0
UPLOAD_CHECK_SECONDS = 1.0
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
    ) -> None:
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
        self._keys: dict[str, bytes] = {}
        self._schemas: dict[str, tuple[bytes, bytes]] = {}  # worker → schema, its hash; until there is a run
        self._uploads: dict[str, tuple[Push | Offer, Pull]] = {}
        self._checkpointed = machine.state.version
        self._checkpoints = Mailbox[Checkpoint]("checkpointer", size=1)
        self._is_checkpointing = False
        self._hashes: dict[tuple[str, int], tuple[int, bytes]] = {}

    async def run(self) -> None:
        """Serve until cancelled. Raises what must end the process: a broken assertion, a corrupt log."""
        helpers: dict[str, Child] = {
            "control lane": self._receive_control,
            "bulk lane": self._receive_bulk,
            "upload watch": self._watch_uploads,
            "checkpointer": functools.partial(self._checkpoints.serve, self._save),
        }
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
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
                self.machine.step(await self._inbox.receive())
            self._drain()
            self.machine.step(Tick(now_ms=_now_ms()))
            await self._settle()

    def _drain(self) -> None:
        for _ in range(BATCH_EVENTS_MAX):
            try:
                self.machine.step(self._inbox.receive_nowait())
            except trio.WouldBlock:
                return

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
            if key := self._keys.get(outgoing.worker):
                await self.link.control.send(key, outgoing.message)

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
            elif incoming.peer.role == "worker":
                await self._inbox_send.send(self._heard(incoming))

    def _heard(self, incoming: Incoming) -> Received:
        worker = incoming.peer.worker
        self._keys[worker] = incoming.peer.key
        mismatch = ""
        if isinstance(incoming.message, Hello):
            mismatch = self.model.mismatch(incoming.payload)
            if self.machine.state.settings is None:
                self._schemas[worker] = (incoming.payload, incoming.message.schema_hash)
        return Received(
            now_ms=_now_ms(),
            worker=worker,
            site=incoming.peer.site,
            message=incoming.message,
            mismatch=mismatch,
        )

    def status(self) -> dict[str, Any]:
        status = summary(self.machine, _now_ms())
        if self.paused:
            status["state"] = self.paused
        status["bytes"] = {"up": self.link.bytes_up, "down": self.link.bytes_down}
        status["log"] = {"lsn": self.machine.state.lsn}
        status["state_hash"] = self.machine.state.digest().hex()
        return status

    # --- bulk lane ---

    async def _receive_bulk(self) -> None:
        answers: dict[type, Callable[[Incoming, Any], Any]] = {
            Push: self._offered,
            Offer: self._offered,
            Chunk: self._chunk,
            Want: self._wanted,
        }
        while True:
            incoming = await self.link.bulk.receive()
            answer = answers.get(type(incoming.message))
            if answer is None or incoming.peer.role != "worker":
                continue
            try:
                await answer(incoming, incoming.message)
            except PeerError as error:
                self._uploads.pop(incoming.peer.worker, None)
                self.observer.event("refused message", worker=incoming.peer.worker, reason=str(error))

    async def _offered(self, incoming: Incoming, offer: Push | Offer) -> None:
        """A worker has a delta, or the initial parameters: pull the bytes unless they are known to be of no use."""
        worker = incoming.peer.worker
        if isinstance(offer, Push) and not self._is_worth_pulling(worker, offer):
            await self._decide_on(incoming, offer, b"", Facts())
            return
        held = self._uploads.get(worker)
        if held is not None and held[0] == offer:
            wants = held[1].ask_again(_now_ms())
        else:
            limit = self.model.payload_limit(self._schemas.get(worker, (b"", b""))[0])
            kind, number = (DELTA, offer.seq) if isinstance(offer, Push) else (INITIAL, 0)
            pull = Pull(kind, number, _now_ms(), limit)
            if offer.payload_bytes > limit:
                await self._too_large(incoming, offer, limit)
                return
            pull.size(offer.payload_bytes, offer.payload_hash)
            self._uploads[worker] = (offer, pull)
            wants = pull.wants()
        for want in wants:
            await self.link.bulk.send(incoming.peer.key, want)

    def _is_worth_pulling(self, worker: str, push: Push) -> bool:
        state = self.machine.state
        if worker not in state.members:
            return False
        return isinstance(judge(state, worker, push, Facts()), Admitted)

    async def _too_large(self, incoming: Incoming, offer: Push | Offer, limit: int) -> None:
        reason = f"too large: {offer.payload_bytes} bytes, and a delta of this model has {limit} at most"
        if isinstance(offer, Push):
            await self.link.control.send(incoming.peer.key, Nack(seq=offer.seq, reason=reason))
        raise PeerError(reason)

    async def _chunk(self, incoming: Incoming, chunk: Chunk) -> None:
        held = self._uploads.get(incoming.peer.worker)
        if held is None or (held[1].kind, held[1].number) != (chunk.kind, chunk.number):
            return
        offer, pull = held
        pull.add(chunk, incoming.payload, _now_ms())
        if pull.is_complete:
            del self._uploads[incoming.peer.worker]
            self._nursery.start_soon(self._uploaded, incoming, offer, pull)
            return
        for want in pull.wants():
            await self.link.bulk.send(incoming.peer.key, want)

    async def _uploaded(self, incoming: Incoming, offer: Push | Offer, pull: Pull) -> None:
        assert pull.assembly is not None
        try:
            payload = await self.blocking(pull.assembly.result)
        except PeerError as error:
            self.observer.event("refused message", worker=incoming.peer.worker, reason=str(error))
            return
        if isinstance(offer, Push):
            facts = await self.blocking(self.model.inspect, offer.codec, payload)
            await self._decide_on(incoming, offer, payload, facts)
        elif incoming.peer.worker in self._schemas:
            await self._provided(incoming.peer.worker, payload)

    async def _decide_on(self, incoming: Incoming, push: Push, payload: bytes, facts: Facts) -> None:
        self._keys[incoming.peer.worker] = incoming.peer.key
        await self._inbox_send.send(
            Received(
                now_ms=_now_ms(),
                worker=incoming.peer.worker,
                site=incoming.peer.site,
                message=push,
                payload=payload,
                facts=facts,
            )
        )

    async def _provided(self, worker: str, upload: bytes) -> None:
        schema, schema_hash = self._schemas[worker]
        facts = await self.blocking(self.model.inspect_initial, schema, upload)
        if facts.refusal:
            self.observer.event("refused message", worker=worker, reason=facts.refusal)
            return
        payload, parameters_hash = await self.blocking(self.model.genesis_payload, schema, upload)
        await self._inbox_send.send(
            Provided(
                now_ms=_now_ms(),
                worker=worker,
                schema_hash=schema_hash,
                parameters_hash=parameters_hash,
                payload=payload,
            )
        )
        self._schemas.clear()

    async def _wanted(self, incoming: Incoming, want: Want) -> None:
        async with self._model_lock:
            blob = await self.blocking(self.model.fetch, want.kind, want.number)
        if blob is None:
            await self.link.bulk.send(incoming.peer.key, Gone(kind=want.kind, number=want.number))
            return
        blob_hash = self._hash_of(want, blob)
        await send_chunks(self.link.bulk, incoming.peer.key, want, blob, blob_hash)

    def _hash_of(self, want: Want, blob: bytes) -> bytes:
        """Hash each object once, not once a chunk and worker."""
        cached = self._hashes.get((want.kind, want.number))
        if cached is None or cached[0] != id(blob):
            if len(self._hashes) > 64:
                self._hashes.clear()
            cached = self._hashes[want.kind, want.number] = (id(blob), xxhash.xxh3_128_digest(blob))
        return cached[1]

    async def _watch_uploads(self) -> None:
        while True:
            await trio.sleep(UPLOAD_CHECK_SECONDS)
            for worker, (_, pull) in list(self._uploads.items()):
                if pull.is_stalled(_now_ms()) and worker in self._keys:
                    for want in pull.ask_again(_now_ms()):
                        await self.link.bulk.send(self._keys[worker], want)


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
