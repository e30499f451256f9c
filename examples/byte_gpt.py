"""Trains a small byte-level GPT on the source files of Python's own standard library.

The first script to read: everything that hetero_async needs of a training loop stands in `train`, the rest is plain
PyTorch. `hetero-async work` starts it once for each worker. By hand it only evaluates:

    python examples/byte_gpt.py --evaluate initial             the loss that every run starts with
    python examples/byte_gpt.py --evaluate model.safetensors   the loss of an exported model
"""

import argparse
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812, torch's own idiom
from torch import Tensor, nn
from torch.utils.data import Dataset

import hetero_async as ha

CONTEXT = 64  # bytes that one prediction can look back on
WIDTH = 64
HEADS = 4
LAYERS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Folders of the library that a distribution may leave out (tests) or that hold tables instead of code.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
TEXT_BYTES_MAX = 8_000_000
VALIDATION_EVERY = 10  # files

LEARNING_RATE = 3e-3
WARM_UP = 0.05  # share of the run
FINAL_SHARE = 0.1  # of the learning rate, at the end


class Block(nn.Module):
    """Causal self-attention, then a two-layer perceptron; each adds to the stream that it reads normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(WIDTH)
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.before_perceptron = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.narrow = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attend(self.before_attention(stream))
        return stream + cast(Tensor, self.narrow(F.gelu(self.widen(self.before_perceptron(stream)))))

    def attend(self, stream: Tensor) -> Tensor:
        batch, length, _ = stream.shape
        heads = self.query_key_value(stream).view(batch, length, 3, HEADS, WIDTH // HEADS)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # each: batch, head, position, width of a head
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return cast(Tensor, self.attention_out(seen.transpose(1, 2).reshape(batch, length, WIDTH)))


class ByteGPT(nn.Module):
    """0.12 million parameters; the table of byte embeddings is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.before_output = nn.LayerNorm(WIDTH)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Logits (batch, position, 256) for the byte that follows each position of `text` (batch, position)."""
        stream = self.bytes(text) + self.positions.weight[: text.shape[1]]
        return F.linear(self.before_output(self.blocks(stream)), self.bytes.weight)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Nats per byte, in fp32 whatever the model's dtype: the logarithm of a bf16 sum has two digits."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


class Text(Dataset[Tensor]):
    """Windows of CONTEXT bytes and the byte after each. Sample n is the same on every machine with this Python."""

    def __init__(self, *, validation: bool) -> None:
        files = [file for number, file in enumerate(source_files()) if (number % VALIDATION_EVERY == 0) == validation]
        text = b"".join(file.read_bytes() for file in files)
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, number: int) -> Tensor:
        start = number * CONTEXT
        return self.text[start : start + CONTEXT + 1].long()


def source_files() -> Iterator[Path]:
    """The library's own files in the order of their names, up to TEXT_BYTES_MAX."""
    library = Path(sysconfig.get_path("stdlib"))
    room = TEXT_BYTES_MAX
    for file in sorted(library.rglob("*.py")):
        if LEFT_OUT.isdisjoint(file.relative_to(library).parts) and file.stat().st_size <= room:
            room -= file.stat().st_size
            yield file


@torch.no_grad()
def validation_loss(model: nn.Module, batches: int = 16, batch_size: int = 64) -> float:
    """Mean loss (nats per byte) on windows spread evenly over the validation files, the same ones every time."""
    text = Text(validation=True)
    chosen = torch.linspace(0, len(text) - 1, batches * batch_size).long().view(batches, batch_size)
    device = next(model.parameters()).device
    losses = [loss_of(model, torch.stack([text[int(n)] for n in row]).to(device)).item() for row in chosen]
    return sum(losses) / batches


def share_of_learning_rate(progress: float) -> float:
    """Linear warm-up, then a cosine down to FINAL_SHARE; `progress` of the whole run, 0 … 1."""
    if progress < WARM_UP:
        return (progress + 0.01) / (WARM_UP + 0.01)
    falling = (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2
    return FINAL_SHARE + (1 - FINAL_SHARE) * falling


def seeded_model() -> ByteGPT:
    torch.manual_seed(0)
    return ByteGPT()


def train(options: argparse.Namespace) -> None:
    model = seeded_model().to(options.device, DTYPES[options.dtype])
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    session = ha.join(model, optimizer)
    session.scheduler(optimizer, share_of_learning_rate)
    if options.evaluate_every:
        session.evaluate(validation_loss, every=options.evaluate_every)
    step_started = time.monotonic()
    for batch in session.batches(Text(validation=False), options.batch_size):
        loss_of(model, batch.to(options.device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        time.sleep(max(0.0, step_started + options.step_seconds - time.monotonic()))
        step_started = time.monotonic()


def evaluate(source: str) -> None:
    model = seeded_model()
    if source != "initial":
        ha.load(source, model)
    print(f"{validation_loss(model):.4f} nats/byte")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--evaluate", metavar="MODEL", help="print the loss of an exported model (or: initial), no more"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the parameters (default: fp32)")
    parser.add_argument("--device", default="cpu", help="any torch device (default: cpu)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--step-seconds", type=float, default=0.0, help="slow down: a step takes at least this long")
    parser.add_argument(
        "--evaluate-every", type=float, default=0.05, metavar="SHARE", help="of the run; 0: never (default: 0.05)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.evaluate:
        evaluate(options.evaluate)
    else:
        train(options)


if __name__ == "__main__":
    main()
