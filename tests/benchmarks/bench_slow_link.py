"""What a delta of 100 MB makes of a link of 100 Mbit/s and 80 ms, and whether heartbeats come through beside it.

Network namespaces and real packets of 1500 bytes. The rate counts their headers, and what CURVE and TCP add to them.
"""

import itertools
from pathlib import Path

import pytest
from benchmarks.figures import Figures
from benchmarks.lives import FAR, HOME, BenchRun
from benchmarks.pusher import push_held, seen_by
from network.rough import Rough
from network.sites import Sites, why_not

from hetero_async.core.records import Left

pytestmark = pytest.mark.skipif(bool(reason := why_not()), reason=reason)

NUMEL = 30_300_000  # of which `fp32` makes 100 MB
MEGABITS_PER_SECOND = 100
ONE_WAY_MS = 40
HEARTBEAT_SECONDS = 1.0  # core.worker.HEARTBEAT_EVERY_MS
TURNS = 5


@pytest.mark.timeout(300)
def test_slow_link(figures: Figures, tmp_path: Path) -> None:
    out, hold = tmp_path / "seen.json", tmp_path / "hold"
    with (
        Sites(HOME, FAR) as sites,
        BenchRun(tmp_path / "run", network=sites, workers=1, codec_up="fp32", merge="per-push", norm_gate=0.0) as run,
    ):
        run.serve()
        [worker] = run.names
        told = {"run_toml": str(run.config.path), "worker": worker, "numel": NUMEL, "codec": "fp32"}
        run.beside("pusher", push_held, **told, out=str(out), hold=str(hold))
        turns, silences = [], []
        for seq in itertools.count(1):
            run.wait(lambda seq=seq: seq in seen_by(out).get(worker, {}).get("acknowledged", {}), "acknowledged")
            seen = seen_by(out)[worker]
            if seq == 1:
                sites.between(HOME, FAR, rough=Rough(delay_ms=ONE_WAY_MS), megabits_per_second=MEGABITS_PER_SECOND)
            else:
                seconds = seen["acknowledged"][seq] - seen["pushed"][seq]
                turns.append((8 * seen["payload_bytes"] / seconds / 1e6, float(MEGABITS_PER_SECOND)))
                silences.append((seen["silence_seconds"], HEARTBEAT_SECONDS))
            if len(turns) == TURNS:
                break
            hold.unlink()
        assert not run.records(Left), "nobody was given up"
    figures.add("slow link: 100 MB over 100 Mbit/s and 80 ms", turns, "Mbit/s", at_least=0.9)
    figures.add("slow link: longest silence between answers to heartbeats, sent once a second", silences, "s")
