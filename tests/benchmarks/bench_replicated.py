"""What it costs that a standby has each delta on its disk before it is acknowledged.

Real processes, sockets and disks: a server, a standby and two workers whose rounds are so short that they wait for
acknowledgements most of the time. The runs differ in `durability` alone, and take turns.
"""

import statistics
import time
from pathlib import Path

import pytest
from e2e.harness import Run

WARM_DELTAS = 50
STRETCH_SECONDS = 10.0
TURNS = 5
LEAST_RATIO = 0.6


def deltas_per_second(directory: Path, durability: str) -> float:
    with Run(
        directory, samples=10_000_000, standbys=["shanghai"], server={"durability": durability},
        merge="per-push", steps_per_round=2, max_staleness=64,
    ) as run:  # fmt: skip
        run.start_server()
        run.start_standby("shanghai")
        run.start_workers()

        def acknowledged() -> int:
            return sum(len(run.acknowledged(worker)) for worker in run.names)

        run.wait(lambda: acknowledged() > WARM_DELTAS, "the run has begun")
        before, began = acknowledged(), time.monotonic()
        time.sleep(STRETCH_SECONDS)
        return (acknowledged() - before) / (time.monotonic() - began)


@pytest.mark.timeout(600)
def test_replicated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates: dict[str, list[float]] = {"local": [], "replicated": []}
    for turn in range(TURNS):
        for durability, measured in rates.items():
            measured.append(deltas_per_second(tmp_path / f"{durability}-{turn}", durability))
    local, replicated = (statistics.median(measured) for measured in rates.values())
    ratio = replicated / local
    with capsys.disabled():
        spread = {name: f"{min(measured):.1f} to {max(measured):.1f}" for name, measured in rates.items()}
        print(
            f"\nacknowledged deltas a second, median of {TURNS}: {local:.1f} local ({spread['local']}), "
            f"{replicated:.1f} replicated ({spread['replicated']}): ratio {ratio:.2f}"
        )
    assert ratio >= LEAST_RATIO
