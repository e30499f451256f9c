"""How a host gets into a run: its keys, the line that its operator says to the server's, the wait, and its run.toml.

The verb `join-site` runs on a site's host, `join-standby` (standby_enrolment.py) on a standby's. What they need to know
before is an address with the server's key; all else they make by themselves, or are told by the server once the keys
are let in. Everything here can be done again at any time and goes on from where it was. The other side's verbs,
`keys …`, are in roster.py.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from hetero_async.agent import work
from hetero_async.complaints import ADDRESS, ADDRESS_ALLOWED, NAME, NAME_ALLOWED, PORT_MAX, SERVER, checked
from hetero_async.config import TOLD_OF_SERVERS, RunConfig
from hetero_async.core.messages import SettingsReport, SettingsRequest
from hetero_async.errors import ConfigError, HeteroAsyncError, UserError
from hetero_async.ports import Observer
from hetero_async.roster import allow_line, allow_standby_line, workers_of
from hetero_async.shell.dial import DialLink, Endpoint, open_dial_link
from hetero_async.shell.disk import write_durably
from hetero_async.shell.keys import create_keypair, is_key, load_public, public_of, save_public
from hetero_async.shell.signals import stop_on_signal
from hetero_async.tables import SITE_WORKERS_MAX, template

# A key that is let in is answered at once; others are looked at afresh this often, since libzmq does not ask again.
SILENCE_SECONDS = 2.0
ASK_AGAIN_SECONDS, SEND_AGAIN_SECONDS = 0.5, 0.05
# How soon somebody who waits is told so, and how often then.
TELL_AFTER_SECONDS, TELL_EVERY_SECONDS = 3.0, 10.0
HEADER = "# Written by hetero-async {verb}, each time anew: what counts is the run.toml on the server's host.\n"


@dataclass(frozen=True, slots=True)
class ServerAddress:
    """Where a server is reached, and the key by which it is known: tcp://HOST:PORT#KEY."""

    address: str
    key: bytes

    @staticmethod
    def parse(text: str) -> "ServerAddress":
        """Raises UserError."""
        address, sign, key = text.partition("#")
        matched = ADDRESS.fullmatch(address)
        if not matched or int(matched["port"]) > PORT_MAX:
            raise UserError(f'address "{address}": must be {ADDRESS_ALLOWED}, then # and the server\'s public key')
        if not sign or not is_key(key.encode()):
            raise UserError(
                f'"{text}": after the address come # and the 40 characters of the server\'s public key, as '
                "`hetero-async init` printed them; put all of it in single quotes"
            )
        return ServerAddress(address, key.encode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """A host's way into a run, as a site or, under that name, as a standby. Raises UserError for what cannot be one."""

    server: ServerAddress
    site: str
    workers: int
    directory: Path
    is_standby: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.site):
            raise UserError(f'--{"name" if self.is_standby else "site"} "{self.site}": must be {NAME_ALLOWED}')
        if not 1 <= self.workers <= SITE_WORKERS_MAX:
            raise UserError(f"--workers {self.workers}: must be 1 to {SITE_WORKERS_MAX}")

    @property
    def run_toml(self) -> Path:
        return self.directory / "run.toml"

    @property
    def keys(self) -> Path:
        return self.directory / "keys"

    @property
    def key_names(self) -> list[str]:
        return [self.site] if self.is_standby else workers_of(self.site, self.workers)

    def allow_line(self, publics: Sequence[bytes]) -> str:
        return allow_standby_line(self.site, publics) if self.is_standby else allow_line(self.site, publics)


