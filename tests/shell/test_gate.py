"""Who is heard: strangers, impostors, the revoked, and those who are let in and send garbage."""

from collections import Counter
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
import trio
import zmq
from shell.place import BEAT, CHUNK, Place, framed, heartbeat, insist, moment, reach, run, serving

from hetero_async.core.messages import Refused
from hetero_async.core.records import Left
from hetero_async.formats.chunks import CHUNK_BYTES
from hetero_async.quarantine import STRIKES_MAX
from hetero_async.shell.keys import create_keypair, load_secret
from hetero_async.shell.link import HELD_BYTES_MAX, HELD_BYTES_OF_ONE_MAX
from hetero_async.shell.quota import BURST_SECONDS
from hetero_async.shell.wire import CONTROL, unpack

# And a sender's queue of one message.
MORE_CHUNKS_THAN_TCP_HOLDS = 300


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


def plain_dealer(
    context: "zmq.Context[zmq.Socket[bytes]]", place: Place, name: str = "", lane: str = "", sender_queue: int = 1000
) -> Any:
    """A client of somebody else's making; with a name it has that worker's keys."""
    raw = context.socket(zmq.DEALER)
    raw.setsockopt(zmq.SNDHWM, sender_queue)
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
                        nobody.send(framed(heartbeat(666)), zmq.DONTWAIT)
                    await insist(worker, worker.control, heartbeat(1))
                assert {incoming.message for incoming in heard} == {heartbeat(1)}
                assert nobody.poll(0) == 0

    run(main)


def test_a_routing_id_is_not_an_identity(place: Place) -> None:
    """A worker that takes the routing id another one would like to have is still only itself."""

    async def heard_from(name: str, context: zmq.Context[zmq.Socket[bytes]], server: Any) -> Any:
        while True:  # as long as the server has not noticed that the one before is gone, the routing id is taken
            raw = context.socket(zmq.DEALER)
            with closing(raw), trio.move_on_after(2):
                raw.setsockopt(zmq.LINGER, 0)
                raw.setsockopt(zmq.ROUTING_ID, b"a-0")
                raw.setsockopt(zmq.CURVE_SERVERKEY, place.public("server"))
                raw.setsockopt(zmq.CURVE_PUBLICKEY, place.public(name))
                raw.setsockopt(zmq.CURVE_SECRETKEY, load_secret(place.keys / f"{name}.secret"))
                raw.connect(place.control)
                raw.send(framed(heartbeat()))
                return await server.control.receive()

    async def main() -> None:
        with zmq.Context() as context:
            async with place.server() as server:
                for name in ("a-0", "a-1"):
                    incoming = await heard_from(name, context, server)
                    assert (incoming.peer.worker, incoming.peer.key) == (name, place.public(name))

    run(main)


# --- what is dropped ---

