"""What the small examples train on: the text of the files beside this one, in windows of bytes."""

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

WINDOW = 32


class Windows(Dataset[dict[str, Tensor]]):
    """A map-style dataset, the same at every site: sample n is the window that begins at byte n × WINDOW."""

    def __init__(self) -> None:
        text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return len(self.bytes) // WINDOW

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        """Both of shape (WINDOW,): the names are those that transformers' models take."""
        window = self.bytes[number * WINDOW : (number + 1) * WINDOW]
        return {"input_ids": window, "labels": window}
