"""The operator's verbs about keys: who is let in by which line, who is shut out, what a new key asks of each side."""

import json
import os
import re
import threading
from pathlib import Path

import pytest
import zmq

from hetero_async import roster
from hetero_async.config import RunConfig
from hetero_async.errors import ConfigError, UserError
from hetero_async.shell import keys as key_files
from hetero_async.shell.keys import AllowList, create_keypair, load_public, load_secret, public_of
from hetero_async.tables import template

KEYS = sorted(zmq.curve_keypair()[0].decode() for _ in range(4))
STANDBY = {"b": {"site": "shanghai", "address": "tcp://10.0.0.2:7710"}}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A server's own directory, with no site in it."""
    text = template(run={"name": "tiny"}, sites={}, server={"address": "tcp://10.0.0.1:7710"}, standbys=STANDBY)
    return roster.initialize(tmp_path / "run", text)


def site_of(tmp_path: Path, workers: int) -> RunConfig:
    """A site's directory: its keys and run.toml, and no list."""
    (tmp_path / "site" / "keys").mkdir(parents=True)
    (tmp_path / "site" / "run.toml").write_text(template(run={"name": "tiny"}, sites={"far": workers}))
    for name in roster.workers_of("far", workers):
        create_keypair(tmp_path / "site" / "keys" / name)
    return RunConfig.load(tmp_path / "site" / "run.toml")


def allow(config: RunConfig, *keys: str, site: str = "", standby: str = "", replace: bool = False) -> list[str]:
    return roster.allow(config, keys, site=site, standby=standby, replace=replace)


def members(config: RunConfig) -> dict[str, tuple[str, str, str]]:
    """All but those whose keys were made with the run, as a server's or its operator's."""
    paths = [config.keys / f"{name}.public" for name in ("operator", *config.nodes())]
    made = [load_public(path) for path in paths if path.exists()]
    return {
        peer.key.decode(): (peer.role, peer.site, peer.worker) for peer in roster.listed(config) if peer.key not in made
    }


def test_a_new_run_lets_nobody_in_but_its_operator_and_its_servers(config: RunConfig) -> None:
    listed = [(peer.role, peer.worker) for peer in roster.listed(config)]
    assert listed == [("admin", "operator"), ("standby", "server"), ("standby", "b")]


def test_a_site_s_keys_are_let_in_as_its_workers_in_their_order(config: RunConfig) -> None:
    assert allow(config, KEYS[2], KEYS[0], site="far") == [f"let in far-0: {KEYS[2]}", f"let in far-1: {KEYS[0]}"]
    assert members(config) == {KEYS[2]: ("worker", "far", "far-0"), KEYS[0]: ("worker", "far", "far-1")}


def test_the_line_may_be_said_again_with_more_keys(config: RunConfig) -> None:
    allow(config, KEYS[0], site="far")
    assert allow(config, *KEYS[:2], site="far") == [
        f"far-0 was let in already: {KEYS[0]}",
        f"let in far-1: {KEYS[1]}",
    ]


def test_a_standby_s_key_gets_its_role_and_its_site_from_run_toml(config: RunConfig) -> None:
    allow(config, KEYS[0], standby="b", replace=True)
    [b] = [peer for peer in roster.listed(config) if peer.worker == "b"]
    assert (b.key.decode(), b.role, b.site) == (KEYS[0], "standby", "shanghai")
    assert load_public(config.keys / "b.public") == b.key, "by which the server knows it when it asks"


def test_nobody_takes_a_worker_s_place_unless_the_operator_says_so(config: RunConfig) -> None:
    allow(config, KEYS[0], site="far")
    with pytest.raises(UserError) as caught:
        allow(config, KEYS[1], site="far")
    assert str(caught.value) == (
        f"far-0 is let in with another key, {KEYS[0]}; add --replace if this one shall take its place"
    )
    assert members(config) == {KEYS[0]: ("worker", "far", "far-0")}
    assert allow(config, KEYS[1], site="far", replace=True) == [
        f"let in far-0: {KEYS[1]}; {KEYS[0]} is refused from now on"
    ]
    assert members(config) == {KEYS[1]: ("worker", "far", "far-0")}


