"""The worker's background: runs core.Worker beside the user's training loop and moves its bytes.

It lives in its own thread under trio, and meets the training loop at the Desk only. Encoding, decoding and disk work
go through `blocking`, so a heartbeat never waits for any of them.
"""

import functools
import math
from collections.abc import Callable

import trio
import xxhash

from hetero_async.actors.threads import soon
from hetero_async.core.messages import DELTA, INITIAL, Bye, Chunk, Gone, Hello, Offer, Push, Want
from hetero_async.core.worker import Worker
from hetero_async.core.worker_events import Anchor, Cut, Evaluated, Event, Fetched, Heard, Measured, Reconnected, Tick
from hetero_async.desk import Desk, Published, Round, Target
from hetero_async.download import Download
from hetero_async.errors import DiskFull, PeerError, RefusedError, UserError
from hetero_async.ports import Blocking, DialLink, Follower, Kept, Observer, Outbox
from hetero_async.traffic import UP, Traffic
from hetero_async.transfers import send_chunks

INBOX_SIZE = 256
TICK_SECONDS = 0.1
DISK_FULL_RETRY_SECONDS = 1.0
BYE_SECONDS = 1.0
# So many rounds one after another that each began from the run's own parameters and ended in a NaN are no accident.
SPOILT_ROUNDS_MAX = 3


