"""How many of the local steps of unequal workers behind a long link end in a merged delta, rather than thrown away.

Four workers of speeds 1, 1, 2 and 4 with an answer 200 ms away, in network namespaces. Some steps are always under way:
the run ends by itself when its samples are trained, and what is not in the log then has been for nothing.
"""

from pathlib import Path

import pytest
from benchmarks.figures import Figures
from benchmarks.lives import FAR, HOME, BenchRun
from benchmarks.scripts import moments, train_tiny
from network.rough import Rough
from network.sites import Sites, why_not

from hetero_async.core.records import Stepped

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

SPEEDS = (1, 1, 2, 4)
STEP_SECONDS = 0.08  # of speed 1
SAMPLES = 5_000
TURNS = 5
ONE_WAY_MS = 100


def steps(directory: Path, sites: Sites) -> tuple[float, float]:
    """Those in merged deltas, and all that were trained."""
    with BenchRun(
        directory, network=sites, workers=len(SPEEDS), samples=SAMPLES, steps_per_round=50,
        server={"keep_log": True},
    ) as run:  # fmt: skip
        run.serve()
        notes = {worker: directory / f"{worker}.steps" for worker in run.names}
        workers = [
            run.train(worker, train_tiny, notes=str(notes[worker]), step_seconds=STEP_SECONDS / speed)
            for worker, speed in zip(run.names, SPEEDS, strict=True)
        ]
        for worker in workers:
            run.wait(lambda worker=worker: worker.exit_code is not None, f"{worker.name} ends")
            assert worker.exit_code == 0, run.story()
        merged = {lsn for stepped in run.records(Stepped) for lsn in stepped.deltas}
        kept = sum(entry.record.steps for entry in run.entries() if entry.lsn in merged)
        return kept, sum(len(moments(path)) for path in notes.values())


@pytest.mark.timeout(300)
def test_kept(figures: Figures, tmp_path: Path) -> None:
    with Sites(HOME, FAR) as sites:
        sites.between(HOME, FAR, rough=Rough(delay_ms=ONE_WAY_MS))
        turns = [steps(tmp_path / str(turn), sites) for turn in range(TURNS)]
    figures.add("kept: local steps in merged deltas, speeds 1, 1, 2, 4 over 200 ms", turns, "steps", at_least=0.99)
