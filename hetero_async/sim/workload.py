"""What simulated workers train: small real models on real gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hetero_async.sim.plan import WorkerPlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FEATURES, HIDDEN, OUTPUTS = 6, 8, 3


class Student(Protocol):
    model: torch.nn.Module

    def step(self, samples: Sequence[int]) -> float:
        """One optimizer step on these samples; returns their loss."""
        ...


class Workload(Protocol):
    samples: int

    def student(self, plan: WorkerPlan, seed: int) -> Student:
        """A fresh model with an optimizer, initialized by the seed."""
        ...


class Regression:
    """Learn a random two-layer network's outputs: some hundred parameters, so that a step takes microseconds.

    `with_buffers`: the model counts what it has seen, and no gradient depends on it.
    """

    def __init__(self, samples: int, seed: int, with_buffers: bool = False) -> None:
        self.samples = samples
        self.with_buffers = with_buffers
        chance = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(samples, FEATURES, generator=chance)
        teacher = torch.randn(FEATURES, OUTPUTS, generator=chance)
        self.outputs = torch.tanh(self.inputs @ teacher)

    def student(self, plan: WorkerPlan, seed: int) -> "RegressionStudent":
        chance = torch.Generator().manual_seed(seed)
        seen = [Seen()] if self.with_buffers else []
        model = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, HIDDEN), torch.nn.Tanh(), *seen, torch.nn.Linear(HIDDEN, OUTPUTS)
        ).to(DTYPES[plan.dtype])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=chance))
        return RegressionStudent(self, model, DTYPES[plan.dtype])


class Seen(torch.nn.Module):
    """A running mean of what passes, and how often something has; and a mask, which stays."""

    mean: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(HIDDEN))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("mask", torch.full((HIDDEN,), -torch.inf))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            self.mean += (hidden.mean(dim=0) - self.mean) * 0.1
            self.count += 1
        return hidden


@dataclass(slots=True)
class RegressionStudent:
    workload: Regression
    model: torch.nn.Module
    dtype: torch.dtype

    def step(self, samples: Sequence[int]) -> float:
        picked = list(samples)
        found = self.model(self.workload.inputs[picked].to(self.dtype)).float()
        loss = torch.nn.functional.mse_loss(found, self.workload.outputs[picked])
        gradients = torch.autograd.grad(loss, list(self.model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
                parameter.sub_(0.05 * gradient)
        return float(loss.detach())
