"""The server's passes over its vectors: by blocks that stay in a core's cache, each core on a stretch of its own.

What is done to a block is elementwise, so into how many stretches a vector is cut makes no difference to a single bit.
All vectors are flat fp32 on the CPU.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from hetero_async.tensors import outer
from hetero_async.tensors.codecs.codec import PIECE, Codec
from hetero_async.tensors.frozen import Frozen

S = TypeVar("S")
T = TypeVar("T")

Stretch = tuple[int, int]
# Writes elements start, start + 1, … of a vector, `start` being a multiple of PIECE, into what it is given.
Reader = Callable[[int, torch.Tensor], object]
Weighed = Sequence[tuple[Codec, torch.Tensor, float]]


def blocks(start: int, stop: int) -> Iterator[Stretch]:
    """A stretch in blocks of PIECE elements, the last one smaller."""
    return ((first, min(first + PIECE, stop)) for first in range(start, stop, PIECE))


class Crew:
    """As many threads as torch would use. One alone works in the caller's."""

    def __init__(self) -> None:
        self._size = torch.get_num_threads()
        self._threads: ThreadPoolExecutor | None = None

    def each(self, work: Callable[[S], T], things: Iterable[S]) -> list[T]:
        """What `work` makes of each, in their order; it must leave Python often."""
        if self._size == 1:
            return list(map(work, things))
        if self._threads is None:
            # Inside a block torch shall not divide the work once more.
            self._threads = ThreadPoolExecutor(self._size, "pass", torch.set_num_threads, (1,))
        return list(self._threads.map(work, things))

    def over(self, numel: int, work: Callable[[int, int], T]) -> list[T]:
        """`work` on stretches of a vector of `numel`, each of which begins with a block; outcomes in their order."""
        block_count = -(-numel // PIECE)
        size = max(1, min(self._size, block_count))
        edges = [min(numel, block_count * number // size * PIECE) for number in range(size + 1)]
        return self.each(lambda stretch: work(*stretch), itertools.pairwise(edges))


def norm(crew: Crew, read: Reader, numel: int) -> float:
    """L2; not finite for a vector that holds a NaN, an infinity or values beyond fp32's squares."""

    def work(start: int, stop: int) -> list[float]:
        squares, block = [], torch.empty(PIECE)
        for first, last in blocks(start, stop):
            piece = block[: last - first]
            read(first, piece)
            squares.append(float(torch.dot(piece, piece)))
        return squares

    return _root(crew.over(numel, work))


def add(crew: Crew, mean: torch.Tensor, deltas: Weighed) -> None:
    """mean ← mean + Σ weight · delta, in their order: to the same bits as all at once."""
    numel = mean.numel()

    def work(start: int, stop: int) -> None:
        decoded = torch.empty(PIECE)
        for first, last in blocks(start, stop):
            _add(mean[first:last], deltas, numel, first, decoded[: last - first])

    crew.over(numel, work)


def _add(mean: torch.Tensor, deltas: Weighed, numel: int, first: int, spare: torch.Tensor) -> None:
    for codec, raw, weight in deltas:
        codec.decode(raw, numel, first, spare)
        mean.add_(spare.mul_(weight))


def merge(
    crew: Crew,
    theta: torch.Tensor,
    momenta: Sequence[torch.Tensor],
    deltas: Weighed,
    coefficients: tuple[float, float, float, float],
    mean: torch.Tensor | None = None,
    frozen: Sequence[Frozen] = (),
) -> float:
    """Move θ and its momentum by the weighted mean of some deltas (codec, coded bytes, weight); returns |θ|.

    No decoded delta is ever whole. `mean`: of those before them, if `add` has begun it; it is used up. `frozen`: of
    these vectors, and told of every block before it changes.
    """
    numel = theta.numel()

    def work(start: int, stop: int) -> list[float]:
        squares, (g, decoded) = [], torch.empty(2, PIECE)
        for first, last in blocks(start, stop):
            so_far, one = g[: last - first].zero_() if mean is None else mean[first:last], decoded[: last - first]
            _add(so_far, deltas, numel, first, one)
            for as_it_was in frozen:
                as_it_was.keep(first, last)
            moved = theta[first:last]
            outer.step(moved, [momentum[first:last] for momentum in momenta], so_far, one, coefficients)
            squares.append(float(torch.dot(moved, moved)))
        return squares

    return _root(crew.over(numel, work))


def follow(crew: Crew, theta: torch.Tensor, shadow: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """A publish: coded bytes C(θ − θ̂), and the shadow that they lead to, θ̂ + D(C(…)). θ̂ stays as it is."""
    numel, after = shadow.numel(), torch.empty_like(shadow)
    raw = torch.empty(codec.raw_bytes(numel), dtype=torch.uint8)

    def work(start: int, stop: int) -> None:
        change, spare = torch.empty(2, PIECE)
        for first, last in blocks(start, stop):
            piece, one = change[: last - first], spare[: last - first]
            torch.sub(theta[first:last], shadow[first:last], out=piece)
            codec.code(piece, numel, first, raw)
            codec.decode(raw, numel, first, one)
            torch.add(one, shadow[first:last], out=after[first:last])

    crew.over(numel, work)
    return raw, after


def _root(squares: list[list[float]]) -> float:
    """√Σ, to the same bits however the sum was divided."""
    return math.sqrt(math.fsum(itertools.chain.from_iterable(squares)))
