"""Measuring the run's published parameters with a function of the user's, in the model that is in training.

Called by session.py between two rounds, in the user's thread. For the function the model is as it was published;
for the training loop nothing has happened.
"""

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping

import numpy
import torch

from hetero_async.errors import UserError

Figures = tuple[tuple[str, float], ...]
Measure = Callable[[torch.nn.Module], float | Mapping[str, float]]


class Evaluation:
    def __init__(self, model: torch.nn.Module, measure: Measure, every: float) -> None:
        """Raises UserError for an `every` that is no share of a run."""
        if not 0 < every <= 1:
            raise UserError(f"every = {every}: must be a share of the run above 0 and at most 1, for example 0.05")
        self.every = every
        self._model = model
        self._measure = measure

    def figures(self, showing: contextlib.AbstractContextManager[None]) -> Figures:
        """What the function says of the model as it is within `showing`. Raises UserError for what is no figure."""
        with showing, unchanged(self._model), torch.no_grad():
            measured = self._measure(self._model)
        named = measured if isinstance(measured, Mapping) else {self._name(): measured}
        figures = [(str(name), _number(name, value)) for name, value in named.items()]
        for name, value in figures:
            if not math.isfinite(value):
                print(f"{name} is {value}, which is not recorded", file=sys.stderr)
        return tuple((name, value) for name, value in figures if math.isfinite(value))

    def _name(self) -> str:
        name = getattr(self._measure, "__name__", "")
        if not name.isidentifier():
            raise UserError(
                "a number is recorded under its function's name, and this one has none: return {name: number}"
            )
        return str(name)


def _number(name: object, value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]  # which is what is asked here
    except (TypeError, ValueError):
        raise UserError(f"evaluating gave {name} = {value!r:.80}: must be a number, or numbers by name") from None


@contextlib.contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode in here; afterwards each module's own mode, buffers and every random state are as before."""
    was_training = [module for module in model.modules() if module.training]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    device = next(model.parameters()).device
    devices = [] if device.type == "cpu" else [device]
    chance, numpy_chance = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        model.eval()
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module in was_training:
                module.training = True
            random.setstate(chance)
            numpy.random.set_state(numpy_chance)
