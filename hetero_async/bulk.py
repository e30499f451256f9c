"""The server's bulk lane: pulls deltas and initial parameters in, hands publishes and snapshots out.

Runs beside the task that decides and tells it of whatever has arrived whole. It changes nothing of the run: whether a
delta is worth its bytes is asked of `core.admission`, whether it is admitted is decided later by the machine.
"""

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import trio
import xxhash

from hetero_async.core.admission import Cause, Duplicate, Facts, NotAdmitted, judge
from hetero_async.core.events import Provided, Received
from hetero_async.core.messages import DELTA, INITIAL, SNAPSHOT, Chunk, Gone, Nack, Offer, Push, Want
from hetero_async.core.state import State
from hetero_async.errors import PeerError
from hetero_async.feed import KINDS, Feed
from hetero_async.ports import Blocking, Incoming, Lane, Link, Model, Observer, Peer
from hetero_async.quarantine import Quarantine
from hetero_async.transfers import STALL_MS, Pull, send_chunks

UPLOAD_CHECK_SECONDS = 1.0
# What uploads may hold in memory, all together; of a large model so many at a time, however large they are.
UPLOAD_BYTES_MAX = 48 * 1024 * 1024
UPLOADS_MIN = 3
# An upload without any new chunk for so long is dropped; its worker offers it again when it can.
UPLOAD_IDLE_MS = 60_000
# Admitted and not merged yet, of one worker: what it has beyond that it offers again after the next merge.
PENDING_MAX = 8
# Uploads are unpacked one at a time to be looked at: each takes several times its size while that lasts.
INSPECTIONS_MAX = 1
# First questions of workers, over the control lane, that wait for the ones before them.
QUESTIONS_MAX = 256
# Hashes of the objects handed out lately: each is made once, not once a chunk and worker.
HASHES_KEPT = 64


