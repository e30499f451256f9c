"""What a torchrun group keeps of its inner optimizer.

Ranks that have whole parameters have one state: rank 0 keeps it, and gives it to all. Where parameters are in parts
each rank keeps its own, and a later life goes on with them if all have one and they are of the same moment.
"""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from hetero_async.errors import PeerError
from hetero_async.inner_state import KEPT, InnerState
from hetero_async.tensors import inner
from hetero_async.tensors.control import Control


class GroupInnerState(InnerState):
    def __init__(
        self, optimizer: torch.optim.Optimizer, directory: Path, worker: str, control: Control, is_sharded: bool
    ) -> None:
        name = f"optimizer-{control.rank}-of-{control.size}.kept" if is_sharded else KEPT
        super().__init__(optimizer, directory / name, worker)
        self._control = control
        self._is_sharded = is_sharded
        self.moment = 0  # the same on every rank at the same step, and no other life's

    def restore(self) -> bool:
        """A collective. Whether the optimizer goes on, on every rank, with what an earlier life kept."""
        is_keeper = self._is_sharded or self._control.rank == 0
        content = (self._file.load() if is_keeper else None) or b""
        if not self._is_sharded:
            content = self._control.share(content)
        outcomes = self._control.texts(self._try(content))
        is_warm = outcomes[0].isdigit() and len(set(outcomes)) == 1
        if not any(outcomes):
            return False
        if not is_warm:
            self._optimizer.state.clear()
        if self._control.rank == 0:
            how = f"goes on with {self._file.path}" if is_warm else f"begins anew: {_reason(outcomes)}"
            print(f"{self._worker}: the optimizer {how}", file=sys.stderr)
        return is_warm

    def _try(self, content: bytes) -> str:
        """The moment of what was kept, "" if nothing was, or what is wrong with it."""
        try:
            return str(inner.restore(self._optimizer, content, part, joined)) if content else ""
        except PeerError as error:
            return f"{self._file.path}: {error}"

    def copy(self) -> dict[str, torch.Tensor]:
        self._copied_at = self._clock()
        if not self._is_sharded and self._control.rank > 0:
            return {}
        return inner.packed(self._optimizer, self.moment, part)

    def write_last(self) -> None:
        """Parts that are written when ranks leave, each for itself, would not be of one moment."""
        if not self._is_sharded and self._control.rank == 0:
            super().write_last()


def _reason(outcomes: list[str]) -> str:
    for rank, outcome in enumerate(outcomes):
        if outcome and not outcome.isdigit():
            return f"rank {rank}: {outcome}"
    return "what the ranks have kept is not of one moment"


def part(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor | None:
    """This rank's part of a state that lies as its parameter does; None of one that lies otherwise."""
    if isinstance(tensor, DTensor) and isinstance(parameter, DTensor):
        if tensor.shape != parameter.shape or tensor.placements != parameter.placements:
            return None
        local: torch.Tensor = tensor.to_local()
        return local
    return tensor if tensor.dim() == 0 or not isinstance(parameter, DTensor) else None


def joined(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    if not isinstance(parameter, DTensor) or tensor.dim() == 0:
        return tensor
    return DTensor.from_local(
        tensor, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
    )
