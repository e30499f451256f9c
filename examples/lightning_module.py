"""make run-example EXAMPLE=lightning_module

Lightning: a callback, and the training data by way of it.
"""

import lightning
import torch
from texts import Windows
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812, torch's own idiom
from torch.utils.data import DataLoader, Subset

from hetero_async.integrations.lightning import HeteroAsyncCallback


class NextByte(lightning.LightningModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, 32)
        self.output = nn.Linear(32, 256)

    def loss_of(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.output(self.bytes(batch["input_ids"][:, :-1]))
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.loss_of(batch)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("validation_loss", self.loss_of(batch))

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)  # the whole run's
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main() -> lightning.Trainer:
    torch.manual_seed(0)
    callback = HeteroAsyncCallback()
    trainer = lightning.Trainer(
        callbacks=[callback],
        max_epochs=1,  # which is the whole run
        check_val_every_n_epoch=None,
        val_check_interval=50,  # batches
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    training = DataLoader(Windows(), batch_size=16, shuffle=True)
    validation = DataLoader(Subset(Windows(), range(0, 500, 10)), batch_size=50)
    trainer.fit(NextByte(), callback.leased(training), validation)
    return trainer


if __name__ == "__main__":
    main()
