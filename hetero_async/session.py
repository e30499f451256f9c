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
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, cast

import torch
import trio
from torch.utils.data import default_collate

from hetero_async import drawing
from hetero_async.actors.threads import soon
from hetero_async.asking import endpoints
from hetero_async.config import RunConfig, from_environment
from hetero_async.core.ledger import STREAM
from hetero_async.core.messages import Hello
from hetero_async.core.worker import Worker
from hetero_async.core.worker_events import Evaluated, Measured
from hetero_async.desk import FOR_ANSWER, FOR_SAMPLES, Desk
from hetero_async.drawing import Dataset
from hetero_async.errors import DatasetError, HeteroAsyncError, UserError, first_error
from hetero_async.evaluation import Evaluation, Measure
from hetero_async.inner_state import KEPT, InnerState
from hetero_async.inspection import check_length, check_optimizer, inner_optimizer, is_group, was_skipped
from hetero_async.probing import Probing
from hetero_async.rounds import Rounds
from hetero_async.schedule import Schedule
from hetero_async.shell.dial import open_dial_link, until_stopped
from hetero_async.shell.kept import KeptFile
from hetero_async.shell.telemetry import event_log, note
from hetero_async.shell.threads import in_thread
from hetero_async.streams import Place, PlacedOutbox, Stateful, is_stateful
from hetero_async.tensors.devices import dtype_name
from hetero_async.tensors.follower import Follower
from hetero_async.tensors.replica import Replica
from hetero_async.tensors.schema import unwrapped
from hetero_async.train import Training

CLOSE_SECONDS = 5.0
# A server that cannot be reached for so long will not come by waiting; the site's agent starts us again anyway.
JOIN_SECONDS = 600.0
TELL_SECONDS = 10.0


