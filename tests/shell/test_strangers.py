"""Who is kept out, and what each side is told: strangers, the unencrypted, a false server, roles that say too much."""

from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import trio
import zmq
from shell.place import BEAT, CHUNK, Place, framed, heartbeat, insist, moment, reach, run, serving

from hetero_async.core.messages import (
    ANSWERS,
    MESSAGE_TYPES,
    SAID_BY,
    Confirm,
    Fence,
    Follow,
    Hello,
    Message,
    Push,
    Redirect,
    SettingsReport,
    SettingsRequest,
    StatusReport,
    StatusRequest,
    Want,
    Welcome,
)
from hetero_async.shell.keys import load_secret, public_of, replace_keypair

HELLO = Hello(
    run="x", software="", schema_hash=bytes(16), last_seq=0, claims=(), device="", dtype="", life=bytes(8)
)  # fmt: skip
PUSH = Push(
    incarnation=1, seq=1, anchor=0, anchor_term=1, steps=1, ranges=(), codec="int8", payload_bytes=1,
    payload_hash=bytes(16)
)  # fmt: skip
WELCOME = Welcome(
    incarnation=1, last_seq=9, granted=(), publish=1, common=1, seed=0, codec="int8", stretch=4, life=bytes(8)
)  # fmt: skip
WANT = Want(kind="publish", number=1, first=0, count=8)
FOLLOW = Follow(run="x", software="", lsn=0, terms=(), began=())


def reasons(place: Place) -> list[str]:
    return [str(fields["reason"]) for fields in place.notes.of("server not reached")]


# --- strangers ---


def test_a_key_that_is_not_let_in_is_told_on_both_sides_and_what_to_do(place: Place) -> None:
    async def main() -> None:
        async with serving(place) as (_, heard), place.worker("stranger") as stranger:
            while len(reasons(place)) < 3:
                await stranger.control.send(stranger.server.key, heartbeat())
                await moment()
            assert heard == []

    run(main, 60)
    key = place.public("stranger").decode()
    [refused] = place.notes.of("refused key")
    assert (refused["key"], refused["address"]) == (key, "127.0.0.1")
    assert reasons(place)[0] == (
        "the server does not let this key in; on its host, its operator can: "
        f"hetero-async keys allow '{key}' --site SITE. Trying again until stopped"
    )


def unencrypted(context: Any, address: str, mechanism: int) -> Any:
    """A client that says no key: NULL, or PLAIN with a name and a password."""
    raw = context.socket(zmq.DEALER)
    raw.setsockopt(zmq.LINGER, 0)
    if mechanism == zmq.PLAIN:
        raw.setsockopt(zmq.PLAIN_USERNAME, b"a-0")
        raw.setsockopt(zmq.PLAIN_PASSWORD, b"a-0")
    assert raw.getsockopt(zmq.MECHANISM) == mechanism
    raw.connect(address)
    return raw


