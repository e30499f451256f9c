"""How well `plan` foretells real runs: the byte transformer of examples/, real processes in network namespaces.

A step lasts as long as it is told to sleep, so that what else the machine does decides little. What each run's plan
came to is printed, and stays with its run.toml and log in the test's directory.
"""

import json
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from e2e.commands import background
from e2e.harness import forked, until
from network.rough import Rough
from network.sites import Sites, why_not

from hetero_async import roster
from hetero_async.doctor.network import begins_slowly
from hetero_async.tables import template

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

SCRIPT = Path(__file__).parents[2] / "examples/byte_gpt.py"
PROGRAM = (sys.executable, "-m", "hetero_async")
PARAMETERS, BATCH = 119_424, 8
NEAR_SECONDS, FAR_SECONDS = 0.5, 0.9
ENDED_SECONDS_MAX = 600.0
# Of a run of three minutes, what passes before all train and after the first has nothing more to do is much.
NOT_STEADY = ("the whole run",)
STALENESS_WITHIN = 0.45  # merges, or that share where it is more


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One near worker and two far ones. `way`: what befalls packets to and from these; `plan`: what a person who
    measured that link would say of it. `within`: how far off the plan may be, as a share of what was measured."""

    training: dict[str, Any]
    samples: int = 6000
    way: dict[str, Any] = field(default_factory=dict)
    plan: str = ""
    within: float = 0.1


WORLDS = {
    "one machine, int8": World(training={"steps_per_round": 8}),
    "100 ms each way": World(
        training={"steps_per_round": 8}, way={"rough": Rough(delay_ms=100)}, plan='delay = "100ms"',
    ),
    "1 Mbit/s": World(
        training={"steps_per_round": 16}, way={"megabits_per_second": 1.0}, plan='up = "1Mbit"\ndown = "1Mbit"',
    ),
    "1 Mbit/s, half of it taken": World(
        training={"steps_per_round": 8}, way={"megabits_per_second": 1.0}, plan='up = "1Mbit"\ndown = "1Mbit"',
    ),
    "250 ms each way, rounds of two steps, int4": World(
        training={"steps_per_round": 2, "publish_every": 4, "max_staleness": 100}
        | {"codec_up": "int4", "codec_down": "int4"},
        way={"rough": Rough(delay_ms=250)}, plan='delay = "250ms"', samples=5000,
        within=0.35,  # links make rounds last four steps, and who is late by one is late
    ),
}  # fmt: skip


def prepared(world: World, sites: Sites, directory: Path) -> Path:
    text = template(
        run={"name": "planned", "samples": world.samples},
        server={
            "site": "near",
            "address": f"tcp://{sites.address('near')}:7710",
            "dashboard": "",
            "checkpoint_every": 5,
        },
        sites={"near": 1, "far": 2},
        training=world.training,
    )
    plan = f"""
[plan]
parameters = {PARAMETERS}
slow_start = {"true" if list(begins_slowly("", 1.0)) else "false"}
[plan.sites.near]
workers = 1
step = {NEAR_SECONDS}
batch = {BATCH}
[plan.sites.far]
workers = 2
step = {FAR_SECONDS}
batch = {BATCH}
{world.plan}
"""
    return roster.initialize(directory, text + plan).path


@pytest.mark.timeout(ENDED_SECONDS_MAX + 60)
@pytest.mark.parametrize("name", WORLDS)
def test_a_real_run_comes_out_as_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    world, output = WORLDS[name], tmp_path / "output"
    with Sites("near", "far") as sites, ExitStack() as processes:
        sites.between("near", "far", **world.way)
        run_toml = prepared(world, sites, tmp_path / "run")

        def start(site: str, *words: object) -> Any:
            command = [*PROGRAM, *map(str, words)]
            return processes.enter_context(background(output, *sites.command(site, *command), OMP_NUM_THREADS=1))

        server = start("near", "serve", "--run", run_toml, "--exit-when-finished")
        for site, step in (("near", NEAR_SECONDS), ("far", FAR_SECONDS)):
            script = [SCRIPT, "--batch-size", BATCH, "--step-seconds", step, "--evaluate-every", 0]
            start(site, "work", "--run", run_toml, "--site", site, "--", sys.executable, *script)
        until(lambda: server.poll() is not None, "the run is over", ENDED_SECONDS_MAX, output.read_text)
    told = forked(tmp_path, "plan", run_toml, "--against", run_toml)
    found = json.loads(forked(tmp_path, "plan", run_toml, "--against", run_toml, "--json").output)
    with capsys.disabled():
        print(f"\n{name}\n{told.output}")
    off = {line: abs(figures["off"]) for line, figures in found.items() if line not in NOT_STEADY}
    staleness = off.pop("staleness") / max(1.0, found["staleness"]["measured"])
    assert staleness <= STALENESS_WITHIN
    assert max(off.values()) <= world.within, told.output
