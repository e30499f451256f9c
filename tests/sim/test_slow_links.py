"""A site behind a thin or a long link trains with the others, however far ahead they are when it hears of it."""

from pathlib import Path

import pytest

from hetero_async.core.records import RunSettings
from hetero_async.sim.network import Condition
from hetero_async.sim.plan import Plan, WorkerPlan
from hetero_async.sim.trace import Trace
from hetero_async.sim.workload import Regression
from hetero_async.sim.world import World, play

WINDOW_SECONDS = 0.5


@pytest.mark.parametrize(
    ("link", "samples"),
    [
        (Condition(delay=0.05, bytes_per_second=400), 600),  # a snapshot takes several windows
        (Condition(delay=0.4), 600),  # an answer takes longer than the patience before the next question
        (Condition(delay=1.0, jitter=0.5), 1000),
    ],
    ids=["thin", "long", "very long"],
)
def test_a_late_worker_behind_a_slow_link_takes_part(tmp_path: Path, link: Condition, samples: int) -> None:
    plan = Plan(
        seed=1,
        settings=RunSettings(
            run="slow", samples=samples, steps_per_round=4, seconds_per_round=WINDOW_SECONDS, max_staleness=8,
            lease_ttl_seconds=10.0,
        ),
        workers=(
            WorkerPlan(name="near", site="here", step_seconds=0.1),
            WorkerPlan(name="far", site="there", step_seconds=0.1, joins_at=2.0),
        ),
        links={"here": Condition(delay=0.001), "there": link},
        chunk_bytes=64,
    )  # fmt: skip
    world = World(plan, tmp_path / "world", Regression(plan.dataset_samples, 1), Trace())
    play(world)
    assert world.outcome().violation is None
    assert len(world.judge.account("far").acknowledged) >= 3
