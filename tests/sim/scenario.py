"""A small world in which a test says what goes wrong, and when: not by chance but by a script.

A script is given the world and waits in virtual time for a moment or for a condition, then breaks something. Used by
test_scenarios_*.py, one test for each row of the fault catalogue (README.md beside this file).
"""

import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
import trio
from sim.noting import NotingDisk

from hetero_async.core.messages import Ack, Message
from hetero_async.core.ranges import Ranges
from hetero_async.core.records import Delta, Entry, RunSettings
from hetero_async.core.replication import Durability
from hetero_async.core.state import State
from hetero_async.ports import Peer
from hetero_async.sim.chaos import Chaos
from hetero_async.sim.checkers import Judge
from hetero_async.sim.disk import SimulatedDisk
from hetero_async.sim.lifetime import Life
from hetero_async.sim.network import Condition
from hetero_async.sim.plan import SERVER, Plan, WorkerPlan
from hetero_async.sim.trace import Trace
from hetero_async.sim.watched import WatchedModel
from hetero_async.sim.workload import Regression, Workload
from hetero_async.sim.world import World, play
from hetero_async.tensors.model import ServerModel

LOOK_SECONDS = 0.02
# A script that waits longer than this for what it expects waits in vain.
PATIENCE_SECONDS = 60.0
NEVER = float("inf")
LEASE_SECONDS = 3.0
# Of one kind of disk call in one life, so many are died at.
CALLS_MAX = 6
PUPPET = "puppet"  # stands where a worker would, and says what the test wants


@dataclass(frozen=True, slots=True)
class Said:
    """An acknowledgement on its way out: when, by which node, in which term, of which record."""

    at: float
    node: str
    term: int
    lsn: int


Script = Callable[["ScriptedWorld"], Awaitable[None]]


def make_plan(
    *,
    workers: int = 2,
    sites: int = 1,
    seed: int = 1,
    step_seconds: float = 0.2,
    link: Condition | None = None,
    puppet: bool = False,
    stays_away: str = "",
    first_joins_at: float = 0.0,
    checkpoint_every: int = 1000,
    keep_log: bool = False,
    segment_bytes: int = 256 * 1024,
    chunk_bytes: int = 1024 * 1024,
    standbys: Sequence[str] = (),
    rules: Durability | None = None,
    **settings: object,
) -> Plan:
    """Workers w0, w1, … in turn at site0, site1, …; about a window a second, and leases that end soon."""
    usual: dict[str, object] = {
        "samples": 120, "steps_per_round": 4, "seconds_per_round": 1.0, "lease_ttl_seconds": LEASE_SECONDS,
    }  # fmt: skip
    team = [WorkerPlan(name=f"w{n}", site=f"site{n % sites}", step_seconds=step_seconds) for n in range(workers)]
    team[0] = replace(team[0], joins_at=first_joins_at)
    if puppet:
        team.append(WorkerPlan(name=PUPPET, site="site0", step_seconds=1.0, joins_at=NEVER))
    return Plan(
        seed=seed,
        settings=RunSettings(run="simulated", seed=seed, **(usual | settings)),  # type: ignore[arg-type]
        workers=tuple(team),
        links={f"site{n}": link or Condition() for n in range(sites)},
        stays_away=PUPPET if puppet else stays_away,
        checkpoint_every=checkpoint_every,
        keep_log=keep_log,
        segment_bytes=segment_bytes,
        chunk_bytes=chunk_bytes,
        standbys=tuple(standbys),
        rules=rules or Durability(),
    )


class NotingJudge(Judge):
    """Keeps the records as well, each with the time at which it was applied first."""

    def __init__(self, *arguments: Any, nodes: Sequence[str], **more: Any) -> None:
        super().__init__(*arguments, nodes=nodes, **more)
        self.entries: list[tuple[float, Entry]] = []  # of the run's history, as far as it goes now
        # A node's, each: up to which record it came back, up to which one it had settled, and its state's hash.
        self.recoveries: dict[str, list[tuple[int, int, bytes]]] = {node: [] for node in nodes}
        self._settled: dict[str, int] = {}

    def applied(self, node: str, entry: Entry, shadow: torch.Tensor, publish: bytes) -> None:
        known = self.story.at(entry.lsn)
        super().applied(node, entry, shadow, publish)
        if self.story.at(entry.lsn) is not known:
            self.entries[entry.lsn - 1 :] = [(trio.current_time(), entry)]

    def settled(self, node: str, state: State, model_hash: bytes) -> None:
        self._settled[node] = max(self._settled.get(node, 0), state.lsn)
        super().settled(node, state, model_hash)

    def recovered(self, node: str, state: State, model_hash: bytes) -> None:
        self.recoveries[node].append((state.lsn, self._settled.get(node, 0), state.digest()))
        super().recovered(node, state, model_hash)


