"""torchft: DiLoCo over gloo, as its own example (train_diloco.py) and README set it up.

https://github.com/meta-pytorch/torchft/blob/main/train_diloco.py, README.md#lighthouse
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from places import COORDINATOR, DEVICE, Host, Process, program
from workload import BUDGET_STEPS, SPEEDS, Worker

SYNC_EVERY = 20
LIGHTHOUSE_PORT, MASTER_PORT = 29510, 29600
SETTINGS = (
    "torchft-nightly 2026.10.26; `torchft_lighthouse --min_replicas 1 --quorum_tick_ms 100 --join_timeout_ms 10000` "
    "and `torchrun --nnodes=1 --nproc_per_node=1` for each worker (README); DiLoCo with sync_every 20, outer SGD 0.7, "
    "Nesterov 0.9, process group 10 s, manager 30 s (train_diloco.py)"
)
COORDINATOR_PROCESS = "lighthouse"
BY_HAND = {
    "worker": "start it again (a service manager does)",
    "coordinator": "start the Lighthouse again",
}


def processes(hosts: Mapping[str, Host], directory: Path) -> list[Process]:
    lighthouse = [program("torchft", "torchft_lighthouse"), "--min_replicas", "1"]
    lighthouse += ["--quorum_tick_ms", "100", "--join_timeout_ms", "10000"]
    torchrun = [program("torchft", "torchrun"), f"--master_port={MASTER_PORT}", "--nnodes=1", "--nproc_per_node=1"]
    at = {"TORCHFT_LIGHTHOUSE": f"http://{hosts[COORDINATOR].address}:{LIGHTHOUSE_PORT}"}
    return [Process("lighthouse", COORDINATOR, lighthouse)] + [
        Process(worker, worker, [*torchrun, __file__], at | {"GLOO_SOCKET_IFNAME": DEVICE}) for worker in SPEEDS
    ]


def train(worker: Worker) -> None:
    from torchft import Manager, ProcessGroupGloo
    from torchft.checkpointing.http_transport import HTTPTransport
    from torchft.local_sgd import DiLoCo

    model, inner = worker.model, worker.optimizer
    outer = torch.optim.SGD(model.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    parts: dict[str, Any] = {"model": model, "inner_optim": inner, "outer_optim": outer}

    def load_state_dict(states: dict[str, Any]) -> None:
        for name, part in parts.items():
            part.load_state_dict(states[name])

    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=10)),
        use_async_quorum=False,
        min_replica_size=1,
        load_state_dict=load_state_dict,
        state_dict=lambda: {name: part.state_dict() for name, part in parts.items()},
        replica_id=f"train_diloco_{worker.number}",
        timeout=timedelta(seconds=30),
        checkpoint_transport=HTTPTransport(timeout=timedelta(seconds=10), num_chunks=0),
    )
    synced = 0
    with DiLoCo(manager, [model], inner, outer, backup_device=torch.device("cpu"), sync_every=SYNC_EVERY):
        for batch in worker.batches():
            inner.zero_grad()
            loss = worker.loss(batch)
            loss.backward()
            inner.step()
            worker.stepped(loss)
            steps = manager.batches_committed() * SYNC_EVERY
            if manager.current_step() != synced and manager.participating_rank() == 0:
                worker.keep(steps)
            synced = manager.current_step()
            if steps >= BUDGET_STEPS:
                break
    manager.shutdown()


if __name__ == "__main__":
    train(Worker())
