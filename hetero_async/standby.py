"""A standby's loop: fetch records from the server, make them durable, confirm them, apply them; take over when called.

It is given its ports, like serve.py, whose place it takes in another site. One task stores and applies, so that records
come in their order; the lanes, the peers who ask, the witness and the checkpointer have tasks beside it.
"""

import json
from dataclasses import replace
from typing import Any

import trio

from hetero_async.checkpoints import Checkpointer
from hetero_async.core.messages import (
    ARRAYS,
    MANIFEST,
    RECORDS,
    Chunk,
    Fence,
    Follow,
    Gone,
    Redirect,
    SettingsReport,
    SettingsRequest,
    StatusReport,
    StatusRequest,
    Wait,
    Want,
)
from hetero_async.core.records import Entry
from hetero_async.core.reign import Reign
from hetero_async.core.standby import Event, Heard, Reconnected, Standby, Stored, Tick
from hetero_async.core.state import State
from hetero_async.core.status import standby_summary
from hetero_async.core.trend import Trend
from hetero_async.errors import DiskFull, HeteroAsyncError, LogCorrupt, PeerError, RefusedError
from hetero_async.feed import Feed
from hetero_async.formats.shipment import unpack_shipment
from hetero_async.formats.status import pack_status
from hetero_async.parts import Parts
from hetero_async.ports import DialLink, Incoming, Model
from hetero_async.replay import apply
from hetero_async.takeover import Takeover
from hetero_async.transfers import Pull

TICK_SECONDS = 0.1
# Who is further behind the server than this catches up, at a speed that says nothing of how fast the run trains.
NEAR_RECORDS = 64
DISK_FULL_RETRY_SECONDS = 1.0
# How often the server is asked who is let in.
LIST_SECONDS = 2.0
# No shipment and no checkpoint is larger: it bounds what a confused server can make a standby allocate.
OBJECT_BYTES_MAX = 1 << 40


class Diverged(HeteroAsyncError):
    """This log has records that are not the run's, after `lsn`. Or (`is_behind`) the records that would follow are not
    to be had any more, and the checkpoint of record `lsn` has been fetched instead."""

    def __init__(self, lsn: int, *, is_behind: bool = False) -> None:
        super().__init__(f"this log must begin anew behind record {lsn}")
        self.lsn = lsn
        self.is_behind = is_behind


