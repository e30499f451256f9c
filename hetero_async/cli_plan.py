"""The verb that says what to expect of a run before it is begun: `plan`. Thin, as those in cli.py, which lists it."""

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hetero_async.cli_study import FILE_WIDTH
from hetero_async.planning import question_of
from hetero_async.watch.forecast import render_forecast
from hetero_async.watch.outcome import lines, render_outcome
from hetero_async.watch.plan import forecast


def plan(
    file: Annotated[
        Path | None, typer.Argument(help="A run.toml with a \\[plan] table, or a file with nothing else.")
    ] = None,
    parameters: Annotated[float, typer.Option(help="That the model trains, such as 7e9.")] = 0.0,
    site: Annotated[
        list[str] | None,
        typer.Option(help="NAME:workers=8,step=1.2,batch=4,up=100Mbit,down=1Gbit,delay=80ms, once for each site."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Of the whole run; if not given, run.samples.")] = 0,
    against: Annotated[
        Path | None,
        typer.Option(metavar="RUN_TOML|DIRECTORY", help="Beside it, what this run has been like, and how far that is."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as one JSON object.")] = False,
) -> None:
    """Say what to expect: bytes, busy links, staleness, throughput, memory, disk, days; and how long rounds must be.

    Example: hetero-async plan --parameters 7e9 --site a:workers=8,step=1.2,up=1Gbit,down=1Gbit,delay=40ms

    `step` is one worker's time from step to step, `batch` its samples a step; `up` and `down` are the rates of the
    whole site's link to the server, `delay` is one way: half of what ping shows. With --against RUN, where a run of
    this plan has been, it says how well that was foretold.
    """
    question = question_of(file, parameters, site or [], samples)
    expected = forecast(question)
    told, shown = asdict(expected), render_forecast(question, expected)
    if against is not None:
        from hetero_async.measuring import outcome_of

        outcome = outcome_of(against)
        found = lines(question, expected, outcome)
        told = {line.name: line.told() for line in found}
        shown = render_outcome(found, outcome)
    if as_json:
        print(json.dumps(_finite(told)))
    else:
        Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(shown)


def _finite(figure: Any) -> Any:
    """JSON knows no infinity: what has none is null."""
    if isinstance(figure, dict):
        return {key: _finite(value) for key, value in figure.items()}
    if isinstance(figure, list | tuple):
        return [_finite(value) for value in figure]
    return None if isinstance(figure, float) and not math.isfinite(figure) else figure
