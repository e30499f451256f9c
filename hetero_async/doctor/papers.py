"""Keys: those that this host needs, in files that nobody else can read, and let in by the list where there is one."""

import functools
from collections.abc import Iterator

from hetero_async.complaints import OPERATOR
from hetero_async.config import RunConfig
from hetero_async.doctor.findings import Finding, failed, told_by, warning
from hetero_async.errors import ConfigError
from hetero_async.ports import Peer
from hetero_async.roster import allow_line
from hetero_async.shell.keys import AllowList, load_public, load_secret, public_half


def names_here(config: RunConfig) -> list[str]:
    """All of the run whose secret keys lie on this host."""
    names = [*config.nodes(), OPERATOR, *(worker for _, worker in config.workers())]
    return [name for name in names if (config.keys / f"{name}.secret").exists()]


def keys(config: RunConfig, nodes_here: list[str]) -> Iterator[Finding]:
    names = names_here(config)
    if not names:
        yield failed("keys", f"{config.keys} has no key of this run: hetero-async join-site makes a site's")
    for name in config.nodes():
        if name not in names:
            yield from told_by(f"key of {name}", functools.partial(_pinned, config, name))
    listed = _listed(config) if nodes_here else {}
    if isinstance(listed, Finding):
        yield listed
        listed = {}
    for name in names:
        yield from told_by(f"key of {name}", functools.partial(_own, config, name))
        if listed:
            yield from _is_let_in(config, name, listed)
    if not nodes_here:
        lacking = [worker for _, worker in config.workers() if worker not in names]
        for worker in lacking:
            yield warning(f"key of {worker}", "is not on this host: join-site makes it, or lower workers in run.toml")


def _pinned(config: RunConfig, name: str) -> str:
    return f"pinned: {load_public(config.keys / f'{name}.public').decode()}"


def _own(config: RunConfig, name: str) -> str:
    """Raises ConfigError."""
    public = public_half(load_secret(config.keys / f"{name}.secret"))
    path = config.keys / f"{name}.public"
    if path.exists() and load_public(path) != public:
        raise ConfigError(
            f"{path} is not that of {name}.secret: remove it, and whoever has it must be given the right one"
        )
    return "mode 0600, and its public half belongs to it"


def _listed(config: RunConfig) -> dict[bytes, Peer] | Finding:
    allowed = AllowList(config.allowed)
    try:
        allowed.load()
    except ConfigError as error:
        return failed("list of keys", f"{error}; nobody can join")
    return {peer.key: peer for peer in allowed.peers()}


def _is_let_in(config: RunConfig, name: str, listed: dict[bytes, Peer]) -> Iterator[Finding]:
    try:
        public = public_half(load_secret(config.keys / f"{name}.secret"))
    except ConfigError:
        return  # which has been told
    site = next((site for site, worker in config.workers() if worker == name), "")
    if public not in listed:
        cure = allow_line(site, [public]) if site else "put the list back as it was when this key was made"
        yield failed(f"key of {name}", f"{config.allowed} does not list it: {cure}")
    elif listed[public].worker != name:
        yield failed(
            f"key of {name}", f"{config.allowed} lists it as {listed[public].worker}'s: hetero-async keys list"
        )
