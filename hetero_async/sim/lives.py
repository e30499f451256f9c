"""What a node and a worker of a simulated world do in one life: the real loops over simulated ports.

world.py starts them, again and again. What assembly.py and session.py put together for real is put together here.
"""

import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio

from hetero_async.archiving import Archiving
from hetero_async.asking import ask_all, asked
from hetero_async.core.messages import Fence, Hello, Message, Position
from hetero_async.core.worker import Worker
from hetero_async.core.worker_events import Evaluated
from hetero_async.desk import Desk
from hetero_async.errors import WitnessAway
from hetero_async.node import begin_serving, stand_by
from hetero_async.parts import Parts
from hetero_async.ports import Blocking, Observer, Peer
from hetero_async.quarantine import Quarantine
from hetero_async.rounds import Rounds
from hetero_async.serve import Serving
from hetero_async.shell.log import FileLog
from hetero_async.shell.promise import FilePromises
from hetero_async.shell.store import CheckpointStore
from hetero_async.shell.witness import EtcdWitness
from hetero_async.sim.archive import HoldingsInMemory
from hetero_async.sim.lifetime import Life
from hetero_async.sim.network import DialEnd, ServerEnd
from hetero_async.sim.plan import WITNESS, WorkerPlan
from hetero_async.sim.process import Killed, Process, Worktime
from hetero_async.sim.watched import NodeObserver, WatchedFollower, WatchedOutbox, WatchedReplica, WorkerObserver
from hetero_async.sim.witness import SimulatedMember
from hetero_async.standby import StandingBy
from hetero_async.train import Training

if TYPE_CHECKING:
    from hetero_async.sim.world import World

# A training loop that must wait looks so often whether it may go on.
LOOK_SECONDS = 0.1
# Measuring takes as long as so many steps.
EVALUATION_STEPS = 12


class NodeLife:
    def __init__(self, world: "World", process: Process) -> None:
        self._world = world
        self._process = process
        self._name = process.name

    async def run(self) -> None:
        """Serve, or stand by and then serve, until killed."""
        world, name = self._world, self._name
        disk, plan = world.disks[name], world.plan
        number = world.next_life()
        blocking = Worktime(self._process, world.random(f"node's work {number}"), plan.work_seconds, disk.taken)
        log = FileLog.open(disk.root / "log", plan.settings.run, blocking, disk, plan.segment_bytes)
        link = ServerEnd(world.network, self._process, self._sending)
        observer = NodeObserver(world, name)
        parts = Parts(
            name=name,
            secret=name.encode(),
            software="simulated",
            settings=plan.settings,
            rules=plan.rules,
            checkpoint_every=plan.checkpoint_every,
            keep_log=plan.keep_log,
            log=log,
            store=CheckpointStore(disk.root / "checkpoints", plan.settings.run, blocking, disk),
            promises=FilePromises(disk.root / "promised-term", disk),
            make_model=lambda: world.make_model(name),
            listening=link,
            blocking=blocking,
            observer=observer,
            witness=self._witness(),
            ask=self._ask,
            check=lambda _: None,
            told=lambda _: {},
            quarantine=Quarantine(observer),
            archiving=self._archiving(blocking, observer),
        )
        try:
            serving = await (begin_serving(parts) if world.serves.get(name) else self._stand_by(parts))
            await self._serve(serving, observer)
        finally:
            link.close()
            log.close()

    def _archiving(self, blocking: Blocking, observer: Observer) -> Archiving | None:
        world, root = self._world, self._world.disks[self._name].root
        if world.archive is None:
            return None
        return Archiving(
            run=world.plan.settings.run,
            archive=world.archive,
            holdings=HoldingsInMemory(root / "log", root / "checkpoints"),
            blocking=blocking,
            network=blocking,
            observer=observer,
            retry_seconds_max=0.0,  # jitter would be another thing in every run
        )

    async def _serve(self, serving: Serving, observer: NodeObserver) -> None:
        world = self._world
        world.judge.recovered(self._name, serving.machine.state, serving.model.model_hash())
        if world.must_halt:
            world.judge.violated("3", "a server goes on from a damaged log")
        world.serving = observer.serving = serving
        world.reigning = self._name
        await serving.run()

    async def _stand_by(self, parts: Parts) -> Serving:
        world = self._world
        others = [node for node in world.plan.nodes if node != self._name]
        dialling = DialEnd(world.network, self._process, others, role="standby")

        def shown(standing: StandingBy) -> None:
            world.positions[self._name] = (standing.machine.last_term, standing.machine.lsn)
            world.operators[self._name] = lambda in_spite: self._promote(standing, in_spite)
            world.judge.recovered(self._name, standing.state, standing.model.model_hash())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(dialling.run)
            serving = await stand_by(parts, dialling, shown)
            nursery.cancel_scope.cancel()
        if not world.plan.rules.has_witness:
            world.serves[self._name] = True  # as the operator who promoted it has it started from now on
        return serving

    async def _promote(self, standing: StandingBy, in_spite: bool) -> None:
        """At an operator's word, who may be told why not."""
        if self._process.is_dead or standing.takeover.begun.is_set():
            return
        try:
            against = await standing.takeover.at_word(self._ask, in_spite=in_spite)
            self._world.trace.note(self._name, f"promoted; against it: {'; '.join(against) or 'nothing'}")
        except* Killed:
            pass
        except* WitnessAway:
            self._world.trace.note(self._name, "cannot be promoted: the witness is away")

    def _sending(self, peer: Peer, term: int, message: Message) -> None:
        self._world.sending(self._name, peer, term, message)

    def _witness(self) -> EtcdWitness | None:
        world, rules = self._world, self._world.plan.rules
        if not rules.has_witness:
            return None
        member = SimulatedMember(world.etcd, world.network, WITNESS, self._process)
        return EtcdWitness([member], world.plan.settings.run, rules.lease_ms / 1000)

    async def _ask(self, term: int) -> dict[str, Position | None]:
        others = [node for node in self._world.plan.nodes if node != self._name]
        return await ask_all({other: functools.partial(self._asked, other, Fence(term=term)) for other in others})

    async def _asked(self, other: str, fence: Fence) -> Position:
        end = DialEnd(self._world.network, self._process, [other], role="standby", key=f"{self._name} asks".encode())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end.run)
            position = await asked(end, fence)
            nursery.cancel_scope.cancel()
        return position


