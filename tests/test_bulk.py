"""What deltas on their way in may take of the server's memory, and who must wait for whom."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch
import trio
import trio.testing
import xxhash
from small_run import SmallRun

from hetero_async import bulk
from hetero_async.bulk import PENDING_MAX, UPLOAD_IDLE_MS, UPLOADS_MIN, Bulk
from hetero_async.core.events import Provided, Received
from hetero_async.core.messages import ARRAYS, MANIFEST, PUBLISH, RECORDS, Chunk, Gone, Message, Push, Want
from hetero_async.core.records import RunSettings
from hetero_async.feed import Feed
from hetero_async.formats.chunks import CHUNK_BYTES, chunk_count, slice_chunk
from hetero_async.ports import Incoming, Peer
from hetero_async.quarantine import Quarantine
from hetero_async.tensors.codecs import encode_payload
from hetero_async.transfers import STALL_MS

NUMEL = 900_000  # an fp32 delta of it has three chunks
WORKERS = [f"w{number}" for number in range(UPLOADS_MIN + 2)]


class Notes:
    def event(self, name: str, **fields: object) -> None:
        pass


class Lane:
    """Both ends of a lane in memory: the test is every worker."""

    def __init__(self) -> None:
        self.arrive, self._inbox = trio.open_memory_channel[Incoming](1000)
        self.sent: list[tuple[bytes, Message]] = []

    async def receive(self) -> Incoming:
        return await self._inbox.receive()

    async def send(self, key: bytes, message: Message, payload: bytes | memoryview = b"") -> bool:
        await trio.lowlevel.checkpoint()
        self.sent.append((key, message))
        return True


@dataclass
class Wires:
    control: Lane = field(default_factory=Lane)
    bulk: Lane = field(default_factory=Lane)
    bytes_up: int = 0
    bytes_down: int = 0
    generation: int = 0


async def at_once(function: Callable[..., object], *arguments: object) -> object:
    await trio.lowlevel.checkpoint()
    return function(*arguments)


class Scene:
    def __init__(self) -> None:
        settings = RunSettings(run="small", samples=4096, merge="window")
        self.run = SmallRun(settings, make_model=lambda: torch.nn.Linear(NUMEL - 1, 1))
        for worker in WORKERS:
            self.run.join(worker)
        self.wires = Wires()
        self.arrived: list[Received | Provided] = []
        self.bulk = Bulk(
            state=self.run.server.state,
            model=self.run.model,
            model_lock=trio.Lock(),
            link=self.wires,
            blocking=at_once,  # type: ignore[arg-type]
            observer=Notes(),
            quarantine=Quarantine(Notes()),
            arrived=self._arrived,
            feed=Feed(log=None, store=None, lane=self.wires.bulk, blocking=at_once),  # type: ignore[arg-type]
            announced=lambda: self.run.server.state.publish,
        )

    async def _arrived(self, peer: Peer, event: Received | Provided) -> None:
        await trio.lowlevel.checkpoint()
        self.arrived.append(event)

    def push(self, worker: str, value: float = 0.0) -> tuple[Push, bytes]:
        """Random values, so that it is as large on the wire as in memory."""
        generator = torch.Generator().manual_seed(WORKERS.index(worker))
        payload = encode_payload("fp32", torch.randn(NUMEL, generator=generator) + value)
        member = self.run.server.state.members[worker]
        push = Push(
            incarnation=member.incarnation, seq=member.last_seq + 1, anchor=0, anchor_term=1, steps=1,
            ranges=self.run.lease(worker).ranges, codec="fp32", payload_bytes=len(payload),
            payload_hash=xxhash.xxh3_128_digest(payload),
        )  # fmt: skip
        return push, payload

    async def say(self, worker: str, message: Message, payload: bytes = b"") -> list[Message]:
        """What it is told for that."""
        known = [(lane, len(lane.sent)) for lane in (self.wires.control, self.wires.bulk)]
        peer = Peer(key=worker.encode(), role="worker", site="a", worker=worker)
        await self.wires.bulk.arrive.send(Incoming(peer=peer, message=message, payload=payload))
        await trio.testing.wait_all_tasks_blocked(0.001)
        return [message for lane, before in known for key, message in lane.sent[before:] if key == worker.encode()]

    async def chunks(self, worker: str, push: Push, payload: bytes, indexes: Iterator[int] | range) -> None:
        for index in indexes:
            chunk = Chunk(
                kind="delta", number=push.seq, index=index, total_bytes=len(payload), total_hash=push.payload_hash
            )
            await self.say(worker, chunk, bytes(slice_chunk(payload, index)))


def play(script: Callable[[Scene], Awaitable[None]]) -> None:
    async def main() -> None:
        scene = Scene()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scene.bulk.run)
            await script(scene)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0.01))


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """For UPLOADS_MIN deltas and no more."""
    monkeypatch.setattr(bulk, "UPLOAD_BYTES_MAX", UPLOADS_MIN * 3 * CHUNK_BYTES)


@pytest.mark.usefixtures("little_room")
def test_when_all_room_is_taken_the_next_upload_waits_until_one_has_ended() -> None:
    async def script(scene: Scene) -> None:
        pushes = {worker: scene.push(worker) for worker in WORKERS}
        for worker in WORKERS[:UPLOADS_MIN]:
            assert [type(told) for told in await scene.say(worker, pushes[worker][0])] == [Want]
        late = WORKERS[UPLOADS_MIN]
        assert await scene.say(late, pushes[late][0]) == []
        first, payload = pushes[WORKERS[0]]
        await scene.chunks(WORKERS[0], first, payload, range(chunk_count(len(payload))))
        assert len(scene.arrived) == 1
        assert await scene.say(late, pushes[late][0]) == [], "its bytes are held until it is decided on"
        scene.bulk.decided(WORKERS[0])
        assert [type(told) for told in await scene.say(late, pushes[late][0])] == [Want]

    play(script)


@pytest.mark.usefixtures("little_room")
def test_an_upload_that_has_come_to_a_halt_gives_way_and_one_that_moves_does_not() -> None:
    async def script(scene: Scene) -> None:
        pushes = {worker: scene.push(worker) for worker in WORKERS}
        for worker in WORKERS[:UPLOADS_MIN]:
            await scene.say(worker, pushes[worker][0])
        await trio.sleep(STALL_MS / 2000)
        for worker in WORKERS[1:UPLOADS_MIN]:
            await scene.chunks(worker, *pushes[worker], range(1))
        await scene.chunks(WORKERS[1], *pushes[WORKERS[1]], range(1))
        await trio.sleep(STALL_MS / 2000)
        newcomer = WORKERS[UPLOADS_MIN]
        assert await scene.say(newcomer, pushes[newcomer][0])
        for worker in WORKERS[1:UPLOADS_MIN]:
            await scene.chunks(worker, *pushes[worker], range(1, 3))
        assert {event.worker for event in scene.arrived} == {*WORKERS[1:UPLOADS_MIN]}

    play(script)


def test_the_same_chunk_again_and_again_does_not_keep_an_upload_alive() -> None:
    async def script(scene: Scene) -> None:
        push, payload = scene.push("w0")
        await scene.say("w0", push)
        for _ in range(8):
            await scene.chunks("w0", push, payload, range(1))
            await trio.sleep(UPLOAD_IDLE_MS / 7000)
        await scene.chunks("w0", push, payload, range(3))
        assert scene.arrived == []

    play(script)


def test_a_worker_has_one_delta_on_its_way_and_a_few_that_wait_for_the_merge() -> None:
    async def script(scene: Scene) -> None:
        scene.run.lease("w1")  # so that the merge waits for it
        for number in range(PENDING_MAX):
            push, payload = scene.push("w0")
            assert await scene.say("w0", push)
            await scene.chunks("w0", push, payload, range(chunk_count(len(payload))))
            assert await scene.say("w0", push) == [], "it is being decided on, and not asked for again"
            event = scene.arrived[number]
            assert isinstance(event, Received)
            scene.run.say("w0", push, payload, event.facts)
            scene.bulk.decided("w0")
        assert len(scene.run.server.state.pending) == PENDING_MAX
        assert await scene.say("w0", scene.push("w0")[0]) == []
        assert await scene.say("w1", scene.push("w1")[0])

    play(script)


@pytest.mark.parametrize("kind", [RECORDS, MANIFEST, ARRAYS])
def test_64_the_log_and_its_checkpoints_are_for_standbys_and_a_worker_that_wants_them_gets_nothing(kind: str) -> None:
    async def script(scene: Scene) -> None:
        assert await scene.say("w0", Want(kind=kind, number=1, first=0, count=1)) == []
        assert await scene.say("w0", Want(kind=PUBLISH, number=99, first=0, count=1)), "and is heard all the same"

    play(script)


def test_what_begins_a_transfer_passes_what_is_sent_the_other_way() -> None:
    async def script(scene: Scene) -> None:
        push, payload = scene.push("w0")
        assert await scene.say("w0", push)
        assert [type(message) for _, message in scene.wires.control.sent] == [Want]
        await scene.chunks("w0", push, payload, range(1))
        assert len(scene.wires.control.sent) == 1, "what follows is asked for as the chunks come"
        peer = Peer(key=b"w1", role="worker", site="a", worker="w1")
        for number in range(bulk.QUESTIONS_MAX + 9):  # more than it keeps: they ask again
            scene.bulk.ask(Incoming(peer=peer, message=Want(kind=PUBLISH, number=99 + number, first=0, count=1)))
        await trio.testing.wait_all_tasks_blocked(0.001)
        answers = [message for key, message in scene.wires.bulk.sent if key == b"w1"]
        assert answers == [Gone(kind=PUBLISH, number=99 + number) for number in range(1 + bulk.QUESTIONS_MAX)], (
            "one is at work"
        )

    play(script)
