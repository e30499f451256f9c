"""A simulated world that is there to learn in: nobody judges it, and the loss is measured on the way.

The judge's account costs more than the training, and random worlds are where it belongs. What a study reads off a
world is collected here; learning.py runs them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
import trio

from hetero_async.core import ranges
from hetero_async.core.admission import Cause, Facts, NotAdmitted
from hetero_async.core.ledger import sample_at
from hetero_async.core.messages import Ack, Message, Nack, Push
from hetero_async.core.records import Delta, Entry, Genesis, Published, RunSettings, Stepped
from hetero_async.core.state import State
from hetero_async.desk import Desk
from hetero_async.shell.disk import Disk
from hetero_async.sim.checkers import Judge, Violation
from hetero_async.sim.disk import SimulatedDisk
from hetero_async.sim.lifetime import Life
from hetero_async.sim.plan import Plan
from hetero_async.sim.text import Reader, Reading
from hetero_async.sim.trace import Trace
from hetero_async.sim.workload import Student
from hetero_async.sim.world import LIVENESS_SECONDS, World
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import Replica

# Faults that leave no trace on any disk; with these alone a disk needs no book of what a power cut would take.
SPARE_DISKS = ("link", "way", "site", "messages", "connections", "leave", "kill", "freeze")


@dataclass(frozen=True, slots=True)
class Point:
    """The server's parameters right after a publish. `tokens` and `steps` are those merged into them."""

    seconds: float
    tokens: int
    steps: int
    version: int
    loss: float


class Recorder(Judge):
    """Counts, and judges nothing but that the run goes on. Measures the loss after some of the publishes."""

    def __init__(self, settings: RunSettings, fail: Callable[[Violation], None], reading: Reading, points: int) -> None:
        super().__init__(settings, fail)
        self.curve: list[Point] = []
        self.choosing_loss = math.nan  # the last loss, on text that nothing is reported of
        self._reading = reading
        self._every = settings.samples / points  # samples
        self._lsn = 0
        self._deltas: dict[int, tuple[int, int]] = {}  # admitted and not merged, by lsn: samples, steps
        self._taken = self._samples = self._steps = 0
        self._stepped = 0

    @property
    def trained(self) -> int:
        return self._taken

    def sends(self, node: str, term: int, worker: str, message: Message, disks: Mapping[str, SimulatedDisk]) -> None:
        if isinstance(message, Ack):
            self.account(worker).acknowledged[message.seq] = message.lsn
        elif isinstance(message, Nack):
            self.account(worker).nacked[message.seq] = True

    def changed(self, entry: Entry, parameters: torch.Tensor) -> None:
        """A record was applied; once more in a recovery, which is no news."""
        if entry.lsn <= self._lsn:
            return
        self._lsn = entry.lsn
        match entry.record:
            case Delta() as delta:
                self._deltas[entry.lsn] = (ranges.size(delta.ranges), delta.steps)
                self._taken += ranges.size(delta.ranges)
            case Stepped() as stepped:
                self._stepped = stepped.version
                for samples, steps in map(self._deltas.pop, stepped.deltas):
                    self._samples += samples
                    self._steps += steps
            case Genesis():
                self._measure(parameters)
            case Published():
                if self._is_due():
                    self._measure(parameters)

    def _is_due(self) -> bool:
        """About so often as was asked for, and at the run's end."""
        last = self.curve[-1].tokens // self._reading.shape.context
        crossed = self._samples // self._every > last // self._every
        return crossed or last < self._samples == self.settings.samples

    def _measure(self, parameters: torch.Tensor) -> None:
        tokens = self._samples * self._reading.shape.context
        loss = self._reading.evaluate(parameters)
        self.curve.append(Point(trio.current_time(), tokens, self._steps, self._stepped, loss))
        if self._samples == self.settings.samples:
            self.choosing_loss = self._reading.choose(parameters)

    def settled(self, node: str, state: State, model_hash: bytes) -> None:
        pass

    def recovered(self, node: str, state: State, model_hash: bytes) -> None:
        pass


