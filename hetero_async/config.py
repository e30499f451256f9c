"""run.toml as the frozen values that the software uses, and where the files of a run lie.

The command line and `join` load it. It opens no log, key or socket; paths are only worked out here.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hetero_async.complaints import SERVER, one_of, read, shown
from hetero_async.core.records import RunSettings
from hetero_async.core.replication import Durability
from hetero_async.errors import ConfigError
from hetero_async.tables import (
    File,
    RunTable,
    ServerTable,
    SiteTable,
    StandbyTable,
    TrainingTable,
    WitnessTable,
    bulk_address,
)

# How `hetero-async work` tells a training script what it is part of.
ENV_RUN = "HETERO_ASYNC_RUN"
ENV_WORKER = "HETERO_ASYNC_WORKER"
# Keys of [server] and of a standby's table.
TOLD_OF_SERVERS = ("site", "address", "bulk_address")


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One that serves, or stands by to do so: its name, where it is reached, and where its log and checkpoints lie."""

    name: str
    site: str
    control: str
    bulk: str
    dashboard: str
    directory: Path

    @property
    def best(self) -> Path:
        return self.directory / "best"

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def admin(self) -> Path:
        """Where the operator's socket is, while it runs."""
        return self.directory / "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """A run.toml that has been read and found good. Attributes are named as the file's tables and keys are."""

    path: Path
    run: RunTable
    server: ServerTable
    training: TrainingTable
    sites: Mapping[str, SiteTable]
    standbys: Mapping[str, StandbyTable]
    witness: WitnessTable

    @staticmethod
    def load(path: Path) -> "RunConfig":
        """Read run.toml. Raises ConfigError, one line, for the first thing that is wrong with it."""
        file = read(path)
        return RunConfig(path=path, **{name: getattr(file, name) for name in File.model_fields if name != "plan"})

    def settings(self) -> RunSettings:
        """The part that the log's first record fixes."""
        run = self.run.model_dump(include={"seed", "samples", "passes"})
        return RunSettings(run=self.run.name, **run, **self.training.model_dump())

    def durability(self) -> Durability:
        """What an acknowledgement waits for."""
        return Durability(
            durability=self.server.durability,
            when_alone=self.server.when_alone,
            has_witness=bool(self.witness.etcd),
            lease_ms=int(1000 * self.witness.lease_seconds),
        )

    @property
    def directory(self) -> Path:
        return (self.path.parent / self.run.directory).resolve()

    @property
    def keys(self) -> Path:
        return self.directory / "keys"

    @property
    def allowed(self) -> Path:
        """The list of keys that are let in; it lies where a server does."""
        return self.keys / "allowed.json"

    def told_to_sites(self) -> dict[str, Any]:
        """What a site's host must know of it. How the server's own host is set up is nobody else's business."""
        return {
            "run": self.run.model_dump(exclude={"directory"}, exclude_defaults=True),
            "server": {key: getattr(self.server, key) for key in TOLD_OF_SERVERS},
            "training": self.training.model_dump(exclude_defaults=True),
            "standbys": {
                name: {key: getattr(table, key) for key in TOLD_OF_SERVERS} for name, table in self.standbys.items()
            },
        }

    def told_to_standbys(self) -> dict[str, Any]:
        """What a standby's host must know: as much as the server's own, since it may take its place."""
        tables = {"server": self.server, "witness": self.witness}
        return self.told_to_sites() | {name: table.model_dump(exclude_defaults=True) for name, table in tables.items()}

    def nodes(self) -> dict[str, Node]:
        """The server that the run began with, and its standbys, in the order in which they are tried."""
        server = self.server
        first = Node(
            name=SERVER,
            site=server.site,
            control=server.address,
            bulk=bulk_address(server),
            dashboard=server.dashboard,
            directory=self.directory,
        )
        return {SERVER: first} | {
            name: Node(
                name=name,
                site=table.site,
                control=table.address,
                bulk=bulk_address(table),
                dashboard=table.dashboard,
                directory=(self.path.parent / (table.directory or f"standby-{name}")).resolve(),
            )
            for name, table in self.standbys.items()
        }

    def node(self, name: str) -> Node:
        """Raises ConfigError when there is none of that name."""
        nodes = self.nodes()
        if name not in nodes:
            raise ConfigError(f"{self.path}: there is no standby {shown(name)}; there is: {', '.join(nodes)}")
        return nodes[name]

    @property
    def log(self) -> Path:
        return self.directory / "log"

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    def worker_directory(self, worker: str) -> Path:
        """Where that worker keeps its outbox."""
        return self.directory / "workers" / worker

    def workers(self) -> list[tuple[str, str]]:
        """Every worker of the run as (site, worker's name)."""
        return [(site, f"{site}-{index}") for site, table in self.sites.items() for index in range(table.workers)]


def from_environment() -> tuple[RunConfig, str]:
    """The run and the worker's name that `hetero-async work` started this process for. Raises ConfigError."""
    if not os.environ.get(ENV_RUN) or not os.environ.get(ENV_WORKER):
        raise ConfigError(
            f"{ENV_RUN} and {ENV_WORKER} are not set; "
            "start this script with: hetero-async work --site NAME -- python train.py"
        )
    config, worker = RunConfig.load(Path(os.environ[ENV_RUN])), os.environ[ENV_WORKER]
    names = [name for _, name in config.workers()]
    if worker not in names:
        raise ConfigError(f"{ENV_WORKER} = {shown(worker)}: must be {one_of(names)} ({config.path})")
    return config, worker
