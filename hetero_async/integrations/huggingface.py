"""Hugging Face's Trainer: `attach(trainer)`, then `trainer.train()`.

Works for Trainer and for what is derived from it. How long a run is stands in run.toml, so `num_train_epochs` is not
used. Learning rates follow the run's progress; evaluation's figures go into the run's log.
"""

import math
import os
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau

from hetero_async.config import from_environment
from hetero_async.errors import UserError
from hetero_async.extras import extra
from hetero_async.integrations.by_progress import ByProgress
from hetero_async.integrations.leased import LeasedLoader
from hetero_async.session import Session, join

with extra("huggingface", "transformers"):
    from transformers import Trainer, TrainerCallback

# Of how fast an evaluation was, and where the process stood: no figures of the model.
NOT_RECORDED = ("_runtime", "_per_second", "_preparation_time", "epoch")


def attach(trainer: Trainer) -> "HeteroAsyncCallback":
    """Let the trainer's `train` join the run that this process was started for, and train its leased samples.

    It saves below `output_dir` in a folder named after the worker, since others of its site are given the same script.
    Raises UserError for settings that do not go with it, ConfigError when no `hetero-async work` started the process.
    """
    _check_settings(trainer)
    callback = HeteroAsyncCallback(trainer)
    trainer.add_callback(callback)
    return callback


class HeteroAsyncCallback(TrainerCallback):  # type: ignore[misc]
    """Made by `attach`. `session` is there once training has begun."""

    def __init__(self, trainer: Trainer) -> None:
        self.session: Session | None = None
        self._trainer = trainer
        self._config, worker = from_environment()
        self._make_loader = trainer.get_train_dataloader
        self._loader: LeasedLoader | None = None
        trainer.get_train_dataloader = self._leased_loader
        trainer.args.output_dir = os.path.join(trainer.args.output_dir, worker)

    def _leased_loader(self) -> LeasedLoader:
        """The trainer's own, columns, collator and all, with the run's samples. It asks before `on_train_begin`."""
        loader = self._loader = LeasedLoader(self._make_loader(), when_finished=self._stop)
        steps = loader.batches_of_run(self._config) / self._trainer.args.gradient_accumulation_steps
        self._trainer.args.max_steps = math.ceil(steps)  # what schedules and the progress bar reckon with
        return loader

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step:
            raise UserError("resume_from_checkpoint: a worker goes on from the run's own parameters; leave it out")
        assert self._loader is not None
        session = self.session = self._loader.session = join(given["model"], given["optimizer"])
        if not isinstance(scheduler := self._trainer.lr_scheduler, ReduceLROnPlateau):
            self._trainer.lr_scheduler = ByProgress(scheduler, state.max_steps, lambda: session.progress)

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Samples of deltas that were refused are trained again: the end is the run's and not a number of steps."""
        state.max_steps = max(state.max_steps, state.global_step + 2)

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.session is None:
            return  # an evaluation before training
        for name, value in (given.get("metrics") or {}).items():
            if isinstance(value, int | float) and not name.endswith(NOT_RECORDED):
                self.session.record(name, value)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if self.session is not None:
            self.session.close()

    def _stop(self) -> None:
        self._trainer.control.should_training_stop = True


def _check_settings(trainer: Trainer) -> None:
    args = trainer.args
    if args.world_size > 1:
        raise UserError(f"this Trainer is one of {args.world_size} processes: each worker is one, started by `work`")
    if args.deepspeed or args.fsdp:
        raise UserError(
            "a Trainer with deepspeed or fsdp keeps its parameters in pieces: hetero_async needs them whole"
        )
    if args.max_steps > 0:
        raise UserError(f"max_steps = {args.max_steps}: how long a run is stands in run.toml; leave it out")
    if args.auto_find_batch_size:
        raise UserError("auto_find_batch_size begins training anew: give a batch size instead")
