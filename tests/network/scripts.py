"""A training loop whose deltas are large: a model that is wide, and little to do in a step."""

import torch
from e2e.tiny import Text, loss_of, pause
from torch import Tensor, nn

import hetero_async as ha

WIDE = 24_576  # a delta of 21 MB, in fp32 and compressed
WIDEST = 120_000  # of 102 MB


class Wide(nn.Module):
    """Parameters that are trained, 256 times the width, behind an embedding that is not."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width).requires_grad_(False)
        self.output = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        return self.output(self.bytes(text))


def train_wide(*, hold: str = "", width: int = WIDE) -> None:
    torch.manual_seed(0)
    model = Wide(width)
    optimizer = torch.optim.SGD(model.output.parameters(), lr=1.0)
    session = ha.join(model, optimizer)
    for text in session.batches(Text(), 1):
        optimizer.zero_grad()
        loss_of(model, text).backward()
        pause(0.0, hold)
        optimizer.step()
