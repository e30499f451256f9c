"""Checkpoints of a server or a standby: frozen between two batches, written beside them, the log dropped behind them.

serve.py and standby.py offer the present state after each batch. Taking one freezes the vectors, which copies nothing;
it is then written while the loop goes on, and a merge that comes before that copies what it is about to change.
"""

from collections.abc import Callable

import trio

from hetero_async.actors.mailbox import Mailbox
from hetero_async.core.state import State
from hetero_async.errors import DiskFull
from hetero_async.parts import Parts
from hetero_async.ports import Checkpoint, Model


class Checkpointer:
    """`run` must run. `is_busy`: one is being written."""

    def __init__(
        self, parts: Parts, model: Model, model_lock: trio.Lock, *, drop_log: Callable[[int], int | None]
    ) -> None:
        """`drop_log`: told up to which record the log is not needed for a recovery, it says from which one on it is
        needed at all; None: nothing is dropped."""
        self.is_busy = False
        self._parts = parts
        self._model, self._model_lock = model, model_lock
        self._drop_log = drop_log
        self._version = -1  # of the newest one
        self._mailbox = Mailbox[Checkpoint]("checkpointer", size=1)

    async def run(self) -> None:
        await self._mailbox.serve(self._save)

    async def consider(self, state: State) -> None:
        """Take one if it is time, or the run's end. To be called where state, model and log are at the same record."""
        if self._version < 0:
            self._version = state.version
        is_due = state.version - self._version >= self._parts.checkpoint_every
        is_last = state.is_finished and state.version > self._version
        if self.is_busy or not (is_due or is_last):
            return
        self.is_busy = True
        self._version = state.version
        async with self._model_lock:
            model = await self._parts.blocking(self._model.snapshot)
        checkpoint = Checkpoint(
            run=self._parts.settings.run,
            lsn=state.lsn,
            term=state.term,
            chain=self._parts.log.chain,
            state=state.dump(),
            state_hash=state.digest(),
            model=model,
        )
        await self._mailbox.ref.tell(checkpoint)

    async def _save(self, checkpoint: Checkpoint) -> None:
        try:
            covered = await self._parts.store.save(checkpoint)
            if (needed := self._drop_log(covered)) is not None:
                await self._parts.blocking(self._parts.log.drop_before, needed)
            self._parts.observer.event("checkpoint", lsn=checkpoint.lsn)
        except DiskFull as error:
            self._parts.observer.event("checkpoint failed", lsn=checkpoint.lsn, reason=str(error))
        finally:
            self.is_busy = False
