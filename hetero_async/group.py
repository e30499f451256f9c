"""A worker that is a torchrun group: every rank has a GroupSession, and rank 0 speaks for all of them.

Rank 0 runs what a worker of one process runs. Whatever that does to the parameters it says first, so that the other
ranks take part, and at the end of each step it says what follows: how far the run is, and the next batch. So ranks cut,
adopt and draw at the same step, learning rates are the same to the bit, and a step costs one small message.
"""

import atexit
import importlib.metadata
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.utils.data import default_collate

from hetero_async import drawing
from hetero_async.config import RunConfig, from_environment
from hetero_async.core.ledger import sample_at
from hetero_async.desk import FOR_ANSWER, Desk
from hetero_async.drawing import Dataset
from hetero_async.errors import ConfigError, HeteroAsyncError, UserError
from hetero_async.group_inner import GroupInnerState
from hetero_async.inspection import check_optimizer, inner_optimizer, was_skipped
from hetero_async.probing import Probing
from hetero_async.session import CLOSE_SECONDS, Session
from hetero_async.shell.telemetry import note
from hetero_async.tensors.control import Control, Kind, Said
from hetero_async.tensors.digest import hash_of_input
from hetero_async.tensors.schema import unwrapped
from hetero_async.tensors.torchrun import GroupReplica


