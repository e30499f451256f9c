"""PyTorch's own DistributedDataParallel over gloo, kept alive by torchrun as its tutorials say.

https://docs.pytorch.org/tutorials/beginner/ddp_series_fault_tolerance.html: torchrun with a c10d rendezvous, every node
saves a snapshot of the model and of how far it is, and loads it when it is started again.
"""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import torch.distributed as dist
from places import DEVICE, Host, Process, program
from torch.nn.parallel import DistributedDataParallel
from workload import BUDGET_STEPS, SPEEDS, Worker, read_parameters, write_parameters

SNAPSHOT_EVERY = 32  # steps of each worker
KEEP_EVERY = 8
PORT = 29500
COORDINATOR_PROCESS = "w0"  # its agent holds the rendezvous' store
SETTINGS = (
    "torch 2.13.0, gloo, `torchrun --nnodes 4 --nproc-per-node 1 --max-restarts 10 --rdzv-backend c10d`, "
    f"a snapshot of model and progress each {SNAPSHOT_EVERY} steps (PyTorch's tutorial on fault tolerance)"
)

BY_HAND = {"worker": "nothing: torchrun starts all workers again", "coordinator": "start torchrun again on every node"}


def processes(hosts: Mapping[str, Host], directory: Path) -> list[Process]:
    agent = [program("torchft", "torchrun"), "--nnodes", "4", "--nproc-per-node", "1"]
    agent += ["--max-restarts", "10", "--rdzv-backend", "c10d", "--rdzv-id", "peers"]
    agent += ["--rdzv-endpoint", f"{hosts['w0'].address}:{PORT}"]
    return [
        Process(
            worker,
            worker,
            [*agent, "--local-addr", hosts[worker].address, __file__],
            {"GLOO_SOCKET_IFNAME": DEVICE},
        )
        for worker in SPEEDS
    ]


def train(worker: Worker) -> None:
    dist.init_process_group("gloo")
    snapshot, progress = worker.directory / f"{worker.name}.snapshot", worker.directory / f"{worker.name}.progress"
    done = 0
    if progress.exists():
        read_parameters(snapshot, worker.model)
        done = json.loads(progress.read_text())
    model, worker.model = worker.model, DistributedDataParallel(worker.model)
    each = BUDGET_STEPS // len(SPEEDS)
    for batch in islice(worker.batches(done), each - done):
        loss = worker.loss(batch)
        loss.backward()
        worker.optimizer.step()
        worker.optimizer.zero_grad()
        done += 1
        worker.stepped(loss)
        if done % SNAPSHOT_EVERY == 0:
            write_parameters(snapshot, model)
            progress.write_text(json.dumps(done))
        if dist.get_rank() == 0 and done % KEEP_EVERY == 0:
            worker.keep(done * len(SPEEDS))
    dist.destroy_process_group()


if __name__ == "__main__":
    train(Worker())
