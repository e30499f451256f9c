"""Runs with standbys: what they are asked for, and what a test does to them and looks at. For test_scenarios_*.py."""

from dataclasses import replace

import pytest
from sim.scenario import NEVER, Said, ScriptedWorld

from hetero_async.core.records import Delta, Promoted
from hetero_async.core.replication import Durability

LEASE_MS = 2000
LEASE_SECONDS = LEASE_MS / 1000
WITNESSED = Durability(durability="replicated", has_witness=True, lease_ms=LEASE_MS)
CONTINUING = replace(WITNESSED, when_alone="continue")
BY_HAND = Durability(durability="replicated", lease_ms=LEASE_MS)
LOCAL = Durability(durability="local", lease_ms=LEASE_MS)
# What was under way when a link was cut, or a peer died, may arrive for so long.
ARRIVING_SECONDS = 0.5
AWAY_SECONDS = 10.0
# Messages that wait for a standby: a worker repeats itself, and what is the same waits once.
WAITING_MAX = 40

either_way = pytest.mark.parametrize("rules", [WITNESSED, BY_HAND], ids=["witness", "operator"])


async def trained(world: ScriptedWorld, more: int = 2) -> None:
    """So many more deltas of w0 are acknowledged."""
    known = len(world.judge.account("w0").acknowledged)
    await world.until(
        lambda: len(world.judge.account("w0").acknowledged) >= known + more,
        f"{more} more deltas of w0 are acknowledged",
    )


async def take_over(world: ScriptedWorld, node: str = "b") -> None:
    """By itself, if there is a witness; by the operator's word otherwise."""
    if not world.plan.rules.has_witness:
        await world.operators[node](False)
    await world.until(lambda: world.is_served_by(node), f"{node} serves")


def both_ways(node: str, *others: str) -> list[tuple[str, str]]:
    return [way for other in others for way in ((node, other), (other, node))]


def acks(world: ScriptedWorld, node: str = "", after: float = 0.0, before: float = NEVER) -> list[Said]:
    return [said for said in world.acks if said.node == (node or said.node) and after <= said.at < before]


def reigns(world: ScriptedWorld) -> list[tuple[int, str]]:
    """Those that followed the first one, in the run's history."""
    return [
        (entry.term, entry.record.server) for _, entry in world.records(Promoted) if isinstance(entry.record, Promoted)
    ]


def is_whole(world: ScriptedWorld, said: list[Said]) -> bool:
    """Whether each of these acknowledgements is of a delta that is in the run's history."""
    admitted = {entry.lsn for _, entry in world.records(Delta)}
    return {one.lsn for one in said} <= admitted
