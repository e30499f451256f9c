"""The examples as workers run them: as they stand, with what they come to left behind for the test."""

import importlib
import os
from typing import Any

import torch
import xxhash
from e2e.tiny import leave_results

import hetero_async
from hetero_async import session


def run(example: str, **given: Any) -> None:
    """Its `main`, begun when all that are awaited have joined."""
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    session.join = hetero_async.join  # which waits for the others, where integrations take it from
    leave_results(**LOOKS[example](importlib.import_module(example).main(**given)))


def of_nothing(_: None) -> dict[str, Any]:
    return {}


def of_trainer(trainer: Any) -> dict[str, Any]:
    """Hugging Face's."""
    return {
        "steps": trainer.state.global_step,
        "learning_rate": trainer.lr_scheduler.get_last_lr()[0],
        "output_dir": trainer.args.output_dir,
        "steps_of_run": trainer.args.max_steps,
    }


def of_lightning(trainer: Any) -> dict[str, Any]:
    return {
        "steps": trainer.global_step,
        "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
        "scheduler": type(trainer.lr_scheduler_configs[0].scheduler).__name__,
    }


def of_lora(model: torch.nn.Module) -> dict[str, Any]:
    return {"frozen": frozen_hash(model)}


LOOKS = {
    "plain_loop": of_nothing,
    "accelerate_loop": of_nothing,
    "huggingface_trainer": of_trainer,
    "lightning_module": of_lightning,
    "lora": of_lora,
}


def frozen_hash(model: torch.nn.Module) -> str:
    """Of the bits of all parameters that require no gradient."""
    whole = xxhash.xxh3_128()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            whole.update(name.encode() + parameter.detach().numpy().tobytes())
    return whole.hexdigest()
