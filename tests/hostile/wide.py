"""A training script with five million parameters and little to compute, for servers whose memory is looked at."""

import time

import torch

import hetero_async as ha

WIDTH = 2236
NUMEL = WIDTH * WIDTH
SAMPLES = 100_000
BATCH = 8
STEP_SECONDS = 0.05


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(WIDTH, WIDTH, bias=False)


class Noise:
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.randn(WIDTH, generator=torch.Generator().manual_seed(number))


def train() -> None:
    learner = model()
    optimizer = torch.optim.SGD(learner.parameters(), lr=1e-3)
    session = ha.join(learner, optimizer)
    for batch in session.batches(Noise(), BATCH):
        optimizer.zero_grad()
        learner(batch).square().mean().backward()
        time.sleep(STEP_SECONDS)
        optimizer.step()
