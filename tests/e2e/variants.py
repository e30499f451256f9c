"""Training loops as different people write them, for the harness to run: odd models, accumulation, gradient scalers."""

import time

import torch
from e2e.tiny import BATCH, NextByte, Text, leave_results, loss_of, seeded
from torch import Tensor, nn

import hetero_async as ha
from hetero_async import inner_state

FROZEN = 0.5


class Odd(nn.Module):
    """Tied, frozen, 0-dim and empty parameters, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.output = nn.Linear(12, 256, bias=False)
        self.output.weight = self.bytes.weight
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.nothing = nn.Parameter(torch.empty(0, 12))
        self.register_buffer("constant", torch.tensor([FROZEN]))

    def forward(self, text: Tensor) -> Tensor:
        return self.output(self.frozen(self.bytes(text)) * self.scale) + self.nothing.sum()


def train_odd() -> None:
    """Every kind of parameter, in groups with different learning rates."""
    model = seeded(Odd)
    groups = [
        {"params": [model.bytes.weight, model.nothing], "lr": 0.02},
        {"params": [model.scale], "lr": 0.1},
    ]
    optimizer = torch.optim.Adam(groups)
    session = ha.join(model, optimizer)
    for text in session.batches(Text(), BATCH):
        optimizer.zero_grad()
        loss_of(model, text).backward()
        optimizer.step()
    leave_results(is_tied=model.output.weight is model.bytes.weight, frozen=model.frozen.weight.tolist())


def train_accumulating() -> None:
    """A step every two batches."""
    model = seeded(NextByte)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    session = ha.join(model, optimizer)
    batches = steps = 0
    for number, text in enumerate(session.batches(Text(), BATCH), 1):
        (loss_of(model, text) / 2).backward()
        batches += 1
        if number % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    leave_results(steps=steps, batches=batches)


def train_scaled() -> None:
    """Every third loss overflows: the scaler leaves the step out then."""
    model = seeded(NextByte)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    session = ha.join(model, optimizer)
    steps = skipped = 0
    for number, text in enumerate(session.batches(Text(), BATCH)):
        optimizer.zero_grad()
        loss = loss_of(model, text) * (float("inf") if number % 3 == 2 else 1.0)
        scaler.scale(loss).backward()
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        skipped += scaler.get_scale() < scale
        steps += scaler.get_scale() >= scale
    leave_results(steps=steps, skipped=skipped)


class SelfSkipping(torch.optim.SGD):
    """As fused optimizers are: the scaler calls them in any case and leaves the decision to them."""

    _step_supports_amp_scaling = True

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if not self.found_inf.item():
            with torch.no_grad():
                for parameter in self.param_groups[0]["params"]:
                    parameter -= self.param_groups[0]["lr"] * parameter.grad


def train_self_skipping() -> None:
    model = seeded(NextByte)
    optimizer = SelfSkipping(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10**6)
    session = ha.join(model, optimizer)
    steps = skipped = 0
    for number, text in enumerate(session.batches(Text(), BATCH)):
        optimizer.zero_grad()
        is_overflow = number % 3 == 2
        scaler.scale(loss_of(model, text) * (float("inf") if is_overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update(1.0)
        skipped += is_overflow
        steps += not is_overflow
    leave_results(steps=steps, skipped=skipped)


def train_keeping(step_seconds: float = 0.0) -> None:
    """With a patient person's minute made short, and a look at the optimizer's counter after the first step."""
    inner_state.KEEP_SECONDS = 0.0
    model = seeded(NextByte)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    session = ha.join(model, optimizer)
    counts: list[int] = []
    for text in session.batches(Text(), BATCH):
        optimizer.zero_grad()
        loss_of(model, text).backward()
        time.sleep(step_seconds)
        optimizer.step()
        counts.append(int(optimizer.state[model.output.weight]["step"]))
    leave_results(first_count=counts[0], last_count=counts[-1])