@pytest.mark.parametrize(
    ("keys", "options", "expected"),
    [
        (
            ("short",),
            {"site": "far"},
            '"short": is not a public key; it must be 40 characters of Z85, in single quotes',
        ),
        ((KEYS[1], KEYS[1]), {"site": "far"}, "the same key is given twice; every worker has its own"),
        ((KEYS[1],), {"site": ""}, '--site "": must be 1 to 32 of a-z, 0-9 and -, not starting with -'),
        ((KEYS[1],), {"site": "Far"}, '--site "Far": must be 1 to 32 of a-z, 0-9 and -, not starting with -'),
        ((KEYS[0],), {"site": "b"}, f"{KEYS[0]} is far-0's key; if it shall be b-0's: hetero-async keys revoke far-0"),
        (KEYS[1:3], {"standby": "b"}, "--standby b: one key is needed, 2 are given"),
    ],
)
def test_what_cannot_be_let_in_is_said_and_changes_nothing(
    config: RunConfig, keys: tuple[str, ...], options: dict[str, str], expected: str
) -> None:
    allow(config, KEYS[0], site="far")
    before = config.allowed.read_text()
    with pytest.raises(UserError) as caught:
        allow(config, *keys, **options)  # type: ignore[arg-type]
    assert str(caught.value) == expected
    assert config.allowed.read_text() == before


def test_a_standby_that_run_toml_does_not_have_is_named(config: RunConfig) -> None:
    with pytest.raises(UserError, match=rf'--standby "c": {config.path} has no table \[standbys.c\]'):
        allow(config, KEYS[0], standby="c")


def test_keys_are_let_in_on_the_server_s_host_only(tmp_path: Path) -> None:
    site = site_of(tmp_path, 1)
    expected = "allowed.json: there is no such list; keys are let in and shut out on the server's host"
    for attempt in (
        lambda: allow(site, KEYS[0], site="far"),
        lambda: roster.revoke(site, ["far-0"], ""),
        lambda: roster.listed(site),
    ):
        with pytest.raises(ConfigError, match=expected):
            attempt()


