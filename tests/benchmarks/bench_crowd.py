"""Whether 200 workers get as many deltas acknowledged as 8 do: one server, a tiny model, everybody pushes all the time.

Real processes and sockets: a server, and a process in which every worker has its own key and its own connections. It
pushes, is acknowledged, fetches what is published, and pushes again. Both crowds take turns.
"""

import time
from pathlib import Path

import pytest
from benchmarks.figures import Figures
from benchmarks.lives import BenchRun
from benchmarks.pusher import seen_by

CROWD, FEW = 200, 8
NUMEL = 6_400
CODEC = "int4"
STRETCH_SECONDS = 3.0
TURNS = 5


def deltas_per_second(directory: Path, workers: int) -> tuple[float, float]:
    """And the 99th percentile from push to acknowledgement, in seconds."""
    with BenchRun(directory, workers=workers, codec_up=CODEC, codec_down=CODEC, max_staleness=64) as run:
        run.serve()
        out = directory / "seen.json"
        run.push(run.names, NUMEL, CODEC, out, follows=True)

        def all_begun() -> bool:
            seen = seen_by(out)
            return len(seen) == workers and all(len(one["acknowledged"]) >= 2 for one in seen.values())

        run.wait(all_begun, "everybody has been acknowledged twice")
        began = time.monotonic()
        time.sleep(STRETCH_SECONDS)
        ends = began + STRETCH_SECONDS
        run.wait(lambda: out.stat().st_mtime > time.time() - 0.1, "it is noted")
        seen = seen_by(out)
        assert not any(one["refused"] for one in seen.values()), [one["refused"] for one in seen.values()]
        waits = sorted(
            moment - one["pushed"][seq]
            for one in seen.values()
            for seq, moment in one["acknowledged"].items()
            if began <= moment < ends
        )
        return len(waits) / STRETCH_SECONDS, waits[int(0.99 * len(waits))]


@pytest.mark.timeout(600)
def test_a_crowd_is_served_as_fast_as_a_few(figures: Figures, tmp_path: Path) -> None:
    rates, waits = [], []
    for turn in range(TURNS):
        crowd = deltas_per_second(tmp_path / f"crowd-{turn}", CROWD)
        few = deltas_per_second(tmp_path / f"few-{turn}", FEW)
        rates.append((crowd[0], few[0]))
        waits.append((crowd[1], few[1]))
    figures.add(f"crowd: deltas acknowledged a second, {CROWD} workers against {FEW}", rates, "1/s", at_least=0.8)
    figures.add(f"crowd: from push to acknowledgement, 99th percentile, {CROWD} against {FEW}", waits, "s")
