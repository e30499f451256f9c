"""make run-example EXAMPLE=accelerate_loop

Accelerate: one line after `prepare`.
"""

import torch
from accelerate import Accelerator
from texts import Windows
from torch import nn
from torch.nn import functional as F  # noqa: N812, torch's own idiom
from torch.utils.data import DataLoader

from hetero_async.integrations.accelerate import join


def main() -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True)
    model = nn.Sequential(nn.Embedding(256, 32), nn.Linear(32, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Windows(), batch_size=8, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    session, batches = join(accelerator, model, optimizer, loader)
    session.scheduler(optimizer, lambda progress: 1 - progress)
    for batch in batches:
        with accelerator.accumulate(model):
            logits = model(batch["input_ids"][:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()


if __name__ == "__main__":
    main()
