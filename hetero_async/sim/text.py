"""A learning study's workload: a small byte-level transformer on the source files of Python's own standard library.

The text is on every machine that has this software, and it is real: a rule that is better here is not better by the
grace of a toy problem. Called by learning.py; knows nothing of workers or of virtual time.
"""

import functools
import math
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812, torch's own idiom
import xxhash
from torch import Tensor, nn

from hetero_async.sim.workload import DTYPES
from hetero_async.tensors.replica import Replica

# Folders that a distribution may leave out, or that hold tables instead of programs.
LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
TEXT_BYTES_MAX = 8_000_000
VALIDATION_EVERY = 10  # files
EVALUATED_AT_ONCE = 64  # windows
SYMBOLS = 256
WARM_UP = 0.05  # share of the run in which the learning rate rises
FINAL_SHARE = 0.1  # of the learning rate, at the run's end
CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is trained, and how each worker's own optimizer trains it."""

    layers: int = 2
    width: int = 64
    heads: int = 4
    context: int = 64  # bytes that one prediction can look back on
    learning_rate: float = 3e-3


@dataclass(frozen=True, slots=True)
class Text:
    training: Tensor  # uint8
    validation: Tensor

    @property
    def fingerprint(self) -> str:
        """Equal where two machines train on the same text."""
        whole = xxhash.xxh3_128()
        for part in (self.training, self.validation):
            whole.update(part.numpy().data)
        return whole.hexdigest()


@functools.cache
def standard_library() -> Text:
    """The library's files in the order of their names, every tenth one for validation."""
    root, room = Path(sysconfig.get_path("stdlib")), TEXT_BYTES_MAX
    texts: list[bytes] = []
    for path in sorted(root.rglob("*.py")):
        size = path.stat().st_size
        if LEFT_OUT.isdisjoint(path.relative_to(root).parts) and size <= room:
            room -= size
            texts.append(path.read_bytes())
    validation = b"".join(texts[::VALIDATION_EVERY])
    training = b"".join(text for number, text in enumerate(texts) if number % VALIDATION_EVERY)
    return Text(_bytes(training), _bytes(validation))


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Layer(nn.Module):
    """Causal attention, then a perceptron, each on the normalised stream and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention_in, self.attention_out = _linear(width, 3 * width), _linear(width, width)
        self.perceptron_in, self.perceptron_out = _linear(width, 4 * width), _linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        parts = self.attention_in(self.attention_norm(stream)).unflatten(-1, (3, self.heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.attention_out(seen.transpose(1, 2).flatten(-2))
        return stream + cast(Tensor, self.perceptron_out(F.gelu(self.perceptron_in(self.perceptron_norm(stream)))))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Transformer(nn.Module):
    """Predicts the next byte; the bytes' embedding is the output layer too. Initialized by `seed` alone."""

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        self.symbols = nn.Parameter(torch.empty(SYMBOLS, shape.width))
        self.places = nn.Parameter(torch.empty(shape.context, shape.width))
        self.layers = nn.Sequential(*(Layer(shape.width, shape.heads) for _ in range(shape.layers)))
        self.norm = nn.LayerNorm(shape.width)
        chance = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02, generator=chance)

    def forward(self, text: Tensor) -> Tensor:
        stream = F.embedding(text, self.symbols) + self.places[: text.shape[1]]
        return F.linear(self.norm(self.layers(stream)), self.symbols)


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """Nats per byte, in fp32 whatever the parameters are: a bf16 sum of probabilities has two digits."""
    logits = model(windows[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


class Reading:
    """Fulfils Workload: sample n is a window of `context` bytes, and the byte after each of them."""

    def __init__(self, shape: Shape, seed: int, evaluated_windows: int) -> None:
        self.shape = shape
        text = standard_library()
        self._text, self._offsets = text.training, torch.arange(shape.context + 1)
        self.samples = (len(text.training) - 1) // shape.context
        self._seed = seed
        starts = torch.linspace(0, len(text.validation) - shape.context - 1, evaluated_windows).long()
        self._evaluated = text.validation[starts[:, None] + self._offsets].long()
        self._model = Transformer(shape, seed)
        self._examined = Replica(self._model)

    @property
    def parameters(self) -> int:
        return self._examined.schema.numel

    def student(self, dtype: str, seed: int) -> "Reader":
        """Every life begins with the same model, as one script would: `seed`, which tells lives apart, has no say."""
        return Reader(self, Transformer(self.shape, self._seed).to(DTYPES[dtype]))

    def windows(self, samples: Sequence[int]) -> Tensor:
        starts = torch.tensor(samples) * self.shape.context
        return self._text[starts[:, None] + self._offsets].long()

    @torch.no_grad()
    def evaluate(self, parameters: Tensor) -> float:
        """Validation loss (nats per byte) of these parameters (flat, in the schema's order), in fp32."""
        self._examined.reset(parameters)
        parts = self._evaluated.split(EVALUATED_AT_ONCE)
        return sum(len(part) * loss_of(self._model, part).item() for part in parts) / len(self._evaluated)


class Reader:
    """Fulfils Student."""

    def __init__(self, reading: Reading, model: Transformer) -> None:
        self.model: nn.Module = model
        self.progress = 0.0  # of the run, 0 … 1: what the learning rate follows
        self._reading = reading
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=reading.shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self, samples: Sequence[int]) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._reading.shape.learning_rate * schedule(self.progress)
        loss = loss_of(self.model, self._reading.windows(samples))
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


def schedule(progress: float) -> float:
    """Share of the learning rate: a linear rise, then a cosine down to FINAL_SHARE."""
    if progress < WARM_UP:
        return (progress + 0.01) / (WARM_UP + 0.01)
    falling = (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2
    return FINAL_SHARE + (1 - FINAL_SHARE) * falling
