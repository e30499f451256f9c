"""Training loops of the benchmarks, as users write them. Each notes the moments of its steps where others can look."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from byte_gpt import loss_of
from e2e.tiny import BATCH, NextByte, Text
from e2e.tiny import loss_of as tiny_loss_of
from torch import Tensor, nn

import hetero_async as ha

# 10 million parameters, and steps of half a second on a core.
WIDTH, HEADS, LAYERS, CONTEXT = 416, 8, 5, 64
WINDOWS = 8
SAMPLES = 1 << 40


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, text: Tensor) -> Tensor:
        stream = self.layers(self.bytes(text) + self.positions.weight, mask=self.mask, is_causal=True)
        return nn.functional.linear(stream, self.bytes.weight)


class Noise:
    """Any number of samples that nobody has to keep."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> Tensor:
        return torch.randint(256, (CONTEXT + 1,), generator=torch.Generator().manual_seed(number % (1 << 30)))


class Clock:
    """`step` notes a moment; steps are done while the file `go` is there."""

    def __init__(self, notes: str, go: str = "") -> None:
        self._notes, self._go = open(notes, "a", buffering=1), go  # noqa: SIM115, for as long as the process lives

    def step(self) -> None:
        self._notes.write(f"{time.monotonic()}\n")

    def wait(self) -> None:
        if self._go and not os.path.exists(self._go):
            while not os.path.exists(self._go):
                time.sleep(0.001)
            self._notes.write(f"{time.monotonic()} goes on\n")


def train_transformer(*, notes: str, go: str = "", joins: bool = True) -> None:
    """With a run, or the same without."""
    torch.manual_seed(0)
    model = Transformer()
    assert 9.5e6 < sum(parameter.numel() for parameter in model.parameters()) < 11e6
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    session = ha.join(model, optimizer) if joins else None
    clock = Clock(notes, go)
    for batch in session.batches(Noise(), WINDOWS) if session else batches():
        clock.wait()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step()


def batches() -> Iterator[Tensor]:
    noise = Noise()
    for start in range(0, SAMPLES, WINDOWS):
        yield torch.stack([noise[number] for number in range(start, start + WINDOWS)])


def train_tiny(*, notes: str, step_seconds: float) -> None:
    """A tiny model whose steps take the time that they are told to."""
    torch.manual_seed(0)
    model = NextByte()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    session = ha.join(model, optimizer)
    clock = Clock(notes)
    for text in session.batches(Text(), BATCH):
        tiny_loss_of(model, text).backward()
        time.sleep(step_seconds)
        optimizer.step()
        optimizer.zero_grad()
        clock.step()


def moments(notes: Path) -> list[float]:
    """Of its steps; the file's last line may be half written."""
    lines = notes.read_text().splitlines(keepends=True) if notes.exists() else []
    return [float(line) for line in lines if line.endswith("\n") and " " not in line]
