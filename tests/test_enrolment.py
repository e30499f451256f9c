"""How a site gets in: what is made and never overwritten, what a person is told, and what is taken from the server."""

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import zmq
from shell.place import Notes, free_ports, moment, run
from zmq.utils import z85

from hetero_async import assembly, enrolment, roster
from hetero_async.config import RunConfig
from hetero_async.enrolment import Enrolment, ServerAddress, join_site, prepare, write_run_toml
from hetero_async.errors import ConfigError, HeteroAsyncError, UserError
from hetero_async.shell.keys import create_keypair, load_public, load_secret
from hetero_async.tables import template

# The same in every process, since tests are named after what they are given.
KEY, OTHER = (zmq.curve_public(z85.encode(bytes([number]) * 32)) for number in (1, 2))
ADDRESS = "tcp://192.0.2.7:7710"


def site(
    directory: Path, *, name: str = "far", workers: int = 2, key: bytes = KEY, address: str = ADDRESS
) -> Enrolment:
    return Enrolment(server=ServerAddress(address, key), site=name, workers=workers, directory=directory)


# --- the address ---


@pytest.mark.parametrize("host", ["tcp://server.example:7710", "tcp://[2001:db8::1]:1", "tcp://10.0.0.1:65535"])
def test_an_address_comes_with_the_server_s_key(host: str) -> None:
    assert ServerAddress.parse(f"{host}#{KEY.decode()}") == ServerAddress(host, KEY)


def test_a_key_may_have_the_sign_that_stands_before_it() -> None:
    key = b"0#" + b"0" * 38
    assert ServerAddress.parse(f"{ADDRESS}#{key.decode()}").key == key


@pytest.mark.parametrize(
    "text", ["", "server.example:7710", "tcp://server.example", "tcp://x:70000", f"udp://x:1#{KEY!r}"]
)
def test_what_is_no_address_is_said(text: str) -> None:
    with pytest.raises(UserError) as caught:
        ServerAddress.parse(text)
    address = text.partition("#")[0]
    assert str(caught.value) == (
        f'address "{address}": must be tcp://HOST:PORT, for example tcp://127.0.0.1:7710, '
        "then # and the server's public key"
    )


