"""What is foretold comes true in simulated worlds, within a tenth."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import trio

from hetero_async.core.records import Delta, Entry, Stepped
from hetero_async.sim import worldfile
from hetero_async.sim.checkers import Judge
from hetero_async.sim.recorder import LearningWorld, Recorder
from hetero_async.sim.text import Reading
from hetero_async.sim.world import play
from hetero_async.watch import carrying
from hetero_async.watch.plan import Forecast, forecast
from hetero_async.watch.timing import BITS, Question, Site

# A simulated step takes 0.8 to 1.25 times what its world says, evenly.
MEAN_STEP = 1.025
TOLERANCE = 0.1
STALENESS_TOLERANCE = 0.15  # merges
WORLD = """
name = "foretold"
steps = {steps}
{run}
[model]
layers = 1
width = 64
heads = 1
context = 8
batch = 1
[sites.near]
workers = 1
step_seconds = 0.5
[sites.far]
workers = 1
step_seconds = 0.9
{far}
[sites.other]
workers = 1
step_seconds = 0.9
{far}
"""
# What the world's [run] and its far site say; where it is chance who is late, a longer run.
WORLDS: dict[str, Any] = {
    "delay and mixed speeds": ('[run]\nsteps_per_round = 8', "delay = 0.2"),
    "thin link": (
        '[run]\nsteps_per_round = 8\ncodec_up = "e3m0"\ncodec_down = "int4"',
        "delay = 0.15\nbytes_per_second = 28_000", 900,
    ),
    "half of a link taken": ("[run]\nsteps_per_round = 8", "bytes_per_second = 34_500", 900),
    "a chunk takes longer than the first patience": (
        "[run]\nsteps_per_round = 32\nmax_staleness = 50", "delay = 0.05\nbytes_per_second = 6_000", 5000,
    ),
    "a way so long that workers wait": (
        "[run]\nsteps_per_round = 1\nmax_staleness = 100\npublish_every = 8", "delay = 1.4",
    ),
    "in step": ('[run]\nsteps_per_round = 8\nmerge = "all"\ndylu = false', "delay = 0.3\nbytes_per_second = 100_000"),
    "per push": ('[run]\nsteps_per_round = 8\nmerge = "per-push"', "delay = 0.3"),
}  # fmt: skip


# Of a run's samples: what lies between is steady: before it workers join, after it the last leases are used up.
STEADY = (0.3, 0.85)


@dataclass(frozen=True, slots=True)
class Measured:
    """While the run was steady."""

    samples_per_second: float
    up_per_second: float
    down_per_second: float
    idle_share: float
    staleness: float
    bits: float  # a parameter of a delta


@dataclass(frozen=True, slots=True)
class Mark:
    """How it stood after a merge."""

    seconds: float
    samples: int
    up: int
    down: int
    worked: float
    waited: float


class Ages(Recorder):
    """Notes what each merge found, and how stale its deltas were."""

    def begin(self, world: LearningWorld) -> "Ages":
        self.world = world
        self.marks: list[Mark] = []
        self.anchors: dict[int, int] = {}
        self.ages: list[tuple[int, int]] = []  # which mark, how many merges
        self.payload_bytes: list[int] = []
        return self

    def changed(self, entry: Entry, parameters: torch.Tensor) -> None:
        is_new = entry.lsn > self._lsn
        super().changed(entry, parameters)
        if is_new and isinstance(entry.record, Delta):
            self.anchors[entry.lsn] = entry.record.anchor_version
            self.payload_bytes.append(len(entry.payload))
        elif is_new and isinstance(entry.record, Stepped):
            self.ages += [
                (len(self.marks), entry.record.version - self.anchors[lsn] - 1) for lsn in entry.record.deltas
            ]
            self.marks.append(self.mark())

    def mark(self) -> Mark:
        world, ends = self.world, self.world.ends
        up, down = sum(end.bytes_up for end in ends), sum(end.bytes_down for end in ends)
        return Mark(trio.current_time(), self.trained, up, down, world.worked_seconds, world.waited_seconds)

    def measured(self, parameters: int) -> Measured:
        low, high = (share * self.settings.samples for share in STEADY)
        steady = [number for number, mark in enumerate(self.marks) if low <= mark.samples <= high]
        first, last = self.marks[steady[0]], self.marks[steady[-1]]
        seconds, waited = last.seconds - first.seconds, last.waited - first.waited
        return Measured(
            samples_per_second=(last.samples - first.samples) / seconds,
            up_per_second=(last.up - first.up) / seconds,
            down_per_second=(last.down - first.down) / seconds,
            idle_share=waited / (waited + last.worked - first.worked),
            staleness=fmean(age for number, age in self.ages if number in steady),
            bits=8 * fmean(self.payload_bytes) / parameters,
        )


class AgingWorld(LearningWorld):
    def make_judge(self) -> Judge:
        return Ages(self.plan.settings, self._failed, self._reading, self._points).begin(self)


def measured(variant: worldfile.Variant, directory: Path) -> tuple[Question, Measured]:
    reading = Reading(variant.shape(), 0, 1, variant.corpus())
    world = AgingWorld(variant.plan(0), directory / "world", reading, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # vectors are so short that two threads would wait for each other most of the time
    play(world)
    torch.set_num_threads(threads)
    assert world.judge.violation is None
    assert world.judge.refused == 0
    assert isinstance(world.judge, Ages)
    question = Question(
        parameters=reading.parameters,
        settings=variant.plan(0).settings,
        samples=variant.samples,
        sites=tuple(
            Site(
                name=name, workers=table.workers, step_seconds=MEAN_STEP * table.step_seconds, delay=table.delay,
                up=table.bytes_per_second or math.inf, down=table.bytes_per_second or math.inf,
            )
            for name, table in variant.world.sites.items()
        ),
    )  # fmt: skip
    return question, world.judge.measured(reading.parameters)


def world_of(tmp_path: Path, run: str, far: str, steps: int = 500) -> worldfile.Variant:
    path = tmp_path / "world.toml"
    path.write_text(WORLD.format(run=run, far=far, steps=steps))
    return worldfile.load(path).variants[0]


@pytest.mark.parametrize("name", WORLDS)
def test_a_simulated_world_comes_out_as_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    question, found = measured(world_of(tmp_path, *WORLDS[name]), tmp_path)
    # How well these deltas compress is the codec's affair, and a tiny model's are not a usual one's.
    monkeypatch.setitem(BITS, question.settings.codec_up, found.bits)
    monkeypatch.setattr(carrying, "FIRST_FLIGHT_BYTES", 1e15)  # the simulated network has no TCP
    expected = forecast(question)
    up = sum(site.up_bytes_per_second for site in expected.sites)
    down = sum(site.down_bytes_per_second for site in expected.sites)
    rates = (
        (expected.samples_per_second, found.samples_per_second),
        (up / 1e3, found.up_per_second / 1e3),
        (down / 1e3, found.down_per_second / 1e3),
    )
    others = ((idle(question, expected), found.idle_share), (staleness(question, expected), found.staleness))
    print("|", name, *(f"| {foretold:.2f} / {true:.2f}" for foretold, true in (*rates, *others)), "|")
    for foretold, true in rates:
        assert true == pytest.approx(foretold, rel=TOLERANCE)
    assert found.idle_share == pytest.approx(idle(question, expected), abs=TOLERANCE / 2)
    assert found.staleness == pytest.approx(staleness(question, expected), rel=TOLERANCE, abs=STALENESS_TOLERANCE)


def idle(question: Question, expected: Forecast) -> float:
    shares = [site.training_share for site in expected.sites for _ in range(_workers(question, site.name))]
    return 1 - fmean(shares)


def staleness(question: Question, expected: Forecast) -> float:
    """Of all deltas: those who push more often count more."""
    pushes = [_workers(question, site.name) / site.round_seconds for site in expected.sites]
    ages = [site.staleness for site in expected.sites]
    return sum(push * age for push, age in zip(pushes, ages, strict=True)) / sum(pushes)


def _workers(question: Question, name: str) -> int:
    return next(site.workers for site in question.sites if site.name == name)


@pytest.mark.parametrize(
    ("size", "rate", "delay", "rest", "expected"),
    [
        (60e3, math.inf, 0.0, 60.0, 0.0),
        (14e3, math.inf, 0.25, 60.0, 0.0),  # one flight
        (60e3, math.inf, 0.25, 60.0, 1.0),  # 14 + 29 + 17 kB: two answers are waited for
        (60e3, math.inf, 0.25, 1.0, 0.5),  # a shorter rest: 30 + 30 kB
        (60e3, math.inf, 0.25, 0.5, 0.0),  # none to speak of
        (1e9, 1e6, 0.005, 60.0, 0.01 + 0.01448 - 0.01448),  # a thin link is full after the first flight
    ],
)
def test_tcp_begins_slowly(size: float, rate: float, delay: float, rest: float, expected: float) -> None:
    assert carrying.slow_start(size, rate, delay, rest) == pytest.approx(expected)
