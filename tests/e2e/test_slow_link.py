"""A link of 2 Mbit/s, full in both directions for a minute: the site behind it must not look dead."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio
from e2e.throttle import Throttle

from hetero_async.core.messages import DELTA, Beat, Chunk, Heartbeat
from hetero_async.formats.chunks import CHUNK_BYTES, CREDITS
from hetero_async.shell.dial import SILENCE_SECONDS, DialLink, Endpoint, open_dial_link
from hetero_async.shell.keys import AllowList, create_keypair
from hetero_async.shell.link import ServerLink, open_server_link
from hetero_async.shell.telemetry import LineObserver

BITS_PER_SECOND = 2e6
# Several times every time-out of the control lane, and more than a dozen chunks of 4.2 s each.
FULL_SECONDS = 60.0
BEAT_SECONDS = 1.0
PAYLOAD = bytes(range(256)) * (CHUNK_BYTES // 256)


@dataclass(slots=True)
class Tally:
    answered: int = 0
    slowest_seconds: float = 0.0
    chunks: list[int] = field(default_factory=list)  # those that have gone there and back
    generation: int = 0
    bytes_up: int = 0
    bytes_down: int = 0


def test_every_heartbeat_is_answered_while_the_bulk_lane_is_full(tmp_path: Path) -> None:
    tally = trio.run(full_link, tmp_path)
    print(tally)
    assert tally.answered >= FULL_SECONDS / (BEAT_SECONDS + SILENCE_SECONDS)
    assert tally.generation == 1  # it was one connection all the time
    assert tally.chunks == list(range(len(tally.chunks)))
    assert min(tally.bytes_up, tally.bytes_down) > FULL_SECONDS * BITS_PER_SECOND / 8 / 2, "the link was not full"


async def full_link(directory: Path) -> Tally:
    throttle, tally = Throttle(BITS_PER_SECOND), Tally()
    server_key, worker_key = create_keypair(directory / "server"), create_keypair(directory / "worker")
    allowed = AllowList(directory / "allowed.json")
    allowed.admit(worker_key, role="worker", site="far", worker="far-0")
    listeners = [await trio.open_tcp_listeners(0, host="127.0.0.1") for _ in range(2)]
    ports = [listener.socket.getsockname()[1] for [listener] in listeners]
    for [listener] in listeners:
        await listener.aclose()
    observer = LineObserver()
    async with (
        open_server_link(
            control=f"tcp://127.0.0.1:{ports[0]}",
            bulk=f"tcp://127.0.0.1:{ports[1]}",
            secret_path=directory / "server.secret",
            allowed=allowed,
            observer=observer,
        ) as server,
        throttle.before(ports) as (control, bulk),
        open_dial_link(
            [Endpoint(name="server", key=server_key, control=control, bulk=bulk)],
            secret_path=directory / "worker.secret",
            observer=observer,
        ) as worker,
        trio.open_nursery() as nursery,
    ):
        for task in (answer, echo):
            nursery.start_soon(task, server)
        nursery.start_soon(fill, worker, tally)
        with trio.move_on_after(FULL_SECONDS):
            await beat(worker, tally)
        nursery.cancel_scope.cancel()
    tally.generation = worker.generation
    tally.bytes_up, tally.bytes_down = throttle.up.bytes_passed, throttle.down.bytes_passed
    return tally


async def answer(server: ServerLink) -> None:
    while True:
        incoming = await server.control.receive()
        assert isinstance(incoming.message, Heartbeat)
        number = incoming.message.steps
        await server.control.send(incoming.peer.key, Beat(version=number, publish=0, oldest=0, trained=0, positions=0))


async def echo(server: ServerLink) -> None:
    """Send every chunk back, so that both directions are full; its return is the credit for another one."""
    while True:
        incoming = await server.bulk.receive()
        assert await server.bulk.send(incoming.peer.key, incoming.message, incoming.payload)


async def fill(worker: DialLink, tally: Tally) -> None:
    for number in range(CREDITS):
        await insist(lambda number=number: worker.bulk.send(worker.server.key, chunk(number), PAYLOAD))
    while True:
        incoming = await worker.bulk.receive()
        assert isinstance(incoming.message, Chunk)
        assert incoming.payload == PAYLOAD
        tally.chunks.append(incoming.message.index)
        assert await worker.bulk.send(worker.server.key, chunk(incoming.message.index + CREDITS), PAYLOAD)


def chunk(index: int) -> Chunk:
    return Chunk(kind=DELTA, number=1, index=index, total_bytes=1 << 30, total_hash=bytes(16))


async def beat(worker: DialLink, tally: Tally) -> None:
    """Ask once a second; each question must be answered before the link itself would lose patience."""
    while True:
        asked_at = trio.current_time()
        with trio.fail_after(SILENCE_SECONDS):
            await insist(lambda: worker.control.send(worker.server.key, heartbeat(tally.answered)))
            incoming = await worker.control.receive()
        assert isinstance(incoming.message, Beat)
        assert incoming.message.version == tally.answered
        tally.answered += 1
        tally.slowest_seconds = max(tally.slowest_seconds, trio.current_time() - asked_at)
        await trio.sleep(BEAT_SECONDS)


def heartbeat(number: int) -> Heartbeat:
    return Heartbeat(
        incarnation=1, state="training", steps=number, steps_per_second=1.0, publish=0, bytes_up=0, bytes_down=0
    )


async def insist(send: Callable[[], Awaitable[bool]]) -> None:
    """Until there is a connection."""
    while not await send():
        await moment()


async def moment() -> None:
    await trio.sleep(0.05)
