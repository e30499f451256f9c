"""The ports of a simulated worker and server, each fulfilled by the real thing, with the judge looking on."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hetero_async.core.messages import PUBLISH, Push
from hetero_async.core.records import Entry, Published
from hetero_async.serve import Serving
from hetero_async.shell.disk import Disk
from hetero_async.shell.outbox import FileOutbox
from hetero_async.sim.checkers import Judge
from hetero_async.sim.lifetime import Life
from hetero_async.sim.trace import Trace
from hetero_async.tensors.follower import Follower
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import Replica

if TYPE_CHECKING:
    from hetero_async.sim.world import World


# Of an event, what is worth a place in the trace.
TOLD = ("lsn", "worker", "standby", "term", "aside")


class WatchedModel(ServerModel):
    def __init__(self, judge: Judge, node: str) -> None:
        super().__init__()
        self._judge = judge
        self._node = node

    def apply(self, entry: Entry) -> None:
        super().apply(entry)
        made = self.fetch(PUBLISH, entry.record.number) if isinstance(entry.record, Published) else None
        self._judge.applied(self._node, entry, self.shadow, made or b"")


class WatchedReplica(Replica):
    def __init__(self, model: torch.nn.Module, life: Life) -> None:
        self._life: Life | None = None  # the model's own parameters are nobody's target
        super().__init__(model)
        self._life = life

    def reset(self, target: object, buffers: object = ()) -> None:
        super().reset(target, buffers)
        if self._life is not None:
            assert isinstance(target, torch.Tensor)
            self._life.began_again(target)

    def cut(self) -> torch.Tensor:
        delta = super().cut()
        assert self._life is not None
        self._life.cut(delta)
        return delta

    def adopt(self, target: object, buffers: object = ()) -> None:
        before = self.progress()
        super().adopt(target, buffers)
        assert isinstance(target, torch.Tensor)
        assert self._life is not None
        self._life.adopted(target, before, self.progress())


class WatchedFollower(Follower):
    def __init__(self, replica: Replica, life: Life) -> None:
        super().__init__(replica)
        self._life = life

    def norm(self, delta: object, buffers: object = None) -> float:
        norm = super().norm(delta, buffers)
        if not math.isfinite(norm):
            self._life.discarded()
        return norm

    def answered(self, seq: int, is_accepted: bool) -> None:
        super().answered(seq, is_accepted)
        self._life.answered(seq, is_accepted)

    def encode(self, delta: object, codec: str, buffers: object = None) -> bytes:
        payload = super().encode(delta, codec, buffers)
        self._life.encoded(codec, payload)
        return payload

    def target(self, pending: Sequence[tuple[str, bytes]]) -> torch.Tensor:
        target = super().target(pending)
        assert self._shadow is not None
        self._life.aimed(self._shadow.number, pending, target)
        return target


class WatchedOutbox(FileOutbox):
    def __init__(self, directory: Path, disk: Disk, life: Life) -> None:
        super().__init__(directory, disk)
        self._life = life

    def load(self) -> dict[int, tuple[Push, bytes]]:
        found = super().load()
        self._life.found(found)
        return found

    def save(self, push: Push, payload: bytes) -> None:
        super().save(push, payload)
        self._life.saved(push, payload)

    def drop(self, seq: int, is_acknowledged: bool) -> None:
        self._life.dropped(seq, is_acknowledged)
        super().drop(seq, is_acknowledged)


class NodeObserver:
    """Fulfils ports.Observer: shows the judge every batch of records, once it is applied."""

    def __init__(self, world: "World", node: str) -> None:
        self.serving: Serving | None = None
        self._world = world
        self._node = node

    def event(self, name: str, **fields: object) -> None:
        told = " ".join(f"{key}={value}" for key, value in fields.items() if key in TOLD)
        self._world.trace.note(self._node, f"{name} {told}")
        judge = self._world.judge
        if name == "crash":
            judge.violated("crash", str(fields["report"]))
        if name == "refused message":
            judge.violated("protocol", f"{self._node} refuses a message: {fields['reason']}")
        if self.serving is not None and "record" in fields:
            machine = self.serving.machine
            if fields["lsn"] == machine.state.lsn:
                judge.settled(self._node, machine.state, self.serving.model.model_hash())
                checkpoints = len(list((self._world.disks[self._node].root / "checkpoints").glob("[0-9]*")))
                judge.holds(self._node, machine.state, machine.post.held, checkpoints)


class WorkerObserver:
    def __init__(self, trace: Trace, judge: Judge, worker: str) -> None:
        self._trace = trace
        self._judge = judge
        self._worker = worker

    def event(self, name: str, **fields: object) -> None:
        self._trace.note(self._worker, name)
        if name == "refused message":
            self._judge.violated("protocol", f"{self._worker} refuses a message: {fields['reason']}")
