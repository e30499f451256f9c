"""What everybody trains, in the same way: one worker's model, batches and pace, and what it writes down on the way.

Runs in every peer's own environment. `Worker` is all that a training loop of peers/ sees of the comparison: it computes
a loss at the worker's speed, notes each step, and keeps the model as it stands from time to time. The notes are judged
by judge.py when all is over, so that nobody spends time on measuring while he trains.
"""

import importlib
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[3]
# How many times slower than the fastest each worker's steps are made.
SPEEDS = {"w0": 1, "w1": 1, "w2": 2, "w3": 4}
STEP_SECONDS = 0.04
BACKWARD_SECONDS = 0.006  # the part of a step that follows the forward pass, on an idle core
BATCH = 4
BUDGET_STEPS = 2048  # of all workers together
LEARNING_RATE = 3e-3
SEED = 0

STEPS, MODELS, PID = "steps.jsonl", "models.jsonl", "pid"


def _example() -> Any:
    """examples/byte_gpt.py. A peer's environment has no hetero_async, and needs nothing but its model and its text."""
    sys.path.insert(0, str(ROOT / "examples"))
    if importlib.util.find_spec("hetero_async") is None:
        sys.modules["hetero_async"] = types.ModuleType("hetero_async")
    return importlib.import_module("byte_gpt")


byte_gpt = _example()


class Worker:
    """One worker, by the name and in the directory that the runner gave it in the environment."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.name = os.environ["PEER_WORKER"]
        self.number = list(SPEEDS).index(self.name)
        self.directory = Path(os.environ["PEER_RUN"])
        self.step_seconds = STEP_SECONDS * SPEEDS[self.name]
        self.model = byte_gpt.seeded_model()
        self.optimizer = inner_optimizer(self.model.parameters())
        self.text = byte_gpt.Text(validation=False)
        self.steps = 0  # of this life
        (self.directory / f"{self.name}.{PID}").write_text(str(os.getpid()))
        notes = self.directory / f"{self.name}.{STEPS}"
        self._earlier = len(notes.read_text().splitlines()) if notes.exists() else 0
        self._notes = notes.open("a", buffering=1)

    def batches(self, skip: int | None = None) -> Iterator[Tensor]:
        """The worker's quarter of the text in an order of its own, without end.

        From batch number `skip` on; if not given, from where its earlier lives have come to.
        """
        order = torch.randperm(len(self.text), generator=torch.Generator().manual_seed(SEED)).tolist()
        mine = order[self.number :: len(SPEEDS)]
        starts = range(0, len(mine) - BATCH + 1, BATCH)
        number = self._earlier if skip is None else skip
        while True:
            start = starts[number % len(starts)]
            yield torch.stack([self.text[sample] for sample in mine[start : start + BATCH]])
            number += 1

    def loss(self, batch: Tensor) -> Tensor:
        """To be followed by `backward` at once: the sleep that makes the step as long as the worker is slow is here."""
        started = time.monotonic()
        loss = byte_gpt.loss_of(self.model, batch)
        time.sleep(max(0.0, started + self.step_seconds - BACKWARD_SECONDS - time.monotonic()))
        return loss

    def stepped(self, loss: Tensor) -> None:
        """A step has been made; it is in this worker's model."""
        self.steps += 1
        note = {"time": time.time(), "pid": os.getpid(), "steps": self.steps, "loss": round(loss.item(), 4)}
        self._notes.write(json.dumps(note) + "\n")

    def keep(self, steps: float) -> None:
        """The model as it is now: what the run has come to, with `steps` of all workers in it."""
        keep(self.directory, self.model, steps, self.name)


def inner_optimizer(parameters: object) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)


def keep(directory: Path, model: torch.nn.Module, steps: float, by: str) -> None:
    """Parameters beside `models.jsonl`, which says when, by whom, and with how many steps of all workers in them."""
    now = time.time()
    path = directory / f"{by}-{now:.3f}.parameters"
    write_parameters(path, model)
    with (directory / MODELS).open("a") as models:
        models.write(json.dumps({"time": now, "steps": steps, "by": by, "file": path.name}) + "\n")


def write_parameters(path: Path, model: torch.nn.Module) -> None:
    """All parameters in one fp32 vector; the file is whole or not there."""
    vector = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(vector.numpy().tobytes())
    unfinished.replace(path)


def read_parameters(path: Path, model: torch.nn.Module) -> None:
    vector = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    torch.nn.utils.vector_to_parameters(vector, model.parameters())