@pytest.mark.parametrize("rest", ["", "#", "#short", f"#{KEY.decode()}0", f"#{KEY[:-1].decode()}~"])
def test_an_address_without_a_whole_key_is_said_with_the_cure(rest: str) -> None:
    with pytest.raises(UserError) as caught:
        ServerAddress.parse(f"{ADDRESS}{rest}")
    assert str(caught.value) == (
        f'"{ADDRESS}{rest}": after the address come # and the 40 characters of the server\'s public key, as '
        "`hetero-async init` printed them; put all of it in single quotes"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"name": "Far"}, '--site "Far": must be 1 to 32 of a-z, 0-9 and -, not starting with -'),
        ({"workers": 0}, "--workers 0: must be 1 to 1000"),
        ({"workers": 1001}, "--workers 1001: must be 1 to 1000"),
    ],
)
def test_what_cannot_be_a_site_is_said(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        site(tmp_path, **options)
    assert str(caught.value) == expected


# --- what is made ---


def test_where_nothing_exists_yet_private_keys_are_made_and_the_server_s_is_pinned(tmp_path: Path) -> None:
    joining = site(tmp_path / "deep" / "run")
    before = os.umask(0)
    try:
        publics, is_new = prepare(joining)
    finally:
        os.umask(before)
    assert is_new and load_public(joining.keys / "server.public") == KEY
    assert joining.keys.stat().st_mode & 0o777 == 0o700
    secrets = [joining.keys / f"far-{index}.secret" for index in range(2)]
    assert [path.stat().st_mode & 0o777 for path in secrets] == [0o600, 0o600]
    assert [zmq.curve_public(load_secret(path)) for path in secrets] == publics


def test_done_again_it_keeps_every_key_and_adds_those_of_new_workers(tmp_path: Path) -> None:
    first, _ = prepare(site(tmp_path))
    assert prepare(site(tmp_path)) == (first, False)
    more, is_new = prepare(site(tmp_path, workers=3))
    assert (more[:2], is_new) == (first, True)


def test_a_public_key_that_was_lost_or_mixed_up_is_worked_out_again(tmp_path: Path) -> None:
    publics, _ = prepare(site(tmp_path))
    (tmp_path / "keys" / "far-0.public").unlink()
    (tmp_path / "keys" / "far-1.public").write_bytes((tmp_path / "keys" / "server.public").read_bytes())
    assert prepare(site(tmp_path)) == (publics, False)
    assert [load_public(tmp_path / "keys" / f"far-{index}.public") for index in range(2)] == publics


def test_another_server_key_is_not_taken_silently(tmp_path: Path) -> None:
    prepare(site(tmp_path))
    with pytest.raises(ConfigError) as caught:
        prepare(site(tmp_path, key=OTHER))
    pinned = tmp_path / "keys" / "server.public"
    assert str(caught.value) == (
        f"{pinned} pins the server key {KEY.decode()}, and the address has {OTHER.decode()}; "
        "if the server's key was changed on purpose, remove that file and do this again"
    )
    pinned.unlink()
    prepare(site(tmp_path, key=OTHER))


def test_the_server_s_own_directory_is_not_a_site_s(tmp_path: Path) -> None:
    roster.initialize(tmp_path, template(run={"name": "tiny"}, sites={}))
    before = (tmp_path / "run.toml").read_text()
    with pytest.raises(ConfigError, match=f"^{tmp_path} is the server's own; choose another directory for the site, "):
        prepare(site(tmp_path))
    assert (tmp_path / "run.toml").read_text() == before


@pytest.mark.parametrize(("sites", "whose"), [({"near": 1, "far": 1}, "near, far"), ({}, "no site")])
def test_a_run_toml_that_is_not_this_site_s_is_left_alone(tmp_path: Path, sites: dict[str, int], whose: str) -> None:
    (tmp_path / "run.toml").write_text(template(run={"name": "tiny"}, sites=sites))
    with pytest.raises(ConfigError, match=f"run.toml is that of {whose}; choose another directory"):
        prepare(site(tmp_path))


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"{tmp_path}/file/keys: cannot be made: Not a directory"):
        prepare(site(tmp_path / "file"))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda path: path.chmod(0o644), r"others can read this secret key \(mode 644\); do: chmod 600"),
        (lambda path: path.write_bytes(b"curve-secret xyz"), "is not a key file"),
        (lambda path: path.write_bytes((path.parent / "server.public").read_bytes()), "this is a curve-public key"),
    ],
)
def test_a_spoiled_secret_is_told_and_not_overwritten(
    tmp_path: Path, spoil: Callable[[Path], Any], complaint: str
) -> None:
    prepare(site(tmp_path))
    spoil(tmp_path / "keys" / "far-1.secret")
    before = (tmp_path / "keys" / "far-1.secret").read_bytes()
    with pytest.raises(ConfigError, match=rf"far-1\.secret: {complaint}"):
        prepare(site(tmp_path))
    assert (tmp_path / "keys" / "far-1.secret").read_bytes() == before


# --- what is taken from the server ---


def told(tmp_path: Path, **server: object) -> dict[str, Any]:
    text = template(
        run={"name": "tiny", "directory": "/srv/run", "passes": 2.5, "seed": 9},
        sites={"home": 3},
        server={"site": "home", "address": "tcp://10.0.0.1:7710", "checkpoint_every": 7, **server},
        training={"codec_up": "int4"},
        standbys={"b": {"site": "shanghai", "address": "tcp://10.0.0.2:7710", "directory": "/srv/b"}},
    )
    (tmp_path / "server.toml").write_text(text)
    return RunConfig.load(tmp_path / "server.toml").told_to_sites() | {"keys": {"b": OTHER.decode()}}


def test_a_site_s_run_toml_has_the_run_s_settings_and_its_own_site(tmp_path: Path) -> None:
    prepare(site(tmp_path / "site"))
    config = write_run_toml(site(tmp_path / "site"), told(tmp_path))
    assert config.workers() == [("far", "far-0"), ("far", "far-1")]
    assert config.settings() == RunConfig.load(tmp_path / "server.toml").settings()
    assert (config.server.address, config.server.site) == (ADDRESS, "home")
    assert config.node("server").bulk == "tcp://192.0.2.7:7711"
    assert (config.node("b").site, config.node("b").control) == ("shanghai", "tcp://10.0.0.2:7710")
    assert load_public(config.keys / "b.public") == OTHER