class Bulk:
    def __init__(
        self,
        *,
        state: State,
        model: Model,
        model_lock: trio.Lock,
        link: Link,
        blocking: Blocking,
        observer: Observer,
        quarantine: Quarantine,
        arrived: Callable[[Peer, Received | Provided], Awaitable[None]],
        feed: Feed,
        announced: Callable[[], int],
    ) -> None:
        """`arrived` is told the sender and the event that goes into the machine. Publishes after the one that is
        `announced` are nobody's business yet."""
        self.feed = feed
        self._announced = announced
        self.schemas: dict[str, tuple[bytes, bytes]] = {}  # worker → schema, its hash; until there is a run
        self._state = state
        self._model = model
        self._model_lock = model_lock
        self._link = link
        self._blocking = blocking
        self._observer = observer
        self._quarantine = quarantine
        self._arrived = arrived
        self._undecided: dict[str, int] = {}  # worker → bytes of its delta on the way through the machine
        self._questions, self._asked = trio.open_memory_channel[Incoming](QUESTIONS_MAX)
        self._inspecting = trio.CapacityLimiter(INSPECTIONS_MAX)
        self._uploads: dict[str, tuple[Incoming, Push | Offer, Pull]] = {}
        self._waited_ms: dict[str, int] = {}  # by worker: for a chunk of its last upload
        self._hashes: dict[tuple[str, int], tuple[int, bytes]] = {}

    async def run(self) -> None:
        """Until cancelled."""
        self._undecided.clear()  # what an earlier run of this lane was at is offered again
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._watch_uploads)
            nursery.start_soon(self.feed.run)
            nursery.start_soon(self._receive, self._asked.receive)
            await self._receive(self._link.bulk.receive)

    def ask(self, incoming: Incoming) -> None:
        """A worker's Want that came over the control lane. What is too much is dropped: it asks again."""
        with contextlib.suppress(trio.WouldBlock):
            self._questions.send_nowait(incoming)

    async def _receive(self, receive: Callable[[], Awaitable[Incoming]]) -> None:
        answers: dict[type, Callable[[Incoming, Any], Awaitable[None]]] = {
            Push: self._offered,
            Offer: self._offered,
            Chunk: self._chunk,
            Want: self._wanted,
        }
        while True:
            incoming = await receive()
            answer = answers.get(type(incoming.message))
            if isinstance(incoming.message, Want) and incoming.message.kind in KINDS:
                if incoming.peer.role == "standby":
                    await self.feed.wanted(incoming, incoming.message)
                continue
            if answer is None or incoming.peer.role != "worker" or self._quarantine.refusal(incoming.peer.key):
                continue
            try:
                await answer(incoming, incoming.message)
            except PeerError as error:
                self._uploads.pop(incoming.peer.worker, None)
                self._refused(incoming, str(error))

    def _refused(self, incoming: Incoming, reason: str) -> None:
        self._observer.event("refused message", worker=incoming.peer.worker, reason=reason)
        self._quarantine.strike(incoming.peer, reason)

    # --- in ---

    async def _offered(self, incoming: Incoming, offer: Push | Offer) -> None:
        """A worker has a delta, or the initial parameters: pull the bytes unless they are known to be of no use."""
        worker = incoming.peer.worker
        if isinstance(offer, Push) and (refusal := self._refusal(worker, offer)):
            await self._decide_on(incoming, offer, b"", Facts(refusal=refusal))
            return
        if isinstance(offer, Offer) and worker not in self.schemas:
            return  # the run has begun, or this server has not heard the worker's Hello: it will be asked again
        held = self._uploads.get(worker)
        if held is not None and held[1] == offer:
            # Over a thin link a chunk takes longer than the worker waits for a sign: what is under way is not lost.
            if held[2].is_overdue(_now_ms()):
                await self._ask(self._link.control, incoming, held[2].ask_again(_now_ms()))
            return
        limit = self._model.payload_limit(self.schemas.get(worker, (b"", b""))[0])
        if offer.payload_bytes > limit:
            await self._too_large(incoming, offer, limit)
        self._uploads.pop(worker, None)
        if not self._has_room(worker, offer.payload_bytes):
            return  # it offers again
        kind, number = (DELTA, offer.seq) if isinstance(offer, Push) else (INITIAL, 0)
        pull = Pull(kind, number, _now_ms(), limit, expected_ms=self._waited_ms.get(worker, 0))
        pull.size(offer.payload_bytes, offer.payload_hash)
        self._uploads[worker] = (incoming, offer, pull)
        await self._ask(self._link.control, incoming, pull.wants())

    def _has_room(self, worker: str, payload_bytes: int) -> bool:
        """Whether one more upload of that size fits; one that has come to a halt gives way to it."""
        if worker in self._undecided or self._pending_of(worker) >= PENDING_MAX:
            return False
        while not self._fits(payload_bytes):
            since_ms = {name: pull.arrived_ms for name, (_, _, pull) in self._uploads.items()}
            idlest = min(since_ms, key=since_ms.__getitem__, default="")
            if not idlest or _now_ms() - since_ms[idlest] < STALL_MS:
                return False
            del self._uploads[idlest]
        return True

    def _fits(self, payload_bytes: int) -> bool:
        held = [*(offer.payload_bytes for _, offer, _ in self._uploads.values()), *self._undecided.values()]
        return len(held) < UPLOADS_MIN or sum(held) + payload_bytes <= UPLOAD_BYTES_MAX

    def _pending_of(self, worker: str) -> int:
        return sum(delta.worker == worker for delta in self._state.pending.values())

    def decided(self, worker: str) -> None:
        """The machine has seen the worker's delta: the next one may come."""
        self._undecided.pop(worker, None)

    def _refusal(self, worker: str, push: Push) -> NotAdmitted | None:
        """Why the delta would not be admitted even if its payload were all right.

        It goes with the delta as a fact: the machine decides later, when the bound or the leases may be others, and
        must not admit what nobody has pulled.
        """
        if worker not in self._state.members:
            return NotAdmitted("its worker has not joined", Cause.AWAY)
        verdict = judge(self._state, worker, push, Facts())
        if isinstance(verdict, Duplicate):
            return NotAdmitted("it is in the log already", Cause.REPEATED)
        return verdict if isinstance(verdict, NotAdmitted) else None

    async def _too_large(self, incoming: Incoming, offer: Push | Offer, limit: int) -> None:
        reason = f"too large: {offer.payload_bytes} bytes, and a delta of this model has {limit} at most"
        if isinstance(offer, Push):
            peer = incoming.peer
            self._observer.event("refused", worker=peer.worker, key=peer.key.decode(), reason=reason)
            await self._link.control.send(peer.key, Nack(seq=offer.seq, reason=reason))
        raise PeerError(reason)

    async def _ask(self, lane: Lane, incoming: Incoming, wants: list[Want]) -> None:
        """Over control it passes the publishes that are on their way to the worker."""
        for want in wants:
            await lane.send(incoming.peer.key, want)

    async def _chunk(self, incoming: Incoming, chunk: Chunk) -> None:
        worker = incoming.peer.worker
        _, offer, pull = self._uploads.get(worker, (None, None, None))
        if offer is None or pull is None or (pull.kind, pull.number) != (chunk.kind, chunk.number):
            return
        pull.add(chunk, incoming.payload, _now_ms())
        if pull.is_complete:
            del self._uploads[worker]
            self._waited_ms[worker] = pull.slowest_ms
            self._undecided[worker] = offer.payload_bytes
            self._nursery.start_soon(self._uploaded, incoming, offer, pull)
        else:
            await self._ask(self._link.bulk, incoming, pull.wants())

    async def _uploaded(self, incoming: Incoming, offer: Push | Offer, pull: Pull) -> None:
        assert pull.assembly is not None
        try:
            async with self._inspecting:
                payload = await self._blocking(pull.assembly.result)
                if isinstance(offer, Push):
                    facts = await self._blocking(self._model.inspect, offer.codec, payload)
        except PeerError as error:
            self.decided(incoming.peer.worker)
            self._refused(incoming, str(error))
            return
        if isinstance(offer, Push):
            await self._decide_on(incoming, offer, payload, facts)
        else:
            try:
                await self._provided(incoming, payload)
            finally:  # not before, or the same would be pulled beside it as often as it is offered
                self.decided(incoming.peer.worker)

    async def _decide_on(self, incoming: Incoming, push: Push, payload: bytes, facts: Facts) -> None:
        received = Received(
            now_ms=_now_ms(),
            worker=incoming.peer.worker,
            key=incoming.peer.key.decode(),
            site=incoming.peer.site,
            message=push,
            payload=payload,
            facts=facts,
        )
        await self._arrived(incoming.peer, received)

    async def _provided(self, incoming: Incoming, upload: bytes) -> None:
        if incoming.peer.worker not in self.schemas:
            return  # the run has begun with another's
        schema, schema_hash = self.schemas[incoming.peer.worker]
        async with self._inspecting:
            facts = await self._blocking(self._model.inspect_initial, schema, upload)
            if facts.refusal:
                self._refused(incoming, facts.refusal.reason)
                return
            payload, parameters_hash = await self._blocking(self._model.genesis_payload, schema, upload)
        provided = Provided(
            now_ms=_now_ms(),
            worker=incoming.peer.worker,
            key=incoming.peer.key.decode(),
            schema_hash=schema_hash,
            parameters_hash=parameters_hash,
            payload=payload,
        )
        await self._arrived(incoming.peer, provided)
        self.schemas.clear()

    async def _watch_uploads(self) -> None:
        while True:
            await trio.sleep(UPLOAD_CHECK_SECONDS)
            for worker, (incoming, offer, pull) in list(self._uploads.items()):
                is_given_up = isinstance(offer, Push) and worker not in self._state.active
                if is_given_up or pull.is_idle(_now_ms(), UPLOAD_IDLE_MS):
                    del self._uploads[worker]  # if its worker returns, it offers what it has once more
                elif pull.is_stalled(_now_ms()):
                    await self._ask(self._link.control, incoming, pull.ask_again(_now_ms()))

    # --- out ---

    async def _wanted(self, incoming: Incoming, want: Want) -> None:
        async with self._model_lock:
            want, blob = await self._blocking(self._found, want)
        if blob is not None and want.number > self._announced():
            return  # it may be taken back yet; the worker asks again
        if blob is None:
            await self._link.bulk.send(incoming.peer.key, Gone(kind=want.kind, number=want.number))
        else:
            await send_chunks(self._link.bulk, incoming.peer.key, want, blob, self._hash_of(want, blob))

    def _found(self, want: Want) -> tuple[Want, bytes | None]:
        """The object. For a snapshot that is outdated by now, which over a slow link it always is, the newest one."""
        blob = self._model.fetch(want.kind, want.number)
        if blob is None and want.kind == SNAPSHOT and want.first == 0:
            want = replace(want, number=self._model.newest_publish())
            blob = self._model.fetch(want.kind, want.number)
        return want, blob

    def _hash_of(self, want: Want, blob: bytes) -> bytes:
        cached = self._hashes.get((want.kind, want.number))
        if cached is None or cached[0] != id(blob):
            if len(self._hashes) > HASHES_KEPT:
                self._hashes.clear()
            cached = self._hashes[want.kind, want.number] = (id(blob), xxhash.xxh3_128_digest(blob))
        return cached[1]


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
