"""Both ends of the link over real connections on the loopback: who gets in, what is dropped, what recovers."""

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.lowlevel
import zmq

from hetero_async.core.messages import Beat, Bye, Chunk, Heartbeat, StatusReport, StatusRequest, Want
from hetero_async.core.records import Left
from hetero_async.errors import ConfigError
from hetero_async.formats.chunks import CHUNK_BYTES
from hetero_async.formats.frames import encode
from hetero_async.ports import Incoming, Link
from hetero_async.shell.keys import AllowList, create_keypair, load_secret
from hetero_async.shell.link import CONTROL_INBOX, ServerLink, WorkerLink, open_server_link, open_worker_link
from hetero_async.shell.wire import CONTROL

SILENCE_SECONDS = 1.0
BEAT = Beat(version=1, publish=2, oldest=1, trained=3, positions=4)
CHUNK = Chunk(kind="delta", number=1, index=0, total_bytes=CHUNK_BYTES, total_hash=bytes(16))


class Notes:
    """Fulfils ports.Observer: remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []

    def event(self, name: str, **fields: object) -> None:
        self.events.append((name, fields))

    def of(self, name: str) -> list[dict[str, object]]:
        return [fields for event, fields in self.events if event == name]


@dataclass(frozen=True, slots=True)
class Place:
    """A run's keys and two free ports."""

    keys: Path
    allowed: AllowList
    control: str
    bulk: str
    notes: Notes

    def public(self, name: str, suffix: str = ".public") -> bytes:
        return (self.keys / f"{name}{suffix}").read_bytes().split()[1]

    def server(self) -> Any:
        return open_server_link(
            control=self.control,
            bulk=self.bulk,
            secret_path=self.keys / "server.secret",
            allowed=AllowList(self.allowed.path),
            observer=self.notes,
        )

    def worker(self, name: str, server_key: bytes = b"", silence_seconds: float = SILENCE_SECONDS) -> Any:
        return open_worker_link(
            control=self.control,
            bulk=self.bulk,
            server_key=server_key or self.public("server"),
            secret_path=self.keys / f"{name}.secret",
            observer=self.notes,
            silence_seconds=silence_seconds,
        )


@pytest.fixture
def place(tmp_path: Path) -> Place:
    allowed = AllowList(tmp_path / "allowed.json")
    create_keypair(tmp_path / "server")
    for name in ("a-0", "a-1"):
        allowed.admit(create_keypair(tmp_path / name), role="worker", site="a", worker=name)
    create_keypair(tmp_path / "stranger")
    control, bulk = free_ports(2)
    return Place(tmp_path, allowed, f"tcp://127.0.0.1:{control}", f"tcp://127.0.0.1:{bulk}", Notes())


def free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in held]
    for server in held:
        server.close()
    return ports


def run(main: Callable[[], Awaitable[None]], seconds: float = 30) -> None:
    async def bounded() -> None:
        with trio.fail_after(seconds):
            await main()

    trio.run(bounded)


async def moment() -> None:
    """Between two looks at something that will come about."""
    await trio.sleep(0.01)


def heartbeat(number: int = 0) -> Heartbeat:
    return Heartbeat(
        incarnation=1, state="training", steps=number, steps_per_second=1.0, publish=0, bytes_up=0, bytes_down=0
    )


async def answer_all(link: ServerLink, heard: list[Incoming]) -> None:
    """A small server: answer heartbeats on control, and on bulk a chunk with a Want."""

    async def control() -> None:
        while True:
            incoming = await link.control.receive()
            heard.append(incoming)
            await link.control.send(incoming.peer.key, BEAT)

    async def bulk() -> None:
        while True:
            incoming = await link.bulk.receive()
            heard.append(incoming)
            await link.bulk.send(incoming.peer.key, CHUNK, incoming.payload[::-1])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(control)
        nursery.start_soon(bulk)


@asynccontextmanager
async def serving(place: Place) -> AsyncIterator[tuple[ServerLink, list[Incoming]]]:
    heard: list[Incoming] = []
    async with place.server() as link, trio.open_nursery() as nursery:
        nursery.start_soon(answer_all, link, heard)
        yield link, heard
        nursery.cancel_scope.cancel()