def join(model: torch.nn.Module, optimizer: torch.optim.Optimizer, *, probe: Any = None) -> "Session":
    """Join the run that this process was started for, and load the run's parameters and buffers into the model.

    Returns when the parameters are in place; until then it says every few seconds what it waits for. Raises ConfigError
    when the process was not started by `hetero-async work`, RefusedError with the server's reason (another model,
    another dataset, a newer process with the same key), SchemaError for a model that cannot be trained this way or an
    optimizer that trains something else, UserError for what is no optimizer, or when no server has let it join in ten
    minutes. Once joined it outlasts any absence of the server.

    The optimizer may be wrapped, by Accelerate's `prepare` for example. Model and optimizer stay what they are from
    here on: a parameter that is added, replaced or unfrozen later ends the loop with a SchemaError.

    `probe` is what the model is called with before its first step, the same at every site: a tensor, or a tuple or dict
    of arguments. What its layers answer, on the parameters that the run began with, is compared with other workers';
    without it, what each of torch's own layers answers to an input. What comes of a difference is `probe` in run.toml.

    Where `torch.distributed` is initialised, its processes are one worker: each of them must call this with its rank's
    model, and take the same steps. Raises UserError on every rank when their models, torch or this package differ.
    """
    session: Session
    if is_group():
        from hetero_async.group import GroupSession  # loads what one process has no use for

        session = GroupSession(model, optimizer, probe)
    else:
        config, worker = from_environment()
        session = Session(config, worker, model, optimizer, probe=probe, is_probed=config.training.probe != "off")
    session.start()
    return session


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
        probe: Any = None,
        is_probed: bool = False,
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
        self._model = model
        self._evaluation: Evaluation | None = None
        self._probing = Probing(worker, model, self._replica, probe) if is_probed else None
        self._desk.lacks_initial = is_probed
        self._place = Place(KeptFile(config.worker_directory(worker) / "stream.kept"))
        self._outbox: PlacedOutbox | None = None
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
        self,
        dataset: Dataset | Iterable[Any],
        batch_size: int,
        collate: Callable[[list[Any]], Any] = default_collate,
        *,
        data: Literal["shared", "private"] = "shared",
        workers: int = 0,
        tokens: Callable[[Any], int] | None = None,
    ) -> Iterator[Any]:
        """Yield batches of samples that this worker alone trains on, until the whole run is finished.

        `dataset` is map-style and the same at every site, or, as `data="private"`, at every worker of this site;
        which of its samples come, the server decides, and each comes once a pass. Or it is iterable: a stream that
        only this worker sees, and that says itself what comes; see `stream`. Batches have `batch_size` samples, the
        run's last ones may have fewer. Batches that no optimizer step has followed when nothing else is left (half
        an accumulated step) come again until one does.

        `workers` processes fetch samples ahead, as torch's DataLoader has them do. `tokens(batch)` counts what the
        run's `weights = "tokens"` weighs by; without it that is samples.

        Raises DatasetError for a dataset that is smaller than a batch or changes its length, RefusedError where it has
        another length than at the others.
        """
        drawing.check(dataset, batch_size)
        desk, pin_memory = self._desk, workers > 0 and self._replica.device.type == "cuda"
        if drawing.is_stream(dataset):
            counted = drawing.counted(cast(Iterable[Any], dataset), batch_size, collate, workers, pin_memory)
            source = dataset if workers == 0 else None  # what processes have fetched ahead it cannot tell
            pairs = drawing.passes(counted)
            yield from self._streamed(pairs, lambda pair: pair[0], lambda pair: pair[1], source, tokens)
            return
        mapped = cast(Dataset, dataset)
        self._open(batch_size, len(mapped), data)
        if workers:
            reserve = functools.partial(self._draw, self._rounds.reserve, batch_size)
            found = drawing.prefetched(mapped, collate, desk, batch_size, reserve, workers, pin_memory)
        else:
            draw = functools.partial(self._draw, self._rounds.draw, batch_size)
            found = drawing.fetched(mapped, collate, desk, draw)
        rounds = desk.rounds
        for batch in found:
            if rounds != desk.rounds:
                rounds = desk.rounds
                check_length(mapped, desk.dataset_samples)
            desk.count_tokens(tokens(batch) if tokens else 0)
            yield batch
        self._end()

    def stream(
        self,
        batches: Iterable[Any],
        samples: Callable[[Any], int] = drawing.leading,
        *,
        tokens: Callable[[Any], int] | None = None,
    ) -> Iterator[Any]:
        """Yield the batches of an iterable that only this worker sees (a DataLoader, say), until the run is finished.

        They count as samples of the run, so many as `samples(batch)` says: if nothing is given, the length of the first
        tensor. An iterable that can be begun anew is, when it ends; with an iterator's end the worker brings in what it
        has done and leaves. One with `state_dict` and `load_state_dict` (JSON-able) goes on behind the newest delta
        when the worker is started again. Batches of a delta that was refused do not come again, and the run's last
        batch may hold more samples than are counted.
        """
        yield from self._streamed(drawing.passes(batches), samples, lambda batch: batch, batches, tokens)

    def evaluate(self, measure: Measure, every: float = 0.05) -> None:
        """Have `measure(model)` called with the run's published parameters, whenever another `every` (a share of the
        run, 0 … 1) is trained, and with the last ones; by one worker at a time, whom the server chooses.

        It returns a number, which is recorded under the function's name, or numbers by their names. It is called
        between two rounds, without gradients, in evaluation mode. Afterwards parameters, gradients, buffers and random
        states are what they were. Raises UserError for an `every` that is no such share.
        """
        self._evaluation = Evaluation(self._model, measure, every)
        self._desk.evaluates_every = every

    def record(self, name: str, value: float) -> None:
        """Write a figure (a validation loss, say) into the run's log; `status` shows the newest of each name.

        A NaN or an infinity is not written: it would not compare equal to itself when the log is replayed.
        """
        if not math.isfinite(value):
            note(self.worker, f"{name} is {value}, which is not recorded")
        elif self._token is not None and self._training is not None:
            soon(self._token, self._training.measured, Measured(name=name, value=float(value)))

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
        self._evaluate_if_asked()
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

    def _draw(self, draw: Callable[[int], list[int] | None], count: int) -> list[int] | None:
        while (positions := draw(count)) == []:
            self._wait(FOR_SAMPLES)
            self._rounds.adopt()
            self._evaluate_if_asked()
        self._desk.doing = "training"
        return positions

    def _wait(self, why: str) -> None:
        self._desk.wait(why)

    def _open(self, batch_size: int, dataset_samples: int, data: str) -> None:
        desk = self._desk
        if desk.batch and desk.data != data:
            raise DatasetError(f"this worker trains on {desk.data} data; a run's worker has one kind of it")
        desk.batch, desk.dataset_samples, desk.data = batch_size, dataset_samples, data

    def _streamed(
        self,
        items: Iterator[Any],
        samples: Callable[[Any], int],
        batch_in: Callable[[Any], Any],
        source: object,
        tokens: Callable[[Any], int] | None,
    ) -> Iterator[Any]:
        desk = self._desk
        if is_stateful(source) and self._outbox is not None:
            self._place.open(cast(Stateful, source), self._outbox.safe())
        for item in items:
            count, batch = samples(item), batch_in(item)
            self._open(max(desk.batch, count), 1, STREAM)
            positions = self._draw(self._rounds.draw, count)
            if positions is None:
                break
            self._place.note(positions[-1])
            desk.count_tokens(tokens(batch) if tokens else 0)
            yield batch
        else:
            while not self._rounds.flush():
                self._wait("bringing in the last round of its stream")
                self._rounds.adopt()
        self._end()

    def _end(self) -> None:
        self._evaluate_if_asked()
        self.close()

    def _evaluate_if_asked(self) -> None:
        asked = self._desk.take_published()
        if asked is None or self._evaluation is None or self._token is None or self._training is None:
            return
        with self._desk.stepping_aside("evaluating"):
            figures = self._evaluation.figures(self._replica.showing(asked.flat, asked.buffers))
        evaluated = Evaluated(publish=asked.anchor.publish, term=asked.anchor.term, figures=figures)
        soon(self._token, self._training.measured, evaluated)
        self._rounds.adopt()

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
        if self._probing is not None and self._token is not None and self._training is not None:
            say = functools.partial(soon, self._token, self._training.machine.prober.probed)
            self._probing.run(self._desk, self._follower, say, self._wait)
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
            self._outbox = PlacedOutbox(self._place, config.worker_directory(worker))
            machine = Worker(hello)
            machine.prober.is_lacking = self._probing is not None
            self._training = Training(
                worker=worker,
                machine=machine,
                follower=self._follower,
                desk=self._desk,
                link=link,
                outbox=self._outbox,
                residual=KeptFile(config.worker_directory(worker) / "residual.kept"),
                blocking=in_thread,
                observer=observer,
            )
            with self._scope:  # inside the link: the last word, bye, still needs it
                await self._training.run()
