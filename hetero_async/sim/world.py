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
import trio.testing
from trio._core import _run as trio_run

from hetero_async.assembly import verify_directory
from hetero_async.core.ledger import sample_at
from hetero_async.core.messages import Hello, Message
from hetero_async.core.server import Server
from hetero_async.core.worker import Worker
from hetero_async.desk import Desk
from hetero_async.errors import ConfigError, DiskFull, HeteroAsyncError, LogCorrupt
from hetero_async.formats import chunks
from hetero_async.replay import recover
from hetero_async.rounds import Rounds
from hetero_async.serve import Serving
from hetero_async.shell.log import FileLog
from hetero_async.shell.store import CheckpointStore
from hetero_async.sim.chaos import Chaos
from hetero_async.sim.checkers import Judge, Life, Violation
from hetero_async.sim.disk import SimulatedDisk, Troubles
from hetero_async.sim.network import Network, ServerEnd, WorkerEnd
from hetero_async.sim.plan import SERVER, Plan, WorkerPlan
from hetero_async.sim.process import Killed, Process, Worktime
from hetero_async.sim.trace import Trace
from hetero_async.sim.watched import (
    ServerObserver,
    WatchedFollower,
    WatchedModel,
    WatchedOutbox,
    WatchedReplica,
    WorkerObserver,
)
from hetero_async.sim.workload import Student, Workload
from hetero_async.tensors.model import ServerModel
from hetero_async.tensors.replica import Replica
from hetero_async.train import Training

RESTART_SECONDS = 0.3
# More steps of tasks than any honest work takes at one moment.
STEPS_AT_ONCE_MAX = 20_000
# A training loop that must wait looks so often whether it may go on.
LOOK_SECONDS = 0.1
# After the healing something must be trained in every such time, until all have come to their end.
LIVENESS_SECONDS = 60.0


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
        trio.run(world.run, clock=trio.testing.MockClock(autojump_threshold=0), instruments=[Stillstand(world.judge)])
    finally:
        world.close()
        chunks.CHUNK_BYTES = usual_bytes
        trio_run._ALLOW_DETERMINISTIC_SCHEDULING = False  # type: ignore[misc]


