"""A run whose servers and workers each live in a site of their own: the harness of e2e, over the sites' network."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from e2e.harness import Life, Run
from network.sites import Sites, enter

from hetero_async.asking import Status
from hetero_async.shell import wire

PORT = 7710
LEASE_SECONDS = 2.0  # of the witness


class SpreadRun(Run):
    """`workers`: how many at each site. The server is in the first. `homes` says where a life of that name starts.

    `standbys`: their sites, after which they are named. `etcd`: the members' URLs.
    """

    def __init__(
        self,
        sites: Sites,
        directory: Path,
        *,
        workers: dict[str, int],
        server: dict[str, Any] | None = None,
        standbys: Sequence[str] = (),
        etcd: Sequence[str] = (),
        lease_seconds: float = LEASE_SECONDS,
        connection_seconds: float = 0.0,
        **options: Any,
    ) -> None:
        """`connection_seconds`: end a connection without an answer so soon, in place of the product's minute."""
        self.sites = sites
        home = next(iter(workers))
        super().__init__(
            directory,
            sites=workers,
            server={"site": home, **self.place(home)} | (server or {}),
            standbys=standbys,
            witness={"etcd": list(etcd), "lease_seconds": lease_seconds},
            **options,
        )
        self.connection_seconds = connection_seconds
        self.homes = (
            {"server": home}
            | {name: name for name in standbys}
            | {worker: site for site, worker in self.config.workers()}
        )

    def place(self, site: str) -> dict[str, str]:
        return {"address": f"tcp://{self.sites.address(site)}:{PORT}", "bulk_address": ""}

    def _start(self, name: str, output: Path, target: Callable[..., None], *arguments: object) -> Life:
        namespace = self.sites.namespace(self.homes[name])
        return super()._start(name, output, life_inside, namespace, self.connection_seconds, target, *arguments)

    def status(self) -> Status:
        return self.sites.inside(self.homes["server"], super().status)


def life_inside(namespace: str, connection_seconds: float, life: Callable[..., None], *arguments: object) -> None:
    """Any of the harness' lives, in a namespace: entered before the first thread or socket is made."""
    enter(namespace)
    if connection_seconds:
        wire.CONTROL, wire.BULK = (_impatient(settings, connection_seconds) for settings in (wire.CONTROL, wire.BULK))
    life(*arguments)


def _impatient(settings: wire.Settings, seconds: float) -> wire.Settings:
    milliseconds = int(1000 * seconds)
    return replace(
        settings, heartbeat_every=settings.heartbeat_every and milliseconds // 4, heartbeat_timeout=milliseconds
    )
