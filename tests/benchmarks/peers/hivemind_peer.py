"""hivemind: `hivemind.Optimizer`, synchronous as it is by default, or with delayed updates, as its guide has it.

The "Configuration guide" in the docstring of hivemind.Optimizer 1.1.12, learning-at-home.readthedocs.io/en/latest/user/
quickstart.html and dht.html.
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from places import COORDINATOR, Host, Process, program
from workload import BATCH, BUDGET_STEPS, SPEEDS, Worker, inner_optimizer

TARGET_SAMPLES = 128  # of a step of all peers
PORT = 31337
DHT_SECONDS = 60.0
MODES: dict[str, dict[str, Any]] = {
    "synchronous": {},
    "delayed": {"delay_grad_averaging": True, "delay_optimizer_step": True, "offload_optimizer": True},
}
COORDINATOR_PROCESS = "dht"
SETTINGS = (
    f"hivemind 1.1.12; `hivemind-dht` and peers that begin with it; target_batch_size {TARGET_SAMPLES} samples, "
    "matchmaking_time 3 s, averaging_timeout 10 s, fp16 both ways; delayed: delay_grad_averaging, "
    "delay_optimizer_step, offload_optimizer (configuration guide in the docstring of hivemind.Optimizer); a step of "
    "all peers counts as target_batch_size samples here, and may have held more"
)
BY_HAND = {
    "worker": "start it again (a service manager does)",
    "coordinator": "start it again, for those who join later",
}


def processes(hosts: Mapping[str, Host], directory: Path, mode: str) -> list[Process]:
    listen = f"/ip4/{hosts[COORDINATOR].address}/tcp/{PORT}"
    dht = [program("hivemind", "hivemind-dht"), "--host_maddrs", listen, "--identity_path", str(directory / "dht.key")]
    return [Process("dht", COORDINATOR, dht)] + [
        Process(worker, worker, [program("hivemind"), __file__, mode, hosts[worker].address]) for worker in SPEEDS
    ]


def first_peer(directory: Path) -> str:
    """What a person would copy from what `hivemind-dht` prints."""
    deadline = time.monotonic() + DHT_SECONDS
    log = directory / "dht.log"
    while not (found := re.findall(r"/ip4/\S+/p2p/\w+", log.read_text() if log.exists() else "")):
        if time.monotonic() > deadline:
            raise TimeoutError(f"hivemind-dht has printed no address within {DHT_SECONDS:g} s")
        time.sleep(0.2)
    return str(found[0])


def remarks(directory: Path) -> list[str]:
    """What the averaging of so many rounds and peers came to, by what they said."""
    said = "".join(log.read_text(errors="replace") for log in directory.glob("w*.log"))
    failed, alone = said.count("Averaging gradients failed"), said.count("Proceeding with local gradients")
    return [f"averaging failed {failed} times, {alone} times a peer went on with its own gradients"]


def train(worker: Worker, mode: str, address: str) -> None:
    import hivemind

    dht = hivemind.DHT(initial_peers=[first_peer(worker.directory)], host_maddrs=[f"/ip4/{address}/tcp/0"], start=True)
    half = hivemind.compression.Float16Compression()
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="peers",
        batch_size_per_step=BATCH,
        target_batch_size=TARGET_SAMPLES,
        params=worker.model.parameters(),
        optimizer=inner_optimizer,
        matchmaking_time=3.0,
        averaging_timeout=10.0,
        grad_compression=half,
        state_averaging_compression=half,
        verbose=True,
        **MODES[mode],
    )
    optimizer.load_state_from_peers()
    epoch = optimizer.local_epoch
    for batch in worker.batches():
        optimizer.zero_grad()
        loss = worker.loss(batch)
        loss.backward()
        optimizer.step()
        worker.stepped(loss)
        if optimizer.local_epoch != epoch:
            epoch = optimizer.local_epoch
            steps = epoch * TARGET_SAMPLES / BATCH
            if worker.name == "w0":
                worker.keep(steps)
            if steps >= BUDGET_STEPS:
                break
    optimizer.shutdown()
    dht.shutdown()


if __name__ == "__main__":
    import sys

    train(Worker(), *sys.argv[1:])
