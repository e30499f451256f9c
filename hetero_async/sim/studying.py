"""Studies: every variant of a world file in the simulator, with every seed, and what the comparison came to.

A run's outcome is one JSON line in NAME.jsonl, with all of its settings. What stands there already is not run again, so
a study that was cut short goes on where it was, and a changed setting runs what it changed.

Where the file has a [cell], its yardstick is the best of the variants to choose from, by text that nothing is reported
of and with the first seed; it and those that must reach it are then run with all seeds.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hetero_async.errors import UserError
from hetero_async.sim.learning import Run, run
from hetero_async.sim.worldfile import CellTable, FaultTable, StudyFile, Variant, load


@dataclass(slots=True)
class Book:
    """The runs that are kept in one file, by what they were made of."""

    path: Path
    runs: dict[str, Run] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> "Book":
        """A last line that was torn off is left out. Raises UserError for any other that is not a run."""
        book = cls(path)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):
                path.write_text("".join(lines[:-1]), encoding="utf-8")
                break
            try:
                kept = Run.from_json(json.loads(line))
            except (ValueError, TypeError, KeyError) as error:
                raise UserError(f"{path}: line {number} is not the outcome of a run ({error}); remove it") from None
            book.runs[_key(kept.settings, kept.seed)] = kept
        return book

    def find(self, variant: Variant, seed: int) -> Run | None:
        return self.runs.get(_key(variant.settings(), seed))

    def add(self, done: Run) -> None:
        self.runs[_key(done.settings, done.seed)] = done
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(done.as_json(), allow_nan=False) + "\n")


def _key(settings: object, seed: int) -> str:
    return json.dumps([settings, seed], sort_keys=True)


@dataclass(frozen=True, slots=True)
class Figure:
    """A variant's outcome over its seeds."""

    variant: str
    runs: tuple[Run, ...]

    @property
    def losses(self) -> list[float]:
        return [math.inf if run.final_loss is None else run.final_loss for run in self.runs]

    @property
    def loss(self) -> float:
        """Mean over seeds; infinite where one run diverged."""
        return fmean(self.losses)

    @property
    def deviation(self) -> float:
        """Standard deviation over seeds; 0 with one."""
        return stdev(self.losses) if len(self.runs) > 1 and math.isfinite(self.loss) else 0.0

    @property
    def seconds(self) -> float:
        return fmean(run.virtual_seconds for run in self.runs)

    @property
    def idle_share(self) -> float:
        return max(run.idle_share for run in self.runs)

    def seconds_to(self, loss: float) -> float:
        """Mean virtual time until the loss had fallen to this; infinite where one run never came there."""
        return fmean(_seconds_to(run, loss) for run in self.runs)

    def bytes_per_round(self, way: str) -> float:
        """Of one worker, up or down, per acknowledged delta."""
        return fmean(getattr(run, f"bytes_{way}") / max(1, run.acknowledged) for run in self.runs)

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "variant": self.variant,
            "loss": round(self.loss, 4) if math.isfinite(self.loss) else None,
            "sd": round(self.deviation, 4),
            "seeds": len(self.runs),
            "virtual_seconds": round(self.seconds, 1),
            "idle_share": self.idle_share,
            "bytes_up_per_round": round(self.bytes_per_round("up")),
            "bytes_down_per_round": round(self.bytes_per_round("down")),
        }