class GroupSession(Session):
    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, probe: Any) -> None:
        """A collective. Raises UserError where ranks do not fit together."""
        optimizer = inner_optimizer(optimizer)
        control = self._control = Control()
        versions = f"torch {torch.__version__}, hetero_async {importlib.metadata.version('hetero-async')}"
        control.require_equal("the ranks of a group run different software", versions)
        control.require_equal("the batch to probe with", "none" if probe is None else hash_of_input(probe))
        config, worker, directory = _place_of_all(control)
        replica = GroupReplica(unwrapped(model), control)
        inner = GroupInnerState(optimizer, directory, worker, control, replica.is_sharded)
        if config is not None:
            is_probed = config.training.probe != "off"
            super().__init__(
                config, worker, model, optimizer, replica=replica, inner=inner, probe=probe, is_probed=is_probed
            )
        else:
            check_optimizer(optimizer, replica.ids)
            self._begin_following(worker, optimizer, inner)
            self._probing = Probing(worker, model, replica, probe)
        self._group_replica, self._kept, self._optimizer = replica, inner, optimizer
        self._batch = 0  # of the whole group; 0 outside of `batches`
        self._ahead: list[int] = []  # drawn with the last step
        self._progress = 0.0
        self._writing = threading.Thread()

    def _begin_following(self, worker: str, optimizer: torch.optim.Optimizer, inner: GroupInnerState) -> None:
        """What a Session has, as far as a rank that speaks with no server needs it."""
        self.worker = worker
        self._desk = Desk()
        self._inner = inner
        self._schedules = []
        self._token = self._training = None
        self._hook = optimizer.register_step_post_hook(self._after_step)
        inner.restore()

    @property
    def progress(self) -> float:
        """As of the last step, and the same on every rank."""
        return self._progress

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
        """As of a Session; a batch has `batch_size` samples on each rank, and no two ranks have the same ones.

        The run's last batch is shared out as evenly as it can be. A rank for which nothing is left of it takes its last
        sample once more, since all must take the step; it is counted once. Raises UserError for a stream, for `workers`
        and for `tokens`, which a group has not.
        """
        for given, told in ((drawing.is_stream(dataset), "a stream"), (workers, "workers"), (tokens, "tokens")):
            if given:
                raise UserError(f"a group of ranks draws its samples by their numbers: session.batches without {told}")
        mapped = cast(Dataset, dataset)
        drawing.check(mapped, batch_size * self._control.size)
        self._control.require_equal("session.batches", f"{len(mapped)} samples, {batch_size} a batch, {data}")
        desk = self._desk
        self._batch = batch_size * self._control.size
        self._open(self._batch, len(mapped), data)
        self._control.bear(self._batch)
        while (positions := self._draw_together()) is not None:
            own = positions[self._control.rank :: self._control.size] or positions[-1:]
            yield collate([mapped[sample_at(position, desk.samples, desk.seed)] for position in own])
        self.close()

    def stream(self, *_: Any, **__: Any) -> Iterator[Any]:
        raise UserError("a group of ranks draws its samples by their numbers: session.stream is for one process")

    def evaluate(self, *_: Any, **__: Any) -> None:
        raise UserError("a group of ranks does not evaluate: let a worker of one process do it (session.evaluate)")

    def close(self) -> None:
        """Leave the run. The group leaves it with rank 0."""
        self._batch = 0
        if self._control.rank == 0:
            super().close()
        else:
            self._hook.remove()
            atexit.unregister(self.close)
        if self._writing.is_alive():
            self._writing.join(CLOSE_SECONDS)

    # --- in every rank's own thread ---

    def start(self) -> None:
        if self._control.rank == 0:
            with self._control.failure_is_told():
                super().start()
                said = Said(kind=Kind.BEGUN, progress=self._desk.progress, number=time.time_ns())
                self._control.say(said)
                self._control.share(str(self._desk.seed).encode())
        else:
            atexit.register(self.close)
            said = self._heed(Kind.BEGUN)
            self._desk.seed = int(self._control.share(b""))
        self._kept.moment, self._progress = said.number, said.progress

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if was_skipped(optimizer):
            return
        if self._control.rank == 0:
            with self._control.failure_is_told():
                said = self._decide()
                self._control.say(said)
        else:
            said = self._heed(Kind.STEPPED)
            self._desk.samples = said.number
        self._progress = said.progress
        self._ahead = list(said.positions or ())
        for schedule in self._schedules:
            schedule.follow(self._progress)
        self._kept.moment += 1
        if said.is_kept and (tensors := self._kept.copy()):
            self._keep(tensors)

    def _decide(self) -> Said:
        """On rank 0, what follows from a step, when it has been done."""
        desk = self._desk
        self._rounds.end_step()
        while desk.is_stretched_out():
            self._wait(FOR_ANSWER)
            self._rounds.adopt()
        ahead = desk.draw(self._batch) if self._batch else []
        return Said(
            kind=Kind.STEPPED,
            progress=desk.progress,
            number=desk.samples,
            is_kept=self._kept.is_due(desk.rounds),
            positions=ahead or (),
        )

    def _draw_together(self) -> list[int] | None:
        """The whole group's positions, on every rank."""
        if self._ahead:
            positions, self._ahead = self._ahead, []
            return positions
        if self._control.rank == 0:
            with self._control.failure_is_told():
                drawn = self._draw(self._rounds.draw, self._batch)
                said = Said(kind=Kind.DRAWN, progress=self._desk.progress, number=self._desk.samples, positions=drawn)
                self._control.say(said)
        else:
            said = self._heed(Kind.DRAWN)
            self._desk.samples = said.number
        self._progress = said.progress
        return None if said.positions is None else list(said.positions)

    def _wait(self, why: str) -> None:
        """On rank 0. The others wait for its next word; that it is there they hear twice a second."""
        if self._group_replica.is_asked_for:
            self._group_replica.gather()
        self._control.say(Said(kind=Kind.STILL))
        super()._wait(why)

    def _heed(self, awaited: Kind) -> Said:
        """Take part in all that rank 0 does until it says this. Raises HeteroAsyncError for what rank 0 fails of."""
        while True:
            said = self._control.hear()
            match said.kind:
                case Kind.STILL:
                    pass
                case Kind.GATHER:
                    self._group_replica.gather()
                case Kind.CUT:
                    self._group_replica.cut()
                case Kind.ADOPT:
                    self._group_replica.adopt(None)
                case Kind.SHOWN:
                    assert self._probing is not None
                    self._probing.report(None, ())
                case Kind.RESET:
                    self._group_replica.reset(None)
                    if awaited is not Kind.BEGUN:  # the parameters were spoilt, and the optimizer's memory of them
                        self._optimizer.state.clear()
                case kind if kind is awaited:
                    return said
                case kind:
                    raise UserError(
                        f"rank {self._control.rank} is at {AT[awaited]} while rank 0 is at {AT[kind]}: "
                        "every rank must take the same batches and steps"
                    )

    def _keep(self, tensors: dict[str, torch.Tensor]) -> None:
        if self._control.rank == 0:
            super()._keep(tensors)
        elif not self._writing.is_alive():
            self._writing = threading.Thread(target=self._write, args=(tensors,), name="hetero_async kept", daemon=True)
            self._writing.start()

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        try:
            self._kept.write(tensors)
        except HeteroAsyncError as error:
            note(self.worker, f"the optimizer's state is not kept: {error}")


AT = {Kind.BEGUN: "hetero_async.join", Kind.DRAWN: "a batch", Kind.STEPPED: "an optimizer step"}


def _place_of_all(control: Control) -> tuple[RunConfig | None, str, Path]:
    """The run on rank 0, whose worker this group is, and that one's directory.

    Rank 0 alone looks for them in the environment: on other hosts nothing of the run may be known.
    """
    config, worker, directory, complaint = None, "", "", ""
    if control.rank == 0:
        try:
            config, worker = from_environment()
            directory = str(config.worker_directory(worker))
        except ConfigError as error:
            complaint = str(error)
    control.require_none(complaint)
    worker, _, directory = control.share(f"{worker}\n{directory}".encode()).decode().partition("\n")
    return config, worker, Path(directory)
