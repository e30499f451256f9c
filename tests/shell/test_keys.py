"""Key files and the list of who is let in: what is written, what is refused, and when a change acts."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st
from zmq.utils import z85

from hetero_async.errors import ConfigError
from hetero_async.ports import Peer
from hetero_async.shell.keys import (
    AllowList,
    create_keypair,
    is_key,
    load_public,
    load_secret,
    public_of,
    replace_keypair,
    save_public,
)

# The same in every process, since tests are named after what they are given.
SECRETS = tuple(z85.encode(bytes([number]) * 32) for number in (1, 2))
KEY, OTHER = map(zmq.curve_public, SECRETS)
ENTRY = {"role": "worker", "site": "amsterdam", "worker": "amsterdam-0"}


def test_a_new_pair_is_two_files_that_belong_together(tmp_path: Path) -> None:
    public = create_keypair(tmp_path / "amsterdam-0")
    assert load_public(tmp_path / "amsterdam-0.public") == public
    assert zmq.curve_public(load_secret(tmp_path / "amsterdam-0.secret")) == public


def test_a_name_with_a_dot_stays_whole(tmp_path: Path) -> None:
    create_keypair(tmp_path / "node.1")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["node.1.public", "node.1.secret"]


def test_nobody_else_can_read_a_new_secret_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        create_keypair(tmp_path / "server")
    finally:
        os.umask(before)
    assert (tmp_path / "server.secret").stat().st_mode & 0o777 == 0o600


def test_no_public_key_can_be_taken_for_an_option(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = zmq.curve_keypair()
    drawn = iter([(b"-" + good[0][1:], good[1]), (b"--" + good[0][2:], good[1]), (b"0" * 40, good[1])])
    monkeypatch.setattr(zmq, "curve_keypair", lambda: next(drawn))
    assert create_keypair(tmp_path / "a-0") == b"0" * 40


def test_a_pair_that_is_replaced_leaves_no_old_half(tmp_path: Path) -> None:
    old = create_keypair(tmp_path / "server")
    new = replace_keypair(tmp_path / "server")
    assert new != old
    assert public_of(tmp_path / "server") == load_public(tmp_path / "server.public") == new
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server.public", "server.secret"]


def test_where_no_file_can_be_written_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path}/none: keys cannot be kept here: No such file or directory"):
        create_keypair(tmp_path / "none" / "server")
    (tmp_path / "server.public.new").mkdir()
    with pytest.raises(ConfigError, match=f"{tmp_path}/server.public: cannot be written: Is a directory"):
        save_public(tmp_path / "server", KEY)


def test_a_secret_is_never_overwritten(tmp_path: Path) -> None:
    create_keypair(tmp_path / "server")
    secret = load_secret(tmp_path / "server.secret")
    with pytest.raises(ConfigError, match=r"server\.secret: there is one already"):
        create_keypair(tmp_path / "server")
    assert load_secret(tmp_path / "server.secret") == secret


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660])
def test_a_secret_that_others_can_read_is_refused_with_the_cure(tmp_path: Path, mode: int) -> None:
    create_keypair(tmp_path / "server")
    path = tmp_path / "server.secret"
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"do: chmod 600 {path}"):
        load_secret(path)
    path.chmod(0o600)
    load_secret(path)


GOOD = SECRETS[0]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is not a key file"),
        (GOOD, "is not a key file"),
        (b"curve-secret " + GOOD[:-1], "is not a key file"),
        (b"curve-secret " + GOOD + b"0", "is not a key file"),
        (b"curve-secret " + GOOD[:-1] + b"~", "is not a key file"),
        (b"curve-secret " + b"#" * 40, "is not a key file"),  # five # are more than 32 bits
        (b"curve-secret " + GOOD + b" comment", "is not a key file"),
        (b"curve-public " + GOOD, "this is a curve-public key, and a curve-secret key is needed here"),
        (b"\xff" * 10_000, "is not a key file"),
    ],
)
def test_a_file_that_holds_no_secret_key_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "server.secret"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_secret(path)
    assert str(path) in str(caught.value)
    assert GOOD.decode() not in str(caught.value)


def test_a_missing_key_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"server\.secret: there is no such key file"):
        load_secret(tmp_path / "server.secret")


def test_a_directory_is_not_a_key_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a file"):
        load_secret(tmp_path)


@given(st.binary(min_size=32, max_size=32))
def test_32_bytes_in_z85_are_a_key(raw: bytes) -> None:
    assert is_key(z85.encode(raw))


@given(st.binary(max_size=60))
def test_what_is_taken_for_a_key_is_the_one_way_to_write_its_bytes(text: bytes) -> None:
    assert not is_key(text) or z85.encode(z85.decode(text)) == text


# --- who is let in ---


def listed(tmp_path: Path, content: Any) -> AllowList:
    path = tmp_path / "allowed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return AllowList(path)


def test_an_admitted_key_is_found_with_role_site_and_worker(tmp_path: Path) -> None:
    allowed = AllowList(tmp_path / "allowed.json")
    allowed.admit(KEY, role="worker", site="amsterdam", worker="amsterdam-0")
    allowed.admit(OTHER, role="admin", site="amsterdam", worker="operator")
    assert allowed.lookup(KEY) == Peer(key=KEY, role="worker", site="amsterdam", worker="amsterdam-0")
    assert allowed.lookup(OTHER) == Peer(key=OTHER, role="admin", site="amsterdam", worker="operator")
    assert allowed.lookup(zmq.curve_keypair()[0]) is None


def test_a_change_by_another_process_acts_at_the_next_lookup(tmp_path: Path) -> None:
    serving = listed(tmp_path, {})
    serving.load()
    operator = AllowList(serving.path)
    assert serving.lookup(KEY) is None
    operator.admit(KEY, role="worker", site="amsterdam", worker="amsterdam-0")
    assert serving.lookup(KEY) is not None
    operator.revoke(KEY)
    assert serving.lookup(KEY) is None


def test_all_who_are_let_in_are_those_of_the_file_as_it_is_now(tmp_path: Path) -> None:
    allowed, operator = AllowList(tmp_path / "allowed.json"), AllowList(tmp_path / "allowed.json")
    operator.admit(KEY, role="standby", site="shanghai", worker="b")
    assert allowed.peers() == [Peer(key=KEY, role="standby", site="shanghai", worker="b")]
    operator.revoke(KEY)
    assert allowed.peers() == []


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "is not valid JSON"),
        ("[]", "the file: .*dictionary"),
        ({"short": ENTRY}, "short: .*40 characters of Z85"),
        ({KEY.decode(): {}}, f"{KEY.decode()} → role: Field required"),
        ({KEY.decode(): {**ENTRY, "role": "root"}}, f"{KEY.decode()} → role: .*'worker', 'standby' or 'admin'"),
        ({KEY.decode(): {**ENTRY, "site": 7}}, f"{KEY.decode()} → site: .*string"),
        ({KEY.decode(): {**ENTRY, "worker": ""}}, f"{KEY.decode()} → worker: .*at least 1"),
        ({KEY.decode(): {**ENTRY, "more": 1}}, f"{KEY.decode()} → more: "),
        (f'{{"{KEY.decode()}": {json.dumps(ENTRY)}, "{KEY.decode()}": {json.dumps(ENTRY)}}}', "same key twice"),
    ],
)
def test_a_bad_list_is_refused_with_file_and_entry(tmp_path: Path, content: Any, complaint: str) -> None:
    allowed = listed(tmp_path, content)
    with pytest.raises(ConfigError) as caught:
        allowed.load()
    told = str(caught.value)
    assert told.startswith(f"{allowed.path}: ")
    assert "\n" not in told
    for part in complaint.split(".*"):
        assert part in told


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"allowed\.json: there is no such file"):
        AllowList(tmp_path / "allowed.json").load()


@pytest.mark.parametrize("damage", ["{", None])
def test_a_list_damaged_while_serving_leaves_the_last_good_one_in_force_and_says_so(
    tmp_path: Path, damage: str | None
) -> None:
    allowed = listed(tmp_path, {KEY.decode(): ENTRY})
    allowed.load()
    allowed.path.write_text(damage) if damage else allowed.path.unlink()
    assert allowed.lookup(KEY) is not None
    assert "allowed.json: " in allowed.problem
    allowed.path.write_text("{}")
    assert allowed.lookup(KEY) is None
    assert allowed.problem == ""
