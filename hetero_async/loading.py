"""`load`: exported parameters back into a model, for evaluation, for serving, or to begin another run with."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from hetero_async.errors import UserError
from hetero_async.folders import read_weights

NAMES_SHOWN = 3


def load(path: str | Path, model: torch.nn.Module) -> None:
    """Copy weights into the model, whatever dtype and device its parameters have.

    `path` is what `hetero-async export` wrote, any other safetensors file, or a folder as transformers saves it,
    sharded or not. It must hold every parameter that requires a gradient (of tied ones, one), and nothing that the
    model lacks. Frozen parameters may be missing, all of them together, and so may buffers: they stay as they are then.

    A run that is begun with that model goes on from there: its first worker's parameters are the run's. Raises
    UserError, and leaves the model as it was, where the file cannot be read or is another model's.
    """
    found = read_weights(Path(path))
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for told, names in (("lacks", _lacking(model, wanted, found)), ("has also", found.keys() - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
            raise UserError(f"{path}: is not of this model: it {told} {shown}")
    for name, value in found.items():
        if wanted[name].shape != value.shape:
            shapes = f"{tuple(value.shape)}, in the model {tuple(wanted[name].shape)}"
            raise UserError(f"{path}: is not of this model: {name} is {shapes}")
    model.load_state_dict(found, strict=False)  # beside tensors some modules keep bytes in there


def _lacking(
    model: torch.nn.Module, wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> Collection[str]:
    """What should be in the file. A parameter that is there under one of its names is there."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    there = {id(parameters[name]) for name in found.keys() & parameters.keys()}
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    frozen, buffers = parameters.keys() - trained, wanted.keys() - parameters.keys()
    lacking = {name for name in trained if id(parameters[name]) not in there}
    if frozen & found.keys():
        lacking |= {name for name in frozen if id(parameters[name]) not in there}
    if buffers & found.keys():
        lacking |= buffers - found.keys()
    return lacking
