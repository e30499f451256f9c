"""A vector as it is at one moment, for a checkpoint, while its owner goes on writing to it.

Nothing is copied when it is made. Whoever is about to change a block says so (`keep`), and a block that has not been
read by then is copied first: where the checkpoint is on disk before the next merge, none ever is.
"""

import threading
from collections.abc import Iterator

import numpy
import torch

from hetero_async.tensors.codecs.codec import PIECE


class Frozen:
    """Flat fp32 on the CPU. Fulfils arrays.FrozenArray. `keep` may be called from several threads beside a reader."""

    dtype = numpy.dtype(numpy.float32)

    def __init__(self, vector: torch.Tensor) -> None:
        self._vector = vector
        self._kept: dict[int, torch.Tensor] = {}  # by their first element
        self._read = 0  # elements that are not needed any more
        self._lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._vector.shape)

    @property
    def nbytes(self) -> int:
        return self._vector.numel() * self._vector.element_size()

    def keep(self, start: int, stop: int) -> None:
        """That block (one of PIECE elements, or the last) is about to change."""
        with self._lock:
            if start >= self._read and start not in self._kept:
                self._kept[start] = self._vector[start:stop].clone()

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, block by block, once: what was read is let go."""
        assert self._read == 0, "a frozen vector is read once"
        for start in range(0, self._vector.numel(), PIECE):
            with self._lock:
                piece = self._block(start)
                self._kept.pop(start, None)
                self._read = start + PIECE
            yield piece.numpy().view(numpy.uint8).data

    def __array__(self, dtype: numpy.dtype | None = None, copy: bool | None = None) -> numpy.ndarray:
        """All of it, before it is read."""
        assert self._read == 0, "a frozen vector is read once"
        with self._lock:
            blocks = [self._block(start).numpy() for start in range(0, self._vector.numel(), PIECE)]
        return numpy.concatenate(blocks or [numpy.empty(0, self.dtype)]).astype(dtype or self.dtype)

    def _block(self, start: int) -> torch.Tensor:
        """A copy that nobody writes to."""
        kept = self._kept.get(start)
        return self._vector[start : start + PIECE].clone() if kept is None else kept
