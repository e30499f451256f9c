"""What the server hands to its standbys: records as soon as they are durable, and checkpoints.

Part of the server's bulk lane. A standby asks for the next record before there is one; the question waits here, and is
answered with the first batch that holds it. So a record is at the standby half a round trip after it is on this disk.
"""

from dataclasses import dataclass, replace

import trio
import xxhash

from hetero_async.core.messages import ARRAYS, MANIFEST, RECORDS, Gone, Want
from hetero_async.formats.shipment import SHIPMENT_BYTES, pack_shipment
from hetero_async.ports import Blocking, Incoming, Lane, Log, Store
from hetero_async.transfers import send_chunks

KINDS = (RECORDS, MANIFEST, ARRAYS)


@dataclass(frozen=True, slots=True)
class Held:
    """An object that a standby is fetching: the same bytes for all of its chunks."""

    kind: str
    number: int
    blob: bytes | memoryview
    blob_hash: bytes


class Feed:
    def __init__(self, *, log: Log, store: Store, lane: Lane, blocking: Blocking) -> None:
        self._log = log
        self._store = store
        self._lane = lane
        self._blocking = blocking
        self._held: dict[bytes, Held] = {}  # by key
        self._waiting: dict[bytes, tuple[Incoming, Want]] = {}
        self._has_grown = trio.Event()
        self._growths = 0

    async def run(self) -> None:
        """Answer the waiting whenever more is durable, until cancelled."""
        while True:
            await self._has_grown.wait()
            self._has_grown = trio.Event()
            waiting, self._waiting = self._waiting, {}
            for incoming, want in waiting.values():
                await self.wanted(incoming, want)

    def grown(self) -> None:
        """More is durable."""
        self._growths += 1
        self._has_grown.set()

    async def wanted(self, incoming: Incoming, want: Want) -> None:
        """Answer a standby's Want, now or when there is something."""
        key = incoming.peer.key
        held = self._held.get(key)
        if held is None or (held.kind, held.number) != (want.kind, want.number) or want.first == 0:
            held = await self._find(incoming, want)
        if held is not None:
            self._held[key] = held
            want = replace(want, number=held.number)
            await send_chunks(self._lane, key, want, held.blob, held.blob_hash)

    async def _find(self, incoming: Incoming, want: Want) -> Held | None:
        growths = self._growths
        found = await (self._records if want.kind == RECORDS else self._checkpoint)(want)
        if found is None:
            await self._lane.send(incoming.peer.key, Gone(kind=want.kind, number=want.number))
        elif not found.blob:
            self._waiting[incoming.peer.key] = (incoming, want)
            if growths != self._growths:  # while we looked
                self._has_grown.set()
            return None
        return found

    async def _records(self, want: Want) -> Held | None:
        read = await self._blocking(self._log.read, want.number - 1, SHIPMENT_BYTES)
        if read is None:
            return None
        chain, entries = read
        blob = await self._blocking(pack_shipment, chain, entries) if entries else b""
        return Held(RECORDS, want.number, blob, xxhash.xxh3_128_digest(blob))

    async def _checkpoint(self, want: Want) -> Held | None:
        packed = await self._blocking(self._store.packed, want.number)
        if packed is None:
            return None
        lsn, manifest, arrays = packed
        blob = manifest if want.kind == MANIFEST else arrays
        return Held(want.kind, lsn, blob, await self._blocking(xxhash.xxh3_128_digest, blob))
