"""Three hosts, set up as deploy/README.md says: they train, lose the server's host, are upgraded, move the server."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from deploy.units import PATIENCE_SECONDS, Host, Installing, Service
from e2e.harness import until
from network.sites import Sites, why_not
from network.witness import why_no_witness

from hetero_async.config import RunConfig
from hetero_async.core.records import Delta
from hetero_async.looking import verify_directory
from hetero_async.shell.segments import read_log

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests/e2e/tiny.py"
ENVIRONMENT = Path(sys.executable).parents[1]
SAMPLES, RUN, NEWER = 12_000, "big", "0.1.99"
MORE_DELTAS = 3
# How the standby comes to serve when the server's host is lost.
TAKEN_OVER = [
    pytest.param(True, id="by etcd", marks=pytest.mark.skipif(bool(why_no_witness()), reason=why_no_witness())),
    pytest.param(False, id="by hand", marks=[] if why_no_witness() else pytest.mark.soak),
]


class Hosts:
    """`a` with the server, `b` with the standby, `c` with a site of one worker; with a witness a member of etcd on
    each."""

    def __init__(self, sites: Sites, directory: Path, has_witness: bool) -> None:
        self.a, self.b, self.c = self.all = [Host(sites, name, directory) for name in "abc"]
        self.hold = directory / "hold"
        self.has_witness = has_witness

    def services(self) -> list[Service]:
        return [service for host in self.all for service in host.services.values()]

    def wait(self, holds: Callable[[], object], what: str) -> None:
        def looked() -> object:
            for service in self.services():
                service.tend()
            return holds()

        until(looked, what, PATIENCE_SECONDS, self.story)

    def story(self) -> str:
        return "\n".join(f"--- {s.host.name} {s.name}:\n{s.journal.read_text()[-3000:]}" for s in self.services())

    def deltas(self, node: str) -> int:
        """How many the log of that node holds."""
        log = self.log(node)
        entries = read_log(log, None) if list(log.glob("*.log")) else iter(())
        return sum(isinstance(entry.record, Delta) for entry in entries)

    def log(self, node: str) -> Path:
        host = {"server": self.a, "b": self.b}[node]
        return RunConfig.load(host.directory(RUN) / "run.toml").node(node).log

    def go_on(self, node: str) -> None:
        """The worker trains until that node has more of its deltas in its log, and is held again."""
        self.hold.unlink(missing_ok=True)
        goal = self.deltas(node) + MORE_DELTAS
        self.wait(lambda: self.deltas(node) >= goal, f"{node} has more deltas")
        self.hold.touch()

    def let_in(self, installing: Installing) -> None:
        """What it prints for the operator of the server is said there, and it ends."""
        with installing:
            allow = r"^ +(hetero-async keys allow .*)$"
            self.wait(lambda: re.search(allow, installing.said(), re.MULTILINE), "it says how to let it in")
            [line] = set(re.findall(allow, installing.said(), re.MULTILINE))
            self.a.operate(RUN, *shlex.split(line))
            self.wait(lambda: installing.process.poll() is not None, "it is let in")
            assert installing.process.returncode == 0, installing.said()

    def await_said(self, host: Host, words: str) -> None:
        journal = host.services[f"hetero-async-server@{RUN}"].journal
        self.wait(lambda: words in journal.read_text(), f"{host.name} says '{words}'")

    def await_level(self, server: Host, standby: str) -> None:
        """The standby has all of it and, where there is a witness, is known there to have it."""
        self.wait(lambda: self.deltas("b") == self.deltas("server"), f"{standby} has all of it")
        if self.has_witness:
            self.wait(lambda: self._partners(server)[-1:] == [standby], f"{standby} is the partner")

    def _partners(self, server: Host) -> list[str]:
        """One after another, since it serves."""
        told = server.services[f"hetero-async-server@{RUN}"].journal.read_text()
        return re.findall(r"partner standby=(\S+)", told.rpartition(" serving run=")[2])


@contextmanager
def hosts(directory: Path, has_witness: bool) -> Iterator[Hosts]:
    with Sites("a", "b", "c") as sites:
        made = Hosts(sites, directory, has_witness)
        try:
            yield made
        finally:
            for service in made.services():
                service.close()


def newer(directory: Path) -> Path:
    """An environment with a later version of this package, installed by pip, and with all else that ours has."""
    source, environment = directory / "source", directory / "newer"
    source.mkdir()
    shutil.copytree(ROOT / "hetero_async", source / "hetero_async", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "README.md", source)
    text = (ROOT / "pyproject.toml").read_text()
    (source / "pyproject.toml").write_text(re.sub(r'(?m)^version = ".*"', f'version = "{NEWER}"', text))
    pip = ["install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    [packages] = environment.glob("lib/python3*/site-packages")
    ours = next(path for path in map(Path, sys.path) if path.name == "site-packages")
    (packages / "ours.pth").write_text(f"{ours}\n")
    program = [sys.executable, "-m", "pip", "--python", environment / "bin/python"]
    subprocess.run([*program, *pip, source], check=True, cwd=directory, timeout=PATIENCE_SECONDS)
    return environment


def set_up(here: Hosts) -> None:
    """The walkthrough."""
    a, b, c = here.all
    here.hold.touch()
    given = ["--environment", ENVIRONMENT]
    members = ",".join(f"{host.name}={host.address}" for host in here.all)
    etcd = [f"--etcd=http://{host.address}:2379" for host in here.all if here.has_witness]
    for host in here.all if here.has_witness else []:
        host.install("witness", "--member", host.name, "--members", members)
        host.start("hetero-async-witness")
    addresses = [f"--address=tcp://{a.address}:7710", f"--standby=b=tcp://{b.address}:7710"]
    told = a.install("server", RUN, *given, "--", "--samples", SAMPLES, *addresses, *etcd)
    [address] = set(re.findall(r"'(tcp://\S+#.*)'", told))
    a.start(f"hetero-async-server@{RUN}")
    here.let_in(b.installing("standby", RUN, "--name", "b", "--join", address, *given))
    b.start(f"hetero-async-server@{RUN}")
    train = f"{sys.executable} {TINY} --hold {here.hold}"
    site = ["--site", "c", "--workers", 1, "--train", train]
    here.let_in(c.installing("site", RUN, *site, "--join", address, *given))
    c.start(f"hetero-async-site@{RUN}")


def upgrade(host: Host, environment: Path, *words: str) -> None:
    """install.sh again, and what it would have systemd do."""
    before = (host.root / "opt/hetero-async/current").resolve()
    host.install(words[0], RUN, *words[1:], "--environment", environment)
    assert (host.root / "opt/hetero-async/current").resolve() != before
    host.start(f"hetero-async-server@{RUN}")


@pytest.mark.parametrize("has_witness", TAKEN_OVER)
def test_three_hosts_lose_the_server_s_are_upgraded_move_the_server_and_nothing_is_lost(
    tmp_path: Path, has_witness: bool
) -> None:
    with hosts(tmp_path, has_witness) as here:
        a, b, c = here.all
        set_up(here)
        later = newer(tmp_path)
        here.go_on("server")
        here.await_level(a, "b")
        here.wait(lambda: all(service.is_heard() for service in here.services()), "each unit says that it lives")
        upgrade(b, later, "standby", "--name", "b")
        here.go_on("server")
        here.await_level(a, "b")

        a.lose()
        if not here.has_witness:
            b.operate(RUN, "hetero-async", "promote", "--name", "b", "--yes")
        here.await_said(b, "takes over")
        if here.has_witness:
            here.go_on("b")
            a.start("hetero-async-witness")
        upgrade(a, later, "server")
        here.await_said(a, "standing by")
        if not here.has_witness:
            here.go_on("b")  # until now no standby confirmed anything, and nobody could know that
        here.await_level(b, "server")

        a.operate(RUN, "hetero-async", "promote", "--name", "server")
        here.await_said(a, "takes over")
        here.go_on("server")
        here.await_level(a, "b")
        here.hold.unlink()
        site = c.services[f"hetero-async-site@{RUN}"]
        here.wait(lambda: not site.is_wanted, "the run is trained")
        assert site.process.returncode == 0, here.story()
        here.wait(lambda: here.deltas("b") == here.deltas("server"), "and its standby has the end")
        for host in (b, a):
            host.services[f"hetero-async-server@{RUN}"].stop()
        hold_against_the_notes(here)


def hold_against_the_notes(here: Hosts) -> None:
    """Every promise, with what the workers noted of acknowledgements; they lie on another host."""
    for node, host in (("server", here.a), ("b", here.b)):
        shutil.copytree(here.c.directory(RUN) / "workers", host.directory(RUN) / "workers")
        verdict = verify_directory(here.log(node), lambda _: None)
        assert verdict.is_ok, verdict.lines()
        assert verdict.acknowledged > 0
        assert (verdict.samples, verdict.samples_twice, verdict.lost) == (SAMPLES, 0, [])
        assert verdict.state.term == 3
