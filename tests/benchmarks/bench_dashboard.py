"""What it costs a server of 200 workers to be watched, as a share of the processor that it ingests deltas with.

One process, as a server is: the real core, codecs and tensors without sockets and disk, and beside them the thread that
keeps the history and serves the page to readers in another process. Watched and quiet stretches take turns. What is
compared is the CPU time of the whole process for as many deltas, so that a busy machine does not bend it: what the
watched stretch took beyond the quiet ones is set against the time that it lasted, since looks come by the clock.
"""

import http.client
import statistics
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e.harness import FORKS, free_port, start_fork_server, until
from small_run import SmallRun

from hetero_async.core.records import RunSettings
from hetero_async.core.status import summary
from hetero_async.core.trend import Trend
from hetero_async.shell.telemetry import NullObserver
from hetero_async.watch import dashboard
from hetero_async.watch.chronicle import LOOK_EVERY_SECONDS, Chronicle, open_chronicle

WORKERS = 200
READERS = 4
STRETCH_SECONDS = 6.0
TURNS = 7
MOST_SHARE = 0.02
TREND = Trend()


def reader_life(port: int) -> None:
    while True:
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
            connection.request("GET", "/events")
            answer = connection.getresponse()
            while answer.readline():
                pass
        time.sleep(0.5)


def look(run: SmallRun) -> dict[str, Any]:
    """As `Serving.look` has it."""
    lsn = run.server.state.lsn
    beside = {"bytes": {"up": 8 * lsn, "down": 9 * lsn}, "log": {"lsn": lsn, "released": lsn}, "quarantine": []}
    return summary(run.server, TREND, 0) | beside


@dataclass(frozen=True, slots=True)
class Stretch:
    deltas: int
    cpu_seconds: float
    seconds: float


def stretch(run: SmallRun, chronicle: Chronicle | None = None) -> Stretch:
    count, next_look = 0, 0.0
    began, cpu_began = time.monotonic(), time.process_time()
    while (now := time.monotonic()) < began + STRETCH_SECONDS:
        run.push(f"a-{count % WORKERS}")
        count += 1
        if chronicle is not None and now >= next_look:
            chronicle.hand(look(run))
            next_look = now + LOOK_EVERY_SECONDS
    return Stretch(count, time.process_time() - cpu_began, time.monotonic() - began)


def watched_stretch(run: SmallRun, directory: Path) -> Stretch:
    port = free_port()

    async def show(chronicle: Chronicle) -> None:
        await dashboard.show(f"http://127.0.0.1:{port}", chronicle)

    directory.mkdir()
    with open_chronicle(directory, NullObserver(), show) as chronicle:
        chronicle.hand(look(run))
        until(lambda: chronicle.address, "it is shown", 60, str)
        readers = [FORKS.Process(target=reader_life, args=(port,), daemon=True) for _ in range(READERS)]
        for reader in readers:
            reader.start()
        try:
            return stretch(run, chronicle)
        finally:
            for reader in readers:
                reader.kill()


@pytest.mark.timeout(600)
def test_being_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = SmallRun(RunSettings(run="small", samples=1 << 40, merge="per-push", max_staleness=1 << 20))
    for number in range(WORKERS):
        run.join(f"a-{number}")
    start_fork_server()
    before = stretch(run)
    shares: list[float] = []
    for turn in range(TURNS):
        watched = watched_stretch(run, tmp_path / str(turn))
        after = stretch(run)
        quiet = (before.cpu_seconds + after.cpu_seconds) / (before.deltas + after.deltas)
        shares.append((watched.cpu_seconds - watched.deltas * quiet) / watched.seconds)
        before = after
    share = statistics.median(shares)
    with capsys.disabled():
        spread = ", ".join(f"{one:.2%}" for one in sorted(shares))
        print(
            f"\n{WORKERS} workers, {READERS} readers: being watched takes {share:.2%} of a processor, "
            f"median of {spread}; a delta takes {1000 * quiet:.1f} ms of it"
        )
    assert share <= MOST_SHARE
