"""Members whose key is let in and who do harm, and the honest troubles of two processes with one key.

Rows 55, 62, 63, 67 of the fault catalogue (README.md beside this file).
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from e2e.harness import Run, Silent
from e2e.test_cli import forked
from hostile.attacks import FROM_WITHIN, crowd_of_dealers, framed, target_of, under
from hostile.test_memory import target_of as member_of
from shell.place import BEAT, Place, heartbeat, insist, moment, prepared, run, serving

from hetero_async.asking import endpoints
from hetero_async.core.messages import Hello, Refused
from hetero_async.ports import Incoming
from hetero_async.quarantine import STRIKES_MAX
from hetero_async.shell.dial import DialLink, open_dial_link
from hetero_async.shell.link import SOFTWARE

PATIENCE_SECONDS = 60.0
HELLO = Hello(
    run="tiny", software=SOFTWARE, schema_hash=b"", last_seq=0, claims=(), device="cpu", dtype="fp32", life=b"1"
)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return prepared(tmp_path)


@pytest.mark.parametrize("kind", FROM_WITHIN)
def test_55_under_any_attack_of_a_member_the_others_are_answered(place: Place, kind: str) -> None:
    async def main() -> None:
        async with serving(place) as (server, heard), place.worker("a-0", silence_seconds=10) as worker:
            await insist(worker, worker.control, heartbeat())
            with under(FROM_WITHIN[kind], target_of(place, "a-1")):
                answered = 0
                while answered < 50 or not _is_noticed(server.traffic, place):
                    answered += (await insist(worker, worker.control, heartbeat())).message == BEAT
                    await trio.sleep(0.02)  # an honest worker keeps within its quota
            assert worker.generation == 1, "its connection was never lost"
            assert not server.quarantine.refusal(place.public("a-0"))
            told = [fields["worker"] for fields in place.notes.of("refused message")]
            assert told in ([], ["a-1"]), "a key is told of once a minute"
            assert {incoming.peer.worker for incoming in heard} <= {"a-0", "a-1"}

    run(main, PATIENCE_SECONDS)


def _is_noticed(traffic: dict[bytes, object], place: Place) -> bool:
    return place.public("a-1") in traffic


def test_55_messages_of_too_many_parts_shut_their_sender_out(place: Place) -> None:
    async def main() -> None:
        async with serving(place) as (server, _):
            with crowd_of_dealers(target_of(place, "a-1"), 1) as (control, _bulk):
                for _ in range(STRIKES_MAX):
                    control.send_multipart([framed(heartbeat())] * 50)
                while not (refusal := server.quarantine.refusal(place.public("a-1"))):
                    await moment()
                assert "at last: a message of 50 frames, there must be 1 or 2" in refusal

    run(main)


def test_55_status_shows_who_is_in_quarantine_and_the_operator_lets_the_key_out(tmp_path: Path) -> None:
    with Run(tmp_path / "run", workers=1) as real:
        server, member = real.start_server(), member_of(real, "here-0")
        real.wait(lambda: " serving " in server.said, "it serves")
        with crowd_of_dealers(member, 1) as (control, _bulk):
            for _ in range(STRIKES_MAX):
                control.send_multipart([framed(heartbeat())] * 50)
            real.wait(lambda: real.status()["quarantine"], "it is shut out")
        status = "".join(forked(tmp_path, "status", "--run", real.config.path).output.split())
        assert "lockedouthere-0:10timesrefused,atlast:amessageof50frames,theremustbe1or2;" in status
        assert f"hetero-asynckeyslift'{member.public.decode()}'" in status
        assert trio.run(_said, real, HELLO).startswith("quarantined: 10 times refused")
        said = forked(tmp_path, "keys", "lift", member.public.decode(), "--run", real.config.path)
        assert (said.exit_code, said.output) == (0, "here-0 is heard again\n")
        assert real.status()["quarantine"] == []
        assert "quarantined" not in trio.run(_said, real, HELLO), "the next complaint is about its model"


def test_63_a_worker_is_heard_at_once_while_the_connection_of_its_last_life_still_stands(place: Place) -> None:
    """A frozen process, or a host without power: nobody has told the server that it is gone."""

    async def main() -> None:
        with crowd_of_dealers(target_of(place, "a-0"), 1) as (frozen, _bulk):
            async with place.server() as server:
                frozen.send(framed(heartbeat(1)))
                assert (await server.control.receive()).message == heartbeat(1)
                async with place.worker("a-0") as worker, trio.open_nursery() as nursery:
                    nursery.start_soon(_answer_once, server, heartbeat(2))
                    assert (await insist(worker, worker.control, heartbeat(2))).message == BEAT
                assert frozen.poll(0) == 0, "the answer went to the new life"

    run(main)


async def _answer_once(server: object, message: object) -> None:
    while (incoming := await server.control.receive()).message != message:  # type: ignore[attr-defined]
        pass
    await server.control.send(incoming.peer.key, BEAT)  # type: ignore[attr-defined]


# --- other software, at a real server ---


def test_67_a_worker_of_another_version_is_turned_away_with_both_versions(tmp_path: Path) -> None:
    with Run(tmp_path) as real:
        real.start_server()
        answers = [trio.run(_said, real, replace(HELLO, software=version)) for version in ("99.1.0", SOFTWARE)]
        assert answers[0] == f"this server runs hetero-async {SOFTWARE}, and you run 99.1.0: install the same"
        assert "hetero-async" not in answers[1], "the next complaint is about its model"


async def _said(real: Run, hello: Hello) -> str:
    with trio.fail_after(PATIENCE_SECONDS):
        async with open_dial_link(
            endpoints(real.config), secret_path=real.config.keys / "here-0.secret", observer=Silent()
        ) as link:
            answer = (await _until_refused(link, hello)).message
            assert isinstance(answer, Refused)
            return answer.reason


async def _until_refused(link: DialLink, hello: Hello) -> Incoming:
    while True:
        await link.control.send(link.server.key, hello, json.dumps({}).encode())
        with trio.move_on_after(0.5):
            return await link.control.receive()
