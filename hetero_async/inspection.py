"""What a training script hands over, looked at when it joins and once a round: its process, optimizer and dataset.

The model's own parameters are looked at by tensors/replica.py, whose they are.
"""

import os
from collections.abc import Collection, Sized

import torch

from hetero_async.errors import DatasetError, SchemaError, UserError


def is_group() -> bool:
    """Whether this process is one of a group. Raises UserError where torchrun says so and torch does not know yet."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return True
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"torchrun started this process as rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']}: "
            "call torch.distributed.init_process_group() before hetero_async.join"
        )
    return False


def inner_optimizer(optimizer: object) -> torch.optim.Optimizer:
    """The one whose steps count: Accelerate and Lightning wrap it, and call its step only where there is one.

    Raises UserError for what is no optimizer of torch's: its steps could not be followed.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer) or not hasattr(optimizer, "_optimizer_step_post_hooks"):
        raise UserError(
            f"{type(optimizer).__name__} is no torch.optim.Optimizer (made by its __init__): rounds are counted in "
            "steps, and only such an optimizer tells of its steps"
        )
    return optimizer


def check_optimizer(optimizer: torch.optim.Optimizer, known: Collection[int]) -> None:
    """Raises SchemaError for a parameter that it trains and that is none of the `known` (by id): the run's."""
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter.requires_grad and id(parameter) not in known:
                raise SchemaError(
                    f"the optimizer trains a parameter {tuple(parameter.shape)} (group {number}, place {place}), "
                    "which is none of the run's: the model that joins must have it, and it must require a gradient then"
                )


def check_length(dataset: Sized, expected: int) -> None:
    """The run counts its samples by the length that the dataset had; another length would mean other samples."""
    if len(dataset) != expected:
        raise DatasetError(
            f"the dataset had {expected} samples when training began and has {len(dataset)} now: it must stay as it is"
        )


def was_skipped(optimizer: torch.optim.Optimizer) -> bool:
    """Fused optimizers are called by GradScaler even when it found infinities, and skip the step by themselves."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, torch.Tensor) and bool(found.sum() > 0)