def _seconds_to(run: Run, loss: float) -> float:
    """Between two points of the curve the loss is taken to fall evenly."""
    before = (0.0, math.inf)
    for seconds, _, _, _, found in run.curve:
        if found is not None and found <= loss:
            share = (before[1] - loss) / (before[1] - found) if math.isfinite(before[1]) else 1.0
            return before[0] + share * (seconds - before[0])
        before = (seconds, math.inf if found is None else found)
    return math.inf


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line of the table: what had to be reached, and what was."""

    title: str
    yardstick: Figure
    reached: Figure
    goal: float  # nats above the yardstick
    time_ratio: float | None  # of the slower way's time
    time_share: float
    idle_share: float

    @property
    def excess(self) -> float:
        return self.reached.loss - self.yardstick.loss

    @property
    def is_met(self) -> bool:
        is_fast = self.time_ratio is None or self.time_ratio <= self.time_share
        return self.excess <= self.goal and is_fast and self.reached.idle_share <= self.idle_share

    def summary(self) -> dict[str, Any]:
        """JSON-able. `time_to_yardstick`: until the yardstick's final loss was reached, as a share of its own time."""
        to_it = self.reached.seconds_to(self.yardstick.loss) / self.yardstick.seconds
        return {
            "cell": self.title,
            "yardstick": self.yardstick.summary(),
            "reached": self.reached.summary(),
            "excess": round(self.excess, 4) if math.isfinite(self.excess) else None,
            "goal": self.goal,
            "time_ratio": None if self.time_ratio is None else round(self.time_ratio, 3),
            "time_share": self.time_share if self.time_ratio is not None else None,
            "time_to_yardstick": round(to_it, 3) if math.isfinite(to_it) else None,
            "met": self.is_met,
        }


@dataclass(frozen=True, slots=True)
class Study:
    """A world file and the book of its runs."""

    file: StudyFile
    book: Book

    @classmethod
    def open(cls, path: Path, out: Path | None) -> "Study":
        """`out`: where NAME.jsonl lies; None: in `results` beside the file. Raises ConfigError, UserError."""
        file = load(path)
        return cls(file, Book.open((out or path.parent / "results") / f"{path.stem}.jsonl"))

    @property
    def cases(self) -> list[str]:
        return list(dict.fromkeys(variant.case for variant in self.file.variants))

    def check_text(self) -> None:
        """Raises UserError where this machine lacks the text, or has another one than what is kept was made of."""
        texts = {variant.corpus().fingerprint for variant in self.file.variants}
        if any(kept.text not in texts for kept in self.book.runs.values()):
            raise UserError(
                f"{self.book.path}: its outcomes are of another text than this machine's Python has: "
                "keep new ones elsewhere, with --out DIRECTORY"
            )

    def lacking(self) -> list[tuple[Variant, int]]:
        """What is still to be run, as far as it can be said by now: the yardstick's seeds follow its choice."""
        wanted = [(variant, seed) for variant in self.file.variants for seed in self._seeds(variant)]
        return [(variant, seed) for variant, seed in wanted if self.book.find(variant, seed) is None]

    def _seeds(self, variant: Variant) -> Sequence[int]:
        seeds, cell = variant.world.seeds, self.file.cell
        if cell is None or variant.name in cell.reach:
            return seeds
        if variant.name in cell.choose:
            return seeds if self.yardstick(variant.case) == variant.name else seeds[:1]
        return seeds[:1] if variant.name in cell.once else seeds

    def yardstick(self, case: str) -> str:
        """The best of those to choose from; nothing while one of them has not been run."""
        assert self.file.cell is not None
        found: dict[str, float] = {}
        for variant in self._of(case):
            if variant.name in self.file.cell.choose:
                done = self.book.find(variant, variant.world.seeds[0])
                if done is None:
                    return ""
                found[variant.name] = math.inf if done.choosing_loss is None else done.choosing_loss
        return min(found, key=lambda name: found[name])

    def _of(self, case: str) -> list[Variant]:
        return [variant for variant in self.file.variants if variant.case == case]

    def figures(self, case: str) -> list[Figure]:
        """Of all variants that were run, in the file's order."""
        found = []
        for variant in self._of(case):
            runs = [self.book.find(variant, seed) for seed in variant.world.seeds]
            if known := tuple(run for run in runs if run is not None):
                found.append(Figure(variant.name, known))
        return found

    def verdicts(self) -> Iterator[Verdict]:
        """Of the cases in which there is something to compare."""
        cell = self.file.cell
        for case in self.cases if cell is not None else []:
            assert cell is not None
            figures = {figure.variant: figure for figure in self.figures(case)}
            yardstick = figures.get(self.yardstick(case))
            for name, goal in cell.reach.items():
                if yardstick is not None and name in figures:
                    yield self._verdict(cell, case, yardstick, figures[name], goal, figures.get(cell.faster_than))

    def _verdict(
        self, cell: CellTable, case: str, yardstick: Figure, reached: Figure, goal: float, slower: Figure | None
    ) -> Verdict:
        title = ", ".join(part for part in (cell.title, case, reached.variant if len(cell.reach) > 1 else "") if part)
        return Verdict(
            title=title,
            yardstick=yardstick,
            reached=reached,
            goal=goal,
            time_ratio=reached.seconds / slower.seconds if slower is not None else None,
            time_share=cell.time_share,
            idle_share=cell.idle_share,
        )

    def curves(self) -> dict[str, list[list[tuple[float, float, float]]]]:
        """What is worth drawing: of each variant its seeds' points (seconds, tokens, loss). Of a file without axes."""
        if len(self.cases) > 1:
            return {}
        (case,) = self.cases
        cell, yardstick = self.file.cell, self.yardstick(case) if self.file.cell else ""
        return {
            figure.variant: [
                [(seconds, float(tokens), loss) for seconds, tokens, _, _, loss in run.curve if loss is not None]
                for run in figure.runs
            ]
            for figure in self.figures(case)
            if cell is None or figure.variant not in cell.choose or figure.variant == yardstick
        }

    @property
    def faults(self) -> Sequence[FaultTable]:
        """That strike in every variant."""
        worlds = [variant.world for variant in self.file.variants]
        return worlds[0].faults if all(world.faults == worlds[0].faults for world in worlds) else []

    @property
    def problems(self) -> list[str]:
        """Runs that did not come to their end."""
        return [done.told() for case in self.cases for f in self.figures(case) for done in f.runs if done.problem]


