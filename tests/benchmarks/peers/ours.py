"""hetero_async: `init`, `serve`, and a `work` for each site, all as they come; nothing is tuned."""

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
BY_HAND = {"worker": "nothing: `work` starts it again", "coordinator": "start `serve` again (systemd does)"}


def processes(hosts: Mapping[str, Host], directory: Path, *, standby: bool) -> list[Process]:
    command = [sys.executable, "-m", "hetero_async"]
    run = directory / "run" / "run.toml"
    sites = [word for worker in SPEEDS for word in ("--site", f"{worker}=1")]
    address = f"tcp://{hosts[COORDINATOR].address}:{PORT}"
    init = [*command, "init", str(run.parent), "--address", address, "--samples", str(BUDGET_STEPS * BATCH), *sites]
    followers: list[Process] = []
    if standby:
        etcd, follow = _etcd(hosts[WITNESS], directory), [*command, "standby", "--name", "other", "--run", str(run)]
        init += ["--standby", f"other=tcp://{hosts[STANDBY].address}:{PORT}"]
        init += ["--etcd", f"http://{hosts[WITNESS].address}:{ETCD_PORT}"]
        followers = [Process("etcd", WITNESS, etcd), Process("standby", STANDBY, [*follow, "--exit-when-finished"])]
    subprocess.run(init, check=True, stdout=subprocess.DEVNULL)
    server = Process("serve", COORDINATOR, [*command, "serve", "--run", str(run), "--exit-when-finished"])
    work = [*command, "work", "--run", str(run), "--site"]
    return [*followers, server] + [
        Process(worker, worker, [*work, worker, "--", sys.executable, __file__]) for worker in SPEEDS
    ]


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
