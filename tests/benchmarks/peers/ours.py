"""hetero_async: the run.toml of `init`, `serve`, and a `work` for each site, all as they come; nothing is tuned."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from places import COORDINATOR, Host, Process
from workload import BATCH, BUDGET_STEPS, SPEEDS, Worker, keep

import hetero_async as ha

KEEP_EVERY = 0.02  # of the run
PORT, ETCD_PORT, ETCD_PEER_PORT = 7710, 2379, 2380
STANDBY, WITNESS = "w0", "w3"  # the hosts that these are on, where there are any
SETTINGS = "run.toml as `init` writes it (rule `auto`, windows of 32 steps of the fastest worker, int8 both ways)"
COORDINATOR_PROCESS = "serve"
BY_HAND = {
    "worker": "nothing: `work` starts it again",
    "coordinator": "start `serve` again (systemd does); with a standby nothing, it takes over",
}


def processes(hosts: Mapping[str, Host], directory: Path, *, standby: bool) -> list[Process]:
    """With a standby there is a witness too, and the old server comes back as a standby."""
    from hetero_async import roster
    from hetero_async.tables import template

    server: dict[str, object] = {"site": COORDINATOR, "address": _address(hosts, COORDINATOR)}
    text = template(
        run={"name": "peers", "samples": BUDGET_STEPS * BATCH},
        sites=dict.fromkeys(SPEEDS, 1),
        server=server | ({"durability": "replicated", "when_alone": "continue"} if standby else {}),
        standbys={"other": {"site": STANDBY, "address": _address(hosts, STANDBY)}} if standby else {},
        witness={"etcd": [f"http://{hosts[WITNESS].address}:{ETCD_PORT}"]} if standby else {},
    )
    run = ["--run", str(roster.initialize(directory / "run", text).path)]
    command = [sys.executable, "-m", "hetero_async"]
    serve = [*command, "serve", *run, "--exit-when-finished"]
    found = [Process("serve", COORDINATOR, serve)]
    if standby:
        follow = [*command, "standby", *run, "--exit-when-finished", "--name"]
        found = [
            Process("etcd", WITNESS, _etcd(hosts[WITNESS], directory)),
            Process("serve", COORDINATOR, serve, again=[*follow, "server"]),
            Process("standby", STANDBY, [*follow, "other"]),
        ]
    work = [*command, "work", *run, "--site"]
    return found + [Process(worker, worker, [*work, worker, "--", sys.executable, __file__]) for worker in SPEEDS]


def _address(hosts: Mapping[str, Host], name: str) -> str:
    return f"tcp://{hosts[name].address}:{PORT}"


def _etcd(host: Host, directory: Path) -> list[str]:
    """One member is enough of a witness here, where its host is not lost."""
    client, peer = (f"http://{host.address}:{port}" for port in (ETCD_PORT, ETCD_PEER_PORT))
    options = {
        "data-dir": str(directory / "etcd"),
        "listen-client-urls": client,
        "advertise-client-urls": client,
        "listen-peer-urls": peer,
        "initial-advertise-peer-urls": peer,
        "initial-cluster": f"default={peer}",
    }
    return ["/usr/bin/etcd", *(word for name, value in options.items() for word in (f"--{name}", value))]


def remarks(directory: Path) -> list[str]:
    """What recomputing the run from its log says."""
    run = directory / "run"
    log = run / "standby-other" / "log" if (run / "standby-other").exists() else run / "log"
    command = [sys.executable, "-m", "hetero_async", "verify", str(log)]
    said = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return [
        "verify: " + ", ".join(" ".join(line.split()[1:]) for line in said if line.startswith(("verify", "samples")))
    ]


def train(worker: Worker) -> None:
    session = ha.join(worker.model, worker.optimizer)

    def kept(model: torch.nn.Module) -> float:
        keep(worker.directory, model, session.progress * BUDGET_STEPS, worker.name)
        return session.progress

    session.evaluate(kept, every=KEEP_EVERY)
    for batch in session.batches(worker.text, BATCH):
        loss = worker.loss(batch)
        loss.backward()
        worker.optimizer.step()
        worker.optimizer.zero_grad()
        worker.stepped(loss)


if __name__ == "__main__":
    train(Worker())