def test_a_site_that_joins_where_a_standby_serves_now_knows_all_nodes_by_their_own_keys(tmp_path: Path) -> None:
    far = site(tmp_path / "site", key=OTHER, address="tcp://b.example:7710")
    prepare(far)
    config = write_run_toml(far, told(tmp_path) | {"keys": {"server": KEY.decode(), "b": OTHER.decode()}})
    assert (config.node("server").control, config.node("b").control) == ("tcp://10.0.0.1:7710", "tcp://b.example:7710")
    assert [load_public(config.keys / f"{name}.public") for name in ("server", "b")] == [KEY, OTHER]
    prepare(far)  # said again, and at the other node
    prepare(site(tmp_path / "site"))


def test_nothing_that_was_received_says_where_files_lie(tmp_path: Path) -> None:
    prepare(site(tmp_path / "site"))
    received = told(tmp_path)
    received["run"]["directory"] = "/etc"
    received["standbys"]["b"]["directory"] = "/etc"
    received["keys"]["../../escaped"] = KEY.decode()
    config = write_run_toml(site(tmp_path / "site"), received)
    assert config.directory == tmp_path / "site"
    assert config.node("b").directory == tmp_path / "site" / "standby-b"
    assert not list(tmp_path.parent.rglob("escaped*"))
    assert "checkpoint_every = 7" not in config.path.read_text()


@pytest.mark.parametrize(
    ("bulk", "expected"),
    [("tcp://10.0.0.1:9000", "tcp://192.0.2.7:9000"), ("tcp://203.0.113.5:9000", "tcp://203.0.113.5:9000")],
)
def test_a_bulk_lane_at_the_listening_host_is_reached_where_the_server_was(
    tmp_path: Path, bulk: str, expected: str
) -> None:
    prepare(site(tmp_path / "site"))
    config = write_run_toml(site(tmp_path / "site"), told(tmp_path, bulk_address=bulk))
    assert config.node("server").bulk == expected


@pytest.mark.parametrize(
    ("table", "values", "complaint"),
    [
        ("training", {"warp": 9}, r"training\.warp = 9: unknown key; known keys: merge, "),
        ("run", {"name": "a b"}, r'run\.name = "a b": must be 1 to 32'),
        ("run", "x", r'run = "x": must be a table'),
        ("server", 5, r"server\.site is missing"),
        ("standbys", {"b": {}}, r"standbys\.b\.site is missing"),
    ],
)
def test_settings_that_this_software_does_not_understand_are_refused_with_the_key(
    tmp_path: Path, table: str, values: object, complaint: str
) -> None:
    prepare(site(tmp_path / "site"))
    with pytest.raises(ConfigError) as caught:
        write_run_toml(site(tmp_path / "site"), told(tmp_path) | {table: values})
    assert str(caught.value).startswith(f"the settings that {ADDRESS} sent (is its software of the same version?): ")
    assert re.search(complaint, str(caught.value))
    assert not (tmp_path / "site" / "run.toml").exists()


@pytest.mark.parametrize("payload", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"keys": 3}'])
def test_an_answer_that_holds_no_settings_is_said(tmp_path: Path, payload: bytes) -> None:
    with pytest.raises(HeteroAsyncError, match=f"{ADDRESS} sent no settings; is its software of the same version"):
        enrolment._understood(payload, site(tmp_path))


# --- waiting ---


@pytest.fixture
def server(tmp_path: Path) -> RunConfig:
    control, bulk = free_ports(2)
    addresses = {"address": f"tcp://127.0.0.1:{control}", "bulk_address": f"tcp://127.0.0.1:{bulk}"}
    return roster.initialize(tmp_path / "run", template(run={"name": "tiny"}, sites={}, server=addresses))


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrolment, "SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(enrolment, "ASK_AGAIN_SECONDS", 0.1)
    monkeypatch.setattr(enrolment, "TELL_AFTER_SECONDS", 0.5)
    monkeypatch.setattr(enrolment, "TELL_EVERY_SECONDS", 0.5)


def joining_to(config: RunConfig, directory: Path, *, workers: int = 2, key: bytes = b"") -> Enrolment:
    pinned = key or load_public(config.keys / "server.public")
    return site(directory, workers=workers, key=pinned, address=config.server.address)


def lines_in(said: list[str]) -> list[str]:
    return [line.strip() for text in said for line in text.splitlines() if "hetero-async keys allow" in line]


