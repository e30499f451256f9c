"""How a standby's host gets in: what it is told, what stays its own, and that it has the server's list of keys."""

from pathlib import Path
from typing import Any

import pytest
from shell.place import Notes
from test_enrolment import ADDRESS, KEY, told

from hetero_async import roster
from hetero_async.assembly import _adopt_list
from hetero_async.config import RunConfig
from hetero_async.enrolment import Enrolment, ServerAddress, prepare
from hetero_async.errors import HeteroAsyncError
from hetero_async.shell.keys import AllowList, load_public
from hetero_async.standby_enrolment import write_standby


def standby(tmp_path: Path) -> Enrolment:
    server = ServerAddress(ADDRESS, KEY)
    return Enrolment(server=server, site="b", workers=1, directory=tmp_path / "b", is_standby=True)


def told_to_b(tmp_path: Path, **server: object) -> dict[str, Any]:
    sites = told(tmp_path, durability="replicated", keep_log=True, **server)
    entries = {KEY.decode(): {"role": "standby", "site": "home", "worker": "server"}}
    return sites | RunConfig.load(tmp_path / "server.toml").told_to_standbys() | {"allowed": entries}


def test_a_standby_s_host_has_all_of_the_server_s_settings_its_own_key_and_the_list(tmp_path: Path) -> None:
    [own], is_new = prepare(standby(tmp_path))
    write_standby(standby(tmp_path), told_to_b(tmp_path, archive="s3://bucket/prefix"))
    config, server = RunConfig.load(standby(tmp_path).run_toml), RunConfig.load(tmp_path / "server.toml")
    assert (config.settings(), config.durability(), config.workers()) == (server.settings(), server.durability(), [])
    assert (config.server.keep_log, config.server.archive) == (True, "s3://bucket/prefix")
    assert config.node("b").directory == tmp_path / "b" / "standby-b"
    assert (is_new, load_public(config.keys / "b.public")) == (True, own), "not the key that the server knew before"
    assert [peer.worker for peer in roster.listed(config)] == ["server"]


def test_an_archive_in_a_directory_of_the_server_s_host_is_not_the_standby_s(tmp_path: Path) -> None:
    prepare(standby(tmp_path))
    write_standby(standby(tmp_path), told_to_b(tmp_path, archive="/srv/archive"))
    assert RunConfig.load(standby(tmp_path).run_toml).server.archive == ""


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"standbys": {}}, r"--name b: the run\.toml at tcp://192\.0\.2\.7:7710 has no \[standbys\.b\]"),
        ({"allowed": {"x": {}}}, r"allowed\.json: cannot become what was received"),
    ],
)
def test_what_makes_no_standby_is_said(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    prepare(standby(tmp_path))
    received = told_to_b(tmp_path) | change
    if not received["standbys"]:
        received["server"]["durability"] = "local"
    with pytest.raises(HeteroAsyncError, match=complaint):
        write_standby(standby(tmp_path), received)


@pytest.mark.parametrize(
    ("report", "let_in", "said"),
    [
        ('{"allowed": {}}', [], "keys changed"),
        ("{}", ["server"], ""),  # an older server's
        ("[", ["server"], "allow-list unusable"),
        ('{"allowed": {"x": {}}}', ["server"], "allow-list unusable"),
        ('{"allowed": 3}', ["server"], "allow-list unusable"),
    ],
)
def test_the_server_s_list_is_taken_over_when_it_is_one(
    tmp_path: Path, report: str, let_in: list[str], said: str
) -> None:
    prepare(standby(tmp_path))
    write_standby(standby(tmp_path), told_to_b(tmp_path))
    allowed, notes = AllowList(tmp_path / "b/keys/allowed.json"), Notes()
    _adopt_list(allowed, notes, report.encode())
    assert [peer.worker for peer in allowed.peers()] == let_in
    assert [name for name in ("keys changed", "allow-list unusable") if notes.of(name)] == ([said] if said else [])
