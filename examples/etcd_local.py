"""An etcd cluster of three members on this machine, as the witness of a run that is tried out here.

    python examples/etcd_local.py runs/etcd

It prints the line for run.toml and runs until Ctrl-C. run_failover.py and tests start one in the same way. A real
cluster has its members in three sites, and longer election timers.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import httpx2

from hetero_async.errors import ConfigError

MEMBERS = 3
# Loopback answers at once: a member that is not heard of for so long is gone, and the others elect.
HEARTBEAT_MS, ELECTION_MS = 50, 500
READY_SECONDS = 30.0
LOOK_SECONDS = 0.05
# Outside the range from which the kernel gives ports to outgoing connections: a killed member finds its own again.
PORTS = range(20_000, 32_000)
INSTALL = "etcd is not installed; on Debian and Ubuntu: apt-get install etcd-server"


class LocalCluster:
    """Members 0, 1 and 2, each with its data and log in `directory`. Leaving it kills them.

    Raises ConfigError when etcd is not installed, or does not start.
    """

    def __init__(self, directory: Path) -> None:
        require_etcd()
        directory.mkdir(parents=True, exist_ok=True)
        free = _free_ports()
        self.directory = directory
        self.urls = [f"http://127.0.0.1:{next(free)}" for _ in range(MEMBERS)]
        self._peers = [f"http://127.0.0.1:{next(free)}" for _ in range(MEMBERS)]
        self._processes: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "LocalCluster":
        with contextlib.ExitStack() as stack:
            stack.callback(self.stop)
            self.restore()
            stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    def start(self, member: int) -> None:
        """Start a member that does not run; with what it knew when it ended."""
        assert member not in self._processes, f"member {member} runs"
        options = {
            "name": f"member-{member}",
            "data-dir": str(self.directory / f"member-{member}"),
            "listen-client-urls": self.urls[member],
            "advertise-client-urls": self.urls[member],
            "listen-peer-urls": self._peers[member],
            "initial-advertise-peer-urls": self._peers[member],
            "initial-cluster": ",".join(f"member-{number}={peer}" for number, peer in enumerate(self._peers)),
            "initial-cluster-token": self._peers[0],
            "heartbeat-interval": str(HEARTBEAT_MS),
            "election-timeout": str(ELECTION_MS),
            "logger": "zap",
        }
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        with self._log(member).open("ab") as log:
            self._processes[member] = subprocess.Popen(
                ["etcd", *(f"--{name}={value}" for name, value in options.items())],
                stdout=log, stderr=subprocess.STDOUT, env=environment,
            )  # fmt: skip

    def kill(self, *members: int) -> None:
        """SIGKILL, all at once; gone on return."""
        self.strike(*members)
        self.await_end(*members)

    def strike(self, *members: int) -> None:
        """SIGKILL, and do not wait."""
        for member in members:
            self._processes[member].kill()

    def await_end(self, *members: int) -> None:
        """Of those that were struck."""
        for member in members:
            self._processes.pop(member).wait()

    def freeze(self, *members: int) -> None:
        for member in members:
            self._processes[member].send_signal(signal.SIGSTOP)

    def thaw(self, *members: int) -> None:
        for member in members:
            self._processes[member].send_signal(signal.SIGCONT)

    def restore(self) -> None:
        """All members run, and answer."""
        self.thaw(*self._processes)
        for member in range(MEMBERS):
            if member not in self._processes:
                self.start(member)
        self.await_ready()

    def stop(self) -> None:
        """Kill whatever runs, frozen or not."""
        self.kill(*self._processes)

    def await_ready(self) -> None:
        """Until each member that runs has answered with a majority behind it."""
        deadline = time.monotonic() + READY_SECONDS
        with httpx2.Client(timeout=1.0, trust_env=False) as client:
            for member, process in self._processes.items():
                while not _answers(client, self.urls[member]):
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise ConfigError(f"etcd's member {member} has not started; see {self._log(member)}")
                    time.sleep(LOOK_SECONDS)

    def leader(self) -> int:
        """The member that leads; ask when all are ready."""
        with httpx2.Client(timeout=READY_SECONDS, trust_env=False) as client:
            for member in self._processes:
                status = client.post(f"{self.urls[member]}/v3/maintenance/status", json={}).json()
                if status["leader"] == status["header"]["member_id"]:
                    return member
        raise ConfigError(f"etcd has no leader; see the logs in {self.directory}")

    def _log(self, member: int) -> Path:
        return self.directory / f"member-{member}.log"


def require_etcd() -> None:
    """Raises ConfigError when etcd is not installed."""
    if shutil.which("etcd") is None:
        raise ConfigError(INSTALL)


def _answers(client: httpx2.Client, url: str) -> bool:
    """etcd's own test of health: something is agreed on by a majority."""
    with contextlib.suppress(httpx2.HTTPError):
        return client.get(f"{url}/health").status_code == httpx2.codes.OK
    return False


def _free_ports() -> Iterator[int]:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        yield port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    with LocalCluster(parser.parse_args().directory) as cluster:
        urls = ", ".join(f'"{url}"' for url in cluster.urls)
        print(f"[witness]\netcd = [{urls}]", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
