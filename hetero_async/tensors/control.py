"""What rank 0 of a torchrun group says to the other ranks: short messages over a gloo group of our own.

They go from CPU to CPU, so no device waits for them and they cannot come in between the training's own collectives.
Every rank hears the same messages in the same order. What they mean is group.py's matter.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum

import torch
import torch.distributed

from hetero_async.errors import HeteroAsyncError, UserError

# Ranks come to `join` when each has built its model, which takes some longer than others.
ASSEMBLE_SECONDS = 600.0
TEXT_BYTES = 1024
HEAD = 5


class Kind(IntEnum):
    STILL = 0  # nothing new: it only shows that rank 0 is there
    RESET = 1
    ADOPT = 2
    CUT = 3
    GATHER = 4  # what the run begins with
    BEGUN = 5  # the run's parameters are in the model
    DRAWN = 6  # a batch, or the end of the run
    STEPPED = 7  # what follows from a step is done
    FAILED = 8  # a text follows
    SHOWN = 9  # to be probed: the parameters and buffers that the run began with


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    kind: Kind
    progress: float = 0.0
    number: int = 0  # of the run's samples, or what its kind has a number for
    is_kept: bool = False  # the optimizer's state is to be kept now
    positions: Sequence[int] | None = None


class Control:
    def __init__(self) -> None:
        """A collective: every rank makes one. Raises UserError where some do not."""
        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.is_broken = False
        self._positions_max = 0
        try:
            first = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=ASSEMBLE_SECONDS))
            torch.distributed.destroy_process_group(first)
        except RuntimeError as error:
            raise UserError(
                f"rank {self.rank} has waited {ASSEMBLE_SECONDS:g} s in hetero_async.join for the other ranks: each of "
                f"the {self.size} processes that torchrun started must call it ({_first_line(error)})"
            ) from error
        self._group = torch.distributed.new_group(backend="gloo")

    def bear(self, positions: int) -> None:
        """From here on, on every rank, a message may hold so many positions; all are of one length."""
        self._positions_max = positions

    # --- from rank 0 to all ---

    def say(self, said: Said) -> None:
        positions = () if said.positions is None else said.positions
        assert self.rank == 0
        assert len(positions) <= self._positions_max
        message = torch.zeros(HEAD + self._positions_max, dtype=torch.int64)
        count = -1 if said.positions is None else len(positions)
        message[:HEAD] = torch.tensor([said.kind, 0, said.number, said.is_kept, count])
        message.view(torch.float64)[1] = said.progress
        message[HEAD : HEAD + len(positions)] = torch.tensor(positions, dtype=torch.int64)
        self._broadcast(message)

    def hear(self) -> Said:
        """The next message. Raises HeteroAsyncError with rank 0's words when it is one of failure."""
        message = torch.empty(HEAD + self._positions_max, dtype=torch.int64)
        self._broadcast(message)
        kind, _, number, is_kept, count = message[:HEAD].tolist()
        if kind == Kind.FAILED:
            raise HeteroAsyncError(f"rank 0: {self.share(b'').decode(errors='replace')}")
        return Said(
            kind=Kind(kind),
            progress=float(message.view(torch.float64)[1]),
            number=number,
            is_kept=bool(is_kept),
            positions=None if count < 0 else message[HEAD : HEAD + count].tolist(),
        )

    @contextlib.contextmanager
    def failure_is_told(self) -> Iterator[None]:
        """On rank 0: what it fails of, the others fail of as well, instead of waiting for it."""
        try:
            yield
        except HeteroAsyncError as error:
            if self.rank == 0 and not self.is_broken:
                self.say(Said(kind=Kind.FAILED))
                self.share(str(error).encode())
            raise

    def share(self, content: bytes) -> bytes:
        """Rank 0's content, on every rank."""
        size = torch.tensor([len(content)])
        self._broadcast(size)
        shared = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0).byte()
        if self.rank:
            shared = torch.empty(int(size), dtype=torch.uint8)
        if shared.numel():
            self._broadcast(shared)
        return shared.numpy().tobytes()

    # --- among all ---

    def texts(self, own: str) -> list[str]:
        """Every rank's, cut at TEXT_BYTES."""
        said = own.encode()[:TEXT_BYTES]
        padded = torch.frombuffer(bytearray(said.ljust(TEXT_BYTES, b"\0")), dtype=torch.uint8)
        return [bytes(text.tolist()).rstrip(b"\0").decode(errors="replace") for text in self.gathered(padded)]

    def gathered(self, own: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, all of one shape and on the CPU."""
        everybody = [torch.empty_like(own) for _ in range(self.size)]
        with self._breaking():
            torch.distributed.all_gather(everybody, own, group=self._group)
        return everybody

    def require_none(self, complaint: str) -> None:
        """Raises UserError on every rank when one has something to complain of."""
        for rank, said in enumerate(self.texts(complaint)):
            if said:
                raise UserError(said if rank == 0 else f"rank {rank}: {said}")

    def require_equal(self, what: str, own: str) -> None:
        """Raises UserError on every rank when they do not all say the same."""
        said = self.texts(own)
        for rank, text in enumerate(said):
            if text != said[0]:
                raise UserError(
                    f"{what}: {said[0]} on rank 0, {text} on rank {rank}; it must be the same on every rank"
                )

    def _broadcast(self, tensor: torch.Tensor) -> None:
        with self._breaking():
            torch.distributed.broadcast(tensor, 0, group=self._group)

    @contextlib.contextmanager
    def _breaking(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self.is_broken = True
            raise HeteroAsyncError(
                f"rank {self.rank} has lost the other ranks of its torchrun group: {_first_line(error)}"
            ) from error


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
