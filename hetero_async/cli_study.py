"""The verb that compares ways of learning in simulated worlds: `study`. Thin, as those in cli.py, which lists it."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hetero_async.errors import HeteroAsyncError, UserError
from hetero_async.watch.comparison import draw_verdicts, render_comparison, render_verdicts

if TYPE_CHECKING:
    from hetero_async.sim.studying import Study

# Where this project's own studies lie.
KEPT = Path("tests/benchmarks/learning")
# Where nobody says how wide a line may be.
FILE_WIDTH = 128


def study(
    worlds: Annotated[
        list[Path] | None, typer.Argument(help=f"World files, or directories of them; if not given, {KEPT}.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Where outcomes and pictures go; if not given, `results` beside the file.")
    ] = None,
    processes: Annotated[int, typer.Option(help="How many runs at once; 0: one a core.")] = 0,
    report: Annotated[bool, typer.Option("--report", help="Run nothing; show what the kept outcomes come to.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as one JSON object.")] = False,
) -> None:
    """Train a real model in worlds of your making, in virtual time: which rule, which codec, which link learns faster?

    Example: hetero-async study examples/worlds/rules.toml

    Outcomes are kept one line a run, so a study that was cut short goes on where it was. With --report it prints what
    was to be reached in each cell, and whether it was.
    """
    from hetero_async.sim import studying

    paths = worlds or [KEPT]
    if not worlds and not KEPT.is_dir():
        raise UserError("say which world: hetero-async study FILE.toml")
    studies = [studying.Study.open(path, out) for path in studying.find(paths)]
    if not report:
        studying.run_all(studies, lambda line: print(line, file=sys.stderr, flush=True), processes)
    if not (report and as_json):
        _draw(studies)
    if as_json:
        print(json.dumps([_summary(study) for study in studies]))
    else:
        _tell(studies)
    if problems := [told for study in studies for told in study.problems]:
        raise HeteroAsyncError(f"{len(problems)} runs did not come to their end: {problems[0]}")


def _summary(study: "Study") -> dict[str, object]:
    return {
        "study": study.file.name,
        "outcomes": str(study.book.path),
        "cells": [verdict.summary() for verdict in study.verdicts()],
        "variants": {case: [figure.summary() for figure in study.figures(case)] for case in study.cases},
        "lacking": len(study.lacking()),
    }


def _tell(studies: list["Study"]) -> None:
    console = Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    for study in studies:
        if study.file.cell is None:
            for case in study.cases:
                figures = [figure.summary() for figure in study.figures(case)]
                console.print(render_comparison(": ".join(filter(None, (study.file.name, case))), figures))
    if verdicts := [verdict.summary() for study in studies for verdict in study.verdicts()]:
        console.print(render_verdicts(verdicts))
    if lacking := sum(len(study.lacking()) for study in studies):
        console.print(f"{lacking} runs are still lacking; run them with: hetero-async study")
    for directory in dict.fromkeys(study.book.path.parent for study in studies):
        console.print(f"outcomes and pictures: {directory}", soft_wrap=True)


def _draw(studies: list["Study"]) -> None:
    """A picture of all cells, and one a study with curves to show; none where matplotlib is not installed."""
    from hetero_async.watch.report import draw_study

    try:
        if verdicts := [verdict.summary() for study in studies for verdict in study.verdicts()]:
            draw_verdicts(verdicts, studies[0].book.path.with_name("cells.png"))
        for study in studies:
            faults = [(fault.at, f"{fault.kind} {fault.target}".strip()) for fault in study.faults]
            path = study.book.path.with_suffix(".png")
            if curves := study.curves():
                draw_study(curves, faults, path, title=study.file.cell.title if study.file.cell else study.file.name)
    except UserError as error:
        print(error, file=sys.stderr)