async def insist(link: WorkerLink, lane: Any, message: Any, payload: bytes = b"") -> Incoming:
    """Ask until answered, as the loops do."""
    while True:
        await lane.send(link.server.key, message, payload)
        with trio.move_on_after(0.2):
            received: Incoming = await lane.receive()
            return received


def fulfils_the_port(link: ServerLink | WorkerLink) -> Link:
    return link


def test_both_lanes_carry_messages_both_ways_and_count_their_bytes(place: Place) -> None:
    payload = bytes(range(256)) * (CHUNK_BYTES // 256)

    async def main() -> None:
        async with serving(place) as (server, heard), place.worker("a-0") as worker:
            answer = await insist(worker, worker.control, heartbeat(7))
            assert (answer.message, answer.peer.role, answer.peer.key) == (BEAT, "server", place.public("server"))
            answer = await insist(worker, worker.bulk, CHUNK, payload)
            assert (answer.message, answer.payload) == (CHUNK, payload[::-1])
            assert heard[0].message == heartbeat(7)
            assert (heard[0].peer.site, heard[0].peer.worker, heard[0].peer.role) == ("a", "a-0", "worker")
            assert worker.bytes_up == server.bytes_up >= CHUNK_BYTES
            assert worker.bytes_down == server.bytes_down >= CHUNK_BYTES
            assert server.traffic[place.public("a-0")].bytes_up == server.bytes_up
            assert (worker.connected, worker.generation) == (True, 1)

    run(main)


def test_sending_to_a_worker_that_was_never_heard_says_no(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server:
            assert not await server.control.send(place.public("a-0"), BEAT)

    run(main)


def test_sending_to_a_worker_that_left_says_no(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server:
            async with place.worker("a-0") as worker:
                await reach(worker, server)
            while await server.control.send(place.public("a-0"), BEAT):
                await moment()

    run(main)


async def reach(worker: WorkerLink, server: ServerLink) -> Incoming:
    """Until the server has heard the worker once."""
    while not await worker.control.send(worker.server.key, heartbeat()):
        await moment()
    return await server.control.receive()


def test_the_last_words_of_a_worker_arrive(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server:
            async with place.worker("a-0") as worker:
                await reach(worker, server)
                for _ in range(CONTROL.queue // 2):  # what stands before it takes a while to leave
                    assert await worker.control.send(worker.server.key, heartbeat(), bytes(256 * 1024))
                assert await worker.control.send(worker.server.key, Bye(incarnation=1))
            while (await server.control.receive()).message != Bye(incarnation=1):
                pass

    run(main)


def test_a_slow_worker_is_refused_more_instead_of_being_queued_for(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server, place.worker("a-0", silence_seconds=60) as worker:
            while not await worker.bulk.send(worker.server.key, Want(kind="publish", number=1, first=0, count=1)):
                await moment()
            key = (await server.bulk.receive()).peer.key
            sent = 0
            while await server.bulk.send(key, CHUNK, bytes(CHUNK_BYTES)):
                sent += 1
                assert sent < 500

    run(main)


# --- who gets in ---


def test_an_unknown_key_is_refused_told_of_once_and_gets_in_when_admitted_later(place: Place) -> None:
    async def main() -> None:
        async with serving(place) as (_, heard), place.worker("stranger") as stranger:
            while len(place.notes.of("server not reached")) < 2:
                await stranger.control.send(stranger.server.key, heartbeat())
                await moment()
            assert heard == []
            key = place.public("stranger")
            assert [fields["key"] for fields in place.notes.of("refused key")] == [key.decode()]
            place.allowed.admit(key, role="worker", site="b", worker="b-0")
            assert (await insist(stranger, stranger.control, heartbeat())).message == BEAT
            assert heard[0].peer.worker == "b-0"
            assert place.notes.of("server reached")

    run(main, 60)


def test_a_revoked_key_is_not_heard_from_its_next_message_on_and_gets_no_more(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server, place.worker("a-0") as revoked, place.worker("a-1") as other:
            await reach(revoked, server)
            await reach(other, server)
            place.allowed.revoke(place.public("a-0"))
            assert await revoked.control.send(revoked.server.key, heartbeat(666))
            while not server.gate.refusals:
                await other.control.send(other.server.key, heartbeat())
                assert (await server.control.receive()).peer.worker == "a-1"
            assert not await server.control.send(place.public("a-0"), BEAT)
            [refused] = place.notes.of("refused message")
            assert refused["key"] == place.public("a-0").decode()

    run(main)


def test_a_client_that_pins_another_server_key_gets_nothing(place: Place) -> None:
    async def main() -> None:
        async with serving(place) as (_, heard), place.worker("a-0", server_key=place.public("stranger")) as worker:
            while not place.notes.of("server not reached"):
                assert not await worker.control.send(worker.server.key, heartbeat())
                await moment()
            assert heard == []

    run(main)


def plain_dealer(context: "zmq.Context[zmq.Socket[bytes]]", place: Place, name: str = "", lane: str = "") -> Any:
    """A client of somebody else's making; with a name it has that worker's keys."""
    raw = context.socket(zmq.DEALER)
    raw.setsockopt(zmq.LINGER, 0)
    if name:
        raw.setsockopt(zmq.CURVE_SERVERKEY, place.public("server"))
        raw.setsockopt(zmq.CURVE_PUBLICKEY, place.public(name))
        raw.setsockopt(zmq.CURVE_SECRETKEY, load_secret(place.keys / f"{name}.secret"))
    raw.connect(lane or place.control)
    return raw


def test_a_client_without_a_key_is_not_heard(place: Place) -> None:
    async def main() -> None:
        with zmq.Context() as context, closing(plain_dealer(context, place)) as nobody:
            async with serving(place) as (_, heard), place.worker("a-0") as worker:
                for _ in range(10):
                    with suppress(zmq.Again):  # it may have given up by now
                        nobody.send(encode(heartbeat(666)), zmq.DONTWAIT)
                    await insist(worker, worker.control, heartbeat(1))
                assert {incoming.message for incoming in heard} == {heartbeat(1)}
                assert nobody.poll(0) == 0

    run(main)


def test_a_routing_id_is_not_an_identity(place: Place) -> None:
    """A worker that takes the routing id another one would like to have is still only itself."""

    async def main() -> None:
        with zmq.Context() as context:
            async with place.server() as server:
                for name in ("a-0", "a-1"):
                    raw = context.socket(zmq.DEALER)
                    with closing(raw):
                        raw.setsockopt(zmq.LINGER, 0)
                        raw.setsockopt(zmq.ROUTING_ID, b"a-0")
                        raw.setsockopt(zmq.CURVE_SERVERKEY, place.public("server"))
                        raw.setsockopt(zmq.CURVE_PUBLICKEY, place.public(name))
                        raw.setsockopt(zmq.CURVE_SECRETKEY, load_secret(place.keys / f"{name}.secret"))
                        raw.connect(place.control)
                        raw.send(encode(heartbeat()))
                        incoming = await server.control.receive()
                        assert (incoming.peer.worker, incoming.peer.key) == (name, place.public(name))

    run(main)


# --- what is dropped ---

GARBAGE: list[list[bytes]] = [
    [b""],
    [b"\xff" * 100],
    [encode(heartbeat()) + b"more"],
    [encode(heartbeat()), b"payload", b"a third frame"],
    [encode(heartbeat())] * 100,
    [bytes(65 * 1024)],
    [encode(Left(worker="a-1", reason="a record is not a message"))],
    [encode(heartbeat()), bytes(CHUNK_BYTES + 1)],
]


@pytest.mark.parametrize("frames", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_from_an_admitted_key_is_dropped_and_others_go_on(place: Place, frames: list[bytes]) -> None:
    async def main() -> None:
        with zmq.Context() as context, closing(plain_dealer(context, place, "a-1")) as bad:
            async with serving(place) as (server, heard), place.worker("a-0") as worker:
                bad.send_multipart(frames)
                while not server.gate.refusals and len(frames[-1]) <= CHUNK_BYTES:
                    await insist(worker, worker.control, heartbeat())
                for _ in range(3):
                    await insist(worker, worker.control, heartbeat())
                assert {incoming.peer.worker for incoming in heard} == {"a-0"}

    run(main)


def test_a_peer_that_floods_with_garbage_is_told_of_once(place: Place) -> None:
    async def main() -> None:
        with zmq.Context() as context, closing(plain_dealer(context, place, "a-1")) as bad:
            async with serving(place) as (server, _):
                for _ in range(50):
                    bad.send(b"garbage")
                while server.gate.refusals < 50:
                    await moment()
                [told] = place.notes.of("refused message")
                assert told["worker"] == "a-1"

    run(main)


# --- what recovers ---


def test_a_worker_finds_a_server_that_starts_after_it(place: Place) -> None:
    async def main() -> None:
        async with place.worker("a-0") as worker:
            assert not await worker.control.send(worker.server.key, heartbeat())
            while not place.notes.of("server not reached"):
                await moment()
            assert place.notes.of("server not reached")[0]["address"] == place.control
            async with serving(place):
                await insist(worker, worker.control, heartbeat())

    run(main)


def test_a_worker_comes_back_after_the_server_was_away_and_knows_that_it_is_another_connection(place: Place) -> None:
    async def main() -> None:
        async with place.worker("a-0") as worker:
            async with serving(place):
                await insist(worker, worker.control, heartbeat())
            generation = worker.generation
            while worker.connected:
                await moment()
            async with serving(place):
                assert (await insist(worker, worker.control, heartbeat())).message == BEAT
                answer = await insist(worker, worker.bulk, CHUNK, b"abc")
                assert answer.payload == b"cba"
            assert worker.generation > generation

    run(main)


def test_a_server_that_restarts_at_once_finds_its_port_free(place: Place) -> None:
    async def main() -> None:
        async with place.worker("a-0") as worker:
            for _ in range(3):
                async with serving(place):
                    await insist(worker, worker.control, heartbeat())

    run(main)


def test_a_worker_that_does_not_read_for_long_keeps_its_connection(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server, place.worker("a-0") as worker:
            key = (await reach(worker, server)).peer.key
            for _ in range(CONTROL_INBOX + 10):
                while not await server.control.send(key, BEAT):
                    await moment()
            while not worker.connected:
                await moment()
            generation = worker.generation
            await trio.sleep(2 * SILENCE_SECONDS)
            assert (worker.connected, worker.generation) == (True, generation)

    run(main)


def test_a_status_question_carries_its_answer_as_payload(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server, place.worker("a-0") as worker:
            while not await worker.control.send(worker.server.key, StatusRequest()):
                await moment()
            asked = await server.control.receive()
            assert await server.control.send(asked.peer.key, StatusReport(), b"{}")
            assert (await worker.control.receive()).payload == b"{}"

    run(main)


# --- what cannot be had ---


@pytest.mark.parametrize("taken", ["control", "bulk"])
def test_a_taken_port_is_told_with_what_to_do(place: Place, taken: str) -> None:
    address = getattr(place, taken)
    setting = {"control": "server.address", "bulk": "server.bulk_address"}[taken]

    async def main() -> None:
        with socket.create_server(("127.0.0.1", int(address.rsplit(":", 1)[1]))):
            with pytest.raises(ConfigError) as caught:
                async with place.server():
                    pass
        assert str(caught.value) == (
            f"address {address} is already in use; stop the other server or change {setting} in run.toml"
        )
        async with serving(place), place.worker("a-0") as worker:  # and nothing is left over of the attempt
            await insist(worker, worker.control, heartbeat())

    run(main)


@pytest.mark.parametrize("address", ["tcp://192.0.2.1:7710", "tcp://no-such-host.invalid:7710"])
def test_an_address_of_another_machine_cannot_be_served(place: Place, address: str) -> None:
    async def main() -> None:
        with pytest.raises(ConfigError, match=f"cannot listen at {address}: .*server.address in run.toml"):
            async with open_server_link(
                control=address,
                bulk=place.bulk,
                secret_path=place.keys / "server.secret",
                allowed=place.allowed,
                observer=place.notes,
            ):
                pass

    run(main)


def test_a_server_can_be_named_by_its_host_name(place: Place) -> None:
    async def main() -> None:
        named = Place(
            place.keys,
            place.allowed,
            place.control.replace("127.0.0.1", "localhost"),
            place.bulk.replace("127.0.0.1", "localhost"),
            place.notes,
        )
        async with serving(named), named.worker("a-0") as worker:
            await insist(worker, worker.control, heartbeat())

    run(main)