GARBAGE: list[list[bytes]] = [
    [b""],
    [b"\xff" * 100],
    [framed(heartbeat()) + b"more"],
    [framed(heartbeat()), b"payload", b"a third frame"],
    [framed(heartbeat())] * 100,
    [bytes(65 * 1024)],
    [framed(Left(worker="a-1", reason="a record is not a message"))],
    [framed(heartbeat()), bytes(CHUNK_BYTES + 1)],
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


def test_a_peer_that_nobody_understands_is_told_so_and_shut_out_when_it_goes_on(place: Place) -> None:
    async def main() -> None:
        with zmq.Context() as context, closing(plain_dealer(context, place, "a-1")) as bad:
            async with serving(place) as (server, _):
                for _ in range(STRIKES_MAX):
                    bad.send(framed(heartbeat()) + b"a field of next year's software")
                while not server.quarantine.refusal(place.public("a-1")):
                    await moment()
                _, told, _ = unpack(bad.recv_multipart(copy=False))
                assert isinstance(told, Refused)
                assert "does not understand what you say: not msgpack within its limits" in told.reason
                assert bad.poll(0) == 0, "it is told once a minute"
                assert not server.quarantine.refusal(place.public("a-0"))

    run(main)


def test_a_flood_of_good_messages_is_cut_to_the_quota_and_others_are_answered(place: Place) -> None:
    burst, sent = int(BURST_SECONDS * CONTROL.messages_per_second), 2000

    async def main() -> None:
        with zmq.Context() as context, closing(plain_dealer(context, place, "a-1")) as flooding:
            flooding.setsockopt(zmq.SNDHWM, sent)
            async with serving(place) as (server, heard), place.worker("a-0") as worker:
                began = trio.current_time()
                for number in range(sent):
                    flooding.send(framed(heartbeat(number)))
                while server.gate.refusals + len(heard) < sent:
                    assert (await insist(worker, worker.control, heartbeat())).message == BEAT
                flood = sum(incoming.peer.worker == "a-1" for incoming in heard)
                most = burst + CONTROL.messages_per_second * (trio.current_time() - began)
                assert 0 < flood <= most
                [told] = place.notes.of("refused message")
                assert (told["worker"], told["reason"]) == ("a-1", "it says too much at once")
                assert not server.quarantine.keys, "it may be a script that records too much"

    run(main)


def test_a_member_that_says_much_and_leaves_while_the_loop_is_busy_does_not_end_the_server(place: Place) -> None:
    """libzmq ends the process when its queue for such a peer is full and a heartbeat falls due."""

    async def main() -> None:
        with zmq.Context() as context:
            async with place.server() as server, place.worker("a-0", silence_seconds=30) as worker:
                with closing(plain_dealer(context, place, "a-1")) as leaving:
                    leaving.setsockopt(zmq.LINGER, 5000)
                    for number in range(CONTROL.in_flight + 100):
                        leaving.send(framed(heartbeat(number)))
                    while server.traffic.get(place.public("a-1")) is None:
                        await moment()
                await trio.sleep(CONTROL.heartbeat_every / 1000 + 1)
                await reach(worker, server)
                heard = 1
                while (await server.control.receive()).peer.worker == "a-1":
                    heard += 1
                assert heard == CONTROL.in_flight, "what is too much at once is dropped, and the rest is kept"

    run(main)


def test_what_a_busy_loop_has_not_read_stays_with_its_sender_and_a_sender_that_leaves_meanwhile_ends_nothing(
    place: Place,
) -> None:
    """Of chunks that nobody asked for: libzmq's thread goes on receiving while the loop does something else."""
    chunk = [framed(CHUNK), bytes(CHUNK_BYTES)]

    async def main() -> None:
        with zmq.Context() as context:
            async with place.server() as server, place.worker("a-0", silence_seconds=30) as worker:
                with closing(plain_dealer(context, place, "a-1", place.bulk, sender_queue=1)) as liar:
                    liar.setsockopt(zmq.SNDTIMEO, 1000)
                    liar.send_multipart(chunk)
                    while server.traffic.get(place.public("a-1")) is None:
                        await moment()
                    sent = 0
                    with suppress(zmq.Again):  # the loop stands still: no await in here
                        while sent < MORE_CHUNKS_THAN_TCP_HOLDS:
                            liar.send_multipart(chunk)
                            sent += 1
                    assert sent < MORE_CHUNKS_THAN_TCP_HOLDS
                await reach(worker, server)

    run(main, 60)


def test_what_one_key_may_leave_unread_leaves_room_to_others_and_all_together_have_a_bound(place: Place) -> None:
    """Chunks that nobody asked for, of four members, while the loop reads none."""
    names, each, chunk = ["a-0", "a-1", "b-0", "b-1"], 10, [framed(CHUNK), bytes(CHUNK_BYTES)]
    for name in names[2:]:
        place.allowed.admit(create_keypair(place.keys / name), role="worker", site="b", worker=name)

    async def main() -> None:
        with zmq.Context() as context, ExitStack() as sockets:
            async with place.server() as server:
                for name in names:
                    raw = sockets.enter_context(closing(plain_dealer(context, place, name, place.bulk)))
                    for _ in range(each):
                        raw.send_multipart(chunk)
                    while (traffic := server.traffic.get(place.public(name))) is None or (
                        traffic.bytes_up < each * CHUNK_BYTES
                    ):
                        await moment()
                held = Counter[str]()
                while sum(held.values()) + server.gate.refusals < len(names) * each:
                    incoming = await server.bulk.receive()
                    held[incoming.peer.worker] += 1
                assert max(held.values()) == HELD_BYTES_OF_ONE_MAX // CHUNK_BYTES
                assert sum(held.values()) == HELD_BYTES_MAX // CHUNK_BYTES - 1, "a chunk and its header are more"
                assert {*held} == {*names}
                raw.send_multipart(chunk)
                assert (await server.bulk.receive()).peer.worker == names[-1], "what was read makes room"

    run(main)
