"""On an accelerator: how fast the device codes, and what a worker's loop loses to the run that it is in.

The loop is a transformer of 100 million parameters in bf16 autocast. Its steps are timed alone first and then, in the
same process, in a run whose server is a process of its own on the same host. As a script it is that worker.
"""

import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F  # noqa: N812, torch's own idiom
from benchmarks.figures import TURNS, Figures, in_turns
from e2e.commands import background
from e2e.harness import free_ports
from rich.console import Console
from rich.table import Table
from torch import nn

import hetero_async as ha
from hetero_async import roster
from hetero_async.tables import template
from hetero_async.tensors.codecs import CODECS
from hetero_async.tensors.devices import beside, describe, found, to_host

pytestmark = pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
NUMEL = 100_000_000
WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 768, 14, 12, 512, 16
STEPS_PER_ROUND = 50
ROUNDS = 12
ALONE_STEPS = 200
WARM_UP_STEPS = 20
SETTLING_ROUNDS = 2  # in which the server learns how fast the worker is
LIMIT_SECONDS = 240.0


def test_coding_on_the_device(figures: Figures) -> None:
    device = found()[0]
    flat = torch.randn(NUMEL, device=device)
    spare = torch.empty_like(flat)
    copying = awaited(lambda: spare.copy_(flat))
    for name, codec in CODECS.items():
        raw = codec.encode(flat)
        encoding = functools.partial(codec.encode, flat)
        decoding = functools.partial(codec.decode, raw, NUMEL, 0, spare)
        for verb, coding in (("encode", encoding), ("decode", decoding)):
            figures.add(f"{verb} {name}, {describe(device)}", in_turns(awaited(coding), copying), "s")

    def leave() -> None:
        with beside(device):
            to_host(flat)

    locked = torch.empty(NUMEL, pin_memory=True)
    figures.add("fp32 to the host", in_turns(leave, awaited(lambda: locked.copy_(flat, non_blocking=True))), "s")


def awaited(work: Callable[[], object]) -> Callable[[], None]:
    def done() -> None:
        work()
        torch.accelerator.synchronize()

    return done


@pytest.mark.timeout(2 * LIMIT_SECONDS)
def test_a_worker_is_not_held_up(tmp_path: Path, figures: Figures) -> None:
    text = template(
        run={"name": "accelerated", "samples": BATCH * STEPS_PER_ROUND * ROUNDS},
        sites={"here": 1},
        server={**free_ports(), "dashboard": ""},
        training={"steps_per_round": STEPS_PER_ROUND, "codec_up": "int4", "codec_down": "int4"},
    )
    config = roster.initialize(tmp_path / "run", text)
    program = [sys.executable, "-m", "hetero_async"]
    outputs = tmp_path / "server.output", tmp_path / "here.output"
    steps = tmp_path / "steps.json"
    with (
        background(outputs[0], *program, "serve", "--run", config.path, "--exit-when-finished") as server,
        background(
            outputs[1], *program, "work", "--run", config.path, "--site", "here", "--", sys.executable, __file__, steps
        ) as agent,
    ):
        ended = agent.wait(LIMIT_SECONDS), server.wait(LIMIT_SECONDS)
    assert ended == (0, 0), outputs[0].read_text() + outputs[1].read_text()
    seconds = json.loads(steps.read_text())
    alone, inside = seconds["alone"], seconds["inside"][SETTLING_ROUNDS * STEPS_PER_ROUND :]
    usual = statistics.mean(alone)
    turns = [(1 / sum(part), 1 / (usual * len(part))) for part in parts(inside)]
    figures.add(f"stall, {seconds['device']}, {seconds['parameters']:,} parameters", turns, "1/s", at_least=0.97)
    figures.add("longest pause of a step", [(max(inside) - usual, usual)], "s", at_most=1.5)
    show(alone, inside)


def parts(seconds: list[float]) -> list[list[float]]:
    size = len(seconds) // TURNS
    return [seconds[number * size : (number + 1) * size] for number in range(TURNS)]


def show(alone: list[float], inside: list[float]) -> None:
    table = Table(title="ms of a step")
    for column in ("", "steps", "mean", "median", "99 %", "longest"):
        table.add_column(column, justify="right")
    for name, seconds in (("alone", alone), ("in the run", inside)):
        ms = sorted(1000 * one for one in seconds)
        told = statistics.mean(ms), statistics.median(ms), ms[int(0.99 * len(ms))], ms[-1]
        table.add_row(name, str(len(ms)), *(f"{one:.2f}" for one in told))
    print()
    Console(width=110).print(table)


# --- the worker ---


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.query_key_value, self.attended = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        parted = self.query_key_value(self.norms[0](stream)).unflatten(2, (3, HEADS, -1))
        query, key, value = parted.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
        stream = stream + self.attended(attended)
        return stream + cast(torch.Tensor, self.perceptron(self.norms[1](stream)))


class Tokens(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return BATCH * STEPS_PER_ROUND * ROUNDS

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.randint(256, (CONTEXT + 1,), generator=torch.Generator().manual_seed(number))


def train(path: Path) -> None:
    device = found()[0]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, WIDTH), *(Block() for _ in range(LAYERS)), nn.Linear(WIDTH, 256)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    seconds: dict[str, object] = {"device": describe(device), "parameters": sum(p.numel() for p in model.parameters())}

    def step(batch: torch.Tensor) -> None:
        there = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(there[:, :-1])
        F.cross_entropy(logits.float().flatten(0, 1), there[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    def timed(batches: Iterator[torch.Tensor]) -> list[float]:
        """Seconds from the end of a step to the end of the next, with what fetches its batch."""
        ends = []
        for batch in batches:
            step(batch)
            torch.accelerator.synchronize()
            ends.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(ends)]

    tokens = Tokens()
    drawn = (range(number * BATCH, (number + 1) * BATCH) for number in range(WARM_UP_STEPS + ALONE_STEPS))
    alone = timed(torch.stack([tokens[number] for number in numbers]) for numbers in drawn)
    seconds["alone"] = alone[WARM_UP_STEPS:]
    session = ha.join(model, optimizer)
    seconds["inside"] = timed(session.batches(tokens, BATCH))
    path.write_text(json.dumps(seconds))


if __name__ == "__main__":
    train(Path(sys.argv[1]))
