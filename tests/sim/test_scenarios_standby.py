"""Servers that are lost, cut off, frozen or deposed while others stand by: who serves then, and what is kept."""

from pathlib import Path

import pytest
import trio
from sim.scenario import ScriptedWorld, make_plan, run

from hetero_async.core.replication import Durability
from hetero_async.sim.plan import SERVER

LEASE_MS = 2000
WITNESSED = Durability(durability="replicated", has_witness=True, lease_ms=LEASE_MS)
BY_HAND = Durability(durability="replicated", lease_ms=LEASE_MS)


async def trained(world: ScriptedWorld, deltas: int) -> None:
    await world.until(lambda: len(world.deltas("w0")) >= deltas, f"w0 has {deltas} deltas in the log")


@pytest.mark.parametrize("rules", [WITNESSED, BY_HAND], ids=["witness", "operator"])
def test_10_x(tmp_path: Path, rules: Durability) -> None:
    async def script(world: ScriptedWorld) -> None:
        await trained(world, 2)
        world.kill(SERVER)
        if not rules.has_witness:
            await trio.sleep(5)
            await world.operators["b"](False)
        await world.until(lambda: world.reigning != SERVER, "another serves")
        n = len(world.acks)
        await world.until(lambda: len(world.acks) > n + 4, "it acknowledges")

    world = run(make_plan(samples=300, standbys=("b", "c"), rules=rules), tmp_path, script)
    print({(s.node, s.term) for s in world.acks})
