"""Whoever can reach the ports and has no key: thrown out in time, told of now and then, and nobody else is disturbed.

Rows 56, 57, 58 of the fault catalogue (README.md beside this file).
"""

from pathlib import Path

import pytest
import trio
from hostile.attacks import (
    FROM_OUTSIDE,
    HALF_HELLO,
    IDLE_CONNECTIONS,
    OPENINGS,
    crowd,
    is_closed,
    target_of,
    under,
)
from shell.place import BEAT, Place, heartbeat, insist, moment, prepared, run, serving

from hetero_async.shell.link import ServerLink
from hetero_async.shell.telemetry import SUM_EVERY_SECONDS, SUMMED
from hetero_async.shell.wire import HANDSHAKE_MS

PATIENCE_SECONDS = 60.0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return prepared(tmp_path)


@pytest.mark.parametrize("opening", OPENINGS.values(), ids=OPENINGS)
def test_56_what_is_no_handshake_is_closed_and_a_worker_is_served_beside_it(place: Place, opening: bytes) -> None:
    async def main() -> None:
        async with serving(place) as (_, heard), place.worker("a-0") as worker:
            with crowd(target_of(place).control, 3, opening) as connections:
                assert len(connections) == 3
                await insist(worker, worker.control, heartbeat())
                while not all(map(is_closed, connections)):
                    assert (await insist(worker, worker.control, heartbeat())).message == BEAT
            assert {incoming.peer.worker for incoming in heard} == {"a-0"}

    run(main, PATIENCE_SECONDS)


@pytest.mark.parametrize("opening", [b"", HALF_HELLO], ids=["silent", "half a handshake"])
def test_57_500_connections_that_do_not_go_on_are_reaped_and_a_worker_gets_in_meanwhile(
    place: Place, opening: bytes
) -> None:
    async def main() -> None:
        async with serving(place) as (server, heard):
            with crowd(target_of(place).control, IDLE_CONNECTIONS, opening) as connections:
                assert len(connections) == IDLE_CONNECTIONS
                async with place.worker("a-0", silence_seconds=10) as worker:
                    assert (await insist(worker, worker.control, heartbeat())).message == BEAT
                    began = trio.current_time()
                    while not all(map(is_closed, connections)):
                        assert (await insist(worker, worker.control, heartbeat())).message == BEAT
                assert trio.current_time() - began < 5 * HANDSHAKE_MS / 1000
            while server.gate.strangers < IDLE_CONNECTIONS:
                await moment()
            assert {incoming.peer.worker for incoming in heard} == {"a-0"}
            told = place.notes.of("strangers")
            assert len(told) == 1, "at most once a minute"

    run(main, PATIENCE_SECONDS)


@pytest.mark.parametrize("kind", FROM_OUTSIDE)
def test_56_57_58_under_any_attack_from_outside_workers_are_answered_and_the_log_stays_short(
    place: Place, kind: str
) -> None:
    async def main() -> None:
        async with serving(place) as (server, heard), place.worker("a-0", silence_seconds=10) as worker:
            await insist(worker, worker.control, heartbeat())
            attack = FROM_OUTSIDE[kind]
            with under(attack, target_of(place)):
                await _until_noticed(place, server, worker)
            assert {incoming.peer.worker for incoming in heard} == {"a-0"}
            assert worker.generation == 1, "its connection was never lost"
            lines_max = 1 + PATIENCE_SECONDS / SUM_EVERY_SECONDS
            assert len(_told(place)) <= lines_max, "the first at once, and then one line a minute"

    run(main, PATIENCE_SECONDS)


def _told(place: Place) -> list[str]:
    return [name for name, _ in place.notes.events if SUMMED.get(name, name) == "more strangers"]


async def _until_noticed(place: Place, server: ServerLink, worker: object) -> None:
    answered = 0
    while answered < 20 or server.gate.strangers + server.gate.refusals < 20 or not _told(place):
        answer = await insist(worker, worker.control, heartbeat())  # type: ignore[arg-type, attr-defined]
        answered += answer.message == BEAT
