"""The quarantine's file: it outlives the server, and a bad one is told of."""

from pathlib import Path

import pytest
import trio
import zmq
from shell.place import Notes

from hetero_async.errors import ConfigError
from hetero_async.ports import Peer
from hetero_async.quarantine import STRIKES_MAX
from hetero_async.shell.quarantine import load_quarantine, open_quarantine


def strike(path: Path, notes: Notes) -> bytes:
    key: bytes = zmq.curve_keypair()[0]

    async def main() -> None:
        quarantine = open_quarantine(path, notes)
        for _ in range(STRIKES_MAX):
            quarantine.strike(Peer(key=key, role="worker", site="a", worker="a-0"), "garbage")

    trio.run(main)
    return key


def test_a_restarted_server_lets_nobody_out_and_the_operator_does(tmp_path: Path) -> None:
    path, notes = tmp_path / "quarantine.json", Notes()
    assert load_quarantine(path) == {}
    first, second = strike(path, notes), strike(path, notes)
    assert list(load_quarantine(path)) == [first, second]
    quarantine = open_quarantine(path, notes)
    assert "garbage" in quarantine.refusal(first)
    assert quarantine.lift(first)
    assert list(load_quarantine(path)) == [second]


def test_without_room_for_the_file_it_holds_all_the_same(tmp_path: Path) -> None:
    path, notes = tmp_path / "no such directory" / "quarantine.json", Notes()
    strike(path, notes)
    [told] = notes.of("quarantine not written")
    assert str(told["reason"]).endswith("it holds until the server's end")
    assert notes.of("quarantined")


@pytest.mark.parametrize(
    "content", ["", "[]", '{"short": {"worker": "a", "reason": ""}}', "\xff", '{"a": 1', "9" * 9999]
)
def test_a_file_that_cannot_be_used_is_told_with_what_to_do(tmp_path: Path, content: str) -> None:
    path = tmp_path / "quarantine.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_quarantine(path)
    assert str(caught.value).startswith(f"{path}: cannot be used: ")
    assert str(caught.value).endswith("; remove it to let everybody out")
    assert "\n" not in str(caught.value)
