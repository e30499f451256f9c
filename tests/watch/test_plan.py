"""What is foretold comes true in simulated worlds, within a tenth."""

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import pytest
import torch

from hetero_async.core.records import Delta, Entry, Stepped
from hetero_async.sim import worldfile
from hetero_async.sim.checkers import Judge
from hetero_async.sim.recorder import LearningWorld, Recorder
from hetero_async.sim.text import Reading
from hetero_async.sim.world import play
from hetero_async.watch.plan import Forecast, forecast
from hetero_async.watch.timing import BITS, Question, Site

# A simulated step takes 0.8 to 1.25 times what its world says, evenly.
MEAN_STEP = 1.025
TOLERANCE = 0.1
STALENESS_TOLERANCE = 0.35  # merges
WORLD = """
name = "foretold"
steps = 240
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
workers = 2
step_seconds = 0.9
{far}
"""
# What the world's [run] and its far site say.
WORLDS = {
    "delay and mixed speeds": ('[run]\nsteps_per_round = 8', "delay = 0.2"),
    "thin link": (
        '[run]\nsteps_per_round = 8\ncodec_up = "int4"\ncodec_down = "int4"', "delay = 0.15\nbytes_per_second = 40_000",
    ),
    "a link that makes workers wait": (
        '[run]\nsteps_per_round = 4\nmax_staleness = 100\npublish_every = 4\ncodec_up = "bf16"\ncodec_down = "int4"',
        "bytes_per_second = 10_000",
    ),
    "in step": ('[run]\nsteps_per_round = 8\nmerge = "all"', "delay = 0.3\nbytes_per_second = 200_000"),
    "per push": ('[run]\nsteps_per_round = 8\nmerge = "per-push"', "delay = 0.3"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Measured:
    seconds: float
    bytes_up: int
    bytes_down: int
    idle_share: float
    staleness: float
    refused: int
    bits: float  # a parameter of a delta


class Ages(Recorder):
    """Notes how stale each delta was when it was merged."""

    def changed(self, entry: Entry, parameters: torch.Tensor) -> None:
        is_new = entry.lsn > self._lsn
        super().changed(entry, parameters)
        if is_new and isinstance(entry.record, Delta):
            self.payload_bytes.append(len(entry.payload))
            self.anchors[entry.lsn] = entry.record.anchor_version
        elif is_new and isinstance(entry.record, Stepped):
            self.ages += [entry.record.version - self.anchors[lsn] - 1 for lsn in entry.record.deltas]


class AgingWorld(LearningWorld):
    def make_judge(self) -> Judge:
        judge = Ages(self.plan.settings, self._failed, self._reading, self._points)
        judge.anchors, judge.ages, judge.payload_bytes = {}, [], []
        return judge


def measured(variant: worldfile.Variant, directory: Path) -> tuple[Question, Measured]:
    reading = Reading(variant.shape(), 0, 1, variant.corpus())
    world = AgingWorld(variant.plan(0), directory / "world", reading, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # vectors are so short that two threads would wait for each other most of the time
    play(world)
    torch.set_num_threads(threads)
    assert world.judge.violation is None
    ages = world.judge.ages
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
    return question, Measured(
        seconds=world.recorder.curve[-1].seconds,
        bytes_up=sum(end.bytes_up for end in world.ends),
        bytes_down=sum(end.bytes_down for end in world.ends),
        idle_share=world.waited_seconds / (world.waited_seconds + world.worked_seconds),
        staleness=fmean(ages),
        refused=world.judge.refused,
        bits=8 * fmean(world.judge.payload_bytes) / reading.parameters,
    )


def world_of(tmp_path: Path, run: str, far: str) -> worldfile.Variant:
    path = tmp_path / "world.toml"
    path.write_text(WORLD.format(run=run, far=far))
    return worldfile.load(path).variants[0]


@pytest.mark.parametrize("name", WORLDS)
def test_a_simulated_world_comes_out_as_foretold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    question, found = measured(world_of(tmp_path, *WORLDS[name]), tmp_path)
    # How well these deltas compress is the codec's affair, and a tiny model's are not a usual one's.
    monkeypatch.setitem(BITS, question.settings.codec_up, found.bits)
    expected = forecast(question)
    seconds = 86_400 * expected.days
    up = seconds * sum(site.up_bytes_per_second for site in expected.sites) + question.snapshot_bytes
    down = seconds * sum(site.down_bytes_per_second for site in expected.sites)
    down += question.workers * question.snapshot_bytes
    pairs = ((seconds, found.seconds), (up / 1e6, found.bytes_up / 1e6), (down / 1e6, found.bytes_down / 1e6))
    shares = ((idle(question, expected), found.idle_share), (staleness(question, expected), found.staleness))
    print("|", name, *(f"| {foretold:.2f} / {true:.2f}" for foretold, true in (*pairs, *shares)), "|")
    assert found.seconds == pytest.approx(seconds, rel=TOLERANCE)
    assert found.bytes_up == pytest.approx(up, rel=TOLERANCE)
    assert found.bytes_down == pytest.approx(down, rel=TOLERANCE)
    assert found.idle_share == pytest.approx(idle(question, expected), abs=TOLERANCE / 2)
    assert found.staleness == pytest.approx(staleness(question, expected), abs=STALENESS_TOLERANCE)


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
