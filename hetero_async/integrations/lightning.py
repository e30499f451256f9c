"""Lightning: a callback, and the training data by way of it.

    part = HeteroAsyncCallback()
    trainer = lightning.Trainer(callbacks=[part], max_epochs=1)
    trainer.fit(module, part.leased(loader))

The epoch is the whole run, however long run.toml says that it is. Learning rates follow its progress; what validation
logs goes into the run's log.
"""

import math
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from hetero_async.config import from_environment
from hetero_async.errors import UserError
from hetero_async.extras import extra
from hetero_async.integrations.by_progress import ByProgress
from hetero_async.integrations.leased import LeasedLoader
from hetero_async.session import Session, join

with extra("lightning", "lightning"):
    from lightning.pytorch import Callback, LightningModule, Trainer


class SizedLoader(LeasedLoader):
    """Lightning draws one batch ahead from what has no length."""

    def __len__(self) -> int:
        """Of the whole run; where a worker trains on more, another epoch begins."""
        return self.batches_of_run(from_environment()[0])


class HeteroAsyncCallback(Callback):  # type: ignore[misc]
    """Joins the run that this process was started for when `fit` begins, and stops when the run is finished.

    `session` is there from `on_fit_start` on.
    """

    def __init__(self) -> None:
        self.session: Session | None = None
        self._loader: SizedLoader | None = None
        self._trainer: Trainer | None = None

    def leased(self, loader: DataLoader[Any]) -> SizedLoader:
        """The loader's dataset, batch size and collate function with the run's samples: for `fit`, or what a
        `train_dataloader` returns. Raises DatasetError where the run cannot lease the samples."""
        self._loader = SizedLoader(loader, when_finished=self._stop)
        return self._loader

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_settings(trainer)
        self._trainer = trainer
        self.session = join(pl_module, trainer.optimizers[0])
        trainer.fit_loop.max_epochs = -1  # the run says when it ends

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loaders are made by now, and nothing has been drawn from them."""
        loader, session = self._loader, self.session
        assert session is not None
        if loader is None or trainer.train_dataloader is not loader:
            raise UserError(
                "the training data is not the run's: give `fit` HeteroAsyncCallback.leased(DataLoader(...))"
            )
        loader.session = session
        steps = math.ceil(len(loader) / trainer.accumulate_grad_batches)
        passes = math.ceil(len(loader) * loader.batch_size / len(loader.dataset))
        for config in trainer.lr_scheduler_configs:
            if not config.reduce_on_plateau:
                total = steps if config.interval == "step" else passes
                config.scheduler = ByProgress(config.scheduler, total, lambda: session.progress)
                config.interval, config.frequency = "step", 1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.session is not None and not trainer.sanity_checking:
            for name, value in trainer.callback_metrics.items():
                if isinstance(value, Tensor) and value.numel() == 1:
                    self.session.record(name, value.item())

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.session is not None:
            self.session.close()

    def _stop(self) -> None:
        assert self._trainer is not None
        self._trainer.should_stop = True


def _check_settings(trainer: Trainer) -> None:
    if trainer.world_size > 1:
        raise UserError(f"this Trainer has {trainer.world_size} processes: each worker is one, started by `work`")
    if len(trainer.optimizers) != 1:
        raise UserError(f"the module has {len(trainer.optimizers)} optimizers: a run is trained by one")
    if trainer.max_steps > 0:
        raise UserError(f"max_steps = {trainer.max_steps}: how long a run is stands in run.toml; leave it out")
