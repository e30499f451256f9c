"""Flower: FedAvg on its deployment engine, as the PyTorch quickstart has it.

https://flower.ai/docs/framework/how-to-run-flower-with-deployment-engine.html, examples/quickstart-pytorch; the model
is kept after each round as in how-to-save-and-load-model-checkpoints, and a run that is submitted again begins with it.
"""

import importlib.util
import os
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from places import COORDINATOR, Host, Process, program
from workload import (
    BATCH,
    BUDGET_STEPS,
    SPEEDS,
    Worker,
    byte_gpt,
    inner_optimizer,
    keep,
    read_parameters,
    write_parameters,
)

LOCAL_STEPS = 64
PORT = 8000
NODES_SECONDS = 60.0
SETTINGS = (
    "flwr 1.41.0; `flower-superlink --insecure`, `flower-supernode --insecure`, `flwr run` (guide to its deployment); "
    f"FedAvg over all nodes, {LOCAL_STEPS} local steps a round, a new inner optimizer each round (quickstart-pytorch), "
    "no federated evaluation, the model kept after each round (guide on checkpoints)"
)
COORDINATOR_PROCESS = "superlink"
FOLLOWS = {"superlink": ["submit"]}
BY_HAND = {
    "worker": "nothing: the SuperNode starts a ClientApp each round",
    "coordinator": "start the SuperLink again and submit the run again, which begins with the kept model",
}
APP = """
[project]
name = "peers"
version = "1.0.0"
dependencies = []

[tool.flwr.app]
publisher = "peers"

[tool.flwr.app.components]
serverapp = "peers_app:server"
clientapp = "peers_app:client"
"""
CONNECTION = """
[superlink]
default = "peers"

[superlink.peers]
address = "{address}"
insecure = true
"""


def processes(hosts: Mapping[str, Host], directory: Path) -> list[Process]:
    address = f"{hosts[COORDINATOR].address}:{PORT}"
    app = directory / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(APP)
    (app / "peers_app.py").write_text("from flower_fedavg import client, server\n\n__all__ = ['client', 'server']\n")
    told = {"FLWR_TELEMETRY_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parent)}
    homes = {name: told | {"FLWR_HOME": str(directory / f"{name}.home")} for name in hosts}
    for home in homes.values():
        Path(home["FLWR_HOME"]).mkdir()
        (Path(home["FLWR_HOME"]) / "config.toml").write_text(CONNECTION.format(address=address))
    link = [program("flower", "flower-superlink"), "--insecure", "--host", hosts[COORDINATOR].address]
    link += ["--disable-runtime-dependency-installation"]
    node = [program("flower", "flower-supernode"), "--insecure", "--superlink", address]
    return [
        Process("superlink", COORDINATOR, link, homes[COORDINATOR]),
        *(Process(worker, worker, node, homes[worker]) for worker in SPEEDS),
        Process("submit", COORDINATOR, [program("flower", "flwr"), "run", str(app), "peers"], homes[COORDINATOR]),
    ]


def train(worker: Worker) -> int:
    """One round of one node; how many steps it has done."""
    worker.optimizer = inner_optimizer(worker.model.parameters())
    for batch in islice(worker.batches(), LOCAL_STEPS):
        worker.optimizer.zero_grad()
        loss = worker.loss(batch)
        loss.backward()
        worker.optimizer.step()
        worker.stepped(loss)
    return LOCAL_STEPS


def client_app() -> Any:
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.train()
    def fit(message: Message, context: Context) -> Message:
        worker = Worker()
        worker.model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        steps = train(worker)
        metrics = MetricRecord({"num-examples": steps * BATCH, "steps": steps})
        content = RecordDict({"arrays": ArrayRecord(worker.model.state_dict()), "metrics": metrics})
        return Message(content=content, reply_to=message)

    return app


def server_app() -> Any:
    from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg

    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        directory = Path(os.environ["PEER_RUN"])
        model = byte_gpt.seeded_model()
        checkpoint, progress = directory / "checkpoint", directory / "progress"
        steps = 0
        if progress.exists():
            steps = int(progress.read_text())
            read_parameters(checkpoint, model)

        def reached(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
            nonlocal steps
            steps += sum(int(reply["metrics"]["steps"]) for reply in replies)
            return MetricRecord({"steps": steps})

        def kept(server_round: int, arrays: ArrayRecord) -> None:
            model.load_state_dict(arrays.to_torch_state_dict())
            if server_round:
                keep(directory, model, steps, "server")
                write_parameters(checkpoint, model)
                progress.write_text(str(steps))

        deadline = time.monotonic() + NODES_SECONDS
        while len(list(grid.get_node_ids())) < len(SPEEDS) and time.monotonic() < deadline:
            time.sleep(0.2)
        rounds = -(-(BUDGET_STEPS - steps) // (LOCAL_STEPS * len(SPEEDS)))
        strategy = FedAvg(fraction_evaluate=0.0, train_metrics_aggr_fn=reached)
        strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=rounds, evaluate_fn=kept)

    return app


if importlib.util.find_spec("flwr"):
    client, server = client_app(), server_app()
