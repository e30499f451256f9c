"""A model with buffers in a world where servers die: they are the run's, on every node, as its parameters are."""

from pathlib import Path

from sim.cluster import WITNESSED, take_over, trained
from sim.scenario import ScriptedWorld, make_plan, run

from hetero_async.core.records import Promoted, Published
from hetero_async.sim.plan import SERVER
from hetero_async.sim.workload import HIDDEN, Regression


def test_buffers_outlive_the_server_and_a_takeover(tmp_path: Path) -> None:
    seen: list[int] = []

    async def script(world: ScriptedWorld) -> None:
        await trained(world)
        world.kill(SERVER)
        world.release(SERVER)
        await trained(world)
        world.kill(SERVER)
        await take_over(world)
        world.release(SERVER)  # nothing is acknowledged without it
        seen.append(int(world.serving.model.state_dict()["2.count"]))
        await trained(world)

    plan = make_plan(samples=400, standbys=("b",), rules=WITNESSED, publish_every=2)
    world = run(plan, tmp_path, script, workload=Regression(plan.dataset_samples, plan.seed, with_buffers=True))
    assert world.records(Promoted) and world.records(Published)
    end = world.serving.model.state_dict()
    assert 0 < seen[0] < int(end["2.count"]) <= 400
    assert 0 < float(end["2.mean"].abs().max()) <= 1, "a mean of what tanh gives"
    assert end["2.mask"].tolist() == [float("-inf")] * HIDDEN