class World:
    liveness_seconds = LIVENESS_SECONDS

    def __init__(self, plan: Plan, directory: Path, workload: Workload, trace: Trace) -> None:
        self.plan = plan
        self.trace = trace
        self.workload = workload
        self.judge = self.make_judge()
        self.network = Network(self.random("network"), trace)
        for site, condition in plan.links.items():
            self.network.join(site, SERVER, condition)
        names = [SERVER, *(worker.name for worker in plan.workers)]
        self.disks = {name: self.make_disk(directory / name, self.random(f"disk of {name}")) for name in names}
        self.processes: dict[str, Process] = {}
        self.leaving: dict[str, trio.CancelScope] = {}  # a worker's, to end it by a signal
        self.held: dict[str, float] = {}  # until when a process is not started again
        self.ends: list[WorkerEnd] = []  # of all lives
        self.serving: Serving | None = None
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
        return Judge(self.plan.settings, self._failed)

    def make_disk(self, directory: Path, random: Random) -> SimulatedDisk:
        return SimulatedDisk(directory, random)

    def make_model(self) -> ServerModel:
        return WatchedModel(self.judge)

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
                nursery.start_soon(self._keep, SERVER, SERVER, self._serve)
                for worker in self.plan.workers:
                    self.held[worker.name] = worker.joins_at
                    nursery.start_soon(self._keep, worker.name, worker.site, self._worker_life(worker))
                await self._chaos.run()
                await self._until_ended()
                self._judge_end()
                nursery.cancel_scope.cancel()
        self._seconds = trio.current_time()

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
        self.judge.finished(self.plan.settings.samples)
        self.processes[SERVER].kill()
        self.disks[SERVER].cut_power()
        try:
            verdict = verify_directory(self.disks[SERVER].root / "log", lambda _: None)
        except HeteroAsyncError as error:
            self.judge.violated("3", f"verify: {error}")
            return
        self._lost = self.judge.lost(verdict.state)
        if not verdict.is_ok:
            self.judge.violated("3", "verify finds the log wanting")
        self.judge.recovered(verdict.state, verdict.model_hash)

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
        for site, condition in self.plan.links.items():
            self.network.join(site, SERVER, condition)
            self.network.mend(site, SERVER)
            self.network.mend(SERVER, site)
        if away := self.plan.stays_away:
            self.held[away] = float("inf")
            self.processes[away].kill()

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
            except* LogCorrupt as group:
                self._halted(_first(group))  # which ends the world
            except* Exception as group:
                if not _is_excused(_first(group)):
                    self.judge.violated("crash", f"{name}: {_first(group)!r}")
            self.trace.note(name, "is gone")
            await trio.sleep(RESTART_SECONDS)

    def _halted(self, error: BaseException) -> None:
        """The server found its log damaged. Where it is, that is the only right end."""
        if self.must_halt:
            self.trace.note(SERVER, "halts: the log is damaged")
            self._scope.cancel()
        else:
            self.judge.violated("crash", f"{SERVER}: {error!r}")

    def _end(self, name: str) -> None:
        self.trace.note(name, "has ended")
        self._ended[name] = True
        if all(worker.name in self._ended for worker in self._expected()):
            self._all_ended.set()

    # --- the server ---

    async def _serve(self, process: Process) -> None:
        disk, plan = self.disks[SERVER], self.plan
        blocking = Worktime(process, self.random(f"server's work {self._life()}"), self.plan.work_seconds, disk.taken)
        log = FileLog.open(disk.root / "log", plan.settings.run, blocking, disk, plan.segment_bytes)
        try:
            store = CheckpointStore(disk.root / "checkpoints", plan.settings.run, blocking, disk)
            model, observer = self.make_model(), ServerObserver(self)
            state = recover(log, store, model, observer)
            self.judge.recovered(state, model.model_hash())
            if self.must_halt:
                self.judge.violated("3", "a server goes on from a damaged log")
            link = self.network.server = ServerEnd(self.network, process, self._sending)
            self.serving = observer.serving = Serving(
                machine=Server(plan.settings, state),
                model=model,
                log=log,
                store=store,
                link=link,
                blocking=blocking,
                observer=observer,
                checkpoint_every=plan.checkpoint_every,
                keep_log=plan.keep_log,
                told_to_sites=dict,
            )
            await self.serving.run()
        finally:
            self.network.server = None
            log.close()

    def _sending(self, worker: str, message: Message) -> None:
        self.judge.sends(worker, message, self.disks[SERVER])

    # --- workers ---

    def _worker_life(self, plan: WorkerPlan) -> Callable[[Process], Awaitable[None]]:
        async def life(process: Process) -> None:
            await self._train(process, plan)

        return life

    async def _train(self, process: Process, plan: WorkerPlan) -> None:
        disk, number = self.disks[plan.name], self._life()
        blocking = Worktime(process, self.random(f"work {number}"), self.plan.work_seconds, disk.taken)
        life = self.make_life(plan.name)
        student = self.workload.student(plan.dtype, number)
        replica = WatchedReplica(student.model, life)
        follower = WatchedFollower(replica, life)
        desk = Desk(trio.current_time)
        desk.batch, desk.dataset_samples = plan.batch, self.workload.samples
        link = WorkerEnd(self.network, process, SERVER)
        self.ends.append(link)
        hello = Hello(
            run=self.plan.settings.run, software="simulated", schema_hash=follower.schema_hash, last_seq=0, claims=(),
            device="cpu", dtype=plan.dtype, life=number.to_bytes(8),
        )  # fmt: skip
        training = Training(
            worker=plan.name,
            machine=Worker(hello),
            follower=follower,
            desk=desk,
            link=link,
            outbox=WatchedOutbox(disk.root / "outbox", disk, life),
            blocking=blocking,
            observer=WorkerObserver(self.trace, self.judge, plan.name),
            server=link.server.key,
        )
        async with trio.open_nursery() as outer:
            outer.start_soon(link.run)
            async with trio.open_nursery() as inner:
                self.leaving[plan.name] = inner.cancel_scope
                inner.start_soon(training.run)
                await self._loop(process, plan, desk, replica, student, life)
                inner.cancel_scope.cancel()
            outer.cancel_scope.cancel()
        if not desk.is_finished:
            process.kill()
            process.check()

    async def _loop(
        self, process: Process, plan: WorkerPlan, desk: Desk, replica: Replica, student: Student, life: Life
    ) -> None:
        """What a user's script and the session do, with steps that take virtual time."""
        random, rounds = self.random(f"steps of {plan.name} {self._lives}"), Rounds(desk, replica)
        while not rounds.begin():  # noqa: ASYNC110, a script's loop has no events either
            await trio.sleep(LOOK_SECONDS)
        while (positions := rounds.draw(plan.batch)) is not None:
            if not positions:
                await trio.sleep(LOOK_SECONDS)
                rounds.adopt()
                continue
            await process.work(plan.step_seconds * random.uniform(0.8, 1.25))
            self._step(desk, replica, student, life, positions)
            rounds.end_step()
            while desk.is_stretched_out():
                await trio.sleep(LOOK_SECONDS)
                rounds.adopt()

    def _step(self, desk: Desk, replica: Replica, student: Student, life: Life, positions: list[int]) -> None:
        before = replica.progress()
        student.step([sample_at(position, desk.samples, desk.seed) for position in positions])
        life.stepped(positions, replica.progress() - before)

    def _life(self) -> int:
        self._lives += 1
        return self._lives


class Stillstand(trio.abc.Instrument):
    """Notices code that is busy without end while no time passes."""

    def __init__(self, judge: Judge) -> None:
        self._judge = judge
        self._at = -1.0
        self._steps = 0

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        now = trio.current_time()
        self._steps = self._steps + 1 if now == self._at else 0
        self._at = now
        if self._steps > STEPS_AT_ONCE_MAX:
            self._judge.violated("liveness", f"{task.name} is busy for ever and gets nowhere")


def _is_excused(error: BaseException) -> bool:
    """Whether a process may end this way: a server that cannot even open its log says why, and is started again."""
    return isinstance(error, DiskFull) or (isinstance(error, ConfigError) and os.strerror(errno.EIO) in str(error))


def _first(error: BaseException) -> BaseException:
    return _first(error.exceptions[0]) if isinstance(error, BaseExceptionGroup) else error
