"""Both ends of the link over real connections on the loopback: what they carry, what recovers, what cannot be had."""

import socket
from dataclasses import replace

import pytest
import trio
import trio.lowlevel
import trio.testing
from shell.place import (
    BEAT,
    CHUNK,
    SILENCE_SECONDS,
    Notes,
    Place,
    elsewhere,
    heartbeat,
    insist,
    moment,
    reach,
    run,
    serving,
)
from shell.test_strangers import impostor, reasons

from hetero_async.core.messages import Bye, StatusReport, StatusRequest, Want
from hetero_async.errors import ConfigError
from hetero_async.formats.chunks import CHUNK_BYTES
from hetero_async.shell.dial import CONTROL_INBOX
from hetero_async.shell.link import open_server_link
from hetero_async.shell.wire import CONTROL


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


def test_the_last_words_of_a_worker_arrive(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server:
            async with place.worker("a-0") as worker:
                await reach(worker, server)
                for _ in range(CONTROL.in_flight // 2):  # what stands before it takes a while to leave
                    assert await worker.control.send(worker.server.key, heartbeat(), bytes(64 * 1024))
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


def test_a_lost_connection_is_told_of_with_its_address_and_not_first_missed_for_its_silence(place: Place) -> None:
    async def main() -> None:
        async with place.worker("a-0", silence_seconds=1000) as worker:
            async with serving(place):
                await insist(worker, worker.control, heartbeat())
            while not place.notes.of("connection lost"):
                await moment()
            assert {told["address"] for told in place.notes.of("connection lost")} <= {place.control, place.bulk}
            async with serving(place):
                await insist(worker, worker.control, heartbeat())
            assert worker.generation == 2

    run(main)


def test_a_server_that_moves_is_found_at_any_of_its_addresses_and_an_impostor_at_one_gets_no_byte(place: Place) -> None:
    """Nobody is at the first address, an impostor at the second, the server at the third; then it is at the first."""
    first, second = elsewhere(place), elsewhere(place)

    async def main() -> None:
        with impostor(second.control) as control, impostor(second.bulk) as bulk:
            async with place.dialling("a-0", first, second, place) as worker:
                for there in (place, first):
                    async with serving(there) as (_, heard):
                        while not heard:
                            await insist(worker, worker.control, heartbeat())
                        assert (await insist(worker, worker.bulk, CHUNK, b"abc")).payload == b"cba"
                        assert worker._endpoint.control == there.control
            assert control.poll(0) == bulk.poll(0) == 0

    run(main, 60)
    # Of a move that is followed at once nothing is told.
    assert place.notes.of("server reached")[0]["address"] == place.control
    assert any("does not hold the pinned server key" in reason for reason in reasons(place))


PEERS, ROUNDS = 4, 6


def test_peers_that_miss_all_servers_try_again_at_moments_of_their_own_and_ever_more_rarely(place: Place) -> None:
    servers = [elsewhere(place) for _ in range(3)]
    peers = [replace(place, notes=Notes()) for _ in range(PEERS)]

    async def miss(peer: Place) -> None:
        async with peer.dialling("a-0", *servers):
            while len(peer.notes.of("server not reached")) < ROUNDS * len(servers):  # noqa: ASYNC110, by another task
                await trio.sleep(1)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            for peer in peers:
                nursery.start_soon(miss, peer)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    pauses = [[note["next_try_seconds"] for note in peer.notes.of("server not reached")] for peer in peers]
    rounds = [[pause for peer in pauses for pause in peer[3 * n : 3 * n + 3]] for n in range(ROUNDS)]
    for number, paused in enumerate(rounds):
        assert min(paused) >= 0.2 and max(paused) <= min(2**number, 10), "and so all servers are tried before it grows"
    late = [pause for paused in rounds[3:] for pause in paused]
    assert max(late) > 2, "36 pauses of up to 8 or 10 s"
    assert len({*late}) > len(late) // 4
    assert len({tuple(peer) for peer in pauses}) == PEERS


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
