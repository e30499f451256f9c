"""One simulated run: real server and worker loops, log, checkpoints, outboxes and tensors, in a world that fails.

Only the clock, the network, the disks' forgetting and the time that work takes are simulated. A world is built from a
Plan and does the same every time.
"""

import errno
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import trio
from trio._core import _run as trio_run

from hetero_async.core.ledger import sample_at
from hetero_async.core.messages import Message
from hetero_async.core.replication import CONTINUE, REPLICATED
from hetero_async.desk import Desk
from hetero_async.errors import ConfigError, Deposed, DiskFull, LogCorrupt, first_error
from hetero_async.formats import chunks
from hetero_async.ports import Peer
from hetero_async.serve import Serving
from hetero_async.sim.archive import SimulatedArchive
from hetero_async.sim.chaos import Chaos
from hetero_async.sim.checkers import Judge, Violation
from hetero_async.sim.clock import VirtualClock
from hetero_async.sim.disk import SimulatedDisk, Troubles
from hetero_async.sim.ending import Ending
from hetero_async.sim.lifetime import Life
from hetero_async.sim.lives import NodeLife, WorkerLife
from hetero_async.sim.network import DialEnd, Network
from hetero_async.sim.plan import SERVER, WITNESS, Plan, WorkerPlan
from hetero_async.sim.process import Killed, Process
from hetero_async.sim.trace import Trace
from hetero_async.sim.watched import WatchedModel
from hetero_async.sim.witness import Etcd
from hetero_async.sim.workload import Student, Workload
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import Replica

RESTART_SECONDS = 0.3
# After the healing something must be trained in every such time, until all have come to their end.
LIVENESS_SECONDS = 60.0
OPERATOR_SECONDS = 5.0


@dataclass(slots=True)
class Outcome:
    seed: int
    violation: Violation | None = None
    recent: list[str] = field(default_factory=list)  # the last lines of a failed run's trace
    fingerprint: str = ""
    events: int = 0
    virtual_seconds: float = 0.0
    acknowledged: int = 0
    refused: int = 0
    lost: int = 0  # acknowledged, and not in the log at the end
    faults: Counter[str] = field(default_factory=Counter)


def simulate(plan: Plan, directory: Path, workload: Workload, echo: Callable[[str], None] | None = None) -> Outcome:
    """Run one world from its beginning to its end, in `directory`, which must not exist."""
    world = World(plan, directory, workload, Trace(echo))
    play(world)
    return world.outcome()


def play(world: "World") -> None:
    """Run a world that has been built, to its end."""
    plan = world.plan
    # trio's scheduler shuffles what is runnable; seeded, each seed is one interleaving, the same every time. trio has
    # no public name for it (python-trio/trio#2675); a test notices when these two are gone.
    trio_run._ALLOW_DETERMINISTIC_SCHEDULING = True  # type: ignore[misc]
    trio_run._r.seed(plan.seed)
    chunks.CHUNK_BYTES, usual_bytes = plan.chunk_bytes, chunks.CHUNK_BYTES  # a tiny model's objects have several, too
    try:
        clock = VirtualClock(stuck=world.judge.stuck)
        trio.run(world.run, clock=clock, instruments=[clock])
    finally:
        world.close()
        chunks.CHUNK_BYTES = usual_bytes
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = False  # type: ignore[misc]


