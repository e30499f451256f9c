"""The training side of the desk: what is done before a batch and after a step, wherever the loop runs.

Nothing here waits. Where the loop may not go on it is told so, waits in its own way, and asks again.
"""

from collections.abc import Callable

from hetero_async.desk import Desk
from hetero_async.ports import Replica


class Rounds:
    def __init__(self, desk: Desk, replica: Replica, forget: Callable[[], None] = lambda: None) -> None:
        """`forget` is called when the parameters were spoilt: an optimizer's memory of them is spoilt as well."""
        self._desk = desk
        self._replica = replica
        self._forget = forget

    def begin(self) -> bool:
        """Whether the run's parameters have come, and are in the model now."""
        target = self._desk.take_target()
        if target is not None:
            self._replica.reset(target.flat, target.buffers)
            self._desk.anchor = target.anchor
        return target is not None

    def draw(self, count: int) -> list[int] | None:
        """`count` positions to train on, fewer at the run's end; empty: wait, None: the run is finished."""
        return self._await(self._desk.draw(count))

    def reserve(self, count: int) -> list[int] | None:
        """The same, of samples that are fetched ahead."""
        return self._await(self._desk.reserve(count))

    def _await(self, positions: list[int] | None) -> list[int] | None:
        if positions is None:
            self.adopt()
        elif not positions and self._desk.can_flush():
            self._desk.cut(self._replica.cut(), self._replica.cut_buffers())
        return positions

    def end_step(self) -> None:
        """A step was taken: the parameters may move, and the round may end."""
        self._desk.count_step()
        self.adopt()
        if self._desk.is_round_due():
            self._desk.cut(self._replica.cut(), self._replica.cut_buffers())

    def flush(self) -> bool:
        """End an unfinished round, for there will be no step any more. Whether all that was done is answered."""
        if self._desk.round_steps > 0 and not self._desk.is_busy:
            self._desk.cut(self._replica.cut(), self._replica.cut_buffers())
        return not self._desk.is_busy

    def adopt(self) -> None:
        """Move to where the background says that the parameters should stand, if it says anything new."""
        target = self._desk.take_target()
        if target is None:
            return
        if self._desk.is_spoilt:
            self._replica.reset(target.flat, target.buffers)
            self._desk.begin_again()
            self._forget()
        else:
            self._replica.adopt(target.flat, target.buffers)
        self._desk.anchor = target.anchor
