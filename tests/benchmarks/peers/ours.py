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
PORT = 7710
SETTINGS = "run.toml as `init` writes it (rule `auto`, windows of 32 steps of the fastest worker, int8 both ways)"
COORDINATOR_PROCESS = "serve"
BY_HAND = {"worker": "nothing: `work` starts it again", "coordinator": "start `serve` again (systemd does)"}


def processes(hosts: Mapping[str, Host], directory: Path) -> list[Process]:
    command = [sys.executable, "-m", "hetero_async"]
    run = directory / "run" / "run.toml"
    sites = [word for worker in SPEEDS for word in ("--site", f"{worker}=1")]
    address = f"tcp://{hosts[COORDINATOR].address}:{PORT}"
    samples = ["--samples", str(BUDGET_STEPS * BATCH)]
    subprocess.run(
        [*command, "init", str(run.parent), "--address", address, *samples, *sites],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    server = Process("serve", COORDINATOR, [*command, "serve", "--run", str(run), "--exit-when-finished"])
    return [server] + [
        Process(worker, worker, [*command, "work", "--run", str(run), "--site", worker, "--", sys.executable, __file__])
        for worker in SPEEDS
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
