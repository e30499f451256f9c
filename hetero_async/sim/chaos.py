"""Carries out a plan's faults in a simulated world, each at its time, and heals everything at the end."""

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import trio

from hetero_async.core.replication import REPLICATED
from hetero_async.sim.plan import WITNESS, Fault

if TYPE_CHECKING:
    from hetero_async.sim.world import World

FLAP_SECONDS = 1.0
THIN_BYTES_PER_SECOND = 2_000.0
DISK_CALLS_MAX = 40
# What a fault makes of a link, by its amount.
WORSE: dict[str, Callable[[float], dict[str, float]]] = {
    "lose messages": lambda amount: {"loss": 0.5 * amount},
    "double messages": lambda amount: {"doubled": 0.5 * amount},
    "reorder messages": lambda amount: {"reordered": 0.5 * amount, "jitter": 0.3},
    "thin link": lambda amount: {"bytes_per_second": THIN_BYTES_PER_SECOND},
}
# A segment's first half is damaged when it holds several records: the last one could pass for unfinished.
DAMAGED_BYTES_MIN = 2_000


class Chaos:
    def __init__(self, world: "World") -> None:
        self.done: Counter[str] = Counter()  # faults that struck, by kind
        self._world = world
        self._kinds: dict[str, Callable[[Fault], Awaitable[None]]] = {
            "kill worker": self._kill,
            "kill server": self._kill_server,
            "cut worker's power": self._cut_power,
            "cut server's power": self._cut_servers_power,
            "leave": self._leave,
            "freeze worker": self._freeze,
            "freeze server": self._freeze,
            "lose site": self._lose_site,
            "cut link": self._cut_link,
            "cut one way": self._cut_one_way,
            "flapping link": self._flap,
            "reset connections": self._reset,
            "lose messages": self._worsen,
            "double messages": self._worsen,
            "reorder messages": self._worsen,
            "thin link": self._worsen,
            "full disk": self._ail_disk,
            "slow disk": self._ail_disk,
            "failing write": self._ail_disk,
            "failing fsync": self._ail_disk,
            "die at disk call": self._die_at_call,
            "die in checkpoint": self._die_in_checkpoint,
            "damage checkpoint": self._damage_checkpoint,
            "damage log": self._damage_log,
            "kill standby": self._kill,
            "cut standby's power": self._cut_power,
            "freeze standby": self._freeze,
            "cut servers apart": self._cut_servers,
            "cut servers apart one way": self._cut_servers_one_way,
            "cut a server from the witness": self._cut_from_witness,
            "lose the witness": self._lose_witness,
            "lose the server's site": self._lose_servers_site,
            "lose all servers": self._lose_servers,
            "promote": self._promote,
        }

    async def run(self) -> None:
        """All faults of the plan; then, if it says so, everything is whole."""
        plan = self._world.plan
        async with trio.open_nursery() as nursery:
            for fault in plan.faults:
                nursery.start_soon(self._strike, fault)
            await trio.sleep_until(plan.healed_at)
            nursery.cancel_scope.cancel()
        self._world.trace.note("chaos", "heals everything")
        self._world.heal()

    @property
    def _reigning(self) -> str:
        """The node that serves, or did last."""
        return self._world.reigning

    async def _strike(self, fault: Fault) -> None:
        await trio.sleep_until(fault.at)
        self._world.trace.note("chaos", str(fault))
        self.done[fault.kind] += 1
        await self._kinds[fault.kind](fault)

    # --- processes ---

    def _hold(self, name: str, seconds: float) -> None:
        held = self._world.held
        held[name] = max(held.get(name, 0.0), trio.current_time() + seconds)

    def _kill_now(self, name: str, seconds: float) -> None:
        self._hold(name, seconds)
        if process := self._world.processes.get(name):
            process.kill()

    async def _kill(self, fault: Fault) -> None:
        self._kill_now(fault.target, fault.seconds)

    async def _kill_server(self, fault: Fault) -> None:
        self._kill_now(self._reigning, fault.seconds)

    async def _cut_power(self, fault: Fault) -> None:
        await self._power_off(fault.target, fault.seconds)

    async def _cut_servers_power(self, fault: Fault) -> None:
        await self._power_off(self._reigning, fault.seconds)

    async def _power_off(self, name: str, seconds: float) -> None:
        self._kill_now(name, seconds)
        self._world.disks[name].cut_power()

    async def _leave(self, fault: Fault) -> None:
        self._hold(fault.target, fault.seconds)
        if scope := self._world.leaving.get(fault.target):
            scope.cancel()

    async def _freeze(self, fault: Fault) -> None:
        name = self._reigning if fault.kind == "freeze server" else fault.target
        process = self._world.processes.get(name)
        if process is not None:
            process.freeze()
            await trio.sleep(fault.seconds)
            process.thaw()

    async def _lose_site(self, fault: Fault) -> None:
        for worker in self._world.plan.workers:
            if worker.site == fault.target:
                self._kill_now(worker.name, fault.seconds)

    # --- several servers ---

    async def _cut_servers(self, fault: Fault) -> None:
        others = [node for node in self._world.plan.nodes if node != fault.target]
        pairs = [(fault.target, other) for other in others]
        await self._cut([*pairs, *((other, node) for node, other in pairs)], fault.seconds)

    async def _cut_servers_one_way(self, fault: Fault) -> None:
        others = [node for node in self._world.plan.nodes if node != fault.target]
        outwards = fault.amount < 0.5
        await self._cut([(fault.target, o) if outwards else (o, fault.target) for o in others], fault.seconds)

    async def _cut_from_witness(self, fault: Fault) -> None:
        node = fault.target if fault.amount < 0.3 else self._reigning
        await self._cut([(node, WITNESS), (WITNESS, node)], fault.seconds)

    async def _lose_witness(self, fault: Fault) -> None:
        nodes = self._world.plan.nodes
        await self._cut([*((node, WITNESS) for node in nodes), *((WITNESS, node) for node in nodes)], fault.seconds)

    async def _lose_servers_site(self, fault: Fault) -> None:
        """The server and a site's workers at once, and some of what their disks had not written."""
        node = self._reigning
        self._kill_now(node, fault.seconds)
        if fault.amount < 0.5:
            self._world.disks[node].cut_power()
        await self._lose_site(fault)

    async def _lose_servers(self, fault: Fault) -> None:
        for node in self._world.plan.nodes:
            self._kill_now(node, fault.seconds * (0.5 + fault.amount))
            if fault.amount < 0.5:
                self._world.disks[node].cut_power()

    async def _promote(self, fault: Fault) -> None:
        """By an operator, who insists where nothing that the run promises forbids it."""
        if operator := self._world.operators.get(fault.target):
            is_replicated = self._world.plan.rules.durability == REPLICATED
            await operator(fault.amount < 0.5 and not is_replicated)

    # --- network ---

    async def _cut_link(self, fault: Fault) -> None:
        await self._cut([*self._outwards(fault.target), *self._inwards(fault.target)], fault.seconds)

    def _outwards(self, site: str) -> list[tuple[str, str]]:
        """From a site to all that may serve it."""
        return [(site, node) for node in self._world.plan.nodes]

    def _inwards(self, site: str) -> list[tuple[str, str]]:
        return [(node, site) for node in self._world.plan.nodes]

    async def _cut_one_way(self, fault: Fault) -> None:
        one_way = self._outwards if fault.amount < 0.5 else self._inwards
        await self._cut(one_way(fault.target), fault.seconds)

    async def _cut(self, directions: list[tuple[str, str]], seconds: float) -> None:
        for source, target in directions:
            self._world.network.cut(source, target)
        await trio.sleep(seconds)
        for source, target in directions:
            self._world.network.mend(source, target)

    async def _flap(self, fault: Fault) -> None:
        ends_at = trio.current_time() + fault.seconds
        while trio.current_time() < ends_at:
            await self._cut([*self._outwards(fault.target), *self._inwards(fault.target)], FLAP_SECONDS)
            await trio.sleep(FLAP_SECONDS)

    async def _reset(self, fault: Fault) -> None:
        for worker in self._world.network.dialling.values():
            if worker.peer.site == fault.target:
                worker.reset()

    async def _worsen(self, fault: Fault) -> None:
        """The link to a site is bad in both directions, then as it was at first."""
        usual, changes = self._world.plan.links[fault.target], WORSE[fault.kind](fault.amount)
        self._change_link(fault.target, changes)
        await trio.sleep(fault.seconds)
        self._change_link(fault.target, {name: getattr(usual, name) for name in changes})

    def _change_link(self, site: str, changes: dict[str, float]) -> None:
        """Only in this; what else ails the link stays as it is."""
        network = self._world.network
        for node in self._world.plan.nodes:
            network.join(site, node, replace(network.condition(site, node), **changes))  # type: ignore[arg-type]

    # --- the server's disk ---

    async def _ail_disk(self, fault: Fault) -> None:
        troubles = self._world.disks[self._reigning].troubles
        self._hold(self._reigning, 0.0)
        match fault.kind:
            case "full disk":
                troubles.is_full = True
                await trio.sleep(fault.seconds)
                troubles.is_full = False
            case "slow disk":
                troubles.slow_seconds = 2 * fault.amount
                await trio.sleep(fault.seconds)
                troubles.slow_seconds = 0.0
            case "failing write":
                troubles.failing = "write"
            case "failing fsync":
                troubles.failing = "fsync"

    async def _die_at_call(self, fault: Fault) -> None:
        """The power goes in the middle of a call, or only the process."""
        disk = self._world.disks[self._reigning]
        disk.troubles.die_in_calls = 2 + int(DISK_CALLS_MAX * fault.amount)
        await self._await_death(fault)
        if fault.amount * DISK_CALLS_MAX % 1 < 0.5:
            disk.cut_power()

    async def _die_in_checkpoint(self, fault: Fault) -> None:
        """At a call that the log does not make: a rename, or one soon after it."""
        self._world.disks[self._reigning].troubles.die_in_renames = 2 + int(8 * fault.amount)
        await self._await_death(fault)
        if fault.amount * 8 % 1 < 0.5:
            self._world.disks[self._reigning].cut_power()

    async def _await_death(self, fault: Fault) -> None:
        process = self._world.processes[self._reigning]
        self._hold(self._reigning, fault.seconds)
        await process.died()
        self._hold(self._reigning, fault.seconds)

    async def _damage_checkpoint(self, fault: Fault) -> None:
        self._kill_now(self._reigning, fault.seconds)
        disk = self._world.disks[self._reigning]
        found = sorted(path for path in (disk.root / "checkpoints").glob("[0-9]*/*") if path.stat().st_size)
        if found:  # what was being written may be empty still
            disk.flip_bit(found[-1])

    async def _damage_log(self, fault: Fault) -> None:
        """A bit of a record that others follow, in the segment that every start reads: no server may go on from it."""
        self._kill_now(self._reigning, fault.seconds)
        disk = self._world.disks[self._reigning]
        newest = max((disk.root / "log").glob("[0-9]*.log"), default=None)
        used = len(newest.read_bytes().rstrip(b"\0")) if newest is not None else 0
        if newest is not None and used > DAMAGED_BYTES_MIN:
            disk.flip_bit(newest, used // 2)
            self._world.must_halt = True