class WorkerLife:
    def __init__(self, world: "World", process: Process, plan: WorkerPlan) -> None:
        self._world = world
        self._process = process
        self._plan = plan
        self._evaluate: Callable[[], Awaitable[None]]

    async def run(self) -> None:
        """Train until the run is finished, or killed."""
        world, plan, process = self._world, self._plan, self._process
        disk, number = world.disks[plan.name], world.next_life()
        blocking = Worktime(process, world.random(f"work {number}"), world.plan.work_seconds, disk.taken)
        life = world.make_life(plan.name)
        student = world.workload.student(plan, number)
        replica = WatchedReplica(student.model, life)
        follower = WatchedFollower(replica, life)
        desk = Desk(trio.current_time)
        desk.batch, desk.dataset_samples, desk.data = plan.batch, world.workload.samples, plan.data
        desk.evaluates_every = plan.evaluates_every
        link = DialEnd(world.network, process, world.plan.nodes)
        world.ends.append(link)
        hello = Hello(
            run=world.plan.settings.run, software="simulated", schema_hash=follower.schema_hash, last_seq=0, claims=(),
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
            observer=WorkerObserver(world.trace, world.judge, plan.name),
        )
        async with trio.open_nursery() as outer:
            outer.start_soon(link.run)
            async with trio.open_nursery() as inner:
                world.leaving[plan.name] = inner.cancel_scope
                inner.start_soon(training.run)
                rounds = Rounds(desk, replica)
                self._evaluate = functools.partial(self._measure, desk, rounds, training, life)
                await self._loop(desk, rounds, lambda batch: world.train(desk, replica, student, life, batch))
                await self._evaluate()
                inner.cancel_scope.cancel()
            outer.cancel_scope.cancel()
        if not desk.is_finished:
            process.kill()
            process.check()

    async def _loop(self, desk: Desk, rounds: Rounds, train: Callable[[list[int]], None]) -> None:
        """What a user's script and the session do, with steps that take virtual time."""
        plan = self._plan
        random = self._world.random(f"steps of {plan.name} {self._world.next_life()}")
        while not rounds.begin():  # noqa: ASYNC110, a script's loop has no events either
            await trio.sleep(LOOK_SECONDS)
        while (positions := rounds.draw(plan.batch)) is not None:
            if not positions:
                # At the end there is nothing to wait for but the others.
                await self._wait(desk, rounds, 0.0 if desk.is_dry else LOOK_SECONDS)
                continue
            seconds = plan.step_seconds * random.uniform(0.8, 1.25)
            await self._process.work(seconds)
            self._world.worked_seconds += seconds
            train(positions)
            rounds.end_step()
            await self._evaluate()
            while desk.is_stretched_out():
                await self._wait(desk, rounds, LOOK_SECONDS)

    async def _measure(self, desk: Desk, rounds: Rounds, training: Training, life: Life) -> None:
        """What session.evaluate does, if it is asked for."""
        asked = desk.take_published()
        if asked is not None:
            life.measures(asked)
            with desk.stepping_aside("evaluating"):
                await self._process.work(EVALUATION_STEPS * self._plan.step_seconds)
            anchor = asked.anchor
            training.measured(Evaluated(publish=anchor.publish, term=anchor.term, figures=(("loss", 0.5),)))
            rounds.adopt()

    async def _wait(self, desk: Desk, rounds: Rounds, lost_seconds: float) -> None:
        desk.waited()
        await trio.sleep(LOOK_SECONDS)
        self._world.waited_seconds += lost_seconds
        rounds.adopt()
        await self._evaluate()
