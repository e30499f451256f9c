"""Runs worlds by their seeds: one with its event log, thousands in parallel, and a failing one ever smaller."""

import gc
import itertools
import multiprocessing
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hetero_async.sim.checkers import Violation
from hetero_async.sim.plan import draw
from hetero_async.sim.workload import Regression
from hetero_async.sim.world import Outcome, simulate

# A simulated disk belongs in memory: nothing of it is to be kept.
MEMORY = Path("/dev/shm")
# In one world of so many the model has buffers, which change what travels and nothing that is learned.
WITH_BUFFERS_EVERY = 4
# Seeds that one process is given at a time, and how many such parcels wait for each process.
PARCEL, PARCELS_AHEAD = 4, 2
# A failing schedule is not tried in more than so many smaller versions.
SHRINK_RUNS_MAX = 80
HOUR_SECONDS = 3600


@dataclass(slots=True)
class Failure:
    seed: int
    violation: Violation
    faults: list[str]  # those that are needed for it, in words
    recent: list[str]
    replay: str  # the command that shows it


@dataclass(slots=True)
class Tally:
    """What many seeds came to."""

    seeds: int = 0
    acknowledged: int = 0
    refused: int = 0
    lost: int = 0
    virtual_seconds: float = 0.0
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.seeds += 1
        self.acknowledged += outcome.acknowledged
        self.refused += outcome.refused
        self.lost += outcome.lost
        self.virtual_seconds += outcome.virtual_seconds
        self.faults += outcome.faults

    def summary(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "seeds": self.seeds,
            "failures": [
                {
                    "seed": failure.seed,
                    "invariant": failure.violation.invariant,
                    "what": failure.violation.what,
                    "faults": failure.faults,
                    "replay": failure.replay,
                }
                for failure in self.failures
            ],
            "acknowledged": self.acknowledged,
            "refused": self.refused,
            "lost": self.lost,
            "faults": dict(sorted(self.faults.items())),
            "virtual_hours": round(self.virtual_seconds / HOUR_SECONDS, 3),
            "seconds": round(self.seconds, 1),
            "seeds_per_second": round(self.seeds / self.seconds, 2) if self.seconds else 0.0,
        }


def run_seed(
    seed: int,
    faults: Sequence[int] | None = None,
    echo: Callable[[str], None] | None = None,
    kinds: Sequence[str] = (),
) -> Outcome:
    """One world. `faults` keeps only these of its faults, counted from 0; `echo` is given every event's line.

    `kinds`: a world of this seed in which nothing but faults of these kinds is drawn.
    """
    torch.set_num_threads(1)
    plan = draw(seed, kinds)
    if faults is not None:
        plan = plan.only(faults)
    workload = Regression(plan.dataset_samples, seed, with_buffers=seed % WITH_BUFFERS_EVERY == WITH_BUFFERS_EVERY - 1)
    memory = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="hetero-async-", dir=memory) as scratch:
        try:
            return simulate(plan, Path(scratch) / "world", workload, echo)
        except Exception as error:
            error.add_note(f"the simulator itself broke; see it again with: hetero-async sim --seed {seed}")
            raise


def run_many(seeds: Iterable[int], processes: int, seconds: float, told: Callable[[Tally], None]) -> Tally:
    """Run seeds in parallel until they are used up or the time is over; a failing one is shrunk at the end.

    `told` is given the tally as it grows. Which seeds are run in a given time depends on the machine; what comes of
    each does not.
    """
    tally, began = Tally(), time.monotonic()
    failed: list[Outcome] = []
    spawn = multiprocessing.get_context("spawn")
    # What torch has brought along stays: to look through all of it again and again costs a twentieth.
    with ProcessPoolExecutor(processes, mp_context=spawn, initializer=gc.freeze) as pool:
        for outcome in _outcomes(pool, seeds, processes * PARCELS_AHEAD, began + seconds):
            tally.add(outcome)
            tally.seconds = time.monotonic() - began
            if outcome.violation is not None:
                failed.append(outcome)
            told(tally)
        tally.failures = list(pool.map(examine, sorted(failed, key=lambda outcome: outcome.seed)))
    return tally


def _outcomes(pool: ProcessPoolExecutor, seeds: Iterable[int], ahead: int, ends_at: float) -> Iterator[Outcome]:
    left = iter(seeds)
    under_way: list[Future[list[Outcome]]] = []
    while True:
        while (
            len(under_way) < ahead and time.monotonic() < ends_at and (parcel := list(itertools.islice(left, PARCEL)))
        ):
            under_way.append(pool.submit(_run_parcel, parcel))
        if not under_way:
            return
        done, _ = wait(under_way, return_when=FIRST_COMPLETED)
        under_way = [future for future in under_way if future not in done]
        for future in done:
            yield from future.result()


def _run_parcel(seeds: Sequence[int]) -> list[Outcome]:
    return [run_seed(seed) for seed in seeds]


def examine(outcome: Outcome, struck: Sequence[int] | None = None) -> Failure:
    """What of its faults a failed run needs, and the last lines of the smallest run that still fails.

    `struck`: the run had only these of its world's faults, counted from 0.
    """
    assert outcome.violation is not None, "only a failure can be examined"
    faults = draw(outcome.seed).faults
    needed, smallest = _shrunk(outcome, range(len(faults)) if struck is None else struck)
    replay = f"hetero-async sim --seed {outcome.seed}"
    if len(needed) < len(faults):
        replay += f" --faults {','.join(map(str, needed)) or 'none'}"
    assert smallest.violation is not None
    return Failure(
        seed=outcome.seed,
        violation=smallest.violation,
        faults=[f"{faults[number].at:8.3f} s  {faults[number]}" for number in needed],
        recent=smallest.recent,
        replay=replay,
    )


def _shrunk(outcome: Outcome, struck: Iterable[int]) -> tuple[list[int], Outcome]:
    """Leave out halves, quarters, … single faults, for as long as the same invariant breaks (Zeller's ddmin)."""
    kept, smallest = list(struck), outcome
    size, runs = max(1, len(kept) // 2), 0
    while kept and runs < SHRINK_RUNS_MAX:
        for start in range(0, len(kept), size):
            fewer = kept[:start] + kept[start + size :]
            tried = run_seed(outcome.seed, fewer)
            runs += 1
            if _is_same(tried, outcome):
                kept, smallest = fewer, tried
                break
        else:
            if size == 1:
                break
            size //= 2
    return kept, smallest


def _is_same(tried: Outcome, failed: Outcome) -> bool:
    return (
        tried.violation is not None
        and failed.violation is not None
        and tried.violation.invariant == failed.violation.invariant
    )
