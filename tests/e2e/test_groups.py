"""Workers that are torchrun groups: they train one model with those that are not, and come back when a rank dies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from e2e import groups
from e2e.harness import Run, free_port
from e2e.tiny import seeded
from safetensors.torch import load_file

from hetero_async.tensors.model import ServerModel

SIZE = 2


def start_group(run: Run, worker: str, kind: str, **options: Any) -> None:
    port = free_port()
    for rank in range(SIZE):
        run.start_worker(
            worker, groups.train, awaited=run.names, kind=kind, rank=rank, size=SIZE, port=port, **options
        )


def results(run: Run, worker: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.config.worker_directory(worker) / f"results-{rank}.json").read_text())
    return found


def final(run: Run, worker: str, rank: int) -> dict[str, torch.Tensor]:
    return load_file(run.config.worker_directory(worker) / f"final-{rank}.safetensors")


def last_publish(run: Run) -> dict[str, torch.Tensor]:
    """Where the log says that all workers stand when the run is over, by the model's own names."""
    model = ServerModel()
    for entry in run.entries():
        model.apply(entry)
    return model.shadow_dict()


def test_ddp_fsdp2_and_a_single_process_train_one_model(tmp_path: Path) -> None:
    samples = 1603
    with Run(tmp_path / "run", samples=samples, sites={"a": 1, "b": 1, "c": 1}) as run:
        run.start_server()
        ddp, sharded, alone = run.names
        start_group(run, ddp, "ddp", step_seconds=0.002)
        start_group(run, sharded, "fsdp2", step_seconds=0.002)
        run.start_worker(alone, groups.train, awaited=run.names, kind="alone", step_seconds=0.002)
        verdict = run.finish()
        assert verdict.samples == samples
