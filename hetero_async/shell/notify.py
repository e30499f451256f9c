"""Tells systemd that a service has begun, and from then on that its event loop goes round (sd_notify(3))."""

import contextlib
import os
import socket
from collections.abc import Mapping

import trio

MICROSECONDS = 1e6


async def keep_notified(environment: Mapping[str, str] = os.environ) -> None:
    """Until cancelled. Returns at once where nobody asked to be told: not under systemd, or no watchdog is set."""
    address = _address(environment)
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        _tell(told, address, b"READY=1")
        period_seconds = _watchdog_seconds(environment) / 2
        while period_seconds:
            _tell(told, address, b"WATCHDOG=1")
            await trio.sleep(period_seconds)


def _address(environment: Mapping[str, str]) -> str:
    """The socket's address; a leading @ stands for Linux's abstract names."""
    address = environment.get("NOTIFY_SOCKET", "")
    return "\0" + address[1:] if address.startswith("@") else address


def _watchdog_seconds(environment: Mapping[str, str]) -> float:
    """0: nobody watches. The variable is inherited by processes that it is not meant for."""
    is_meant = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    given = environment.get("WATCHDOG_USEC", "")
    return int(given) / MICROSECONDS if is_meant and given.isdigit() else 0.0


def _tell(told: socket.socket, address: str, word: bytes) -> None:
    with contextlib.suppress(OSError):  # systemd itself is being restarted; the next word may reach it
        told.sendto(word, address)
