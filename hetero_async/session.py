"""The three lines: `join` a model and its optimizer to the run, and iterate over `batches`.

    session = ha.join(model, optimizer)
    for batch in session.batches(dataset, batch_size):
        ...

`optimizer.step()` is hooked: after it, and nowhere else, a round may end or the parameters may move to a newer
publish. Everything slow happens in the background thread that `join` starts.
"""

import atexit
import functools
import importlib.metadata
import math
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import trio
from torch.utils.data import default_collate

from hetero_async.asking import endpoints
from hetero_async.config import RunConfig, from_environment
from hetero_async.core.ledger import sample_at
from hetero_async.core.messages import Hello
from hetero_async.core.worker import Worker
from hetero_async.desk import FOR_ANSWER, FOR_SAMPLES, Desk
from hetero_async.errors import HeteroAsyncError, UserError, first_error
from hetero_async.inner_state import KEPT, InnerState
from hetero_async.inspection import check_dataset, check_length, check_optimizer, inner_optimizer, was_skipped
from hetero_async.rounds import Rounds
from hetero_async.schedule import Schedule
from hetero_async.shell.dial import open_dial_link, until_stopped
from hetero_async.shell.kept import KeptFile
from hetero_async.shell.outbox import FileOutbox
from hetero_async.shell.telemetry import event_log, note
from hetero_async.shell.threads import in_thread
from hetero_async.tensors.devices import dtype_name
from hetero_async.tensors.follower import Follower
from hetero_async.tensors.replica import Replica
from hetero_async.tensors.schema import unwrapped
from hetero_async.train import Training, soon

CLOSE_SECONDS = 5.0
# A server that cannot be reached for so long will not come by waiting; the site's agent starts us again anyway.
JOIN_SECONDS = 600.0
TELL_SECONDS = 10.0


class Dataset(Protocol):
    """A map-style dataset: `len(dataset)` samples, `dataset[i]` is one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def join(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> "Session":
    """Join the run that this process was started for, and load the run's parameters and buffers into the model.

    Returns when the parameters are in place; until then it says every few seconds what it waits for. Raises ConfigError
    when the process was not started by `hetero-async work`, RefusedError with the server's reason (another model,
    another dataset, a newer process with the same key), SchemaError for a model that cannot be trained this way or an
    optimizer that trains something else, UserError for what is no optimizer, or when no server has let it join in ten
    minutes. Once joined it outlasts any absence of the server.

    The optimizer may be wrapped, by Accelerate's `prepare` for example. Model and optimizer stay what they are from
    here on: a parameter that is added, replaced or unfrozen later ends the loop with a SchemaError.

    Where `torch.distributed` is initialised, its processes are one worker: each of them must call this with its rank's
    model, and take the same steps. Raises UserError on every rank when their models, torch or this package differ.
    """
    session: Session
    if is_group():
        from hetero_async.group import GroupSession  # loads what one process has no use for

        session = GroupSession(model, optimizer)
    else:
        session = Session(*from_environment(), model, optimizer)
    session.start()
    return session


def is_group() -> bool:
    """Whether this process is one of a group. Raises UserError where torchrun says so and torch does not know yet."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return True
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"torchrun started this process as rank {os.environ.get('RANK')} of {os.environ['WORLD_SIZE']}: "
            "call torch.distributed.init_process_group() before hetero_async.join"
        )
    return False


