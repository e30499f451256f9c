"""What a torchrun group's step costs beside the same step without a run: rank 0's one message to the other ranks.

Two ranks under DistributedDataParallel on CPUs; steps with and without take turns, so that both see the same machine.
"""

import statistics
import time
from pathlib import Path

import byte_gpt
import torch
from rich.console import Console
from rich.table import Table
from tensors.ranks import on_ranks
from torch import nn

from hetero_async.tensors.control import Control, Kind, Said

BATCH = 16  # samples a rank
STEPS = 300


def timed(rank: int) -> dict[str, list[float]]:
    """Seconds of each step by what was in it, and of the message alone."""
    control = Control()
    control.bear(2 * BATCH)
    said = Said(kind=Kind.STEPPED, progress=0.5, number=1000, positions=range(2 * BATCH))
    model = nn.parallel.DistributedDataParallel(byte_gpt.seeded_model())
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randint(256, (BATCH, byte_gpt.CONTEXT + 1))
    seconds: dict[str, list[float]] = {"without": [], "with": [], "message": []}
    for number in range(2 * STEPS):
        began = time.perf_counter()
        byte_gpt.loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        stepped = time.perf_counter()
        if number % 2:
            _ = control.say(said) if rank == 0 else control.hear()
            seconds["message"].append(time.perf_counter() - stepped)
        seconds["with" if number % 2 else "without"].append(time.perf_counter() - began)
    return seconds


def test_a_step_costs_one_message(tmp_path: Path) -> None:
    table = Table(title=f"2 ranks, {STEPS} steps of either kind, ms: median (quartiles)")
    for column in ("rank", "step without", "step with", "the message in it"):
        table.add_column(column, justify="right")
    for rank, seconds in enumerate(on_ranks(tmp_path, 2, timed)["timed"]):
        table.add_row(str(rank), *(spread(seconds[name]) for name in ("without", "with", "message")))
        assert len(seconds["with"]) == len(seconds["without"]) == STEPS
    print()
    Console(width=110).print(table)


def spread(seconds: list[float]) -> str:
    lower, middle, upper = (1000 * part for part in statistics.quantiles(seconds, n=4))
    return f"{middle:.2f} ({lower:.2f} to {upper:.2f})"
