"""An etcd cluster whose members are hosts of their own in the sites' network, as the witness of a run there."""

import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

import trio
from network.sites import Sites

from hetero_async.core.reign import Sighting
from hetero_async.errors import WitnessAway
from hetero_async.shell.witness import open_witness

CLIENT_PORT, PEER_PORT = 2379, 2380
# As long as a member that is loaded by the tests around it may take to be heard, and short for the sake of the tests.
HEARTBEAT_MS, ELECTION_MS = 50, 500
# A question that met members that are not up yet, or choose a leader, is asked again for so long.
ANSWER_SECONDS, ASK_AGAIN_SECONDS = 60.0, 0.1


class Members:
    """One member on each of these hosts. Leaving it kills them."""

    def __init__(self, sites: Sites, directory: Path, hosts: tuple[str, ...]) -> None:
        self.hosts = hosts
        self.urls = [self._url(sites, host, CLIENT_PORT) for host in hosts]
        self._sites = sites
        self._directory = directory
        self._processes: list[subprocess.Popen[bytes]] = []

    @staticmethod
    def _url(sites: Sites, host: str, port: int) -> str:
        return f"http://{sites.address(host)}:{port}"

    def __enter__(self) -> "Members":
        self._directory.mkdir(parents=True)
        for host in self.hosts:
            self._start(host)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def _start(self, host: str) -> None:
        client, peer = (self._url(self._sites, host, port) for port in (CLIENT_PORT, PEER_PORT))
        options = {
            "name": host,
            "data-dir": str(self._directory / host),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": ",".join(f"{other}={self._url(self._sites, other, PEER_PORT)}" for other in self.hosts),
            "heartbeat-interval": str(HEARTBEAT_MS),
            "election-timeout": str(ELECTION_MS),
            "logger": "zap",
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        words = self._sites.command(host, "etcd", *(f"--{name}={value}" for name, value in options.items()))
        with (self._directory / f"{host}.log").open("wb") as log:
            self._processes.append(subprocess.Popen(words, stdout=log, stderr=log, env=environment))

    def sighting(self, host: str, run: str, lease_seconds: float) -> Sighting:
        """What the witness says to somebody who asks on that host, by the product's own question."""

        async def look() -> Sighting:
            ends_at = trio.current_time() + ANSWER_SECONDS
            async with open_witness(self.urls, run, lease_seconds) as witness:
                while True:
                    try:
                        return await witness.look()
                    except WitnessAway:
                        if trio.current_time() > ends_at:
                            raise
                    await trio.sleep(ASK_AGAIN_SECONDS)

        return self._sites.inside(host, lambda: trio.run(look))


def why_no_witness() -> str:
    """Why there can be no members here; "" when there can."""
    return "" if shutil.which("etcd") else "etcd is not installed (apt-get install etcd-server)"