async def join_site(
    enrolment: Enrolment, command: Sequence[str], observer: Observer, tell: Callable[[str], None]
) -> None:
    """Make what is missing, wait until the server lets all keys of the site in, then start its workers."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_on_signal, nursery.cancel_scope)
        config = write_run_toml(enrolment, await let_in(enrolment, observer, tell))
        tell(f"let in: {enrolment.site} takes part in {config.run.name}; wrote {config.path}")
        if command:
            await work(config, enrolment.site, command, observer)
        else:
            tell(f"next: hetero-async work --run {config.path} --site {enrolment.site} -- python train.py")
        nursery.cancel_scope.cancel()


async def let_in(enrolment: Enrolment, observer: Observer, tell: Callable[[str], None]) -> Mapping[str, Any]:
    """What the server tells once it lets all keys of this host in; they are made where there are none."""
    publics, is_new = prepare(enrolment)
    line = f"on the server's host, where its run.toml lies:\n\n    {enrolment.allow_line(publics)}\n"
    return await _settings(enrolment, line, is_new, observer, tell)


def prepare(enrolment: Enrolment) -> tuple[list[bytes], bool]:
    """Pin the server's key and make the host's keys where there are none: their public halves, and whether one is new.

    Raises ConfigError for a directory that is not this site's, or that pins another server key.
    """
    _check_directory(enrolment)
    try:
        enrolment.keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"{enrolment.keys}: cannot be made: {error.strerror}") from None
    _pin(enrolment.keys / "server", enrolment.server.key)
    paths = [enrolment.keys / name for name in enrolment.key_names]
    missing = [path for path in paths if not path.with_name(f"{path.name}.secret").exists()]
    for path in missing:
        create_keypair(path)
    return [public_of(path) for path in paths], bool(missing)


def _check_directory(enrolment: Enrolment) -> None:
    if (enrolment.keys / "server.secret").exists():
        raise ConfigError(
            f"{enrolment.directory} is the server's own; choose another directory for the site, "
            "or list it in run.toml and start its workers with: hetero-async work"
        )
    if enrolment.run_toml.exists():
        config = RunConfig.load(enrolment.run_toml)
        sites = list(config.sites)
        is_its_own = (
            enrolment.site in config.standbys and not sites if enrolment.is_standby else sites == [enrolment.site]
        )
        if not is_its_own:
            raise ConfigError(
                f"{enrolment.run_toml} is that of {', '.join(sites) or 'no site'}; choose another directory"
            )


def _pin(path: Path, key: bytes) -> None:
    """Whichever node the address is of, when the others are known as well."""
    public_path = path.with_name(f"{path.name}.public")
    if not public_path.exists():
        save_public(path, key)
    elif key in map(load_public, path.parent.glob("*.public")):
        return
    elif (pinned := load_public(public_path)) != key:
        raise ConfigError(
            f"{public_path} pins the server key {pinned.decode()}, and the address has {key.decode()}; "
            "if the server's key was changed on purpose, remove that file and do this again"
        )


# --- waiting ---


async def _settings(
    enrolment: Enrolment, line: str, is_new: bool, observer: Observer, tell: Callable[[str], None]
) -> Mapping[str, Any]:
    """What the server tells, when it has answered to every key of the site."""
    told: Mapping[str, Any] = {}
    if is_new:
        tell(f"made {enrolment.site}'s keys; to let them in, {line}")
    async with trio.open_nursery() as nursery:
        waiting = Waiting(enrolment, "" if is_new else f"to let {enrolment.site} in, {line}", observer, tell)
        nursery.start_soon(waiting.tell_of_it)
        for name in enrolment.key_names:
            address, key = enrolment.server.address, enrolment.server.key
            # Nothing is asked that would come over the bulk lane.
            async with open_dial_link(
                [Endpoint(name=SERVER, key=key, control=address, bulk=address)],
                secret_path=enrolment.keys / f"{name}.secret",
                observer=Nobody(),
                silence_seconds=SILENCE_SECONDS,
            ) as link:
                waiting.link = link
                told = await _ask(link, enrolment)
        nursery.cancel_scope.cancel()
    return told


class Nobody:
    """Fulfils ports.Observer: what the link would say of each attempt, `Waiting` says more seldom."""

    def event(self, name: str, **fields: object) -> None:
        pass


@dataclass(slots=True)
class Waiting:
    """Says, not too often, that we wait and for what."""

    enrolment: Enrolment
    first: str  # what a person must do about it; said once
    observer: Observer
    tell: Callable[[str], None]
    link: DialLink | None = None

    async def tell_of_it(self) -> None:
        began = trio.current_time()
        await trio.sleep(TELL_AFTER_SECONDS)
        if self.first:
            self.tell(self.first)
        while True:
            reason = (self.link and self.link.problem) or "no answer yet"
            seconds = round(trio.current_time() - began)
            self.observer.event("waiting", to=self.enrolment.server.address, seconds=seconds, reason=reason)
            await trio.sleep(TELL_EVERY_SECONDS)


async def _ask(link: DialLink, enrolment: Enrolment) -> Mapping[str, Any]:
    """Until the server answers: whoever asked to join waits for people, as long as that takes."""
    while True:
        with trio.move_on_after(ASK_AGAIN_SECONDS):
            while not await link.control.send(link.server.key, SettingsRequest()):  # noqa: ASYNC110, it cannot tell
                await trio.sleep(SEND_AGAIN_SECONDS)
            while not isinstance((incoming := await link.control.receive()).message, SettingsReport):
                pass
            return _understood(incoming.payload, enrolment)


def _understood(payload: bytes, enrolment: Enrolment) -> Mapping[str, Any]:
    try:
        told = json.loads(payload)
    except (ValueError, RecursionError):
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("keys"), dict):
        raise HeteroAsyncError(f"{enrolment.server.address} sent no settings; is its software of the same version?")
    return told


# --- the site's run.toml ---


def write_run_toml(enrolment: Enrolment, told: Mapping[str, Any]) -> RunConfig:
    """The server's settings with this site alone in [sites], and the standbys' public keys beside the server's.

    A standby's host has no site, and all that the server's own has; but an archive in a directory is none of it.
    """
    tables = {name: told.get(name, {}) for name in ("run", "server", "training", "standbys")}
    keys, dialled = _keys_of_nodes(enrolment, told)
    server = _told_of(tables["server"])
    if enrolment.is_standby:
        tables["witness"] = told.get("witness", {})
        server = {key: value for key, value in _items(tables["server"]) if key != "archive" or "://" in str(value)}
    sites = {} if enrolment.is_standby else {enrolment.site: enrolment.workers}
    file = checked(
        {
            **tables,
            "server": _as_dialled(server, enrolment.server.address) if dialled == SERVER else server,
            "standbys": {
                name: _as_dialled(_told_of(table), enrolment.server.address) if dialled == name else _told_of(table)
                for name, table in _items(tables["standbys"])
            },
            "sites": {site: {"workers": workers} for site, workers in sites.items()},
        },
        f"the settings that {enrolment.server.address} sent (is its software of the same version?)",
    )
    for name in (SERVER, *file.standbys):
        if name in keys and name not in enrolment.key_names:
            save_public(enrolment.keys / name, keys[name])
    # Nothing that was received may say where files lie on this host.
    run = file.run.model_dump(exclude={"directory"}, exclude_defaults=True)
    text = HEADER.format(verb="join-standby" if enrolment.is_standby else "join-site") + template(
        run=run,
        server=file.server.model_dump(exclude_defaults=True),
        training=file.training.model_dump(exclude_defaults=True),
        standbys={name: table.model_dump(exclude_defaults=True) for name, table in file.standbys.items()},
        sites=sites,
        witness=file.witness.model_dump(exclude_defaults=True),
    )
    try:
        write_durably(enrolment.run_toml, text.encode())
    except OSError as error:
        raise ConfigError(f"{enrolment.run_toml}: cannot be written: {error.strerror}") from None
    return RunConfig.load(enrolment.run_toml)


def _keys_of_nodes(enrolment: Enrolment, told: Mapping[str, Any]) -> tuple[dict[str, bytes], str]:
    """By name, and the name of the node that was dialled: a standby may have become the server. Its key is the one
    that a person gave."""
    keys = {name: key.encode() for name, key in told["keys"].items() if isinstance(key, str) and is_key(key.encode())}
    dialled = next((name for name, key in keys.items() if key == enrolment.server.key), SERVER)
    return keys | {dialled: enrolment.server.key}, dialled


def _items(table: object) -> Sequence[tuple[str, Any]]:
    return list(table.items()) if isinstance(table, dict) else []


def _told_of(server: object) -> dict[str, Any]:
    """Of a server's or standby's table, what a site has use for."""
    return {key: value for key, value in _items(server) if key in TOLD_OF_SERVERS}


def _as_dialled(server: Mapping[str, Any], address: str) -> dict[str, Any]:
    """Seen from here the server may have another address than it listens at; then its bulk lane has, too."""
    host, own = _host(address), _host(str(server.get("address", "")))
    bulk = server.get("bulk_address")
    if isinstance(bulk, str) and _host(bulk) == own:
        return {**server, "address": address, "bulk_address": f"{host}:{bulk.rsplit(':', 1)[1]}"}
    return {**server, "address": address}


def _host(address: str) -> str:
    return address.rsplit(":", 1)[0]