class Session:
    """One worker's part in a run. Made by `join`."""

    def __init__(
        self,
        config: RunConfig,
        worker: str,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        replica: Replica | None = None,
        inner: InnerState | None = None,
    ) -> None:
        self.worker = worker
        optimizer = inner_optimizer(optimizer)
        self._config = config
        self._desk = Desk()
        self._replica = replica or Replica(unwrapped(model))
        check_optimizer(optimizer, self._replica.ids)
        self._rounds_checked = 0
        self._rounds = Rounds(self._desk, self._replica, forget=lambda: optimizer.state.clear())
        self._follower = Follower(self._replica)
        self._inner = inner or InnerState(optimizer, config.worker_directory(worker) / KEPT, worker)
        self._is_warm = self._inner.restore()
        self._schedules: list[Schedule] = []
        self._token: trio.lowlevel.TrioToken | None = None
        self._training: Training | None = None
        self._addresses = ", ".join(endpoint.control for endpoint in endpoints(config))
        self._join_deadline = math.inf  # while it is joining; read by the background
        self._scope = trio.CancelScope()
        self._thread = threading.Thread(target=self._run, name="hetero_async", daemon=True)
        self._hook = optimizer.register_step_post_hook(self._after_step)

    # --- what a training script uses ---

    @property
    def progress(self) -> float:
        """How much of the whole run is trained, by everybody together: 0 … 1. Made for learning-rate schedules."""
        return self._desk.progress

    def scheduler(self, optimizer: torch.optim.Optimizer, share: Callable[[float], float]) -> None:
        """Let every learning rate of the optimizer be `share(progress)` of what it is now, from here on and after each
        step.

        Progress is the whole run's, so the schedule is the same at every site, at whatever speed it trains, and for a
        worker that joins late. Instead of a scheduler of torch's, which counts the steps of one process.
        """
        schedule = Schedule(optimizer, share)
        schedule.follow(self.progress)
        self._schedules.append(schedule)

    def batches(
        self, dataset: Dataset, batch_size: int, collate: Callable[[list[Any]], Any] = default_collate
    ) -> Iterator[Any]:
        """Yield batches of samples that this worker alone trains on, until the whole run is finished.

        `dataset` is map-style and the same at every site; which samples come, the server decides. Batches have
        `batch_size` samples, the run's last ones may have fewer. Batches that no optimizer step has
        followed when nothing else is left (half an accumulated step) come again until one does. Raises DatasetError
        for a dataset that is smaller than a batch or has no length, or another one than when training began.
        """
        check_dataset(dataset, batch_size)
        desk = self._desk
        desk.batch, desk.dataset_samples, rounds = batch_size, len(dataset), desk.rounds
        while (positions := self._draw(batch_size)) is not None:
            if rounds != desk.rounds:
                rounds = desk.rounds
                check_length(dataset, desk.dataset_samples)
            yield collate([dataset[sample_at(position, desk.samples, desk.seed)] for position in positions])
        self.close()

    def record(self, name: str, value: float) -> None:
        """Write a figure (a validation loss, say) into the run's log; `status` shows the newest of each name.

        A NaN or an infinity is not written: it would not compare equal to itself when the log is replayed.
        """
        if not math.isfinite(value):
            note(self.worker, f"{name} is {value}, which is not recorded")
        elif self._token is not None and self._training is not None:
            soon(self._token, self._training.measured, name, float(value))

    def close(self) -> None:
        """Leave the run. What is not pushed yet goes back to the pool for others to train on."""
        self._hook.remove()
        atexit.unregister(self.close)
        if self._thread.is_alive() and self._token is not None:
            soon(self._token, self._scope.cancel)
            self._thread.join(CLOSE_SECONDS)
            if not self._desk.is_finished:
                self._inner.write_last()

    # --- after each optimizer step, in the user's thread ---

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if was_skipped(optimizer):
            return
        self._rounds.end_step()
        if self._rounds_checked != self._desk.rounds:
            self._rounds_checked = self._desk.rounds
            check_optimizer(optimizer, self._replica.ids)
        for schedule in self._schedules:
            schedule.follow(self.progress)
        if tensors := self._inner.copy_if_due(self._desk.rounds):
            self._keep(tensors)
        while self._desk.is_stretched_out():
            self._wait(FOR_ANSWER)
            self._rounds.adopt()

    def _keep(self, tensors: dict[str, torch.Tensor]) -> None:
        if self._token is not None and self._training is not None:
            soon(self._token, self._training.keep, functools.partial(self._inner.write, tensors))

    def _draw(self, count: int) -> list[int] | None:
        while (positions := self._rounds.draw(count)) == []:
            self._wait(FOR_SAMPLES)
            self._rounds.adopt()
        self._desk.doing = "training"
        return positions

    def _wait(self, why: str) -> None:
        self._desk.wait(why)

    # --- the background ---

    def start(self) -> None:
        """Start the background and wait until the run's parameters are in the model."""
        began = told = time.monotonic()
        self._join_deadline = began + JOIN_SECONDS
        self._thread.start()
        atexit.register(self.close)
        while not self._rounds.begin():
            now = time.monotonic()
            if now >= self._join_deadline:
                self.close()
                raise UserError(
                    f"could not join the run at {self._addresses} in {JOIN_SECONDS:g} s; is its server running?"
                )
            if now - told >= TELL_SECONDS:
                told = now
                why = self._desk.waiting or "no answer yet"
                note(self.worker, f"joining {self._addresses}: {why}. Trying {self._how_long()}")
            self._wait("joining")
        self._join_deadline = math.inf
        self._desk.doing = "joined"

    def _how_long(self) -> str:
        """How long a server that is not reached will be tried: one that has joined has work to bring back to it."""
        left = self._join_deadline - time.monotonic()
        return until_stopped() if left == math.inf else f"for {max(0.0, left):.0f} s, then giving up"

    def _run(self) -> None:
        try:
            trio.run(self._background)
        except* HeteroAsyncError as group:
            self._desk.fail(first_error(group))
        finally:
            self._desk.fail(HeteroAsyncError("the background of this worker has ended"), only_first=True)

    async def _background(self) -> None:
        config, worker = self._config, self.worker
        self._token = trio.lowlevel.current_trio_token()
        observer = event_log(worker)
        hello = Hello(
            run=config.run.name,
            software=importlib.metadata.version("hetero-async"),
            schema_hash=self._follower.schema_hash,
            last_seq=0,
            claims=(),
            device=self._replica.described,
            dtype=dtype_name(self._replica.dtype),
            life=secrets.token_bytes(8),
            is_warm=self._is_warm,
        )
        async with open_dial_link(
            endpoints(config),
            secret_path=config.keys / f"{worker}.secret",
            observer=observer,
            how_long=self._how_long,
        ) as link:
            self._training = Training(
                worker=worker,
                machine=Worker(hello),
                follower=self._follower,
                desk=self._desk,
                link=link,
                outbox=FileOutbox(config.worker_directory(worker)),
                residual=KeptFile(config.worker_directory(worker) / "residual.kept"),
                blocking=in_thread,
                observer=observer,
            )
            with self._scope:  # inside the link: the last word, bye, still needs it
                await self._training.run()
