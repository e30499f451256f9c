"""What a large array in a checkpoint may be, beside an ordinary one: frozen, and read in pieces."""

from collections.abc import Iterator
from typing import Protocol

import numpy


class FrozenArray(Protocol):
    """An array as it was when it was frozen, without a copy of it (tensors/frozen.py)."""

    @property
    def dtype(self) -> numpy.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def nbytes(self) -> int: ...

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, once: what was read is let go. May be read while its owner goes on writing."""

    def __array__(self, dtype: numpy.dtype | None = None, copy: bool | None = None) -> numpy.ndarray:
        """All of it, before it is read."""


Array = numpy.ndarray | FrozenArray
