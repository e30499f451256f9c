"""What it costs a run of four workers that a random one is killed again and again, and its site's agent starts it anew.

SECONDS and EVERY say how long and how often: half a minute in `make bench`, ten minutes in `make bench-under-fire`. A
worker is down from its kill until it has joined again. Its steps take time and no processor, as on an accelerator, but
what a start of Python costs falls on the same cores here.
"""

import itertools
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from benchmarks.figures import Figures
from benchmarks.lives import BenchRun
from benchmarks.scripts import moments

from hetero_async.core import ranges

SECONDS = float(os.environ.get("SECONDS", "30"))
EVERY = float(os.environ.get("EVERY", "10"))
WORKERS = 4
STEP_SECONDS = 0.05
LOOK_SECONDS = 0.02
SCRIPT = """
import os, sys, torch
sys.path[:0] = {paths!r}
from benchmarks.scripts import train_tiny
torch.set_num_threads(1)
train_tiny(notes=os.path.join({notes!r}, os.environ["HETERO_ASYNC_WORKER"]), step_seconds={step_seconds})
"""


@dataclass
class Kill:
    """Moments; 0 for what has not been yet. `detected`: it has left in the log, or has joined again before that."""

    worker: str
    killed: float
    detected: float = 0.0
    rejoined: float = 0.0
    acknowledged: float = 0.0
    before: int = 0

    def see(self, event: str, worker: str, now: float) -> None:
        if worker == self.worker and not self.rejoined:
            self.detected = self.detected or now
            self.rejoined = now if event == "joined" else 0.0

    def see_acknowledged(self, count: int, now: float) -> None:
        """`count`: of its worker's deltas. The first one after it has joined again counts."""
        if not self.rejoined:
            self.before = count
        elif count > self.before and not self.acknowledged:
            self.acknowledged = now


@dataclass(frozen=True)
class Outcome:
    samples_per_second: float
    share_up: float
    longest_step: float  # of workers that lived, in steps
    kills: list[Kill]


class Told:
    """What the server says, as it says it: event and worker."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._heard = 0  # lines

    def news(self) -> Iterator[tuple[str, str]]:
        lines = self._output.read_text().split("\n")[
            self._heard : -1
        ]  # what is behind the last end of a line is not whole
        self._heard += len(lines)
        for line in lines:
            words = line.split(maxsplit=3)
            if len(words) == 4 and words[1] in ("left", "joined"):
                yield words[1], line.split("worker='")[1].split("'")[0]


def fought(directory: Path, every: float, chance: random.Random) -> Outcome:
    sites = {f"site{number}": 1 for number in range(WORKERS)}
    with BenchRun(directory, sites=sites, steps_per_round=40, server={"keep_log": True}) as run:
        server = run.serve()
        notes, script = directory / "steps", directory / "train.py"
        notes.mkdir()
        script.write_text(SCRIPT.format(paths=sys.path, notes=str(notes), step_seconds=STEP_SECONDS))
        agents = [run.agent(site, sys.executable, str(script)) for site in sites]
        try:
            run.wait(lambda: all(run.acknowledged(worker) for worker in run.names), "everybody has pushed", 300)
            return under_fire(run, Told(server.output), notes, every, chance)
        finally:  # killed, they would leave their workers behind
            for agent in agents:
                agent.signal(signal.SIGTERM)
            for agent in agents:
                agent.ending()


def under_fire(run: BenchRun, told: Told, notes: Path, every: float, chance: random.Random) -> Outcome:
    for _ in told.news():
        pass
    began, kills, before = time.monotonic(), list[Kill](), samples(run)
    while (now := time.monotonic()) < began + SECONDS:
        if every and now > began + every * (len(kills) + 0.5):
            kills.append(Kill(chance.choice(run.names), time.monotonic()))
            os.kill(pid_of(run, kills[-1].worker), signal.SIGKILL)
        for event, worker in told.news():
            for each in kills:
                each.see(event, worker, now)
        for each in kills:
            if not each.acknowledged:
                each.see_acknowledged(len(run.acknowledged(each.worker)), now)
        time.sleep(LOOK_SECONDS)
    seconds = time.monotonic() - began
    down = sum((each.rejoined or time.monotonic()) - each.killed for each in kills)
    pauses = [pause for worker in run.names for pause in pauses_of(moments(notes / worker), worker, began, kills)]
    return Outcome((samples(run) - before) / seconds, 1 - down / (WORKERS * seconds), max(pauses) / STEP_SECONDS, kills)


def pauses_of(steps: list[float], worker: str, began: float, kills: list[Kill]) -> Iterator[float]:
    """Seconds from step to step since then, but for those in which it was dead."""
    for before, after in itertools.pairwise(steps):
        if after > began and not any(each.worker == worker and before <= each.killed <= after for each in kills):
            yield after - before


def pid_of(run: BenchRun, worker: str) -> int:
    return int((run.config.worker_directory(worker) / "pid").read_text())


def samples(run: BenchRun) -> int:
    """In acknowledged deltas."""
    return sum(ranges.size(delta.ranges) for delta in run.deltas())


@pytest.mark.timeout(3000)
def test_under_fire(figures: Figures, tmp_path: Path) -> None:
    fire = fought(tmp_path / "fire", EVERY, random.Random(0))
    peace = fought(tmp_path / "peace", 0.0, random.Random(0))
    name = f"under fire ({SECONDS:g} s, a kill each {EVERY:g} s)"
    rate = fire.samples_per_second, peace.samples_per_second * fire.share_up
    figures.add(f"{name}: samples acknowledged, against the share of time up", [rate], "1/s", at_least=0.95)
    figures.add(f"{name}: longest step of workers that live", [(fire.longest_step, peace.longest_step)], "steps")
    for what in ("detected", "rejoined", "acknowledged"):
        known = [getattr(each, what) - each.killed for each in fire.kills if getattr(each, what)]
        if known:
            figures.add(
                f"{name}: killed until {what}, median and longest", [(statistics.median(known), max(known))], "s"
            )
