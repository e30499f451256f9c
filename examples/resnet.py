"""make .venv/.installed && .venv/bin/python examples/resnet.py

A small ResNet on generated images, trained by two workers and a server on this machine: an example of a model with
batch normalization, whose statistics belong to the run as its parameters do. In the end it shows what they are worth:
the accuracy of the exported model as it is, and with the statistics that it began with.
"""

import argparse
import math
import os
import re
import sys
import time
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812, torch's own idiom
from conductor import Conductor, clear, errors_in_one_line, free_address
from torch import Tensor, nn
from torch.utils.data import Dataset

import hetero_async as ha
from hetero_async import looking, roster
from hetero_async.tables import template

SITE, WORKERS = "here", 2
SAMPLES = 16_000
BATCH = 32
LEARNING_RATE = 3e-3
IMAGE, CLASSES = 16, 8
VALIDATION = 1_024  # images that nobody trains on


class Gratings(Dataset[tuple[Tensor, int]]):
    """Stripes in one of eight directions under noise, as a camera gives them: [1, IMAGE, IMAGE] of about 100 ± 30.

    Image n is the same on every machine; no two are alike.
    """

    def __init__(self, first: int, count: int) -> None:
        self.first = first
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        chance = torch.Generator().manual_seed(self.first + number)
        label = (self.first + number) % CLASSES
        phase, contrast, brightness = torch.rand(3, generator=chance).tolist()
        direction = math.pi * label / CLASSES
        across = torch.arange(IMAGE)
        way = math.cos(direction) * across[:, None] + math.sin(direction) * across[None, :]
        stripes = torch.sin(way + 2 * math.pi * phase) * (10 + 20 * contrast)
        noise = 30 * torch.randn(IMAGE, IMAGE, generator=chance)
        return (80 + 40 * brightness + stripes + noise)[None], label


class Residual(nn.Module):
    def __init__(self, channels: int, wider: int) -> None:
        super().__init__()
        stride = wider // channels
        self.first = nn.Sequential(
            nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(wider, wider, 3, padding=1, bias=False), nn.BatchNorm2d(wider))
        self.past = nn.Sequential(nn.Conv2d(channels, wider, 1, stride, bias=False), nn.BatchNorm2d(wider))

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.second(self.first(images)) + self.past(images))


class ResNet(nn.Module):
    """20,000 parameters, and 362 numbers of statistics in 10 layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            Residual(8, 8), Residual(8, 16), Residual(16, 32),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.layers(images))


def seeded_model() -> ResNet:
    torch.manual_seed(0)
    return ResNet()


def train() -> None:
    model = seeded_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    session = ha.join(model, optimizer)
    session.scheduler(optimizer, lambda progress: 1.0 - 0.9 * progress)
    for images, labels in session.batches(Gratings(VALIDATION, 8 * VALIDATION), BATCH):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{session.worker}: accuracy {accuracy(model):.3f}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the validation images that it names rightly, in eval mode."""
    images, labels = zip(*(Gratings(0, VALIDATION)[number] for number in range(VALIDATION)), strict=True)
    found = model.eval()(torch.stack(images)).argmax(dim=1)
    return float((found == torch.tensor(labels)).float().mean())


def with_initial_statistics(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return model


def demonstrate(directory: Path, samples: int) -> None:
    """Server and workers as a person would start them, until all is trained; then what came of it."""
    clear(directory)
    text = template(
        run={"name": "resnet", "samples": samples}, sites={SITE: WORKERS}, server={"address": free_address()}
    )
    config = roster.initialize(directory, text)
    conductor, script = Conductor(config), [sys.executable, str(Path(__file__))]
    try:
        conductor.start("server", "serve", "--run", str(config.path), "--exit-when-finished")
        conductor.start(SITE, "work", "--run", str(config.path), "--site", SITE, "--", *script)
        while not conductor.have_ended("server", SITE):
            time.sleep(0.2)
    finally:
        conductor.stop()
    looking.export(config, directory / "model.safetensors")
    model = seeded_model()
    ha.load(directory / "model.safetensors", model)
    for worker, found in re.findall(r"(\S+): accuracy (\S+)", (directory / "logs" / f"{SITE}.log").read_text()):
        print(f"{worker}'s model at the end: {found}")
    print(f"the exported model: {accuracy(model):.3f}")
    print(f"the same with the statistics of the beginning: {accuracy(with_initial_statistics(model)):.3f}")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/resnet"))
    parser.add_argument("--samples", type=int, default=SAMPLES)
    options = parser.parse_args()
    if "HETERO_ASYNC_WORKER" in os.environ:  # started by `hetero-async work`
        train()
    else:
        with errors_in_one_line():
            demonstrate(options.directory, options.samples)


if __name__ == "__main__":
    main()
