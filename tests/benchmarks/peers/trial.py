"""One peer in one scenario: its processes are started, one is killed half way, and what has ended is started again."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from judge import models, notes
from network.sites import Sites
from places import COORDINATOR, Host
from wan import bytes_sent, hosts_on
from workload import BUDGET_STEPS, PID, SPEEDS

LOOK_SECONDS = 0.2
START_SECONDS = 60.0  # to the first step
LIMIT_SECONDS = 90.0  # from there
LEAVE_SECONDS = 5.0  # for the processes, after the budget is in the model
RESTART_SECONDS = 3.0  # of a service manager
COORDINATOR_AWAY_SECONDS = 10.0
VICTIM = "w1"


@dataclass(frozen=True, slots=True)
class Scenario:
    kills: str = ""  # "worker" or "coordinator", when half of the budget is trained
    megabits_per_second: float = 0.0  # 0: open
    delay_seconds: float = 0.0  # one way


SCENARIOS = {
    "open": Scenario(),
    "100 Mbit/s, 40 ms": Scenario(megabits_per_second=100.0, delay_seconds=0.02),
    "worker killed": Scenario(kills="worker"),
    "coordinator killed": Scenario(kills="coordinator"),
}


@dataclass
class Trial:
    """`directory` is new and empty; afterwards the notes of everybody lie in it."""

    peer: ModuleType
    options: Mapping[str, str]
    scenario: Scenario
    directory: Path
    started: float = field(default_factory=time.time)
    kills: list[tuple[float, str]] = field(default_factory=list)
    starts: Counter[str] = field(default_factory=Counter)
    bytes_sent: int = 0
    ended: float = 0.0

    def run(self) -> None:
        scenario = self.scenario
        with (
            Sites(COORDINATOR, *SPEEDS) as sites,
            hosts_on(sites, scenario.megabits_per_second, scenario.delay_seconds) as hosts,
        ):
            self._sites, self._hosts = sites, hosts
            self._lives: dict[str, subprocess.Popen[bytes]] = {}
            self._due: dict[str, float] = {}  # when what has ended is started again
            try:
                self._processes = {
                    each.name: each for each in self.peer.processes(hosts, self.directory, **self.options)
                }
                for name in self._processes:
                    self._start(name)
                self._watch()
                self.bytes_sent, self.ended = bytes_sent(sites), time.time()
            finally:
                self._end()

    def _watch(self) -> None:
        """Until the budget is in the model and all have left, or it has taken too long."""
        done_at = 0.0
        while True:
            time.sleep(LOOK_SECONDS)
            now, trained = time.time(), notes(self.directory)
            first = min((note["time"] for note in trained), default=0.0)
            if now > (first + LIMIT_SECONDS if first else self.started + START_SECONDS):
                return
            if not done_at and any(model["steps"] >= BUDGET_STEPS for model in models(self.directory)):
                done_at = now
            if done_at and (now > done_at + LEAVE_SECONDS or not self._alive()):
                return
            is_half_way = len(trained) >= BUDGET_STEPS / 2 or now > (first or now) + LIMIT_SECONDS / 2
            if self.scenario.kills and not self.kills and is_half_way:
                self._kill(now)
            if not done_at:
                self._restart(now, counts=bool(trained))

    def _kill(self, now: float) -> None:
        if self.scenario.kills == "worker":
            pid = int((self.directory / f"{VICTIM}.{PID}").read_text())
            if not Path(f"/proc/{pid}").exists():
                return  # a worker that is started for each round, and this is between two
            self.kills.append((now, VICTIM))
        else:
            name = self.peer.COORDINATOR_PROCESS
            pid = self._lives[name].pid
            self.kills.append((now, name))
            self._due[name] = now + COORDINATOR_AWAY_SECONDS
        for each in [*descendants(pid), pid]:
            _quietly(lambda each=each: os.kill(each, signal.SIGKILL))

    def _restart(self, now: float, *, counts: bool) -> None:
        """Before the first step they may have come too early for one another, which counts for nothing."""
        for name, life in self._lives.items():
            if life.poll() and name not in self._due:
                self._due[name] = now + RESTART_SECONDS
        for name, due in list(self._due.items()):
            if now >= due:
                del self._due[name]
                for each in (name, *getattr(self.peer, "FOLLOWS", {}).get(name, ())):
                    self._start(each, is_again=True)
                    self.starts[each] += counts

    def _start(self, name: str, *, is_again: bool = False) -> None:
        process = self._processes[name]
        command = (is_again and process.again) or process.command
        host: Host = self._hosts[process.host]
        told = {"PEER_WORKER": process.host, "PEER_RUN": str(self.directory), "PYTHONUNBUFFERED": "1"}
        told["PATH"] = f"{Path(command[0]).parent}:{os.environ['PATH']}"  # as in an activated environment
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host.address, *command]
        with (self.directory / f"{name}.log").open("ab") as log:
            self._lives[name] = subprocess.Popen(
                self._sites.command(process.host, *named),
                env={**os.environ, "OMP_NUM_THREADS": "1", **told, **process.environment},
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                cwd=self.directory,
            )  # fmt: skip

    def _alive(self) -> bool:
        return any(life.poll() is None for name, life in self._lives.items() if name in SPEEDS)

    def _end(self) -> None:
        """Nothing in the namespaces lives on, whoever its parent is."""
        inodes = {os.stat(self._sites.namespace(name)).st_ino for name in self._sites.names}
        while found := [pid for pid in pids() if _namespace(pid) in inodes]:
            for pid in found:
                _quietly(lambda pid=pid: os.kill(pid, signal.SIGKILL))
            time.sleep(LOOK_SECONDS)
        for life in self._lives.values():
            life.wait()


def pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def descendants(pid: int) -> list[int]:
    """Children, and theirs."""
    children = [
        int(child) for each in Path("/proc").glob(f"{pid}/task/*/children") for child in each.read_text().split()
    ]
    return [each for child in children for each in (child, *descendants(child))]


def _namespace(pid: int) -> int:
    """The inode of its network; 0 when it has ended, zombies included."""
    return _quietly(lambda: os.stat(f"/proc/{pid}/ns/net").st_ino)


def _quietly(call: Callable[[], int | None]) -> int:
    try:
        return call() or 0
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
