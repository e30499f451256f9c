"""The verb that runs simulated worlds: `sim`. Thin, as those in cli.py, which lists it."""

import itertools
import json
import math
import os
import secrets
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hetero_async.errors import HeteroAsyncError, UserError
from hetero_async.watch.tally import render_failure, render_tally

if TYPE_CHECKING:
    from hetero_async.sim import runner


def sim(
    seed: Annotated[int | None, typer.Option(help="Run this one world and show every event.")] = None,
    faults: Annotated[str, typer.Option(help='With --seed: only these of its faults ("2,5", or "none").')] = "",
    seeds: Annotated[str, typer.Option(metavar="A..B", help="Run the worlds from A to B - 1.")] = "",
    minutes: Annotated[float, typer.Option(help="Run new worlds for so long.")] = 0.0,
    processes: Annotated[int, typer.Option(help="How many at once; 0: one a core.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Run the real code in simulated worlds where everything fails, and check every promise.

    Example: hetero-async sim --seeds 0..1000
    """
    if seed is not None:
        _sim_one(seed, _numbers(faults), as_json)
    elif seeds or minutes:
        first, stop = _stretch(seeds) if seeds else (secrets.randbelow(1 << 32), None)
        worlds = itertools.count(first) if stop is None else range(first, stop)
        _sim_many(worlds, processes or os.cpu_count() or 1, 60 * minutes or math.inf, as_json)
    else:
        raise UserError("say which worlds: --seed 7, --seeds 0..1000 or --minutes 10")


def _sim_one(seed: int, faults: list[int] | None, as_json: bool) -> None:
    from hetero_async.sim import runner

    outcome = runner.run_seed(seed, faults, None if as_json else print)
    tally = runner.Tally()
    tally.add(outcome)
    if outcome.violation is not None:
        tally.failures.append(runner.examine(outcome, faults))
    _tell(tally, as_json)


def _sim_many(worlds: Iterable[int], processes: int, seconds: float, as_json: bool) -> None:
    from hetero_async.sim import runner

    with Progress(
        TextColumn("{task.fields[told]}"),
        BarColumn(),
        TimeElapsedColumn(),
        transient=True,
        console=Console(stderr=True),
    ) as progress:
        total = len(worlds) if isinstance(worlds, range) else None
        task = progress.add_task("worlds", total=total, told="starting")
        tally = runner.run_many(
            worlds,
            processes,
            seconds,
            lambda so_far: progress.update(
                task, completed=so_far.seeds, told=f"{so_far.seeds} worlds, {so_far.acknowledged:,} deltas acknowledged"
            ),
        )
    _tell(tally, as_json)


def _tell(tally: "runner.Tally", as_json: bool) -> None:
    summary = tally.summary()
    if as_json:
        print(json.dumps(summary))
    else:
        console = Console()
        for told, failure in zip(summary["failures"], tally.failures, strict=True):
            # A command that is broken into lines cannot be copied.
            console.print(render_failure(told, failure.recent), soft_wrap=True)
        console.print(render_tally(summary))
    if tally.failures:
        raise HeteroAsyncError(f"{len(tally.failures)} of {tally.seeds} worlds broke a promise")


def _numbers(faults: str) -> list[int] | None:
    if faults in ("", "none"):
        return [] if faults else None
    if not all(number.isdigit() for number in faults.split(",")):
        raise UserError(f'--faults {faults}: must be numbers as a failure names them, "2,5", or "none"')
    return [int(number) for number in faults.split(",")]


def _stretch(seeds: str) -> tuple[int, int]:
    first, dots, stop = seeds.partition("..")
    if not (first.isdigit() and dots and stop.isdigit() and int(first) < int(stop)):
        raise UserError(f'--seeds {seeds}: must be A..B with A below B, for example "0..1000"')
    return int(first), int(stop)
