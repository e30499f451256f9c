"""What systemd is told, by a socket that stands for its own."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from hetero_async.shell.notify import keep_notified

PATIENCE_SECONDS = 10.0


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(PATIENCE_SECONDS)
        yield listening


def told(systemd: socket.socket, words: int, **environment: str) -> list[bytes]:
    """The first words, with the watchdog's period of 10 ms if one is set."""

    async def listen() -> list[bytes]:
        heard: list[bytes] = []
        with trio.fail_after(PATIENCE_SECONDS):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(keep_notified, {"NOTIFY_SOCKET": systemd.getsockname(), **environment})
                while len(heard) < words:
                    heard.append(await trio.to_thread.run_sync(systemd.recv, 64))
                nursery.cancel_scope.cancel()
        return heard

    return trio.run(listen)


def test_that_it_is_ready_and_from_then_on_that_it_lives(systemd: socket.socket) -> None:
    heard = told(systemd, 4, WATCHDOG_USEC="10000", WATCHDOG_PID=str(os.getpid()))
    assert heard == [b"READY=1", b"WATCHDOG=1", b"WATCHDOG=1", b"WATCHDOG=1"]


@pytest.mark.parametrize("watchdog", [{}, {"WATCHDOG_USEC": "10000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}])
def test_without_a_watchdog_of_its_own_it_is_ready_and_no_more(
    systemd: socket.socket, watchdog: dict[str, str]
) -> None:
    assert told(systemd, 1, **watchdog) == [b"READY=1"]

    async def ends() -> None:
        with trio.fail_after(PATIENCE_SECONDS):
            await keep_notified({"NOTIFY_SOCKET": systemd.getsockname(), **watchdog})

    trio.run(ends)


def test_an_abstract_name_is_understood() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0hetero-async-{os.getpid()}")
        listening.settimeout(PATIENCE_SECONDS)
        trio.run(keep_notified, {"NOTIFY_SOCKET": f"@hetero-async-{os.getpid()}"})
        assert listening.recv(64) == b"READY=1"


def test_outside_of_systemd_and_when_it_is_away_nothing_happens(tmp_path: Path) -> None:
    trio.run(keep_notified, {})
    trio.run(keep_notified, {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
