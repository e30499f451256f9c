"""Hosts on which deploy/install.sh has installed services, and the little of systemd that starts those without it.

A host is a network namespace and a directory that stands for its root. What a service is, its unit file says: command
line, environment, directory, how it is stopped, after which ends it is started again, and whom it tells that it lives.
"""

import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from e2e.harness import until
from network.sites import Sites

INSTALL = Path(__file__).parents[2] / "deploy/install.sh"
PATIENCE_SECONDS = 120.0
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin"
# What a unit names in the host's own root; a program of the system's is the machine's.
OF_THE_HOST = re.compile(r"(?<![\w./])/(?=(?:opt|etc|var)/)")
# systemd tells a service by its own number which process shall say that it lives.
STARTED = ("sh", "-c", 'export WATCHDOG_PID=$$; exec "$@"', "sh")


class Unit:
    """The [Service] of a unit file as a host's systemd reads it. `instance`: what stands behind the @."""

    def __init__(self, root: Path, name: str) -> None:
        template, at, instance = name.partition("@")
        path = root / f"etc/systemd/system/{template}{at}.service"
        text = OF_THE_HOST.sub(f"{root}/", path.read_text().replace("%i", instance))
        lines = [line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#")]
        self.keys = {key: value for key, _, value in lines}
        assert Path(self.keys.get("ConditionPathExists", "/")).exists(), f"{name} would not be started"
        self.environment = dict(word.split("=", 1) for word in self.keys.get("Environment", "").split())
        for line in Path(self.keys["EnvironmentFile"]).read_text().splitlines():
            key, _, value = line.partition("=")
            self.environment[key] = value
        self.command = [word for given in shlex.split(self.keys["ExecStart"]) for word in self._substituted(given)]

    def _substituted(self, word: str) -> list[str]:
        """A `$NAME` that stands alone becomes so many words as there are in it, a `${NAME}` never."""
        if re.fullmatch(r"\$[A-Z]+", word):
            return self.environment[word[1:]].split()
        return [re.sub(r"\$\{([A-Z]+)\}", lambda found: self.environment[found[1]], word)]

    def is_started_again(self, code: int) -> bool:
        is_prevented = str(code) in self.keys.get("RestartPreventExitStatus", "").split()
        return not is_prevented and (self.keys["Restart"] == "always" or code != 0)


class Service:
    def __init__(self, host: "Host", name: str) -> None:
        self.name, self.host = name, host
        self.unit = Unit(host.root, name)
        self.journal = host.root.with_name(f"{host.name}-{name}.journal")
        self.told: set[bytes] = set()
        self.is_wanted = True
        notified = host.root / f"{name}.notify"
        notified.unlink(missing_ok=True)
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._notified.bind(str(notified))
        self._start()

    def _start(self) -> None:
        self.told.clear()
        unit = self.unit
        environment = {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", "NOTIFY_SOCKET": str(self._notified.getsockname())}
        if "WatchdogSec" in unit.keys:
            environment["WATCHDOG_USEC"] = f"{unit.keys['WatchdogSec']}000000"
        directory = Path(unit.keys.get("WorkingDirectory", self.host.root))
        with self.journal.open("ab") as journal:
            self.process = subprocess.Popen(
                self.host.command(*STARTED, *unit.command), cwd=directory, env=environment | unit.environment,
                stdout=journal, stderr=journal, start_new_session=True,
            )  # fmt: skip

    def tend(self) -> None:
        """What systemd does all the time: hear what it is told, start again what has ended."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.told.update(self._notified.recv(4096).split(b"\n"))
        code = self.process.poll()
        if self.is_wanted and code is not None:
            self.is_wanted = self.unit.is_started_again(code)
            if self.is_wanted:
                self._start()
            else:
                assert code == 0, f"{self.name} ended with {code}, for good:\n{self.journal.read_text()[-3000:]}"

    def is_heard(self) -> bool:
        words = {b"READY=1", b"WATCHDOG=1"} if "WatchdogSec" in self.unit.keys else {b"READY=1"}
        return words <= self.told

    def stop(self) -> None:
        self.is_wanted = False
        if self.unit.keys.get("KillMode") == "mixed":
            self.process.terminate()
        else:
            self.signal(signal.SIGTERM)
        self.process.wait(int(self.unit.keys.get("TimeoutStopSec", "90")))
        self.signal(signal.SIGKILL)  # what is left in its control group

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def close(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.wait()
        self._notified.close()


class Host:
    def __init__(self, sites: Sites, name: str, directory: Path) -> None:
        self.name, self.root = name, directory / name
        self.root.mkdir()
        self.services: dict[str, Service] = {}
        self.address = sites.address(name)
        self.command: Callable[..., list[str]] = lambda *words: sites.command(name, *map(str, words))

    def directory(self, run: str) -> Path:
        return self.root / "var/lib/hetero-async" / run

    def install(self, *words: object) -> str:
        with self.installing(*words) as told:
            until(lambda: told.process.poll() is not None, "install.sh ends", PATIENCE_SECONDS, told.said)
            assert told.process.returncode == 0, told.said()
            return told.said()

    def installing(self, *words: object) -> "Installing":
        """While it waits to be let in."""
        role, *rest = map(str, words)
        run = [rest.pop(0)] if role != "witness" else []
        return Installing(self, [str(INSTALL), role, *run, "--root", str(self.root), *rest])

    def operate(self, run: str, *words: str) -> str:
        """What the operator types on this host."""
        variables = {**os.environ, "HETERO_ASYNC_STATE": str(self.directory(run).parent)}
        typed = self.command(self.root / "usr/local/bin/hetero-async-in", run, *words)
        said = subprocess.run(
            typed, env=variables, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
        )
        assert said.returncode == 0, said.stdout + said.stderr
        return said.stdout

    def start(self, name: str) -> Service:
        if name in self.services:
            self.services[name].stop()
            self.services[name].close()
        self.services[name] = Service(self, name)
        return self.services[name]

    def lose(self) -> None:
        """Every process of the host, at once."""
        for service in self.services.values():
            service.is_wanted = False
            service.signal(signal.SIGKILL)
        for service in self.services.values():
            service.process.wait()


class Installing:
    def __init__(self, host: Host, words: list[str]) -> None:
        self._output = host.root.with_name(f"{host.name}-{time.monotonic_ns()}.install")
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(host.command(*words), stdout=output, stderr=output, start_new_session=True)

    def __enter__(self) -> "Installing":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def said(self) -> str:
        return self._output.read_text()
