"""Workers without a training loop: the real protocol and links, and the same coded delta again and again.

What a server does with deltas is the same whatever they say, and nobody has to train to send them. Each pushes, waits
for its acknowledgement and pushes again; it fetches the publishes that it is told of if `follows`.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import xxhash
from e2e.harness import Silent
from tensors.models import Flat, values

from hetero_async.asking import endpoints
from hetero_async.config import RunConfig
from hetero_async.core import ranges
from hetero_async.core.messages import DELTA, INITIAL, Chunk, Hello, Offer, Want
from hetero_async.core.ranges import Ranges
from hetero_async.core.worker import Worker
from hetero_async.core.worker_events import Anchor, Cut, Fetched, Heard, Reconnected, Tick, Vitals
from hetero_async.shell.dial import DialLink, open_dial_link
from hetero_async.shell.link import SOFTWARE
from hetero_async.tensors.codecs import encode_payload
from hetero_async.tensors.replica import Replica
from hetero_async.transfers import Pull, send_chunks

TICK_SECONDS = 0.05
BATCH = 1
LEASED = 256  # samples that are asked for ahead; one goes with each delta
STEPS_PER_SECOND = 100.0  # that they say they do: leases follow it
DATASET = 1 << 40
OBJECT_BYTES_MAX = 1 << 34
NO_END = 1 << 60
NOTE_SECONDS = 0.2
SEEN = ("pushed", "acknowledged", "refused", "silence_seconds", "payload_bytes")


@dataclass(frozen=True, slots=True)
class Content:
    """What they have to say: made once, shared by all of a process."""

    schema: bytes
    schema_hash: bytes
    upload: bytes
    codec: str
    payload: bytes
    payload_hash: bytes

    @staticmethod
    def of(numel: int, codec: str) -> "Content":
        return Content.of_bytes(numel, encode_payload(codec, values(numel, seed=1).mul_(1e-3)), codec)

    @staticmethod
    def of_bytes(numel: int, payload: bytes, codec: str = "fp32") -> "Content":
        replica = Replica(Flat(numel))
        digest = xxhash.xxh3_128_digest(payload)
        return Content(replica.schema.to_bytes(), replica.schema.hash, replica.initial_upload(), codec, payload, digest)


@dataclass
class Pusher:
    """`pushed` and `acknowledged`: moments by seq, in seconds of time.monotonic."""

    config: RunConfig
    worker: str
    content: Content
    follows: bool = False
    deltas_max: int = NO_END
    hold: Path | None = None  # while that file is there it pushes nothing, and each push makes it
    pushed: dict[int, float] = field(default_factory=dict)
    acknowledged: dict[int, float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    silence_seconds: float = 0.0  # the longest without a word from the server, since it was joined

    def __post_init__(self) -> None:
        life = xxhash.xxh3_64_digest(f"{self.worker} {time.monotonic_ns()}".encode())
        hello = Hello(
            run=self.config.run.name, software=SOFTWARE, schema_hash=self.content.schema_hash, last_seq=0, claims=(),
            device="cpu", dtype="fp32", life=life,
        )  # fmt: skip
        self.machine = Worker(hello)
        self._held: Ranges = ()
        self._blobs = {INITIAL: self.content.upload, DELTA: self.content.payload}
        self._digests = {kind: xxhash.xxh3_128_digest(blob) for kind, blob in self._blobs.items()}
        self._pull: Pull | None = None
        self._generation = 0
        self._heard = 0.0
        self._turn = trio.Event()

    @property
    def payload_bytes(self) -> int:
        return len(self.content.payload)

    async def run(self) -> None:
        """Until cancelled."""
        secret = self.config.keys / f"{self.worker}.secret"
        async with open_dial_link(endpoints(self.config), secret_path=secret, observer=Silent()) as link:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hear_control, link)
                nursery.start_soon(self._hear_bulk, link)
                while True:
                    await self._settle(link)
                    with trio.move_on_after(TICK_SECONDS):
                        await self._turn.wait()
                    self._turn = trio.Event()

    async def _settle(self, link: DialLink) -> None:
        if self._generation != link.generation:
            self._generation = link.generation
            self.machine.step(Reconnected(now_ms=_now_ms()))
        lacking = max(0, LEASED - ranges.size(self._held))
        vitals = Vitals(
            doing="training", steps=self.machine.seq, steps_per_second=STEPS_PER_SECOND, held=self._held, batch=BATCH,
            dataset_samples=DATASET, undrawn_samples=LEASED - lacking, wanted_samples=lacking,
        )  # fmt: skip
        self.machine.step(Tick(now_ms=_now_ms(), vitals=vitals))
        self._push()
        owed = self.machine.ready()
        for dropped in owed.drops:
            if dropped.refusal:
                self.refused.append(dropped.refusal)
            else:
                self.acknowledged[dropped.seq] = time.monotonic()
        if owed.regranted is not None:
            self._held = owed.regranted
        for granted in owed.granted:
            self._held = ranges.union(self._held, granted)
        if owed.provide:
            upload = self.content.upload
            digest = xxhash.xxh3_128_digest(upload)
            owed.bulk.append(Offer(kind=INITIAL, number=0, payload_bytes=len(upload), payload_hash=digest))
        for message in owed.control:
            schema = self.content.schema if isinstance(message, Hello) else b""
            await link.control.send(link.server.key, message, schema)
        for message in owed.bulk:
            await link.bulk.send(link.server.key, message)
        await self._follow(link)
        if owed.drops or owed.granted:
            self._turn.set()

    def _push(self) -> None:
        """Another delta as soon as the last one is answered."""
        machine, content = self.machine, self.content
        if not machine.joined or machine.outbox or not self._held or machine.seq >= self.deltas_max:
            return
        if self.follows and machine.shadow < 0:
            return
        if self.hold is not None:
            if self.hold.exists():
                return
            self.hold.touch()
        taken, self._held = ranges.take(self._held, BATCH)
        publish = machine.shadow if self.follows else machine.known_publish
        cut = Cut(
            now_ms=_now_ms(), anchor=Anchor(publish, machine.term), steps=1, ranges=taken, codec=content.codec,
            payload_bytes=len(content.payload), payload_hash=content.payload_hash,
        )  # fmt: skip
        machine.step(cut)
        self.pushed[machine.seq] = time.monotonic()

    async def _follow(self, link: DialLink) -> None:
        wanted = self.machine.wanted if self.follows else None
        if wanted is not None and (self._pull is None or (self._pull.kind, self._pull.number) != wanted):
            self._pull = Pull(*wanted, _now_ms(), OBJECT_BYTES_MAX)
            for want in self._pull.wants():
                await link.bulk.send(link.server.key, want)

    async def _hear_control(self, link: DialLink) -> None:
        while True:
            incoming = await link.control.receive()
            if self._heard and self.machine.joined:
                self.silence_seconds = max(self.silence_seconds, time.monotonic() - self._heard)
            self._heard = time.monotonic()
            self.machine.step(Heard(now_ms=_now_ms(), message=incoming.message, term=incoming.term))
            if isinstance(incoming.message, Want):
                await self._send(link, incoming.message)
            self._turn.set()

    async def _send(self, link: DialLink, want: Want) -> None:
        await send_chunks(link.bulk, link.server.key, want, self._blobs[want.kind], self._digests[want.kind])

    async def _hear_bulk(self, link: DialLink) -> None:
        while True:
            incoming = await link.bulk.receive()
            match incoming.message:
                case Want() as want:
                    self.machine.step(Heard(now_ms=_now_ms(), message=want, term=incoming.term))
                    await self._send(link, want)
                case Chunk() as chunk:
                    await self._take(link, chunk, incoming.payload, incoming.term)
                case message:
                    self._pull = None
                    self.machine.step(Heard(now_ms=_now_ms(), message=message, term=incoming.term))

    async def _take(self, link: DialLink, chunk: Chunk, payload: bytes, term: int) -> None:
        pull = self._pull
        if pull is None or pull.kind != chunk.kind:
            return
        pull.number = chunk.number  # of snapshots the server may send a newer one
        pull.add(chunk, payload, _now_ms())
        for want in pull.wants():
            await link.bulk.send(link.server.key, want)
        if pull.is_complete:
            self._pull = None
            self.machine.step(Fetched(number=chunk.number, term=term, merged_seq=0))
            self._turn.set()


def push_life(
    run_toml: str, workers: Sequence[str], numel: int, codec: str, out: str, follows: bool, deltas_max: int
) -> None:
    """A process of such workers."""
    config, content = RunConfig.load(Path(run_toml)), Content.of(numel, codec)
    run_pushers([Pusher(config, worker, content, follows, deltas_max) for worker in workers], Path(out))


def push_held(run_toml: str, worker: str, numel: int, codec: str, out: str, hold: str) -> None:
    """One of them, which pushes whenever `hold` is gone."""
    content = Content.of(numel, codec)
    run_pushers([Pusher(RunConfig.load(Path(run_toml)), worker, content, hold=Path(hold))], Path(out))


def run_pushers(pushers: Sequence[Pusher], out: Path) -> None:
    """For ever. Every now and then they leave at `out` what they have seen."""

    async def everybody() -> None:
        async with trio.open_nursery() as nursery:
            for pusher in pushers:
                nursery.start_soon(pusher.run)
            while True:
                seen = {pusher.worker: {name: getattr(pusher, name) for name in SEEN} for pusher in pushers}
                unfinished = out.with_suffix(".new")
                unfinished.write_text(json.dumps(seen))
                unfinished.replace(out)
                await trio.sleep(NOTE_SECONDS)

    trio.run(everybody)


def seen_by(out: Path) -> dict[str, dict[str, Any]]:
    """What each of them has seen by now, as Pusher has it."""
    if not out.exists():
        return {}
    seen = json.loads(out.read_text())
    for worker in seen.values():
        for kind in ("pushed", "acknowledged"):
            worker[kind] = {int(seq): moment for seq, moment in worker[kind].items()}
    return seen


def _now_ms() -> int:
    return int(trio.current_time() * 1000)
