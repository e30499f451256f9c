"""A learning study's workload: a small byte-level transformer on real text (corpus.py).

Called by learning.py; knows nothing of workers or of virtual time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812, torch's own idiom
from torch import Tensor, nn

from hetero_async.sim.corpus import Corpus
from hetero_async.sim.plan import WorkerPlan
from hetero_async.sim.workload import DTYPES
from hetero_async.tensors.replica import Replica

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
    optimizer: str = "adamw"  # adamw | sgd


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
    """Fulfils Workload: sample n is a window of `context` bytes, and the byte after each of them, of its reader's text.

    A reader's text is that of its site: all sites' is the same, or each has its own.
    """

    def __init__(self, shape: Shape, seed: int, evaluated_windows: int, corpus: Corpus) -> None:
        self.shape = shape
        self._corpus, self._offsets = corpus, torch.arange(shape.context + 1)
        self.samples = sum(self._windows_in(text) for text in corpus.training)
        self._seed = seed
        self._reported, self._chosen = (
            self._spread(parts, evaluated_windows) for parts in (corpus.reporting, corpus.choosing)
        )
        self._model = Transformer(shape, seed)
        self._examined = Replica(self._model)

    @property
    def parameters(self) -> int:
        return self._examined.schema.numel

    def student(self, plan: WorkerPlan, seed: int) -> "Reader":
        """Every life begins with the same model, as one script would: `seed`, which tells lives apart, has no say."""
        return Reader(self, Transformer(self.shape, self._seed).to(DTYPES[plan.dtype]), self._corpus.of_site(plan.site))

    def windows(self, text: Tensor, samples: Sequence[int]) -> Tensor:
        starts = torch.tensor(samples) % self._windows_in(text) * self.shape.context
        return text[starts[:, None] + self._offsets].long()

    def evaluate(self, parameters: Tensor) -> float:
        """Validation loss (nats per byte) of these parameters (flat, in the schema's order), in fp32."""
        return self._examine(parameters, self._reported)

    def choose(self, parameters: Tensor) -> float:
        """The same on other text: for choosing between settings, which would spoil what is reported."""
        return self._examine(parameters, self._chosen)

    @torch.no_grad()
    def _examine(self, parameters: Tensor, windows: Tensor) -> float:
        self._examined.reset(parameters)
        return sum(len(part) * loss_of(self._model, part).item() for part in windows.split(EVALUATED_AT_ONCE)) / len(
            windows
        )

    def _windows_in(self, text: Tensor) -> int:
        return (len(text) - 1) // self.shape.context

    def _spread(self, parts: Sequence[Tensor], windows: int) -> Tensor:
        """As many windows of each part, at equal distances."""
        chosen: list[Tensor] = []
        for part in parts:
            starts = torch.linspace(0, len(part) - self.shape.context - 1, max(1, windows // len(parts))).long()
            chosen.append(part[starts[:, None] + self._offsets].long())
        return torch.cat(chosen)


class Reader:
    """Fulfils Student."""

    def __init__(self, reading: Reading, model: Transformer, text: Tensor) -> None:
        self.model: nn.Module = model
        self.progress = 0.0  # of the run, 0 … 1: what the learning rate follows
        self._reading, self._text = reading, text
        self._parameters = list(model.parameters())
        self._optimizer = _optimizer(reading.shape, self._parameters)

    def step(self, samples: Sequence[int]) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._reading.shape.learning_rate * schedule(self.progress)
        loss = loss_of(self.model, self._reading.windows(self._text, samples))
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(loss.detach())


def _optimizer(shape: Shape, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if shape.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=shape.learning_rate, momentum=0.9, fused=True)
    return torch.optim.AdamW(parameters, lr=shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)


def schedule(progress: float) -> float:
    """Share of the learning rate: a linear rise, then a cosine down to FINAL_SHARE."""
    if progress < WARM_UP:
        return (progress + 0.01) / (WARM_UP + 0.01)
    falling = (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP))) / 2
    return FINAL_SHARE + (1 - FINAL_SHARE) * falling
