"""`load`: a run's exported parameters back into a model, for evaluation, for serving, or to begin another run with."""

from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError

from hetero_async.errors import UserError

NAMES_SHOWN = 3


def load(path: str | Path, model: torch.nn.Module) -> None:
    """Copy what `hetero-async export` wrote into the model, whatever dtype and device its parameters have.

    A run that is begun with that model goes on from there: its first worker's parameters are the run's. Raises
    UserError, and leaves the model as it was, where the file cannot be read or is another model's.
    """
    try:
        found = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    wanted = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    for told, names in (("lacks", wanted.keys() - found.keys()), ("has also", found.keys() - wanted.keys())):
        if names:
            shown = ", ".join(sorted(names)[:NAMES_SHOWN]) + (", …" if len(names) > NAMES_SHOWN else "")
            raise UserError(f"{path}: is not of this model: it {told} {shown}")
    for name, value in wanted.items():
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, in the model {tuple(value.shape)}"
            raise UserError(f"{path}: is not of this model: {name} is {shapes}")
    model.load_state_dict(found, strict=False)  # beside tensors some modules keep bytes in there