class StandingBy:
    def __init__(
        self, parts: Parts, machine: Standby, state: State, model: Model, dialling: DialLink, trend: Trend
    ) -> None:
        """`dialling` leads to the server; where `parts` listen, workers and others ask whether this is the server."""
        self.machine = machine
        self.state = state
        self.model = model
        self._trend = trend
        self.observer = parts.observer
        self._parts = parts
        self._log, self._store, self._promises = parts.log, parts.store, parts.promises
        self._listening, self._dialling = parts.listening, dialling
        self._blocking = parts.blocking
        self._silence_ms = parts.rules.lease_ms
        self.takeover = Takeover(machine=machine, witness=parts.witness, rules=parts.rules, observer=parts.observer)
        self._feed = Feed(log=parts.log, store=parts.store, lane=parts.listening.bulk, blocking=parts.blocking)
        self._storing = trio.Lock()
        self._speaking = trio.Lock()
        self._pull: Pull | None = None
        self._manifest = b""
        self._generation = dialling.generation
        self._checkpointer = Checkpointer(parts, model, trio.Lock(), drop_log=self._needed_log)
        self._listening.term = 0

    async def run(self) -> Reign:
        """Stand by until it is for us to serve; the reign that begins. Raises Diverged, RefusedError, LogCorrupt."""
        async with trio.open_nursery() as nursery:
            for task in (
                self._receive_control,
                self._receive_bulk,
                self._answer,
                self._hand_out,
                self._keep_time,
                self._ask_for_list,
                self._checkpointer.run,
            ):
                nursery.start_soon(task)
            if self._parts.best is not None:
                nursery.start_soon(self._parts.best.run)
            nursery.start_soon(self.takeover.watch, self._parts.ask)
            await self.takeover.begun.wait()
            async with self._storing:  # what is being written down belongs to what we take over
                nursery.cancel_scope.cancel()
        assert self.takeover.reign is not None
        return self.takeover.reign

    # --- the machine ---

    async def _tell(self, event: Event) -> None:
        self.machine.step(event)
        await self._settle()

    async def _settle(self) -> None:
        async with self._speaking:
            owed = self.machine.ready()
            if owed.promise:
                await self._blocking(self._promises.save, owed.promise)
            for message in owed.messages:
                if isinstance(message, Follow):
                    message = replace(message, chain=self._log.chain)
                await self._dialling.control.send(self._dialling.server.key, message)
            if owed.turn is not None:
                self._dialling.turn(owed.turn)
        if owed.cut is not None:
            raise Diverged(owed.cut)
        if self.machine.refusal:
            raise RefusedError(self.machine.refusal)

    async def _keep_time(self) -> None:
        while True:
            await trio.sleep(TICK_SECONDS)
            if self._generation != self._dialling.generation:
                self._generation = self._dialling.generation
                await self._tell(Reconnected(now_ms=_now_ms()))
                if self._pull is not None:
                    self._pull.interrupted()
            await self._tell(Tick(now_ms=_now_ms()))
            await self._fetch()

    async def _receive_control(self) -> None:
        while True:
            incoming = await self._dialling.control.receive()
            if isinstance(incoming.message, SettingsReport):
                await self._take_list(incoming)
                continue
            heard = Heard(now_ms=_now_ms(), server=incoming.peer.worker, term=incoming.term, message=incoming.message)
            await self._tell(heard)
            await self._fetch()

    # --- who is let in ---

    async def _ask_for_list(self) -> None:
        """When this one serves, its own host's list counts, so it must be the server's by then."""
        while self._parts.adopt_list is not None:
            await self._dialling.control.send(self._dialling.server.key, SettingsRequest())
            await trio.sleep(LIST_SECONDS)

    async def _take_list(self, report: Incoming) -> None:
        """From nobody but the server of the term that we follow."""
        if self._parts.adopt_list is not None and report.term == self.machine.term:
            await self._blocking(self._parts.adopt_list, report.payload)

    # --- records ---

    async def _fetch(self) -> None:
        """Keep one question open: for the record that would come next."""
        wanted, pull = self.machine.wanted, self._pull
        if wanted is None or (pull is not None and pull.kind != RECORDS):
            if wanted is None:
                self._pull = None
            elif pull is not None and pull.is_stalled(_now_ms()):
                await self._ask(pull, again=True)
            return
        if pull is None or pull.number != wanted:
            pull = self._pull = Pull(RECORDS, wanted, _now_ms(), OBJECT_BYTES_MAX)
            await self._ask(pull)
        elif pull.is_stalled(_now_ms()):
            await self._ask(pull, again=True)

    async def _ask(self, pull: Pull, again: bool = False) -> None:
        for want in pull.ask_again(_now_ms()) if again else pull.wants():
            await self._dialling.bulk.send(self._dialling.server.key, want)

    async def _receive_bulk(self) -> None:
        while True:
            incoming = await self._dialling.bulk.receive()
            if incoming.term != self.machine.term:
                continue  # a server whose reign has ended, or one that has not said yet that our logs agree
            try:
                match incoming.message:
                    case Chunk() as chunk:
                        await self._chunk(chunk, incoming.payload)
                    case Gone() as gone:
                        await self._gone(gone)
            except PeerError as error:
                self.observer.event("refused message", reason=str(error))
                self._pull = None

    async def _chunk(self, chunk: Chunk, payload: bytes) -> None:
        pull = self._pull
        if pull is None or pull.is_complete or pull.kind != chunk.kind:
            return
        if pull.number != chunk.number or pull.is_another(chunk):
            if pull.kind == RECORDS and pull.number != chunk.number:
                return
            # The server has another object under that number since it was started again, or a newer checkpoint.
            pull = self._pull = Pull(chunk.kind, chunk.number, _now_ms(), OBJECT_BYTES_MAX)
        pull.add(chunk, payload, _now_ms())
        if not pull.is_complete:
            await self._ask(pull)
            return
        assert pull.assembly is not None
        blob = await self._blocking(pull.assembly.result)
        if pull.kind == RECORDS:
            await self._store_records(blob)
        elif pull.kind == MANIFEST:
            self._manifest = blob
            self._pull = Pull(ARRAYS, pull.number, _now_ms(), OBJECT_BYTES_MAX)
            await self._ask(self._pull)
        else:
            await self._begin_behind(self._manifest, blob)

    async def _store_records(self, blob: bytes) -> None:
        chain, entries = await self._blocking(unpack_shipment, blob)
        async with self._storing:
            if entries[0].lsn != self.machine.wanted:
                self._pull = None
                return
            if chain != self._log.chain:
                raise LogCorrupt(
                    f"record {entries[0].lsn} of {self.machine.server} does not continue record {self.machine.lsn} "
                    "of this log: they are of two histories; move this directory away, and the standby begins anew"
                )
            self.machine.is_storing = True
            while True:
                try:
                    await self._log.append(entries)
                    break
                except DiskFull as error:
                    self.observer.event("log paused", reason=str(error))
                    await trio.sleep(DISK_FULL_RETRY_SECONDS)
            self._pull = None
            await self._tell(Stored(now_ms=_now_ms(), lsn=entries[-1].lsn, last_term=entries[-1].term))
            await self._fetch()
            await self._blocking(self._apply, entries)
            is_near = self.machine.lag <= NEAR_RECORDS
            for entry in entries:
                self._trend.see(entry, _now_ms() if is_near else None)
                self.observer.event(type(entry.record).__name__.lower(), lsn=entry.lsn, record=entry.record)
            if (best := self._parts.best) is not None:
                best.settle(self.state)
            if best is None or not best.is_busy:
                await self._checkpointer.consider(self.state)

    def _apply(self, entries: list[Entry]) -> None:
        for entry in entries:
            apply(entry, self.state, self.model)
            if self._parts.best is not None:
                self._parts.best.seen(entry, self.model)

    async def _gone(self, gone: Gone) -> None:
        """The server's log does not reach back to where ours ends: begin behind its newest checkpoint."""
        pull = self._pull
        if pull is None or (pull.kind, pull.number) != (gone.kind, gone.number):
            return
        self._pull = Pull(MANIFEST, 0, _now_ms(), OBJECT_BYTES_MAX)
        await self._ask(self._pull)

    async def _begin_behind(self, manifest: bytes, arrays: bytes) -> None:
        """With the checkpoint durable here, the log can begin behind it."""
        try:
            checkpoint = await self._store.keep(manifest, arrays)
        except (DiskFull, LogCorrupt) as error:
            self.observer.event("checkpoint failed", reason=str(error))
            self._pull = None
            return
        self.observer.event("checkpoint fetched", lsn=checkpoint.lsn)
        raise Diverged(checkpoint.lsn, is_behind=True)

    # --- whoever asks here ---

    async def _answer(self) -> None:
        while True:
            incoming = await self._listening.control.receive()
            match incoming.message:
                case StatusRequest():
                    await self._listening.control.send(incoming.peer.key, StatusReport(), pack_status(self.status()))
                case SettingsRequest():
                    told = json.dumps(self._parts.told(incoming.peer)).encode()
                    await self._listening.control.send(incoming.peer.key, SettingsReport(), told)
                case Fence() as fence if incoming.peer.role == "standby":
                    position = self.machine.fence(fence, incoming.peer.worker)
                    await self._settle()
                    await self._listening.control.send(incoming.peer.key, position)
                case Follow() | _:
                    await self._listening.control.send(incoming.peer.key, self._direction())

    async def _hand_out(self) -> None:
        """Records to a node that mends its log with them; they prove themselves, so it need not be the server's."""
        while True:
            incoming = await self._listening.bulk.receive()
            match incoming.message:
                case Want(kind=kind, number=lsn) as want if kind == RECORDS and 0 < lsn <= self.machine.lsn:
                    if incoming.peer.role == "standby":
                        await self._feed.wanted(incoming, want)

    def _direction(self) -> Redirect | Wait:
        """For a worker, or another standby, that has come to the wrong one."""
        machine = self.machine
        if machine.hears_server(_now_ms(), self._silence_ms):
            return Redirect(server=machine.server, term=machine.term)
        return Wait(reason=f"{machine.name} is a standby, and hears no server either")

    def _needed_log(self, covered: int) -> int | None:
        return None if self._parts.keep_log else covered + 1

    def status(self) -> dict[str, Any]:
        return self.look() | {"state_hash": self.state.digest().hex()}

    def look(self) -> dict[str, Any]:
        """The status without what takes time to know."""
        run, now_ms = self._parts.settings.run, _now_ms()
        status = standby_summary(run, self.state, self._trend, self.machine, now_ms, self._silence_ms)
        status["bytes"] = {"up": self._dialling.bytes_up, "down": self._dialling.bytes_down}
        status["log"] = {"lsn": self.machine.lsn, "released": self.machine.lsn}
        return status


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
