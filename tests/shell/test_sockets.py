"""The ZeroMQ adapter: no lost wake-up, nothing lost or doubled by cancelling, both ends in one loop."""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Any

import pytest
import trio
import trio.testing
import zmq

from hetero_async.shell.sockets import TrioSocket

SOAK_MESSAGES = 3000


@contextmanager
def raw_pair(
    high_water_mark: int = 1000, kinds: tuple[int, int] = (zmq.PAIR, zmq.PAIR)
) -> Iterator[tuple["zmq.Socket[bytes]", "zmq.Socket[bytes]"]]:
    """Two sockets, connected through the loopback."""
    with zmq.Context() as context, context.socket(kinds[0]) as left, context.socket(kinds[1]) as right:
        for raw in (left, right):
            raw.setsockopt(zmq.LINGER, 0)
            raw.setsockopt(zmq.SNDHWM, high_water_mark)
            raw.setsockopt(zmq.RCVHWM, high_water_mark)
        left.bind("tcp://127.0.0.1:*")
        right.connect(left.getsockopt_string(zmq.LAST_ENDPOINT))
        yield left, right


@asynccontextmanager
async def pair(high_water_mark: int = 1000) -> AsyncIterator[tuple[TrioSocket, TrioSocket]]:
    with raw_pair(high_water_mark) as raws:
        sockets = TrioSocket(raws[0]), TrioSocket(raws[1])
        try:
            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    for socket in sockets:
                        nursery.start_soon(socket.watch)
                    yield sockets
                    nursery.cancel_scope.cancel()
        finally:
            for socket in sockets:
                socket.close()


async def received(socket: TrioSocket) -> list[bytes]:
    return [frame.bytes for frame in await socket.receive()]


def test_a_message_of_several_frames_arrives_as_it_was_sent() -> None:
    async def main() -> list[bytes]:
        async with pair() as (left, right):
            await left.send([b"header", b"", bytes(1 << 20)])
            return await received(right)

    assert trio.run(main) == [b"header", b"", bytes(1 << 20)]


@pytest.mark.parametrize("high_water_mark", [1, 8])
@pytest.mark.parametrize("seed", range(2))
def test_under_random_cancellation_nothing_is_lost_doubled_or_reordered(high_water_mark: int, seed: int) -> None:
    """Both ends of one socket pair in one loop, each sending and receiving at the same time."""

    async def main() -> list[list[int]]:
        dice = random.Random(seed)
        arrived: list[list[int]] = [[], []]
        async with pair(high_water_mark) as sockets:
            async with trio.open_nursery() as nursery:
                for socket, numbers in zip(sockets, arrived, strict=True):
                    nursery.start_soon(_send_all, socket, dice)
                    nursery.start_soon(_receive_all, socket, numbers, dice)
        return arrived

    assert trio.run(main) == [list(range(SOAK_MESSAGES))] * 2


async def _send_all(socket: TrioSocket, dice: random.Random) -> None:
    for number in range(SOAK_MESSAGES):
        part = number.to_bytes(4, "big")
        await _insist(lambda part=part: socket.send([part, part]), dice)


async def _receive_all(socket: TrioSocket, numbers: list[int], dice: random.Random) -> None:
    while len(numbers) < SOAK_MESSAGES:
        parts = await _insist(lambda: received(socket), dice)
        assert parts[0] == parts[1]
        numbers.append(int.from_bytes(parts[0], "big"))


async def _insist(call: Callable[[], Awaitable[Any]], dice: random.Random) -> Any:
    """Cancel at random and try again: a call that was cancelled must not have happened."""
    while True:
        with trio.CancelScope() as scope:
            scope.deadline = trio.current_time() + dice.choice([0, 1e-5, 1e-4, 1e-3, 1])
            return await call()


@pytest.mark.parametrize("meddle", ["send", "try_send"])
def test_a_call_that_eats_the_edge_still_wakes_who_waits(meddle: str) -> None:
    """A message arrives while one task waits; before trio looks, another task makes a call on the same socket."""

    async def main() -> list[bytes]:
        arrived: list[bytes] = []

        async def receive() -> None:
            arrived.extend(await received(here))

        async with pair() as (here, there):
            await there.send([b"warm up"])
            await here.receive()
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(receive)
                    await trio.testing.wait_all_tasks_blocked()
                    assert there.try_send([b"news"])
                    _until_readable(here)
                    await _meddle(meddle, here)
            return arrived

    assert trio.run(main) == [b"news"]


def _until_readable(socket: TrioSocket) -> None:
    """Block the whole loop until the message is there, so that nobody else sees the descriptor change."""
    poller = zmq.Poller()
    poller.register(socket._descriptor, zmq.POLLIN)
    assert poller.poll(5000)


async def _meddle(how: str, socket: TrioSocket) -> None:
    if how == "send":
        await socket.send([b"unrelated"])
    else:
        assert socket.try_send([b"unrelated"])


def test_a_sender_that_must_wait_itself_still_wakes_the_receiver_whose_edge_it_ate() -> None:
    """A REQ socket cannot send before it has the answer: the sender looks, sees only the other's event, and parks."""

    async def main() -> list[list[bytes]]:
        arrived: list[list[bytes]] = []

        async def receive() -> None:
            arrived.append(await received(asking))

        with raw_pair(kinds=(zmq.REP, zmq.REQ)) as raws:
            answering, asking = (TrioSocket(raw) for raw in raws)
            with trio.fail_after(5), closing(answering), closing(asking):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(answering.watch)
                    nursery.start_soon(asking.watch)
                    async with trio.open_nursery() as inner:
                        inner.start_soon(receive)
                        await asking.send([b"first?"])
                        await answering.receive()
                        await trio.testing.wait_all_tasks_blocked()
                        assert answering.try_send([b"first."])
                        _until_readable(asking)
                        await asking.send([b"second?"])
                    nursery.cancel_scope.cancel()
        return arrived

    assert trio.run(main) == [[b"first."]]


def test_trying_to_send_says_no_where_waiting_would_wait() -> None:
    async def main() -> list[bool]:
        with zmq.Context() as context, context.socket(zmq.DEALER) as raw:
            raw.setsockopt(zmq.LINGER, 0)
            raw.setsockopt(zmq.IMMEDIATE, 1)
            raw.connect("tcp://127.0.0.1:9")
            socket = TrioSocket(raw)
            with pytest.raises(trio.TooSlowError), trio.fail_after(0.05):
                await socket.send([b"to nobody"])
            refused = socket.try_send([b"to nobody"])
            socket.close()
        return [refused]

    assert trio.run(main) == [False]


def test_a_router_says_no_for_a_peer_that_is_not_there() -> None:
    async def main() -> bool:
        with zmq.Context() as context, context.socket(zmq.ROUTER) as raw:
            raw.setsockopt(zmq.ROUTER_MANDATORY, 1)
            raw.bind("tcp://127.0.0.1:*")
            socket = TrioSocket(raw)
            is_sent = socket.try_send([b"who?", b"news"])
            socket.close()
        return is_sent

    assert trio.run(main) is False


def test_closing_wakes_a_watcher_that_is_still_there() -> None:
    async def main() -> None:
        with zmq.Context() as context, context.socket(zmq.PAIR) as raw:
            socket = TrioSocket(raw)
            with trio.fail_after(5):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_closed, socket)
                    await trio.testing.wait_all_tasks_blocked()
                    socket.close()

    trio.run(main)


async def _closed(socket: TrioSocket) -> None:
    with pytest.raises(trio.ClosedResourceError):
        await socket.watch()
