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
    """Learn a random two-layer network's outputs: some hundred parameters, so that a step takes microseconds."""

    def __init__(self, samples: int, seed: int) -> None:
        self.samples = samples
        chance = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(samples, FEATURES, generator=chance)
        teacher = torch.randn(FEATURES, OUTPUTS, generator=chance)
        self.outputs = torch.tanh(self.inputs @ teacher)

    def student(self, plan: WorkerPlan, seed: int) -> "RegressionStudent":
        chance = torch.Generator().manual_seed(seed)
        model = torch.nn.Sequential(
            torch.nn.Linear(FEATURES, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, OUTPUTS)
        ).to(DTYPES[plan.dtype])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=chance))
        return RegressionStudent(self, model, DTYPES[plan.dtype])


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