def find(paths: Sequence[Path]) -> list[Path]:
    """The world files among them and in the directories among them. Raises UserError where there is none."""
    found = [file for path in paths for file in (sorted(path.glob("*.toml")) if path.is_dir() else [path])]
    if not found:
        raise UserError(f"{', '.join(map(str, paths))}: there is no world file (.toml) in it")
    return found


def _share(studies: Sequence[Study]) -> None:
    """What is the same world in two studies is run once."""
    known = {key: done for study in studies for key, done in study.book.runs.items()}
    for study in studies:
        for variant, seed in study.lacking():
            if done := known.get(_key(variant.settings(), seed)):
                study.book.add(replace(done, variant=variant.name, case=variant.case))


def run_all(studies: Sequence[Study], told: Callable[[str], None], processes: int = 0) -> None:
    """Run what the studies lack, so many at once; 0: one a core. `told` is given a line as each run ends.

    Raises UserError where the text is not what it was.
    """
    for study in studies:
        study.check_text()
    _share(studies)
    if not any(study.lacking() for study in studies):
        return
    at_once = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(at_once, mp_context=multiprocessing.get_context("spawn")) as pool:
        under_way: dict[Future[Run], tuple[Study, str]] = {}
        while True:
            lacking = [(study, variant, seed) for study in studies for variant, seed in study.lacking()]
            names = [f"{study.book.path} {variant.title} {seed}" for study, variant, seed in lacking]
            for (study, variant, seed), name in zip(lacking, names, strict=True):
                if len(under_way) < at_once and name not in [running for _, running in under_way.values()]:
                    under_way[pool.submit(run, variant, seed)] = (study, name)
            if not under_way:
                return
            for done in wait(under_way, return_when=FIRST_COMPLETED).done:
                study, _ = under_way.pop(done)
                study.book.add(done.result())
                _share(studies)
                left = sum(len(study.lacking()) for study in studies)
                told(f"[{left} left] {study.file.name}: {done.result().told()}")
