"""make run-example EXAMPLE=plain_loop

A loop of one's own: the session takes the place of the DataLoader, and nothing else changes.
"""

import torch
from texts import Windows
from torch import nn
from torch.nn import functional as F  # noqa: N812, torch's own idiom

import hetero_async as ha


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(256, 32), nn.Linear(32, 256))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    session = ha.join(model, optimizer)
    session.scheduler(optimizer, lambda progress: 1 - progress)  # of the learning rate, over the whole run
    for number, batch in enumerate(session.batches(Windows(), 16)):
        logits = model(batch["input_ids"][:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 50 == 0:
            session.record("loss", loss.item())


if __name__ == "__main__":
    main()
