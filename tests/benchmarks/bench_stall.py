"""What training loses by being in a run: one worker's steps a second, against the same loop in a process without us.

The worker has one core, with its own background on it; server and a second worker have another, and go on meanwhile.
Worker and yardstick take turns, a round of steps each. Every turn of the worker holds one cut, its encoding and
sending, and what a publish makes it do, on the core that it trains on.
"""

import itertools
import statistics
from pathlib import Path

import pytest
from benchmarks.figures import Figures
from benchmarks.lives import CORES, BenchRun
from benchmarks.scripts import moments, train_transformer

ROUND = 20
TURNS = 5


@pytest.mark.skipif(CORES < 2, reason="the server and the second worker need a core of their own")
@pytest.mark.timeout(600)
def test_stall(figures: Figures, tmp_path: Path) -> None:
    with BenchRun(
        tmp_path / "run", workers=2, codec_up="int4", codec_down="int4", steps_per_round=ROUND, dylu=False
    ) as run:
        run.serve(cores=[1])
        measured, other = run.names
        goes = {name: tmp_path / f"{name}.go" for name in ("with", "without")}
        notes = {name: tmp_path / f"{name}.steps" for name in ("with", "without", "other")}
        goes["with"].touch()
        run.train(measured, train_transformer, [0], notes=str(notes["with"]), go=str(goes["with"]))
        run.train(other, train_transformer, [1], notes=str(notes["other"]))
        run.beside("without", train_transformer, [0], notes=str(notes["without"]), go=str(goes["without"]), joins=False)
        run.wait(lambda: len(moments(notes["with"])) > 2 * ROUND, "it has trained two rounds", seconds=300)
        turns, pauses = [], []
        for _ in range(TURNS):
            seconds: dict[str, list[float]] = {}
            for name in ("with", "without"):
                seconds[name] = stretch(run, notes[name], goes, name)
            own, bare = seconds["with"], seconds["without"]
            turns.append((len(own) / sum(own), len(bare) / sum(bare)))
            pauses.append((max(own), statistics.median(own)))
    figures.add("stall: steps a second of a worker, 10 M parameters, H = 20, int4", turns, "1/s", at_least=0.97)
    figures.add("stall: the longest time from step to step, in steps", pauses, "s", at_most=1.5)


def stretch(run: BenchRun, notes: Path, goes: dict[str, Path], name: str) -> list[float]:
    """Seconds of each of a round's steps, while the other one stands still."""
    for one, go in goes.items():
        go.touch() if one == name else go.unlink(missing_ok=True)
    begun = len(moments(notes))
    # The first step ends what has been under way: from its end on they are counted.
    run.wait(lambda: len(moments(notes)) >= begun + ROUND + 1, f"a round of {name}", seconds=300)
    found = moments(notes)[begun : begun + ROUND + 1]
    return [after - before for before, after in itertools.pairwise(found)]