class World:
    liveness_seconds: float = LIVENESS_SECONDS
    judge_type = Judge

    def __init__(self, plan: Plan, directory: Path, workload: Workload, trace: Trace) -> None:
        self.plan = plan
        self.trace = trace
        self.workload = workload
        self.judge = self.make_judge()
        self.network = Network(self.random("network"), trace)
        self.etcd = Etcd()
        self.archive = SimulatedArchive(self.random("archive")) if plan.archive else None
        self._join_sites()
        names = [*plan.nodes, *(worker.name for worker in plan.workers)]
        self.disks = {name: self.make_disk(directory / name, self.random(f"disk of {name}")) for name in names}
        self.processes: dict[str, Process] = {}
        self.leaving: dict[str, trio.CancelScope] = {}  # a worker's, to end it by a signal
        self.held: dict[str, float] = {}  # until when a process is not started again
        self.ends: list[DialEnd] = []  # of all workers' lives
        self.worked_seconds = self.waited_seconds = 0.0  # of all workers together
        self.serving: Serving | None = None  # the newest that has begun to
        self.reigning = SERVER  # who that was
        self.positions: dict[str, tuple[int, int]] = {}  # of each node's log: last term, last record
        self.operators: dict[str, Callable[[bool], Awaitable[None]]] = {}  # at a standby: promotes it, in spite or not
        self.serves: dict[str, bool] = {SERVER: True}  # how each node is started: to serve, or to stand by
        self.is_healed = False
        self.must_halt = False  # the log is damaged beyond repair
        self._chaos = Chaos(self)
        self._scope = trio.CancelScope()
        self._directory = directory
        self._ended: dict[str, bool] = {}
        self._all_ended = trio.Event()
        self._lives = 0
        self._seconds = 0.0
        self._lost = 0

    # What looks on; a world that is there for something else than being judged has others.

    def make_judge(self) -> Judge:
        return self.judge_type(
            self.plan.settings, self._failed, nodes=self.plan.nodes, copies=self.copies, is_alone=self.is_alone
        )

    @property
    def copies(self) -> int:
        """On so many disks is what is acknowledged."""
        return 2 if self.plan.rules.durability == REPLICATED else 1

    def is_alone(self, node: str) -> bool:
        """Whether the run lets it go on without a standby, and the witness knows that it does."""
        reign = self.etcd.reign(self.plan.settings.run)
        is_known = reign is not None and (reign.server, reign.partner) == (node, "")
        return is_known and self.plan.rules.when_alone == CONTINUE

    def make_disk(self, directory: Path, random: Random) -> SimulatedDisk:
        return SimulatedDisk(directory, random)

    def make_model(self, node: str) -> ServerModel:
        return WatchedModel(self.judge, node)

    def make_life(self, worker: str) -> Life:
        return Life(self.judge, worker)

    def random(self, subject: str) -> Random:
        """Chance for one subject: what happens to one does not change another's."""
        return Random(f"{subject} {self.plan.seed}")

    def close(self) -> None:
        for disk in self.disks.values():
            disk.close()

    def outcome(self) -> Outcome:
        return Outcome(
            seed=self.plan.seed,
            violation=self.judge.violation,
            recent=list(self.trace.recent) if self.judge.violation else [],
            fingerprint=self.trace.fingerprint,
            events=self.trace.events,
            virtual_seconds=self._seconds,
            acknowledged=self.judge.acknowledged,
            refused=self.judge.refused,
            lost=self._lost,
            faults=self._chaos.done,
        )

    def _failed(self, violation: Violation) -> None:
        self.trace.note("judge", f"VIOLATED {violation.invariant}: {violation.what}")
        self._scope.cancel()

    # --- the run ---

    async def run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.network.run)
                for node in self.plan.nodes:
                    nursery.start_soon(self._keep, node, node, self._node_life)
                for worker in self.plan.workers:
                    self.held[worker.name] = worker.joins_at
                    nursery.start_soon(self._keep, worker.name, worker.site, self._worker_life(worker))
                await self._chaos.run()
                nursery.start_soon(self._operate)
                await self._until_ended()
                self._judge_end()
                nursery.cancel_scope.cancel()
        self._seconds = trio.current_time()

    async def _operate(self) -> None:
        """Without a witness somebody must say who serves, when nobody does: the one with the longest log."""
        while self.plan.standbys and not self.plan.rules.has_witness:
            await trio.sleep(OPERATOR_SECONDS)
            if not any(self.serves.get(node) for node in self.plan.nodes):
                longest = max(self.plan.nodes, key=lambda node: self.positions.get(node, (0, 0)))
                await self.operators[longest](False)

    async def _until_ended(self) -> None:
        """Give up when nothing moves any more."""
        trained = -1
        while self.judge.trained > trained and not self._all_ended.is_set():
            trained = self.judge.trained
            with trio.move_on_after(self.liveness_seconds):
                await self._all_ended.wait()

    def _judge_end(self) -> None:
        unfinished = [worker.name for worker in self._expected() if worker.name not in self._ended]
        if unfinished:
            self.judge.violated("liveness", f"{', '.join(unfinished)} did not come to an end after the healing")
        else:
            self._judge_finished()

    def _judge_finished(self) -> None:
        self._lost = Ending(self, self._directory).judged()

    def _expected(self) -> list[WorkerPlan]:
        return [worker for worker in self.plan.workers if worker.name != self.plan.stays_away]

    def heal(self) -> None:
        """From now on nothing fails, and whoever is away may come back, all but one."""
        self.is_healed = True
        for name, process in self.processes.items():
            process.thaw()
            self.held[name] = 0.0
        for disk in self.disks.values():
            disk.troubles = Troubles()
        self._join_sites()
        self.network.mend_all()
        if away := self.plan.stays_away:
            self.held[away] = float("inf")
            if away in self.processes:  # it may not have joined yet
                self.processes[away].kill()

    def _join_sites(self) -> None:
        """Every link as it is when nothing ails it."""
        plan = self.plan
        for node in plan.nodes:
            for site, condition in plan.links.items():
                self.network.join(site, node, condition)
            for other in (*plan.nodes, WITNESS):
                if other != node:
                    self.network.join(node, other, plan.backbone)

    async def _keep(self, name: str, site: str, life: Callable[[Process], Awaitable[None]]) -> None:
        """Start a process, and start it again whenever it dies, until it ends well."""
        while True:
            while (held := self.held.get(name, 0.0)) > trio.current_time():  # noqa: ASYNC110, it may be moved on
                await trio.sleep(min(RESTART_SECONDS, held - trio.current_time()))
            process = self.processes[name] = Process(name, site)
            self.disks[name].process = process
            self.trace.note(name, "starts")
            try:
                with process.scope:
                    await life(process)
                    self._end(name)
                    return
            except* Killed:
                pass
            except* Deposed:
                self.serves[name] = False  # its agent starts it again as a standby
            except* LogCorrupt as group:
                self._halted(name, first_error(group))  # which ends the world
            except* Exception as group:
                if not _is_excused(first_error(group)):
                    self.judge.violated("crash", f"{name}: {first_error(group)!r}")
            self.trace.note(name, "is gone")
            await trio.sleep(RESTART_SECONDS)

    def _halted(self, name: str, error: BaseException) -> None:
        """A node found its log damaged. Where it is, that is the only right end."""
        if self.must_halt:
            self.trace.note(name, "halts: the log is damaged")
            self._scope.cancel()
        else:
            self.judge.violated("crash", f"{name}: {error!r}")

    def _end(self, name: str) -> None:
        self.trace.note(name, "has ended")
        self._ended[name] = True
        if all(worker.name in self._ended for worker in self._expected()):
            self._all_ended.set()

    # --- lives ---

    async def _node_life(self, process: Process) -> None:
        await NodeLife(self, process).run()

    def sending(self, node: str, peer: Peer, term: int, message: Message) -> None:
        """A message leaves a node."""
        if peer.role == "worker":
            self.judge.sends(node, term, peer.worker, message, self.disks)

    def _worker_life(self, plan: WorkerPlan) -> Callable[[Process], Awaitable[None]]:
        async def life(process: Process) -> None:
            await WorkerLife(self, process, plan).run()

        return life

    def train(self, desk: Desk, replica: Replica, student: Student, life: Life, positions: list[int]) -> None:
        """One step of a worker."""
        before = replica.progress()
        student.step([sample_at(position, desk.samples, desk.seed) for position in positions])
        life.stepped(positions, replica.progress() - before)

    def next_life(self) -> int:
        self._lives += 1
        return self._lives


def _is_excused(error: BaseException) -> bool:
    """Whether a process may end this way: a server that cannot even open its log says why, and is started again."""
    return isinstance(error, DiskFull) or (isinstance(error, ConfigError) and os.strerror(errno.EIO) in str(error))