class RecordedModel(ServerModel):
    """`lost`: the share of deltas that are refused for no reason."""

    def __init__(self, recorder: Recorder, lost: float, random: Random) -> None:
        super().__init__()
        self._recorder, self._lost_share, self._random = recorder, lost, random

    def inspect(self, codec: str, payload: bytes) -> Facts:
        facts = super().inspect(codec, payload)
        if self._lost_share and self._random.random() < self._lost_share:
            return replace(facts, refusal=NotAdmitted("lost on purpose", Cause.LATE))
        return facts

    def apply(self, entry: Entry) -> None:
        super().apply(entry)
        self._recorder.changed(entry, self.theta)


class Bystander(Life):
    """Sees nothing: what a life is judged by costs as much as a step."""

    def found(self, outbox: dict[int, tuple[Push, bytes]]) -> None:
        pass

    def cut(self, delta: torch.Tensor) -> None:
        pass

    def encoded(self, codec: str, payload: bytes) -> None:
        pass

    def saved(self, push: Push, payload: bytes) -> None:
        pass

    def dropped(self, seq: int, is_acknowledged: bool) -> None:
        pass

    def aimed(self, publish: int, pending: Sequence[tuple[str, bytes]], target: torch.Tensor) -> None:
        pass

    def began(self, target: torch.Tensor) -> None:
        pass

    def adopted(self, target: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        pass


class LastingDisk(SimulatedDisk):
    """Loses nothing, and keeps no book of what it might have lost: a long run's would fill memory."""

    def write(self, descriptor: int, buffers: Sequence[bytes | memoryview], offset: int) -> int:
        self._dies_now()
        return Disk.write(self, descriptor, buffers, offset)

    def fsync(self, descriptor: int) -> None:
        self._dies_now()

    def rename(self, source: Path, target: Path) -> None:
        self._dies_now()
        Disk.rename(self, source, target)

    def unlink(self, path: Path) -> None:
        self._dies_now()
        Disk.unlink(self, path)


class LearningWorld(World):
    def __init__(self, plan: Plan, directory: Path, reading: Reading, points: int, lost: float = 0.0) -> None:
        self._reading, self._points, self._lost_share = reading, points, lost
        self._is_disk_safe = all(any(word in fault.kind for word in SPARE_DISKS) for fault in plan.faults)
        super().__init__(plan, directory, reading, Trace())
        # A round of the slowest worker, its delta and a publish over the thinnest link, all of it twice.
        longest = plan.settings.steps_per_round * max(worker.step_seconds for worker in plan.workers)
        thinnest = min(link.bytes_per_second for link in plan.links.values())
        self.liveness_seconds = LIVENESS_SECONDS + 2 * (2 * longest + 2 * 4 * reading.parameters / thinnest)

    @property
    def recorder(self) -> Recorder:
        assert isinstance(self.judge, Recorder)
        return self.judge

    def make_judge(self) -> Judge:
        return Recorder(self.plan.settings, self._failed, self._reading, self._points)

    def make_disk(self, directory: Path, random: Random) -> SimulatedDisk:
        return LastingDisk(directory, random) if self._is_disk_safe else SimulatedDisk(directory, random)

    def make_model(self, node: str) -> ServerModel:
        return RecordedModel(self.recorder, self._lost_share, self.random(f"losses {self.next_life()}"))

    def make_life(self, worker: str) -> Life:
        return Bystander(self.judge, worker)

    def _judge_finished(self) -> None:
        """A finished run has been recorded; its log is not kept, so nobody verifies it."""

    def train(self, desk: Desk, replica: Replica, student: Student, life: Life, positions: list[int]) -> None:
        assert isinstance(student, Reader)
        student.progress = desk.progress
        student.step([sample_at(position, desk.samples, desk.seed) for position in positions])