@pytest.mark.parametrize("listens", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize("mechanism", [zmq.NULL, zmq.PLAIN], ids=["NULL", "PLAIN"])
def test_nobody_is_heard_unencrypted_wherever_the_server_listens(place: Place, listens: str, mechanism: int) -> None:
    served = replace(place, control=at(place.control, listens), bulk=at(place.bulk, listens))

    async def main() -> None:
        with zmq.Context() as context:
            async with serving(served) as (_, heard), place.worker("a-0") as worker:
                with (
                    closing(unencrypted(context, place.control, mechanism)) as control,
                    closing(unencrypted(context, place.bulk, mechanism)) as bulk,
                ):
                    for _ in range(10):
                        for raw, message in ((control, heartbeat(666)), (bulk, CHUNK)):
                            with suppress(zmq.Again):  # it may have given up by now
                                raw.send(framed(message), zmq.DONTWAIT)
                        await insist(worker, worker.control, heartbeat(1))
                    assert {incoming.message for incoming in heard} == {heartbeat(1)}
                    assert control.poll(0) == bulk.poll(0) == 0

    run(main)


def at(address: str, host: str) -> str:
    return f"tcp://{host}:{address.rsplit(':', 1)[1]}"


def test_every_socket_that_listens_or_dials_speaks_curve(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server, place.worker("a-0") as worker:
            await reach(worker, server)
            lanes = (server.control._socket, server.bulk._socket, worker.control.socket, worker.bulk.socket)
            for socket in lanes:
                assert socket is not None and socket._raw.getsockopt(zmq.MECHANISM) == zmq.CURVE

    run(main)


# --- a false server ---


@contextmanager
def impostor(address: str) -> Iterator[Any]:
    """Somebody else's server at the server's address: it lets everybody in, and has a key, but not the server's."""
    with zmq.Context() as context, closing(context.socket(zmq.ROUTER)) as raw:
        raw.setsockopt(zmq.LINGER, 0)
        raw.setsockopt(zmq.CURVE_SERVER, 1)
        raw.setsockopt(zmq.CURVE_SECRETKEY, zmq.curve_keypair()[1])
        raw.bind(address)
        yield raw


def test_a_server_with_another_key_gets_no_byte_and_the_worker_names_both_keys(place: Place) -> None:
    async def main() -> None:
        with impostor(place.control) as control, impostor(place.bulk) as bulk:
            async with place.worker("a-0") as worker:
                while len(reasons(place)) < 2:
                    assert not await worker.control.send(worker.server.key, heartbeat())
                    assert not await worker.bulk.send(worker.server.key, CHUNK, bytes(1000))
                    await moment()
                assert worker.bytes_up == 0
                assert control.poll(0) == bulk.poll(0) == 0

    run(main)
    assert reasons(place)[0] == (
        "what answers at that address does not hold the pinned server key; "
        f"that key is {place.public('server').decode()}, ours is {place.public('a-0').decode()}; nothing was sent. "
        "Trying again until stopped"
    )


def test_an_address_where_nobody_listens_is_told_as_such(place: Place) -> None:
    async def main() -> None:
        async with place.worker("a-0"):
            while not reasons(place):
                await moment()

    run(main)
    assert reasons(place)[0] == (
        "nobody answers at that address; is the server running, and is this its address? Trying again until stopped"
    )


def test_a_server_that_accepts_and_says_nothing_is_told_as_silence(place: Place) -> None:
    async def main() -> None:
        async with place.server(), place.worker("a-0"):
            while not reasons(place):
                await moment()

    run(main)
    assert reasons(place)[0] == "connected, and not a word. Trying again until stopped"


# --- roles ---


@pytest.mark.parametrize(
    ("role", "message"),
    [
        ("admin", heartbeat()), ("admin", HELLO), ("standby", HELLO), ("standby", PUSH), ("admin", PUSH),
        ("admin", WANT), ("worker", BEAT), ("worker", WELCOME), ("worker", StatusReport()), ("standby", BEAT),
        ("worker", FOLLOW), ("worker", Confirm(term=9, lsn=9)), ("worker", Fence(term=9)),
        ("worker", Redirect(server="a-0", term=9)), ("admin", Fence(term=9)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
@pytest.mark.parametrize("lane", ["control", "bulk"])
def test_what_is_not_for_its_role_to_say_is_refused(place: Place, role: Any, message: Message, lane: str) -> None:
    place.allowed.admit(place.public("stranger"), role=role, site="a", worker="other")

    async def main() -> None:
        async with serving(place) as (server, heard), place.worker("stranger") as peer:
            while not server.gate.refusals:
                await getattr(peer, lane).send(peer.server.key, message)
                await moment()
            assert heard == []

    run(main)
    refused = place.notes.of("refused message")[0]
    assert (refused["worker"], refused["reason"]) == ("other", f"{type(message).__name__} is not for a {role} to say")


def test_no_key_at_all_may_say_what_only_a_server_says() -> None:
    said = {kind for kinds in SAID_BY.values() for kind in kinds}
    assert said < set(MESSAGE_TYPES)
    assert not {Welcome, *ANSWERS} & said
    assert all({StatusRequest, SettingsRequest} <= set(kinds) for kinds in SAID_BY.values())


def test_only_a_node_speaks_of_terms() -> None:
    of_terms = {Follow, Confirm, Fence, Redirect}
    assert {role for role, kinds in SAID_BY.items() if of_terms & set(kinds)} == {"standby"}


def test_a_role_counts_from_the_next_message_on(place: Place) -> None:
    async def main() -> None:
        async with serving(place) as (server, heard), place.worker("a-0") as worker:
            await insist(worker, worker.control, heartbeat())
            place.allowed.admit(place.public("a-0"), role="admin", site="a", worker="a-0")
            before = len(heard)
            while not server.gate.refusals:
                await worker.control.send(worker.server.key, heartbeat(2))
                await moment()
            assert len(heard) == before

    run(main)


def test_looking_on_with_a_worker_s_key_takes_nothing_away_from_the_worker(place: Place) -> None:
    async def main() -> None:
        async with place.server() as server, place.worker("a-0") as worker, place.worker("a-0") as onlooker:
            key = (await reach(worker, server)).peer.key
            for question, answer in ((StatusRequest(), StatusReport()), (SettingsRequest(), SettingsReport())):
                while not await onlooker.control.send(onlooker.server.key, question):
                    await moment()
                assert (await server.control.receive()).message == question
                assert await server.control.send(key, answer, b"{}")
                assert (await onlooker.control.receive()).message == answer
                assert await server.control.send(key, BEAT)
                assert (await worker.control.receive()).message == BEAT

    run(main)


# --- whose word it is ---


def test_a_worker_that_takes_another_s_name_for_its_connection_is_still_itself(place: Place) -> None:
    async def main() -> None:
        with zmq.Context() as context, closing(context.socket(zmq.DEALER)) as raw:
            raw.setsockopt(zmq.LINGER, 0)
            raw.setsockopt(zmq.ROUTING_ID, place.public("a-1"))
            raw.setsockopt(zmq.CURVE_SERVERKEY, place.public("server"))
            raw.setsockopt(zmq.CURVE_PUBLICKEY, place.public("a-0"))
            raw.setsockopt(zmq.CURVE_SECRETKEY, load_secret(place.keys / "a-0.secret"))
            async with place.server() as server:
                raw.connect(place.control)
                raw.send(framed(heartbeat()))
                assert (await server.control.receive()).peer.worker == "a-0"
                assert not await server.control.send(place.public("a-1"), BEAT)

    run(main)


def test_nobody_can_use_a_public_key_without_its_secret(place: Place) -> None:
    """A public key is no secret: the operator's list has it, and every line that was printed."""

    async def main() -> None:
        with zmq.Context() as context, closing(context.socket(zmq.DEALER)) as raw:
            raw.setsockopt(zmq.LINGER, 0)
            raw.setsockopt(zmq.CURVE_SERVERKEY, place.public("server"))
            raw.setsockopt(zmq.CURVE_PUBLICKEY, place.public("a-0"))
            raw.setsockopt(zmq.CURVE_SECRETKEY, load_secret(place.keys / "stranger.secret"))
            async with serving(place) as (_, heard), place.worker("a-1") as worker:
                raw.connect(place.control)
                for _ in range(10):
                    with suppress(zmq.Again):
                        raw.send(framed(heartbeat(666)), zmq.DONTWAIT)
                    await insist(worker, worker.control, heartbeat(1))
                assert {incoming.peer.worker for incoming in heard} == {"a-1"}

    run(main)


# --- new keys ---


def test_a_running_worker_comes_back_with_its_new_key_when_the_old_one_is_refused(place: Place) -> None:
    async def main() -> None:
        # Long enough that only the refusal ends the connection.
        async with serving(place) as (_, heard), place.worker("a-0", silence_seconds=3.0) as worker:
            await insist(worker, worker.control, heartbeat(1))
            old = public_of(place.keys / "a-0")
            new = replace_keypair(place.keys / "a-0")
            await insist(worker, worker.control, heartbeat(2))  # the connection that there is goes on
            assert heard[-1].peer.key == old
            place.allowed.revoke(old)
            place.allowed.admit(new, role="worker", site="a", worker="a-0")
            while heard[-1].message != heartbeat(3):
                await worker.control.send(worker.server.key, heartbeat(3))
                with trio.move_on_after(0.1):
                    await worker.control.receive()
            assert (heard[-1].peer.key, heard[-1].peer.worker) == (new, "a-0")

    run(main, 60)


def test_a_new_server_key_shuts_out_those_who_pinned_the_old_one_until_they_pin_it(place: Place) -> None:
    async def main() -> None:
        old = place.public("server")
        replace_keypair(place.keys / "server")
        async with serving(place), place.worker("a-0", server_key=old) as left_behind:
            while not reasons(place):
                await left_behind.control.send(old, heartbeat())
                await moment()
            async with place.worker("a-1") as worker:
                await insist(worker, worker.control, heartbeat())

    run(main, 60)
    assert reasons(place)[0].startswith("what answers at that address does not hold the pinned server key")