def test_two_commands_at_once_do_not_undo_each_other(config: RunConfig) -> None:
    threads = [
        threading.Thread(target=allow, args=(config, key), kwargs={"site": f"s{n}"}) for n, key in enumerate(KEYS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(members(config)) == set(KEYS)


def test_a_command_that_holds_the_keys_for_long_is_told_of(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_files, "LOCK_SECONDS", 0.1)
    with key_files._locked(config.keys):
        with pytest.raises(ConfigError, match=f"{config.keys}: another command has been changing the keys for 0.1 s"):
            allow(config, KEYS[0], site="far")


@pytest.mark.parametrize("by", ["name", "key", "site"])
def test_a_worker_is_shut_out_by_name_by_key_or_with_its_site(config: RunConfig, by: str) -> None:
    allow(config, KEYS[0], site="far")
    allow(config, KEYS[1], site="near")
    who, site = {"name": (["far-0"], ""), "key": ([KEYS[0]], ""), "site": ([], "far")}[by]
    assert roster.revoke(config, who, site) == [f"shut out far-0: {KEYS[0]} is refused from now on"]
    assert set(members(config)) == {KEYS[1]}


@pytest.mark.parametrize(
    ("who", "site", "expected"),
    [
        ([], "", "say whom to shut out: a worker's name, a key, or --site NAME"),
        (["far-7"], "", 'nobody is let in by the name or key "far-7"; who is, shows: hetero-async keys list'),
        ([], "mars", '--site "mars": none of its keys is let in; whose are, shows: hetero-async keys list'),
    ],
)
def test_whoever_is_not_there_cannot_be_shut_out(config: RunConfig, who: list[str], site: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        roster.revoke(config, who, site)
    assert str(caught.value) == expected


# --- new keys ---


def test_a_new_server_key_counts_from_the_next_start_on_and_says_what_the_sites_must_do(config: RunConfig) -> None:
    before = load_public(config.keys / "server.public")
    told = roster.rotate(config, [])
    after = load_public(config.keys / "server.public")
    assert after != before and public_of(config.keys / "server") == after
    assert told[0] == f"server has a new key: {after.decode()}"
    assert "a running server keeps its old key until it is started again" in told[1]
    assert told[-1].strip().startswith(f"hetero-async join-site 'tcp://10.0.0.1:7710#{after.decode()}' --site NAME")


def test_new_keys_of_a_site_come_with_the_line_that_puts_them_in_the_old_ones_place(
    tmp_path: Path, config: RunConfig
) -> None:
    site = site_of(tmp_path, 2)
    olds = [public_of(site.keys / name).decode() for name in ("far-0", "far-1")]
    allow(config, *olds, site="far")
    told = roster.rotate(site, [])
    news = [public_of(site.keys / name).decode() for name in ("far-0", "far-1")]
    assert not set(olds) & set(news)
    [line] = [line.strip() for line in told if "hetero-async keys allow" in line]
    assert line == f"hetero-async keys allow '{news[0]}' '{news[1]}' --site far --replace"
    allow(config, *news, site="far", replace=True)
    assert members(config) == {news[0]: ("worker", "far", "far-0"), news[1]: ("worker", "far", "far-1")}


def test_one_worker_s_new_key_leaves_the_others_and_their_order_alone(tmp_path: Path) -> None:
    site = site_of(tmp_path, 2)
    before = public_of(site.keys / "far-0").decode()
    told = roster.rotate(site, ["far-1"])
    assert any(f"allow '{before}' '{public_of(site.keys / 'far-1').decode()}' --site far" in line for line in told)


def test_where_the_list_lies_a_worker_s_new_key_takes_the_old_one_s_place_at_once(tmp_path: Path) -> None:
    config = roster.initialize(tmp_path, template(run={"name": "tiny"}, sites={"here": 1}))
    old = public_of(config.keys / "here-0").decode()
    told = roster.rotate(config, ["here-0"])
    new = public_of(config.keys / "here-0").decode()
    assert members(config) == {new: ("worker", "here", "here-0")} and new != old
    assert told == [
        f"here-0 has a new key: {new}",
        "the old keys are refused from now on; running workers come back with the new ones by themselves",
    ]


def test_a_key_that_is_not_there_cannot_be_renewed(config: RunConfig) -> None:
    with pytest.raises(UserError, match='"far-0": there is no such key here; there is: b, operator, server'):
        roster.rotate(config, ["far-0"])


def test_new_keys_are_as_private_as_the_old(tmp_path: Path) -> None:
    site = site_of(tmp_path, 1)
    before = os.umask(0)
    try:
        roster.rotate(site, [])
    finally:
        os.umask(before)
    assert (site.keys / "far-0.secret").stat().st_mode & 0o777 == 0o600
    load_secret(site.keys / "far-0.secret")


# --- what a person types ---


def test_single_quotes_are_enough_for_any_key() -> None:
    drawn = [zmq.curve_keypair()[0] for _ in range(50)]
    line = roster.allow_line("far", drawn)
    assert re.findall("'([^']*)'", line) == [key.decode() for key in drawn]


def test_a_list_that_is_damaged_is_named_and_left_alone(config: RunConfig) -> None:
    config.allowed.write_text("{")
    for attempt in (lambda: allow(config, KEYS[0], site="far"), lambda: roster.listed(config)):
        with pytest.raises(ConfigError, match=r"allowed\.json: is not valid JSON"):
            attempt()
    assert config.allowed.read_text() == "{"


def test_the_list_stays_readable_to_its_owner_alone(config: RunConfig) -> None:
    allow(config, KEYS[0], site="far")
    assert config.allowed.stat().st_mode & 0o777 == 0o600
    assert set(json.loads(config.allowed.read_text())[KEYS[0]]) == {"role", "site", "worker"}
    assert AllowList(config.allowed).lookup(KEYS[0].encode()) is not None