class Training:
    def __init__(
        self,
        *,
        worker: str,
        machine: Worker,
        follower: Follower,
        desk: Desk,
        link: DialLink,
        outbox: Outbox,
        residual: Kept | None = None,
        blocking: Blocking,
        observer: Observer,
    ) -> None:
        self.worker = worker
        self.machine = machine
        self.follower = follower
        self.desk = desk
        self.link = link
        self.outbox = outbox
        self.residual = residual
        self.blocking = blocking
        self.observer = observer
        self._inbox_send, self._inbox = trio.open_memory_channel[Event | None](INBOX_SIZE)
        self._payloads: dict[int, tuple[str, bytes]] = {}  # unmerged own deltas: codec, bytes
        self._upload = b""  # the initial parameters, once they were asked for
        self._offer: Offer | None = None
        self._traffic = Traffic()
        self._download = Download(link, self._traffic)
        self._rounds = 0
        self._spoilt_rounds = 0
        self._generation = 0
        self._shadow_lock = trio.Lock()
        self._is_target_old = trio.Event()
        self._is_finishing = False
        self._is_leaving = False
        self._is_keeping = False
        self._is_taking = False  # the follower moves to a publish
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Until cancelled, finished or refused. Raises RefusedError with the server's reason."""
        for seq, (push, payload) in (await self.blocking(self.outbox.load)).items():
            self.machine.outbox[seq] = push
            self._payloads[seq] = (push.codec, payload)
        self.machine.restore(self.machine.outbox)
        await self._restore_feedback()
        token = trio.lowlevel.current_trio_token()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self.desk.hand_over = functools.partial(soon, token, self._take, nursery)
                nursery.start_soon(self._receive_control)
                nursery.start_soon(self._receive_bulk)
                nursery.start_soon(self._aim)
                try:
                    await self._decide()
                finally:
                    self._is_leaving = True
        finally:
            with trio.move_on_after(BYE_SECONDS, shield=True):
                await self._leave()

    async def _restore_feedback(self) -> None:
        content = await self.blocking(self.residual.load) if self.residual is not None else None
        if content is not None:
            accepted = await self.blocking(self.outbox.acknowledged)
            try:
                self.follower.restore_feedback(content, accepted, tuple(self.machine.outbox))
            except PeerError as error:
                self.observer.event("residual forgotten", reason=str(error))

    def _take(self, nursery: trio.Nursery, finished: Round) -> None:
        """The user's thread has ended a round. One that comes too late is trained again, from its samples' leases."""
        if not self._is_leaving:
            nursery.start_soon(self._encode, finished)

    def measured(self, figures: Measured | Evaluated) -> None:
        """To be called in this thread."""
        self.machine.step(figures)

    def keep(self, write: Callable[[], None]) -> None:
        """To be called in this thread: have something written beside all else, unless the last is still under way."""
        if self._nursery is not None and not self._is_keeping and not self._is_leaving:
            self._is_keeping = True
            self._nursery.start_soon(self._keep, write)

    async def _keep(self, write: Callable[[], None]) -> None:
        try:
            await self.blocking(write)
        except DiskFull as error:
            self.observer.event("optimizer state not kept", reason=str(error))
        finally:
            self._is_keeping = False

    async def _leave(self) -> None:
        """Say bye, so that what we still lease goes to others at once instead of after its time to live."""
        if self.machine.joined and not self.machine.refusal:
            for report in self.machine.evaluator.last_words(self.machine.incarnation):
                await self.link.control.send(self.link.server.key, report)
            await self.link.control.send(self.link.server.key, Bye(incarnation=self.machine.incarnation))

    # --- deciding ---

    async def _decide(self) -> None:
        while True:
            with trio.move_on_after(TICK_SECONDS):
                event = await self._inbox.receive()
                if event is not None:
                    self.machine.step(event)
            self._notice_reconnect()
            link = self._traffic.usage(trio.current_time())
            vitals = self.desk.vitals(self.link.bytes_up, self.link.bytes_down, link)
            self.machine.step(Tick(now_ms=_now_ms(), vitals=vitals))
            await self._settle()
            if self.machine.refusal:
                raise RefusedError(self.machine.refusal)

    def _notice_reconnect(self) -> None:
        if self._generation != self.link.generation:
            self._generation = self.link.generation
            self.machine.step(Reconnected(now_ms=_now_ms()))
            self._download.reconnected()

    async def _settle(self) -> None:
        machine = self.machine
        owed = machine.ready()
        for push in owed.saves:
            await self._save(push)
        for dropped in owed.drops:
            _, payload = self._payloads.get(dropped.seq, ("", b""))
            self._traffic.end(UP, trio.current_time(), len(payload))
            self.follower.answered(dropped.seq, not dropped.refusal)
            await self._on_disk(self.outbox.drop, dropped.seq, not dropped.refusal)
            if dropped.refusal:
                self._payloads.pop(dropped.seq, None)
                self.observer.event("delta refused", seq=dropped.seq, reason=dropped.refusal)
                self._is_target_old.set()
        if owed.turn is not None:
            self.link.turn(owed.turn)
        if owed.provide:
            await self._provide()
        for message in owed.control:
            payload = self.follower.schema if isinstance(message, Hello) else b""
            await self.link.control.send(self.link.server.key, message, payload)
        for message in owed.bulk:
            await self.link.bulk.send(self.link.server.key, message)
        if owed.regranted is not None:
            self.desk.regrant(owed.regranted)
        for granted in owed.granted:
            self.desk.grant(granted, machine.samples)
        self._tell()
        self._have_evaluated()
        await self._download.follow(machine.wanted)
        if machine.is_finished and not self._is_finishing:
            self._is_finishing = True
            self._is_target_old.set()

    async def _save(self, push: Push) -> None:
        """Unless it is answered by now: a publish that came meanwhile may contain it, as another process's."""
        if push.seq in self._payloads:
            # First what the push leaves out: the other way round, a crash in between would have it sent a second time.
            if self.residual is not None and (content := await self.blocking(self.follower.feedback)):
                await self._on_disk(self.residual.save, content)
            await self._on_disk(self.outbox.save, push, self._payloads[push.seq][1])

    async def _on_disk(self, change: Callable[..., None], *arguments: object) -> None:
        """As soon as there is space for it."""
        while True:
            try:
                await self.blocking(change, *arguments)
            except DiskFull as error:
                self.observer.event("outbox paused", reason=str(error))
                await trio.sleep(DISK_FULL_RETRY_SECONDS)
            else:
                return

    def _tell(self) -> None:
        machine, desk = self.machine, self.desk
        desk.verdict, desk.lacks_initial = machine.prober.verdict, machine.prober.is_lacking
        desk.seed, desk.stretch, desk.waiting = machine.seed, machine.stretch, machine.waiting
        desk.tell(
            rounds=self._rounds,
            in_flight=machine.in_flight,
            unmerged=bool(machine.unmerged),
            progress=machine.progress,
        )
        if machine.window_ms:
            left = machine.window.milliseconds / 1000 - (trio.current_time() - machine.window_ms / 1000)
            desk.pace(
                machine.window.number, max(0.0, left) if machine.window.milliseconds else None, machine.window.steps
            )
            machine.window_ms = 0

    def _have_evaluated(self) -> None:
        """Before the next publish is fetched: the one that we were asked to measure is what we stand on now."""
        machine = self.machine
        if 0 < machine.evaluator.due <= machine.shadow and not self._is_taking:
            machine.evaluator.taken()
            anchor = Anchor(machine.shadow, machine.shadow_term)
            self.desk.offer_published(Published(self.follower.published(), anchor, self.follower.buffers))

    async def _provide(self) -> None:
        """The run has no parameters yet and we were asked for ours."""
        if self._offer is None:
            self._upload = blob = await self.blocking(self.follower.initial_upload)
            digest = xxhash.xxh3_128_digest(blob)
            self._offer = Offer(kind=INITIAL, number=0, payload_bytes=len(blob), payload_hash=digest)
        await self.link.bulk.send(self.link.server.key, self._offer)

    # --- rounds ---

    async def _encode(self, finished: Round) -> None:
        norm = await self.blocking(self.follower.norm, finished.delta, finished.buffers)
        if not math.isfinite(norm):
            await self._discard()
            return
        self._spoilt_rounds = 0
        if norm == 0:
            self.observer.event("round moved nothing", reason="its samples count all the same; is the step size zero?")
        codec = self.machine.codec
        payload = await self.blocking(self.follower.encode, finished.delta, codec, finished.buffers)
        cut = Cut(
            now_ms=_now_ms(),
            anchor=finished.anchor,
            steps=finished.steps if norm else 0,  # what moves nothing was no step
            ranges=finished.ranges,
            codec=codec,
            payload_bytes=len(payload),
            payload_hash=xxhash.xxh3_128_digest(payload),
            tokens=finished.tokens,
        )
        # No await from here to the step: no target is computed with the round counted and its delta missing.
        self._payloads[self.machine.seq + 1] = (codec, payload)
        self._rounds += 1
        self.machine.step(cut)
        self.follower.pushed(self.machine.seq)
        self._is_target_old.set()
        await self._inbox_send.send(None)

    async def _discard(self) -> None:
        """The parameters or buffers hold a NaN or an infinity, and would for ever: go on from the run's own.

        The round is not pushed; the server leases its samples again. Raises UserError when that has not helped.
        """
        self._spoilt_rounds += 1
        if self._spoilt_rounds == SPOILT_ROUNDS_MAX:
            raise UserError(
                f"parameters or buffers turned NaN or infinite in {SPOILT_ROUNDS_MAX} rounds one after another, "
                "each begun from the run's own: lower the learning rate, or look for an overflow in the model"
            )
        self.observer.event("round discarded", reason="a parameter or buffer is NaN or infinite; now the run's own")
        self.desk.spoil()
        self._rounds += 1
        self._is_target_old.set()
        await self._inbox_send.send(None)

    # --- publishes ---

    async def _chunk(self, chunk: Chunk, payload: bytes, term: int) -> None:
        pull = await self._download.add(chunk, payload)
        if pull is None:
            return
        assert pull.assembly is not None
        blob = await self.blocking(pull.assembly.result)
        async with self._shadow_lock:
            self._is_taking = True
            try:
                number = await self.blocking(self.follower.take, pull.kind, blob)
            finally:
                self._is_taking = False
        self._download.end()
        merged_seq = self.follower.merged_seq(self.worker)
        self.machine.step(Fetched(kind=pull.kind, number=number, term=term, merged_seq=merged_seq))
        self._payloads = {seq: coded for seq, coded in self._payloads.items() if seq in self.machine.unmerged}
        self._is_target_old.set()

    def _give_up_pull(self) -> None:
        """What came is not what the server has: begin again from a snapshot, as if the object were gone."""
        if (pull := self._download.end()) is not None:
            self.machine.step(Heard(now_ms=_now_ms(), message=Gone(kind=pull.kind, number=pull.number)))

    async def _aim(self) -> None:
        """Compute where the parameters should stand, whenever shadow or unmerged deltas have changed."""
        while True:
            await self._is_target_old.wait()
            self._is_target_old = trio.Event()
            if self.machine.shadow < 0:
                continue
            async with self._shadow_lock:
                anchor, rounds = Anchor(self.machine.shadow, self.machine.shadow_term), self._rounds
                pending = [self._payloads[seq] for seq in self.machine.unmerged]
                flat = await self.blocking(self.follower.target, pending)
                target = Target(flat, anchor, rounds, self.follower.buffers)
            self.desk.offer_target(target)
            if self._is_finishing:
                self.desk.finish()

    # --- lanes ---

    async def _receive_control(self) -> None:
        while True:
            incoming = await self.link.control.receive()
            if isinstance(incoming.message, Want):
                await self._wanted(incoming.message, incoming.term)
            else:
                await self._inbox_send.send(Heard(now_ms=_now_ms(), message=incoming.message, term=incoming.term))

    async def _receive_bulk(self) -> None:
        while True:
            incoming = await self.link.bulk.receive()
            if incoming.term < self.machine.term:
                continue  # a server whose reign has ended
            try:
                match incoming.message:
                    case Chunk():
                        await self._chunk(incoming.message, incoming.payload, incoming.term)
                    case Want():
                        await self._wanted(incoming.message, incoming.term)
                    case Gone(kind=kind, number=number):
                        if self._download.is_of(kind, number):
                            self._download.end()
                        await self._inbox_send.send(Heard(now_ms=_now_ms(), message=incoming.message))
            except PeerError as error:
                self.observer.event("refused message", reason=str(error))
                self._give_up_pull()

    async def _wanted(self, want: Want, term: int) -> None:
        """Of either lane: what begins an upload passes the publishes that are on their way down."""
        if term < self.machine.term:
            return
        offer: Offer | Push | None = None
        if want.kind == INITIAL:
            offer, blob = self._offer, self._upload
        elif want.kind == DELTA and want.number in self._payloads and want.number in self.machine.outbox:
            offer, blob = self.machine.outbox[want.number], self._payloads[want.number][1]
            self._traffic.begin(UP, trio.current_time())
        if offer is not None:
            await send_chunks(self.link.bulk, self.link.server.key, want, blob, offer.payload_hash)
        await self._inbox_send.send(Heard(now_ms=_now_ms(), message=want))


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
