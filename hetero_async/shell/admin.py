"""What a run's operator may ask of the running server, over a UNIX socket in the run's directory.

assembly.py serves it, `status` asks over it. Who may open its directory (mode 0700) is an operator; over the network
nobody is. One question a connection, one line of JSON each way: {"verb": …, its arguments}, and {"answer": …} or
{"error": "one line"}. A new verb is a function in the mapping that `serve_admin` is given.
"""

import contextlib
import inspect
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import trio

from hetero_async.errors import ConfigError, HeteroAsyncError, UserError

SOCKET = "socket"
QUESTION_BYTES_MAX = 64 * 1024
ANSWER_BYTES_MAX = 16 * 1024 * 1024
RECEIVE_BYTES = 64 * 1024
# More than one operator has; those beyond it wait in the kernel for the others, whose time is bounded.
ASKERS_MAX = 16
QUESTION_SECONDS = 5.0

Verb = Callable[..., object]


class NotServing(HeteroAsyncError):
    """No server runs on that directory now, or none that answers."""


async def serve_admin(listener: trio.socket.SocketType, verbs: Mapping[str, Verb]) -> None:
    """Answer whoever connects, until cancelled.

    A verb is called with the question's arguments and returns something JSON-able, or will; a HeteroAsyncError of it is
    told to the asker.
    """
    room = trio.Semaphore(ASKERS_MAX)
    async with trio.open_nursery() as nursery:
        while True:
            await room.acquire()
            connection, _ = await listener.accept()
            nursery.start_soon(_answer, room, verbs, trio.SocketStream(connection))


async def ask(directory: Path, verb: str, patience_seconds: float = 0.0, **arguments: object) -> Any:
    """The running server's answer. Raises NotServing, and UserError for what it will not do, or not for us.

    `patience_seconds`: for what takes its time; 0: what any question may take.
    """
    patience_seconds = patience_seconds or QUESTION_SECONDS
    try:
        with trio.fail_after(patience_seconds), _short(directory) as path:
            async with await trio.open_unix_socket(path) as stream:
                await stream.send_all(json.dumps({"verb": verb, **arguments}).encode() + b"\n")
                told = json.loads(await _line(stream, ANSWER_BYTES_MAX))
    except (FileNotFoundError, ConnectionRefusedError, trio.BrokenResourceError):
        raise NotServing(f"no server is running on {directory.parent}") from None
    except PermissionError:
        raise UserError(f"{directory}: only the user that the server runs as may ask it") from None
    except trio.TooSlowError:
        raise NotServing(f"no answer at {directory / SOCKET} in {patience_seconds:g} s") from None
    if "error" in told:
        raise UserError(told["error"])
    return told["answer"]


async def _answer(room: trio.Semaphore, verbs: Mapping[str, Verb], stream: trio.SocketStream) -> None:
    try:
        async with stream:
            with trio.fail_after(QUESTION_SECONDS):
                question = await _line(stream, QUESTION_BYTES_MAX)
            told = await _told(verbs, question)  # which takes its own time
            with trio.fail_after(QUESTION_SECONDS):
                await stream.send_all(json.dumps(told).encode() + b"\n")
    except (trio.BrokenResourceError, trio.TooSlowError):
        return  # the asker has gone, or asks nothing
    finally:
        room.release()


async def _told(verbs: Mapping[str, Verb], line: bytes) -> dict[str, object]:
    try:
        question = json.loads(line)
    except (ValueError, RecursionError):
        question = None
    if not isinstance(question, dict) or not isinstance(verb := question.pop("verb", None), str):
        return {"error": "a question is one line of JSON, an object with a verb"}
    if verb not in verbs:
        return {"error": f"this server knows no verb {verb!r}; it has: {', '.join(verbs)}"}
    try:
        inspect.signature(verbs[verb]).bind(**question)
    except TypeError as error:
        return {"error": f"{verb}: {error}"}
    try:
        answer = verbs[verb](**question)
        return {"answer": await answer if inspect.isawaitable(answer) else answer}
    except HeteroAsyncError as error:
        return {"error": str(error)}


async def _line(stream: trio.SocketStream, most: int) -> bytes:
    """Up to the newline. Raises BrokenResourceError for a line without an end, or too long a one."""
    received = bytearray()
    while not received.endswith(b"\n"):
        some = await stream.receive_some(RECEIVE_BYTES)
        if not some or len(received) + len(some) > most:
            raise trio.BrokenResourceError
        received += some
    return bytes(received)


# --- the socket ---


@contextlib.contextmanager
def open_admin(directory: Path) -> Iterator[trio.socket.SocketType]:
    """Listen in that directory, which is made private. Raises ConfigError when that cannot be.

    What an earlier server left there is taken over: only one at a time may be given the same directory.
    """
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)) as raw:
        try:
            directory.mkdir(mode=0o700, exist_ok=True)
            directory.chmod(0o700)  # before there is anything in it
            (directory / SOCKET).unlink(missing_ok=True)
            with _short(directory) as path:
                raw.bind(path)
            (directory / SOCKET).chmod(0o600)
            raw.listen(ASKERS_MAX)
        except OSError as error:
            raise ConfigError(f"{directory}: the operator's socket cannot be made: {error.strerror}") from None
        try:
            yield trio.socket.from_stdlib_socket(raw)
        finally:
            (directory / SOCKET).unlink(missing_ok=True)


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """A name for the socket that fits: the kernel takes 107 bytes, and runs lie deeper than that."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{SOCKET}"
    finally:
        os.close(descriptor)
