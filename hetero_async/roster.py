"""Who may take part: what the verbs `keys list | allow | revoke | rotate` do with the list of keys and the key files.

All of it is done to files, so it works whether a server is running or not: a running one looks at its list before every
message, so that a change counts from the next message on. allowed.json alone decides who is let in; what run.toml says
under [sites] is how many workers `init` makes keys for, and `work` starts.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from hetero_async.complaints import NAME, NAME_ALLOWED, SERVER
from hetero_async.config import RunConfig
from hetero_async.errors import ConfigError, UserError
from hetero_async.ports import Peer
from hetero_async.shell.keys import (
    AllowList,
    Entry,
    create_keypair,
    is_key,
    load_public,
    public_of,
    replace_keypair,
    save_public,
)

LIST_VERB = "hetero-async keys list"


def initialize(directory: Path, run_toml: str, *, for_standbys: bool = True) -> RunConfig:
    """Write run.toml, the keys of server, standbys, operator and every worker, and the list of who is let in.

    `for_standbys`: false leaves their keys to them (`join-standby`). Raises ConfigError when there is a run already.
    """
    path = directory / "run.toml"
    if path.exists():
        raise ConfigError(f"{path}: there is one already; remove it, or choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(run_toml)
    config = RunConfig.load(path)
    config.keys.mkdir(parents=True, exist_ok=True, mode=0o700)
    allowed = AllowList(config.allowed)
    for node in config.nodes().values() if for_standbys else [config.node(SERVER)]:
        allowed.admit(create_keypair(config.keys / node.name), role="standby", site=node.site, worker=node.name)
    allowed.admit(create_keypair(config.keys / "operator"), role="admin", site=config.server.site, worker="operator")
    for site, worker in config.workers():
        allowed.admit(create_keypair(config.keys / worker), role="worker", site=site, worker=worker)
    return config


def workers_of(site: str, count: int) -> list[str]:
    """The names of a site's workers, in the order in which their keys are given."""
    return [f"{site}-{index}" for index in range(count)]


def allow_line(site: str, keys: Sequence[bytes], *more: str) -> str:
    """What lets these workers of a site in. Z85 has letters that a shell would act upon, but no quote."""
    return " ".join(["hetero-async keys allow", *_quoted(keys), "--site", site, *more])


def allow_standby_line(name: str, keys: Sequence[bytes]) -> str:
    """The same for a standby; a key that it had on another host, or was given by `init`, counts no more then."""
    return " ".join(["hetero-async keys allow", *_quoted(keys), "--standby", name, "--replace"])


def _quoted(keys: Sequence[bytes]) -> list[str]:
    return [f"'{key.decode()}'" for key in keys]


def join_line(config: RunConfig) -> str:
    """What a site's host must say to take part: it holds the address, and the key by which the server is known."""
    key = load_public(config.keys / f"{SERVER}.public").decode()
    return f"hetero-async join-site '{config.server.address}#{key}' --site NAME -- python train.py"


def standby_line(config: RunConfig, name: str) -> str:
    """The same for the host of a standby."""
    address, key = config.server.address, load_public(config.keys / f"{SERVER}.public").decode()
    return f"hetero-async join-standby '{address}#{key}' --name {name}"


def listed(config: RunConfig) -> list[Peer]:
    """All that are let in, by role and name."""
    allowed = _allowed(config)
    allowed.load()
    return sorted(allowed.peers(), key=lambda peer: (peer.role, peer.site, len(peer.worker), peer.worker))


# --- allow ---


def allow(config: RunConfig, keys: Sequence[str], *, site: str, standby: str, replace: bool) -> list[str]:
    """Let keys in: a site's workers, in their order, or one standby of run.toml. Says what it did, a line a key."""
    _check_keys(keys)
    entries = _standby_entry(config, keys, standby) if standby else _worker_entries(keys, site)
    told: list[str] = []

    def changed(present: dict[str, Entry]) -> Mapping[str, Entry]:
        kept = dict(present)
        for key, entry in entries.items():
            told.append(_let_in(kept, key, entry, replace))
        return kept

    _allowed(config).change(changed)
    if standby:
        save_public(config.keys / standby, keys[0].encode())  # by which this host's server knows it when it asks it
    return told


def _check_keys(keys: Sequence[str]) -> None:
    for key in keys:
        if not is_key(key.encode()):
            raise UserError(f'"{key}": is not a public key; it must be 40 characters of Z85, in single quotes')
    if len(set(keys)) != len(keys):
        raise UserError("the same key is given twice; every worker has its own")


