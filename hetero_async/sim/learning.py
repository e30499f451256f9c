"""Learning in the same world: which rule, codec, link and mix of speeds learns how fast, in virtual time.

`study` runs every variant of a world file with every seed in the simulator and writes the curves as JSON and as a
picture. The server, the workers and the tensors are the real ones; the judge is not there, for it costs more than the
training, and the faults of random worlds are where it belongs.
"""

import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hetero_async.errors import UserError
from hetero_async.sim.recorder import LearningWorld, Point
from hetero_async.sim.text import Reading, standard_library
from hetero_async.sim.world import play
from hetero_async.sim.worldfile import Variant, load
from hetero_async.watch.report import draw_study

MEMORY = Path("/dev/shm")
COLUMNS = ("seconds", "tokens", "steps", "version", "loss")


@dataclass(slots=True)
class Run:
    """One variant with one seed."""

    variant: str
    seed: int
    curve: list[Point] = field(default_factory=list)
    problem: str = ""  # why it did not come to its end
    bytes_up: int = 0
    bytes_down: int = 0
    acknowledged: int = 0
    refused: int = 0

    @property
    def final(self) -> Point:
        return self.curve[-1] if self.curve else Point(0.0, 0, 0, 0, math.nan)

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "final_loss": _finite(self.final.loss),
            "virtual_seconds": round(self.final.seconds, 3),
            "versions": self.final.version,
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "acknowledged": self.acknowledged,
            "refused": self.refused,
            "problem": self.problem,
            "curve": [
                [round(point.seconds, 3), point.tokens, point.steps, point.version, _finite(point.loss)]
                for point in self.curve
            ],
        }

    def told(self) -> str:
        final = self.final
        told = f"{self.variant}, seed {self.seed}: loss {final.loss:.4f} after {final.seconds:,.1f} s"
        told += f" and {final.tokens:,} tokens; {self.refused} of {self.acknowledged + self.refused} deltas refused"
        return f"{told}; {self.problem}" if self.problem else told


@dataclass(frozen=True, slots=True)
class Study:
    """A world file's runs, in its order, and where they were written to."""

    variants: Sequence[Variant]
    runs: Sequence[Run]
    json_path: Path
    picture_path: Path | None  # None without matplotlib

    def of(self, variant: Variant) -> list[Run]:
        return [run for run in self.runs if run.variant == variant.name]

    @property
    def problems(self) -> list[str]:
        """Runs that did not come to their end."""
        return [f"{run.variant}, seed {run.seed}: {run.problem}" for run in self.runs if run.problem]

    def summary(self) -> dict[str, Any]:
        """JSON-able, and the same for the same file, always."""
        world = self.variants[0].world
        return {
            "name": world.name,
            "text": standard_library().fingerprint,
            "columns": list(COLUMNS),
            "faults": [fault.model_dump() for fault in world.faults],
            "variants": {
                variant.name: {
                    "settings": variant.settings(),
                    "seeds": {str(run.seed): run.summary() for run in self.of(variant)},
                }
                for variant in self.variants
            },
        }

    def lines(self) -> Iterator[str]:
        """For a person: one a variant, the best first, then where it all stands."""
        width = max(len(variant.name) for variant in self.variants)
        for variant in sorted(self.variants, key=lambda variant: _sortable(_mean_loss(self.of(variant)))):
            runs = self.of(variant)
            losses, seconds = [run.final.loss for run in runs], [run.final.seconds for run in runs]
            yield (
                f"{variant.name:<{width}}  loss {_mean_loss(runs):.4f} ({min(losses):.4f} … {max(losses):.4f})"
                f"  {sum(seconds) / len(runs):9,.1f} s  up {_megabytes(run.bytes_up for run in runs)}"
                f"  down {_megabytes(run.bytes_down for run in runs)}"
            )
        for path in (self.json_path, self.picture_path):
            if path is not None:
                yield f"wrote {path}"


def study(path: Path, out: Path, told: Callable[[str], None], processes: int = 0) -> Study:
    """Run a world file and write `out`/NAME.json and `out`/NAME.png; NAME is the file's own.

    `told` is given a line as each run ends. `processes`: how many runs at once; 0: one a core. Raises ConfigError.
    """
    variants = load(path)
    cases = [(variant, seed) for variant in variants for seed in variant.world.seeds]
    at_once = min(processes or os.cpu_count() or 1, len(cases))
    told(f"{len(cases)} runs of {path}, {at_once} at once")
    runs: dict[tuple[str, int], Run] = {}
    for number, run in enumerate(_runs(cases, at_once), start=1):
        runs[run.variant, run.seed] = run
        told(f"[{number}/{len(cases)}] {run.told()}")
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{path.stem}.png"
    done = Study(variants, [runs[variant.name, seed] for variant, seed in cases], picture.with_suffix(".json"), picture)
    done.json_path.write_text(json.dumps(done.summary(), indent=1, allow_nan=False) + "\n")
    try:
        draw(done, picture)
    except UserError as error:
        told(str(error))
        return Study(done.variants, done.runs, done.json_path, None)
    return done


def draw(done: Study, path: Path) -> None:
    world = done.variants[0].world
    draw_study(
        {
            variant.name: [
                [(point.seconds, point.tokens, point.loss) for point in run.curve if math.isfinite(point.loss)]
                for run in done.of(variant)
            ]
            for variant in done.variants
        },
        [(fault.at, f"{fault.kind} {fault.target}".strip()) for fault in world.faults],
        path,
        title=world.name,
    )


def _runs(cases: Sequence[tuple[Variant, int]], at_once: int) -> Iterator[Run]:
    if at_once == 1:
        yield from (run(variant, seed) for variant, seed in cases)
        return
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(run, variant, seed) for variant, seed in cases]):
            yield future.result()


def run(variant: Variant, seed: int) -> Run:
    """One simulated run, from its first step to its last publish."""
    torch.set_num_threads(1)
    evaluation, model = variant.world.evaluation, variant.world.model
    reading = Reading(variant.shape(), model.seed + seed, evaluation.windows)
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hetero-async-", dir=memory) as scratch:
        world = LearningWorld(variant.plan(seed), Path(scratch) / "world", reading, evaluation.points)
        play(world)
    violation = world.judge.violation
    return Run(
        variant=variant.name,
        seed=seed,
        curve=world.recorder.curve,
        problem=f"{violation.invariant}: {violation.what}" if violation else "",
        bytes_up=sum(end.bytes_up for end in world.ends),
        bytes_down=sum(end.bytes_down for end in world.ends),
        acknowledged=world.judge.acknowledged,
        refused=world.judge.refused,
    )


def _finite(loss: float) -> float | None:
    return round(loss, 5) if math.isfinite(loss) else None


def _mean_loss(runs: Sequence[Run]) -> float:
    return sum(run.final.loss for run in runs) / len(runs)


def _sortable(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf


def _megabytes(sizes: Iterable[int]) -> str:
    counted = list(sizes)
    return f"{sum(counted) / len(counted) / 1e6:,.1f} MB"
