"""A training script as a user writes one, small enough to train in seconds: the next byte of real text from the last.

The harness runs `train` in processes it forks; the command line's tests run this file. `hold` is a file that, while it
is there, stops the loop before its next batch, though not before it has taken `hold_after` steps.
"""

import argparse
import inspect
import json
import os
import threading
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import hetero_async as ha
from hetero_async.config import from_environment

WIDTH = 12
WINDOW_BYTES = 17
BATCH = 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class NextByte(nn.Module):
    """6,400 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.output = nn.Linear(WIDTH, 256)

    def forward(self, text: Tensor) -> Tensor:
        return self.output(self.bytes(text))


class Text:
    """Windows of the source of argparse, the same on every machine with this Python."""

    def __init__(self, samples: int = 2000) -> None:
        source = inspect.getsource(argparse).encode()
        self.text = torch.frombuffer(bytearray(source), dtype=torch.uint8).long()
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> Tensor:
        start = number * WINDOW_BYTES
        return self.text[start : start + WINDOW_BYTES + 1]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Nats per byte; 5.5 for a uniform guess."""
    return F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def loss_on_all(model: nn.Module) -> float:
    text = Text()
    return float(loss_of(model, torch.stack([text[number] for number in range(0, 2000, 20)])))


def seeded(model: type[nn.Module] = NextByte) -> nn.Module:
    torch.manual_seed(0)
    return model()


def train(
    *, dtype: str = "fp32", samples: int = 2000, batch: int = BATCH, step_seconds: float = 0.0, hold: str = "",
    hold_after: int = 0,
) -> None:  # fmt: skip
    model = seeded().to(DTYPES[dtype])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    session = ha.join(model, optimizer)
    losses: list[float] = []
    for text in session.batches(Text(samples), batch):
        optimizer.zero_grad()
        loss = loss_of(model, text)
        loss.backward()
        losses.append(loss.item())
        pause(step_seconds, hold if len(losses) > hold_after else "")
        optimizer.step()
    leave_results(losses=losses, device_dtype=str(next(model.parameters()).dtype))


def train_as(config: ha.RunConfig, worker: str, all_joined: threading.Barrier, *, step_seconds: float = 0.0) -> None:
    """The same for one worker among others in a process, where no environment can say who it is."""
    model = NextByte()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    session = ha.Session(config, worker, model, optimizer)
    session.start()
    all_joined.wait()
    for text in session.batches(Text(), BATCH):
        optimizer.zero_grad()
        loss_of(model, text).backward()
        time.sleep(step_seconds)
        optimizer.step()


def pause(step_seconds: float, hold: str) -> None:
    """As long as a larger model would take; and, for a test that needs a worker caught in a step, until it is told."""
    time.sleep(step_seconds)
    if hold and os.path.exists(hold):
        Path(f"{hold}.reached-{os.environ['HETERO_ASYNC_WORKER']}").touch()
        while os.path.exists(hold):
            time.sleep(0.01)


def leave_results(name: str = "results.json", **results: object) -> None:
    config, worker = from_environment()
    (config.worker_directory(worker) / name).write_text(json.dumps(results))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--hold", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    train(dtype=options.dtype, step_seconds=options.step_seconds, hold=options.hold)


if __name__ == "__main__":
    main()
