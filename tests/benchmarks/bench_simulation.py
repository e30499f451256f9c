"""What the simulator costs a learning study: its steps against the same steps in a bare loop."""

import time
from itertools import islice
from pathlib import Path

import torch

from hetero_async.sim.learning import run
from hetero_async.sim.plan import WorkerPlan
from hetero_async.sim.text import Reading
from hetero_async.sim.worldfile import load

STEPS = 4000
COST_MAX = 1.3  # of the bare loop
WORLD = f"""
name = "benchmark"
steps = {STEPS}

[sites.near]
workers = 2
step_seconds = 0.1

[sites.far]
workers = 2
step_seconds = 0.2
delay = 0.1
"""


def test_simulated_steps_cost_little_more_than_bare_ones(tmp_path: Path) -> None:
    file = tmp_path / "world.toml"
    file.write_text(WORLD)
    (variant,) = load(file)
    torch.set_num_threads(1)
    reading = Reading(variant.shape(), seed=0, evaluated_windows=1)
    assert 100_000 <= reading.parameters <= 150_000
    # Processor time, and half of the bare steps after the others: what else the machine does must not decide.
    bare = bare_seconds(reading, variant.world.model.batch)
    began = time.process_time()
    outcome = run(variant, seed=0)
    simulated = time.process_time() - began
    assert not outcome.problem
    assert outcome.final.steps >= STEPS
    bare += bare_seconds(reading, variant.world.model.batch)
    print(
        f"\n{reading.parameters:,} parameters: {STEPS / bare:.0f} bare steps/s, {STEPS / simulated:.0f} simulated,"
        f" {simulated / bare:.2f} times the time, {outcome.final.seconds / simulated:.0f} virtual seconds a second",
        end="",
    )
    assert simulated <= COST_MAX * bare


def bare_seconds(reading: Reading, batch: int) -> float:
    """Half of the steps with the same model, batch and optimizer, in a loop that does nothing else."""
    reader, samples = reading.student(WorkerPlan(name="w", site="s", step_seconds=1.0), 0), iter(range(reading.samples))
    began = time.process_time()
    for _ in range(STEPS // 2):
        reader.step(list(islice(samples, batch)))
    return time.process_time() - began