def _worker_entries(keys: Sequence[str], site: str) -> dict[str, Entry]:
    if not NAME.fullmatch(site):
        raise UserError(f'--site "{site}": must be {NAME_ALLOWED}')
    names = workers_of(site, len(keys))
    return {key: Entry(role="worker", site=site, worker=name) for key, name in zip(keys, names, strict=True)}


def _standby_entry(config: RunConfig, keys: Sequence[str], standby: str) -> dict[str, Entry]:
    if standby not in config.standbys:
        raise UserError(f'--standby "{standby}": {config.path} has no table [standbys.{standby}]')
    if len(keys) != 1:
        raise UserError(f"--standby {standby}: one key is needed, {len(keys)} are given")
    return {keys[0]: Entry(role="standby", site=config.standbys[standby].site, worker=standby)}


def _let_in(entries: dict[str, Entry], key: str, entry: Entry, replace: bool) -> str:
    if entries.get(key) == entry:
        return f"{entry.worker} was let in already: {key}"
    if key in entries:
        name = entries[key].worker
        raise UserError(f"{key} is {name}'s key; if it shall be {entry.worker}'s: hetero-async keys revoke {name}")
    others = [other for other, held in entries.items() if held.worker == entry.worker]
    if others and not replace:
        raise UserError(
            f"{entry.worker} is let in with another key, {others[0]}; add --replace if this one shall take its place"
        )
    for other in others:
        del entries[other]
    entries[key] = entry
    return f"let in {entry.worker}: {key}" + (f"; {others[0]} is refused from now on" if others else "")


# --- revoke ---


def revoke(config: RunConfig, who: Sequence[str], site: str) -> list[str]:
    """Shut out workers, by name or key, or all keys of a site. Says whom, a line a key."""
    if not who and not site:
        raise UserError("say whom to shut out: a worker's name, a key, or --site NAME")
    told: list[str] = []

    def changed(present: dict[str, Entry]) -> Mapping[str, Entry]:
        for name in who:
            if name not in present and not any(entry.worker == name for entry in present.values()):
                raise UserError(f'nobody is let in by the name or key "{name}"; who is, shows: {LIST_VERB}')
        if site and not any(entry.site == site for entry in present.values()):
            raise UserError(f'--site "{site}": none of its keys is let in; whose are, shows: {LIST_VERB}')
        struck = {key: e for key, e in present.items() if key in who or e.worker in who or (site and e.site == site)}
        told.extend(f"shut out {entry.worker}: {key} is refused from now on" for key, entry in struck.items())
        return {key: entry for key, entry in present.items() if key not in struck}

    _allowed(config).change(changed)
    return told


def _allowed(config: RunConfig) -> AllowList:
    if not config.allowed.exists():
        raise ConfigError(f"{config.allowed}: there is no such list; keys are let in and shut out on the server's host")
    return AllowList(config.allowed)


# --- rotate ---


def rotate(config: RunConfig, names: Sequence[str]) -> list[str]:
    """New keys in the place of those of that name: the server's, or by default on a site's host all of its workers'.

    Says what each side must do now.
    """
    is_server_here = _secret(config, SERVER).exists()
    names = names or ([SERVER] if is_server_here else [worker for _, worker in config.workers()])
    for name in names:
        if not _secret(config, name).exists():
            there = sorted(path.stem for path in config.keys.glob("*.secret"))
            raise UserError(f'"{name}": there is no such key here; there is: {", ".join(there) or "none"}')
    told: list[str] = []
    for name in names:
        old, new = public_of(config.keys / name), replace_keypair(config.keys / name)
        told.append(f"{name} has a new key: {new.decode()}")
        if config.allowed.exists():
            _allowed(config).change(functools.partial(_renamed, old.decode(), new.decode()))
    return [*told, *_next_steps(config, names)]


def _renamed(old: str, new: str, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
    return {new if key == old else key: entry for key, entry in entries.items()}


def _next_steps(config: RunConfig, names: Sequence[str]) -> list[str]:
    if SERVER in names:
        return [
            "a running server keeps its old key until it is started again. Then all workers wait, and lose nothing,",
            "until on the host of each site: its join-site (or work) is stopped, keys/server.public removed, and",
            f"    {join_line(config)}",
        ]
    if config.allowed.exists():
        return ["the old keys are refused from now on; running workers come back with the new ones by themselves"]
    lines = []
    for site, table in config.sites.items():
        publics = [public_of(config.keys / name) for name in workers_of(site, table.workers)]
        lines.append(f"    {allow_line(site, publics, '--replace')}")
    return [
        "the old keys stay good for connections that there are, until on the server's host this is done:",
        *lines,
        "then running workers come back with the new ones by themselves",
    ]


def _secret(config: RunConfig, name: str) -> Path:
    return config.keys / f"{name}.secret"
