"""make run-example EXAMPLE=lora

Fine-tunes a frozen GPT-2 by low-rank adapters: only they travel, to the server and back, and into its log and exports.

The adapters are written out here (Hu et al. 2021, "LoRA", eq. 3); those of peft are parameters like any other, too.
"""

import torch
from texts import Windows
from tiny_gpt2 import tiny_gpt2
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hetero_async as ha

RANK = 4
SCALE = 2.0


class Adapted(nn.Module):
    """y = base(x) + SCALE · x A B, where A is (inputs, RANK), B is (RANK, outputs) and begins as zeros."""

    def __init__(self, base: Conv1D) -> None:
        super().__init__()
        self.base = base
        inputs, outputs = base.weight.shape
        self.lora_a = nn.Parameter(torch.randn(inputs, RANK) / RANK)
        self.lora_b = nn.Parameter(torch.zeros(RANK, outputs))

    def forward(self, x: Tensor) -> Tensor:
        adapted: Tensor = self.base(x) + SCALE * (x @ self.lora_a @ self.lora_b)
        return adapted


def adapted_model() -> nn.Module:
    """In earnest: AutoModelForCausalLM.from_pretrained(...), the same at every site."""
    gpt2 = tiny_gpt2()
    gpt2.requires_grad_(False)
    for block in gpt2.transformer.h:
        block.attn.c_attn = Adapted(block.attn.c_attn)
    model: nn.Module = gpt2
    return model


def main() -> nn.Module:
    model = adapted_model()
    optimizer = torch.optim.AdamW((each for each in model.parameters() if each.requires_grad), lr=1e-2)
    session = ha.join(model, optimizer)
    for batch in session.batches(Windows(), 16):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        session.record("loss", loss.item())
    return model


if __name__ == "__main__":
    main()