class NotingLife(Life):
    """`target`: where the parameters were last meant to stand, and at which publish."""

    def __init__(self, judge: Judge, worker: str) -> None:
        super().__init__(judge, worker)
        self.target: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def aimed(self, publish: int, pending: Sequence[tuple[str, bytes]], target: torch.Tensor) -> None:
        self.target = (publish, target)
        super().aimed(publish, pending, target)


class ScriptedChaos(Chaos):
    def __init__(self, world: "ScriptedWorld", script: Script) -> None:
        super().__init__(world)
        self._script = partial(script, world)

    async def run(self) -> None:
        await self._script()
        self._world.trace.note("script", "is over")
        self._world.heal()


class ScriptedWorld(World):
    """After the script all is healed, and the run must come to its end as in every other world."""

    judge_type = NotingJudge

    def __init__(
        self,
        plan: Plan,
        directory: Path,
        script: Script,
        make_model: Callable[[Judge, str], ServerModel] = WatchedModel,
        workload: Workload | None = None,
    ) -> None:
        self.lines: list[str] = []
        self.said: list[tuple[float, str, Message]] = []  # to workers: when, to whom, what
        self.acks: list[Said] = []  # acknowledgements, and who gave them
        self.newest: dict[str, NotingLife] = {}
        self.is_stopped = False
        self.halt = ""  # what the server said when it found its log damaged
        self.before_sending: Callable[[str, str, Message], None] = lambda node, to, message: None
        self._make_model = make_model
        workload = workload or Regression(plan.dataset_samples, plan.seed)
        super().__init__(plan, directory, workload, Trace(self.lines.append))
        self._chaos = ScriptedChaos(self, script)

    def make_disk(self, directory: Path, random: Random) -> SimulatedDisk:
        return NotingDisk(directory, random)

    def make_life(self, worker: str) -> Life:
        self.newest[worker] = NotingLife(self.judge, worker)
        return self.newest[worker]

    def make_model(self, node: str) -> ServerModel:
        return self._make_model(self.judge, node)

    def sending(self, node: str, peer: Peer, term: int, message: Message) -> None:
        self.before_sending(node, peer.worker, message)
        super().sending(node, peer, term, message)
        if peer.role == "worker":
            self.said.append((trio.current_time(), peer.worker, message))
            if isinstance(message, Ack):
                self.acks.append(Said(trio.current_time(), node, term, message.lsn))

    def _halted(self, name: str, error: BaseException) -> None:
        self.halt = str(error)
        super()._halted(name, error)

    # --- what a script does ---

    async def until(self, is_so: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait until it is so; if that takes too long the world has failed."""
        ends_at = trio.current_time() + seconds
        while not is_so():
            if trio.current_time() > ends_at:
                self.judge.violated("script", f"waited {seconds:g} s in vain until {what}")
                await trio.sleep_forever()
            await trio.sleep(LOOK_SECONDS)

    def hold(self, *names: str, seconds: float = NEVER) -> None:
        """Whichever of them dies is not started again for so long, or until all is healed."""
        for name in names:
            self.held[name] = trio.current_time() + seconds

    def kill(self, *names: str, seconds: float = NEVER) -> None:
        self.hold(*names, seconds=seconds)
        for name in names:
            self.processes[name].kill()

    def release(self, *names: str) -> None:
        for name in names:
            self.held[name] = 0.0

    def cut_power(self, name: str, seconds: float = NEVER) -> None:
        self.kill(name, seconds=seconds)
        self.disks[name].cut_power()

    def cut(self, *directions: tuple[str, str]) -> None:
        for source, target in directions:
            self.network.cut(source, target)

    def mend(self, *directions: tuple[str, str]) -> None:
        for source, target in directions:
            self.network.mend(source, target)

    def stop(self) -> None:
        """End here, with the run unfinished."""
        self.is_stopped = True
        self._scope.cancel()

    def copy_disk(self, name: str) -> NotingDisk:
        """Another disk with the same bytes, as a cloned machine has it."""
        copy = NotingDisk(self._directory / f"copy {len(self.lines)} of {name}", self.random(f"copy of {name}"))
        shutil.copytree(self.disks[name].root, copy.root, dirs_exist_ok=True)
        copy.adopt()
        return copy

    # --- what a test looks at ---

    @property
    def disk(self) -> NotingDisk:
        return self.disk_of(SERVER)

    def disk_of(self, name: str) -> NotingDisk:
        disk = self.disks[name]
        assert isinstance(disk, NotingDisk)
        return disk

    def is_served_by(self, node: str) -> bool:
        """Whether the node has begun to serve, and has not ended."""
        return self.serving is not None and self.network.listeners.get(node) is self.serving.link

    @property
    def log(self) -> Path:
        return self.disk.root / "log"

    @property
    def noted(self) -> NotingJudge:
        assert isinstance(self.judge, NotingJudge)
        return self.judge

    @property
    def state(self) -> State:
        assert self.serving is not None
        return self.serving.machine.state

    def records(self, kind: type, worker: str = "") -> list[tuple[float, Entry]]:
        """Of one kind, and of one worker if it is named, in their order."""
        return [
            (at, entry)
            for at, entry in self.noted.entries
            if isinstance(entry.record, kind) and worker in ("", getattr(entry.record, "worker", ""))
        ]

    def deltas(self, worker: str) -> list[Delta]:
        return [entry.record for _, entry in self.records(Delta, worker) if isinstance(entry.record, Delta)]

    def answers(self, worker: str, kind: type, seq: int | None = None) -> list[tuple[float, Message]]:
        """What the server said to a worker, of one kind, and about one delta if it is named."""
        return [
            (at, message)
            for at, to, message in self.said
            if to == worker and isinstance(message, kind) and seq in (None, getattr(message, "seq", None))
        ]

    def times(self, who: str, what: str) -> list[float]:
        """When somebody did something: the lines of the trace that begin so."""
        beginning = f"{who:<12} {what}"
        return [float(line[:10]) for line in self.lines if line[12:].startswith(beginning)]

    def lives(self, name: str) -> int:
        return len(self.times(name, "starts"))


async def die_at_every_call(world: ScriptedWorld, *, cut_power: bool) -> list[tuple[str, str, int]]:
    """A server dies at the first call at which none has died, again and again, until the run is finished.

    Calls are told apart by name, directory and how many such a life has made already. Returns those it died at.
    """
    deaths: list[tuple[str, str, int]] = []
    life: Counter[tuple[str, str]] = Counter()
    disk = world.disk

    def die(name: str, path: str) -> None:
        place = next((part for part in ("log", "checkpoints") if f"/{SERVER}/{part}" in path), "root")
        life[name, place] += 1
        call = (name, place, life[name, place])
        if not disk.troubles.die_in_calls and call not in deaths and call[2] <= CALLS_MAX:
            deaths.append(call)
            disk.troubles.die_in_calls = 2  # this one

    disk.before = die
    while not (world.serving and world.state.is_finished):
        await world.until(lambda: world.processes.get(SERVER), "there is a server")
        process = world.processes[SERVER]
        await world.until(lambda now=process: now.is_dead or world.state.is_finished, "it is dead, or all is done")
        life.clear()
        if process.is_dead and cut_power:
            disk.cut_power()
        await world.until(lambda was=process: world.processes[SERVER] is not was or not was.is_dead, "it is back")
    return deaths


def positions(ranges: Ranges) -> list[int]:
    return [position for start, stop in ranges for position in range(start, stop)]


def trained_in(deltas: Iterable[Delta]) -> list[int]:
    return [position for delta in deltas for position in positions(delta.ranges)]


def run(
    plan: Plan,
    directory: Path,
    script: Script,
    *,
    build: type[ScriptedWorld] = ScriptedWorld,
    make_model: Callable[[Judge, str], ServerModel] = WatchedModel,
    workload: Workload | None = None,
) -> ScriptedWorld:
    """Run the world to its end. Nothing may break there, and unless the server had to halt the run is finished."""
    torch.set_num_threads(1)
    world = build(plan, directory / "world", script, make_model, workload)
    play(world)
    outcome = world.outcome()
    assert outcome.violation is None, "\n".join([str(outcome.violation), *outcome.recent])
    if not (world.must_halt or world.is_stopped):
        assert outcome.lost == 0
        assert world.judge.trained == plan.settings.samples
        keys = [(record.worker, record.seq) for worker in plan.workers for record in world.deltas(worker.name)]
        assert len(keys) == len({*keys}), "no delta is in the log twice"
    return world