def admit(config: RunConfig, line: str) -> None:
    """As the operator does who says that line."""
    found = re.fullmatch(r"hetero-async keys allow ((?:'[^']{40}' )+)--site ([a-z]+)", line)
    assert found, line
    roster.allow(config, re.findall("'([^']+)'", found[1]), site=found[2], standby="", replace=False)


async def wait_for(holds: Callable[[], object]) -> None:
    while not holds():
        await moment()


@pytest.mark.usefixtures("hurried")
def test_a_site_that_is_let_in_while_it_waits_starts_by_itself(
    tmp_path: Path, server: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    notes = Notes()
    joining = joining_to(server, tmp_path / "site")
    script = [sys.executable, "-c", "import os; open(os.environ['HETERO_ASYNC_WORKER'] + '.ran', 'x')"]

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(assembly.serve_run, server, "server", False, notes)
            await wait_for(lambda: notes.of("serving"))
            async with trio.open_nursery() as site_nursery:
                site_nursery.start_soon(join_site, joining, script, notes, said.append)
                await wait_for(lambda: len(notes.of("waiting")) >= 2 and lines_in(said))
                assert not joining.run_toml.exists()
                admit(server, lines_in(said)[0])
            assert {note["worker"] for note in notes.of("worker ended")} == {"far-0", "far-1"}
            nursery.cancel_scope.cancel()

    monkeypatch.chdir(tmp_path)
    run(main, 60)
    assert len(lines_in(said)) == 1
    assert "the server does not let this key in" in {note["reason"] for note in notes.of("waiting")}
    assert {path.name for path in tmp_path.glob("*.ran")} == {"far-0.ran", "far-1.ran"}
    assert RunConfig.load(joining.run_toml).workers() == [("far", "far-0"), ("far", "far-1")]


@pytest.mark.usefixtures("hurried")
def test_a_site_that_is_in_already_says_no_line_and_one_that_grew_waits_for_its_new_key(
    tmp_path: Path, server: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    notes = Notes()
    first = joining_to(server, tmp_path / "site", workers=1)
    publics, _ = prepare(first)
    roster.allow(server, [key.decode() for key in publics], site="far", standby="", replace=False)
    grown = joining_to(server, tmp_path / "site", workers=2)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(assembly.serve_run, server, "server", False, notes)
            await wait_for(lambda: notes.of("serving"))
            with monkeypatch.context() as patient:
                patient.setattr(enrolment, "TELL_AFTER_SECONDS", 30.0)
                await join_site(first, [], notes, said.append)
            assert not lines_in(said) and said[-1].startswith("next: hetero-async work --run ")
            async with trio.open_nursery() as site_nursery:
                site_nursery.start_soon(functools.partial(join_site, grown, [], notes, said.append))
                await wait_for(lambda: notes.of("waiting") and lines_in(said))
                assert len(RunConfig.load(grown.run_toml).workers()) == 1
                admit(server, lines_in(said)[0])
            nursery.cancel_scope.cancel()

    run(main, 60)
    assert len(RunConfig.load(grown.run_toml).workers()) == 2


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize(
    ("is_serving", "key", "reason"),
    [
        (True, OTHER, "what answers at that address does not hold the pinned server key"),
        (False, b"", "nobody answers at that address"),
    ],
    ids=["another server", "no server"],
)
def test_whoever_waits_in_vain_is_told_why(
    tmp_path: Path, server: RunConfig, is_serving: bool, key: bytes, reason: str
) -> None:
    notes = Notes()
    joining = joining_to(server, tmp_path / "site", key=key)

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            if is_serving:
                nursery.start_soon(assembly.serve_run, server, "server", False, notes)
            nursery.start_soon(join_site, joining, [], notes, [].append)
            await wait_for(lambda: [note for note in notes.of("waiting") if note["reason"] == reason])
            assert notes.of("waiting")[0]["to"] == server.server.address
            nursery.cancel_scope.cancel()

    run(main, 60)
    assert not joining.run_toml.exists()


def test_a_server_s_own_key_file_stays_out_of_what_sites_are_told(tmp_path: Path, server: RunConfig) -> None:
    create_keypair(tmp_path / "b")
    text = repr(server.told_to_sites())
    for secret in server.keys.glob("*.secret"):
        assert load_secret(secret).decode() not in text
    assert str(tmp_path) not in text
