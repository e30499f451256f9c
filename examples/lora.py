"""make run-example EXAMPLE=lora

Fine-tunes a frozen model by low-rank adapters: only they travel, to the server and back, and into its log and exports.

The adapters are written out here (Hu et al. 2021, "LoRA", eq. 3); those of peft are parameters like any other, too.
"""

import torch
from byte_gpt import WIDTH, Text, loss_of, seeded_model
from torch import Tensor, nn

import hetero_async as ha

RANK = 4
SCALE = 2.0


class Adapted(nn.Module):
    """y = base(x) + SCALE · x A B, where A is (inputs, RANK), and B is (RANK, outputs) and begins as zeros."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.lora_a = nn.Parameter(torch.randn(base.in_features, RANK) / WIDTH**0.5)
        self.lora_b = nn.Parameter(torch.zeros(RANK, base.out_features))

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + SCALE * (x @ self.lora_a @ self.lora_b)
        return adapted


def adapted_model() -> nn.Module:
    """The base is the same at every site: in earnest from a file, `ha.load(path, base)`, or by `from_pretrained`."""
    base = seeded_model()
    base.requires_grad_(False)
    for block in base.blocks:
        for name in ("query_key_value", "widen"):
            setattr(block, name, Adapted(getattr(block, name)))
    return base


def main() -> nn.Module:
    model = adapted_model()
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-2)
    session = ha.join(model, optimizer)
    for number, batch in enumerate(session.batches(Text(validation=False), 16)):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 50 == 0:
            session.record("loss", loss.item())
    return model


if __name__ == "__main__":
    main()
