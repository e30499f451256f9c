"""The operator's socket: who gets in, what is answered, and what a bad question gets."""

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from shell.place import run

from hetero_async.errors import ConfigError, HeteroAsyncError, UserError
from hetero_async.shell import admin
from hetero_async.shell.admin import ASKERS_MAX, QUESTION_BYTES_MAX, NotServing, ask, open_admin, serve_admin

DONE: list[object] = []


def refuse() -> None:
    raise HeteroAsyncError("the run is finished")


VERBS: dict[str, Any] = {"status": lambda: {"version": 3}, "lift": lambda worker: DONE.append(worker), "refuse": refuse}


def served(directory: Path, asked: Any, seconds: float = 30) -> Any:
    """What `asked` returns while the verbs are served in that directory."""
    answers: list[Any] = []

    async def main() -> None:
        with open_admin(directory) as listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(serve_admin, listener, VERBS)
                answers.append(await asked())
                nursery.cancel_scope.cancel()

    run(main, seconds)
    return answers[0]


def test_a_question_is_answered(tmp_path: Path) -> None:
    assert served(tmp_path / "admin", lambda: ask(tmp_path / "admin", "status")) == {"version": 3}


def test_arguments_reach_the_verb(tmp_path: Path) -> None:
    served(tmp_path / "admin", lambda: ask(tmp_path / "admin", "lift", worker="a-1"))
    assert DONE.pop() == "a-1"


def test_what_the_verb_refuses_is_told_to_the_asker(tmp_path: Path) -> None:
    with failing(UserError, "the run is finished"):
        served(tmp_path / "admin", lambda: ask(tmp_path / "admin", "refuse"))


@contextmanager
def failing(kind: type[Exception], text: str) -> Iterator[None]:
    with pytest.RaisesGroup(pytest.RaisesExc(kind, match=text), flatten_subgroups=True):
        yield


def test_only_its_owner_can_open_the_socket_whatever_the_umask(tmp_path: Path) -> None:
    (tmp_path / "admin").mkdir(mode=0o777)
    (tmp_path / "admin").chmod(0o777)
    before = os.umask(0)
    try:
        with open_admin(tmp_path / "admin"):
            mode = (tmp_path / "admin" / admin.SOCKET).stat().st_mode
            assert stat.S_ISSOCK(mode) and mode & 0o777 == 0o600
            assert (tmp_path / "admin").stat().st_mode & 0o777 == 0o700
    finally:
        os.umask(before)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")
def test_another_user_is_told_that_he_may_not_ask(tmp_path: Path) -> None:
    for directory in (tmp_path, *tmp_path.parents[:-1]):
        directory.chmod(directory.stat().st_mode | 0o055)  # so that the socket's own directory is what stops him

    async def as_nobody() -> None:
        os.seteuid(65534)
        try:
            await ask(tmp_path / "admin", "status")
        finally:
            os.seteuid(0)

    with failing(UserError, "only the user that the server runs as may ask it"):
        served(tmp_path / "admin", as_nobody)


def test_a_run_may_lie_deeper_than_a_socket_s_name_may_be_long(tmp_path: Path) -> None:
    directory = tmp_path / ("deep" * 40) / "admin"
    directory.parent.mkdir()
    assert served(directory, lambda: ask(directory, "status")) == {"version": 3}


def test_without_a_server_the_directory_is_named(tmp_path: Path) -> None:
    async def main() -> None:
        with pytest.raises(NotServing, match=f"^no server is running on {tmp_path}$"):
            await ask(tmp_path / "admin", "status")

    run(main)


def test_a_socket_that_a_killed_server_left_is_nobody_and_is_taken_over(tmp_path: Path) -> None:
    async def main() -> None:
        with open_admin(tmp_path / "admin"):
            os.link(tmp_path / "admin" / admin.SOCKET, tmp_path / "kept")
        os.rename(tmp_path / "kept", tmp_path / "admin" / admin.SOCKET)
        with pytest.raises(NotServing):
            await ask(tmp_path / "admin", "status")

    run(main)
    assert served(tmp_path / "admin", lambda: ask(tmp_path / "admin", "status")) == {"version": 3}


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/none/admin: the operator's socket cannot be made: No such file"):
        with open_admin(tmp_path / "none" / "admin"):
            pass


NO_QUESTION = "a question is one line of JSON, an object with a verb"
BAD: list[tuple[bytes, str]] = [
    (b"\n", NO_QUESTION),
    (b"status\n", NO_QUESTION),
    (b"[]\n", NO_QUESTION),
    (b"{}\n", NO_QUESTION),
    (b'{"verb": []}\n', NO_QUESTION),
    (b"[" * 60_000 + b"\n", NO_QUESTION),
    (b"\xff\xfe\n", NO_QUESTION),
    (b'{"verb": "destroy"}\n', "this server knows no verb 'destroy'; it has: status, lift, refuse"),
    (b'{"verb": "lift"}\n', "lift: missing a required argument: 'worker'"),
    (b'{"verb": "status", "x": 1}\n', "status: got an unexpected keyword argument 'x'"),
]


@pytest.mark.parametrize(("line", "expected"), BAD, ids=range(len(BAD)))
def test_a_bad_question_is_answered_with_what_is_wrong_with_it(tmp_path: Path, line: bytes, expected: str) -> None:
    async def asked() -> dict[str, str]:
        async with await opened(tmp_path / "admin") as stream:
            await stream.send_all(line)
            told: dict[str, str] = json.loads(await stream.receive_some())
            return told

    assert served(tmp_path / "admin", asked) == {"error": expected}


async def opened(directory: Path) -> trio.SocketStream:
    with admin._short(directory) as path:
        return await trio.open_unix_socket(path)


def test_a_question_without_an_end_is_hung_up_on(tmp_path: Path) -> None:
    async def asked() -> bytes:
        async with await opened(tmp_path / "admin") as stream:
            try:
                await stream.send_all(b"x" * (QUESTION_BYTES_MAX + 1))
                return bytes(await stream.receive_some())
            except trio.BrokenResourceError:
                return b""

    assert served(tmp_path / "admin", asked) == b""


def test_those_who_connect_and_say_nothing_stop_nobody_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin, "QUESTION_SECONDS", 0.5)

    async def asked() -> Any:
        silent = [await opened(tmp_path / "admin") for _ in range(ASKERS_MAX)]
        monkeypatch.setattr(admin, "QUESTION_SECONDS", 20.0)
        answer = await ask(tmp_path / "admin", "status")
        for stream in silent:
            await stream.aclose()
        return answer

    assert served(tmp_path / "admin", asked) == {"version": 3}


def test_a_server_that_does_not_answer_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "QUESTION_SECONDS", 0.3)

    async def main() -> None:
        with open_admin(tmp_path / "admin"):
            with pytest.raises(NotServing, match=f"no answer at {tmp_path}/admin/socket in 0.3 s"):
                await ask(tmp_path / "admin", "status")

    run(main)
